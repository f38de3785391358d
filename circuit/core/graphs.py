"""Gradients with the graphs that made them, to be differentiated once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from circuit.core.functional import function_of
from circuit.lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn


@dataclass(frozen=True)
class GradientGraph:
    """The gradient of a batch's losses; in memory with activations and the gradients by them.

    Attributes:
        leaves: the weights at which it was taken, by name.
        weights: of the losses, all 1.
        parts: of each leaf, zeros where the losses do not read it.
    """

    leaves: dict[str, Tensor]
    weights: Float[Tensor, "example pos"]
    parts: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, parameters: Mapping[str, Tensor], losses: Callable[[dict[str, Tensor]], Tensor]
    ) -> GradientGraph:
        """Take the gradient of the sum of losses `[example, *where]`, at copies of parameters."""
        leaves = {n: part.detach().clone().requires_grad_() for n, part in parameters.items()}
        with torch.enable_grad():
            taken = losses(leaves)
            taken = taken.reshape(len(taken), -1)
            weights = torch.ones_like(taken, requires_grad=True)
            parts = torch.autograd.grad(
                (taken * weights).sum(),
                list(leaves.values()),
                create_graph=True,
                materialize_grads=True,
            )
        return cls(leaves, weights, parts)


class Graphs:
    """Graphs of the gradients that training steps take, held until `pop`: as many as memory fits.

    Attributes:
        room: bytes that they may take, all in all; nothing more is held where it is 0.
    """

    def __init__(self, steps: range, dtype: torch.dtype, room: int) -> None:
        """Hold nothing yet.

        Args:
            steps: whose graphs are asked for.
            dtype: of the weights.
            room: as said.
        """
        self.steps, self.dtype, self.room = steps, dtype, room
        self._held: dict[int, tuple[GradientGraph, int]] = {}
        self._largest = 0

    def pop(self, step: int) -> GradientGraph | None:
        """That of a step, if it was held; it is no longer."""
        return self._held.pop(step, (None, 0))[0]

    def outputs(
        self, step: int, module: nn.Module, taken: Callable[[Any], tuple[Tensor, Tensor]]
    ) -> Tensor | None:
        """What the losses are computed from, with the gradient in `.grad`; None: nothing is done.

        Kernels may be others where there is a graph: who replays sees it by the bits.

        Args:
            taken: gives these outputs and the losses of a model.
        """
        parameters = dict(module.named_parameters())
        alike = all(parameter.dtype == self.dtype for parameter in parameters.values())
        if not (alike and step in self.steps and self._fits(self._largest)):
            return None
        function, made = function_of(module), []
        sizes: dict[int, int] = {}

        def losses_at(leaves: dict[str, Tensor]) -> Tensor:
            outputs, losses = taken(partial(function, leaves))
            made.append(outputs.detach())
            return losses

        def weighed(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(weighed, lambda saved: saved):
            # at copies, for the optimizer moves the weights in place
            graph = GradientGraph.of(parameters, losses_at)
        for parameter, part in zip(parameters.values(), graph.parts, strict=True):
            # of what the losses do not read there is none: zeros, which no operation has made
            if parameter.requires_grad and part.grad_fn is not None:
                # laid out as the parameter, on which the order of the sums in its norm hangs
                parameter.grad = torch.empty_like(parameter).copy_(part.detach())
        size = sum(sizes.values())
        self._largest = max(self._largest, size)
        if self._fits(size):
            self._held[step] = graph, size
        return made[0]

    def _fits(self, size: int) -> bool:
        return sum(held for _, held in self._held.values()) + size < self.room
