"""What stands in for a component, and a change of the same size in another direction."""

from __future__ import annotations

import pytest
import torch

from circuit.errors import CircuitError
from circuit.model.ablation import LEFT, Operation, Replacement, other_records, replaced, turned
from circuit.model.rescue import random_basis
from circuit.model.subspaces import keep

WIDTH, PLACES = 12, 40
OPERATIONS: tuple[Operation, ...] = ("remove", "keep")
REPLACEMENTS: tuple[Replacement, ...] = ("zero", "mean", "resample")


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    scales = torch.logspace(0, -3, WIDTH, dtype=torch.float64)
    return 0.3 + torch.randn(PLACES, WIDTH, dtype=torch.float64, generator=generator) * scales


def changed(
    x: torch.Tensor, basis: torch.Tensor, operation: Operation, replacement: Replacement = "zero"
) -> torch.Tensor:
    left = LEFT[operation](x, basis)
    donors = other_records(torch.arange(len(x)) // 3, seed=1)
    return replaced(left, x - left, replacement, donors)


def taken(x: torch.Tensor, basis: torch.Tensor, operation: Operation) -> torch.Tensor:
    return x - LEFT[operation](x, basis)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_a_turned_change_takes_away_as_much_and_leaves_as_much(
    x: torch.Tensor, operation: Operation, replacement: Replacement
) -> None:
    """And so does one that differs in nothing but its basis not: that is the control's point."""
    real, other = (changed(x, random_basis(WIDTH, 3, s), operation, replacement) for s in (0, 1))
    found = turned(x, real, other)
    square = x.square().sum(1)
    for of, end in ((lambda y: y - x, "change"), (lambda y: y, "result")):
        gap = of(found).square().sum(1) - of(real).square().sum(1)
        assert float((gap / square).abs().max()) < 1e-6, end
        gap = of(other).square().sum(1) - of(real).square().sum(1)
        assert float((gap / square).abs().max()) > 1e-3, end
    # across x it goes where the other change goes
    across = [
        y - x - ((y - x) * x).sum(1, keepdim=True) / square[:, None] * x for y in (found, other)
    ]
    assert torch.cosine_similarity(*across) == pytest.approx(torch.ones(PLACES), abs=1e-6)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_random_basis_of_every_direction_is_the_real_one(
    x: torch.Tensor, operation: Operation
) -> None:
    real, other = (changed(x, random_basis(WIDTH, WIDTH, seed), operation) for seed in (0, 1))
    assert torch.allclose(other, real, atol=1e-12)
    assert torch.allclose(turned(x, real, other), real, atol=1e-6)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_turned_by_itself_a_change_stays(x: torch.Tensor, operation: Operation) -> None:
    real = changed(x, random_basis(WIDTH, 3, 0), operation)
    assert torch.allclose(turned(x, real, real), real, atol=1e-12)
    assert torch.allclose(turned(x, x, real), x)
    # one that leaves x as it is, or only scales it, has no direction: what is finite is left
    assert torch.isfinite(turned(x, real, x)).all()
    assert torch.equal(turned(torch.zeros_like(x), torch.zeros_like(x), real), torch.zeros_like(x))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_mean_of_what_is_replaced_by_its_mean_stays(
    x: torch.Tensor, operation: Operation
) -> None:
    basis = random_basis(WIDTH, 3, 0)
    before, after = (taken(y, basis, operation) for y in (x, changed(x, basis, operation, "mean")))
    assert torch.allclose(after.mean(0), before.mean(0), atol=1e-12)
    assert float(after.std(0).max()) < 1e-12 < 1e-3 < float(before.std(0).max())
    whole = LEFT[operation]
    assert torch.allclose(whole(changed(x, basis, operation, "mean"), basis), whole(x, basis))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_resampling_takes_the_component_of_another_record(
    x: torch.Tensor, operation: Operation
) -> None:
    basis, records = random_basis(WIDTH, 3, 0), torch.arange(PLACES) // 3
    after = taken(changed(x, basis, operation, "resample"), basis, operation)
    before = taken(x, basis, operation)
    distance = torch.cdist(after, before)
    assert float(distance.amin(1).max()) < 1e-6
    assert not bool((records[distance.argmin(1)] == records).any())
    alike = x[:1].expand(PLACES, WIDTH)
    assert torch.allclose(changed(alike, basis, operation, "resample"), alike, atol=1e-12)
    assert not torch.allclose(changed(alike, basis, operation), alike, atol=1e-3)


def test_donors_are_of_other_records_and_each_of_them_is_drawn() -> None:
    records = torch.tensor([0, 0, 0, 1, 4, 4])
    drawn = torch.stack([other_records(records, seed) for seed in range(200)])
    for place, record in enumerate(records.tolist()):
        others = {i for i, other in enumerate(records.tolist()) if other != record}
        assert set(drawn[:, place].tolist()) == others
    assert torch.equal(other_records(records, 5), other_records(records, 5))
    with pytest.raises(CircuitError, match="`replacement` resample: all changed positions are of"):
        other_records(torch.zeros(4, dtype=torch.int64), 0)


def test_what_is_kept_of_the_whole_residual_is_replaced_by_nothing(x: torch.Tensor) -> None:
    assert torch.equal(replaced(keep(x, None), x - keep(x, None), "mean"), x)
