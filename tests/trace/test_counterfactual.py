"""A training with nothing otherwise is the run; one with something otherwise starts at the edit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import RUN, traced_once, trained, trained_once
from torch import Tensor

from circuit.attribution.counterfactual import counterfactual
from circuit.core.edit import Edit
from circuit.core.state import FlatState
from circuit.errors import CircuitError
from circuit.runs.opening import open_run
from circuit.scalars.loss import LossScalar
from circuit.trace.replay import ReplayedRun
from circuit.training.session import TrainingSession

__all__ = ["traced_once", "trained", "trained_once"]
END = 9
MOMENTUM = "adam_historical_momentum"


@pytest.fixture(scope="module")
def run(traced_once: Path) -> ReplayedRun:
    return ReplayedRun.open(traced_once)


def batch_of(run: ReplayedRun, step: int) -> tuple[str, ...]:
    (traced,) = run.replay(step - 1, step)
    return traced.objective.ids


def equal(one: FlatState, other: FlatState) -> bool:
    return one.stages() == other.stages()


def test_an_edit_that_changes_nothing_is_the_run(run: ReplayedRun) -> None:
    actual = FlatState.of(run.state(END))
    one, *_ = batch_of(run, 6)
    terms = dict.fromkeys(("weight_decay", "adam_current_gradient", MOMENTUM, "rounding"), 1.0)
    for edit in (
        Edit(5, END),
        Edit(0, END, examples={one: 1.0}),
        Edit(2, 4, terms=terms),
        Edit(5, 6, examples={one: 1.0}, terms=terms),
    ):
        assert equal(run.counterfactual(edit, END), actual), edit


def test_every_kind_of_edit_changes_the_steps_from_its_own_on(run: ReplayedRun) -> None:
    one, *_ = batch_of(run, 6)
    ends = []
    for edit in (
        Edit(5, 6, examples={one: 0.0}),
        Edit(5, 6, examples={one: 1.5}),
        *(Edit(5, 6, terms={term: 0.0}) for term in ("weight_decay", MOMENTUM)),
        Edit(5, 6, terms={"weight_decay": 2.0}),
    ):
        otherwise = run.counterfactual(edit, END)
        assert otherwise.step == END
        ends.append(otherwise.stages()["parameters"])
        before = Edit(edit.start - 2, edit.end, edit.examples, edit.terms)
        assert before.holds(4)
        assert not edit.holds(5)
    assert len(set(ends)) == len(ends)
    assert FlatState.of(run.state(END)).stages()["parameters"] not in ends


def test_without_a_term_the_step_is_the_sum_of_the_others(run: ReplayedRun) -> None:
    (traced,) = run.replay(5, 6)
    terms = traced.update.named()
    for term in terms:
        otherwise = run.counterfactual(Edit(5, 6, terms={term: 0.0}), 6).parameters
        rest = sum(vector for name, vector in terms.items() if name != term)
        expected = (traced.before.parameters.double() + rest).float()
        torch.testing.assert_close(otherwise, expected, rtol=1e-6, atol=1e-7)


def test_removed_examples_leave_the_number_of_targets(
    session_after: Callable[..., TrainingSession],
) -> None:
    """So the gradient of a batch is the sum of those of its examples alone."""
    session = session_after(3)

    def gradient(weights: Tensor | None) -> Tensor:
        fresh, parts = copy.deepcopy(session), []
        parameters = list(fresh.model.parameters())

        def look() -> None:
            parts.extend(p.grad.flatten().clone() for p in parameters if p.grad is not None)

        fresh.advance(weights=weights, on_gradient=look)
        return torch.cat(parts)

    alone = [gradient(row) for row in torch.eye(len(session.recipe.indices(4)))]
    torch.testing.assert_close(torch.stack(alone).sum(0), gradient(None), rtol=1e-4, atol=1e-6)


def test_it_says_what_the_scalars_become(run: ReplayedRun) -> None:
    task = run.setup.benchmark.task
    scalar = LossScalar(task.examples(run.setup.benchmark.records("validation_iid")[:4]))
    one, *_ = batch_of(run, 6)
    null, edited = counterfactual(
        run, [Edit(5, 6), Edit(5, END, examples={one: 0.0})], [scalar], END
    )
    assert null.changes == {scalar.name: 0.0}
    assert edited.changes[scalar.name] != 0
    assert torch.equal(null.actual, edited.actual)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"examples": {"nobody": 0.0}}, "'nobody' occurs in no step of 5:9"),
        ({"terms": {"decay": 0.0}}, "no term 'decay'; expected one of weight_decay, adam_current"),
        ({"end": 10}, "an edit of steps 5:10; expected steps up to 9, the end"),
        ({"end": 5}, "an edit of steps 5:5; expected start < end"),
        ({"examples": {"x": float("nan")}}, "factor nan of x; expected a finite number"),
    ],
)
def test_what_there_is_not_is_refused(run: ReplayedRun, edit: dict[str, object], said: str) -> None:
    with pytest.raises(CircuitError, match=said):
        run.counterfactual(Edit(**{"start": 5, "end": END, **edit}), END)  # type: ignore[arg-type]


@pytest.mark.usefixtures("trained")
def test_checkpoints_alone_cannot() -> None:
    with pytest.raises(CircuitError, match="cannot be executed again from checkpoints alone"):
        open_run(RUN).counterfactual(Edit(3, 6), 9)
