"""Vectors with a subspace's component taken out or alone left, and what stands in its place.

`remove` and `keep` leave nothing there, `replaced` something; `turned` is a change of the same size
in another direction, the control that it has to be held against (definitions.md section 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.subspaces import keep, remove

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    Vectors = Float[Tensor, "place d_model"]

Operation = Literal["remove", "keep"]
Replacement = Literal["zero", "mean", "resample"]

_ROUNDING = 1e-6
"""A change across the vector that is shorter than this share of it has no direction."""


LEFT = {"remove": remove, "keep": keep}
"""What is left of vectors by each operation; by the other one, what is taken away."""


def replaced(
    left: Vectors,
    taken: Vectors,
    replacement: Replacement,
    donors: Int[Tensor, " place"] | None = None,
) -> Vectors:
    """What is left, and in place of what is taken: nothing, its mean, or another place's.

    Args:
        donors: of each place, for `resample`; see `other_records`.
    """
    if replacement == "zero":
        return left
    return left + (taken.mean(0) if replacement == "mean" else taken[donors])


def other_records(records: Int[Tensor, " place"], seed: int) -> Int[Tensor, " place"]:
    """For each place one of another record, uniformly drawn.

    Args:
        records: of the places, ascending.

    Raises:
        CircuitError: all places are of one record.
    """
    _, record, counts = torch.unique(records.cpu(), return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise CircuitError(
            "all changed positions are of one record",
            where="`replacement` resample",
            expected="at least two records",
        )
    start, count = (counts.cumsum(0) - counts)[record], counts[record]
    drawn = torch.rand(
        len(record), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    # the places behind the record's own, cyclically, up to those before it
    after = (drawn * (len(record) - count)).long()
    found: Tensor = (start + count + after) % len(record)
    return found.to(records.device)


def turned(x: Vectors, changed: Vectors, other: Vectors) -> Vectors:
    """`x` changed as much as in `changed`, along `x` too, but across it as in `other`.

    With `D = changed - x = a x + D_across` and `e` the direction of `other - x` across `x`:
    `x + a x + |D_across| e`, so that the norms of the change and of the result stay. Where `other`
    leaves `x` as it is, or changes it along `x` alone, there is no `e`, and 0 stands for it.
    """
    whole = x.double()
    square = whole.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

    def parts(after: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        """How much of the change lies along `x`, the rest, and its norm."""
        change = after.double() - whole
        along = (change * whole).sum(-1, keepdim=True) / square
        across = change - along * whole
        return along, across, across.norm(dim=-1, keepdim=True)

    along, _, far = parts(changed)
    _, across, norm = parts(other)
    there = norm > _ROUNDING * square.sqrt()
    direction = torch.where(there, across / torch.where(there, norm, 1.0), 0.0)
    return (whole + along * whole + far * direction).to(x)
