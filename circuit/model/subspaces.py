"""Subspaces of the residual stream as orthonormal bases `B: [d_model, rank]` (definitions.md 3).

A basis comes from the weights (`embedding_identity`, `head_basis`) or from activations
(`identity_basis`, `vector_basis`); all by float64 SVD, cast back to the input's type. `remove` and
`keep` split a vector in two: `remove(x, B) + keep(x, B)` is `x`.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit.errors import CircuitError
from circuit.model.components import Component

Basis = Float[Tensor, "d_model rank"]
HeadSubspace = Literal["head_qk_query", "head_qk_key", "head_ov_input", "head_ov_output"]

EMBEDDING_SUBSPACES = ("embedding_key_identity", "embedding_value_identity")
HEAD_SUBSPACES = ("head_qk_query", "head_qk_key", "head_ov_input", "head_ov_output")
FULL_RESIDUAL = "full_residual"
SUBSPACES = (*EMBEDDING_SUBSPACES, *HEAD_SUBSPACES, FULL_RESIDUAL)
"""The names that options take."""


def remove(x: Float[Tensor, "*place d_model"], basis: Basis) -> Float[Tensor, "*place d_model"]:
    """`x - B B^T x`."""
    return x - keep(x, basis)


def keep(x: Float[Tensor, "*place d_model"], basis: Basis) -> Float[Tensor, "*place d_model"]:
    """`B B^T x`."""
    return (x @ basis) @ basis.T


def svd_of_product(
    left: Float[Tensor, "*batch m k"], right: Float[Tensor, "*batch k n"]
) -> tuple[Tensor, Tensor, Tensor]:
    """`U [.., m, k], S [.., k], V [.., n, k]` of `left @ right` in float64, by QR of each factor.

    With `left = Q1 R1` and `right^T = Q2 R2` the product is `Q1 (R1 R2^T) Q2^T`, so that only a
    `k x k` matrix meets the SVD.
    """
    q1, r1 = torch.linalg.qr(left.detach().double())
    q2, r2 = torch.linalg.qr(right.detach().double().mT)
    u, s, vh = torch.linalg.svd(r1 @ r2.mT)
    return q1 @ u, s, q2 @ vh.mT


def head_factors(
    model: HookedTransformer, head: Component, circuit: Literal["qk", "ov"]
) -> tuple[Tensor, Tensor]:
    """The factors of `W_QK = W_Q W_K^T` or `W_OV = W_V W_O` of one head."""
    attention = model.blocks[head.layer].attn
    if circuit == "qk":
        return attention.W_Q[head.head], attention.W_K[head.head].T
    return attention.W_V[head.head], attention.W_O[head.head]


def head_basis(model: HookedTransformer, head: Component, name: str, rank: int) -> Basis:
    """Top left or right singular vectors of a head's `W_QK` or `W_OV`.

    Args:
        name: one of `HEAD_SUBSPACES`.

    Raises:
        CircuitError: the component is no head, there is no such subspace, or the rank is too large.
    """
    if head.head is None:
        raise CircuitError(f"{head} has no {name}", expected="a head, such as L2H1")
    if name not in HEAD_SUBSPACES:
        raise CircuitError(f"unknown subspace '{name}'", expected=", ".join(HEAD_SUBSPACES))
    left, right = head_factors(model, head, "qk" if "_qk_" in name else "ov")
    check_rank(name, rank, left.shape[1])
    u, _, v = svd_of_product(left, right)
    chosen = u if name in ("head_qk_query", "head_ov_input") else v
    return chosen[:, :rank].to(left.dtype)


def embedding_identity(
    model: HookedTransformer, tokens: Int[Tensor, " token"], rank: int, name: str = "identity"
) -> Basis:
    """Top right singular vectors of the centred embedding rows of some tokens.

    Raises:
        CircuitError: the rank exceeds the number of tokens minus one (or d_model).
    """
    rows = model.W_E.detach()[tokens].double()
    check_rank(name, rank, min(len(tokens) - 1, rows.shape[1]))
    return _top_right(rows - rows.mean(0), rank).to(model.W_E.dtype)


def identity_basis(
    vectors: Float[Tensor, "place d_model"], groups: Int[Tensor, " place"], rank: int
) -> Basis:
    """Top right singular vectors of the centred matrix of group means, one row a group.

    Raises:
        CircuitError: the rank exceeds the number of groups minus one (or d_model).
    """
    means = group_means(vectors, groups)[0]
    check_rank("the identity basis", rank, min(len(means) - 1, means.shape[1]))
    return _top_right(means - means.mean(0), rank).to(vectors.dtype)


def vector_basis(vectors: Float[Tensor, "place d_model"], rank: int) -> Basis:
    """Top right singular vectors of all the vectors, centred.

    Raises:
        CircuitError: the rank exceeds the number of vectors minus one (or d_model).
    """
    check_rank("the basis of all vectors", rank, min(len(vectors) - 1, vectors.shape[1]))
    rows = vectors.detach().double()
    return _top_right(rows - rows.mean(0), rank).to(vectors.dtype)


def group_means(
    vectors: Float[Tensor, "place d_model"], groups: Int[Tensor, " place"]
) -> tuple[Float[Tensor, "group d_model"], Int[Tensor, " place"], Int[Tensor, " group"]]:
    """Mean vector of each group in float64 (ascending by id), each place's group, group sizes."""
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), vectors.shape[1], dtype=torch.float64, device=vectors.device)
    sums.index_add_(0, index, vectors.detach().double())
    return sums / counts[:, None], index, counts


def subspace_basis(
    model: HookedTransformer,
    name: str,
    rank: int | None,
    *,
    head: Component | None = None,
    key_tokens: range,
    value_tokens: range,
) -> Basis | None:
    """The basis that a command's `--subspace` and `--rank` name; None for `full_residual`.

    Raises:
        CircuitError: there is no such subspace, a rank is missing, superfluous or too large, or a
            head subspace is asked for without a head.
    """
    if name not in SUBSPACES:
        raise CircuitError(f"unknown subspace '{name}'", expected=f"one of {', '.join(SUBSPACES)}")
    if name == FULL_RESIDUAL:
        if rank is not None:
            raise CircuitError(
                f"{FULL_RESIDUAL} is everything and takes no rank", fix="leave it out"
            )
        return None
    if rank is None:
        raise CircuitError(f"subspace '{name}' needs a rank", fix="pass --rank")
    if name in EMBEDDING_SUBSPACES:
        tokens = key_tokens if name == "embedding_key_identity" else value_tokens
        return embedding_identity(model, torch.tensor(list(tokens)), rank, name)
    if head is None:
        raise CircuitError(f"subspace '{name}' needs a head", fix="name one, such as L2H1")
    return head_basis(model, head, name, rank)


def check_rank(name: str, rank: int, most: int) -> None:
    """Refuse a rank that the subspace does not have.

    Raises:
        CircuitError: the rank is below 1 or above `most`.
    """
    if not 1 <= rank <= most:
        raise CircuitError(f"rank {rank} of {name}", expected=f"1 to {most}")


def _top_right(matrix: Tensor, rank: int) -> Tensor:
    right: Tensor = torch.linalg.svd(matrix, full_matrices=False).Vh
    return right[:rank].T
