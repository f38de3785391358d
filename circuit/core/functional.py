"""A module under weights that are not its own, by the names that `named_parameters()` gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from circuit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def call_with(module: nn.Module, parameters: Mapping[str, Tensor], *inputs: Any) -> Any:
    """`torch.func.functional_call`, also where the parameters' names are not their paths.

    A bridge of TransformerLens 4 names a parameter otherwise than torch finds it, and a tied one is
    found in several places.

    Args:
        module: gives the function; its own weights play no part and stay as they are.
        parameters: by name.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    placed = {
        f"{path}.{leaf}" if path else leaf: parameters[names[id(parameter)]]
        for path, part in module.named_modules()  # each module once, however often it is held
        for leaf, parameter in part._parameters.items()
        if parameter is not None and names.get(id(parameter)) in parameters
    }
    return torch.func.functional_call(module, placed, inputs, tie_weights=False)
