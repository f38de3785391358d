"""train: steps, evaluation, checkpoints, resume.

The run folder: `run_config.json` (the values in use, and the overrides if there are any),
`environment.json`, `metrics.jsonl` (no clock, so that equal runs give equal bytes),
`checkpoints/step_NNNNNN.pt` and `best.pt`, and, once the last step is done, `summary.json`. Within
one step the order is rows, best, checkpoint. Both are full states: a resumed run goes on from the
last of them, keeps the rows up to it, and writes the others again.

A `Recorder` takes the run's steps in the loop's place and records them. What it writes of a step
stands before the run's own files of that step do, and is on the disk before a checkpoint is: the
recording may be ahead of the run that goes on from its checkpoint, and is never behind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from circuit.artifacts import OutputFolder, RowLog, dump_json
from circuit.environment import (
    environment_facts,
    prepare_process,
)
from circuit.errors import CircuitError, several
from circuit.folders import RUN_CONFIG
from circuit.sealed import sealed
from circuit.sinks import Numbers, Sink, as_function, flattened
from circuit.sizes import require_disk, training_disk
from circuit.tasks.base import Task
from circuit.tasks.examples import Split
from circuit.train_config import RecipeConfig, TrainConfig
from circuit.training.checkpoints import (
    STEP_FILES,
    DivergedError,
    checkpoint_name,
    encode_checkpoint,
)
from circuit.training.evaluate import Evaluation, evaluate
from circuit.training.recipe_setup import setup_of
from circuit.training.run_folder import (
    BEST,
    ENVIRONMENT,
    METRICS,
    METRICS_ROWS,
    SUMMARY,
    EarlierRun,
    earlier_run,
)
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from circuit.training.step import StepOutcome

COMMAND = "train"
FILES = (RUN_CONFIG, ENVIRONMENT, METRICS, SUMMARY, BEST, STEP_FILES)
"""Patterns of the names in a run's folder."""


class Recorder(Protocol):
    """Records every step of a run in the pass that takes it."""

    def open(
        self, config: TrainConfig, *, overwrite: bool, resume: bool
    ) -> AbstractContextManager[None]:
        """Hold the place that is written to, for as long as the run does.

        Raises:
            CircuitError: it is not free, or the run cannot be recorded so.
        """

    def prepare(self, session: TrainingSession) -> None:
        """Refuse what cannot be recorded from the session's step on; nothing is written yet.

        Raises:
            CircuitError: other settings, or steps up to the session's are missing.
        """

    def begin(self) -> None:
        """Drop what is beyond the session's step, and write what stands before the next."""

    def advance(self) -> StepOutcome:
        """Take the session's next step and record it."""

    def sync(self) -> None:
        """Force what is recorded to the disk."""


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows; sent after every step and every evaluation."""

    step: int
    steps: int
    loss: float | None = None
    """Of this step's batch."""
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class TrainResult:
    """A run that reached its last step, or the step that it was asked to stop at."""

    config: TrainConfig
    task: Task | None
    """Of its benchmark, where it is of one."""
    step: int
    first_step: int
    """The step that this call started from (0, or a checkpoint's on resume)."""
    evaluations: dict[str, Evaluation]
    """The last evaluation of every tracked split."""
    best: dict[str, Any] | None
    """Step and value of the best evaluation."""
    seconds: float
    folder: Path
    files: list[str]


