"""The records of a recording (circuit/runs/recording.py): a line and bytes, of a state or a step.

A line is held against its schema when it is read, and its bytes against what it says: a digest
proves that a record is as somebody wrote it, and not that this program did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from circuit.config import NonNegativeInt
from circuit.core.flat import Flat
from circuit.core.optimizers import Group, Past
from circuit.documents import Document
from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


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


class RecordLine(Document):
    """What every record tells: how many bytes stand behind its line, and their sha256."""

    bytes: NonNegativeInt
    sha256: str
    step: NonNegativeInt
    not_saved: list[str] = Field(default=[])


class GroupLine(Document):
    """A parameter group of an optimizer."""

    names: list[str]
    settings: dict[str, Any]


class StateLine(RecordLine):
    """The line of a state; see `StoredState`."""

    kind: Literal["state"]
    anew: bool
    groups: list[list[GroupLine]]
    numbers: list[dict[str, dict[str, Any]]]
    tensors: list[tuple[str, str, str, list[NonNegativeInt]]]
    """Group, name, dtype and shape: of `parameters`, `buffers`, `past PLACE KEY`."""


class StepLine(RecordLine):
    """The line of a step; see `StoredStep`."""

    kind: Literal["step"]
    optimizer: NonNegativeInt
    settings: list[dict[str, Any]]
    parameters: list[str]
    buffers: list[tuple[str, str, list[NonNegativeInt]]]
    absent: list[str]
    digest: str


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
    number = torch.tensor(_decoded(value["tensor"]), dtype=_dtype(value["dtype"]))
    return number.reshape(value["shape"])


def state_of(line: StateLine, payload: bytes, shapes: Shapes, dtype: str) -> StoredState:
    """A state of its record, with those buffers that it holds.

    Args:
        shapes, dtype: of the parameters.

    Raises:
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError: its values are not such
            as `state_record` writes.
    """
    kinds = [(of, shape) for _, _, of, shape in line.tensors]
    groups: dict[str, dict[str, Tensor]] = {"parameters": {}, "buffers": {}}
    pasts: list[Past] = [
        {name: {key: _decoded(v) for key, v in held.items()} for name, held in past.items()}
        for past in line.numbers
    ]
    for (group, name, _, _), value in zip(line.tensors, _tensors(payload, kinds), strict=True):
        if group in groups:
            groups[group][name] = value
        else:
            _, place, key = group.split(" ", 2)
            pasts[int(place)][name][key] = value
    parameters = groups["parameters"]
    if {n: list(p.shape) for n, p in parameters.items()} != shapes or any(
        p.dtype != _dtype(dtype) for p in parameters.values()
    ):
        raise ValueError("a state has other parameters than the module")
    grouped = [[_group(group, shapes) for group in optimizer] for optimizer in line.groups]
    if len(grouped) != len(pasts):
        raise ValueError(f"{len(pasts)} optimizers remember, and {len(grouped)} have groups")
    return StoredState(
        line.step, parameters, groups["buffers"], tuple(map(tuple, grouped)), tuple(pasts)
    )


def _group(line: GroupLine, shapes: Shapes) -> Group:
    unknown = next((name for name in line.names if name not in shapes), None)
    if unknown is not None:
        raise LookupError(f"'{unknown}' of a group is no parameter")
    return Group(tuple(line.names), {key: _decoded(value) for key, value in line.settings.items()})


def step_of(
    line: StepLine, payload: bytes, trained: Iterable[str], shapes: Shapes, dtype: str
) -> StoredStep:
    """A step of its record; raises as `state_of`.

    Args:
        trained: parameters of its optimizer.
        shapes, dtype: of the parameters.
    """
    moving = set(trained) - set(line.absent)
    with_gradient = [name for name in shapes if name in moving]
    values = _tensors(
        payload,
        [
            *((dtype, shapes[name]) for name in line.parameters),
            *((of, shape) for _, of, shape in line.buffers),
            *((dtype, shapes[name]) for name in with_gradient),
        ],
    )
    return StoredStep(
        line.step,
        line.optimizer,
        tuple({key: _decoded(value) for key, value in group.items()} for group in line.settings),
        {name: next(values) for name in line.parameters},
        {name: next(values) for name, _, _ in line.buffers},
        {name: next(values) for name in with_gradient},
        line.digest,
    )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"'{name}' is no dtype")
    return dtype


def _tensors(payload: bytes, kinds: Sequence[tuple[str, Sequence[int]]]) -> Iterator[Tensor]:
    """Tensors of these dtypes and shapes, one behind the other; nothing else is in the bytes."""
    dtypes = [_dtype(name) for name, _ in kinds]
    sizes = [of.itemsize * math.prod(shape) for of, (_, shape) in zip(dtypes, kinds, strict=True)]
    if sum(sizes) != len(payload):  # before anything of that size is made
        raise ValueError(f"{sum(sizes)} bytes of tensors in {len(payload)}")
    at = 0
    for dtype, size, (_, shape) in zip(dtypes, sizes, kinds, strict=True):
        part = bytearray(payload[at : at + size])
        at += size
        flat = torch.frombuffer(part, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        yield flat.reshape(tuple(shape))
