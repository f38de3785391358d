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


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of any devices have one dtype and shape, and are equal to the bit."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and same_bits(one.cpu(), other.cpu())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype and device are equal to the bit.

    What is not a number equals itself then, and 0 is not -0, unlike with `torch.equal`.
    """
    integers = (torch.int8, torch.int16, torch.int32, torch.int64)
    whole = integers[min(one.element_size().bit_length() - 1, 3)]
    bits, others = (x.detach().contiguous().reshape(-1).view(whole) for x in (one, other))
    return one.shape == other.shape and torch.equal(bits, others)
