"""A module under weights that are not its own, by the names that `named_parameters()` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from circuit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def function_of(module: nn.Module) -> Callable[..., Any]:
    """`torch.func.functional_call`, also where the parameters' names are not their paths.

    A bridge of TransformerLens 4 names a parameter otherwise than torch finds it, and a tied one is
    found in several places. They are looked for once: a small forward pass takes no longer.

    Args:
        module: gives the function; its own weights play no part and stay as they are.

    Returns:
        A function of parameters by name, all or some of them, and of the module's inputs.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    places = {
        f"{path}.{leaf}" if path else leaf: names[id(parameter)]
        for path, part in module.named_modules()  # each module once, however often it is held
        for leaf, parameter in part._parameters.items()
        if id(parameter) in names
    }

    def call(parameters: Mapping[str, Tensor], *inputs: Any) -> Any:
        placed = {at: parameters[name] for at, name in places.items() if name in parameters}
        return torch.func.functional_call(module, placed, inputs, tie_weights=False)

    return call
