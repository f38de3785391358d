"""A recording as a run that reports know: `circuit import-recording`.

What `circuit.watch` stored tells neither how the module is made nor what its inputs mean. Beside a
recording this writes `run_config.json`, which names both (and no recipe: RecordedConfig), and the
stored states as `checkpoints/step_NNNNNN.pt`, weights alone. From then on the recording's folder
stands wherever a command takes a run, a trace or a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from circuit.artifacts import OutputFolder
from circuit.config import parse_config
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.lazy import torch
from circuit.model.readout import logits_of, readable
from circuit.plugins import import_name, named_code
from circuit.runs.recorded import RecordedRun
from circuit.runs.recording import Recording
from circuit.tasks.benchmark import Benchmark, ensure_benchmark, load_benchmark
from circuit.train_config import RecordedConfig, TrainConfig
from circuit.training.checkpoints import (
    STEP_FILES,
    TrainState,
    checkpoint_name,
    encode_checkpoint,
)
from circuit.training.own_module import named_module, shape_of
from circuit.training.setup import NO_BENCHMARK, longest_of

if TYPE_CHECKING:
    from torch import nn

COMMAND = "import-recording"
FILES = (RUN_CONFIG, STEP_FILES)


@dataclass(frozen=True)
class ImportedRecording:
    """A recording that is a run.

    Attributes:
        config: of the run.
        folder: where both stand.
        files: written, relative to the folder.
        without_checkpoints: why none were written; empty where they were.
    """

    config: RecordedConfig
    folder: Path
    files: list[str]
    without_checkpoints: str


def import_recording(
    folder: str | Path,
    module: str,
    *,
    task: str | None = None,
    benchmark_dir: str | Path | None = None,
    optimizers: Sequence[str] = (),
    checkpoint_every: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImportedRecording:
    """Say what makes the module of a recording, and what its inputs mean.

    Args:
        folder: of the recording.
        module: `FILE.py:NAME` of a module, or of a function that makes one; relative to the current
            folder, or where it has none, to the nearest one above the recording.
        task: its name, or `FILE.py:Class` of one's own; drawn with its settings' defaults where
            `benchmark_dir` holds no benchmark yet. Without a task, and without a benchmark, only
            numbers of the module itself can be asked for.
        benchmark_dir: of the task; by default `benchmark` in the recording's folder.
        optimizers: `FILE.py:NAME` of the classes of optimizers that are not torch's.
        checkpoint_every: steps between the checkpoints; by default every state that is stored.
        overwrite: replace what an earlier call wrote there, and nothing else.
        progress: called with checkpoints written and their number.

    Raises:
        CircuitError: the file gives no such module, or one with other parameters; it does not take
            the task's tokens; or the folder holds an earlier import.
    """
    recording = Recording(folder)
    root = recording.root
    module, *optimizers = (_as_found_from(root, name) for name in (module, *optimizers))
    trained = named_module(module, root)
    classes = [import_name(name, root, what="the optimizer") for name in optimizers]
    run = RecordedRun(recording, trained, classes)
    shape = shape_of(trained)
    benchmark = _benchmark(task, benchmark_dir, root)
    splits = [] if benchmark is None else list(benchmark[1].files)
    if benchmark is not None:
        _try(trained, benchmark[1], splits[0])
        longest = max(longest_of(benchmark[1].records(split)) for split in splits)
        if shape is not None and longest > shape.max_sequence_length:
            shape = None  # most reports read whole records
    last, environment = recording.last_step, recording.manifest.environment
    known = {
        "name": root.resolve().name,
        "output_dir": str(root),
        "benchmark_dir": None if benchmark is None else str(benchmark[0]),
        "device": environment["device"],
        "threads": environment["threads"],
        "model": None if shape is None else shape.model_dump(mode="json"),
        "tracked_splits": splits,
        "recorded": {
            "module": module,
            "optimizers": list(optimizers),
            "last_step": last,
            "parameters_sha256": run.state_digests(last)["parameters"],
            "code": named_code([module, *optimizers], root),
            "benchmark_digest": None if benchmark is None else benchmark[1].digest,
        },
    }
    config = cast(RecordedConfig, parse_config(known, TrainConfig, where=root))
    why = _without_checkpoints(run, trained)
    steps = [] if why else _checkpointed(run, checkpoint_every)
    names = [RUN_CONFIG, *(f"checkpoints/{checkpoint_name(step)}" for step in steps)]
    digest = NO_BENCHMARK if benchmark is None else benchmark[1].digest
    with OutputFolder(root, COMMAND, writes=FILES, overwrite=overwrite) as output:
        output.refuse_foreign(names)
        output.clear(planned=names)
        for done, step in enumerate(steps, start=1):
            state = TrainState(
                step=step,
                config=config,
                benchmark_digest=digest,
                parameters=run.state(step).parameters,
                moments=None,
            )
            if state.not_finite is None:  # a loop that diverged has states that no report reads
                name = f"checkpoints/{checkpoint_name(step)}"
                output.write_bytes(name, encode_checkpoint(state))
            if progress is not None:
                progress(done, len(steps))
        output.write_text(RUN_CONFIG, config.to_json())  # last: a run is there when it is whole
        return ImportedRecording(config, root, output.owned, why)


def _as_found_from(root: Path, name: str) -> str:
    """`FILE.py:NAME` as the recording names it: what is meant here is never another file there."""
    path, _, attribute = name.rpartition(":")
    here = Path(path)
    if not here.is_file():
        return name
    above = next((at / path for at in root.resolve().parents if (at / path).exists()), None)
    the_same = above is not None and above.samefile(here)
    return name if the_same else f"{here.absolute()}:{attribute}"


def _benchmark(
    task: str | None, benchmark_dir: str | Path | None, root: Path
) -> tuple[Path, Benchmark] | None:
    """Where the task's benchmark stands, and the benchmark."""
    if task is None and benchmark_dir is None:
        return None
    folder = root / "benchmark" if benchmark_dir is None else Path(benchmark_dir)
    if task is not None:
        ensure_benchmark(task, folder)
    return folder, load_benchmark(folder, splits=[])


