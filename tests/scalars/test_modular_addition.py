"""Measures of modular addition on logits and weights made by hand, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.family import parse_scalars
from circuit.scalars.modular_addition import (
    KeyPower,
    LogitParts,
    SquaredWeights,
    SumLoss,
    check_sums,
    every_input,
    sums,
)
from circuit.tasks.induction.task import Induction, InductionConfig
from circuit.tasks.modular_addition.task import ModularAddition, ModularAdditionConfig
from circuit.train_config import ModelConfig

P = 7
CONFIG = {"name": "sums", "output_dir": "data/sums", "seed": 1}


def task(p: int = P) -> ModularAddition:
    return ModularAddition(
        ModularAdditionConfig(
            benchmark_type="modular_addition", modulus=p, train_fraction=0.4, **CONFIG
        )
    )


def wave(p: int, k: int) -> torch.Tensor:
    """`cos(2 pi k (a + b - c) / p)`, `[input, token]`."""
    difference = sums(p)[:, None] - torch.arange(p)
    return torch.cos(2 * math.pi * k * difference.double() / p)


def random_logits(p: int = P, tokens: int = P + 1) -> torch.Tensor:
    return torch.randn(
        p * p, tokens, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )


@pytest.mark.parametrize(("p", "key"), [(7, (1, 3)), (12, (2, 6)), (113, (14, 35, 52))])
def test_waves_of_key_frequencies_are_all_that_restriction_keeps(
    p: int, key: tuple[int, ...]
) -> None:
    logits = 3 * sum((wave(p, k) for k in key), torch.zeros(()))
    parts = LogitParts.of(logits, key)
    whole = cross_entropy(logits, sums(p), reduction="none")
    assert torch.allclose(parts.restricted_losses(), whole, atol=1e-12)
    excluded = parts.excluded_losses(torch.arange(p * p))
    assert torch.allclose(excluded, torch.full_like(excluded, math.log(p)), atol=1e-12)
    one = LogitParts.of(logits, key[:1])  # of the others nothing stays
    alone = cross_entropy(3 * wave(p, key[0]), sums(p), reduction="none")
    assert torch.allclose(one.restricted_losses(), alone, atol=1e-12)


def test_biases_of_classes_stay_in_both_and_other_waves_in_the_rest() -> None:
    """A wave of `a - b`, and one of `a` alone, have no place in the span of sums."""
    a, b, _ = torch.tensor(every_input(P)).double().T
    bias = torch.linspace(-1, 1, P).double()
    other = torch.cos(2 * math.pi * 2 * (a - b) / P) + torch.sin(2 * math.pi * 2 * a / P)
    direction = torch.randn(P, generator=torch.Generator().manual_seed(4))
    noise = other[:, None] * direction.double()
    parts = LogitParts.of(wave(P, 2) + bias + noise, (2,))
    assert torch.allclose(parts.mean, bias, atol=1e-12)
    assert torch.allclose(parts.key, wave(P, 2), atol=1e-12)
    assert torch.allclose(parts.rest, noise, atol=1e-12)
    restricted = cross_entropy(wave(P, 2) + bias, sums(P), reduction="none")
    assert torch.allclose(parts.restricted_losses(), restricted, atol=1e-12)
    chosen = torch.tensor([3, 20, 4])
    excluded = cross_entropy((bias + noise)[chosen], sums(P)[chosen], reduction="none")
    assert torch.allclose(parts.excluded_losses(chosen), excluded, atol=1e-12)


@pytest.mark.parametrize("p", [5, 6])
def test_the_projection_is_least_squares_on_waves_and_parts_are_orthogonal(p: int) -> None:
    logits, key = random_logits(p, p + 1), (1, p // 2)
    parts = LogitParts.of(logits, key)
    s = sums(p).double()
    columns = [f(2 * math.pi * k * s / p) for k in key for f in (torch.cos, torch.sin)]
    waves = torch.stack([one for one in columns if one.norm() > 1e-6], 1)
    fitted = waves @ torch.linalg.lstsq(waves, logits).solution
    assert torch.allclose(parts.key, fitted, atol=1e-12)
    powers = [parts.mean.square().sum() * p * p, parts.key.square().sum()]
    powers.append(parts.rest.square().sum())
    assert float(sum(powers)) == pytest.approx(float(logits.square().sum()), rel=1e-13)


def test_gradients_of_losses_are_differences() -> None:
    logits = random_logits(4, 5).requires_grad_()
    chosen = torch.tensor([0, 7, 13])
    for loss in (
        lambda x: LogitParts.of(x, (1,)).restricted_losses(),
        lambda x: LogitParts.of(x, (1,)).excluded_losses(chosen),
    ):
        assert torch.autograd.gradcheck(loss, logits)


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    config = ModelConfig(
        layers=1, heads=2, d_model=8, d_ff=16, max_sequence_length=4, tied_unembedding=False
    )
    return build_model(config, vocabulary_size=P + 1, seed=3, dtype=torch.float64)


def test_scalars_are_the_measures_of_the_model(model) -> None:  # type: ignore[no-untyped-def]
    of = task()
    logits = model(torch.tensor(every_input(P)))[:, 2]
    parts = LogitParts.of(logits, (1, 3))
    found = evaluate_scalar(SumLoss("restricted_loss", of, (1, 3)), model)
    assert torch.equal(found, parts.restricted_losses())
    found = evaluate_scalar(SumLoss("excluded_loss", of, (1, 3)), model)
    trained = [i for i, (a, b, _) in enumerate(every_input(P)) if of.is_trained(a, b)]
    assert len(found) == of.config.trained_pairs
    assert torch.allclose(found, parts.excluded_losses(torch.tensor(trained)))
    squared = sum(float(one.detach().square().sum()) for one in model.parameters())
    found = evaluate_scalar(SquaredWeights(), model).detach()
    assert float(found) == pytest.approx(squared, rel=1e-13)


def test_key_power_of_embeddings_of_two_frequencies(model) -> None:  # type: ignore[no-untyped-def]
    kept = model.W_E.detach().clone()
    n = torch.arange(P).double()
    with torch.no_grad():
        model.W_E[:P] = 5.0
        model.W_E[:P, 0] = 2 * torch.cos(2 * math.pi * 2 * n / P)
        model.W_E[:P, 1] = torch.sin(2 * math.pi * 3 * n / P)
        model.W_E[P] = 9.0  # of `=`, which is no number
    for key, share in (((2,), 0.8), ((3,), 0.2), ((2, 3), 1.0), ((1,), 0.0)):
        found = evaluate_scalar(KeyPower(task(), key), model).detach()
        assert float(found) == pytest.approx(share, abs=1e-13)
    with torch.no_grad():
        model.W_E.copy_(kept)


@pytest.mark.parametrize("measure", ["restricted_loss", "excluded_loss", "key_power"])
def test_gradients_in_the_embedding_are_differences(model, measure: str) -> None:  # type: ignore[no-untyped-def]
    scalar = KeyPower(task(), (2,))
    if measure != "key_power":
        scalar = SumLoss(measure, task(), (2,))  # type: ignore[assignment,arg-type]
    direction = torch.randn(
        model.W_E.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64
    )
    model.zero_grad()
    evaluate_scalar(scalar, model).mean().backward()
    slope = float((model.embed.W_E.grad * direction).sum())
    ends = []
    for step in (1e-5, -2e-5, 1e-5):
        with torch.no_grad():
            model.embed.W_E += step * direction
            ends.append(float(evaluate_scalar(scalar, model).mean()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_words_and_their_refusals() -> None:
    family = parse_scalars("modular_addition,measure=restricted_loss,key_frequency=3")
    family.check_task(task())
    with pytest.raises(CircuitError, match="key frequencies"):
        parse_scalars("modular_addition,measure=excluded_loss")
    with pytest.raises(CircuitError, match=r"frequency 4.*1 to 3"):
        check_sums(task(), (4,))
    other = Induction(
        InductionConfig(
            benchmark_type="induction", vocabulary_size=9, length=4, validation_records=2, **CONFIG
        )
    )
    with pytest.raises(CircuitError, match=r"task is induction.*modular_addition"):
        family.check_task(other)
