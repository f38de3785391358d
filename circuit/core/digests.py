"""sha256 of tensors: equal digests are equal bits, shapes and types."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from circuit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def tensor_digest(tensor: Tensor) -> str:
    """Hex sha256 of a tensor's dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype}{list(data.shape)}".encode())
    digest.update(memoryview(cast(Any, data.reshape(-1).view(torch.uint8).numpy())))
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 over the names and digests of named tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor_digest(tensor)}\n".encode())
    return digest.hexdigest()
