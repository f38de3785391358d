"""circuit trace ...: record, look at, verify, check out and thin traces."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from circuit import CircuitError
from circuit.quoting import counted

from . import complete, options, recordings
from .output import (
    interrupted_says,
    print_facts,
    print_json,
    print_result,
    print_table,
    print_written,
    progress_bar,
    sparkline,
    stderr,
    stdout,
)
from .parsing import Commands
from .reports import ReportBar
from .training import load_train_config

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from circuit.trace.step import TracedStep

PANEL = "Trace"
group = Commands(name="trace", help="Record, look at, verify and use traces.")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("optimizer-update-trace", rich_help_panel=PANEL)(record)
    group.command("record")(record)
    group.command("show")(show)
    group.command("verify")(verify)
    group.command("checkout")(checkout)
    group.command("prune")(prune)
    group.command("merge")(merge)
    group.command("arrays")(arrays)
    app.add_typer(group, rich_help_panel=PANEL)


TraceFolder = Annotated[
    Path,
    typer.Argument(
        help="Folder of a trace, or of what circuit.watch recorded.", autocompletion=complete.trace
    ),
]

FromInitialization = Annotated[
    bool, typer.Option("--from-initialization", help="Start at the initial weights.")
]
TrainSplit = Annotated[
    str | None,
    typer.Option(
        help="Split that the steps draw from; the config's.", autocompletion=complete.split
    ),
]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps between addressable checkpoints.")]
CheckpointStartStep = Annotated[int, typer.Option(min=0, help="First addressable step.")]
TopKParameters = Annotated[
    int, typer.Option(min=1, help="Tensors listed per step, by size of their update.")
]
ProgressEvery = Annotated[
    int | None, typer.Option(min=1, help="Also print a line every so many steps.")
]
RequireHistoricalReplay = Annotated[
    bool,
    typer.Option(
        "--require-historical-replay",
        help="Prove that every checkpoint that the run saved is reached bit for bit, or fail.",
    ),
]


def record(
    output_dir: Annotated[Path, typer.Option(help="Folder of the trace.")],
    config: options.TrainConfigPathOrNone = None,
    overrides: options.Set = None,
    recipe: options.Recipe = None,
    from_initialization: FromInitialization = False,
    resume_checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Start at this checkpoint of the run instead.",
            autocompletion=complete.checkpoint,
        ),
    ] = None,
    end_step: Annotated[int | None, typer.Option(min=1, help="Last step to record.")] = None,
    num_steps: Annotated[
        int | None, typer.Option(min=1, help="How many steps, instead of --end-step.")
    ] = None,
    train_split: TrainSplit = None,
    anchor_every: Annotated[
        int, typer.Option(min=1, help="Steps between stored full states.")
    ] = 50,
    checkpoint_every: CheckpointEvery = 1,
    checkpoint_start_step: CheckpointStartStep = 0,
    storage: Annotated[
        str,
        typer.Option(
            help="'anchors' replays the steps between; 'dense' stores every addressable step.",
            autocompletion=complete.values("anchors", "dense"),
        ),
    ] = "anchors",
    top_k_parameters: TopKParameters = 10,
    progress_every: ProgressEvery = None,
    require_historical_replay: RequireHistoricalReplay = False,
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a recording that was stopped, or extend one."),
    ] = False,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Record every optimizer step of a run: terms, digests, and full states at anchors."""
    if from_initialization == (resume_checkpoint is not None):
        raise CircuitError("give one of --from-initialization and --resume-checkpoint")
    if storage not in ("anchors", "dense"):
        raise CircuitError(f"unknown --storage '{storage}'", expected="'anchors' or 'dense'")
    anew = {} if config else {"output_dir": output_dir}  # the run is nowhere but in its trace
    settings = load_train_config(
        config, overrides, device, threads, train_split=train_split, recipe=recipe, **anew
    )
    from circuit.reports.optimizer_update_trace import optimizer_update_trace
    from circuit.trace.record import RecordOptions

    asked_for = RecordOptions(
        end_step=end_step,
        num_steps=num_steps,
        resume_checkpoint=resume_checkpoint,
        anchor_every=anchor_every,
        checkpoint_every=checkpoint_every,
        checkpoint_start_step=checkpoint_start_step,
        storage=cast(Literal["anchors", "dense"], storage),
        top_k_parameters=top_k_parameters,
        require_historical_replay=require_historical_replay,
    )
    with (
        interrupted_says("go on from the last anchor with --resume"),
        progress_bar(not as_json) as bar,
    ):
        report = optimizer_update_trace(
            settings,
            output_dir,
            asked_for,
            overwrite=overwrite,
            resume=resume,
            progress=StepBar(bar, "recording", end_step, progress_every),
        )
    store = report.record.store
    if as_json:
        files = [str(store.root / name) for name in report.record.files]
        paths = files + [str(path) for path in report.paths]
        print_json({"law": report.law, "summary": report.summary, "paths": paths})
        return
    print_table(report.tables[0])
    print_written([store.root, *report.paths])
    stdout.print(f"{report.summary['bytes'] / 1e6:.1f} MB on disk")
    stdout.print(report.law, soft_wrap=True)


