"""Attribution of a window of a trace: one pass of replay, or several processes side by side.

A window is cut at the trace's anchors; a piece starts from its anchor and knows nothing of the
others, so that rows do not depend on how a window was cut or on how many processes worked.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from circuit.attribution.attribute import Attributor, check_loss_scope
from circuit.attribution.losses import LossScope
from circuit.attribution.series import Series
from circuit.core.groups import Partition, check_partition
from circuit.core.paths import path_rule
from circuit.environment import end_with_parent
from circuit.errors import CircuitError, several
from circuit.lazy import torch
from circuit.runs.base import Replayable, Run
from circuit.runs.opening import open_steps
from circuit.scalars.base import Measure, Scalar, all_measured
from circuit.sinks import Sink, as_function, flattened

Rows = list[dict[str, Any]]


class ScalarSource(Protocol):
    """Makes the scalars of an attribution; picklable, for it is called in every process."""

    def inputs(self, run: Replayable) -> Any:
        """What the scalars are made of, read once.

        Raises:
            CircuitError: the run does not have what is asked for.
        """

    def scalars(self, inputs: Any) -> Sequence[Scalar]:
        """The scalars, the same ones whenever it is called."""


@dataclass(frozen=True)
class Job:
    """What is attributed, and how.

    Attributes:
        trace: folder of the trace.
        source: makes the scalars.
        path: path rule.
        partitions: of the parameters, listed in the rows.
        loss_scope: see `Attributor`.
    """

    trace: Path
    source: ScalarSource
    path: str = "simpson"
    partitions: tuple[Partition, ...] = ("circuit",)
    loss_scope: LossScope = "full_lm"

    def __post_init__(self) -> None:
        path_rule(self.path)
        check_loss_scope(self.loss_scope)
        for partition in self.partitions:
            check_partition(partition)

    def prepare(self, run: Replayable | None = None, inputs: Any = None) -> Worker:
        """Build the scalars in this process, on the run and the inputs if they are open already."""
        run = run or open_steps(self.trace)
        return Worker(self, run, self.source.inputs(run) if inputs is None else inputs)


class Worker:
    """An opened job; attributes any piece of the trace."""

    def __init__(self, job: Job, run: Replayable, inputs: Any) -> None:
        self.job = job
        self.run = run
        run.prepare()
        self.scalars = tuple(job.source.scalars(inputs))
        self.attributor = attributor_of(run, self.scalars, rule=job.path, loss_scope=job.loss_scope)

    def steps(self, start: int, end: int) -> Iterator[Rows]:
        """The rows of each step that takes state `start` to state `end`."""
        for step in self.run.replay(start, end):
            yield self.attributor.step(step).rows(self.job.partitions)


def attributor_of(run: Run, scalars: Iterable[Scalar | Measure], **options: Any) -> Attributor:
    """An attributor on a model of its own.

    Args:
        options: of `Attributor`; `dtype` of its model.

    Raises:
        CircuitError: there is no scalar, or as `all_measured` and `Attributor`.
    """
    every = all_measured(scalars)
    if not every:
        raise CircuitError("none", where="`scalars`", expected="at least one")
    # the weights of each step are put into it
    return Attributor(run.module(options.pop("dtype", None)), every, **options)


def attribute(
    run: Run,
    scalars: Iterable[Scalar | Measure],
    start: int,
    end: int,
    *,
    rule: str = "simpson",
    partitions: Sequence[Partition] = ("circuit",),
    dtype: torch.dtype | None = None,
    sinks: Sequence[Sink] = (),
) -> dict[str, Series]:
    """Attribute scalars over the steps that take state `start` to state `end` of a run.

    Replay sets torch's intra-op threads to those of the run, and leaves them so.

    Args:
        run: whose steps can be executed again: a trace, a run that has one, or a recording.
        scalars: the step-by-step changes of each are split by the terms of the update; a plain
            function of the module is one.
        rule: path rule, of `circuit.core.paths.path_rule`.
        partitions: of the parameters, whose groups are listed.
        dtype: of the model that evaluates scalars and gradients, float32 by default. In float64,
            what is left is the path rule's error alone.
        sinks: where the numbers of every step go, too, as they come (`circuit.sinks`).

    Returns:
        One `Series` a scalar, by name.

    Raises:
        CircuitError: the window is not recorded, a step does not replay, two scalars share a
            name, or there is no such rule or partition.
    """
    chosen = [check_partition(partition) for partition in several(partitions, "partitions")]
    attributor = attributor_of(run, scalars, rule=rule, dtype=dtype)
    told = [as_function(sink) for sink in several(sinks, "sinks")]

    def rows() -> Iterator[dict[str, Any]]:
        for step in run.replay(start, end):
            of_step = attributor.step(step).rows(chosen)
            for sink in told:
                sink(step.step, flattened({row["scalar"]: row for row in of_step}))
            yield from of_step

    return Series.collect(rows())


def attribute_window(worker: Worker, start: int, end: int, *, workers: int = 1) -> Iterator[Rows]:
    """Attribute the steps that take state `start` to state `end`, in order.

    Args:
        worker: an opened job; it does all of the work if there is one process only.
        workers: processes; each replays with the thread count that the trace was recorded with.

    Yields:
        The rows of one step, one a scalar.

    Raises:
        CircuitError: the window is not recorded, or a step does not replay.
    """
    if workers < 1:
        raise CircuitError(f"{workers} workers", expected="at least 1")
    if workers == 1:
        yield from worker.steps(start, end)
        return
    pieces = cut_at_anchors(worker.run, start, end, at_least=4 * workers)
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, context, _open, (worker.job,)) as pool:
        waiting: list[Future[list[Rows]]] = [pool.submit(_piece, *piece) for piece in pieces]
        try:
            for future in waiting:
                yield from future.result()
        except BaseException:  # nobody waits for what they are at
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise
        finally:
            for future in waiting:
                future.cancel()


def cut_at_anchors(
    run: Replayable, start: int, end: int, *, at_least: int
) -> list[tuple[int, int]]:
    """At least so many consecutive pieces of a window, cut at anchors, if there are so many.

    Raises:
        CircuitError: the window is not recorded.
    """
    run.check_window(start, end)
    inner = [step for step in run.anchors if start < step < end]
    stride = max(1, (len(inner) + 1) // at_least)
    cuts = [start, *inner[stride - 1 :: stride], end]
    return list(itertools.pairwise(cuts))


_worker: Worker | None = None
"""The opened job of a pool's process."""


def _open(job: Job) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    end_with_parent()
    _worker = job.prepare()


def _piece(start: int, end: int) -> list[Rows]:
    assert _worker is not None
    return list(_worker.steps(start, end))
