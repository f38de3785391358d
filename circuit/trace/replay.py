"""Replay a trace: iterate its steps again, check out any step, verify it all.

`circuit.open_run(path)` gives a `ReplayedRun`. `run.replay(a, b)` takes state `a` to state `b` and
yields the steps `a+1 .. b`; every replayed step is compared with the recorded one by digest. Replay
runs with the recorded thread count, whatever the machine has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from circuit.artifacts import OutputFolder
from circuit.core.edit import Edit
from circuit.core.state import FlatState
from circuit.environment import changed_facts, environment_facts
from circuit.errors import CircuitError
from circuit.quoting import counted
from circuit.trace.compare import CAUSES, Difference, first_stage_that_differs, state_difference
from circuit.trace.step import TracedStep, Tracer
from circuit.trace.store import COMMAND, FILES, TraceManifest, TraceStore
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import StateHeader, TrainState, encode_checkpoint
from circuit.training.otherwise import Otherwise
from circuit.training.recipe_setup import setup_of
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

if TYPE_CHECKING:
    import torch
    from transformer_lens import HookedTransformer

    from circuit.core.graphs import Graphs


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
            return f"replayed {counted(self.steps, 'step')}, 0 bits differ"
        first = self.drifts[0] if self.drifts else None
        where = f"first at step {first.step} in {first.stage}" if first else "at anchors only"
        return f"replayed {counted(self.steps, 'step')}, {len(self.drifts)} differ, {where}"


@dataclass(frozen=True)
class _Executed:
    """One step of a pass, with what it differs in."""

    step: TracedStep
    drift: Drift | None
    sound: bool
    """Whether no step since the pass's last anchor has differed."""
    tracer: Tracer


