"""Record a trace: every optimizer step of a run, again, with its terms and its digests.

One row a step and a full state every `anchor_every` steps. A recording that was killed goes on from
its last anchor and ends with the same bytes as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from circuit.artifacts import OutputFolder
from circuit.core.state import FlatState
from circuit.environment import changed_facts, environment_facts, prepare_process, recorded_facts
from circuit.errors import CircuitError
from circuit.options import Option, Options
from circuit.sizes import require_disk, trace_disk
from circuit.trace.compare import state_difference
from circuit.trace.replay import origin_of
from circuit.trace.states import States
from circuit.trace.step import TracedStep, Tracer
from circuit.trace.store import (
    COMMAND,
    FILES,
    MANIFEST,
    ROWS,
    WHILE_TRAINING,
    TraceManifest,
    TraceStore,
)
from circuit.trace.writer import TraceWriter, anchor_name, planned_files
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import (
    TrainState,
    list_checkpoints,
    load_checkpoint,
    read_description,
)
from circuit.training.recipe_setup import setup_of
from circuit.training.run_folder import BEST, ENVIRONMENT
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup, check_state

DIGEST_ALGORITHM = "sha256 over dtype, shape and bytes of the flat float32 vector or token batch"


class RecordOptions(Options):
    """What to record."""

    end_step: Annotated[int | None, Option("Last step to record.", least=1)] = None
    num_steps: Annotated[
        int | None, Option("How many steps, where `end_step` is not given.", least=1)
    ] = None
    resume_checkpoint: Annotated[
        Path | None,
        Option(
            "Start at this checkpoint of the run.", kind="checkpoint", unset="the initial weights"
        ),
    ] = None
    anchor_every: Annotated[int, Option("Steps between stored full states.", least=1)] = 50
    checkpoint_every: Annotated[int, Option("Steps between addressable checkpoints.", least=1)] = 1
    checkpoint_start_step: Annotated[int, Option("First addressable step.", least=0)] = 0
    storage: Annotated[
        Literal["anchors", "dense"],
        Option("anchors (replays the steps between) or dense (stores every addressable step)."),
    ] = "anchors"
    top_k_parameters: Annotated[
        int, Option("Tensors listed per step, by size of their update.", least=1)
    ] = 10
    require_historical_replay: Annotated[
        bool,
        Option("Prove that every checkpoint that the run saved is reached bit for bit, or fail."),
    ] = False

    def words(self) -> list[str]:
        """With the start that the command line asks for."""
        start = [] if self.resume_checkpoint else ["--from-initialization"]
        return [*start, *super().words()]


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
        raise CircuitError("`overwrite` and `resume` exclude each other", fix="pass one of them")
    outputs = OutputFolder(
        output_dir,
        COMMAND,
        writes=FILES,
        overwrite=overwrite,
        resume=resume,
        resumable=True,
    )
    with outputs as folder:
        setup = setup_of(config)
        states = States(setup)
        setup.check_steps()  # refused before anything heavy is imported
        run_facts = recorded_facts(Path(config.output_dir) / ENVIRONMENT)
        start = options.resume_checkpoint
        header = None if start is None else states.header(start)
        _check_window(config, options, 0 if header is None else header.step)
        setup.require_training_memory(traced=True)
        folder.refuse_foreign([MANIFEST, ROWS])
        if header is not None:
            setup.check(header)
        state = None if start is None else states.state(start)
        if state is not None:
            state.past_moments(start)
        # after the state, which may have replayed with the threads of another trace
        threads = config.threads or run_facts.get("threads")
        prepare_process(threads=threads, device=config.device)
        session = TrainingSession(setup, state=state)
        digests = FlatState.of(session.state()).stages()
        manifest = make_manifest(session, options, folder, session.step, digests)
        history = _History(config, manifest, options.require_historical_replay, run_facts)
        if resume:
            if options.require_historical_replay:
                _refuse_unexecuted(folder)
            session = _resumed(folder, manifest, setup) or session
        else:
            folder.clear(planned=planned_files(manifest))
        return _record(folder, manifest, session, history, progress or (lambda _: None))


def _record(
    folder: OutputFolder,
    manifest: TraceManifest,
    session: TrainingSession,
    history: _History,
    progress: Callable[[TracedStep], None],
) -> RecordResult:
    """Every step from the session's to the manifest's last."""
    first = session.step
    with TraceWriter(folder, manifest, Tracer(session)) as writer:
        history.check_recorded(TraceStore(folder.root), first)
        history.check(writer.tracer)
        while session.step < manifest.end_step:
            step = writer.advance()
            history.check(writer.tracer)
            progress(step)
    return RecordResult(
        TraceStore(folder.root),
        manifest.end_step - first,
        first,
        sorted(history.saved),
        folder.owned,
    )


def _check_window(config: TrainConfig, options: RecordOptions, start: int) -> int:
    """The last step of the window.

    Raises:
        CircuitError: it is named twice or not at all, or lies outside the run.
    """
    if (options.end_step is None) == (options.num_steps is None):
        raise CircuitError("give one of `end_step` and `num_steps`")
    end = options.end_step if options.end_step is not None else start + (options.num_steps or 0)
    if not start < end <= config.steps:
        raise CircuitError(
            f"cannot record steps {start} to {end}",
            expected=f"an end after {start} and at most the config's {config.steps} steps",
        )
    return end


def make_manifest(
    session: TrainingSession,
    options: RecordOptions,
    folder: OutputFolder,
    start: int,
    start_digests: dict[str, str],
) -> TraceManifest:
    """What a trace of a session is going to be.

    Args:
        folder: where it is going to stand.
        start: the step that it begins after.
        start_digests: of the state there, by stage.

    Raises:
        CircuitError: the options name no end, or one that the run does not reach; or the disk
            cannot hold it.
    """
    config = session.config
    end = _check_window(config, options, start)
    manifest = TraceManifest(
        config=config,
        benchmark_digest=session.benchmark_digest,
        start_step=start,
        end_step=end,
        anchor_every=options.anchor_every,
        checkpoint_every=options.checkpoint_every,
        checkpoint_start_step=options.checkpoint_start_step,
        storage=options.storage,
        top_k_parameters=options.top_k_parameters,
        parameters={name: list(p.shape) for name, p in session.model.named_parameters()},
        start_digests=start_digests,
        digest_algorithm=DIGEST_ALGORITHM,
        environment=environment_facts(config.device),
    )
    require_disk(
        trace_disk(
            session.setup.saved_bytes(),
            len(session.recipe.batch(1).examples),
            steps=end - start,
            stored=manifest.most_anchors,
            listed=options.top_k_parameters,
        ),
        folder.root,
        freed=folder.owned_bytes(),
        where=f"config {config.name}",
    )
    return manifest


def _resumed(folder: OutputFolder, manifest: TraceManifest, setup: Setup) -> TrainingSession | None:
    """The session at the last anchor of a stopped recording, or None if there is none yet."""
    store = stopped_trace(folder)
    if store is None:
        folder.refuse_foreign(planned_files(manifest))
        return None
    old_end = store.manifest.end_step
    extended = manifest.end_step > old_end
    shorter = manifest.model_copy(update={"end_step": old_end})
    check_settings(shorter if extended else manifest, store)
    folder.refuse_foreign(planned_files(manifest))
    if extended:
        # in this order: killed in between, a resumption to either end still makes it whole
        _remove_old_end(folder, manifest, old_end)
        folder.write_text(MANIFEST, manifest.to_json())
        store = TraceStore(folder.root)
    # the first anchor stands before the row file does
    last = manifest.start_step + len(store.read_rows() if (store.root / ROWS).exists() else [])
    stored = [s for s in manifest.anchors() if s <= last and store.checkpoint_path(s).exists()]
    if not stored:
        return None
    return TrainingSession(setup, state=store.anchor(stored[-1]), origin=origin_of(store, setup))


def stopped_trace(folder: OutputFolder) -> TraceStore | None:
    """The trace that stands in a folder, whole or not, or None if there is none yet.

    Raises:
        CircuitError: its manifest is gone, or damaged.
    """
    if (folder.root / MANIFEST).exists():
        return TraceStore(folder.root)
    present = [name for name in folder.owned if (folder.root / name).exists()]
    if present:
        raise CircuitError(
            f"{MANIFEST} is missing beside {len(present)} files of an earlier trace",
            where=folder.root,
            fix="bring it back, or start anew with `overwrite`",
        )
    return None


def check_settings(manifest: TraceManifest, store: TraceStore) -> None:
    """Refuse to go on with a trace that was started with other settings.

    Raises:
        CircuitError: names them.
    """
    aside = {"environment", "config"}
    ours, theirs = (m.model_dump(exclude=aside) for m in (manifest, store.manifest))
    differing = [name for name in ours if ours[name] != theirs[name]]
    recipe = manifest.config.recipe_difference(store.manifest.config)
    if recipe is not None:
        differing.append(f"the config's {recipe}")
    differing += changed_facts(store.manifest.environment, manifest.environment)
    if differing:
        raise CircuitError(
            f"the recording was started with other settings: {'; '.join(differing)}",
            where=store.root / MANIFEST,
            fix="resume with the same options on the same machine, or start anew with `overwrite`",
        )


def _refuse_unexecuted(folder: OutputFolder) -> None:
    """Steps that were recorded while training prove nothing of themselves."""
    if (folder.root / WHILE_TRAINING).exists():
        raise CircuitError(
            "the steps were recorded while training, so none has been executed again",
            where=folder.root / WHILE_TRAINING,
            fix="record them again with `overwrite` or in another folder; `circuit trace verify`"
            " executes them again and compares",
        )


def _remove_old_end(folder: OutputFolder, manifest: TraceManifest, step: int) -> None:
    """The state at the end of a shorter recording, unless the longer one stores it too."""
    if not manifest.is_anchor(step) and anchor_name(step) in folder.owned:
        folder.remove([anchor_name(step)])


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
            step = read_description(best).step
            if manifest.start_step < step <= manifest.end_step:
                self.saved.setdefault(step, best)
        self.manifest = manifest
        self.changed = changed_facts(run_facts, manifest.environment)
        if required and not self.saved:
            raise CircuitError(
                f"the run saved no checkpoint after step {manifest.start_step} and up to step"
                f" {manifest.end_step}, so its history cannot be proved",
                where=Path(config.output_dir) / "checkpoints",
                fix="train the run first, or leave out `require_historical_replay`",
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
            fix="trace it where it was trained, or leave out `require_historical_replay`",
        )
