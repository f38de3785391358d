"""Induction's measures on weights made by hand, against closed forms, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer

from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.scalars.base import Scalar, SharedBatch, evaluate_scalar
from circuit.scalars.family import parse_scalars
from circuit.scalars.induction import (
    KComposition,
    composed_pairs,
    prefix_matching,
    previous_token_attention,
)
from circuit.scalars.loss import LossScalar
from circuit.tasks.examples import Examples
from circuit.tasks.induction.task import Induction, InductionConfig
from circuit.train_config import ModelConfig

LENGTH, TOKENS = 4, 6
TASK = Induction(
    InductionConfig(
        name="small",
        benchmark_type="induction",
        output_dir="data/small",
        seed=3,
        vocabulary_size=TOKENS,
        length=LENGTH,
        validation_records=5,
    )
)
BARE: dict[str, Any] = {"normalization": "none", "biases": False}


def made(kernels: Any = "fast", **shape: Any) -> HookedTransformer:
    """Two layers of two heads, attention alone, float64."""
    config = ModelConfig(
        layers=2, heads=2, d_model=16, d_ff=0, max_sequence_length=2 * LENGTH, **shape
    )
    return build_model(config, vocabulary_size=TOKENS, seed=5, kernels=kernels, dtype=torch.float64)


@pytest.fixture(scope="module")
def batch() -> Examples:
    return TASK.examples(TASK.draw(lambda *_: None).splits["validation"])


def looking(back: Callable[[int], int], strength: float) -> HookedTransformer:
    """L0H1 scores `strength` at the position that it looks back to, and 0 at all others."""
    model, width = made(**BARE), 2 * LENGTH
    attention = model.blocks[0].attn
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.pos_embed.W_pos[:, :width] = torch.eye(width)
        for position in range(width):
            attention.W_Q[1, position, back(position) % width] = strength
        attention.W_K[1, :width] = torch.eye(width).double() * math.sqrt(8)  # d_head
    return model


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 1.5, 40.0])
def test_previous_token_attention_is_the_softmax_of_one_score(
    batch: Examples, strength: float
) -> None:
    model = looking(lambda position: position - 1, strength)
    positions = range(1, 2 * LENGTH - 1)
    shares = [math.exp(strength) / (math.exp(strength) + n) for n in positions]
    expected = sum(shares) / len(shares)
    found = evaluate_scalar(previous_token_attention("L0H1", batch), model)
    assert len(found) == 5 * len(positions)
    assert float(found.mean()) == pytest.approx(expected, rel=1e-12)
    even = [1 / (n + 1) for n in positions]
    other = evaluate_scalar(previous_token_attention("L0H0", batch), model)
    assert float(other.mean()) == pytest.approx(sum(even) / len(even), rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 1.5, 40.0])
def test_prefix_matching_is_attention_to_what_followed_the_first_occurrence(
    batch: Examples, strength: float
) -> None:
    model = looking(lambda position: position - LENGTH + 1, strength)
    at = range(LENGTH, 2 * LENGTH - 1)
    expected = [math.exp(strength) / (math.exp(strength) + n) for n in at] * 5
    found = evaluate_scalar(prefix_matching("L0H1", batch), model)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    # to the first occurrence itself, one before, such a head attends as to anything else
    beside = evaluate_scalar(prefix_matching("L0H1", batch, support_role="support_key"), model)
    rest = [(1 - share) / n for share, n in zip(expected, [*at] * 5, strict=True)]
    assert beside.tolist() == pytest.approx(rest, rel=1e-12, abs=1e-15)


@torch.no_grad()
def test_composition_of_subspaces_that_are_the_same_overlap_or_are_apart() -> None:
    model = made(**BARE)
    earlier, later = model.blocks[0].attn, model.blocks[1].attn
    axes = torch.eye(16, dtype=torch.float64)

    def reads_and_writes(written: list[int], read: list[int]) -> float:
        with torch.no_grad():
            for of in (earlier.W_V, earlier.W_O, later.W_Q, later.W_K):
                of.zero_()
            for place, axis in enumerate(written):
                earlier.W_V[1, :, place], earlier.W_O[1, place] = axes[axis], axes[axis]
            for place, axis in enumerate(read):
                later.W_Q[0, :, place], later.W_K[0, :, place] = axes[0], axes[axis]
        (value,) = evaluate_scalar(KComposition("L0H1", "L1H0"), model)
        return float(value)

    assert reads_and_writes([3], [3]) == pytest.approx(1)
    assert reads_and_writes([3], [4]) == 0
    # W_QK = e0 (e3 + e5)^T of norm sqrt 2 on W_OV = e3 e3^T + e4 e4^T of norm sqrt 2
    assert reads_and_writes([3, 4], [3, 5]) == pytest.approx(1 / 2)
    assert reads_and_writes([3, 4], [3, 4]) == pytest.approx(math.sqrt(2) / 2)


@torch.no_grad()
def test_composition_is_how_the_later_head_scores_what_the_earlier_one_wrote() -> None:
    """The docstring's bilinear form, with vectors; and which factor is transposed."""
    model = made(**BARE)
    earlier, later = model.blocks[0].attn, model.blocks[1].attn
    generator = torch.Generator().manual_seed(1)
    q, y = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    key = y @ earlier.W_V[0] @ earlier.W_O[0]
    score = (q @ later.W_Q[1]) @ (key @ later.W_K[1])
    form = (later.W_Q[1] @ later.W_K[1].T) @ (earlier.W_V[0] @ earlier.W_O[0]).T
    assert float(score) == pytest.approx(float(q @ form @ y), rel=1e-10)
    norms = (later.W_Q[1] @ later.W_K[1].T).norm() * (earlier.W_V[0] @ earlier.W_O[0]).norm()
    (value,) = evaluate_scalar(KComposition("L0H0", "L1H1"), model)
    assert float(value) == pytest.approx(float(form.norm() / norms), rel=1e-12)


