"""What `circuit.watch` keeps on the disk of somebody's own training loop, and its reader.

    recording.json              what was watched, and on what machine (RecordingManifest)
    ended.json                  there where the loop was left as it should be, and not cut off
    steps/from_NNNNNN.journal   records (circuit/journal.py): a state after NNNNNN steps, then steps
    watch_rows.jsonl            numbers of every so many steps: rates, norms, scalars

A *state* is all that a step depends on but its gradient: parameters, buffers, what the optimizers
remember and their groups. A *step* is the gradient as the optimizer read it and the settings of its
groups, and the digest of the parameters that it left. From a state the steps behind it can be
executed again by the optimizer alone (circuit/runs/rerun.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field

from circuit.artifacts import read_jsonl
from circuit.config import RECORDING, NonNegativeInt, PositiveInt
from circuit.core.flat import Flat, ParameterLayout
from circuit.core.optimizers import Group, Past, rule_of
from circuit.core.update import OUTSIDE
from circuit.errors import CircuitError
from circuit.journal import read_payload, read_records
from circuit.lazy import torch
from circuit.reading import (
    Document,
    FiniteDocument,
    MissingFileError,
    checked_path,
    read_json,
    validated,
)
from circuit.sealed import unsealed

if TYPE_CHECKING:
    from torch import Tensor

COMMAND = "watch"
MANIFEST = RECORDING
ROWS = "watch_rows.jsonl"
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


@dataclass(frozen=True)
class StoredState:
    """All that the next step depends on but its gradient.

    Attributes:
        step: after so many steps.
        parameters, buffers: by name; buffers that have not changed since the first state are left
            out of later ones.
        groups: of each optimizer.
        pasts: what each optimizer remembers.
        not_saved: buffers that the loop has made, and that are not part of the `state_dict`.
    """

    step: int
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    groups: tuple[tuple[Group, ...], ...]
    pasts: tuple[Past, ...]
    not_saved: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredStep:
    """One call of an optimizer's `step`.

    Attributes:
        step: `t`, counted from 1 over all optimizers.
        optimizer: which one it was.
        settings: of its groups.
        parameters, buffers: those that have changed since the step before, by anything other than
            an optimizer, as this step found them.
        gradient: as it was read, by name.
        digest: of the flat vector of the parameters after it.
        not_saved: as of a state, those that are new to the step.
    """

    step: int
    optimizer: int
    settings: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    digest: str
    not_saved: tuple[str, ...] = ()


Record = tuple[dict[str, Any], list[memoryview]]
"""A journal's line, and the bytes behind it."""


def state_record(state: StoredState, *, anew: bool = False) -> Record:
    """A state as a record.

    Args:
        anew: it is not the one that the step before has left: an optimizer's was loaded.

    Raises:
        CircuitError: an optimizer remembers, or a group holds, what cannot be written down.
    """
    tensors = {("parameters", name): tensor for name, tensor in state.parameters.items()}
    tensors |= {("buffers", name): tensor for name, tensor in state.buffers.items()}
    numbers: list[dict[str, dict[str, Any]]] = []
    for place, past in enumerate(state.pasts):
        numbers.append({})
        for name, remembered in past.items():
            numbers[-1][name] = {}
            for key, value in remembered.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"past {place} {key}", name] = value
                else:
                    numbers[-1][name][key] = _encoded(value, f"{key} of {name}")
    line = {
        "kind": "state",
        "step": state.step,
        "anew": anew,
        "groups": [
            [{"names": list(g.names), "settings": _settings(g.settings)} for g in groups]
            for groups in state.groups
        ],
        "numbers": numbers,
        "tensors": [[group, name, *_kind(tensor)] for (group, name), tensor in tensors.items()],
        **({"not_saved": list(state.not_saved)} if state.not_saved else {}),
    }
    return line, [as_bytes(tensor) for tensor in tensors.values()]


def step_record(step: StoredStep, absent: Iterable[str], gradient: Flat) -> Record:
    """A step as a record; raises as `state_record`.

    Args:
        step: whose own gradient is not looked at.
        absent: parameters of its optimizer that had no gradient.
        gradient: that of the others, in the order of the layout.
    """
    changed = [*step.parameters.values(), *step.buffers.values()]
    line = {
        "kind": "step",
        "step": step.step,
        "optimizer": step.optimizer,
        "settings": [_settings(settings) for settings in step.settings],
        "parameters": list(step.parameters),
        "buffers": [[name, *_kind(buffer)] for name, buffer in step.buffers.items()],
        "absent": list(absent),
        "digest": step.digest,
        **({"not_saved": list(step.not_saved)} if step.not_saved else {}),
    }
    return line, [as_bytes(tensor) for tensor in (*changed, gradient)]


