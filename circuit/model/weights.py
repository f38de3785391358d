"""A model's parameters by name: out of it and into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, detached, in their fixed order."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def layer_weights(
    tensors: Mapping[str, Tensor], name: str, layers: int
) -> Float[Tensor, "layer ..."]:
    """One kind of weight over the layers, from tensors by name.

    Args:
        name: within a layer, such as `attn.W_Q`.

    Raises:
        CircuitError: the tensors are not those of so many layers.
    """
    names = [f"blocks.{layer}.{name}" for layer in range(layers)]
    for one in names:
        if one not in tensors:
            raise CircuitError(f"the weights do not belong to this model: they hold no {one}")
    return torch.stack([tensors[one] for one in names])


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy named tensors into the model's parameters.

    Raises:
        CircuitError: a name, the order of the names, or a shape is not the model's.
    """
    parameters = dict(model.named_parameters())
    if list(parameters) != list(tensors):
        odd = sorted(set(parameters) ^ set(tensors)) or ["the order of the names"]
        raise CircuitError(f"the weights do not belong to this model: {odd[0]} does not match")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise CircuitError(
                    f"{name} has shape {list(tensors[name].shape)}",
                    expected=f"{list(parameter.shape)}",
                )
            parameter.copy_(tensors[name])
