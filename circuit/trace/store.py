"""The on-disk trace: manifest, anchors, per-step rows.

    trace.json                          what was recorded, from where, with what (TraceManifest)
    optimizer_update_trace_rows.jsonl   one row a step: numbers, batch indices, digests by stage
    checkpoints/step_NNNNNN.pt          full states: every anchor, or every addressable step
    recorded_while_training.json        there if the run's own steps were recorded as it took them

A step is *addressable* if `checkpoints/step_NNNNNN.pt` means something: the file is there, or the
state can be replayed from the anchor before it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from circuit.artifacts import dump_json, read_jsonl
from circuit.errors import CircuitError
from circuit.strict_json import parse_json
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import TrainState, checkpoint_name, load_checkpoint

COMMAND = "optimizer-update-trace"
MANIFEST = "trace.json"
ROWS = "optimizer_update_trace_rows.jsonl"
WHILE_TRAINING = "recorded_while_training.json"
FILES = (MANIFEST, ROWS, WHILE_TRAINING, "optimizer_update_trace*", "checkpoints/step_*.pt")
"""Patterns of the names in a trace's folder, its report's included."""


class TraceManifest(BaseModel):
    """What a trace is. No clock and no path of its own: equal recordings give equal bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    config: TrainConfig
    benchmark_digest: str
    start_step: int
    end_step: int
    anchor_every: int
    checkpoint_every: int
    checkpoint_start_step: int
    storage: Literal["anchors", "dense"]
    top_k_parameters: int
    parameters: dict[str, list[int]]
    """Shape of every parameter, in the order of the flat vector."""
    start_digests: dict[str, str]
    """Digests of the state at `start_step`, by stage; the rows hold those of the later steps."""
    digest_algorithm: str
    environment: dict[str, Any]

    def to_json(self) -> str:
        """The manifest with a digest of itself."""
        payload = self.model_dump(mode="json")
        return dump_json(payload | {"digest": _digest(payload)})

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
        """Steps with a stored state, ascending."""
        return [s for s in range(self.start_step, self.end_step + 1) if self.is_anchor(s)]


class TraceStore:
    """Reads a trace folder; every byte that it hands out has been checked."""

    def __init__(self, path: str | Path) -> None:
        """Open a trace folder (or its `trace.json`).

        Raises:
            CircuitError: there is no trace, or its manifest is damaged.
        """
        path = Path(path)
        self.root = path.parent if path.name == MANIFEST else path
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
        for step in self.manifest.anchors():
            if step > last and self.checkpoint_path(step).exists():
                raise CircuitError(
                    f"ends at step {last}, but the state of step {step} is stored",
                    where=self.root / ROWS,
                    fix="the row file was truncated; --resume records the lost steps again",
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
        return {stage: recorded[stage] for stage in self.manifest.start_digests}

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
        return max(s for s in self.manifest.anchors() if s <= min(step, self.last_step))

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
        return f"recording stopped at {self.last_step}; finish it with --resume"


def _read_manifest(path: Path) -> TraceManifest:
    try:
        payload = parse_json(path.read_text(encoding="utf-8"))
        stored = payload.pop("digest")
    except (FileNotFoundError, NotADirectoryError):
        raise CircuitError(
            "there is no trace here",
            where=path.parent,
            expected=f"a folder with {MANIFEST}",
            fix="record one with `circuit trace record`",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CircuitError(f"damaged manifest ({error})", where=path) from None
    if _digest(payload) != stored:
        raise CircuitError(
            "damaged or edited manifest (digest mismatch)", where=path, fix="record the trace again"
        )
    try:
        return TraceManifest.model_validate(payload)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise CircuitError(f"field '{field}': {problem['msg']}", where=path) from None


def _digest(payload: dict[str, Any]) -> str:
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
