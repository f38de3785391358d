"""A folder of checkpoints: weights at some steps; the steps between them where there is a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from circuit.core.edit import Edit
from circuit.core.state import FlatState
from circuit.errors import CircuitError
from circuit.folders import run_folder
from circuit.lazy import pd, torch
from circuit.quoting import counted
from circuit.runs.rows import read_rows
from circuit.trace.replay import ReplayedRun
from circuit.trace.step import TracedStep
from circuit.trace.store import MANIFEST
from circuit.trace.while_training import DEFAULT_FOLDER
from circuit.train_config import TrainConfig, load_run_config
from circuit.training.checkpoints import (
    StateHeader,
    TrainState,
    list_checkpoints,
    load_checkpoint,
    read_header,
)
from circuit.training.recipe_setup import setup_of
from circuit.training.run_folder import BEST, METRICS

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from circuit.core.graphs import Graphs
    from circuit.tasks.base import Vocabulary
    from circuit.tasks.benchmark import Benchmark
    from circuit.tasks.examples import Examples


def open_folder(where: str | Path, recipe: str | None = None) -> CheckpointedRun:
    """Open the folder of a run that was trained here (or its `run_config.json`).

    Args:
        recipe: `FILE:NAME` of a run of a recipe, whose code is executed only if it is named.

    Raises:
        CircuitError: there is no run, or its config is damaged.
    """
    folder = run_folder(where)
    config = load_run_config(folder).executing(recipe)
    return CheckpointedRun(folder, config, folder / "checkpoints")


class CheckpointedRun:
    """A training run on disk, or its checkpoints alone (a `circuit.runs.base.Run`).

    Attributes:
        path: the folder that was named.
        checkpoints: where its states stand.
        setup: what its config names, read and built once.
    """

    def __init__(self, path: Path, config: TrainConfig, checkpoints: Path) -> None:
        self.path = path
        self.checkpoints = checkpoints
        self.setup = setup_of(config, path)

    def __repr__(self) -> str:
        steps = self.steps
        count = counted(len(steps), "checkpoint")
        span = f"{count}, {steps[0]} to {steps[-1]}" if steps else "no checkpoints"
        name = type(self).__name__
        return f"{name}({self.path}: {self.config.module_words}, {span})"

    @property
    def config(self) -> TrainConfig:
        """What it was trained with."""
        return self.setup.config

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return list(list_checkpoints(self.checkpoints))

    @property
    def benchmark(self) -> Benchmark:
        """The run's benchmark."""
        return self.setup.benchmark

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the run's benchmark."""
        return self.benchmark.vocabulary

    def header(self, step: int) -> StateHeader:
        """Whose state that of a step is; raises as `state`."""
        return self.trace.header(step) if self._only_traced(step) else read_header(self._file(step))

    def state(self, step: int | str = "best") -> TrainState:
        """A saved state: of a step, or `"best"`; of a step that the run's trace can give.

        Raises:
            CircuitError: there is no such state, it is damaged, or it does not replay.
        """
        return self.trace.state(step) if self._only_traced(step) else self._load(step)

    @cached_property
    def trace(self) -> ReplayedRun:
        """The run's trace, where `circuit train --trace` puts it.

        Raises:
            CircuitError: there is none, or it is of another run than the checkpoints.
        """
        trace = ReplayedRun.open(self.path / DEFAULT_FOLDER, setup=self.setup)
        fix = "it was recorded from an earlier run; record it again with `overwrite`"
        try:
            self.setup.check(trace.header(trace.steps[0]))
        except CircuitError as error:
            raise CircuitError(error.what, where=trace.path, fix=fix) from None
        both = set(self.steps) & set(trace.steps)
        if both:
            last = max(both)
            ours = FlatState.of(self._load(last)).stages()
            if ours != trace.store.state_digests(last):
                raise CircuitError(
                    f"is not this run's: the states of step {last} differ",
                    where=trace.path,
                    fix=fix,
                )
        return trace

    @property
    def _has_trace(self) -> bool:
        return (self.path / DEFAULT_FOLDER / MANIFEST).is_file()

    def _only_traced(self, step: int | str) -> TypeGuard[int]:
        """Whether no checkpoint has that state, and the trace can give it."""
        if isinstance(step, str) or step in self.steps:
            return False
        return self._has_trace and step in self.trace.steps

    def _load(self, step: int | str) -> TrainState:
        return load_checkpoint(self._file(step))

    def module(self, dtype: torch.dtype | None = None) -> HookedTransformer:
        """A model of the run's shape, whose weights may be overwritten."""
        return self.setup.module(dtype)

    def model(self, step: int | str = "best", *, untied: bool = False) -> HookedTransformer:
        """The model after `step` optimizer steps, or the best one.

        Args:
            untied: as plain TransformerLens has it, with a `W_U` of its own, for tools that read
                that from the `state_dict` (`process_weights_`, `SVDInterpreter`); a copy whose
                logits are equal to rounding (circuit/model/standard.py).

        Raises:
            CircuitError: as `state`; or it belongs to another config or benchmark.
        """
        return self.setup.model(self.state(step), untied=untied)

    def batch(self, split: str, indices: Sequence[int] | torch.Tensor | None = None) -> Examples:
        """Records of a split (all by default) as tokens `[batch, pos]` with read indices.

        Raises:
            CircuitError: there is no such split, or an index is out of range.
        """
        return self.setup.split(split).batch(indices).to(self.config.device)

    @property
    def anchors(self) -> list[int]:
        """The steps from which a replay starts, ascending; raises as `replay`."""
        return self._replayable("steps").anchors

    def replay(self, start: int, end: int, graphs: Graphs | None = None) -> Iterator[TracedStep]:
        """The steps that take state `start` to state `end`, executed again from the run's trace.

        Raises:
            CircuitError: there is no trace, the window is not recorded, or a step differs.
        """
        return self._replayable(f"steps {start} to {end}").replay(start, end, graphs)

    def counterfactual(self, edit: Edit, end: int) -> FlatState:
        """The state `end` of a training that leaves the run's at `edit.start`.

        Raises:
            CircuitError: as `replay`; or the edit names a term or example that there is not.
        """
        return self._replayable(f"steps {edit.start} to {end}").counterfactual(edit, end)

    def _replayable(self, steps: str) -> ReplayedRun:
        if not self._has_trace:
            raise CircuitError(
                f"{steps} cannot be executed again from checkpoints alone",
                where=self.path,
                expected=f"a trace in {DEFAULT_FOLDER}",
                fix="record one with `circuit trace record`, or open the folder of one",
            )
        return self.trace

    def metrics(self) -> pd.DataFrame:
        """The rows of `metrics.jsonl`: `kind` is `train` or `evaluation`."""
        return read_rows(self.path / METRICS)

    def _file(self, step: int | str) -> Path:
        if step == "best":
            return self.checkpoints / Path(BEST).name
        saved = list_checkpoints(self.checkpoints)
        if isinstance(step, str) or int(step) not in saved:
            raise CircuitError(
                f"no checkpoint of step {step}",
                where=self.path,
                expected=f"one of {', '.join(map(str, saved)) or '(none)'} or 'best'",
            )
        return saved[int(step)]