class ReplayedRun:
    """A recorded trace, whose steps can be executed again (a `circuit.runs.base.Run`).

    Attributes:
        store: the files.
        setup: what its config names, read and built once.
        allow_drift: go on where a replayed step differs, restarting at each anchor.
        drifts: steps that differed so far (only with `allow_drift`).
    """

    def __init__(
        self,
        store: TraceStore,
        *,
        allow_drift: bool = False,
        setup: Setup | None = None,
        recipe: str | None = None,
    ) -> None:
        """Read nothing but the manifest.

        Args:
            store: the files.
            allow_drift: as said.
            setup: of a run; taken where it is this one.
            recipe: `FILE:NAME` of a recipe's trace, whose code is executed only if it is named.

        Raises:
            CircuitError: the trace is of a task, where a recipe is named.
        """
        self.store = store
        manifest = store.manifest
        config = manifest.config.executing(recipe)
        self.setup = setup_of(config, store.root, benchmark_digest=manifest.benchmark_digest)
        if setup is not None and setup.is_of(manifest.config, manifest.benchmark_digest):
            self.setup = setup.with_config(manifest.config)
        self.allow_drift = allow_drift
        self.drifts: list[Drift] = []
        self._walk: Iterator[_Executed] = iter(())
        self._walked_to: int | None = None
        self._left: TrainState | None = None  # the state that the last counterfactual started from

    @classmethod
    def open(
        cls,
        where: str | Path,
        *,
        allow_drift: bool = False,
        setup: Setup | None = None,
        recipe: str | None = None,
    ) -> Self:
        """Open a trace's folder or manifest; for the arguments see `__init__`.

        Raises:
            CircuitError: there is no trace, or its manifest is damaged.
        """
        return cls(TraceStore(where), allow_drift=allow_drift, setup=setup, recipe=recipe)

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"ReplayedRun({self.store.root}: steps {m.start_step} to {self.store.last_step} of"
            f" {m.end_step}, {len(m.anchors())} anchors, {m.config.optimizer_words})"
        )

    @property
    def path(self) -> Path:
        """The trace's folder."""
        return self.store.root

    @property
    def config(self) -> TrainConfig:
        """Of the run; of a recipe's with the code that was named."""
        return self.setup.config

    @property
    def manifest(self) -> TraceManifest:
        """What was recorded, from where, with what."""
        return self.store.manifest

    @property
    def steps(self) -> list[int]:
        """The steps whose state can be asked for, ascending."""
        recorded = range(self.manifest.start_step, self.store.last_step + 1)
        return [step for step in recorded if self.manifest.is_addressable(step)]

    @property
    def anchors(self) -> list[int]:
        """The steps from which a replay starts without executing any before, ascending."""
        return [step for step in self.manifest.anchors() if step <= self.store.last_step]

    @property
    def first_step(self) -> int:
        """The first state."""
        return self.manifest.start_step

    @property
    def last_step(self) -> int:
        """The last state."""
        return self.store.last_step

    @property
    def environment(self) -> Mapping[str, Any]:
        """Facts of the machine that it was recorded on."""
        return self.manifest.environment

    @property
    def benchmark_digest(self) -> str:
        """Of the benchmark that was traced."""
        return self.manifest.benchmark_digest

    def check_window(self, start: int, end: int) -> None:
        """Refuse steps that are not recorded; raises as `TraceStore.check_window`."""
        self.store.check_window(start, end)

    def state_digests(self, step: int) -> dict[str, str]:
        """Of the weights and moments of a state, as recorded."""
        return self.store.state_digests(step)

    def header(self, step: int) -> StateHeader:
        """Whose state that of a step is, without making it.

        Raises:
            CircuitError: the step is not addressable.
        """
        self.check_addressable(step)
        return StateHeader(step, self.config, self.manifest.benchmark_digest)

    def model(self, step: int) -> HookedTransformer:
        """The model after a step.

        Raises:
            CircuitError: as `state`.
        """
        return self.setup.model(self.state(step))

    def module(self, dtype: torch.dtype | None = None) -> HookedTransformer:
        """A model of the run's shape, whose weights may be overwritten."""
        return self.setup.module(dtype)

    def replay(self, start: int, end: int, graphs: Graphs | None = None) -> Iterator[TracedStep]:
        """Execute the steps that take state `start` to state `end`, again.

        Args:
            graphs: hold those of the gradients, but with `allow_drift`: bits may be others.

        Yields:
            `TracedStep` of `start + 1`, ..., `end`.

        Raises:
            CircuitError: the window is not recorded; or a step differs from the recorded one (the
                first stage that differs and the changed facts are named), unless `allow_drift`.
        """
        self.store.check_window(start, end)
        for executed in self._execute(start, end, None if self.allow_drift else graphs):
            self._accept(executed)
            if executed.step.step > start:
                yield executed.step

    def counterfactual(self, edit: Edit, end: int) -> FlatState:
        """The state `end` of a training that leaves the run's at `edit.start`.

        Edits in the order of their starts share the replay up to them.

        Raises:
            CircuitError: the steps are not recorded, the edit goes beyond the end or names what
                there is not, or the training diverges.
        """
        config = self.otherwise(edit, end)
        if self._left is None or self._left.step != edit.start:
            self._left = self.state(edit.start)
        self.prepare()
        setup, state = self.setup.with_config(config), replace(self._left, config=config)
        session = TrainingSession(setup, state=state)
        while session.step < end:
            session.advance()
        return FlatState.of(session.state())

    def check_edit(self, edit: Edit, end: int) -> None:
        """Refuse what `counterfactual` would refuse before its first step; no state is made."""
        recipe = self.setup.with_config(self.otherwise(edit, end)).recipe()
        assert isinstance(recipe, Otherwise), "its config has an edit"
        module = recipe.module()
        recipe.begin(module, recipe.optimizer(module), edit.start, None)

    def otherwise(self, edit: Edit, end: int) -> TrainConfig:
        """The config of the training that leaves the run's with an edit; raises as above."""
        self.store.check_window(edit.start, end)
        if edit.end > end:
            raise CircuitError(
                f"an edit of steps {edit.start}:{edit.end}", expected=f"steps up to {end}, the end"
            )
        if self.config.edit is not None:
            raise CircuitError(
                "is a counterfactual training itself, with an edit of its own",
                where=self.store.root,
                expected="the trace of the run that it left",
            )
        return self.config.replace(edit=edit)

    def state(self, step: int, *, cache: bool = False) -> TrainState:
        """The state after a step: an anchor, or replayed from the anchor before it and verified.

        States that are asked for in ascending order are made in one pass.

        Args:
            cache: keep the state as `checkpoints/step_NNNNNN.pt` in the trace.

        Raises:
            CircuitError: the step is not addressable, or the replay differs.
        """
        self.check_addressable(step)
        path = self.store.checkpoint_path(step)
        if self.manifest.is_anchor(step) or path.exists():
            return self._stored(step)
        executed = self._walk_to(step)
        state = executed.tracer.train_state()
        if cache and executed.sound:  # only the recorded state is kept
            with OutputFolder(self.store.root, COMMAND, writes=FILES, resume=True) as folder:
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

        Unlike `replay`, it does not stop at a difference: a replay that differs restarts at the
        next anchor.
        """
        start = self.manifest.start_step if start is None else start
        end = self.store.last_step if end is None else end
        self.store.check_window(start, end)
        drifts: list[Drift] = []
        apart: list[tuple[int, Difference]] = []
        compared = 0
        # a replay that differs is taken on to the next anchor, which tells tensor and elements
        for executed in self._execute(start, self._next_anchor(end)):
            step = executed.step
            if executed.drift is not None and start < step.step <= end:
                drifts.append(executed.drift)
            if self.manifest.is_anchor(step.step):
                stored = self.store.anchor(step.step)
                difference = state_difference(stored, executed.tracer.train_state())
                compared += 1
                if difference is not None:
                    apart.append((step.step, difference))
            if progress is not None:
                progress(step)
            if step.step >= end and (apart or not drifts):
                break
        return Verification(start, end, drifts, apart, compared)

    def changed_facts(self) -> list[str]:
        """Facts of the environment that differ from the recorded ones and can change bits."""
        self.prepare()  # the thread count is never the cause: replay sets it before every step
        now = environment_facts(self.config.device)
        return changed_facts(self.manifest.environment, now)

    def share(self, setup: Setup) -> None:
        """Use what another setup of the same run has read and built."""
        self.setup = setup.with_config(self.config)

    def prepare(self) -> None:
        """Give this process the thread count of the recording, and deterministic kernels."""
        self.setup.prepare(self.manifest.environment["threads"])

    def _execute(self, start: int, end: int, graphs: Graphs | None = None) -> Iterator[_Executed]:
        """One pass, from the anchor at or before `start`: every step up to `end`.

        Where a step has differed, the pass goes on from the next anchor as it was recorded.
        """
        tracer, sound = self._tracer_at(self.store.anchor_before(start), graphs), True
        while tracer.session.step < end:
            self.prepare()  # whoever looks at a step may change the thread count before the next
            step = tracer.advance()
            drift = self._drift(step)
            sound = sound and drift is None
            yield _Executed(step, drift, sound, tracer)
            if not sound and self.manifest.is_anchor(step.step) and step.step < end:
                tracer, sound = self._tracer_at(step.step), True

    def _walk_to(self, step: int) -> _Executed:
        """That step of the pass that made the last state, or of a new one if it is beyond that."""
        reached, anchor = self._walked_to, self.store.anchor_before(step)
        if reached is None or not anchor <= reached < step:
            self._walk = self._execute(step, self.store.last_step)
        self._walked_to = None  # of a pass that fails nothing is left
        for executed in self._walk:
            self._accept(executed)
            if executed.step.step == step:
                self._walked_to = step
                return executed
        raise AssertionError(f"step {step} lies beyond the recorded ones")

    def _next_anchor(self, step: int) -> int:
        later = range(step, self.store.last_step + 1)
        return next(filter(self.manifest.is_anchor, later), step)

    def _tracer_at(self, anchor: int, graphs: Graphs | None = None) -> Tracer:
        self.prepare()
        state, origin = self._stored(anchor), origin_of(self.store, self.setup)
        return Tracer(TrainingSession(self.setup, state=state, origin=origin, graphs=graphs))

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

    def _accept(self, executed: _Executed) -> None:
        drift = executed.drift
        if drift is None:
            return
        if not self.allow_drift:
            facts = "; ".join(self.changed_facts()) or "no recorded fact has changed"
            raise CircuitError(
                f"step {drift.step} does not replay: it first differs in {drift.stage}"
                f" ({CAUSES[drift.stage]}); changed since the recording: {facts}",
                where=self.store.root,
                fix="replay where it was recorded, or accept the drift: `allow_drift`, or"
                " circuit.open_run(path, allow_drift=True)",
            )
        self.drifts.append(drift)


def origin_of(store: TraceStore, setup: Setup) -> Callable[[], TrainState]:
    """The state at which the edit of a counterfactual training starts, from its trace."""

    def state() -> TrainState:
        edit = setup.config.edit
        assert edit is not None
        return ReplayedRun(store, setup=setup).state(edit.start)

    return state
