"""circuit study ...: what the workflow does besides the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuit import CircuitError

from . import complete, options, signals
from .output import print_written, progress_bar, stdout
from .parsing import Commands
from .trace import (
    CheckpointEvery,
    CheckpointStartStep,
    FromInitialization,
    ProgressEvery,
    RequireHistoricalReplay,
    StepBar,
    TopKParameters,
    TrainSplit,
)
from .training import (
    TrainBar,
    load_train_config,
    print_trace,
    trace_recorder,
    train_run,
)

PANEL = "Study"
group = Commands(
    name="study",
    help="Steps of the study between its reports: configs, selections, comparisons.",
)

Scale = Annotated[
    str,
    typer.Option(
        help="full, uniform, short or smoke.", autocompletion=complete.values(*complete.SCALES)
    ),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    group.command("configs")(configs)
    group.command("derive-config")(derive_config)
    group.command("train", cls=options.TracingCommand)(train)
    group.command("trace")(trace)
    app.add_typer(group, rich_help_panel=PANEL)


def configs(scale: Scale, base_seed: options.BaseSeed = None) -> None:
    """Write the contract's configs at another scale, under configs/ of the current folder."""
    from circuit.artifacts import atomic_write_text
    from circuit.reading import read_bytes
    from circuit.studies.configs import contract_configs, scaled
    from circuit.studies.scales import find_scale

    target = find_scale(scale, seed=base_seed)
    if target.is_contract:
        raise CircuitError(
            "--scale full",
            expected="another, or a --base-seed; the contract's configs ship with the project",
        )
    texts = {Path(path): scaled(path, target) for path in contract_configs(target)}
    for path, text in texts.items():
        if path.exists() and read_bytes(path) != text.encode():
            raise CircuitError(
                f"exists, and is not the config of the study {target.label}",
                where=path,
                fix="move it away, or start in another folder",
            )
    for path, text in texts.items():
        atomic_write_text(path, text)
    print_written(list(texts))


def derive_config(
    config: options.TrainConfigPath,
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    overrides: Annotated[list[str], options.SET],
    overwrite: options.Overwrite = False,
) -> None:
    """Write a training config that differs from another in some fields."""
    from circuit.artifacts import OutputFolder
    from circuit.config import load_config
    from circuit.train_config import TrainConfig

    derived = load_config(config, TrainConfig, overrides)
    name, writes = f"derive-config.{output.stem}", [output.name]
    with OutputFolder(output.parent, name, writes=writes, overwrite=overwrite) as folder:
        print_written([folder.write_text(output.name, derived.to_json())])


def train(
    config: options.TrainConfigPath,
    overrides: options.Set = None,
    outcome: Annotated[
        Path | None,
        typer.Option(help="JSON that says how it ended; then a run that diverges is no error."),
    ] = None,
    same_as: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a run of the same recipe, of another name or length: what it has done"
            " is taken over, unless each step has to be taken for a --trace.",
            autocompletion=complete.run,
        ),
    ] = None,
    trace: options.Trace = None,
    trace_end_step: options.TraceEndStep = None,
    trace_top_k_parameters: options.TraceTop = None,
    device: options.Device = None,
) -> None:
    """Train a run; go on with it where it was cut off, start anew where it is another."""
    settings = load_train_config(config, overrides, device)
    if same_as is not None:
        from circuit.train_config import load_run_config

        load_run_config(same_as)  # what is none is refused before anything heavy is imported
    recorder = trace_recorder(
        trace, end_step=trace_end_step, top_k_parameters=trace_top_k_parameters
    )
    from circuit.artifacts import OutputFolder, dump_json
    from circuit.sealed import sealed
    from circuit.studies.continuation import run_goes_on, take_over
    from circuit.training.checkpoints import DivergedError

    traced = None if recorder is None else recorder.folder_of(settings)
    resume, diverged = run_goes_on(settings, traced), None
    if same_as is not None and not resume:
        taken = take_over(settings, same_as) if recorder is None else 0
        resume = taken > 0
        told = f"step 0 to {taken}" if taken else "nothing"
        stdout.print(f"{told} taken over from {same_as}", soft_wrap=True)
    with progress_bar() as bar, signals.stop_on_first() as interrupted:
        try:
            result, report = train_run(
                settings,
                recorder,
                overwrite=not resume,
                resume=resume,
                stop=interrupted,
                progress=TrainBar(bar, settings),
            )
            stdout.print(f"step {result.step}, from {result.first_step}, {result.seconds:.0f} s")
            if report is not None:
                print_trace(report)
        except DivergedError as error:
            if outcome is None:
                raise
            diverged = error.what
            stdout.print(diverged, soft_wrap=True)
    if interrupted():
        raise typer.Exit(signals.exit_code())
    if outcome is not None:
        ended = sealed({"name": settings.name, "diverged": diverged})
        with OutputFolder(
            outcome.parent, "train-outcome", writes=[outcome.name], overwrite=True
        ) as folder:
            folder.write_text(outcome.name, dump_json(ended))
    print_written([Path(settings.output_dir)])


def trace(
    config: options.TrainConfigPath,
    output_dir: options.OutputDir,
    end_step: Annotated[int, typer.Option(min=1, help="Last step to record.")],
    overrides: options.Set = None,
    from_initialization: FromInitialization = True,
    train_split: TrainSplit = None,
    checkpoint_every: CheckpointEvery = 1,
    checkpoint_start_step: CheckpointStartStep = 0,
    progress_every: ProgressEvery = None,
    top_k_parameters: TopKParameters = 10,
    require_historical_replay: RequireHistoricalReplay = False,
    device: options.Device = None,
) -> None:
    """optimizer-update-trace from initialization; goes on with a recording that was cut off."""
    settings = load_train_config(config, overrides, device, train_split=train_split)
    from circuit.reports.optimizer_update_trace import optimizer_update_trace
    from circuit.studies.continuation import trace_goes_on
    from circuit.trace.record import RecordOptions

    resume = trace_goes_on(output_dir, settings)
    with progress_bar() as bar:
        report = optimizer_update_trace(
            settings,
            output_dir,
            RecordOptions(
                end_step=end_step,
                checkpoint_every=checkpoint_every,
                checkpoint_start_step=checkpoint_start_step,
                top_k_parameters=top_k_parameters,
                require_historical_replay=require_historical_replay,
            ),
            overwrite=not resume,
            resume=resume,
            progress=StepBar(bar, "recording", end_step, progress_every),
        )
    print_written(report.paths)
    stdout.print(report.law, soft_wrap=True)
