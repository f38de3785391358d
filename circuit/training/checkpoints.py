"""Checkpoints: atomic, digested, loadable without running code.

One file: the payload, a `torch.save` of plain tensors that `torch.load` can also read by itself,
then a JSON description (step, config, and the sha256 of every tensor and of the payload), then a
footer that holds the description's length and sha256. A reader checks the footer, the description
and the payload's digest before it unpickles anything (with `weights_only=True`), and the shape and
digest of every tensor after; the session compares names and shapes with the model's.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field

from circuit.artifacts import atomic_write_bytes
from circuit.config import NonNegativeInt, Sha256, parse_config
from circuit.core.digests import tensor_digest
from circuit.core.state import State
from circuit.documents import FiniteDocument, validated
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.reading import MissingFileError, open_file
from circuit.sizes import require_memory
from circuit.strict_json import parse_json
from circuit.train_config import StepNumber, TrainConfig
from circuit.training.unpickle import unpickle

if TYPE_CHECKING:
    from torch import Tensor

_MAGIC = b"circuit-state-1\n"
_FOOTER = struct.Struct(f">Q32s{len(_MAGIC)}s")
_ABSENT: Literal["absent"] = "absent"
"""What a description says of moments that are not known; it says nothing of those that are."""
_STEP_NAME = re.compile(r"step_(\d{6,})\.pt")
STEP_FILES = f"checkpoints/step_{'[0-9]' * 6}*.pt"
"""Pattern (of `fnmatch`) of the checkpoints in a folder."""


class DivergedError(CircuitError):
    """Numbers of a run are not finite any more: loss, gradient, logits, weights or moments."""


class TensorFacts(FiniteDocument):
    """Of a tensor in the payload."""

    shape: list[NonNegativeInt]
    dtype: str
    sha256: Sha256


class Best(FiniteDocument):
    """The best evaluation so far."""

    step: StepNumber
    split: str
    metric: str
    value: float


class Notes(FiniteDocument):
    """Facts of the loop that saved a state."""

    model_config = ConfigDict(extra="allow")

    best: Best | None = None
    metrics_rows: NonNegativeInt | None = None
    """Rows that `metrics.jsonl` held; version 0.1.0 did not count them."""


class Description(FiniteDocument):
    """What a checkpoint says of itself."""

    step: StepNumber
    config: dict[str, Any]
    benchmark_digest: str
    notes: Notes
    moments: Literal["absent"] | None = None
    payload_bytes: NonNegativeInt
    payload_sha256: Sha256
    tensors: dict[str, Annotated[dict[str, TensorFacts], Field(min_length=1)]]
    """By group: `parameters`, and the moments."""


@dataclass(frozen=True)
class StateHeader:
    """Whose state it is, and after how many steps: what a checkpoint's description tells."""

    step: int
    config: TrainConfig
    benchmark_digest: str


@dataclass(frozen=True)
class TrainState(State, StateHeader):
    """A run after `step` optimizer steps: everything that the next step depends on."""

    notes: dict[str, Any] = field(default_factory=dict)
    """Small JSON facts of the loop (the best evaluation so far)."""

    @property
    def not_finite(self) -> str | None:
        """The first parameter or moment with an entry that is no finite number."""
        named = {
            **{f"weights of {name}": tensor for name, tensor in self.parameters.items()},
            **{
                f"{moment} of {name}": tensor
                for moment, values in (self.moments or {}).items()
                for name, tensor in values.items()
            },
        }
        return next((name for name, x in named.items() if not torch.isfinite(x).all()), None)


def checkpoint_name(step: int) -> str:
    """File name of a step's checkpoint: `step_000250.pt`."""
    return f"step_{step:06d}.pt"


