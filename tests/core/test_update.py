"""Rules split an update into its terms: to the bit as before, and group by group.

`frozen_terms` is a verbatim copy of the formulas as they were when rate and decay were numbers of a
training config: what they gave is what rows and pages were written from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from torch import Tensor

from circuit.core.update import AdamWRule, Hyper, OptimizerStep, SGDRule, UpdateRule, UpdateTerms
from circuit.errors import CircuitError

RULES: dict[str, UpdateRule] = {
    "adamw": AdamWRule(0.9, 0.95, 1e-8),
    "adamw without history": AdamWRule(0.0, 0.999, 1e-8),
    "adamw with a long memory": AdamWRule(0.99, 0.9999, 1e-3),
    "sgd": SGDRule(0.0),
    "sgd momentum": SGDRule(0.9),
}
VECTORS = ["total", "weight_decay", "current", "history", "rounding"]
VECTORS += ["raw_sgd", "clipped_sgd", "largest"]
WORST_ULPS = 8.0
"""See tests/trace/test_terms.py."""


def frozen_terms(
    rule: UpdateRule,
    *,
    step: int,
    lr: float,
    weight_decay: float,
    before: Tensor,
    after: Tensor,
    gradient: Tensor,
    clipped: Tensor,
    moments_before: Mapping[str, Tensor],
    moments_after: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    optimizer: Any = rule
    old, g_hat = before.double(), clipped.double()
    total = after.double() - old
    decay = old.mul(-lr * weight_decay)
    if isinstance(optimizer, AdamWRule):
        b1, b2 = optimizer.beta1, optimizer.beta2
        scale = lr / (1 - b1**step)
        denominator = moments_after["exp_avg_sq"].double().sqrt_()
        denominator.div_(math.sqrt(1 - b2**step)).add_(optimizer.eps)
        current = (g_hat * (-scale * (1 - b1))).div_(denominator)
        history = moments_before["exp_avg"].double().mul_(-scale * b1).div_(denominator)
    else:
        current = g_hat * -lr
        history = (
            moments_before["momentum_buffer"].double().mul_(-lr * optimizer.momentum)
            if optimizer.momentum
            else torch.zeros_like(old)
        )
    magnitudes = [vector.abs() for vector in (before, after, current.float(), history.float())]
    return {
        "total": total,
        "weight_decay": decay,
        "current": current,
        "history": history,
        "rounding": (total - decay).sub_(current).sub_(history),
        "raw_sgd": gradient.double() * -lr,
        "clipped_sgd": g_hat * -lr,
        "largest": torch.stack(magnitudes).amax(0),
    }


def by_column(terms: UpdateTerms) -> dict[str, Tensor]:
    three = dict(zip(("weight_decay", "current", "history"), terms.terms.values(), strict=True))
    rest = {name: getattr(terms, name) for name in ("total", "rounding", "largest")}
    return {**three, **rest, **terms.references()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


def inputs(seed: int, size: int, scale: float = 0.0) -> dict[str, Any]:
    """What a step leaves, of any numbers: the formulas need no optimizer behind them."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(size, generator=generator) * 10**scale

    gradient = draw()
    return {
        "before": draw(),
        "after": draw(),
        "gradient": gradient,
        "clipped": 0.3 * gradient,
        "moments_before": {"exp_avg": draw(), "exp_avg_sq": draw() ** 2, "momentum_buffer": draw()},
        "moments_after": {"exp_avg": draw(), "exp_avg_sq": draw() ** 2, "momentum_buffer": draw()},
        "step": 1 + seed % 1000,
    }


def part(taken: dict[str, Any], where: Tensor) -> dict[str, Any]:
    """The parameters that a mask chooses."""

    def chosen(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: vector[where] for name, vector in value.items()}
        return value[where] if isinstance(value, Tensor) else value

    return {name: chosen(value) for name, value in taken.items()}


rules = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
rates = st.floats(1e-7, 0.9)
decays = st.one_of(st.just(0.0), st.floats(1e-5, 0.9))
settings_of_group = st.tuples(rates, decays)
seeds = st.integers(0, 2**31)


@rules
@laws(max_examples=40)
@given(seed=seeds, size=st.integers(1, 100), scale=st.floats(-8, 3), rate=rates, decay=decays)
def test_numbers_are_those_of_the_frozen_formulas_and_so_are_constant_vectors(
    rule: UpdateRule, seed: int, size: int, scale: float, rate: float, decay: float
) -> None:
    taken = inputs(seed, size, scale)
    expected = frozen_terms(rule, lr=rate, weight_decay=decay, **taken)
    assert list(expected) == [name for name in VECTORS if name in expected]
    assert set(expected) == set(VECTORS)
    rate_vector = torch.full((size,), rate, dtype=torch.float64)
    decay_vector = torch.full((size,), decay, dtype=torch.float64)
    for hyper in (
        Hyper(rate, decay),
        Hyper(rate_vector, decay_vector),
        Hyper(rate_vector, decay),
        Hyper(rate, decay_vector),
    ):
        found = rule.terms(OptimizerStep(**taken, hyper=hyper))
        assert tuple(found.terms) == rule.names
        for name, vector in expected.items():
            assert same_bits(by_column(found)[name], vector), name


