"""Commands that take weights in and out: import-checkpoints, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from circuit.quoting import counted

from . import complete, options
from .output import print_json, print_written, progress_bar, stdout, table
from .parsing import Commands
from .training import load_train_config

if TYPE_CHECKING:
    from circuit.training.imported import ImportResult

PANEL = "Weights of other programs"
series = Commands(name="series", help="Series of checkpoints, of which only weights are known.")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("import-checkpoints", rich_help_panel=PANEL)(import_checkpoints)
    app.command("import-recording", rich_help_panel=PANEL)(import_recording)
    app.command("export", rich_help_panel=PANEL)(export)
    app.add_typer(series, rich_help_panel=PANEL)  # its commands are reports


def import_checkpoints(
    files: Annotated[
        list[Path],
        typer.Argument(
            help=".safetensors or torch files of a state_dict, or folders of them.",
            autocompletion=complete.weights,
        ),
    ],
    benchmark_dir: Annotated[
        Path,
        typer.Option(
            help="Folder of the benchmark that the model was trained on.",
            autocompletion=complete.benchmark,
        ),
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder of the run.")],
    step: Annotated[
        list[int] | None,
        typer.Option(
            min=0, help="Step of a file, one for each in their order; from their names by default."
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Make a run of HookedTransformer weights that were trained elsewhere."""
    from circuit.training.imported import import_checkpoints as make_run

    with progress_bar(not as_json) as bar:
        task = bar.add_task("files", total=None, note="")
        result = make_run(
            files,
            benchmark_dir,
            output_dir,
            steps=step,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print_json(
            {
                "name": result.config.name,
                "config": result.config.model_dump(mode="json"),
                "paths": [str(result.folder / name) for name in result.files],
            }
        )
        return
    _print_import(result)


def import_recording(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of what circuit.watch recorded.", autocompletion=complete.trace
        ),
    ],
    module: Annotated[
        str,
        typer.Option(
            metavar="FILE.py:NAME",
            help="The module, or a function that makes one like it.",
            autocompletion=complete.own_code,
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="Task that says what the inputs mean, or FILE.py:Class of your own; none: numbers"
            " of the module alone.",
            autocompletion=complete.task,
        ),
    ] = None,
    benchmark_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of its benchmark; drawn with the task's defaults where there is none,"
            " by default in FOLDER/benchmark.",
            autocompletion=complete.benchmark,
        ),
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="Class of an optimizer that is not torch's; repeatable.",
            autocompletion=complete.own_code,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between checkpoints; every stored state by default."),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Say what made the module of a recording, and its task: then reports and pages work on it."""
    from circuit.reports.import_recording import import_recording as describe

    with progress_bar(not as_json) as bar:
        shown = bar.add_task("checkpoints", total=None, note="")
        result = describe(
            folder,
            module,
            task=task,
            benchmark_dir=benchmark_dir,
            optimizers=optimizer or (),
            checkpoint_every=checkpoint_every,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(shown, completed=done, total=total),
        )
    paths = [result.folder / name for name in result.files]
    if as_json:
        print_json(
            {
                "name": result.config.name,
                "config": result.config.model_dump(mode="json"),
                "paths": list(map(str, paths)),
            }
        )
        return
    print_written(paths)
    if result.without_checkpoints:
        stdout.print(f"no checkpoints: {result.without_checkpoints}", soft_wrap=True)
    shape, of = result.config.shape, result.config.benchmark_dir
    kind = "its own class" if shape is None else f"{shape.layers} layers"
    task = "no task" if of is None else f"the task of {of}"
    steps = result.config.recorded.last_step
    stdout.print(f"{counted(steps, 'step')} of a module of {kind}; {task}", soft_wrap=True)


def _print_import(result: ImportResult) -> None:
    known, model = result.config.imported, result.config.model
    shown = table(None, ["file", "step", "sha256"])
    for file in known.files:
        shown.add_row(file.file, str(file.step), file.sha256[:12])
    stdout.print(shown)
    stdout.print(
        f"{model.layers} layers, {model.heads} heads of width {model.d_model // model.heads},"
        f" d_model {model.d_model}, d_mlp {model.d_ff}, {model.max_sequence_length} positions;"
        f" unembedding {'tied' if model.tied_unembedding else 'of its own'}",
        soft_wrap=True,
    )
    if known.zero:
        stdout.print(f"in no file, so zero: {', '.join(known.zero)}", soft_wrap=True)
    if known.assumed:
        told = ", ".join(f"{name} {value}" for name, value in known.assumed.items())
        stdout.print(f"assumed, since weights do not tell it: {told}", soft_wrap=True)
    print_written([result.folder])
    stdout.print(
        "weights alone, without recipe and optimizer moments: reports work; training on and traces"
        " are refused",
        soft_wrap=True,
    )


def export(
    config: options.TrainConfigPath,
    checkpoint: options.Checkpoint,
    output_dir: Annotated[Path, typer.Option(help="Folder of model.safetensors and config.json.")],
    kind: Annotated[
        Literal["hooked_transformer", "bridge"] | None,
        typer.Option(
            help="Of model that loads them: of TransformerLens before 4, or a bridge, of 4;"
            " the run's by default."
        ),
    ] = None,
    overrides: options.Set = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a checkpoint's model as safetensors, as plain TransformerLens loads it."""
    settings = load_train_config(config, overrides)
    from circuit.reports.export import export_checkpoint

    result = export_checkpoint(settings, checkpoint, output_dir, kind=kind, overwrite=overwrite)
    if as_json:
        paths = [str(path) for path in result.paths]
        print_json({"law": result.law, "gap": result.gap, "load": result.load, "paths": paths})
        return
    print_written(result.paths)
    for line in result.load:
        stdout.print(line, soft_wrap=True)
    stdout.print(result.law, soft_wrap=True)
