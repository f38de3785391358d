"""Record a trace: every optimizer step of a run, again, with its terms and its digests.

One row a step and a full state every `anchor_every` steps. A recording that was killed goes on from
its last anchor and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from circuit.artifacts import OutputFolder, RowLog
from circuit.config import TrainConfig
from circuit.environment import (
    changed_facts,
    environment_facts,
    prepare_process,
    recorded_facts,
)
from circuit.errors import CircuitError
from circuit.tasks.benchmark import Benchmark, load_benchmark
from circuit.trace.compare import state_difference
from circuit.trace.decompose import norm
from circuit.trace.replay import load_state
from circuit.trace.step import FlatState, TracedStep, Tracer
from circuit.trace.store import COMMAND, MANIFEST, ROWS, TraceManifest, TraceStore
from circuit.training.checkpoints import (
    TrainState,
    checkpoint_name,
    encode_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_description,
)
from circuit.training.loop import BEST, ENVIRONMENT
from circuit.training.session import TrainingSession, check_state


@lru_cache(maxsize=1)
def _digesting(process: int) -> ThreadPoolExecutor:
    """Digests a step while its terms are computed: sha256 leaves the interpreter's lock."""
    return ThreadPoolExecutor(max_workers=1)


DIGEST_ALGORITHM = "sha256 over dtype, shape and bytes of the flat float32 vector or token batch"


@dataclass(frozen=True)
class RecordOptions:
    """What to record."""

    end_step: int | None = None
    num_steps: int | None = None
    resume_checkpoint: Path | None = None
    """Start at this saved state instead of at the initial weights."""
    anchor_every: int = 50
    checkpoint_every: int = 1
    checkpoint_start_step: int = 0
    storage: Literal["anchors", "dense"] = "anchors"
    top_k_parameters: int = 10
    require_historical_replay: bool = False

    def __post_init__(self) -> None:
        for name in ("anchor_every", "checkpoint_every", "top_k_parameters"):
            if getattr(self, name) < 1:
                raise CircuitError(f"{name} is {getattr(self, name)}", expected="at least 1")


@dataclass(frozen=True)
class RecordResult:
    """A finished recording."""

    store: TraceStore
    steps: int
    first_step: int
    """Where this call started: `start_step`, or an anchor on resume."""
    history: list[int]
    """Steps whose saved checkpoint of the run equals the replayed state, bit for bit."""
    files: list[str]


def record_trace(
    config: TrainConfig,
    output_dir: str | Path,
    options: RecordOptions,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[TracedStep], None] | None = None,
) -> RecordResult:
    """Record a trace of a run into a folder.

    The thread count is the config's, else the one that the run recorded in its folder.

    Args:
        overwrite: replace an earlier trace there, and nothing else.
        resume: go on with a recording that was stopped, or extend a finished one to a later end.
        progress: called after every step.

    Raises:
        CircuitError: bad input, a folder that is not free, or, with
            `require_historical_replay`, a past that is not this run's (step, stage and the changed
            facts are named).
    """
    if overwrite and resume:
        raise CircuitError("--overwrite and --resume exclude each other", fix="pass one of them")
    outputs = OutputFolder(output_dir, COMMAND, overwrite=overwrite, resume=resume, resumable=True)
    with outputs as folder:
        benchmark = load_benchmark(config.benchmark_dir, splits=[config.train_split])
        run_facts = recorded_facts(Path(config.output_dir) / ENVIRONMENT)
        start = options.resume_checkpoint
        state = None if start is None else load_state(start)
        # after load_state, which may have replayed with the threads of another trace
        threads = config.threads or run_facts.get("threads")
        prepare_process(threads=threads, device=config.device)
        session = TrainingSession(config, benchmark, state=state)
        manifest = _manifest(session, options)
        history = _History(config, manifest, options.require_historical_replay, run_facts)
        if resume:
            session = _resumed(folder, manifest, benchmark) or session
        else:
            folder.clear(planned=_planned(manifest))
        return _Recorder(folder, manifest, Tracer(session), history, progress).run()


