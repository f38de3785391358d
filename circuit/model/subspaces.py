"""Subspaces of the residual stream as orthonormal bases `B: [d_model, rank]` (definitions.md 3).

A basis comes from the weights (`embedding_identity`, `head_basis`) or from activations
(`identity_basis`, `vector_basis`); all by float64 SVD on the CPU, cast back to the input's type and
device, so that every device gets the same bases. `remove` and `keep` split a vector in two:
`remove(x, B) + keep(x, B)` is `x`. The basis None is the whole residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.components import Component

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

Basis: TypeAlias = "Float[Tensor, 'd_model rank']"

EMBEDDING = re.compile(r"embedding_(\w+)_identity")
"""A subspace of the embeddings of one of the task's token sets: `embedding_key_identity`."""
HEAD_SUBSPACES = ("head_qk_query", "head_qk_key", "head_ov_input", "head_ov_output")
FULL_RESIDUAL = "full_residual"


def subspaces_of(token_sets: Iterable[str]) -> tuple[str, ...]:
    """Every subspace's name, for a task with these token sets."""
    embeddings = (f"embedding_{name}_identity" for name in token_sets)
    return (*embeddings, *HEAD_SUBSPACES, FULL_RESIDUAL)


def remove(
    x: Float[Tensor, "*place d_model"], basis: Basis | None
) -> Float[Tensor, "*place d_model"]:
    """`x - B B^T x`; zero for the whole residual."""
    return x - keep(x, basis)


def keep(
    x: Float[Tensor, "*place d_model"], basis: Basis | None
) -> Float[Tensor, "*place d_model"]:
    """`B B^T x`; `x` itself for the whole residual."""
    return x if basis is None else (x @ basis) @ basis.T


def svd_of_product(
    left: Float[Tensor, "*batch m k"], right: Float[Tensor, "*batch k n"]
) -> tuple[Tensor, Tensor, Tensor]:
    """`U [.., m, k], S [.., k], V [.., n, k]` of `left @ right` in float64, by QR of each factor.

    With `left = Q1 R1` and `right^T = Q2 R2` the product is `Q1 (R1 R2^T) Q2^T`, so that only a
    `k x k` matrix meets the SVD.
    """
    q1, r1 = torch.linalg.qr(left.detach().cpu().double())
    q2, r2 = torch.linalg.qr(right.detach().cpu().double().mT)
    u, s, vh = torch.linalg.svd(r1 @ r2.mT)
    device = left.device
    return (q1 @ u).to(device), s.to(device), (q2 @ vh.mT).to(device)


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
    u, _, v = svd_of_product(left.cpu(), right.cpu())
    chosen = u if name in ("head_qk_query", "head_ov_input") else v
    return chosen[:, :rank].to(left)


def embedding_identity(
    model: HookedTransformer, tokens: Int[Tensor, " token"], rank: int, name: str = "identity"
) -> Basis:
    """Top right singular vectors of the centred embedding rows of some tokens.

    Raises:
        CircuitError: the rank exceeds the number of tokens minus one (or d_model).
    """
    rows = model.W_E.detach()[tokens]
    check_rank(name, rank, min(len(tokens) - 1, rows.shape[1]))
    return _top_right(rows, rank)


def identity_basis(
    vectors: Float[Tensor, "place d_model"], groups: Int[Tensor, " place"], rank: int
) -> Basis:
    """Top right singular vectors of the centred matrix of group means, one row a group.

    Raises:
        CircuitError: the rank exceeds the number of groups minus one (or d_model).
    """
    means = group_means(vectors.cpu(), groups.cpu())[0]
    check_rank("the identity basis", rank, min(len(means) - 1, means.shape[1]))
    return _top_right(means, rank).to(vectors)


def vector_basis(vectors: Float[Tensor, "place d_model"], rank: int) -> Basis:
    """Top right singular vectors of all the vectors, centred.

    Raises:
        CircuitError: the rank exceeds the number of vectors minus one (or d_model).
    """
    check_rank("the basis of all vectors", rank, min(len(vectors) - 1, vectors.shape[1]))
    return _top_right(vectors.detach(), rank)