def _try(module: nn.Module, benchmark: Benchmark, split: str) -> None:
    """Have the module read one record of the task.

    Raises:
        CircuitError: it does not take the tokens, or gives no logits of the task's answers.
    """
    batch = benchmark.task.split(benchmark.records(split)[:1]).batch()
    device = next(module.parameters()).device
    length = readable(module, batch.tokens).shape[1]
    expected = (
        f"logits [batch, position, token] of tokens [batch, {length}], or [batch, token] of what"
        " follows the last"
    )
    try:
        with torch.no_grad():
            logits = logits_of(module.eval(), batch.tokens.to(device))
    except CircuitError:
        raise
    except Exception as error:  # it is anybody's code
        raise CircuitError(
            f"the module does not take the task's tokens ({type(error).__name__}: {error})",
            expected=expected,
        ) from error
    if logits.shape[-1] <= max(benchmark.task.choices):
        raise CircuitError(
            f"the module gives {logits.shape[-1]} logits",
            expected=f"one of every token of the task, at least {max(benchmark.task.choices) + 1}",
        )


def _without_checkpoints(run: RecordedRun, module: nn.Module) -> str:
    """Why checkpoints of weights alone would not be the module as it was; empty if they would."""
    if run.recording.moved_buffers:
        return f"{run.recording.moved_buffers[0]} changes while the module is trained"
    first = run.recording.state(0).buffers
    for name, buffer in module.named_buffers():
        if name not in first or not torch.equal(buffer.cpu(), first[name].cpu()):
            return f"{name} of the module that {run.path} was recorded from is another"
    return ""


def _checkpointed(run: RecordedRun, every: int | None) -> list[int]:
    """The steps that get a checkpoint: the stored states and the last, or every so many."""
    if every is not None and every < 1:
        raise CircuitError(f"{every}", where="`checkpoint_every`", expected="at least 1")
    steps = run.anchors if every is None else [s for s in run.steps if s % every == 0]
    return sorted({*steps, run.steps[-1]})
