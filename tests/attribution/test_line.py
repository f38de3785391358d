"""The straight line between two checkpoints: derivatives are right, and their integral closes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit.attribution import line as module
from circuit.attribution.line import MOST_INTERVALS, TOLERANCE, Line, Values
from circuit.model.build import build_model
from circuit.model.weights import load_tensors, named_tensors
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import Examples
from circuit.train_config import TrainConfig

SHAPE = {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32, "max_sequence_length": 40}
Weights = dict[str, Tensor]


def scalars(logits: Tensor) -> Values:
    return {"logit": logits[:, 7], "loss": logits[:, 9] - logits.logsumexp(-1)}


@pytest.fixture(scope="module")
def batch(tiny: Benchmark) -> Examples:
    return tiny.task.examples(tiny.records("validation_iid")[:7])


@pytest.fixture(scope="module")
def model(tiny: Benchmark, make_config: Callable[..., TrainConfig]) -> HookedTransformer:
    size, shape = tiny.vocabulary.size, make_config(model=SHAPE).model
    return build_model(shape, vocabulary_size=size, seed=1, dtype=torch.float64)


@pytest.fixture(scope="module")
def ends(model: HookedTransformer) -> tuple[Weights, Weights]:
    """The model's weights, and others at some distance."""
    source = {name: value.clone() for name, value in named_tensors(model).items()}
    generator = torch.Generator().manual_seed(2)
    noise = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in source.items()
    }
    return source, {name: value + 0.1 * noise[name] for name, value in source.items()}


def between(model: HookedTransformer, ends: tuple[Weights, Weights], batch: Examples) -> Line:
    return Line(model, *ends, batch.tokens, (batch.row, batch.at))


def direct(model: HookedTransformer, weights: Weights, batch: Examples) -> Tensor:
    """Logits at the reads, one record at a time, from a model with these weights."""
    own = named_tensors(model)
    kept = {name: value.clone() for name, value in own.items()}
    load_tensors(model, weights)
    with torch.no_grad():
        found = [
            model(batch.tokens[row : row + 1])[0, pos]
            for row, pos in zip(batch.row, batch.at, strict=True)
        ]
    load_tensors(model, kept)
    return torch.stack(found)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_logits_along_the_line_are_the_models_whatever_the_chunks(
    model: HookedTransformer,
    ends: tuple[Weights, Weights],
    batch: Examples,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    line = between(model, ends, batch)
    for weights, logits in zip(ends, line.ends, strict=True):
        assert torch.allclose(logits, direct(model, weights, batch), atol=1e-12)


def test_rows_without_an_example_are_not_needed(
    model: HookedTransformer, ends: tuple[Weights, Weights], batch: Examples
) -> None:
    some = batch.select(batch.row % 2 == 1)
    line = between(model, ends, some)
    assert torch.allclose(line.ends[0], direct(model, ends[0], some), atol=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.3, 1.0])
def test_the_derivative_equals_finite_differences(
    model: HookedTransformer, ends: tuple[Weights, Weights], batch: Examples, s: float
) -> None:
    line, step = between(model, ends, batch), 1e-5
    near = [
        scalars(line.logits({n: v + (s + d) * line.delta[n] for n, v in ends[0].items()}))
        for d in (step, -step)
    ]
    for name, value in line.derivatives(scalars, s).items():
        difference = (near[0][name] - near[1][name]) / (2 * step)
        assert torch.allclose(value, difference, atol=1e-6, rtol=1e-6)


def test_first_order_is_gradient_times_change(
    model: HookedTransformer, ends: tuple[Weights, Weights], batch: Examples
) -> None:
    line = between(model, ends, batch)
    logits = model(batch.tokens)[batch.row, batch.at]
    for name, value in line.derivatives(scalars, 0.0).items():
        for i in (0, len(value) - 1):
            scalar = scalars(logits)[name][i]
            gradient = torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True)
            dots = [(g * line.delta[n]).sum() for g, n in zip(gradient, ends[0], strict=True)]
            assert float(sum(dots)) == pytest.approx(float(value[i]), abs=1e-10)


def test_the_integral_closes_and_its_parts_are_the_change(
    model: HookedTransformer, ends: tuple[Weights, Weights], batch: Examples
) -> None:
    found = between(model, ends, batch).integrate(scalars)
    assert found.closed
    for name, actual in found.actual.items():
        gap = found.gap[name]
        assert gap is not None
        assert gap <= TOLERANCE
        sum_of_parts = found.first_order[name] + found.curvature[name]
        missed = float((sum_of_parts - actual).abs().mean() / actual.abs().mean())
        assert missed == pytest.approx(gap, abs=1e-12)
        assert float((found.first_order[name] - actual).abs().mean()) > 10 * gap


def test_nodes_are_doubled_until_it_closes_and_no_further_than_the_limit(
    model: HookedTransformer,
    ends: tuple[Weights, Weights],
    batch: Examples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 1e-9)
    precise = between(model, ends, batch).integrate(scalars)
    assert precise.closed
    assert 3 < precise.nodes < MOST_INTERVALS
    monkeypatch.setattr(module, "MOST_INTERVALS", 2)
    rough = between(model, ends, batch).integrate(scalars)
    assert not rough.closed
    assert rough.nodes == 3


def test_a_refined_integral_takes_no_derivative_twice(
    model: HookedTransformer,
    ends: tuple[Weights, Weights],
    batch: Examples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 1e-9)
    taken: list[float] = []
    told: list[tuple[int, int]] = []
    derivatives = Line.derivatives
    monkeypatch.setattr(
        Line, "derivatives", lambda self, f, s: (taken.append(s), derivatives(self, f, s))[1]
    )
    found = between(model, ends, batch).integrate(scalars, lambda *at: told.append(at))
    assert len(taken) == len(set(taken)) == found.nodes
    assert told[-1] == (found.nodes, found.nodes)


def test_logits_that_are_known_are_not_computed_again(
    model: HookedTransformer, ends: tuple[Weights, Weights], batch: Examples
) -> None:
    known = between(model, (ends[1], ends[0]), batch).ends[1]
    places = (batch.row, batch.at)
    line = Line(model, *ends, batch.tokens, places, source_logits=known)
    assert line.ends[0] is known
    assert torch.equal(known, between(model, ends, batch).ends[0])


def test_nothing_changes_on_a_line_of_no_length(
    model: HookedTransformer, ends: tuple[Weights, Weights], batch: Examples
) -> None:
    found = between(model, (ends[0], ends[0]), batch).integrate(scalars)
    assert found.closed
    assert all(gap is None for gap in found.gap.values())
    for part in (found.first_order, found.curvature, found.actual):
        assert not any(bool(value.any()) for value in part.values())


def test_the_models_own_weights_stay_as_they_are(
    model: HookedTransformer, ends: tuple[Weights, Weights], batch: Examples
) -> None:
    between(model, (ends[1], ends[0]), batch).integrate(scalars)
    for name, value in named_tensors(model).items():
        assert torch.equal(value, ends[0][name])
