"""The on-disk trace: manifest, anchors, per-step rows.

    trace.json                          what was recorded, from where, with what (TraceManifest)
    optimizer_update_trace_rows.jsonl   one row a step: numbers, batch indices, digests by stage
    checkpoints/step_NNNNNN.pt          full states: every anchor, or every addressable step
    recorded_while_training.json        there if the run's own steps were recorded as it took them

A step is *addressable* if `checkpoints/step_NNNNNN.pt` means something: the file is there, or the
state can be replayed from the anchor before it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from circuit.artifacts import dump_json, read_jsonl
from circuit.config import NonNegativeInt, PositiveInt, Sha256, digest_of
from circuit.core.state import STATE_STAGES
from circuit.documents import FiniteDocument, validated
from circuit.environment import RecordedFacts
from circuit.errors import CircuitError
from circuit.folders import TRACE, no_trace, trace_folder
from circuit.reading import MissingFileError, read_json
from circuit.sizes import require_memory
from circuit.train_config import StepNumber, TrainConfig
from circuit.training.checkpoints import (
    STEP_FILES,
    TrainState,
    checkpoint_name,
    list_checkpoints,
    load_checkpoint,
)

COMMAND = "optimizer-update-trace"
MANIFEST = TRACE
ROWS = "optimizer_update_trace_rows.jsonl"
WHILE_TRAINING = "recorded_while_training.json"
FILES = (MANIFEST, ROWS, WHILE_TRAINING, "optimizer_update_trace*", STEP_FILES)
"""Patterns of the names in a trace's folder, its report's included."""


class TraceManifest(FiniteDocument):
    """What a trace is. No clock and no path of its own: equal recordings give equal bytes."""

    schema_version: Literal[1] = 1
    config: SerializeAsAny[TrainConfig]
    benchmark_digest: str
    """Of what the examples are made of (`Setup.digest`)."""
    start_step: StepNumber
    end_step: StepNumber
    anchor_every: PositiveInt
    checkpoint_every: PositiveInt
    checkpoint_start_step: NonNegativeInt
    storage: Literal["anchors", "dense"]
    top_k_parameters: PositiveInt
    parameters: Annotated[dict[str, list[NonNegativeInt]], Field(min_length=1)]
    """Shape of every parameter, in the order of the flat vector."""
    start_digests: Annotated[dict[str, Sha256], Field(min_length=1)]
    """Digests of the state at `start_step`, by stage; the rows hold those of the later steps."""
    digest_algorithm: str
    environment: dict[str, Any]

    @field_validator("environment")
    @classmethod
    def _facts(cls, facts: dict[str, Any]) -> dict[str, Any]:
        if RecordedFacts.model_validate(facts).threads is None:
            raise ValueError("says nothing of threads")
        return facts

    @model_validator(mode="after")
    def _window(self) -> Self:
        if not self.start_step < self.end_step <= self.config.steps:
            raise ValueError(
                f"start_step {self.start_step} and end_step {self.end_step} are no window of the"
                f" config's {self.config.steps} steps"
            )
        return self

    def to_json(self) -> str:
        """The manifest with a digest of itself."""
        payload = self.model_dump(mode="json")
        return dump_json(payload | {"digest": digest_of(payload)})

    def is_anchor(self, step: int) -> bool:
        """Whether a full state is stored at this step."""
        if not self.start_step <= step <= self.end_step:
            return False
        if step in (self.start_step, self.end_step) or step % self.anchor_every == 0:
            return True
        return self.storage == "dense" and self.is_addressable(step)

    def is_addressable(self, step: int) -> bool:
        """Whether `checkpoints/step_NNNNNN.pt` of this step can be asked for."""
        if not self.start_step <= step <= self.end_step:
            return False
        on_grid = step >= self.checkpoint_start_step and step % self.checkpoint_every == 0
        return on_grid or step in (self.start_step, self.end_step) or step % self.anchor_every == 0

    def anchors(self) -> list[int]:
        """Steps with a stored state, ascending.

        Raises:
            CircuitError: they are too many to be listed.
        """
        require_memory(
            {"the list of its anchors (end_step, anchor_every)": 200 * self.most_anchors}
        )
        every, grid = self.anchor_every, self.checkpoint_every
        steps = {self.start_step, self.end_step}
        steps.update(range(every * -(-self.start_step // every), self.end_step, every))
        if self.storage == "dense":
            first = max(self.start_step, self.checkpoint_start_step)
            steps.update(range(grid * -(-first // grid), self.end_step, grid))
        return sorted(steps)

    @property
    def most_anchors(self) -> int:
        """How many anchors there are, at most."""
        steps = self.end_step - self.start_step
        dense = steps // self.checkpoint_every if self.storage == "dense" else 0
        return 2 + steps // self.anchor_every + dense

    def anchor_before(self, step: int) -> int:
        """The last anchor at or before a step of the window."""
        while not self.is_anchor(step):
            step -= 1
        return step


class ListedParameter(FiniteDocument):
    """One of the parameters that a step moved most."""

    name: str
    update_norm: float
    relative: float | None


class TraceRow(FiniteDocument):
    """One recorded step (definitions.md section 6, optimizer-update-trace)."""

    step: StepNumber
    loss: float
    token_accuracy: float | None
    """Null where a recipe says nothing of accuracy."""
    lr: float
    grad_norm: float
    clip_factor: float
    update_norm: float
    term_norms: dict[str, float]
    rounding_ulps: float
    top_parameters: list[ListedParameter]
    batch_shape: list[PositiveInt]
    batch_indices: list[NonNegativeInt]
    digests: dict[str, Sha256]


class TraceStore:
    """Reads a trace folder; every byte that it hands out has been checked."""

    def __init__(self, path: str | Path) -> None:
        """Open a trace folder (or its `trace.json`).

        Raises:
            CircuitError: there is no trace, or its manifest is damaged.
        """
        self.root = trace_folder(path)
        self.manifest = _read_manifest(self.root / MANIFEST)

    @property
    def complete(self) -> bool:
        """Whether every step up to `end_step` is recorded."""
        return self.last_step == self.manifest.end_step

    @property
    def last_step(self) -> int:
        """The last recorded step."""
        return self.manifest.start_step + len(self.rows)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The recorded rows, one a step, from `start_step + 1`.

        Raises:
            CircuitError: a line is damaged, the steps do not follow each other, or the file ends
                before a stored anchor.
        """
        rows = self.read_rows()
        last = self.manifest.start_step + len(rows)
        for step in list_checkpoints(self.root / "checkpoints"):
            if step > last and self.manifest.is_anchor(step):
                raise CircuitError(
                    f"ends at step {last}, but the state of step {step} is stored",
                    where=self.root / ROWS,
                    fix="rows were cut off; `circuit trace record --resume` records them again",
                )
        return rows

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows on disk, also those of a recording that was stopped or lost some.

        Raises:
            CircuitError: a line is damaged, or the steps do not follow each other.
        """
        path = self.root / ROWS
        rows = read_jsonl(path, tolerate_torn_tail=True)
        for number, row in enumerate(rows, start=1):
            validated(row, TraceRow, where=f"{path}:{number}", fix="record the trace again")
            if row.get("step") != self.manifest.start_step + number:
                raise CircuitError(
                    f"holds step {row.get('step')}",
                    where=f"{path}:{number}",
                    expected=f"step {self.manifest.start_step + number}",
                    fix="the row file is damaged; record the trace again",
                )
        return rows

    def row(self, step: int) -> dict[str, Any]:
        """The row of a step.

        Raises:
            CircuitError: the step is not recorded.
        """
        first = self.manifest.start_step + 1
        if not first <= step <= self.last_step:
            raise CircuitError(
                f"no row of step {step}",
                where=self.root / ROWS,
                expected=f"a step from {first} to {self.last_step}",
                fix=self._hint(),
            )
        return self.rows[step - first]

    def state_digests(self, step: int) -> dict[str, str]:
        """The recorded digests of the state after a step, by stage."""
        if step == self.manifest.start_step:
            return self.manifest.start_digests
        recorded = self.row(step)["digests"]
        # an optimizer may remember nothing at the start
        lacking = dict.fromkeys(self.manifest.start_digests, "none")
        return lacking | {stage: recorded[stage] for stage in STATE_STAGES if stage in recorded}

    def checkpoint_path(self, step: int) -> Path:
        """Where a step's state stands, or would stand."""
        return self.root / "checkpoints" / checkpoint_name(step)

    def anchor(self, step: int) -> TrainState:
        """The stored state of an anchor, verified against its row.

        Raises:
            CircuitError: the anchor is missing or damaged, or is not the state that was recorded.
        """
        path = self.checkpoint_path(step)
        if not path.exists():
            raise CircuitError(
                f"the anchor of step {step} is missing",
                where=path,
                fix=self._hint()
                or "record the trace again, or `circuit trace prune` to a coarser grid without it",
            )
        state = load_checkpoint(path)
        if state.step != step or state.benchmark_digest != self.manifest.benchmark_digest:
            raise CircuitError(f"is not the state of step {step} of this trace", where=path)
        if state.config.deciding() != self.manifest.config.deciding():
            raise CircuitError(
                f"the anchor of step {step} belongs to another config than {MANIFEST}", where=path
            )
        return state

    def anchor_before(self, step: int) -> int:
        """The last anchor at or before a step."""
        return self.manifest.anchor_before(min(step, self.last_step))

    def check_window(self, start: int, end: int) -> None:
        """Refuse a window that is not recorded.

        Raises:
            CircuitError: it is empty, or leaves the recorded steps.
        """
        first, last = self.manifest.start_step, self.last_step
        if not first <= start < end <= last:
            raise CircuitError(
                f"window {start}:{end}",
                where=self.root,
                expected=f"start < end within {first}:{last}",
                fix=self._hint(),
            )

    def _hint(self) -> str | None:
        if self.complete:
            return None
        finish = "finish it with `circuit trace record --resume`"
        return f"recording stopped at {self.last_step}; {finish}"


def _read_manifest(path: Path) -> TraceManifest:
    fix = "record the trace again"
    try:
        payload = read_json(path, fix=fix)
    except MissingFileError:
        raise no_trace(path.parent) from None
    if not isinstance(payload, dict) or "digest" not in payload:
        raise CircuitError("damaged manifest (no digest)", where=path, fix=fix)
    if payload.pop("digest") != digest_of(payload):
        raise CircuitError("damaged or edited manifest (digest mismatch)", where=path, fix=fix)
    return validated(payload, TraceManifest, where=path, fix=fix)
