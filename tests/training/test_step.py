"""One optimizer step against formulas written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from circuit.config import parse_config
from circuit.errors import CircuitError
from circuit.model.weights import named_tensors
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import UNPREDICTED
from circuit.train_config import TrainConfig
from circuit.training.optimizers import build_optimizer, learning_rate, read_moments
from circuit.training.session import TrainingSession
from circuit.training.step import next_token_loss

MakeConfig = Callable[..., TrainConfig]
SessionAfter = Callable[..., TrainingSession]
Tensors = dict[str, Tensor]

ADAMW = {"name": "adamw", "learning_rate": 0.01}
SGD = {"name": "sgd", "learning_rate": 0.1}


def naive_rate(config: TrainConfig, t: int) -> float:
    """Definitions, section 4, with the decay written as interpolation between two rates."""
    base = config.optimizer.learning_rate
    warmup, last = config.schedule.warmup_steps, config.steps
    if t <= warmup:
        return base * t / warmup
    floor = config.schedule.floor * base
    share = (t - warmup) / (last - warmup)
    if config.schedule.name == "linear":
        return (1 - share) * base + share * floor
    if config.schedule.name == "cosine":
        return floor + (base - floor) * 0.5 * (1 + math.cos(math.pi * share))
    return base


@given(
    name=st.sampled_from(["constant", "linear", "cosine"]),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 60),
    floor=st.floats(0, 1),
)
def test_the_learning_rate_is_the_definitions(
    make_config: MakeConfig, name: str, steps: int, warmup: int, floor: float
) -> None:
    warmup = min(warmup, steps)
    schedule = {"name": name, "warmup_steps": warmup, "floor": floor}
    config = make_config(steps=steps, schedule=schedule)
    base = config.optimizer.learning_rate
    rates = [learning_rate(config, t) for t in range(1, steps + 1)]
    assert rates == pytest.approx([naive_rate(config, t) for t in range(1, steps + 1)], rel=1e-12)
    assert all(a <= b for a, b in pairwise(rates[: max(warmup - 1, 0)]))
    after = rates[max(warmup - 1, 0) :]
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(after))
    if warmup:
        assert rates[warmup - 1] == pytest.approx(base, rel=1e-15)
    if steps > warmup:
        assert rates[-1] == pytest.approx(base if name == "constant" else floor * base, abs=1e-15)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_the_loss_is_the_mean_over_what_is_to_be_predicted(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    logits = torch.randn(len(lengths), width, 9, generator=generator, dtype=torch.float64)
    targets = torch.randint(1, 9, (len(lengths), width), generator=generator)
    losses = []
    for row, length in enumerate(lengths):
        targets[row, length:] = UNPREDICTED
        for position in range(length):
            scores = logits[row, position].tolist()
            total = math.log(math.fsum(math.exp(score) for score in scores))
            losses.append(total - scores[int(targets[row, position])])
    expected = math.fsum(losses) / len(losses)
    assert float(next_token_loss(logits, targets)) == pytest.approx(expected, rel=1e-12)


def test_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(Exception, match="next_token_loss"):
        next_token_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))


def gradients_of(session: TrainingSession) -> Tensors:
    found = {}
    for name, parameter in session.model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.detach().clone()
    return found


def step_with_gradients(session: TrainingSession) -> tuple[Any, Tensors, Tensors]:
    """Advances; the raw gradients, and those that the optimizer saw."""
    raw: Tensors = {}
    outcome = session.advance(on_gradient=lambda: raw.update(gradients_of(session)))
    return outcome, raw, gradients_of(session)


@pytest.mark.parametrize("clip", [None, 0.05, 1.0, 1e6])
def test_the_gradient_is_clipped_by_the_factor_of_the_definitions(
    session_after: SessionAfter, clip: float | None
) -> None:
    session = session_after(1, gradient_clip=clip)
    for _ in range(2):
        outcome, raw, clipped = step_with_gradients(session)
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in raw.values()))
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        assert (factor == 1.0) == (clip in (None, 1e6) or norm + 1e-6 <= clip)
        assert float(outcome.grad_norm) == pytest.approx(norm, rel=1e-5)
        assert outcome.clip_factor == pytest.approx(factor, rel=1e-5)
        for name, gradient in raw.items():
            torch.testing.assert_close(clipped[name], gradient * factor, rtol=1e-5, atol=1e-9)
            if factor == 1.0:
                assert torch.equal(clipped[name], gradient)


def test_the_outcome_is_of_the_batch_before_the_update(session_after: SessionAfter) -> None:
    session = session_after(2)
    batch = session.recipe.examples(3)
    with torch.no_grad():
        logits = session.model(batch.tokens[:, :-1])
    outcome = session.advance()
    assert outcome.step == session.step == 3
    assert torch.equal(outcome.outputs, logits)
    assert torch.equal(outcome.loss, next_token_loss(logits, batch.targets()))
    assert not outcome.outputs.requires_grad
    assert not outcome.loss.requires_grad


def doubled(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().double().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta1": 0.0},
        {"beta2": 0.999, "weight_decay": 0.0},
        {"weight_decay": 0.5, "eps": 1e-3},
    ],
)
def test_adamw_is_the_definitions_in_float64(
    session_after: SessionAfter, changes: dict[str, float]
) -> None:
    session = session_after(0, optimizer={**ADAMW, **changes}, schedule={"warmup_steps": 3})
    optimizer = session.config.optimizer
    assert optimizer.name == "adamw"
    b1, b2 = optimizer.beta1, optimizer.beta2
    m: Tensors = {}
    v: Tensors = {}
    for t in range(1, 6):
        before = doubled(named_tensors(session.model))
        outcome, _, clipped = step_with_gradients(session)
        assert outcome.lr == naive_rate(session.config, t)
        after = doubled(named_tensors(session.model))
        for name, g in doubled(clipped).items():
            m[name] = b1 * m.get(name, torch.zeros_like(g)) + (1 - b1) * g
            v[name] = b2 * v.get(name, torch.zeros_like(g)) + (1 - b2) * g**2
            denominator = v[name].sqrt() / math.sqrt(1 - b2**t) + optimizer.eps
            update = -outcome.lr * optimizer.weight_decay * before[name]
            update -= outcome.lr / (1 - b1**t) * m[name] / denominator
            expected = before[name] + update
            # one ulp of the parameter, and float32 arithmetic within the update
            bound = 2**-23 * before[name].abs() + 1e-4 * update.abs() + 1e-9
            assert ((after[name] - expected).abs() <= bound).all(), name
        moments = read_moments(session.model, session.optimizer, optimizer)
        for name in m:
            torch.testing.assert_close(
                moments["exp_avg"][name].double(), m[name], rtol=1e-4, atol=1e-8
            )
            torch.testing.assert_close(
                moments["exp_avg_sq"][name].double(), v[name], rtol=1e-4, atol=1e-12
            )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_is_the_definitions_in_float64(
    session_after: SessionAfter, momentum: float, weight_decay: float
) -> None:
    session = session_after(
        0, optimizer={**SGD, "momentum": momentum, "weight_decay": weight_decay}
    )
    buffers: Tensors = {}
    for _ in range(4):
        before = doubled(named_tensors(session.model))
        outcome, _, clipped = step_with_gradients(session)
        after = doubled(named_tensors(session.model))
        for name, g in doubled(clipped).items():
            decayed = g + weight_decay * before[name]
            buffers[name] = momentum * buffers.get(name, torch.zeros_like(g)) + decayed
            update = -outcome.lr * buffers[name]
            bound = 2**-23 * before[name].abs() + 1e-5 * update.abs() + 1e-9
            assert ((after[name] - before[name] - update).abs() <= bound).all(), name
    moments = read_moments(session.model, session.optimizer, session.config.optimizer)
    assert list(moments) == (["momentum_buffer"] if momentum else [])
    if momentum:
        for name, buffer in buffers.items():
            torch.testing.assert_close(
                moments["momentum_buffer"][name].double(), buffer, rtol=1e-4, atol=1e-7
            )


@pytest.mark.parametrize("optimizer", [ADAMW, SGD, {**SGD, "momentum": 0.9}])
def test_two_runs_have_equal_bits(session_after: SessionAfter, optimizer: dict[str, Any]) -> None:
    torch.manual_seed(1)
    first = session_after(5, optimizer=optimizer).state()
    torch.manual_seed(2)
    second = session_after(5, optimizer=optimizer).state()
    start = session_after(0, optimizer=optimizer).state()
    for name, tensor in first.parameters.items():
        assert torch.equal(tensor, second.parameters[name])
        # the softmax does not see b_K, whose gradient is rounding alone
        assert name.endswith("b_K") or not torch.equal(tensor, start.parameters[name])
    assert list(first.moments) == list(second.moments)
    for moment, tensors in first.moments.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.moments[moment][name])


def test_the_last_token_of_a_batch_is_a_target_only(
    session_after: SessionAfter, tiny: Benchmark
) -> None:
    """A step sees the batch's examples, whole, and nothing of the padding."""
    session = session_after(0)
    for step in (1, 2, 9):
        batch = session.recipe.examples(step)
        records = tiny.records("train")
        for row, index in enumerate(session.recipe.indices(step)):
            length = int(batch.lengths[row])
            assert tuple(batch.tokens[row, :length].tolist()) == records[index].tokens
            assert (batch.tokens[row, length:] == batch.task.vocabulary.pad).all()