def train(
    config: TrainConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    resume_from: int | None = None,
    allow_drift: bool = False,
    stop_at: int | None = None,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[Progress], None] | None = None,
    recorder: Recorder | None = None,
    sinks: Sequence[Sink] = (),
) -> TrainResult:
    """Train a run, or go on with it.

    A resumed run has to have this recipe. What decides no bits may be another: how often it is
    logged, evaluated and saved, and, under a constant schedule, its last step.

    Args:
        overwrite: replace the files of an earlier run in the same folder, and only those; with
            `resume_from`, those of its later steps.
        resume: continue from the last saved state, or start where there is none; the result
            equals, bit for bit, a run that was never interrupted.
        resume_from: continue from the checkpoint of this step instead.
        allow_drift: resume also where the environment differs and bits may too.
        stop_at: stop after this step, with a checkpoint, ready to be resumed.
        stop: asked after every step; True stops there, with a checkpoint.
        progress: called with a `Progress`.
        recorder: takes the steps, and records them; the run's bytes do not change.
        sinks: where every row of `metrics.jsonl` goes, too, as it is written (`circuit.sinks`).

    Raises:
        CircuitError: bad input, a folder that holds another run, or a changed environment.
    """
    told = [as_function(sink) for sink in several(sinks, "sinks")]
    if overwrite and resume:
        raise CircuitError("`overwrite` and `resume` exclude each other", fix="pass one of them")
    last = config.steps if stop_at is None else stop_at
    if not 1 <= last <= config.steps:
        raise CircuitError(f"cannot stop at step {last}", expected=f"1 to {config.steps}")
    resume = resume or resume_from is not None
    outputs = OutputFolder(
        config.output_dir,
        COMMAND,
        writes=FILES,
        overwrite=overwrite,
        resume=resume,
        resumable=True,
    )
    recording: AbstractContextManager[None] = nullcontext()
    if recorder is not None:
        recording = recorder.open(config, overwrite=overwrite and not resume, resume=resume)
    with outputs as folder, recording:
        earlier = earlier_run(config, folder) if resume else None
        if earlier is None and resume_from:
            raise CircuitError(
                "there is no run to resume", where=folder.root, fix="check the folder"
            )
        setup = setup_of(config)
        setup.check_steps()  # refused before anything heavy is imported
        for name in config.tracked_splits:
            setup.check_split(name)
        setup.require_training_memory(traced=recorder is not None)
        for name in config.tracked_splits:
            setup.require_evaluation_memory(name)
        _require_disk(setup, folder, earlier)
        threads = config.threads
        if earlier is not None and threads is None:
            threads = earlier.facts.get("threads")
        prepare_process(threads=threads, device=config.device)
        tracked = {name: setup.split(name) for name in config.tracked_splits}
        state = None
        if earlier is not None:
            earlier.refuse_changed_facts(environment_facts(config.device), allow_drift)
            state = earlier.state(resume_from, drop_later=overwrite)
        session = TrainingSession(setup, state=state)
        if session.step > last:
            raise CircuitError(f"the run is already at step {session.step}, beyond {last}")
        folder.refuse_foreign(planned(config))
        if recorder is not None:
            recorder.prepare(session)
        notes, rows = {}, 0
        if earlier is not None and state is not None:
            notes = earlier.notes(state)
            rows = earlier.rows(state)
            earlier.go_on(state)
        else:
            folder.clear()
            folder.write_text(RUN_CONFIG, config.to_json(origin=True))
            facts = environment_facts(config.device)
            folder.write_text(ENVIRONMENT, dump_json(sealed(facts)))
        loop = _Loop(setup, folder, session, tracked, notes, last, stop, progress, recorder)
        loop.sinks = told
        return loop.run(rows)


def _require_disk(setup: Setup, folder: OutputFolder, earlier: EarlierRun | None) -> None:
    """Refuse a run whose files the disk cannot hold."""
    config, done = setup.config, max(earlier.states, default=0) if earlier is not None else 0
    require_disk(
        training_disk(config, setup.saved_bytes(), done=done),
        folder.root,
        freed=folder.owned_bytes() if earlier is None else 0,
        where=f"config {config.name}",
    )


def planned(config: TrainConfig) -> list[str]:
    """Names of the files that a run is going to write."""
    steps = {*range(config.checkpoint_every, config.steps + 1, config.checkpoint_every)}
    names = [f"checkpoints/{checkpoint_name(step)}" for step in sorted(steps | {config.steps})]
    return [RUN_CONFIG, ENVIRONMENT, METRICS, SUMMARY, BEST, *names]


