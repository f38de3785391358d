"""Path shares against truth by intervention: exact for a quadratic, third order otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit.attribution.attribute import Attributor
from circuit.attribution.intervention import effects
from circuit.core.flat import Flat, ParameterLayout
from circuit.model.build import build_model
from circuit.scalars.base import Cache, Needs
from circuit.scalars.qk_match import QKMatch, ReadMasks
from circuit.tasks.benchmark import Benchmark
from circuit.trace.step import Tracer
from circuit.train_config import TrainConfig
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

SHAPE = {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32, "max_sequence_length": 40}


@dataclass(frozen=True)
class Product:
    """A quadratic scalar that couples tensors: products of weights, a square, a linear part."""

    needs: Needs
    name: str = "product"
    constant: bool = True

    def bind(self, model: HookedTransformer) -> Product:
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        at = model.blocks[0].attn
        return ((at.W_Q * at.W_K).sum() + at.W_V.pow(2).sum() + model.W_E.sum())[None]


@pytest.fixture(scope="module")
def config(make_config: Callable[..., TrainConfig]) -> TrainConfig:
    return make_config(model=SHAPE, gradient_clip=0.5)


@pytest.fixture(scope="module")
def model(config: TrainConfig, tiny: Benchmark) -> HookedTransformer:
    size = tiny.vocabulary.size
    return build_model(config.model, vocabulary_size=size, seed=3, dtype=torch.float64)


@pytest.fixture(scope="module")
def reads(tiny: Benchmark) -> ReadMasks:
    records = tiny.records("validation_iid")[:6]
    return ReadMasks.of(tiny.task.examples(records))


def start_and_terms(model: HookedTransformer, count: int) -> tuple[Flat, dict[str, Flat]]:
    """Random weights, and a step of some random terms."""
    draw = torch.Generator().manual_seed(count)
    size = ParameterLayout.of_model(model).size
    theta = 0.3 * torch.randn(size, generator=draw, dtype=torch.float64)
    return theta, {
        f"term {k}": 0.05 * torch.randn(size, generator=draw, dtype=torch.float64)
        for k in range(count)
    }


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_for_a_quadratic_scalar_the_share_is_the_mean_of_both_interventions(
    model: HookedTransformer, reads: ReadMasks, count: int
) -> None:
    scalar = Product(Needs(reads.sequences[:1], ("blocks.0.hook_resid_pre",)))
    theta, terms = start_and_terms(model, count)
    for rule in ("midpoint", "simpson", "gauss:2"):
        attributor = Attributor(model, [scalar], rule=rule)
        found = effects(attributor, theta, terms)
        assert list(found) == list(terms)
        for effect in found.values():
            torch.testing.assert_close(effect.path, effect.value, rtol=1e-9, atol=1e-9)
            # neither intervention alone does, where there are several terms
            apart = float((effect.alone - effect.but_one).abs())
            assert (apart < 1e-9) == (count == 1)
        bound = attributor.bind(theta)
        actual = attributor.values(theta + torch.stack(list(terms.values())).sum(0), bound)
        actual -= attributor.values(theta, bound)
        total = torch.stack([effect.value for effect in found.values()]).sum(0)
        torch.testing.assert_close(total, actual, rtol=1e-9, atol=1e-9)


def test_otherwise_half_the_step_leaves_an_eighth_of_the_difference(
    config: TrainConfig, tiny: Benchmark, model: HookedTransformer, reads: ReadMasks
) -> None:
    """On the terms of a real update, and on random ones."""
    tracer = Tracer(TrainingSession(Setup(config, benchmark=tiny)))
    traced = [tracer.advance() for _ in range(4)][-1]
    real = {name: u for name, u in traced.update.named().items() if name != "rounding"}
    attributor = Attributor(model, [QKMatch("L1H0", reads, layers=2)], rule="gauss:4")
    for theta, terms in (
        (traced.before.parameters, real),
        start_and_terms(model, 3),
    ):
        apart = {}
        for scale in (1.0, 0.5, 0.25, 0.125):
            found = effects(attributor, theta, terms, scale=scale)
            apart[scale] = torch.stack([(e.path - e.value).abs() for e in found.values()])
        ratio = apart[0.25] / apart[0.125]
        print("ratios", (apart[0.5] / apart[0.25]).flatten().tolist(), ratio.flatten().tolist())
        above_rounding = apart[0.125] > 1e-13
        assert bool(above_rounding.any())
        assert bool(((ratio > 6) & (ratio < 10.5))[above_rounding].all())
