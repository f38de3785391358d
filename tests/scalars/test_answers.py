"""Answer scalars say what their definitions say, and split a change of margin exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.model.readout import read_answers
from circuit.scalars.answer_scalar import AnswerScalar
from circuit.scalars.answers import (
    ANSWER_SCALARS,
    FIXED_SOURCE,
    FIXED_TARGET,
    MOVING,
    Competitors,
    answer_scalars,
    fixed_scalars,
    switch_part,
    top_wrong,
)
from circuit.scalars.base import evaluate_scalar
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import Examples
from circuit.train_config import TrainConfig

VALUES = range(4, 12)
seeds = st.integers(0, 10_000)


def ends(seed: int, reads: int = 6, change: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, and logits at a source and a target, over 14 tokens of which 8 are values."""
    torch.manual_seed(seed)
    source = torch.randn(reads, 14, dtype=torch.float64)
    target = source + change * torch.randn(reads, 14, dtype=torch.float64)
    return torch.randint(VALUES.start, VALUES.stop, (reads,)), source, target


def competitors_of(answer: Tensor, source: Tensor, target: Tensor) -> Competitors:
    return Competitors(
        *(read_answers(logits, answer, VALUES).competitor for logits in (source, target))
    )


@given(seeds)
def test_each_scalar_is_its_definition(seed: int) -> None:
    answer, source, target = ends(seed)
    competitors = competitors_of(answer, source, target)
    found = answer_scalars(target, answer, competitors, VALUES)
    assert tuple(found) == ANSWER_SCALARS
    for i, logits in enumerate(target):
        right = int(answer[i])
        wrong = {token: float(logits[token]) for token in VALUES if token != right}
        old, new = int(competitors.source[i]), int(competitors.target[i])
        assert new == max(wrong, key=wrong.__getitem__)
        expected = {
            MOVING: float(logits[right]) - max(wrong.values()),
            "correct_value_logit": float(logits[right]),
            "negative_answer_loss": float(logits[right] - logits.exp().sum().log()),
            FIXED_SOURCE: float(logits[right]) - wrong[old],
            FIXED_TARGET: float(logits[right]) - wrong[new],
            "source_best_wrong_logit": wrong[old],
            "target_best_wrong_logit": wrong[new],
        }
        assert {n: float(v[i]) for n, v in found.items()} == pytest.approx(expected, abs=1e-12)


@given(seeds)
def test_the_moving_margin_splits_exactly(seed: int) -> None:
    answer, source, target = ends(seed)
    competitors = competitors_of(answer, source, target)
    before = answer_scalars(source, answer, competitors, VALUES)
    after = answer_scalars(target, answer, competitors, VALUES)
    switch = switch_part(target, answer, competitors, VALUES)
    delta = {name: after[name] - before[name] for name in after}
    assert (switch <= 0).all()
    assert torch.equal(switch < 0, competitors.switched)
    assert torch.allclose(delta[MOVING], delta[FIXED_SOURCE] + switch, atol=1e-13, rtol=0)
    assert torch.equal(before[MOVING], before[FIXED_SOURCE])
    assert torch.equal(after[MOVING], after[FIXED_TARGET])


def test_without_a_switch_source_and_target_margins_are_equal() -> None:
    answer, source, target = ends(3, reads=50, change=0.3)
    competitors = competitors_of(answer, source, target)
    stay = ~competitors.switched
    assert 10 < int(stay.sum()) < 50
    for logits in (source, target):
        found = answer_scalars(logits, answer, competitors, VALUES)
        assert torch.equal(found[FIXED_SOURCE][stay], found[FIXED_TARGET][stay])
        assert not torch.equal(found[FIXED_SOURCE][~stay], found[FIXED_TARGET][~stay])
        old, new = found["source_best_wrong_logit"], found["target_best_wrong_logit"]
        assert torch.equal(old[stay], new[stay])


@given(seeds, st.integers(1, 7))
def test_the_best_wrong_values_are_sorted_and_hold_no_answer(seed: int, count: int) -> None:
    answer, logits, _ = ends(seed)
    tokens, best = top_wrong(logits, answer, VALUES, count)
    assert torch.equal(tokens[:, 0], read_answers(logits, answer, VALUES).competitor)
    for i, right in enumerate(answer.tolist()):
        wrong = sorted((float(logits[i, t]), t) for t in VALUES if t != right)[::-1][:count]
        assert list(zip(best[i].tolist(), tokens[i].tolist(), strict=True)) == wrong


@pytest.fixture(scope="module")
def batch(tiny: Benchmark) -> Examples:
    return tiny.task.examples(tiny.records("validation_iid")[:6])


@pytest.fixture(scope="module")
def model(tiny: Benchmark, make_config: Callable[..., TrainConfig]) -> HookedTransformer:
    size = tiny.vocabulary.size
    return build_model(
        make_config().model, vocabulary_size=size, seed=4, dtype=torch.float64
    ).requires_grad_(False)


def logits_at_reads(model: HookedTransformer, batch: Examples) -> Tensor:
    return torch.stack(
        [
            model(batch.tokens[row : row + 1])[0, pos]
            for row, pos in zip(batch.row, batch.at, strict=True)
        ]
    )


@pytest.mark.parametrize("name", [name for name in ANSWER_SCALARS if name != MOVING])
def test_a_scalar_for_attribution_reads_the_logits_at_the_predictions(
    name: str, model: HookedTransformer, batch: Examples, tiny: Benchmark
) -> None:
    values = tiny.vocabulary.value_ids
    frozen = torch.where(batch.answer == values[3], values[4], values[3])
    logits = logits_at_reads(model, batch)
    expected = fixed_scalars(logits, batch.answer, Competitors(frozen, frozen))[name]
    scalar = AnswerScalar(name, batch, frozen, values=values)
    assert torch.allclose(evaluate_scalar(scalar, model), expected, atol=1e-10)
    assert scalar.bind(model).constant


def test_source_competitors_are_taken_from_the_model_that_binds(
    model: HookedTransformer, batch: Examples, tiny: Benchmark
) -> None:
    values = tiny.vocabulary.value_ids
    seen = read_answers(logits_at_reads(model, batch), batch.answer, values)
    scalar = AnswerScalar(FIXED_SOURCE, batch, values=values)
    assert torch.allclose(evaluate_scalar(scalar, model), seen.margin, atol=1e-10)
    assert torch.equal(scalar.bind(model).competitors, seen.competitor)
    assert not scalar.bind(model).constant


def test_what_cannot_be_followed_is_refused(batch: Examples, tiny: Benchmark) -> None:
    values = tiny.vocabulary.value_ids
    for name, message in (
        (MOVING, "kink"),
        ("margin", "unknown answer scalar 'margin'"),
        (FIXED_TARGET, "needs the competitors at the target"),
    ):
        with pytest.raises(CircuitError, match=message):
            AnswerScalar(name, batch, values=values)
    with pytest.raises(CircuitError, match="expected one a read"):
        AnswerScalar(FIXED_SOURCE, batch, batch.answer[:2], values=values)
