"""A window of steps walked backwards, for recursions that run against time.

Replay runs forwards only, so the window is cut at the run's anchors, and its stretches are replayed
the last one first: each step is executed once. What the way back needs of a step waits on disk: as
many bytes a step as the vectors that are noted, of one stretch at a time, however many examples a
batch has. Graphs of gradients wait in memory, as many of a stretch as fit into a part of it.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, TypeVar

from circuit.artifacts import writing
from circuit.core.graphs import Graphs
from circuit.core.step import Step
from circuit.errors import CircuitError
from circuit.lazy import np, torch
from circuit.runs.base import Run
from circuit.sizes import require_disk

if TYPE_CHECKING:
    from torch import Tensor

Note = TypeVar("Note")


class Stack:
    """Tensors in a file without a name, last in, first out; nothing is left of it by a crash."""

    def __init__(self) -> None:
        self._shapes: list[list[tuple[torch.dtype, torch.Size]]] = []

    def __enter__(self) -> Stack:
        with _writing():
            self._file: IO[bytes] = tempfile.TemporaryFile()
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # it writes once more what could not be written
            self._file.close()

    def push(self, tensors: Sequence[Tensor]) -> None:
        """Put tensors of the CPU on top.

        Raises:
            CircuitError: the disk is full.
        """
        with _writing():
            for tensor in tensors:
                self._file.write(tensor.detach().contiguous().numpy().data)
            self._file.flush()
        self._shapes.append([(tensor.dtype, tensor.shape) for tensor in tensors])

    def pop(self) -> list[Tensor]:
        """Take the topmost tensors off."""
        shapes = self._shapes.pop()
        sizes = [dtype.itemsize * shape.numel() for dtype, shape in shapes]
        start = self._file.seek(-sum(sizes), 2)
        data = np.fromfile(self._file, np.uint8, sum(sizes))
        self._file.seek(start)
        self._file.truncate()
        parts = np.split(data, np.cumsum(sizes)[:-1])
        return [
            torch.from_numpy(part).view(dtype).view(shape)
            for part, (dtype, shape) in zip(parts, shapes, strict=True)
        ]


def _writing() -> contextlib.AbstractContextManager[None]:
    fix = "free space there, or say in TMPDIR which folder has some"
    return writing(Path(tempfile.gettempdir()), fix=fix)


def backwards(
    run: Run,
    start: int,
    end: int,
    note: Callable[[Step], tuple[Note, Sequence[Tensor]]],
    graphs: Graphs | None = None,
) -> Iterator[tuple[Note, list[Tensor]]]:
    """The steps that take state `start` to state `end`, from the last one to the first.

    Args:
        note: what is to be known of a step on the way back: something small, which stays in
            memory, and tensors of the CPU, which wait on disk. Steps reach it in ascending order
            within a stretch.
        graphs: hold those of the gradients, which whoever walks back pops.

    Yields:
        What was noted of steps `end`, ..., `start + 1`.

    Raises:
        CircuitError: as `Run.replay`; or the disk has no room for a stretch.
    """
    cuts = [start, *(anchor for anchor in run.anchors if start < anchor < end), end]
    for first, last in reversed(list(itertools.pairwise(cuts))):
        with Stack() as stack:
            notes: list[Note] = []
            for step in _replayed(run, first, last, graphs):
                small, tensors = note(step)
                if not notes:
                    size = sum(t.numel() * t.element_size() for t in tensors) * (last - first)
                    what = f"the way back over steps {first}:{last} between two anchors"
                    require_disk({what: size}, Path(tempfile.gettempdir()))
                stack.push(tensors)
                notes.append(small)
            while notes:
                yield notes.pop(), stack.pop()


def _replayed(run: Run, first: int, last: int, graphs: Graphs | None) -> Iterator[Step]:
    """See `Run.replay`; without graphs from a step on that has none, or other bits with one."""
    done = first
    try:
        for step in run.replay(first, last, graphs):
            yield step
            done = step.step
    except (CircuitError, RuntimeError):
        if graphs is None or not graphs.room:
            raise
        graphs.room = 0
        graphs.pop(done + 1)  # of another gradient than the one that was taken
        yield from run.replay(done, last)
