"""Attribution of a window of a trace: one pass of replay, or several processes side by side.

A window is cut at the trace's anchors; a piece starts from its anchor and knows nothing of the
others, so that rows do not depend on how a window was cut or on how many processes worked.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from circuit.attribution.attribute import Attributor, LossScope, check_loss_scope
from circuit.attribution.groups import Partition, check_partition
from circuit.attribution.path import path_rule
from circuit.errors import CircuitError
from circuit.scalars.base import Scalar
from circuit.trace.replay import Trace, open_trace
from circuit.training.session import model_from_state

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

Rows = list[dict[str, Any]]


class ScalarSource(Protocol):
    """Makes the scalars of an attribution; picklable, for it is called in every process."""

    def __call__(self, trace: Trace) -> Sequence[Scalar]:
        """The scalars, the same ones whenever it is called."""


@dataclass(frozen=True)
class Job:
    """What is attributed, and how.

    Attributes:
        trace: folder of the trace.
        scalars: makes the scalars.
        path: path rule.
        partitions: of the parameters, listed in the rows.
        loss_scope: see `Attributor`.
    """

    trace: Path
    scalars: ScalarSource
    path: str = "simpson"
    partitions: tuple[Partition, ...] = ("circuit",)
    loss_scope: LossScope = "full_lm"

    def __post_init__(self) -> None:
        path_rule(self.path)
        check_loss_scope(self.loss_scope)
        for partition in self.partitions:
            check_partition(partition)

    def prepare(self, trace: Trace | None = None) -> Worker:
        """Build the scalars in this process, on the trace if it is open already."""
        return Worker(self, trace)


class Worker:
    """An opened job; attributes any piece of the trace."""

    def __init__(self, job: Job, trace: Trace | None = None) -> None:
        self.job = job
        self.trace = trace or open_trace(job.trace)
        self.trace.prepare()
        manifest = self.trace.manifest
        self.scalars = tuple(job.scalars(self.trace))
        names = [scalar.name for scalar in self.scalars]
        if not names or len(set(names)) < len(names):
            raise CircuitError(f"scalars {', '.join(names) or '(none)'}", expected="each once")
        state = self.trace.store.anchor(manifest.start_step)
        model: HookedTransformer = model_from_state(state, manifest.config, self.trace.benchmark)
        self.attributor = Attributor(model, self.scalars, rule=job.path, loss_scope=job.loss_scope)

    def steps(self, start: int, end: int) -> Iterator[Rows]:
        """The rows of each step that takes state `start` to state `end`."""
        for traced in self.trace.steps(start, end):
            yield self.attributor.step(traced).rows(self.job.partitions)


def attribute_window(
    job: Job,
    start: int,
    end: int,
    *,
    worker: Worker | None = None,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Rows]:
    """Attribute the steps that take state `start` to state `end`, in order.

    Args:
        worker: an opened job, used if there is one process only.
        workers: processes; each replays with the thread count that the trace was recorded with.
        progress: called with the last step that is done.

    Yields:
        The rows of one step, one a scalar.

    Raises:
        CircuitError: the window is not recorded, or a step does not replay.
    """
    if workers < 1:
        raise CircuitError(f"{workers} workers", expected="at least 1")
    done = progress or (lambda _: None)
    if workers == 1:
        for number, rows in enumerate((worker or job.prepare()).steps(start, end), start + 1):
            yield rows
            done(number)
        return
    pieces = cut_at_anchors(open_trace(job.trace), start, end, at_least=4 * workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _open, (job,)) as pool:
        waiting: list[Future[list[Rows]]] = [pool.submit(_piece, *piece) for piece in pieces]
        try:
            for (_, stop), future in zip(pieces, waiting, strict=True):
                yield from future.result()
                done(stop)
        finally:
            for future in waiting:
                future.cancel()


def cut_at_anchors(trace: Trace, start: int, end: int, *, at_least: int) -> list[tuple[int, int]]:
    """At least so many consecutive pieces of a window, cut at anchors, if there are so many.

    Raises:
        CircuitError: the window is not recorded.
    """
    trace.store.check_window(start, end)
    inner = [step for step in trace.manifest.anchors() if start < step < end]
    stride = max(1, (len(inner) + 1) // at_least)
    cuts = [start, *inner[stride - 1 :: stride], end]
    return list(itertools.pairwise(cuts))


_worker: Worker | None = None
"""The opened job of a pool's process."""


def _open(job: Job) -> None:
    global _worker
    _worker = job.prepare()


def _piece(start: int, end: int) -> list[Rows]:
    assert _worker is not None
    return list(_worker.steps(start, end))
