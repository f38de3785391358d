"""What `circuit.watch` keeps on the disk of somebody's own training loop, and its reader.

    recording.json              what was watched, and on what machine (RecordingManifest)
    ended.json                  there where the loop was left as it should be, and not cut off
    steps/from_NNNNNN.journal   records (runs/records.py): a state after NNNNNN steps, then steps
    watch_rows.jsonl            numbers of every so many steps: rates, norms, scalars

A *state* is all that a step depends on but its gradient: parameters, buffers, what the optimizers
remember and their groups. A *step* is the gradient as the optimizer read it and the settings of its
groups, and the digest of the parameters that it left. From a state the steps behind it can be
executed again by the optimizer alone (circuit/runs/rerun.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field

from circuit.artifacts import read_jsonl
from circuit.config import NonNegativeInt, PositiveInt
from circuit.core.flat import ParameterLayout
from circuit.core.optimizers import rule_of
from circuit.core.update import OUTSIDE
from circuit.documents import Document, FiniteDocument, validated
from circuit.errors import CircuitError
from circuit.folders import RECORDED_ROWS, RECORDING
from circuit.journal import read_payload, read_records
from circuit.reading import MissingFileError, checked_path, read_json, values_of
from circuit.runs.records import StateLine, StepLine, StoredState, StoredStep, state_of, step_of
from circuit.sealed import unsealed

if TYPE_CHECKING:
    from torch import Tensor

COMMAND = "watch"
MANIFEST = RECORDING
ROWS = RECORDED_ROWS
JOURNAL = ".journal"
ENDED = "ended.json"
FILES = (MANIFEST, ROWS, ENDED, f"steps/from_*{JOURNAL}")
"""Patterns of the names in a recording's folder."""

Keep = Literal["gradients", "states", "rows"]
KEEPS: tuple[Keep, ...] = ("gradients", "states", "rows")


class WatchedOptimizer(Document):
    """One optimizer of a recording."""

    kind: str
    """Its class, as `torch.optim.adamw.AdamW`."""
    decoupled_decay: bool
    """Whether the weight decay of one that is not torch's is decoupled."""


class RecordingManifest(FiniteDocument):
    """What was watched. No clock and no path: equal loops give equal bytes."""

    schema_version: Literal[1] = 1
    keep: Literal["gradients", "states"]
    every: PositiveInt
    anchor_every: PositiveInt
    module: str
    """Its class."""
    parameters: Annotated[dict[str, list[NonNegativeInt]], Field(min_length=1)]
    """Shape of every parameter, in the order of the flat vector."""
    dtype: Literal["torch.float32", "torch.float64"]
    optimizers: Annotated[list[WatchedOptimizer], Field(min_length=1)]
    environment: dict[str, Any]
    tied: dict[str, str] = Field(default={})
    """Further names of parameters and buffers in the module's `state_dict`, and their first."""
    not_saved: list[str] = Field(default=[])
    """Buffers that are there before the first step and not part of the `state_dict`."""

    @property
    def layout(self) -> ParameterLayout:
        """Of the flat vector."""
        return ParameterLayout.of_shapes(self.parameters)


def journals(root: Path) -> dict[int, Path]:
    """The journals of a recording by the step of their first state, ascending."""
    named = ((_NAME.fullmatch(path.name), path) for path in (root / "steps").glob(f"*{JOURNAL}"))
    return dict(sorted((int(match[1]), path) for match, path in named if match))


_NAME = re.compile(rf"from_(\d{{6,18}}){re.escape(JOURNAL)}", re.ASCII)
Line = TypeVar("Line", StateLine, StepLine)
_FIX = "the file is damaged or was edited; record again"


@dataclass(frozen=True)
class _Stored(Generic[Line]):
    """A record: its file, its line, and where its bytes begin."""

    path: Path
    line: Line
    start: int

    def payload(self) -> bytes:
        """Its bytes; raises as `read_payload`."""
        return read_payload(self.path, self.line.bytes, self.line.sha256, self.start)


@dataclass(frozen=True)
class _Records:
    """Those of a recording, by step."""

    states: dict[int, _Stored[StateLine]]
    steps: dict[int, _Stored[StepLine]]