def _manifest(session: TrainingSession, options: RecordOptions) -> TraceManifest:
    config, start = session.config, session.step
    if (options.end_step is None) == (options.num_steps is None):
        raise CircuitError("give one of --end-step and --num-steps")
    end = options.end_step if options.end_step is not None else start + (options.num_steps or 0)
    if not start < end <= config.steps:
        raise CircuitError(
            f"cannot record steps {start} to {end}",
            expected=f"an end after {start} and at most the config's {config.steps} steps",
        )
    return TraceManifest(
        config=config,
        benchmark_digest=session.benchmark.digest,
        start_step=start,
        end_step=end,
        anchor_every=options.anchor_every,
        checkpoint_every=options.checkpoint_every,
        checkpoint_start_step=options.checkpoint_start_step,
        storage=options.storage,
        top_k_parameters=options.top_k_parameters,
        parameters={name: list(p.shape) for name, p in session.model.named_parameters()},
        start_digests=FlatState.of(session.state()).stages(),
        digest_algorithm=DIGEST_ALGORITHM,
        environment=environment_facts(config.device),
    )


def _resumed(
    folder: OutputFolder, manifest: TraceManifest, benchmark: Benchmark
) -> TrainingSession | None:
    """The session at the last anchor of a stopped recording, or None if there is none yet."""
    if not (folder.root / MANIFEST).exists():
        present = [name for name in folder.owned if (folder.root / name).exists()]
        if present:
            raise CircuitError(
                f"{MANIFEST} is missing beside {len(present)} files of an earlier trace",
                where=folder.root,
                fix="bring it back, or start anew with --overwrite",
            )
        folder.refuse_foreign(_planned(manifest))
        return None
    store = TraceStore(folder.root)
    ours, theirs = (m.model_dump(exclude={"environment"}) for m in (manifest, store.manifest))
    differing = [name for name in ours if ours[name] != theirs[name]]
    extended = manifest.end_step > store.manifest.end_step
    if extended:
        differing.remove("end_step")
    differing += changed_facts(store.manifest.environment, manifest.environment)
    if differing:
        raise CircuitError(
            f"the recording was started with other settings: {'; '.join(differing)}",
            where=folder.root / MANIFEST,
            fix="resume with the same options on the same machine, or start anew with --overwrite",
        )
    folder.refuse_foreign(_planned(manifest))
    if extended:
        # in this order: killed in between, a resumption to either end still makes it whole
        _remove_old_end(folder, manifest, store.manifest.end_step)
        folder.write_text(MANIFEST, manifest.to_json())
        store = TraceStore(folder.root)
    # the first anchor stands before the row file does
    rows = store.read_rows() if (store.root / ROWS).exists() else []
    last = manifest.start_step + len(rows)
    stored = [s for s in manifest.anchors() if s <= last and store.checkpoint_path(s).exists()]
    if not stored:
        return None
    return TrainingSession.restore(store.anchor(stored[-1]), manifest.config, benchmark)


def _remove_old_end(folder: OutputFolder, manifest: TraceManifest, step: int) -> None:
    """The state at the end of a shorter recording, unless the longer one stores it too."""
    if not manifest.is_anchor(step) and _anchor_name(step) in folder.owned:
        folder.remove([_anchor_name(step)])


