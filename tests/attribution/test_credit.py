"""Credit adds up to what happened, and is what momentum buffers of single examples give."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory import InMemory
from torch import Tensor
from torch.nn import functional

from circuit.attribution.backward import Stack
from circuit.attribution.credit import Credit, CreditPass, StepCredit, credit
from circuit.attribution.losses import By
from circuit.attribution.window import attributor_of
from circuit.errors import CircuitError
from circuit.scalars.loss import LossScalar
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import UNPREDICTED
from circuit.train_config import TrainConfig
from circuit.training.setup import Setup

ADAMW = {"name": "adamw", "learning_rate": 0.01, "beta1": 0.8, "weight_decay": 0.1}
SGD = {"name": "sgd", "learning_rate": 0.3, "momentum": 0.7, "weight_decay": 0.01}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw, clipped, warm-up and decaying rate": {
        "optimizer": ADAMW,
        "gradient_clip": 0.2,
        "schedule": {"name": "cosine", "warmup_steps": 2, "floor": 0.1},
    },
    "sgd with momentum and decay, clipped": {"optimizer": SGD, "gradient_clip": 0.2},
    "sgd alone": {"optimizer": {**SGD, "momentum": 0.0}},
    "examples twice in a batch": {"optimizer": ADAMW, "batch_size": 64},
}
WITH_MOMENTUM = pytest.mark.parametrize("run", list(RECIPES)[:2], indirect=True)
STEPS = 4


@pytest.fixture(params=RECIPES, scope="module")
def run(
    request: pytest.FixtureRequest, make_config: Callable[..., TrainConfig], tiny: Benchmark
) -> Any:
    return InMemory(Setup(make_config(**RECIPES[request.param]), benchmark=tiny))


@pytest.fixture(scope="module")
def scalars(tiny: Benchmark) -> list[LossScalar]:
    batch = tiny.task.examples(tiny.records("validation_iid")[:4])
    return [LossScalar(batch), LossScalar(batch, "answer")]


def passed(
    run: Any, scalars: list[LossScalar], start: int, end: int, by: By = "example", **options: Any
) -> tuple[CreditPass, dict[int, StepCredit]]:
    options = {"rule": "simpson", "dtype": torch.float64, **options}
    attributor = attributor_of(run, scalars, averages=True, **options)
    whole = CreditPass(run, attributor, start, end, by)
    return whole, {one.step: one for one in whole}


def test_it_adds_up_to_what_happened(run: Any, scalars: list[LossScalar]) -> None:
    by_example, steps = passed(run, scalars, 1, STEPS, rule="gauss:3")
    assert list(steps) == [4, 3, 2]
    totals = by_example.totals
    assert float(totals.closure.max()) < 1e-6
    assert float(totals.examples_error.max()) < 1e-6
    assert float(totals.inherited.abs().min()) > 0 or not run.setup.config.optimizer.momentum
    by_position, finer = passed(run, scalars, 1, STEPS, "position", rule="gauss:3")
    torch.testing.assert_close(by_position.totals.predicted, totals.predicted)
    for step, one in steps.items():
        torch.testing.assert_close(finer[step].credit.sum(2, keepdim=True), one.credit)


def direct(run: Any, scalar: LossScalar, start: int, end: int) -> dict[int, Tensor]:
    """Buffers of single examples, moved forwards: `[example]` by step."""
    model = run.setup.initial_model().double()
    parameters = list(model.parameters())

    def load(theta: Tensor) -> None:
        parts = torch.split(theta.double(), [p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.copy_(part.view(parameter.shape))

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])

    def of_scalar(theta: Tensor) -> Tensor:
        load(theta)
        tokens = torch.zeros(len(scalar.needs.sequences), 40, dtype=torch.int64)
        for row, sequence in enumerate(scalar.needs.sequences):
            tokens[row, : len(sequence)] = torch.tensor(sequence)
        cache = {"unembed.hook_out": model(tokens)} | dict.fromkeys(
            scalar.needs.hooks, model(tokens)
        )
        return gradient(scalar.values(model, cache).mean())  # type: ignore[arg-type]

    settings = run.setup.config.optimizer
    buffers: dict[int, Tensor] = {}
    found: dict[int, Tensor] = {}
    for step in run.replay(start, end):
        theta, after = step.before.parameters.double(), step.after.parameters.double()
        nodes = ((theta, 1 / 6), ((theta + after) / 2, 4 / 6), (after, 1 / 6))
        average = sum(weight * of_scalar(node) for node, weight in nodes)
        load(theta)
        tokens, targets = step.tokens, step.outcome.batch.targets
        one = []
        for row, goal in zip(tokens, targets, strict=True):
            loss = functional.cross_entropy(
                model(row[None, :-1])[0], goal, ignore_index=UNPREDICTED, reduction="sum"
            )
            one.append(gradient(loss / (targets != UNPREDICTED).sum()))
        fresh = torch.stack(one) * min(
            1.0, (run.setup.config.gradient_clip or 1e9) / step.grad_norm
        )
        if settings.name == "adamw":
            buffers = {at: settings.beta1 * past for at, past in buffers.items()}
            buffers[step.step] = (1 - settings.beta1) * fresh
            root = step.after.moments["exp_avg_sq"].double().sqrt()
            root = root / (1 - settings.beta2**step.step) ** 0.5 + settings.eps
            moves = {
                a: -step.lr * m / (1 - settings.beta1**step.step) / root for a, m in buffers.items()
            }
        else:
            buffers = {at: settings.momentum * past for at, past in buffers.items()}
            buffers[step.step] = fresh
            moves = {at: -step.lr * past for at, past in buffers.items()}
        for at, move in moves.items():
            found[at] = found.get(at, 0.0) + move @ average
    return found


@WITH_MOMENTUM
def test_it_is_what_buffers_of_single_examples_give(run: Any, scalars: list[LossScalar]) -> None:
    expected = direct(run, scalars[1], 1, STEPS)
    _, steps = passed(run, scalars, 1, STEPS)
    assert list(steps) == list(expected)[::-1]
    for step, shares in expected.items():
        torch.testing.assert_close(steps[step].credit[1, :, 0], shares, rtol=1e-6, atol=1e-12)


@WITH_MOMENTUM
def test_windows_join(run: Any, scalars: list[LossScalar]) -> None:
    """The later part of a window is as it is alone; what it inherits the earlier part explains."""
    (whole, steps), (early, _), (late, alone) = (
        passed(run, scalars, *window) for window in ((0, STEPS), (0, 2), (2, STEPS))
    )
    for step, one in alone.items():
        assert torch.equal(one.credit, steps[step].credit)
    joined = early.totals.predicted + late.totals.predicted
    torch.testing.assert_close(whole.totals.predicted, joined, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(whole.totals.actual, early.totals.actual + late.totals.actual)


def test_where_the_stretches_are_cut_changes_no_bit(
    make_config: Callable[..., TrainConfig], tiny: Benchmark, scalars: list[LossScalar]
) -> None:
    setup = Setup(make_config(optimizer=ADAMW), benchmark=tiny)
    results: list[Credit] = []
    for anchors in ([0], [0, 1, 2, 3]):
        run: Any = InMemory(setup, anchors)
        results.append(credit(run, scalars, 0, STEPS)["loss.full_lm"])
    one, other = results
    assert (one.steps, one.examples, one.totals) == (other.steps, other.examples, other.totals)
    assert torch.equal(one.credit, other.credit)
    assert one.steps == sorted(one.steps)
    sums = one.by_example()
    assert list(sums.values()) == sorted(sums.values(), reverse=True)
    assert sum(sums.values()) == pytest.approx(one.totals["credit"])
    with pytest.raises(CircuitError, match="by 'token'; expected example or position"):
        passed(run, scalars, 0, STEPS, "token")  # type: ignore[arg-type]


def test_a_stack_gives_back_what_was_put_on_it() -> None:
    pushed = [
        [torch.randn(3), torch.randn(2, 2, dtype=torch.float64)],
        [torch.arange(4), torch.randn(0)],
    ]
    with Stack() as stack:
        for tensors in pushed:
            stack.push(tensors)
        for tensors in reversed(pushed):
            back = stack.pop()
            assert [t.dtype for t in back] == [t.dtype for t in tensors]
            assert all(map(torch.equal, back, tensors))


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_full_disk_under_a_stack_is_one_line(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tensor would have stayed in a buffer until the file is closed."""
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(Path("/dev/full").open, "wb"))
    told = pytest.raises(CircuitError, match=r"could not be written \(No space left.*TMPDIR")
    with told, Stack() as stack:
        stack.push([torch.zeros(size)])