class Recording:
    """Reads a recording; every byte that it hands out has been checked.

    Attributes:
        root: its folder.
        manifest: what was watched.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a recording's folder (or its `recording.json`).

        Raises:
            CircuitError: there is none, or its manifest is damaged.
        """
        path = checked_path(path)
        self.root = path.parent if path.name == MANIFEST else path
        where, fix = self.root / MANIFEST, "record again"
        try:
            payload = read_json(where, fix=fix)
        except MissingFileError:
            raise CircuitError(
                "there is no recording here",
                where=self.root,
                expected=f"a folder with {MANIFEST}",
                fix="record one with circuit.watch(module, optimizer, folder)",
            ) from None
        if isinstance(payload, dict):
            payload = unsealed(payload, where=where, fix=fix)
        self.manifest = validated(payload, RecordingManifest, where=where, fix=fix)
        self.layout = self.manifest.layout

    @cached_property
    def _records(self) -> _Records:
        """Where each state and each step stands.

        Raises:
            CircuitError: a line is damaged, or steps are missing.
        """
        records = _Records({}, {})
        for path in journals(self.root).values():
            for record, start in read_records(path):
                where = f"{path} before byte {start}"
                if record.get("kind") == "state":
                    state = validated(record, StateLine, where=where, fix=_FIX)
                    records.states[state.step] = _Stored(path, state, start)
                else:
                    step = validated(record, StepLine, where=where, fix=_FIX)
                    records.steps[step.step] = _Stored(path, step, start)
        if 0 not in records.states:
            raise CircuitError(
                "holds no state to begin with",
                where=self.root,
                fix="the loop ended before its first step; record again",
            )
        taken = sorted(records.steps)
        if taken and taken != list(range(1, taken[-1] + 1)):
            missing = next(n for n, step in enumerate(taken, start=1) if n != step)
            raise CircuitError(
                f"step {missing} is missing", where=self.root / "steps", fix="record again"
            )
        return records

    @property
    def anchors(self) -> list[int]:
        """Steps with a stored state, ascending."""
        return sorted(self._records.states)

    @property
    def last_step(self) -> int:
        """The last recorded step."""
        return max(*self._records.steps, *self._records.states, 0)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The numbers that were written down; none where nothing was asked for."""
        path = self.root / ROWS
        return read_jsonl(path, tolerate_torn_tail=True) if path.exists() else []

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Terms of which any step may have some."""
        state = self.state(0)
        with values_of(self.root, fix=_FIX):
            names = [
                name
                for one, groups in zip(self.manifest.optimizers, state.groups, strict=True)
                for group in groups
                for name in rule_of(one.kind, group.settings, one.decoupled_decay).names
            ]
        moved = any(stored.line.parameters for stored in self._records.steps.values())
        return (*dict.fromkeys(names), *((OUTSIDE,) if moved else ()))

    @cached_property
    def moved_buffers(self) -> list[str]:
        """Buffers that have changed since the first state."""
        of_steps = (stored.line.buffers for stored in self._records.steps.values())
        moved = {name: None for buffers in of_steps for name, _, _ in buffers}
        for step, stored in self._records.states.items():
            if step:  # later states hold those that have changed
                held = (name for group, name, _, _ in stored.line.tensors if group == "buffers")
                moved |= dict.fromkeys(held)
        return list(moved)

    @cached_property
    def not_saved(self) -> frozenset[str]:
        """Buffers that are not part of the module's `state_dict`."""
        states, steps = self._records.states.values(), self._records.steps.values()
        of_states = (name for state in states for name in state.line.not_saved)
        of_steps = (name for step in steps for name in step.line.not_saved)
        return frozenset((*self.manifest.not_saved, *of_states, *of_steps))

    def anchor_before(self, step: int) -> int:
        """The last stored state at or before a step."""
        return max(anchor for anchor in self.anchors if anchor <= step)

    @property
    def ended(self) -> bool:
        """Whether the loop was left as it should be; one that was cut off has lost its last step.

        Raises:
            CircuitError: the note of it is damaged.
        """
        try:
            payload = read_json(self.root / ENDED, fix="remove it")
        except MissingFileError:
            return False
        if not isinstance(payload, dict):
            raise CircuitError("is no note of an end", where=self.root / ENDED, fix="remove it")
        return unsealed(payload, where=self.root / ENDED, fix="remove it") == {
            "last_step": self.last_step
        }

    def digest(self, step: int) -> str | None:
        """Of the parameters that a step left; None where that is not stored."""
        stored = self._records.steps.get(step)
        return None if stored is None else stored.line.digest

    def begins_anew(self, step: int) -> bool:
        """Whether a state is stored there that the step before it has not left."""
        stored = self._records.states.get(step)
        return stored is not None and stored.line.anew

    def state(self, step: int) -> StoredState:
        """A stored state.

        Raises:
            CircuitError: it is damaged.
        """
        stored = self._records.states[step]
        with values_of(stored.path, fix=_FIX):
            state = state_of(stored.line, stored.payload(), self.manifest.parameters, self._dtype)
            if len(state.groups) != len(self.manifest.optimizers):
                raise ValueError(f"groups of {len(state.groups)} optimizers")
        # buffers that never change stand in the first state alone
        return replace(state, buffers={**self._first_buffers, **state.buffers}) if step else state

    @property
    def _dtype(self) -> str:
        return self.manifest.dtype.removeprefix("torch.")

    @cached_property
    def _first_buffers(self) -> Mapping[str, Tensor]:
        return self.state(0).buffers

    def step(self, step: int) -> StoredStep:
        """A stored step.

        Raises:
            CircuitError: there is none, or it is damaged.
        """
        if step not in self._records.steps:
            raise CircuitError(
                f"step {step} was not recorded",
                where=self.root,
                expected=f"a step from 1 to {self.last_step}"
                if self._records.steps
                else "a recording whose gradients were stored, which are what steps are made of",
            )
        stored, manifest = self._records.steps[step], self.manifest
        with values_of(stored.path, fix=_FIX):
            groups = self._records.states[self.anchor_before(step - 1)].line.groups
            trained = (name for group in groups[stored.line.optimizer] for name in group.names)
            return step_of(stored.line, stored.payload(), trained, manifest.parameters, self._dtype)
