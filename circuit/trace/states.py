"""The states behind the names of checkpoints, files or not."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from circuit.errors import CircuitError
from circuit.trace.replay import ReplayedRun
from circuit.trace.store import MANIFEST
from circuit.training.checkpoints import (
    StateHeader,
    TrainState,
    checkpoint_step,
    load_checkpoint,
    read_header,
)
from circuit.training.setup import Setup

HeaderT = TypeVar("HeaderT", bound=StateHeader)


class States:
    """The states behind the names of checkpoints.

    `<trace>/checkpoints/step_NNNNNN.pt` is the state of that step of the trace, whether the file
    is there or not; each trace is opened once.
    """

    def __init__(self, setup: Setup | None = None) -> None:
        """Open nothing yet.

        Args:
            setup: of the run that they are to be of, which traces of that run then share.
        """
        self._setup = setup
        self._traces: dict[Path, ReplayedRun] = {}

    def header(self, path: str | Path) -> StateHeader:
        """Whose state it is, without reading or replaying it.

        Raises:
            CircuitError: as `state`, as far as descriptions tell.
        """
        path = Path(path)
        trace, step = self._trace_of(path)
        header = read_header(path) if trace is None else trace.header(step)
        return _as_named(header, path)

    def state(self, path: str | Path) -> TrainState:
        """The state.

        Raises:
            CircuitError: there is neither a file nor a trace that can make it, or the file holds
                another step than its name says.
        """
        path = Path(path)
        trace, step = self._trace_of(path)
        state = load_checkpoint(path) if trace is None else trace.state(step)
        return _as_named(state, path)

    def _trace_of(self, path: Path) -> tuple[ReplayedRun | None, int]:
        """The trace that makes a checkpoint of which there is no file, and the step."""
        step, root = checkpoint_step(path), path.parent.parent
        if step is None or path.exists() or not (root / MANIFEST).exists():
            return None, -1
        if root not in self._traces:
            self._traces[root] = ReplayedRun.open(root, setup=self._setup)
        return self._traces[root], step


def _as_named(header: HeaderT, path: Path) -> HeaderT:
    if checkpoint_step(path) not in (None, header.step):
        raise CircuitError(f"holds the state of step {header.step}", where=path)
    return header
