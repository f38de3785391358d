"""Influence is what central differences of whole float64 trainings give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from in_memory import InMemory
from torch import Tensor

from circuit.attribution.attribute import Attributor
from circuit.attribution.influence import InfluencePass, influence
from circuit.attribution.losses import Losses
from circuit.attribution.window import attributor_of
from circuit.core.edit import Edit
from circuit.errors import CircuitError
from circuit.scalars.base import measured
from circuit.scalars.loss import LossScalar
from circuit.tasks.benchmark import Benchmark
from circuit.trace.step import TracedStep
from circuit.train_config import TrainConfig
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

ADAMW = {"name": "adamw", "learning_rate": 0.01, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1}
SGD = {"name": "sgd", "learning_rate": 0.3, "momentum": 0.7, "weight_decay": 0.01}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw, clipped, warm-up and decaying rate": {
        "optimizer": ADAMW,
        "gradient_clip": 0.2,
        "schedule": {"name": "cosine", "warmup_steps": 2, "floor": 0.1},
    },
    "sgd with momentum and decay, clipped": {"optimizer": SGD, "gradient_clip": 0.2},
    "adamw, examples twice in a batch": {"optimizer": ADAMW, "batch_size": 64},
}
START, END = 3, 7


@dataclass
class InFloat64(InMemory):
    """A run that trains in float64, whose examples may have weights after `START`."""

    anchors: list[int] = field(default_factory=lambda: [0, 5])

    def session(self, edit: Edit | None = None) -> TrainingSession:
        session = super().session(edit)
        session.model.to(torch.float64, print_details=False)
        return session

    def end(self, weights: Mapping[str, float]) -> Tensor:
        session = self.session(Edit(START, END, examples=weights))
        for _ in range(END):
            session.advance()
        return torch.cat([p.detach().reshape(-1) for p in session.model.parameters()])


@pytest.fixture(params=RECIPES, scope="module")
def run(
    request: pytest.FixtureRequest, make_config: Callable[..., TrainConfig], tiny: Benchmark
) -> Any:
    return InFloat64(Setup(make_config(**RECIPES[request.param]), benchmark=tiny))


@pytest.fixture(scope="module")
def scalars(tiny: Benchmark) -> list[LossScalar]:
    batch = tiny.task.examples(tiny.records("validation_iid")[:4])
    return [LossScalar(batch), LossScalar(batch, "answer")]


def test_it_equals_central_differences_of_whole_trainings(
    run: Any, scalars: list[LossScalar]
) -> None:
    taken = influence(run, scalars, START, END, dtype=torch.float64)
    attributor = attributor_of(run, scalars, dtype=torch.float64)
    one = taken[scalars[0].name]
    chosen = list(one.by_example())
    for name in (chosen[0], chosen[len(chosen) // 2], chosen[-1]):
        small = 1e-4
        ends = [values_at(attributor, run.end({name: 1 + sign * small})) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * small)
        slopes = [taken[scalar.name].by_example()[name] for scalar in scalars]
        found = torch.tensor(slopes, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def values_at(attributor: Attributor, theta: Tensor) -> Tensor:
    return attributor.values(theta, attributor.bind(theta))


@pytest.mark.parametrize("run", list(RECIPES)[:2], indirect=True)
def test_a_later_window_is_the_later_part(run: Any, scalars: list[LossScalar]) -> None:
    """Where a pass begins decides nothing of the steps that it shares with another."""
    passes = [
        InfluencePass(run, attributor_of(run, scalars, dtype=torch.float64), start, END)
        for start in (START, START + 2)
    ]
    whole, late = ({one.step: one for one in each} for each in passes)
    assert [*whole] == [7, 6, 5, 4]
    assert [*late] == [7, 6]
    for step, one in late.items():
        assert torch.equal(one.influence, whole[step].influence)
        assert torch.equal(one.growth, whole[step].growth)
        positions = run_step(run, step).outcome.batch.targets.shape
        assert one.influence.shape[1:] == positions
    assert torch.equal(passes[0].value, passes[1].value)


@pytest.mark.parametrize("run", list(RECIPES)[:1], indirect=True)
def test_a_scalar_without_a_slope_is_refused(run: Any) -> None:
    def flat(model: Any) -> Tensor:
        return (model.W_E * 0).sum()

    with pytest.raises(CircuitError, match="the gradient of scalar flat at step 7 is zero"):
        influence(run, [measured(flat)], START, END)


def run_step(run: Any, step: int) -> TracedStep:
    (traced,) = run.replay(step - 1, step)
    return traced


def test_in_float32_it_is_the_same_to_its_precision(
    make_config: Callable[..., TrainConfig], tiny: Benchmark, scalars: list[LossScalar]
) -> None:
    run: Any = InFloat64(Setup(make_config(optimizer=ADAMW), benchmark=tiny))
    exact, single = (
        influence(run, scalars, START, END, dtype=dtype)[scalars[0].name]
        for dtype in (torch.float64, torch.float32)
    )
    assert exact.examples == single.examples
    assert exact.steps == single.steps == sorted(exact.steps)
    assert float((exact.influence - single.influence).norm() / exact.influence.norm()) < 1e-3
    assert single.growth.keys() == {4, 5, 6, 7}


def test_a_parameter_that_the_losses_do_not_read_changes_nothing() -> None:
    """Neither the derivatives by the others nor those by the losses' weights."""

    class Cubed(torch.nn.Module):
        def __init__(self, *, spare: bool) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64))
            if spare:
                self.unread = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.w) ** 3

    class Summed:
        inputs = (torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64),)

        def losses(self, model: Callable[[Tensor], Tensor], *inputs: Tensor) -> Tensor:
            return model(*inputs).sum(1)

    def taken(*, spare: bool) -> tuple[Tensor, Tensor]:
        module: Any = Cubed(spare=spare)
        objective: Any = Summed()
        theta = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
        losses = Losses(module)
        return losses.back(losses.gradient(objective, theta), lambda gradient: gradient[None])

    (curved, shares), (more, same) = taken(spare=False), taken(spare=True)
    assert torch.equal(same, shares)
    assert torch.equal(more, torch.nn.functional.pad(curved, (0, 3)))