class _Loop:
    """One call of `train`, from its session's step to `last`."""

    def __init__(
        self,
        setup: Setup,
        folder: OutputFolder,
        session: TrainingSession,
        tracked: dict[str, Split],
        notes: dict[str, Any],
        last: int,
        stop: Callable[[], bool] | None,
        progress: Callable[[Progress], None] | None,
        recorder: Recorder | None,
    ) -> None:
        self.setup, self.config = setup, setup.config
        self.folder = folder
        self.session = session
        self.notes = notes
        self.last = last
        self.stop = stop or (lambda: False)
        self.progress = progress or (lambda _: None)
        self.evaluations: dict[str, Evaluation] = {}
        self.evaluated_at: int | None = None
        self.tracked = tracked
        self.recorder = recorder
        self.sinks: list[Callable[[int, Numbers], Any]] = []

    def run(self, kept_rows: int) -> TrainResult:
        """Every step; of a resumed run's rows so many stay."""
        config, session = self.config, self.session
        self.rows = kept_rows
        first, began = session.step, time.perf_counter()
        self.folder.claim([METRICS])
        log = RowLog(self.folder.path(METRICS), last_step=first if first else None)
        advance = session.advance if self.recorder is None else self.recorder.advance
        try:
            if self.recorder is not None:
                self.recorder.begin()
            if first == 0:
                if self.tracked:
                    self._evaluate(log)
            elif self._checkpoint_due() and not self._checkpoint().exists():
                self._save_checkpoint(log)  # of a run that ended between its best and this one
            while session.step < self.last:
                outcome = advance()
                self.progress(Progress(session.step, config.steps, float(outcome.loss)))
                if self.stop():
                    self.last = session.step
                self._after_step(outcome, log)
            if self.evaluated_at != session.step:  # it was at its end when it began
                self._measure()
        finally:
            log.close()
        seconds = time.perf_counter() - began
        result = TrainResult(
            config,
            None if isinstance(config, RecipeConfig) else self.setup.benchmark.task,
            session.step,
            first,
            self.evaluations,
            self.notes.get("best"),
            seconds,
            self.folder.root,
            self.folder.owned,
        )
        if session.step == config.steps:
            self.folder.write_text(SUMMARY, dump_json(sealed(_summary(result))))
        return replace(result, files=self.folder.owned)

    def _write(self, log: RowLog, row: dict[str, Any]) -> None:
        log.append(row)
        self.rows += 1
        of = row.get("split", "train")  # whose numbers they are
        for sink in self.sinks:
            sink(row["step"], flattened(row, f"{of}/"))

    def _after_step(self, outcome: StepOutcome, log: RowLog) -> None:
        config, step = self.config, outcome.step
        end = step == config.steps
        if step % config.log_every == 0 or end:
            self._write(log, self._step_row(outcome))
        if self.tracked and (step % config.eval_every == 0 or end):
            self._evaluate(log)
        elif step == self.last:
            self._measure()  # of where it stops; refused before it is saved
        if self._checkpoint_due():
            self._save_checkpoint(log)

    def _checkpoint_due(self) -> bool:
        step = self.session.step
        return step % self.config.checkpoint_every == 0 or step == self.last

    def _checkpoint(self) -> Path:
        return self.folder.root / "checkpoints" / checkpoint_name(self.session.step)

    def _save_checkpoint(self, log: RowLog) -> None:
        self._save(self._checkpoint().relative_to(self.folder.root).as_posix(), log)

    def _step_row(self, outcome: StepOutcome) -> dict[str, Any]:
        return {
            "kind": "train",
            "step": outcome.step,
            "loss": float(outcome.loss),
            "token_accuracy": outcome.accuracy,
            "lr": outcome.lr,
            "grad_norm": float(outcome.grad_norm),
            "clip_factor": outcome.clip_factor,
        }

    def _measure(self) -> None:
        """Evaluate the splits; refuse a run that has diverged."""
        self.evaluated_at = self.session.step
        model = cast("HookedTransformer", self.session.model)  # where splits are tracked
        for name, split in self.tracked.items():
            evaluation = self.evaluations[name] = evaluate(model, split, name)
            if not (math.isfinite(evaluation.loss) and math.isfinite(evaluation.w)):
                raise DivergedError(
                    f"training diverged: {name} loss {evaluation.loss} at step {self.session.step}",
                    where=f"config {self.config.name}",
                    fix="lower the learning rate or clip the gradient",
                )

    def _evaluate(self, log: RowLog) -> None:
        self._measure()
        step = self.session.step
        for evaluation in self.evaluations.values():
            self._write(log, {"kind": "evaluation", "step": step, **evaluation.to_row()})
            self.progress(Progress(step, self.config.steps, evaluation=evaluation))
        best = self.config.best
        value = getattr(self.evaluations[best.split], best.metric)
        if step > 0 and ("best" not in self.notes or value > self.notes["best"]["value"]):
            self.notes["best"] = {
                "step": step,
                "split": best.split,
                "metric": best.metric,
                "value": value,
            }
            self._save(BEST, log)

    def _save(self, name: str, log: RowLog) -> None:
        """A state to go on from: what was recorded up to it is on the disk before it is."""
        log.sync()
        if self.recorder is not None:
            self.recorder.sync()
        state = self.session.state({**self.notes, METRICS_ROWS: self.rows})
        self.folder.write_bytes(name, encode_checkpoint(state))


def _summary(result: TrainResult) -> dict[str, Any]:
    steps = result.step - result.first_step
    return {
        "name": result.config.name,
        "steps": result.step,
        "best": result.best,
        "evaluations": {name: e.to_row() for name, e in result.evaluations.items()},
        "seconds_of_last_call": result.seconds,
        "steps_per_second": steps / result.seconds if steps else None,
    }
