"""Record a trace in the pass that trains: `TraceRecorder` takes the steps of `training.loop`.

The files are those that `record_trace` would write afterwards, byte for byte. They say what the run
did; nothing has been executed again, which `recorded_while_training.json` tells.

The run leads: it goes on from its last checkpoint, and the trace drops its rows beyond it. They are
written again, as are the anchors that may stand there already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from circuit.artifacts import OutputFolder, dump_json
from circuit.core.state import FlatState
from circuit.errors import CircuitError
from circuit.trace.record import (
    RecordOptions,
    RecordResult,
    check_settings,
    make_manifest,
    stopped_trace,
)
from circuit.trace.step import Tracer
from circuit.trace.store import (
    COMMAND,
    FILES,
    MANIFEST,
    ROWS,
    WHILE_TRAINING,
    TraceManifest,
    TraceStore,
)
from circuit.trace.writer import TraceWriter, planned_files
from circuit.train_config import TrainConfig
from circuit.training.session import TrainingSession

if TYPE_CHECKING:
    from circuit.training.step import StepOutcome

DEFAULT_FOLDER = "analysis/optimizer_update_trace"
"""Of a run's trace, in the run's folder."""


class TraceRecorder:
    """Traces a run while it trains (a `training.loop.Recorder`), from the initial weights on.

    Attributes:
        folder: of the trace; None is `DEFAULT_FOLDER` in the run's.
        options: what to record; without an end, up to the run's last step.
        planned: the same for the run that it was opened for, with its end.
    """

    def __init__(self, folder: str | Path | None = None, options: RecordOptions | None = None):
        """Say where and what.

        Raises:
            CircuitError: options that ask for another start, or for an execution of its own.
        """
        self.folder = None if folder is None else Path(folder)
        self.options = options or RecordOptions()
        if self.options.resume_checkpoint is not None:
            raise CircuitError(
                f"resume_checkpoint is {self.options.resume_checkpoint}",
                expected="none: a run that is traced while it trains starts at its initial weights",
            )
        if self.options.require_historical_replay:
            raise CircuitError(
                "a run that is traced while it trains is not executed again",
                fix="leave out require_historical_replay, or record the trace by itself",
            )

    def folder_of(self, config: TrainConfig) -> Path:
        """Where the trace of a run stands."""
        return Path(config.output_dir) / DEFAULT_FOLDER if self.folder is None else self.folder

    @contextmanager
    def open(self, config: TrainConfig, *, overwrite: bool, resume: bool) -> Iterator[None]:
        """See `Recorder.open`; the folder is the trace's own, not the run's."""
        root = self.folder_of(config)
        if root.resolve() == Path(config.output_dir).resolve():
            raise CircuitError(
                "is the run's own folder", where=root, expected="a folder of the trace's own"
            )
        endless = self.options.end_step is None and self.options.num_steps is None
        self.planned = (
            self.options.model_copy(update={"end_step": config.steps}) if endless else self.options
        )
        self._resume = resume
        outputs = OutputFolder(
            root,
            COMMAND,
            writes=FILES,
            overwrite=overwrite,
            resume=resume,
            resumable=True,
        )
        with outputs as self._outputs, ExitStack() as self._open:
            self._outputs.refuse_foreign([MANIFEST, ROWS, WHILE_TRAINING])  # before a model is made
            yield

    def prepare(self, session: TrainingSession) -> None:
        """See `Recorder.prepare`."""
        self._session, self._first = session, session.step
        store = stopped_trace(self._outputs) if self._resume else None
        self._manifest = self._planned_manifest(store)
        if store is not None:
            check_settings(self._manifest, store)
            _check_reached(store, session)
        self._outputs.refuse_foreign([*planned_files(self._manifest), WHILE_TRAINING])

    def begin(self) -> None:
        """See `Recorder.begin`."""
        if not self._resume:
            self._outputs.clear()
        self._writer: TraceWriter | None = None
        if self._first < self._manifest.end_step:
            writer = TraceWriter(self._outputs, self._manifest, Tracer(self._session))
            self._writer = self._open.enter_context(writer)
            # after the manifest, which a folder that holds anything of a trace has to hold
            self._outputs.write_text(WHILE_TRAINING, dump_json({"schema_version": 1}))

    def advance(self) -> StepOutcome:
        """See `Recorder.advance`; beyond the trace's last step nothing is recorded."""
        if self._writer is None or self._session.step >= self._manifest.end_step:
            return self._session.advance()
        return self._writer.advance().outcome

    def sync(self) -> None:
        """See `Recorder.sync`."""
        if self._writer is not None:
            self._writer.sync()

    def result(self) -> RecordResult | None:
        """What has been recorded, once the run has gone beyond the trace's last step.

        None is a trace that is not finished yet.
        """
        end = self._manifest.end_step
        if self._session.step < end:
            return None
        store = TraceStore(self._outputs.root)
        return RecordResult(store, max(end - self._first, 0), self._first, [], self._outputs.owned)

    def _planned_manifest(self, store: TraceStore | None) -> TraceManifest:
        session = self._session
        if session.step == 0:
            digests = FlatState.of(session.state()).stages()
        elif store is not None:
            digests = store.manifest.start_digests  # of states that have gone by
        else:
            raise CircuitError(
                f"the run is at step {session.step}, and no trace of its steps so far is here",
                where=self._outputs.root,
                fix="resume it without a trace and record one with `circuit trace record`, or"
                " start anew with `overwrite`",
            )
        return make_manifest(session, self.planned, self._outputs, 0, digests)


def _check_reached(store: TraceStore, session: TrainingSession) -> None:
    """Refuse a trace that lacks steps of the run, or is another run's.

    Raises:
        CircuitError: it ends before the run does, an anchor is missing, or the states differ.
    """
    manifest, step = store.manifest, session.step
    last = min(step, manifest.end_step)
    rows = store.read_rows() if (store.root / ROWS).exists() else []
    fix = (
        "resume the run without a trace, then finish this one with `circuit trace record"
        " --resume`; or start both anew with `overwrite`"
    )
    if len(rows) < last:
        message = f"the trace ends at step {len(rows)}, and the run is at step {step}"
        raise CircuitError(message, where=store.root, fix=fix)
    for anchor in manifest.anchors():
        # a run that is at its start writes the first one again
        if step > 0 and anchor <= last and not store.checkpoint_path(anchor).exists():
            path = store.checkpoint_path(anchor)
            raise CircuitError(f"the anchor of step {anchor} is missing", where=path, fix=fix)
    if 0 < step <= manifest.end_step:
        recorded = rows[step - 1]["digests"]
        for stage, digest in FlatState.of(session.state()).stages().items():
            if recorded.get(stage) != digest:
                raise CircuitError(
                    f"the trace is not this run's: step {step} differs in {stage}",
                    where=store.root,
                    fix="name this run's trace, or start both anew with `overwrite`",
                )
