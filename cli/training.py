"""Commands that train and evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuit import CircuitError
from circuit.quoting import shell_line

from . import options, signals
from .output import (
    interrupted_says,
    percent,
    print_json,
    print_written,
    progress_bar,
    share,
    stderr,
    stdout,
    table,
)

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from circuit.reports.optimizer_update_trace import TraceReport
    from circuit.tasks.base import Task
    from circuit.trace.while_training import TraceRecorder
    from circuit.train_config import TrainConfig
    from circuit.training.evaluate import Evaluation
    from circuit.training.loop import Progress, TrainResult

PANEL = "Training"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("train", cls=options.TracingCommand, rich_help_panel=PANEL)(train)
    app.command("evaluate", rich_help_panel=PANEL)(evaluate)


def train(
    config: options.TrainConfigPathOrNone = None,
    overrides: options.Set = None,
    recipe: options.Recipe = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run, with --recipe.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Last step, with --recipe; else the recipe's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --recipe; 0 by default.")] = None,
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, bit for bit.")
    ] = False,
    resume_from: Annotated[
        int | None,
        typer.Option(
            min=0, help="Go on from the checkpoint of this step; with --overwrite, drop later ones."
        ),
    ] = None,
    stop_at_step: Annotated[
        int | None, typer.Option(min=1, help="Stop here, with a checkpoint, ready for --resume.")
    ] = None,
    allow_drift: Annotated[
        bool,
        typer.Option("--allow-drift", help="Resume even where the changed environment moves bits."),
    ] = False,
    trace: options.Trace = None,
    trace_end_step: options.TraceEndStep = None,
    trace_anchor_every: options.TraceAnchorEvery = None,
    trace_checkpoint_every: options.TraceCheckpointEvery = None,
    trace_top_k_parameters: options.TraceTop = None,
    task: options.Task = None,
    sinks: options.Sinks = None,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Train a run: metrics, checkpoints and summary go to the config's output_dir."""
    settings = load_train_config(
        config,
        overrides,
        device,
        threads,
        recipe=recipe,
        output_dir=output_dir,
        steps=steps,
        seed=seed,
    )
    if task is not None:
        from circuit.tasks.benchmark import ensure_benchmark

        ensure_benchmark(task, Path(settings.benchmark_dir))
    recorder = trace_recorder(
        trace,
        end_step=trace_end_step,
        anchor_every=trace_anchor_every,
        checkpoint_every=trace_checkpoint_every,
        top_k_parameters=trace_top_k_parameters,
    )
    from circuit.sinks import open_sinks

    with (
        interrupted_says("go on from the last checkpoint with --resume"),  # the second time
        open_sinks(sinks or ()) as opened,
        progress_bar(not as_json) as bar,
        signals.stop_on_first() as interrupted,
    ):
        result, report = train_run(
            settings,
            recorder,
            overwrite=overwrite,
            resume=resume,
            resume_from=resume_from,
            allow_drift=allow_drift,
            stop_at=stop_at_step,
            stop=interrupted,
            progress=TrainBar(bar, settings, resumes=resume),
            sinks=opened,
        )
    if as_json:
        print_json(train_payload(result, report))
    else:
        _print_training(result, recorder)
        if report is not None:
            print_trace(report)
    if interrupted():
        again = {"--recipe": recipe, "--trace": trace}
        same = " and ".join(option for option, value in again.items() if value is not None)
        message = f"interrupted after step {result.step}, with a checkpoint; go on with --resume"
        stderr.print(message + (f" and the same {same}" if same else ""), soft_wrap=True)
        raise typer.Exit(signals.exit_code())


def trace_recorder(folder: str | None, **given: int | None) -> TraceRecorder | None:
    """What `--trace` asks for; None without it.

    Args:
        folder: the option's value; empty where it has none.
        given: fields of `RecordOptions`; None takes their default.

    Raises:
        CircuitError: they are given without `--trace`.
    """
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if folder is None:
        if fields:
            name = next(iter(fields)).replace("_", "-")
            raise CircuitError(f"--trace-{name} without --trace", fix="pass --trace, too")
        return None
    from circuit.trace.record import RecordOptions
    from circuit.trace.while_training import TraceRecorder

    return TraceRecorder(folder or None, RecordOptions(**fields))


def train_run(
    settings: TrainConfig, recorder: TraceRecorder | None, **switches: Any
) -> tuple[TrainResult, TraceReport | None]:
    """Train, traced if there is a recorder; the report of a trace that is finished."""
    if recorder is None:
        from circuit.training.loop import train

        return train(settings, **switches), None
    from circuit.reports.optimizer_update_trace import train_traced

    return train_traced(settings, recorder, **switches)


def print_trace(report: TraceReport) -> None:
    """Where a trace that was recorded while training stands, and its law."""
    store = report.record.store
    print_written([store.root, *report.paths])
    stdout.print(f"{report.summary['bytes'] / 1e6:.1f} MB on disk")
    stdout.print(report.law, soft_wrap=True)


