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
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from circuit.artifacts import atomic_write_bytes
from circuit.config import parse_config
from circuit.core.digests import tensor_digest
from circuit.core.state import State
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.strict_json import parse_json
from circuit.train_config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

_MAGIC = b"circuit-state-1\n"
_FOOTER = struct.Struct(f">Q32s{len(_MAGIC)}s")
_ABSENT = "absent"
"""What a description says of moments that are not known; it says nothing of those that are."""
_STEP_NAME = re.compile(r"step_(\d{6,})\.pt")


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
    """A checkpoint's bytes; equal states give equal bytes."""
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
    if hashlib.sha256(payload).hexdigest() != description["payload_sha256"]:
        raise _damaged(path, f"digest mismatch{_locate_damage(payload, description)}")
    groups = _unpickle(path, payload)
    for group, tensors in description["tensors"].items():
        stored = groups.get(group) if isinstance(groups, dict) else None
        if not isinstance(stored, dict) or list(stored) != list(tensors):
            raise _damaged(path, f"{group} does not hold the tensors that it lists")
        for name, facts in tensors.items():
            if not _is_as_described(stored[name], facts):
                raise _damaged(path, f"{group} {name} is not the tensor that it lists")
            if tensor_digest(stored[name]) != facts["sha256"]:
                raise _damaged(path, f"digest mismatch in {group} {name}")
    config = parse_config(description["config"], TrainConfig, where=path)
    return TrainState(
        step=description["step"],
        config=config,
        benchmark_digest=description["benchmark_digest"],
        parameters=groups.pop("parameters"),
        moments=None if description.get("moments") == _ABSENT else groups,
        notes=description["notes"],
    )


def read_description(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself (step, config, digests), without reading its tensors.

    Raises:
        CircuitError: missing, truncated, or not written by this program.
    """
    return _read(Path(path), payload=False)[1]


def read_header(path: str | Path) -> StateHeader:
    """Whose state a checkpoint holds; raises as `read_description`."""
    description = read_description(path)
    config = parse_config(description["config"], TrainConfig, where=path)
    return StateHeader(description["step"], config, description["benchmark_digest"])


def _groups(
    parameters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Mapping[str, Tensor]]:
    return {"parameters": parameters, **moments}


def _is_as_described(tensor: Any, facts: dict[str, Any]) -> bool:
    """Whether reading the tensor takes no more than the bytes that the file holds for its shape."""
    return (
        isinstance(tensor, torch.Tensor)
        and list(tensor.shape) == facts["shape"]
        and tensor.is_contiguous()  # an expanded tensor claims more than it stores
    )


def _read(path: Path, *, payload: bool) -> tuple[bytes, dict[str, Any]]:
    """The payload (empty unless asked for) and the verified description."""
    try:
        with path.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            if size < _FOOTER.size:
                raise _damaged(path, "too short to be a checkpoint")
            handle.seek(size - _FOOTER.size)
            length, digest, magic = _FOOTER.unpack(handle.read())
            begins = size - _FOOTER.size - length
            text = b""
            if begins >= 0:
                handle.seek(begins)
                text = handle.read(length)
            if magic != _MAGIC or hashlib.sha256(text).digest() != digest:
                raise _damaged(path, "truncated, altered, or not a checkpoint of this program")
            description: dict[str, Any] = parse_json(text)
            if begins != description["payload_bytes"]:
                raise _damaged(path, f"payload has {begins} bytes, not the recorded number")
            handle.seek(0)
            return handle.read(begins) if payload else b"", description
    except FileNotFoundError:
        raise CircuitError("no such checkpoint", where=path, fix=_siblings(path)) from None
    except OSError as error:
        raise CircuitError(f"cannot be read ({error.strerror})", where=path) from None


def _unpickle(path: Path, payload: bytes) -> dict[str, dict[str, Tensor]]:
    try:
        groups = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise _damaged(path, f"refused: the payload holds more than tensors ({reason})") from None
    return cast("dict[str, dict[str, Tensor]]", groups)


def _locate_damage(payload: bytes, description: dict[str, Any]) -> str:
    """Names the first tensor whose bytes differ, where the damage lies in a tensor's bytes."""
    try:
        groups = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        for group, tensors in description["tensors"].items():
            for name, facts in tensors.items():
                tensor = groups[group][name]
                if list(tensor.shape) != facts["shape"] or tensor_digest(tensor) != facts["sha256"]:
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
    return CircuitError(what, where=path, fix="use another checkpoint, or make this one again")