def show(folder: TraceFolder, as_json: options.Json = False) -> None:
    """What is in a trace: steps, anchors, sizes, environment, the course of the loss."""
    if recordings.is_recording(folder):
        recordings.show(folder, as_json)
        return
    from circuit.trace.store import TraceStore

    store = TraceStore(folder)
    from circuit.reports.optimizer_update_trace import trace_bytes

    manifest, environment = store.manifest, store.manifest.environment
    size = trace_bytes(store)
    anchors = [step for step in manifest.anchors() if step <= store.last_step]
    facts = {
        "run": manifest.config.name,
        "model": manifest.config.module_words,
        "optimizer": manifest.config.optimizer_words,
        "steps": f"{manifest.start_step} to {store.last_step}"
        + ("" if store.complete else f" (stopped; planned to {manifest.end_step})"),
        "anchors": f"{len(anchors)}, {_every(manifest.anchor_every)}",
        "addressable": f"{_every(manifest.checkpoint_every)}"
        f" from {max(manifest.checkpoint_start_step, manifest.start_step)}",
        "size": f"{size / 1e6:.1f} MB",
        "recorded on": f"torch {environment['torch']}, {environment['cpu_capability']},"
        f" threads {environment['threads']}, {environment['device']}",
    }
    losses = [row["loss"] for row in store.rows]
    if as_json:
        fields = {"config", "start_step", "end_step", "anchor_every", "checkpoint_every"}
        fields |= {"checkpoint_start_step", "storage", "environment", "benchmark_digest"}
        payload = manifest.model_dump(mode="json", include=fields)
        print_json(
            {**payload, "last_step": store.last_step, "anchors": anchors, "bytes": size}
            | {"losses": losses}
        )
        return
    if losses:
        logarithmic = min(losses) > 0  # one of somebody's own may be less
        course = sparkline([math.log(x) for x in losses] if logarithmic else losses)
        facts["loss (log)" if logarithmic else "loss"] = (
            f"{losses[0]:.3f} {course} {losses[-1]:.3f}"
        )
    print_facts(str(store.root), facts)


def verify(
    folder: TraceFolder,
    steps: Annotated[
        str | None, typer.Option(help="Window a:b; takes state a to state b. All by default.")
    ] = None,
    recipe: options.Recipe = None,
    as_json: options.Json = False,
) -> None:
    """Replay a trace and compare every step and every anchor. Exit code 1 if bits differ."""
    start, end = None, None
    if steps:
        from circuit.options import parse_window

        start, end = parse_window(steps, "--steps")
    if recordings.is_recording(folder):
        recordings.verify(folder, start, end, as_json)
        return
    from circuit.trace.replay import ReplayedRun

    with progress_bar(not as_json) as bar:
        trace = ReplayedRun.open(folder, recipe=recipe)
        last = trace.store.last_step if end is None else end
        outcome = trace.verify(start, end, progress=StepBar(bar, "replaying", last))
    if as_json:
        payload: dict[str, Any] = {
            "law": outcome.law,
            "steps": outcome.steps,
            "equal": outcome.equal,
            "drifts": [vars(drift) for drift in outcome.drifts],
            "anchors": [{"step": step, "difference": str(d)} for step, d in outcome.anchors],
            "changed_facts": trace.changed_facts(),
            "paths": [],
        }
        print_json(payload)
    else:
        for step, difference in outcome.anchors[:1]:
            stdout.print(f"anchor {step}: {difference}", soft_wrap=True)
        if not outcome.equal:
            facts = "; ".join(trace.changed_facts()) or "none that is recorded"
            stdout.print(f"changed since the recording: {facts}", soft_wrap=True)
        compared = f"{counted(outcome.compared_anchors, 'stored state')} compared; "
        stdout.print((compared if outcome.compared_anchors else "") + outcome.law, soft_wrap=True)
    if not outcome.equal:
        raise typer.Exit(1)