def checkpoint_step(path: Path) -> int | None:
    """The step that a checkpoint's name tells, or None for another name (`best.pt`)."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """The step checkpoints in a folder, by step, ascending."""
    found = ((checkpoint_step(path), path) for path in folder.glob("step_*.pt"))
    return dict(sorted((step, path) for step, path in found if step is not None))


def save_checkpoint(path: Path, state: TrainState) -> None:
    """Write a checkpoint; a reader sees the old file or the complete new one."""
    atomic_write_bytes(path, encode_checkpoint(state))


def encode_checkpoint(state: TrainState) -> bytes:
    """A checkpoint's bytes; equal states give equal bytes.

    Raises:
        DivergedError: a weight or moment is not finite: no such state is one to go on from.
    """
    if state.not_finite is not None:
        raise DivergedError(
            f"training diverged: {state.not_finite} are not finite at step {state.step}",
            where=f"config {state.config.name}",
            fix="lower the learning rate, clip the gradient, or raise the optimizer's eps",
        )
    groups = _groups(state.parameters, state.moments or {})
    buffer = io.BytesIO()  # a path would put its name into the bytes
    torch.save(
        {
            group: {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        },
        buffer,
    )
    payload = buffer.getvalue()
    description = {
        "step": state.step,
        "config": state.config.model_dump(mode="json"),
        "benchmark_digest": state.benchmark_digest,
        "notes": state.notes,
        **({"moments": _ABSENT} if state.moments is None else {}),
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "tensors": {
            group: {
                name: {
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype),
                    "sha256": tensor_digest(tensor),
                }
                for name, tensor in tensors.items()
            }
            for group, tensors in groups.items()
        },
    }
    text = json.dumps(description, allow_nan=False).encode()
    return payload + text + _FOOTER.pack(len(text), hashlib.sha256(text).digest(), _MAGIC)


def load_checkpoint(path: str | Path) -> TrainState:
    """Read and verify a checkpoint.

    Raises:
        CircuitError: missing, truncated, damaged (the tensor is named where one is at fault), not
            written by this program, or holding anything but tensors.
    """
    path = Path(path)
    payload, description = _read(path, payload=True)
    if hashlib.sha256(payload).hexdigest() != description.payload_sha256:
        raise _damaged(path, f"digest mismatch{_locate_damage(payload, description)}")
    groups = _unpickle(path, payload)
    for group, tensors in description.tensors.items():
        stored = groups.get(group) if isinstance(groups, dict) else None
        if not isinstance(stored, dict) or list(stored) != list(tensors):
            raise _damaged(path, f"{group} does not hold the tensors that it lists")
        for name, facts in tensors.items():
            if not _is_as_described(stored[name], facts):
                raise _damaged(path, f"{group} {name} is not the tensor that it lists")
            if tensor_digest(stored[name]) != facts.sha256:
                raise _damaged(path, f"digest mismatch in {group} {name}")
    config = parse_config(description.config, TrainConfig, where=path)
    return TrainState(
        step=description.step,
        config=config,
        benchmark_digest=description.benchmark_digest,
        parameters=groups.pop("parameters"),
        moments=None if description.moments == _ABSENT else groups,
        notes=description.notes.model_dump(exclude_unset=True),
    )


def read_description(path: str | Path) -> Description:
    """What a checkpoint says of itself (step, config, digests), without reading its tensors.

    Raises:
        CircuitError: missing, truncated, or not written by this program.
    """
    return _read(Path(path), payload=False)[1]


def read_header(path: str | Path) -> StateHeader:
    """Whose state a checkpoint holds; raises as `read_description`."""
    description = read_description(path)
    config = parse_config(description.config, TrainConfig, where=path)
    return StateHeader(description.step, config, description.benchmark_digest)


def _groups(
    parameters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Mapping[str, Tensor]]:
    return {"parameters": parameters, **moments}


def _is_as_described(tensor: Any, facts: TensorFacts) -> bool:
    """Whether reading the tensor takes no more than the bytes that the file holds for its shape."""
    return (
        isinstance(tensor, torch.Tensor)
        and list(tensor.shape) == facts.shape
        and tensor.is_contiguous()  # an expanded tensor claims more than it stores
    )


def _read(path: Path, *, payload: bool) -> tuple[bytes, Description]:
    """The payload (empty unless asked for) and the verified description."""
    try:
        handle = open_file(path, missing="no such checkpoint")
    except MissingFileError as error:
        raise CircuitError(error.what, where=path, fix=_siblings(path)) from None
    with handle:
        size = handle.seek(0, os.SEEK_END)
        if size < _FOOTER.size:
            raise _damaged(path, "too short to be a checkpoint")
        handle.seek(size - _FOOTER.size)
        length, digest, magic = _FOOTER.unpack(handle.read())
        begins = size - _FOOTER.size - length
        if magic != _MAGIC or begins < 0:
            raise _damaged(path, _NONE_OF_OURS)
        # the text and its objects; the payload, its tensors and their copies
        needed = {"the description": 30 * length, "the tensors": 3 * begins * payload}
        require_memory(needed, where=path)
        handle.seek(begins)
        text = handle.read(length)
        if hashlib.sha256(text).digest() != digest:
            raise _damaged(path, _NONE_OF_OURS)
        description = _parse_description(path, text)
        if begins != description.payload_bytes:
            raise _damaged(path, f"payload has {begins} bytes, not the recorded number")
        handle.seek(0)
        return handle.read(begins) if payload else b"", description


_NONE_OF_OURS = "truncated, altered, or not a checkpoint of this program"


def _parse_description(path: Path, text: bytes) -> Description:
    try:
        payload = parse_json(text)
    except ValueError as error:
        raise _damaged(path, f"its description is not valid JSON ({error})") from None
    description = validated(payload, Description, where=path, fix=_ANEW)
    if "parameters" not in description.tensors:
        raise _damaged(path, "its description lists no parameters")
    return description


def _unpickle(path: Path, payload: bytes) -> dict[str, dict[str, Tensor]]:
    return cast(
        "dict[str, dict[str, Tensor]]", unpickle(payload, where=path, more=_ANEW, damaged=_ANEW)
    )


def _locate_damage(payload: bytes, description: Description) -> str:
    """Names the first tensor whose bytes differ, where the damage lies in a tensor's bytes."""
    try:
        groups = _unpickle(Path(), payload)
        for group, tensors in description.tensors.items():
            for name, facts in tensors.items():
                tensor = groups[group][name]
                if not _is_as_described(tensor, facts) or tensor_digest(tensor) != facts.sha256:
                    return f" in {group} {name}"
    except Exception:  # noqa: BLE001 - the payload is known to be damaged; anything may follow
        return " (its structure is damaged)"
    return " outside its tensors"


def _siblings(path: Path) -> str:
    steps = list(list_checkpoints(path.parent))
    if not steps:
        return f"no checkpoints in {path.parent}"
    return f"there are {len(steps)} from step {steps[0]} to {steps[-1]} in {path.parent}"


def _damaged(path: Path, what: str) -> CircuitError:
    return CircuitError(what, where=path, fix=_ANEW)


_ANEW = "use another checkpoint, or make this one again"