class _History:
    """Proves that the replayed states are the run's own past, where it saved a checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: TraceManifest,
        required: bool,
        run_facts: dict[str, Any],
    ) -> None:
        saved = list_checkpoints(Path(config.output_dir) / "checkpoints") if required else {}
        self.saved = {
            step: path
            for step, path in saved.items()
            if manifest.start_step < step <= manifest.end_step
        }
        best = Path(config.output_dir) / BEST
        if required and best.exists():
            step = read_description(best)["step"]
            if manifest.start_step < step <= manifest.end_step:
                self.saved.setdefault(step, best)
        self.manifest = manifest
        self.changed = changed_facts(run_facts, manifest.environment)
        if required and not self.saved:
            raise CircuitError(
                f"the run saved no checkpoint after step {manifest.start_step} and up to step"
                f" {manifest.end_step}, so its history cannot be proved",
                where=Path(config.output_dir) / "checkpoints",
                fix="train the run first, or leave out --require-historical-replay",
            )

    def check(self, tracer: Tracer) -> None:
        """Compare the present state with the run's checkpoint of this step, if there is one."""
        step = tracer.session.step
        if step not in self.saved:
            return
        difference = state_difference(self._load(step), tracer.train_state())
        if difference is not None:
            raise self._not_the_past(step, str(difference))

    def check_recorded(self, store: TraceStore, first: int) -> None:
        """Compare the run's checkpoints before `first` with what a resumed recording holds."""
        start = self.manifest.start_step
        earlier = [step for step in self.saved if step < first]
        rows = store.read_rows() if earlier else []
        for step in earlier:
            found = FlatState.of(self._load(step)).stages()
            recorded = store.manifest.start_digests
            if step > start:
                recorded = rows[step - start - 1]["digests"]
            for stage, digest in found.items():
                if recorded.get(stage) != digest:
                    raise self._not_the_past(step, stage)

    def _load(self, step: int) -> TrainState:
        state = load_checkpoint(self.saved[step])
        check_state(state, self.manifest.config, self.manifest.benchmark_digest)
        return state

    def _not_the_past(self, step: int, difference: str) -> CircuitError:
        cause = "; ".join(self.changed) or "no recorded fact of the environment has changed"
        return CircuitError(
            f"the replay is not the run's past: step {step} differs in {difference} ({cause})",
            where=self.saved[step],
            fix="trace it where it was trained, or leave out --require-historical-replay",
        )


class _Recorder:
    """Writes rows and anchors while a tracer moves."""

    def __init__(
        self,
        folder: OutputFolder,
        manifest: TraceManifest,
        tracer: Tracer,
        history: _History,
        progress: Callable[[TracedStep], None] | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tracer = tracer
        self.history = history
        self.progress = progress or (lambda _: None)

    def run(self) -> RecordResult:
        manifest, tracer = self.manifest, self.tracer
        first = tracer.session.step
        if first == manifest.start_step and not (self.folder.root / MANIFEST).exists():
            self.folder.write_text(MANIFEST, manifest.to_json())
        if first == manifest.start_step:
            self._save_anchor()
        self.folder.claim([ROWS])
        log = RowLog(self.folder.path(ROWS), last_step=first)
        try:
            self.history.check_recorded(TraceStore(self.folder.root), first)
            self.history.check(tracer)
            while tracer.session.step < manifest.end_step:
                step = tracer.advance()
                log.append(trace_row(step, manifest.top_k_parameters))
                if manifest.is_anchor(step.step):
                    log.sync()
                    self._save_anchor()
                self.history.check(tracer)
                self.progress(step)
        finally:
            log.close()
        return RecordResult(
            TraceStore(self.folder.root),
            manifest.end_step - first,
            first,
            sorted(self.history.saved),
            self.folder.owned,
        )

    def _save_anchor(self) -> None:
        state = self.tracer.train_state()
        self.folder.write_bytes(_anchor_name(state.step), encode_checkpoint(state))


def _anchor_name(step: int) -> str:
    return f"checkpoints/{checkpoint_name(step)}"


def _planned(manifest: TraceManifest) -> list[str]:
    return [MANIFEST, ROWS, *(_anchor_name(step) for step in manifest.anchors())]


def trace_row(step: TracedStep, top_k: int) -> dict[str, Any]:
    """The row of a step (definitions.md section 6, optimizer-update-trace)."""
    digests = _digesting(os.getpid()).submit(step.digests)
    update = step.update
    moved = step.layout.norms(update.total)
    top = sorted(moved, key=lambda name: (-moved[name], name))[:top_k]
    weights = step.layout.norms(step.before.parameters, top)
    return {
        "step": step.step,
        "loss": step.loss,
        "token_accuracy": step.token_accuracy,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        "clip_factor": step.clip,
        "update_norm": norm(update.total),
        "term_norms": {
            name: norm(v) for name, v in {**update.named(), **update.references()}.items()
        },
        "rounding_ulps": update.rounding_ulps(),
        "top_parameters": [
            {
                "name": name,
                "update_norm": moved[name],
                "relative": moved[name] / weights[name] if weights[name] else None,
            }
            for name in top
        ],
        "batch_shape": list(step.tokens.shape),
        "batch_indices": step.indices.tolist(),
        "digests": digests.result(),
    }
