"""The share of a term by intervention: apply it alone, and apply all but it.

For a quadratic scalar, and any number of terms, the path share of a term is its Aumann-Shapley
value `½ [C(θ+u) - C(θ) + C(θ+Δ) - C(θ+Δ-u)]`, which asks for values only (definitions.md section
5). For any other smooth scalar the two differ by third order in the size of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuit.attribution.attribute import Attributor
from circuit.core.flat import Flat
from circuit.lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Effect:
    """What one term did to every scalar.

    Attributes:
        alone: change when the term is applied alone.
        but_one: change that is lost when all but the term are applied.
        path: its path contribution.
    """

    alone: Float[Tensor, " scalar"]
    but_one: Float[Tensor, " scalar"]
    path: Float[Tensor, " scalar"]

    @property
    def value(self) -> Float[Tensor, " scalar"]:
        """The Aumann-Shapley value for a quadratic scalar: the mean of both interventions."""
        return (self.alone + self.but_one) / 2


def effects(
    attributor: Attributor, theta: Flat, terms: Mapping[str, Flat], *, scale: float = 1.0
) -> dict[str, Effect]:
    """Intervene on every term of a step, scaled down.

    Args:
        theta: weights before the step.
        terms: vectors that sum to the step.
        scale: factor of all terms; halving it should divide the difference of `value` and `path`
            by eight.
    """
    start = theta.double()
    scaled = {name: vector * scale for name, vector in terms.items()}
    total = torch.stack(list(scaled.values())).sum(0)
    bound = attributor.bind(start)
    way = attributor.along(start, start + total, bound, torch.stack(list(scaled.values())))

    def at(step: Tensor) -> Tensor:
        return attributor.values(start + step, bound)

    return {
        name: Effect(
            alone=at(vector) - way.before,
            but_one=way.after - at(total - vector),
            path=way.path[:, place].sum(-1),
        )
        for place, (name, vector) in enumerate(scaled.items())
    }
