"""Subspaces: bases are orthonormal, and remove and keep are projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit.errors import CircuitError
from circuit.model.components import Component, all_heads
from circuit.model.subspaces import (
    FULL_RESIDUAL,
    HEAD_SUBSPACES,
    Basis,
    embedding_identity,
    group_means,
    head_basis,
    head_factors,
    identity_basis,
    keep,
    remove,
    subspace_basis,
    subspaces_of,
    svd_of_product,
    vector_basis,
)

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

TOKENS = {"key": range(5, 9), "value": range(9, 17)}


def drawn(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_basis(model: HookedTransformer, rank: int) -> list[Basis]:
    vectors, groups = drawn(30, 16), torch.arange(30) % 5
    return [
        *(
            head_basis(model, head, name, rank)
            for head in all_heads(model)
            for name in HEAD_SUBSPACES
        ),
        *(embedding_identity(model, torch.tensor(ids), rank) for ids in TOKENS.values()),
        identity_basis(vectors, groups, rank),
        vector_basis(vectors, rank),
    ]


@pytest.mark.parametrize("rank", [1, 3])
def test_bases_are_orthonormal(model: HookedTransformer, rank: int) -> None:
    for basis in every_basis(model, rank):
        assert basis.shape == (16, rank)
        assert basis.dtype == torch.float32
        assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=1e-6)


@given(seed=st.integers(0, 99), rank=st.integers(1, 7))
def test_remove_and_keep_are_complementary_projections(seed: int, rank: int) -> None:
    basis = vector_basis(drawn(20, 16, seed=seed), rank)
    x = drawn(2, 5, 16, seed=seed + 1)
    assert torch.allclose(remove(x, basis) + keep(x, basis), x, atol=1e-6)
    assert torch.allclose(remove(remove(x, basis), basis), remove(x, basis), atol=1e-6)
    assert torch.allclose(keep(keep(x, basis), basis), keep(x, basis), atol=1e-6)
    assert torch.allclose(keep(remove(x, basis), basis), torch.zeros_like(x), atol=1e-6)
    assert not torch.allclose(remove(x, basis), x, atol=1e-2)
    assert torch.equal(keep(x, None), x)
    assert not remove(x, None).any()


def test_removing_every_direction_of_an_identity_leaves_none_of_it(
    model: HookedTransformer,
) -> None:
    """One rank less than there are tokens is all of it: no logit tells two of the tokens apart."""
    tokens = torch.tensor(TOKENS["value"])
    rows = model.W_E.detach()[tokens]
    most, one_less = (embedding_identity(model, tokens, rank) for rank in (7, 6))
    assert torch.allclose(remove(rows - rows.mean(0), most), torch.zeros_like(rows), atol=1e-5)
    assert not torch.allclose(remove(rows - rows.mean(0), one_less), torch.zeros(8, 16), atol=1e-2)
    logits = remove(drawn(6, 16), most) @ model.W_U[:, tokens]
    assert torch.allclose(logits, logits[:, :1].expand(-1, 8), atol=1e-5)


def test_head_bases_are_those_of_the_dense_products(model: HookedTransformer) -> None:
    for head in all_heads(model):
        attention = model.blocks[head.layer].attn
        dense = {
            "qk": attention.W_Q[head.head] @ attention.W_K[head.head].T,
            "ov": attention.W_V[head.head] @ attention.W_O[head.head],
        }
        for name in HEAD_SUBSPACES:
            u, _, vh = torch.linalg.svd(dense[name[5:7]].detach().double())
            plain = u if name in ("head_qk_query", "head_ov_input") else vh.T
            found = head_basis(model, head, name, 4).double()
            assert torch.allclose((found * plain[:, :4]).sum(0).abs(), torch.ones(4).double())


def test_the_svd_of_a_product_multiplies_back(model: HookedTransformer) -> None:
    left, right = head_factors(model, Component(1, 0), "ov")
    batched = svd_of_product(torch.stack([left, left * 2]), torch.stack([right, right]))
    for index, scale in enumerate((1, 2)):
        u, s, v = (part[index] for part in batched)
        assert u.dtype == torch.float64
        assert torch.allclose(u * s @ v.T, scale * (left.double() @ right.double()), atol=1e-12)
        assert (s.diff() <= 0).all()


def test_group_means_are_means_of_groups() -> None:
    vectors, groups = drawn(9, 4), torch.tensor([7, 2, 7, 5, 2, 7, 5, 5, 9])
    means, index, counts = group_means(vectors, groups)
    for i, group in enumerate([2, 5, 7, 9]):
        assert torch.allclose(means[i], vectors[groups == group].double().mean(0))
        assert counts[i] == (groups == group).sum()
    assert torch.equal(torch.tensor([2, 5, 7, 9])[index], groups)


@pytest.mark.parametrize("name", subspaces_of(TOKENS))
def test_every_name_gives_its_basis(model: HookedTransformer, name: str) -> None:
    head = Component(1, 1) if name in HEAD_SUBSPACES else None
    rank = None if name == FULL_RESIDUAL else 2
    basis = subspace_basis(model, name, rank, head=head, token_sets=TOKENS)
    if name == FULL_RESIDUAL:
        assert basis is None
    elif name in HEAD_SUBSPACES:
        assert torch.equal(basis, head_basis(model, Component(1, 1), name, 2))
    else:
        tokens = TOKENS["key" if "key" in name else "value"]
        assert torch.equal(basis, embedding_identity(model, torch.tensor(tokens), 2))


@pytest.mark.parametrize(
    ("name", "rank", "head", "says"),
    [
        ("values", 1, None, "unknown subspace 'values'; expected one of embedding_key_identity"),
        ("full_residual", 1, None, "full_residual is everything and takes no rank"),
        ("embedding_key_identity", None, None, "needs a rank"),
        ("embedding_key_identity", 4, None, "rank 4 of embedding_key_identity; expected 1 to 3"),
        ("embedding_value_identity", 8, None, "expected 1 to 7"),
        ("embedding_value_identity", 0, None, "expected 1 to 7"),
        ("embedding_value_identity", 2, Component(0, 0), "is no head's and takes none"),
        ("head_qk_key", 2, None, "needs a head; name one, such as L2H1"),
        ("head_qk_key", 2, Component(0, None), "needs a head"),
        ("head_ov_input", 9, Component(0, 0), "rank 9 of head_ov_input; expected 1 to 8"),
    ],
)
def test_what_has_no_meaning_is_refused(
    model: HookedTransformer, name: str, rank: int | None, head: Component | None, says: str
) -> None:
    with pytest.raises(CircuitError, match=says):
        subspace_basis(model, name, rank, head=head, token_sets=TOKENS)