@rules
@laws(max_examples=40)
@given(seed=seeds, size=st.integers(2, 100), one=settings_of_group, two=settings_of_group)
def test_each_of_two_groups_is_as_if_it_were_alone(
    rule: UpdateRule, seed: int, size: int, one: tuple[float, float], two: tuple[float, float]
) -> None:
    taken = inputs(seed, size)
    first = torch.arange(size) < 1 + seed % (size - 1)
    vectors = [
        torch.where(first, *(torch.full((size,), value, dtype=torch.float64) for value in values))
        for values in zip(one, two, strict=True)
    ]
    both = rule.terms(OptimizerStep(**taken, hyper=Hyper(*vectors)))
    for group, where in ((one, first), (two, ~first)):
        alone = rule.terms(OptimizerStep(**part(taken, where), hyper=Hyper(*group)))
        for name in VECTORS:
            assert same_bits(by_column(both)[name][where], by_column(alone)[name]), name


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_sum_to_the_update_and_what_they_are_made_of_stays(
    rule: UpdateRule, dtype: torch.dtype
) -> None:
    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cast(vector) for name, vector in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) else value

    taken, kept = cast(inputs(7, 50)), cast(inputs(7, 50))
    terms = rule.terms(OptimizerStep(**taken, hyper=Hyper(0.01, 0.1)))
    assert torch.allclose(sum(terms.named().values()), terms.total, rtol=0, atol=1e-14)
    assert list(terms.named()) == [*rule.names, "rounding"]
    for name, value in kept.items():
        for ours, theirs in zip(_tensors(value), _tensors(taken[name]), strict=True):
            assert same_bits(ours, theirs), name


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return list(value.values())
    return [value] if isinstance(value, Tensor) else []


@dataclass(frozen=True)
class Case:
    """A rule, and torch's own optimizer of which it speaks."""

    rule: UpdateRule
    moments: tuple[str, ...]
    build: Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer]


def adamw(beta1: float, beta2: float) -> Case:
    return Case(
        AdamWRule(beta1, beta2, 1e-8),
        ("exp_avg", "exp_avg_sq"),
        lambda groups: torch.optim.AdamW(groups, betas=(beta1, beta2), eps=1e-8),
    )


def sgd(momentum: float) -> Case:
    return Case(
        SGDRule(momentum),
        ("momentum_buffer",) if momentum else (),
        lambda groups: torch.optim.SGD(groups, momentum=momentum),
    )


@pytest.mark.parametrize(
    "case",
    [adamw(0.9, 0.95), adamw(0.0, 0.999), adamw(0.9, 0.999), sgd(0.0), sgd(0.9)],
    ids=["adamw", "adamw without history", "adamw of the papers", "sgd", "sgd momentum"],
)
@laws(max_examples=30)
@given(
    seed=seeds,
    rates=st.tuples(st.floats(1e-5, 0.1), st.floats(1e-5, 0.1)),
    decays=st.tuples(st.floats(0.0, 0.7), st.floats(0.0, 0.7)),
)
def test_two_parameter_groups_of_torchs_own_optimizer_are_explained(
    case: Case, seed: int, rates: tuple[float, float], decays: tuple[float, float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 5), (30,))
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    groups = [
        {"params": [weight], "lr": rate, "weight_decay": decay}
        for weight, rate, decay in zip(weights, rates, decays, strict=True)
    ]
    optimizer = case.build(groups)
    hyper = Hyper(by_group(weights, rates), by_group(weights, decays))

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    past = {name: torch.zeros(50) for name in case.moments}
    for t in range(1, 5):
        before = flat(weights)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        gradient = flat([weight.grad for weight in weights if weight.grad is not None])
        optimizer.step()
        now = {name: flat([optimizer.state[w][name] for w in weights]) for name in case.moments}
        update = case.rule.terms(
            OptimizerStep(
                before=before,
                after=flat(weights),
                gradient=gradient,
                clipped=gradient,
                moments_before=past,
                moments_after=now,
                step=t,
                hyper=hyper,
            )
        )
        worst = update.rounding_ulps()
        assert worst <= WORST_ULPS
        past = now


def by_group(weights: Sequence[Tensor], values: Sequence[float]) -> Tensor:
    parts = [
        torch.full((weight.numel(),), value, dtype=torch.float64)
        for weight, value in zip(weights, values, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.ones(3, 1).double(), torch.tensor(1.0).double()]
)
@pytest.mark.parametrize("field", ["rate", "decay"])
def test_a_rate_or_decay_of_another_type_or_shape_is_refused(field: str, value: Tensor) -> None:
    with pytest.raises(CircuitError, match=rf"^{field} is torch\.float.*expected a number, or"):
        Hyper(**{"rate": 0.1, "decay": 0.0, field: value})