def test_the_shares_of_the_examples_sum_to_the_loss(session_after: SessionAfter) -> None:
    """And so do their gradients: what credits examples divides what the step differentiates."""
    session = session_after(3)
    recipe, batch = session.recipe, session.recipe.batch(4)
    gradients = []
    for of in (recipe.loss, lambda outputs, batch: recipe.losses(outputs, batch).sum()):
        session.model.zero_grad()
        loss = of(recipe.outputs(session.model, batch), batch)
        loss.backward()
        gradients.append([loss.item(), *(p.grad.clone() for p in session.model.parameters())])
    (whole, *expected), (summed, *shares) = gradients
    assert summed == pytest.approx(whole, rel=1e-6)
    for one, other in zip(expected, shares, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    losses = recipe.losses(recipe.outputs(session.model, batch), batch)
    assert losses.shape == batch.targets.shape
    assert (losses[batch.targets == UNPREDICTED] == 0).all()
    assert (losses[batch.targets != UNPREDICTED] > 0).all()


extremes = st.sampled_from([0.0, 1e-38, 1e-8, 0.01, 1.0, 1e19, 3e37, 3e38])


@given(
    name=st.sampled_from(["adamw", "sgd"]),
    rate=extremes,
    decay=extremes,
    beta=st.sampled_from([0.0, 0.5, 0.9, 1 - 2**-53]),
    warmup=st.integers(0, 3),
)
def test_torch_takes_the_step_of_every_optimizer_that_a_config_may_name(
    train_payload: Callable[..., dict[str, Any]],
    name: str,
    rate: float,
    decay: float,
    beta: float,
    warmup: int,
) -> None:
    optimizer = {"name": name, "learning_rate": rate, "weight_decay": decay}
    optimizer["beta1" if name == "adamw" else "momentum"] = beta
    payload = train_payload(optimizer=optimizer, schedule={"warmup_steps": warmup})
    try:
        config = parse_config(payload, TrainConfig, where="test")
    except CircuitError:
        return
    model = torch.nn.Linear(1, 1)
    taken = build_optimizer(model, config.optimizer)
    for step in (1, 2):
        taken.param_groups[0]["lr"] = learning_rate(config, step)
        model(torch.ones(1)).sum().backward()
        taken.step()  # raises where a factor is beyond float32
