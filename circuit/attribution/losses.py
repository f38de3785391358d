"""The losses of a batch as a function of the weights, and their derivatives in some directions.

`H . g_e` of all examples `e` costs about one training step in either form:

- *by position*, forward mode: one pass a direction gives the derivative of every loss of the batch;
- *by example*, reverse mode: gradients of a few examples at a time, whose products with any number
  of directions are taken at once. No gradient outlives its few examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from circuit.core.flat import Flat, ParameterLayout
from circuit.core.functional import function_of
from circuit.core.graphs import GradientGraph
from circuit.core.step import Objective
from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

LossScope = Literal["full_lm", "answer"]
"""Which tokens' losses count: all, or those of answers."""
LOSS_SCOPES: tuple[LossScope, ...] = get_args(LossScope)

ByGradient: TypeAlias = "Callable[[Flat], Float[Tensor, 'scalar parameter']]"
By = Literal["example", "position"]
DIRECTIONS = 4
"""Of one pass in forward mode."""
NUMBERS = 2**23
"""In the gradients that are held at once."""


def check_by(by: str) -> None:
    """Refuse a division that does not exist.

    Raises:
        CircuitError: lists those that do.
    """
    if by not in get_args(By):
        raise CircuitError(f"by '{by}'", expected=" or ".join(get_args(By)))


class Losses:
    """The losses of batches as functions of the weights alone."""

    def __init__(self, model: nn.Module) -> None:
        """Describe the function.

        Args:
            model: gives it; its own weights play no part and stay as they are.
        """
        self._function = function_of(model)
        self.layout = ParameterLayout.of_model(model)
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype

    def parameters(self, vector: Flat) -> dict[str, Tensor]:
        """A flat vector by name, on the model's device and in its dtype."""
        return self.layout.unflatten(vector.to(self.device, self.dtype))

    def __call__(
        self, parameters: dict[str, Tensor], objective: Objective, *inputs: Tensor
    ) -> Float[Tensor, "example pos"]:
        """See `Objective.losses`."""
        losses = objective.losses(lambda tokens: self._function(parameters, tokens), *inputs)
        return losses.reshape(len(losses), -1)

    def derivatives(
        self,
        objective: Objective,
        theta: Flat,
        directions: Float[Tensor, "direction parameter"],
        by: By,
    ) -> Float[Tensor, "direction example pos"]:
        """Derivatives of all losses in some directions; float64 on the CPU.

        Args:
            theta: the weights at which they are taken.
            by: `example` has one position, with the sum over all.
        """
        with warnings.catch_warnings():  # the first dual number makes torch script its rules
            warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
            taken = self._by_position if by == "position" else self._by_example
            return taken(objective, self.parameters(theta), directions)

    def gradient(self, objective: Objective, theta: Flat) -> GradientGraph:
        """That of a batch at some weights, to be differentiated once more."""
        return GradientGraph.of(
            self.parameters(theta), lambda leaves: self(leaves, objective, *objective.inputs)
        )

    def back(
        self, graph: GradientGraph, by_gradient: ByGradient
    ) -> tuple[Float[Tensor, "scalar parameter"], Float[Tensor, "scalar example pos"]]:
        """Take derivatives with respect to a batch's gradient `g` back to what made it.

        Args:
            graph: of `g`; what it holds is freed on the way.
            by_gradient: gives the derivatives `h`, one row a scalar, for `g`; float64 on the CPU.

        Returns:
            `grad (g . h)` with respect to the weights, and `h . g_e` of every loss: the derivative
            with respect to a weight of its own. Float64 on the CPU.
        """
        parts = graph.parts
        used = [at for at, part in enumerate(parts) if part.requires_grad]
        rows = by_gradient(self._flat(parts)).to(self.device, self.dtype)
        curved, shares = [], []
        for at, row in enumerate(rows):
            along = list(self.layout.unflatten(row).values())
            # d (g . h) / d (theta, w) by a second pass backwards through the gradient
            *of_leaves, of_weights = torch.autograd.grad(
                [parts[place] for place in used],
                [*graph.leaves.values(), graph.weights],
                grad_outputs=[along[place] for place in used],
                retain_graph=at + 1 < len(rows),
                materialize_grads=True,
            )
            curved.append(self._flat(of_leaves))
            shares.append(of_weights.double().cpu())
        return torch.stack(curved), torch.stack(shares)

    def _flat(self, parts: Sequence[Tensor]) -> Flat:
        return torch.cat([part.detach().reshape(-1) for part in parts]).double().cpu()

    def _by_position(
        self, objective: Objective, weights: dict[str, Tensor], directions: Tensor
    ) -> Tensor:
        def losses(parameters: dict[str, Tensor]) -> Tensor:
            return self(parameters, objective, *objective.inputs)

        def along(direction: Tensor) -> Tensor:
            tangent = self.layout.unflatten(direction)
            return torch.func.jvp(losses, (weights,), (tangent,))[1]  # type: ignore[no-any-return]

        moved = directions.to(self.device, self.dtype)
        derivatives: Tensor = torch.vmap(along, chunk_size=DIRECTIONS)(moved)
        return derivatives.double().cpu()

    def _by_example(
        self, objective: Objective, weights: dict[str, Tensor], directions: Tensor
    ) -> Tensor:
        def loss(parameters: dict[str, Tensor], *one: Tensor) -> Tensor:
            return self(parameters, objective, *(row[None] for row in one)).sum()

        gradient = torch.func.grad(loss)
        inputs = objective.inputs
        each = torch.vmap(gradient, in_dims=(None, *(0 for _ in inputs)))
        moved = directions.to(self.device, self.dtype)
        across = {name: moved[:, slice(*self.layout.range(name))] for name in self.layout.names}
        chunk = max(1, NUMBERS // self.layout.size)
        parts = []
        for rows in zip(*(tensor.split(chunk) for tensor in inputs), strict=True):
            by_name = each(weights, *rows)  # [example, *shape] by name
            # tensor by tensor, in the cache: side by side, gradients fill the memory twice
            products = [by_name[name].flatten(1) @ across[name].T for name in across]
            parts.append(torch.stack(products).double().sum(0))
        return torch.cat(parts).T[..., None].cpu()