def _print_training(result: TrainResult, recorder: TraceRecorder | None) -> None:
    settings = result.config
    if result.task is not None:
        print_evaluations(list(result.evaluations.values()), result.task)
    steps = result.step - result.first_step
    if result.first_step:
        stdout.print(f"resumed from the checkpoint of step {result.first_step}")
    stdout.print(
        f"step {result.step} of {settings.steps}; {steps} steps in {result.seconds:.0f} s"
        f" ({steps / max(result.seconds, 1e-9):.1f} a second with evaluations)"
        if steps
        else f"step {result.step} of {settings.steps}: nothing was left to do"
    )
    if result.best:
        best = result.best
        stdout.print(
            f"best checkpoint: step {best['step']}, {best['split']} {best['metric']}"
            f" {percent(best['value'])}"
        )
    print_written([result.folder])
    traced = None if recorder is None else recorder.folder_of(settings).resolve()
    folder = (result.folder / "analysis").resolve()
    analysis = (path for path in folder.rglob("*") if path.is_file())
    if result.first_step == 0 and any(
        traced is None or not path.is_relative_to(traced) for path in analysis
    ):
        stdout.print(
            f"note: what stands in {result.folder / 'analysis'} was made from an earlier run"
            + ("" if traced is None else ", but for the trace"),
            soft_wrap=True,
        )
    if recorder is None and result.first_step:
        _note_trace_behind(result)


def _note_trace_behind(result: TrainResult) -> None:
    """Say so where a run that was traced while it trained has gone on without its trace."""
    from circuit.trace.store import WHILE_TRAINING, TraceStore
    from circuit.trace.while_training import DEFAULT_FOLDER

    folder = result.folder / DEFAULT_FOLDER
    if not (folder / WHILE_TRAINING).exists():
        return
    try:
        store = TraceStore(folder)
        manifest, last = store.manifest, store.last_step
    except CircuitError as error:  # the run is sound, whatever has become of its trace
        stdout.print(f"note: the trace of this run cannot be read: {error}", soft_wrap=True)
        return
    if last >= min(result.step, manifest.end_step):
        return
    words = ["circuit", "trace", "record", "--config", str(result.folder / "run_config.json")]
    words += [*result.config.recipe_words, "--from-initialization"]
    words += ["--end-step", str(manifest.end_step), "--resume"]
    words += ["--output-dir", str(folder), "--anchor-every", str(manifest.anchor_every)]
    words += ["--checkpoint-every", str(manifest.checkpoint_every)]
    words += ["--top-k-parameters", str(manifest.top_k_parameters)]
    stdout.print(
        f"note: the trace in {folder} ends at step {last}; finish it with: " + shell_line(words),
        soft_wrap=True,
    )


