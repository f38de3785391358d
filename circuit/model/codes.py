"""What the residual stream at one site tells of a token: vectors, nearest centroids, linear maps.

A *code* is the coordinates `[read, rank]` of vectors in a basis. Everything after the forward pass
is float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeAlias

from circuit.lazy import torch
from circuit.model.stages import run_from
from circuit.model.subspaces import Basis, group_means, remove

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

Vectors: TypeAlias = "Float[Tensor, 'read d_model']"

_ROUNDING = 1e-12
"""A centroid shorter than this share of the longest vector has no direction."""


def mean_at(
    activations: Float[Tensor, "batch pos d_model"],
    row: Int[Tensor, " read"],
    mask: Bool[Tensor, "read pos"],
) -> Vectors:
    """Mean over each read's positions; the vector itself where it has one.

    Args:
        row: of each read in the batch.
        mask: its positions, at least one.
    """
    read, pos = (index.cpu() for index in mask.nonzero(as_tuple=True))
    vectors = activations[row[read], pos].detach().cpu().double()
    sums = torch.zeros(len(row), vectors.shape[1], dtype=torch.float64)
    return sums.index_add_(0, read, vectors) / torch.bincount(read, minlength=len(row))[:, None]


def nearest_centroid(
    vectors: Vectors, groups: Int[Tensor, " read"], units: Int[Tensor, " read"]
) -> tuple[Int[Tensor, " read"], Bool[Tensor, " read"]]:
    """The group of the nearest centroid by cosine, with the read's own unit left out of all.

    scikit-learn's NearestCentroid knows no cosine, and would be fitted once for each unit.

    Args:
        units: reads of one unit are left out together; all different is leave-one-out.

    Returns:
        The group id found for each read, and whether its own group has a vector outside its unit
        (else it cannot be scored). Groups with none, and those whose vectors cancel, are no
        candidates.
    """
    vectors = vectors.double()
    ids, group = torch.unique(groups, return_inverse=True)
    sums = torch.zeros(len(ids), vectors.shape[1], dtype=torch.float64)
    sums.index_add_(0, group, vectors)
    counts = torch.bincount(group)
    # what each unit adds to a group, for the (unit, group) that occur
    _, unit = torch.unique(units, return_inverse=True)
    pairs, pair = torch.unique(unit * len(ids) + group, return_inverse=True)
    shares = torch.zeros(len(pairs), vectors.shape[1], dtype=torch.float64)
    shares.index_add_(0, pair, vectors)
    pair_unit, pair_group = pairs // len(ids), pairs % len(ids)
    counts_left = counts[pair_group] - torch.bincount(pair)
    sums_left = sums[pair_group] - shares
    least = _ROUNDING * vectors.norm(dim=1).amax()
    norm, norm_left = sums.norm(dim=1), sums_left.norm(dim=1)
    cosines = torch.where(norm > least, vectors @ sums.T / norm, -torch.inf)
    # every read with the pairs of its own unit: these groups lose what the unit adds to them
    read, own_pair = (unit[:, None] == pair_unit).nonzero(as_tuple=True)
    own_cosines = (vectors[read] * sums_left[own_pair]).sum(1) / norm_left[own_pair]
    is_there = (counts_left[own_pair] > 0) & (norm_left[own_pair] > least)
    cosines[read, pair_group[own_pair]] = torch.where(is_there, own_cosines, -torch.inf)
    return ids[cosines.argmax(1)], counts_left[pair] > 0


def nearest_centroid_without(
    vectors: Vectors, groups: Int[Tensor, " read"], other: Int[Tensor, " read"]
) -> tuple[Int[Tensor, " read"], Bool[Tensor, " read"]]:
    """`nearest_centroid`, leaving one out, after the mean of each `other` group is subtracted.

    Nothing is left of a read that is alone in its `other` group: it cannot be scored.
    """
    means, place, sizes = group_means(vectors, other)
    nearest, scored = nearest_centroid(vectors - means[place], groups, torch.arange(len(groups)))
    return nearest, scored & (sizes[place] > 1)


@dataclass(frozen=True)
class RidgeMap:
    """The linear map with centring `y = mean_y + (x - mean_x) W`.

    scikit-learn's Ridge is the same map but for its last digits, which reports would show.
    """

    weight: Float[Tensor, "rank_in rank_out"]
    mean_x: Float[Tensor, " rank_in"]
    mean_y: Float[Tensor, " rank_out"]

    @classmethod
    def fit(
        cls, x: Float[Tensor, "read rank_in"], y: Float[Tensor, "read rank_out"], ridge: float
    ) -> Self:
        """`W = (X^T X + ridge I)^-1 X^T Y` with X and Y centred."""
        mean_x, mean_y = x.mean(0), y.mean(0)
        centred = x - mean_x
        gram = centred.T @ centred + ridge * torch.eye(x.shape[1], dtype=x.dtype)
        return cls(torch.linalg.solve(gram, centred.T @ (y - mean_y)), mean_x, mean_y)

    def __call__(self, x: Float[Tensor, "read rank_in"]) -> Float[Tensor, "read rank_out"]:
        """The image of some coordinates."""
        return self.mean_y + (x - self.mean_x) @ self.weight


def logits_with_code(
    model: HookedTransformer,
    stage: str,
    states: Float[Tensor, "read pos d_model"],
    position: Int[Tensor, " read"],
    readout: Int[Tensor, " read"],
    basis: Basis,
    code: Float[Tensor, "read rank"] | None,
) -> Float[Tensor, "read vocab"]:
    """Logits at `readout` of each row, run on from a stage with the code at one position replaced.

    `x - B B^T x + B code` at `position`.

    Args:
        states: the residual stream at the stage, one row a read.
        code: None leaves the states as they are.
    """
    rows = torch.arange(len(states), device=states.device)
    if code is not None:
        basis = basis.to(states)
        states = states.clone()
        without = remove(states[rows, position], basis)
        states[rows, position] = without + code.to(states) @ basis.T
    return run_from(model, stage, states)[rows, readout]