def group_means(
    vectors: Float[Tensor, "place d_model"], groups: Int[Tensor, " place"]
) -> tuple[Float[Tensor, "group d_model"], Int[Tensor, " place"], Int[Tensor, " group"]]:
    """Mean vector of each group in float64 (ascending by id), each place's group, group sizes."""
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    # [group, d_model]: one pass over the places, whatever the number of groups
    sums = torch.zeros(len(counts), vectors.shape[1], dtype=torch.float64, device=vectors.device)
    sums.index_add_(0, index, vectors.detach().double())
    return sums / counts[:, None], index, counts


def subspace_basis(
    model: HookedTransformer,
    name: str,
    rank: int | None,
    *,
    head: Component | None = None,
    token_sets: Mapping[str, range],
) -> Basis | None:
    """The basis that a command's `--subspace` and `--rank` name; None for `full_residual`.

    Raises:
        CircuitError: as `check_subspace`.
    """
    check_subspace(
        name,
        rank,
        head,
        d_model=model.cfg.d_model,
        d_head=model.cfg.d_head,
        token_sets=token_sets,
    )
    if rank is None:
        return None
    if head is not None:
        return head_basis(model, head, name, rank)
    tokens = token_sets[_token_set(name)]
    return embedding_identity(model, torch.tensor(list(tokens)), rank, name)


def _token_set(name: str) -> str:
    """The token set of an embedding's subspace; empty where it is none."""
    match = EMBEDDING.fullmatch(name)
    return match[1] if match else ""


def check_subspace(
    name: str,
    rank: int | None,
    head: Component | None,
    *,
    d_model: int,
    d_head: int,
    token_sets: Mapping[str, range],
) -> None:
    """Refuse what `subspace_basis` cannot give, before there is a model.

    Args:
        token_sets: of the task.

    Raises:
        CircuitError: there is no such subspace; a rank or a head is missing, superfluous or wrong;
            the rank is too large.
    """
    check_name(name, token_sets)
    if name in HEAD_SUBSPACES and (head is None or head.head is None):
        raise CircuitError(f"subspace '{name}' needs a head", fix="name one, such as L2H1")
    if name not in HEAD_SUBSPACES and head is not None:
        raise CircuitError(f"subspace '{name}' is no head's and takes none", fix="leave it out")
    if name == FULL_RESIDUAL:
        if rank is not None:
            raise CircuitError(
                f"{FULL_RESIDUAL} is everything and takes no rank", fix="leave it out"
            )
        return
    if rank is None:
        raise CircuitError(f"subspace '{name}' needs a rank", fix="give one")
    if name in HEAD_SUBSPACES:
        check_rank(name, rank, d_head)
    else:
        check_rank(name, rank, min(len(token_sets[_token_set(name)]) - 1, d_model))


def check_name(name: str, token_sets: Collection[str] | None = None) -> None:
    """Refuse a subspace that does not exist.

    Args:
        token_sets: of the task; None where it is not known yet.

    Raises:
        CircuitError: lists those that do.
    """
    of_embedding = _token_set(name)
    known = bool(of_embedding) if token_sets is None else of_embedding in token_sets
    if not known and name not in (*HEAD_SUBSPACES, FULL_RESIDUAL):
        names = subspaces_of(("TOKENS",) if token_sets is None else token_sets)
        raise CircuitError(f"unknown subspace '{name}'", expected=f"one of {', '.join(names)}")


def check_rank(name: str, rank: int, most: int) -> None:
    """Refuse a rank that the subspace does not have.

    Raises:
        CircuitError: the rank is below 1 or above `most`.
    """
    if not 1 <= rank <= most:
        raise CircuitError(f"rank {rank} of {name}", expected=f"1 to {most}")


def _top_right(rows: Tensor, rank: int) -> Tensor:
    """Top right singular vectors of the centred rows.

    Raises:
        CircuitError: they are not all finite.
    """
    matrix = rows.cpu().double()
    if not torch.isfinite(matrix).all():
        raise CircuitError(
            "a subspace of numbers that are not all finite: what they are computed from has"
            " diverged",
            fix="look at the steps before",
        )
    right: Tensor = torch.linalg.svd(matrix - matrix.mean(0), full_matrices=False).Vh
    return right[:rank].T.to(rows)
