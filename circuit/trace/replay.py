"""Replay a trace: iterate its steps again, check out any step, verify it all.

`open_trace(path)` gives a `Trace`. `trace.steps(a, b)` takes state `a` to state `b` and yields the
steps `a+1 .. b`; every replayed step is compared with the recorded one by digest. Replay runs with
the recorded thread count, whatever the machine has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from circuit.artifacts import OutputFolder, find_folder
from circuit.environment import changed_facts, environment_facts, prepare_process
from circuit.errors import CircuitError
from circuit.tasks.benchmark import Benchmark, load_benchmark
from circuit.tasks.positions import EncodedSplit
from circuit.trace.compare import CAUSES, Difference, first_stage_that_differs, state_difference
from circuit.trace.step import FlatState, TracedStep, Tracer
from circuit.trace.store import COMMAND, MANIFEST, TraceManifest, TraceStore
from circuit.training.checkpoints import (
    StateHeader,
    TrainState,
    checkpoint_step,
    encode_checkpoint,
    load_checkpoint,
    read_header,
)
from circuit.training.session import TrainingSession, encode_split


@dataclass(frozen=True)
class Drift:
    """A replayed step that is not the recorded one."""

    step: int
    stage: str
    """The first stage that differs."""


@dataclass(frozen=True)
class Verification:
    """The outcome of replaying a window."""

    start: int
    end: int
    drifts: list[Drift] = field(default_factory=list)
    anchors: list[tuple[int, Difference]] = field(default_factory=list)
    """Anchors that the replay reached in another state, and the first tensor that differs."""
    compared_anchors: int = 0

    @property
    def steps(self) -> int:
        """Number of replayed steps."""
        return self.end - self.start

    @property
    def equal(self) -> bool:
        """Whether every digest and every anchor is the recorded one."""
        return not self.drifts and not self.anchors

    @property
    def law(self) -> str:
        """The closing sentence of the commands that replay."""
        if self.equal:
            return f"replayed {self.steps} steps, 0 bits differ"
        first = self.drifts[0] if self.drifts else None
        where = f"first at step {first.step} in {first.stage}" if first else "at anchors only"
        return f"replayed {self.steps} steps, {len(self.drifts)} differ, {where}"


class Trace:
    """A recorded trace that can be executed again.

    Attributes:
        store: the files.
        allow_drift: go on where a replayed step differs, restarting at each anchor.
        drifts: steps that differed so far (only with `allow_drift`).
    """

    def __init__(self, store: TraceStore, *, allow_drift: bool = False) -> None:
        self.store = store
        self.allow_drift = allow_drift
        self.drifts: list[Drift] = []

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"Trace({self.store.root}: steps {m.start_step} to {self.store.last_step} of"
            f" {m.end_step}, {len(m.anchors())} anchors, {m.config.optimizer.name})"
        )

    @property
    def path(self) -> Path:
        """The trace's folder."""
        return self.store.root

    @property
    def manifest(self) -> TraceManifest:
        """What was recorded, from where, with what."""
        return self.store.manifest

    @cached_property
    def benchmark(self) -> Benchmark:
        """The benchmark of the run, checked to be the recorded one.

        Raises:
            CircuitError: it is missing, damaged, or another one.
        """
        config = self.manifest.config
        folder = find_folder(config.benchmark_dir, self.store.root)
        benchmark = load_benchmark(folder, splits=[config.train_split])
        if benchmark.digest != self.manifest.benchmark_digest:
            raise CircuitError(
                f"the benchmark is not the one that was traced: digest"
                f" {benchmark.digest[:12]}, recorded {self.manifest.benchmark_digest[:12]}",
                where=config.benchmark_dir,
                fix="regenerate it from the config that the run used",
            )
        return benchmark

    def steps(self, start: int, end: int) -> Iterator[TracedStep]:
        """Execute the steps that take state `start` to state `end`, again.

        Yields:
            `TracedStep` of `start + 1`, ..., `end`.

        Raises:
            CircuitError: the window is not recorded; or a step differs from the recorded one (the
                first stage that differs and the changed facts are named), unless `allow_drift`.
        """
        self.store.check_window(start, end)
        anchor = self.store.anchor_before(start)
        tracer = self._tracer_at(anchor)
        while tracer.session.step < end:
            self.prepare()  # whoever looks at a step may change the thread count before the next
            step = tracer.advance()
            self._check(step)
            if step.step > start:
                yield step
            if self.drifts and self.manifest.is_anchor(step.step) and step.step < end:
                tracer = self._tracer_at(step.step)

    def state(self, step: int, *, cache: bool = False) -> TrainState:
        """The state after a step: an anchor, or replayed from the anchor before it and verified.

        Args:
            cache: keep the state as `checkpoints/step_NNNNNN.pt` in the trace.

        Raises:
            CircuitError: the step is not addressable, or the replay differs.
        """
        self.check_addressable(step)
        path = self.store.checkpoint_path(step)
        if self.manifest.is_anchor(step) or path.exists():
            return self._stored(step)
        tracer = self._tracer_at(self.store.anchor_before(step))
        drifts = len(self.drifts)
        while tracer.session.step < step:
            self._check(tracer.advance())
        state = tracer.train_state()
        if cache and len(self.drifts) == drifts:  # only the recorded state is kept
            with OutputFolder(self.store.root, COMMAND, resume=True) as folder:
                folder.write_bytes(
                    path.relative_to(self.store.root).as_posix(), encode_checkpoint(state)
                )
        return state

    def check_addressable(self, step: int) -> None:
        """Refuse a step whose state the trace cannot give.

        Raises:
            CircuitError: says which it can.
        """
        if not self.manifest.is_addressable(step) or step > self.store.last_step:
            m = self.manifest
            first = max(m.start_step, m.checkpoint_start_step)
            every = "every step" if m.checkpoint_every == 1 else f"every {m.checkpoint_every} steps"
            raise CircuitError(
                f"step {step} of the trace is not addressable",
                where=self.store.root,
                expected=f"{every} from {first} to {self.store.last_step}, or an anchor",
            )

    def verify(
        self,
        start: int | None = None,
        end: int | None = None,
        *,
        progress: Callable[[TracedStep], None] | None = None,
    ) -> Verification:
        """Replay a window (all by default) and compare every step and every anchor in it.

        Unlike `steps`, it does not stop at a difference: a replay that differs restarts at the
        next anchor.
        """
        start = self.manifest.start_step if start is None else start
        end = self.store.last_step if end is None else end
        self.store.check_window(start, end)
        drifts: list[Drift] = []
        apart: list[tuple[int, Difference]] = []
        compared = 0
        tracer = self._tracer_at(self.store.anchor_before(start))
        # a replay that differs is taken on to the next anchor, which tells tensor and elements
        while tracer.session.step < (self._next_anchor(end) if drifts and not apart else end):
            step = tracer.advance()
            drift = self._drift(step) if start < step.step <= end else None
            if drift is not None:
                drifts.append(drift)
            if self.manifest.is_anchor(step.step):
                stored = self.store.anchor(step.step)
                difference = state_difference(stored, tracer.train_state())
                compared += 1
                if difference is not None:
                    apart.append((step.step, difference))
                if drift is not None:
                    tracer = self._tracer_at(step.step)
            if progress is not None:
                progress(step)
        return Verification(start, end, drifts, apart, compared)

    def _next_anchor(self, step: int) -> int:
        anchors = self.manifest.anchors()
        return next((s for s in anchors if step <= s <= self.store.last_step), step)

    def changed_facts(self) -> list[str]:
        """Facts of the environment that differ from the recorded ones and can change bits."""
        self.prepare()  # the thread count is never the cause: replay sets it before every step
        now = environment_facts(self.manifest.config.device)
        return changed_facts(self.manifest.environment, now)

    def prepare(self) -> None:
        """Give this process the thread count of the recording, and deterministic kernels."""
        threads = self.manifest.environment["threads"]
        prepare_process(threads=threads, device=self.manifest.config.device)

    def _tracer_at(self, anchor: int) -> Tracer:
        self.prepare()
        state = self._stored(anchor)
        config = self.manifest.config
        return Tracer(TrainingSession(config, self.benchmark, state=state, data=self._data))

    @cached_property
    def _data(self) -> EncodedSplit:
        return encode_split(self.benchmark, self.manifest.config.train_split)

    def _stored(self, step: int) -> TrainState:
        """A stored state, checked against the digests of its row."""
        state = self.store.anchor(step)
        found, recorded = FlatState.of(state).stages(), self.store.state_digests(step)
        odd = [stage for stage, digest in recorded.items() if found.get(stage) != digest]
        if odd:
            raise CircuitError(
                f"the anchor of step {step} is not the recorded state: {odd[0]} differs",
                where=self.store.checkpoint_path(step),
                fix="record the trace again",
            )
        return state

    def _drift(self, step: TracedStep) -> Drift | None:
        stage = first_stage_that_differs(step, self.store.row(step.step))
        return None if stage is None else Drift(step.step, stage)

    def _check(self, step: TracedStep) -> None:
        drift = self._drift(step)
        if drift is None:
            return
        if not self.allow_drift:
            facts = "; ".join(self.changed_facts()) or "no recorded fact has changed"
            raise CircuitError(
                f"step {drift.step} does not replay: it first differs in {drift.stage}"
                f" ({CAUSES[drift.stage]}); changed since the recording: {facts}",
                where=self.store.root,
                fix="replay where it was recorded, or accept the drift: --allow-drift, or"
                " open_trace(path, allow_drift=True)",
            )
        self.drifts.append(drift)


