"""States say what is known of the optimizer, and no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from circuit.core.digests import tensor_digest
from circuit.core.state import MOMENT_STAGES, FlatState, Moments, State
from circuit.errors import CircuitError
from circuit.training.session import TrainingSession


def tensors(scale: float = 1.0) -> dict[str, Tensor]:
    return {"a": scale * torch.arange(1.0, 7.0).view(2, 3), "b": scale * torch.ones(2)}


@pytest.mark.parametrize(
    ("step", "moments", "what"),
    [
        (3, None, "no optimizer moments"),
        (0, None, "no optimizer moments"),
        (3, {"exp_avg": tensors(), "exp_avg_sq": tensors(0)}, "exp_avg_sq that is zero in every"),
        (3, {"momentum_buffer": tensors(0)}, "momentum_buffer that is zero in every"),
    ],
)
def test_a_state_without_a_past_is_refused_where_one_is_needed(
    step: int, moments: Moments | None, what: str
) -> None:
    state = State(step, tensors(), moments)
    for use in (state.past_moments, lambda: FlatState.of(state)):
        with pytest.raises(CircuitError, match=f"the state of step {step} holds {what}"):
            use()


@pytest.mark.parametrize(
    ("step", "moments"),
    [
        (0, {"momentum_buffer": tensors(0)}),
        (3, {}),
        (3, {"exp_avg": tensors(0), "exp_avg_sq": tensors()}),
    ],
)
def test_vectors_of_a_state_hold_its_numbers_in_order(step: int, moments: Moments) -> None:
    flat = FlatState.of(State(step, tensors(), moments))
    assert flat.step == step
    assert flat.parameters.tolist() == [1, 2, 3, 4, 5, 6, 1, 1]
    for name, values in moments.items():
        assert flat.moments[name].tolist() == [x for t in values.values() for x in t.flatten()]
    assert flat.stages() == {
        "parameters": tensor_digest(flat.parameters),
        **{MOMENT_STAGES[name]: tensor_digest(vector) for name, vector in flat.moments.items()},
    }


def test_the_state_of_a_run_is_a_state(session_after: Callable[..., TrainingSession]) -> None:
    state = session_after(2).state()
    assert isinstance(state, State)
    plain = State(state.step, state.parameters, state.moments)
    assert FlatState.of(plain).stages() == FlatState.of(state).stages()