def _kind(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers in their order, as they stand in memory where they can be."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _encoded(value, f"'{key}' of a group") for key, value in settings.items()}


def _encoded(value: Any, where: str) -> Any:
    """A setting as JSON, from which `_decoded` makes it again to the bit."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple | list):
        items = [_encoded(item, where) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": _encoded(value.item(), where), "dtype": dtype, "shape": list(value.shape)}
    raise CircuitError(
        f"{where} of the optimizer is {type(value).__name__}, which cannot be written down",
        expected="numbers, texts, tuples of them, and tensors",
        fix="watch with `keep` rows, which stores no state",
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    if "tuple" in value:
        return tuple(_decoded(item) for item in value["tuple"])
    number = torch.tensor(_decoded(value["tensor"]), dtype=getattr(torch, value["dtype"]))
    return number.reshape(value["shape"])


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
    def _records(self) -> dict[str, dict[int, tuple[Path, dict[str, Any], int]]]:
        """Where each state and each step stands, by kind and step.

        Raises:
            CircuitError: a line is damaged, or steps are missing.
        """
        records: dict[str, dict[int, tuple[Path, dict[str, Any], int]]] = {"state": {}, "step": {}}
        for path in sorted((self.root / "steps").glob(f"from_*{JOURNAL}")):
            for record, start in read_records(path):
                records[record["kind"]][record["step"]] = path, record, start
        if 0 not in records["state"]:
            raise CircuitError(
                "holds no state to begin with",
                where=self.root,
                fix="the loop ended before its first step; record again",
            )
        taken = sorted(records["step"])
        if taken and taken != list(range(1, taken[-1] + 1)):
            missing = next(n for n, step in enumerate(taken, start=1) if n != step)
            raise CircuitError(
                f"step {missing} is missing", where=self.root / "steps", fix="record again"
            )
        return records

    @property
    def anchors(self) -> list[int]:
        """Steps with a stored state, ascending."""
        return sorted(self._records["state"])

    @property
    def last_step(self) -> int:
        """The last recorded step."""
        return max(*self._records["step"], *self._records["state"], 0)

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
        names = [
            name
            for one, groups in zip(self.manifest.optimizers, state.groups, strict=True)
            for group in groups
            for name in rule_of(one.kind, group.settings, one.decoupled_decay).names
        ]
        moved = any(line["parameters"] for _, line, _ in self._records["step"].values())
        return (*dict.fromkeys(names), *((OUTSIDE,) if moved else ()))

    @cached_property
    def moved_buffers(self) -> list[str]:
        """Buffers that have changed since the first state."""
        of_steps = (line["buffers"] for _, line, _ in self._records["step"].values())
        moved = {name: None for buffers in of_steps for name, _, _ in buffers}
        for step, (_, line, _) in self._records["state"].items():
            if step:  # later states hold those that have changed
                moved |= {name: None for group, name, _, _ in line["tensors"] if group == "buffers"}
        return list(moved)

    @cached_property
    def not_saved(self) -> frozenset[str]:
        """Buffers that are not part of the module's `state_dict`."""
        lines = (line for of in self._records.values() for _, line, _ in of.values())
        made = (name for line in lines for name in line.get("not_saved", ()))
        return frozenset((*self.manifest.not_saved, *made))

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
        stored = self._records["step"].get(step)
        return None if stored is None else str(stored[1]["digest"])

    def begins_anew(self, step: int) -> bool:
        """Whether a state is stored there that the step before it has not left."""
        stored = self._records["state"].get(step)
        return stored is not None and bool(stored[1]["anew"])

    def state(self, step: int) -> StoredState:
        """A stored state.

        Raises:
            CircuitError: it is damaged.
        """
        path, line, start = self._records["state"][step]
        values = _tensors(
            read_payload(path, line, start),
            ((dtype, shape) for _, _, dtype, shape in line["tensors"]),
        )
        groups: dict[str, dict[str, Tensor]] = {"parameters": {}, "buffers": {}}
        pasts: list[Past] = [
            {name: {key: _decoded(v) for key, v in held.items()} for name, held in past.items()}
            for past in line["numbers"]
        ]
        for (group, name, _, _), value in zip(line["tensors"], values, strict=True):
            if group in groups:
                groups[group][name] = value
            else:
                _, place, key = group.split(" ", 2)
                pasts[int(place)][name][key] = value
        if step:  # those that never change stand in the first state alone
            groups["buffers"] = {**self._first_buffers, **groups["buffers"]}
        return StoredState(
            step,
            groups["parameters"],
            groups["buffers"],
            tuple(
                tuple(
                    Group(
                        tuple(group["names"]),
                        {key: _decoded(value) for key, value in group["settings"].items()},
                    )
                    for group in optimizer
                )
                for optimizer in line["groups"]
            ),
            tuple(pasts),
        )

    @cached_property
    def _first_buffers(self) -> Mapping[str, Tensor]:
        return self.state(0).buffers

    def step(self, step: int) -> StoredStep:
        """A stored step.

        Raises:
            CircuitError: there is none, or it is damaged.
        """
        if step not in self._records["step"]:
            raise CircuitError(
                f"step {step} was not recorded",
                where=self.root,
                expected=f"a step from 1 to {self.last_step}"
                if self._records["step"]
                else "a recording whose gradients were stored, which are what steps are made of",
            )
        path, line, start = self._records["step"][step]
        shapes, dtype = self.manifest.parameters, self.manifest.dtype.removeprefix("torch.")
        absent = set(line["absent"])
        groups = self._records["state"][self.anchor_before(step - 1)][1]["groups"]
        trained = {name for group in groups[line["optimizer"]] for name in group["names"]}
        with_gradient = [name for name in shapes if name in trained - absent]
        values = _tensors(
            read_payload(path, line, start),
            [
                *((dtype, shapes[name]) for name in line["parameters"]),
                *((of, shape) for _, of, shape in line["buffers"]),
                *((dtype, shapes[name]) for name in with_gradient),
            ],
        )
        return StoredStep(
            step,
            line["optimizer"],
            tuple(
                {key: _decoded(value) for key, value in group.items()} for group in line["settings"]
            ),
            {name: next(values) for name in line["parameters"]},
            {name: next(values) for name, _, _ in line["buffers"]},
            {name: next(values) for name in with_gradient},
            line["digest"],
        )


def _tensors(payload: bytes, kinds: Iterable[tuple[str, Iterable[int]]]) -> Iterator[Tensor]:
    """Tensors of these dtypes and shapes, one behind the other."""
    at = 0
    for dtype, shape in kinds:
        empty = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
        size = empty.numel() * empty.element_size()
        if size:
            part = bytearray(payload[at : at + size])
            empty = torch.frombuffer(part, dtype=empty.dtype).reshape(empty.shape)
        at += size
        yield empty