def open_trace(path: str | Path, *, allow_drift: bool = False) -> Trace:
    """Open a trace folder for replay.

    Args:
        allow_drift: see `Trace`.

    Raises:
        CircuitError: there is no trace, or its manifest is damaged.
    """
    return Trace(TraceStore(path), allow_drift=allow_drift)


def load_state(path: str | Path) -> TrainState:
    """The state behind a checkpoint's name, replayed where it is an addressable step of a trace.

    Every command reads its checkpoints through this.

    Raises:
        CircuitError: there is neither a file nor a trace that can make it, or the file holds
            another step than its name says.
    """
    path = Path(path)
    trace, step = _trace_of(path)
    state = load_checkpoint(path) if trace is None else trace.state(step)
    _refuse_misnamed(state, path)
    return state


def load_header(path: str | Path) -> StateHeader:
    """Whose state is behind a checkpoint's name, without reading or replaying it.

    Raises:
        CircuitError: as `load_state`, as far as descriptions tell.
    """
    path = Path(path)
    trace, step = _trace_of(path)
    if trace is None:
        header = read_header(path)
        _refuse_misnamed(header, path)
        return header
    trace.check_addressable(step)
    return StateHeader(step, trace.manifest.config, trace.manifest.benchmark_digest)


def _trace_of(path: Path) -> tuple[Trace | None, int]:
    """The trace that makes a checkpoint of which there is no file, and the step."""
    step, root = checkpoint_step(path), path.parent.parent
    if step is None or path.exists() or not (root / MANIFEST).exists():
        return None, -1
    return open_trace(root), step


def _refuse_misnamed(state: StateHeader, path: Path) -> None:
    if checkpoint_step(path) not in (None, state.step):
        raise CircuitError(f"holds the state of step {state.step}", where=path)