@pytest.mark.parametrize("kernels", ["fast", "plain"])
@pytest.mark.parametrize(
    "scalar",
    [
        lambda batch: prefix_matching("L1H0", batch),
        lambda batch: previous_token_attention("L1H1", batch),
        lambda batch: KComposition("L0H1", "L1H0"),
        lambda batch: LossScalar(batch.select(batch.facts["position"] == 1), "answer"),
    ],
    ids=["prefix_matching", "previous_token_attention", "k_composition", "loss"],
)
def test_gradients_are_central_differences(
    batch: Examples, kernels: str, scalar: Callable[[Examples], Scalar]
) -> None:
    model, of = made(kernels), scalar(batch)
    shared = SharedBatch.merge([of])

    def mean() -> torch.Tensor:
        return shared.means(model, [of.bind(model)])[0]

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(mean(), parameters, allow_unused=True)
    assert any(one is not None and one.abs().max() > 1e-6 for one in gradients)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        slope = sum(
            float((gradient * way).sum())
            for gradient, way in zip(gradients, ways, strict=True)
            if gradient is not None
        )
        ends = []
        with torch.no_grad():
            for size in (1e-5, -1e-5):
                for parameter, way in zip(parameters, ways, strict=True):
                    parameter += size * way
                ends.append(float(mean()))
                for parameter, way in zip(parameters, ways, strict=True):
                    parameter -= size * way
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9)


@torch.no_grad()
def test_padding_of_others_changes_nothing(batch: Examples) -> None:
    """A batch that is shared with longer records, and shorter rows among one's own."""
    model = made(**BARE)
    short = replace(batch, lengths=batch.lengths - 1)
    of = previous_token_attention("L0H0", short)
    assert len(evaluate_scalar(of, model)) == 5 * (2 * LENGTH - 3)
    alone = [prefix_matching("L0H0", short.select(short.index == 0)), of]
    together = SharedBatch.merge([*alone, prefix_matching("L0H1", batch)])
    means = together.means(model, [one.bind(model) for one in (*alone, alone[0])])
    for one, mean in zip(alone, means, strict=False):
        assert float(mean) == pytest.approx(float(evaluate_scalar(one, model).mean()), rel=1e-12)


def test_pairs_are_of_different_layers_the_earlier_first() -> None:
    assert composed_pairs(["L1H0", "L0H0", "L0H1"]) == [("L0H0", "L1H0"), ("L0H1", "L1H0")]
    with pytest.raises(CircuitError, match="L0H1 does not read L1H0"):
        KComposition("L1H0", "L0H1")
    with pytest.raises(CircuitError, match="'L1MLP' is no head"):
        KComposition("L0H0", "L1MLP")
    family = parse_scalars("induction,measure=k_composition,head=L1H0,head=L1H1")
    with pytest.raises(CircuitError, match="k_composition of heads of one layer"):
        family.check_model(ModelConfig(layers=2, heads=2, d_model=8, d_ff=0, max_sequence_length=8))


def test_slices_of_the_loss_are_of_answers() -> None:
    with pytest.raises(CircuitError, match="only answers have slices"):
        parse_scalars("loss,slice=position")
    assert parse_scalars("loss,scope=answer,slice=position,slice=distance")