def checkout(
    folder: TraceFolder,
    step: Annotated[int, typer.Option(min=0, help="Any addressable step.")],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; without it the state is kept inside the trace."),
    ] = None,
    allow_drift: Annotated[
        bool,
        typer.Option("--allow-drift", help="Go on where the replay differs, and say where."),
    ] = False,
    recipe: options.Recipe = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write the state after any step as a checkpoint file, replayed and verified."""
    if recordings.is_recording(folder):
        recordings.checkout(folder, step, output, overwrite, as_json)
        return
    from circuit.artifacts import OutputFolder
    from circuit.trace.replay import ReplayedRun
    from circuit.training.checkpoints import encode_checkpoint

    trace = ReplayedRun.open(folder, allow_drift=allow_drift, recipe=recipe)
    if output is None:
        trace.state(step, cache=True)
        if trace.drifts:
            raise CircuitError(
                f"the replayed state of step {step} is not the recorded one, so the trace does"
                " not keep it",
                fix="pass --output to write it elsewhere",
            )
        path = trace.store.checkpoint_path(step)
    else:
        command = f"trace-checkout.{output.stem}"
        with OutputFolder(
            output.parent, command, writes=[output.name], overwrite=overwrite
        ) as outputs:
            payload = encode_checkpoint(trace.state(step))
            path = outputs.write_bytes(output.name, payload)
    if as_json:
        drifts = [vars(drift) for drift in trace.drifts]
        print_json({"step": step, "drifts": drifts, "paths": [str(path)]})
        return
    print_written([path])
    if trace.drifts:
        first = trace.drifts[0]
        stdout.print(
            f"state of step {step}, NOT the recorded one: {counted(len(trace.drifts), 'step')}"
            f" drifted, first step {first.step} in {first.stage}"
        )
    else:
        stdout.print(f"state of step {step}, equal to the recorded digests")


def prune(
    folder: TraceFolder,
    anchor_every: Annotated[
        int, typer.Option(min=1, help="New distance; a multiple of the present one.")
    ],
    as_json: options.Json = False,
) -> None:
    """Keep fewer anchors. Every step stays addressable; states checked out into it go too."""
    from circuit.trace.prune import prune_trace

    pruned = prune_trace(folder, anchor_every)
    if as_json:
        print_json({**vars(pruned), "paths": [str(folder / "trace.json")]})
        return
    stdout.print(
        f"removed {counted(pruned.removed, 'state')} ({pruned.freed_bytes / 1e6:.1f} MB);"
        f" {counted(pruned.anchors, 'anchor')} left"
    )


def merge(
    output_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the whole.")],
    parts: Annotated[
        list[Path],
        typer.Argument(
            metavar="PART...", help="Folders of shards.", autocompletion=complete.attribution
        ),
    ],
    windows: Annotated[
        list[str] | None,
        typer.Option("--window", help="Window a:b to sum up besides the whole; repeatable."),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Join the shards of one attribution; gaps, overlaps and other options are refused."""
    from circuit.reports.shards import merge_attributions

    with progress_bar(not as_json) as bar:
        result = merge_attributions(
            output_dir,
            parts,
            windows=tuple(windows or ()),
            overwrite=overwrite,
            progress=ReportBar(bar, "merging"),
        )
    print_result(result, as_json)


def arrays(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of an attribution.", autocompletion=complete.attribution),
    ],
    output: Annotated[Path, typer.Option(help="netCDF file (.nc) to write.")],
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write an attribution as arrays with coordinates, which xarray.open_dataset opens."""
    from circuit.reports.shards import attribution_arrays

    path = attribution_arrays(folder, output, overwrite=overwrite)
    if as_json:
        print_json({"paths": [str(path)]})
        return
    print_written([path])
    stdout.print(f"opens with xarray.open_dataset({str(path)!r})", soft_wrap=True)


def _every(steps: int) -> str:
    return "every step" if steps == 1 else f"every {steps} steps"


class StepBar:
    """Shows traced steps on a bar, and a line every so many of them."""

    def __init__(self, bar: Bar, what: str, last: int | None, every: int | None = None) -> None:
        self.bar = bar
        self.every = every
        self.last = last
        self.task = bar.add_task(what, total=None, note="")
        self.first: int | None = None

    def __call__(self, step: TracedStep) -> None:
        """Move the bar."""
        if self.first is None:
            self.first = step.step - 1
            total = None if self.last is None else self.last - self.first
            self.bar.update(self.task, total=total)
        self.bar.update(self.task, advance=1, note=f"step {step.step}  loss {step.loss:.3f}")
        if self.every and step.step % self.every == 0:
            stderr.print(f"step {step.step:>6}  loss {step.loss:.4f}", style="dim")
