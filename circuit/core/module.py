"""Modules of any class: copied for evaluation, and given the buffers of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def made_module(module: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A module that is passed, or made."""
    if isinstance(module, torch.nn.Module) or not callable(module):
        return module
    return module()


def evaluated(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a module, in evaluation mode, whose parameters all have gradients.

    Raises:
        CircuitError: it cannot be copied.
    """
    try:
        copied = copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise CircuitError(
            f"{type(module).__name__} cannot be copied ({error})",
            expected="a module that copy.deepcopy copies",
            fix="pass a function that makes one",
        ) from None
    return for_evaluation(copied, dtype)


def for_evaluation(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The module itself, in evaluation mode, all of whose parameters have gradients."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    # a HookedTransformer's own `to` prints
    return module if dtype is None else torch.nn.Module.to(module, dtype)


def load_buffers(module: nn.Module, values: Mapping[str, Tensor], where: object = None) -> bool:
    """Give a module the buffers that a step found; one that the loop made anew is put in.

    Args:
        values: by name, in the dtypes of the loop.
        where: they were recorded, for the message.

    Returns:
        Whether any has changed.

    Raises:
        CircuitError: the module has a buffer that the step had not, or no place for one that it
            had.
    """
    named, changed = dict(module.named_buffers()), False
    for name in sorted(named.keys() - values.keys()):
        raise CircuitError(
            f"the module has a buffer {name} that the recorded one did not have at that step",
            where=where,
            expected="the module as it was before the loop",
            fix="pass a function that makes it anew",
        )
    with torch.no_grad():
        for name, value in values.items():
            buffer = named.get(name)
            if buffer is None:
                _put(module, name, value, where)
            elif buffer.shape == value.shape and torch.equal(
                buffer.cpu(), value.to(buffer.dtype).cpu()
            ):
                continue
            else:
                buffer.resize_(value.shape).copy_(value)
            changed = True
    return changed


def _put(module: nn.Module, name: str, value: Tensor, where: object) -> None:
    """A buffer that the loop has made, into its submodule."""
    owner, _, leaf = name.rpartition(".")
    try:
        place = module.get_submodule(owner)
    except AttributeError:
        raise CircuitError(
            f"the module has no {owner}, of which a buffer {leaf} was recorded",
            where=where,
            expected="the module that was trained",
        ) from None
    parameter = next(module.parameters())
    dtype = parameter.dtype if value.is_floating_point() else value.dtype
    place.register_buffer(leaf, value.to(parameter.device, dtype, copy=True))