def evaluate(
    config: options.TrainConfigPath,
    checkpoint: options.Checkpoint,
    overrides: options.Set = None,
    split: options.Splits = None,
    slices: options.Slices = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON to write; default: evaluation/<checkpoint>.json in the checkpoint's run."
        ),
    ] = None,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Evaluate a checkpoint: loss and accuracies, by token role, by slice, with q, r and w."""
    settings = load_train_config(config, overrides, device, threads)
    from circuit.reports.evaluation import evaluate_checkpoint

    with progress_bar(not as_json) as bar:
        task = bar.add_task("records", total=None, note="")

        def report(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, note=name)

        result = evaluate_checkpoint(
            settings, checkpoint, splits=split, slices=slices, output=output, progress=report
        )
    if as_json:
        print_json(
            {
                "step": result.step,
                "evaluations": {e.split: e.to_row() for e in result.evaluations},
                "paths": [str(result.path)],
            }
        )
        return
    stdout.print(f"{checkpoint} (step {result.step})", soft_wrap=True)
    print_evaluations(result.evaluations, result.task)
    print_slices(result.evaluations, result.slices)
    print_written([result.path])


def load_train_config(
    path: Path | None,
    overrides: Sequence[str] | None = None,
    device: str | None = None,
    threads: int | None = None,
    train_split: str | None = None,
    recipe: str | None = None,
    **of_recipe: Any,
) -> TrainConfig:
    """The config with the command line's values in it.

    Args:
        path: of the config, or the run; None where a recipe is to be run anew.
        recipe: `FILE:NAME`, which may be executed.
        of_recipe: further arguments of `recipe_config`, where there is no path.

    Raises:
        CircuitError: as `load_config`, or a field has an option and a --set of its own: one of
            them would be lost, and the record tells only the --set.
    """
    from circuit.folders import config_file

    if path is None:
        settings = _new_config(recipe, overrides or (), **of_recipe)
    else:
        told = [name for name, value in of_recipe.items() if value is not None]
        if told:
            flag = told[0].replace("_", "-")
            raise CircuitError(
                f"--{flag} goes with --recipe alone, and --config is given, too",
                fix=f"set the config's field: --set {told[0]}=...",
            )
        config_file(path)
        from circuit.train_config import load_run_config

        settings = load_run_config(path, overrides or ()).executing(recipe)
    from circuit.overrides import parse_override

    said = {parse_override(text)[0][0]: text for text in overrides or ()}
    given = {"device": device, "threads": threads, "train_split": train_split}
    for name, value in given.items():
        if value is not None and name in said:
            raise CircuitError(
                f"'{name}' is set by --{name.replace('_', '-')} {value}, too",
                where=f"--set {said[name]}",
                fix="set each field once",
            )
    if "device" in said:
        device = settings.device  # said here and now, so the variable does not count
    changes = {name: value for name, value in given.items() if value is not None}
    return settings.replace(**changes | {"device": options.resolve_device(device, settings.device)})


def _new_config(
    recipe: str | None, overrides: Sequence[str], output_dir: Path | None = None, **values: Any
) -> TrainConfig:
    """Of a recipe that is run anew."""
    if recipe is None:
        raise CircuitError(
            "missing option '--config'", fix="give it, or a recipe of your own with --recipe"
        )
    if output_dir is None:
        raise CircuitError("is missing", where="--output-dir", expected="the folder of the run")
    from circuit.training.own_recipe import recipe_config

    return recipe_config(recipe, output_dir, overrides=overrides, **values)


class TrainBar:
    """Shows the progress of a training run on a bar."""

    def __init__(self, bar: Bar, config: TrainConfig, *, resumes: bool = False) -> None:
        self.bar = bar
        self.task = bar.add_task("training", total=config.steps, note="")
        self.accuracy = ""
        self.resumed = config.output_dir if resumes else None
        """Folder of a run that is to go on, until its first step is known."""

    def __call__(self, progress: Progress) -> None:
        """Move the bar; remember the last accuracies."""
        if self.resumed and progress.step == 0:
            message = f"{self.resumed} holds no saved state to resume from: starting at step 0"
            stderr.print(message, soft_wrap=True)
        self.resumed = None
        if progress.evaluation is not None:
            done = progress.evaluation
            note = f"{done.split} answer accuracy {percent(done.answer_accuracy)}"
            self.bar.console.print(f"step {progress.step:>6}  {note}", style="dim")
            self.accuracy = percent(done.answer_accuracy)
        loss = "" if progress.loss is None else f"loss {progress.loss:.3f}  "
        note = f"{loss}accuracy {self.accuracy}" if self.accuracy else loss
        self.bar.update(self.task, completed=progress.step, note=note)


def train_payload(result: TrainResult, report: TraceReport | None) -> dict[str, Any]:
    """The `--json` object of a training run, and of its trace."""
    files = [result.folder / name for name in result.files]
    traced = {}
    if report is not None:
        files += [report.record.store.root / name for name in report.record.files]
        files += report.paths
        traced = {"trace": {"law": report.law, "summary": report.summary}}
    return {
        "name": result.config.name,
        "step": result.step,
        "best": result.best,
        "evaluations": {name: e.to_row() for name, e in result.evaluations.items()},
        **traced,
        "paths": [str(path) for path in files if path.exists()],
    }


def print_evaluations(evaluations: list[Evaluation], task: Task) -> None:
    """One row a split, with the columns of figures that the task has."""
    columns: dict[str, Callable[[Evaluation], str]] = {
        "split": lambda e: e.split,
        "loss": lambda e: f"{e.loss:.3f}",
        "token %": lambda e: share(e.token_accuracy),
        "answer %": lambda e: share(e.answer_accuracy),
    }
    for name in ("q", "r"):  # attention, where the task has the role and the module has heads
        if any(getattr(e, name) is not None for e in evaluations):
            columns[name] = lambda e, name=name: f"{getattr(e, name):.2f}"  # type: ignore[misc]
    columns["w"] = lambda e: f"{e.w:.2f}"
    if task.shortcuts:
        columns |= {
            "k": lambda e: str(e.shortcut),
            "k-th %": lambda e: share(e.shortcut_accuracy),
            "agree %": lambda e: share(e.shortcut_agreement),
        }
    made = table(None, list(columns))
    for e in evaluations:
        made.add_row(*(of(e) for of in columns.values()))
    stdout.print(made)
    stdout.print(task.legend(), style="dim", soft_wrap=True)


def print_slices(evaluations: list[Evaluation], slices: Iterable[str]) -> None:
    """Answer accuracy by slices of the task, with the shortcut agreement of the wrong answers."""
    for by in slices if evaluations else ():
        agree = [] if evaluations[0].shortcut is None else ["agree %"]
        made = table(None, ["split", by, "reads", "answer %", *agree])
        for e in evaluations:
            for value, found in e.by_slice[by].items():
                cells = [e.split, value, str(found.reads), share(found.answer_accuracy)]
                made.add_row(*cells, *(share(found.shortcut_agreement) for _ in agree))
        stdout.print(made)
