"""A stand-in for a GPU on a machine without one: real numbers, a GPU's refusals.

Within `stand_in_gpu()` a tensor on `cuda` keeps its numbers in the CPU's memory and computes them
with the CPU's kernels, but answers as a GPU's: it says that it is on `cuda:0`, and refuses what
torch refuses there: a tensor of another device in one operation, an index that is on the GPU into
a tensor that is not, `numpy()` of its memory, and the operations that have no deterministic kernel.
Unlike torch's fake tensors it has values, so that whole commands run on it, and can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten

NAME = "a stand-in for a GPU"
_CROSSING = {aten.copy_.default, aten._to_copy.default}
"""The operations that carry numbers from one device to another."""
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
"""Those that take an index on the CPU, too."""
_REFUSED = {"histc", "kthvalue", "median", "nanmedian", "put_"}
_REFUSED |= {"nll_loss2d_forward", "nll_loss2d_backward"}
_REFUSED_OF_FLOATS = {"bincount", "cumsum", "scatter_reduce"}
"""What `torch.use_deterministic_algorithms` refuses on CUDA, of what might be used here."""


class _LikeTensor(type(Tensor)):  # type: ignore[misc]
    def __eq__(cls, other: object) -> bool:
        return cls is other or other is Tensor  # TransformerLens asserts type(x) == torch.Tensor

    __hash__ = type.__hash__


class OnDevice(Tensor, metaclass=_LikeTensor):
    """A tensor that says it is on `cuda:0`.

    torch's C++ code believes it to be a meta tensor, for which it asks no driver.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.inner})"


class _Methods(TorchFunctionMode):
    """The methods that torch ends before it comes to an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and isinstance(args[0], OnDevice):  # it has none for a subclass
            args = [args[0].inner]
        elif func is Tensor.to:  # it asks the driver which `cuda` is the present one
            there = "meta" if isinstance(args[0], OnDevice) else "cuda:0"
            args = [torch.device(there) if _says_gpu(arg) else arg for arg in args]
        elif func in (Tensor.__getitem__, Tensor.__setitem__):  # it makes a list's index on `meta`
            args = [args[0], _with_tensors(args[1]), *args[2:]]
        return func(*args, **(kwargs or {}))


def _with_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _says_gpu(arg: Any) -> bool:
    is_device = isinstance(arg, (str, torch.device))
    return is_device and torch.device(arg).type in ("cuda", "meta")


class _Operations(TorchDispatchMode):
    """Sees every operation, so that tensors can be made on the device or brought there."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # without it torch looks for a driver first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten._efficientzerotensor.default:  # forward mode's zero, which has no memory
        func = aten.zeros.default
    tensors = _tensors((*args, *kwargs.values()))
    on_device = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    target = kwargs.get("device")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        to_device = _says_gpu(target)
    else:
        to_device = bool(on_device)
    empty = [tensor for tensor in tensors if tensor.is_meta]  # an `OnDevice` says that it is not
    assert not empty, f"{func} of a tensor without numbers"
    if not on_device and not to_device:
        return func(*args, **kwargs)
    if on_device:
        _refuse(func, args, tensors)
    outer = {id(tensor.inner): tensor for tensor in on_device}
    outer |= {id(tensor): tensor for tensor in tensors if not isinstance(tensor, OnDevice)}

    def unwrap(tensor: Tensor) -> Tensor:
        return tensor.inner if isinstance(tensor, OnDevice) else tensor

    def wrap(tensor: Tensor) -> Tensor:
        if id(tensor) in outer:
            return outer[id(tensor)]
        return OnDevice(tensor) if to_device else tensor

    inside = {name: _each(unwrap, value) for name, value in kwargs.items()}
    return _each(wrap, func(*_each(unwrap, args), **inside))


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among an operation's arguments, which are nested in lists and tuples alone."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Arguments or results with their tensors changed (torch's trees would take twice the time)."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_each(change, inside) for inside in value])
    return value


def _refuse(func: Any, args: Any, tensors: list[Tensor]) -> None:
    name = func._schema.name.removeprefix("aten::")
    floats = any(tensor.is_floating_point() for tensor in tensors)
    refused = name in _REFUSED or (floats and name in _REFUSED_OF_FLOATS)
    if refused and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(f"{name} does not have a deterministic implementation")
    if func in _CROSSING:
        return
    if func in _INDEXING and isinstance(args[0], OnDevice):
        tensors = [args[0], *(arg for arg in args[2:] if isinstance(arg, Tensor))]
    if any(not isinstance(tensor, OnDevice) and tensor.ndim for tensor in tensors):
        devices = [f"{tensor.device.type} {list(tensor.shape)}" for tensor in tensors]
        raise RuntimeError(f"{func}: expected all tensors on one device, got {', '.join(devices)}")


@contextmanager
def stand_in_gpu() -> Iterator[None]:
    """Within the block this machine has one GPU."""
    lifted = torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch, _Operations(), _Methods():
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: NAME)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
        patch.delenv("CUBLAS_WORKSPACE_CONFIG")
        # so that `torch.tensor(..., device=...)` asks no driver
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)
