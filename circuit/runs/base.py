"""What a run is to whoever asks about its weights: states by step, models, replayed steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from circuit.core.edit import Edit
from circuit.core.state import FlatState, State
from circuit.core.step import Step
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import StateHeader
from circuit.training.setup import Setup

if TYPE_CHECKING:
    import torch
    from torch import nn

    from circuit.core.graphs import Graphs


class Run(Protocol):
    """The weights of a training run, step by step."""

    @property
    def path(self) -> Path:
        """The folder that was named."""

    @property
    def config(self) -> TrainConfig:
        """What it was trained with."""

    @property
    def setup(self) -> Setup:
        """What the config names: benchmark, splits, model; read and built once."""

    @property
    def steps(self) -> list[int]:
        """The steps whose state can be asked for, ascending."""

    def header(self, step: int) -> StateHeader:
        """Whose state that of a step is, from descriptions alone.

        Raises:
            CircuitError: the run has no state of that step.
        """

    def state(self, step: int) -> State:
        """The state after `step` optimizer steps.

        Raises:
            CircuitError: there is none, it is damaged, or it does not replay.
        """

    def model(self, step: int) -> nn.Module:
        """The model of that state, on the run's device.

        Raises:
            CircuitError: as `state`; or the state is of another recipe or benchmark.
        """

    def module(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A module of the run's shape, whose weights may be overwritten.

        Raises:
            CircuitError: it is not known.
        """

    @property
    def anchors(self) -> list[int]:
        """The steps from which a replay starts without executing any before, ascending.

        Raises:
            CircuitError: no step of the run can be executed again.
        """

    def replay(self, start: int, end: int, graphs: Graphs | None = None) -> Iterator[Step]:
        """The steps that take state `start` to state `end`, executed again.

        Args:
            graphs: hold those of the gradients, if the run takes any.

        Raises:
            CircuitError: the run cannot, with the reason; or a step differs.
        """

    def counterfactual(self, edit: Edit, end: int) -> FlatState:
        """The state `end` of a training that leaves the run's at `edit.start`.

        Raises:
            CircuitError: as `replay`; or the edit names a term or example that there is not.
        """


class Replayable(Run, Protocol):
    """A run whose steps can be executed again: a trace, or a recording that was imported."""

    @property
    def first_step(self) -> int:
        """The first state."""

    @property
    def last_step(self) -> int:
        """The last state."""

    @property
    def environment(self) -> Mapping[str, Any]:
        """Facts of the machine that it was recorded on."""

    @property
    def benchmark_digest(self) -> str | None:
        """Of its task's benchmark; None of a recording without a task."""

    def check_addressable(self, step: int) -> None:
        """Refuse a step whose state it cannot give."""

    def check_window(self, start: int, end: int) -> None:
        """Refuse steps that are not recorded."""

    def state_digests(self, step: int) -> dict[str, str]:
        """Of the parts of a state."""

    def prepare(self) -> None:
        """Give this process the thread count of the recording."""

    def share(self, setup: Setup) -> None:
        """Use what another setup of the same run has read and built."""
