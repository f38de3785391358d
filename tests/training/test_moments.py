"""Moments from which no step can be taken are refused by whoever would take one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from circuit.errors import CircuitError
from circuit.runs.opening import open_run
from circuit.tasks.benchmark import Benchmark
from circuit.trace.record import RecordOptions, record_trace
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import (
    TrainState,
    encode_checkpoint,
    load_checkpoint,
    read_description,
    save_checkpoint,
)
from circuit.training.loop import train
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup


def without_a_past(state: TrainState, how: str) -> TrainState:
    if how == "absent":
        return replace(state, moments=None)
    assert state.moments is not None
    zero = {n: torch.zeros_like(t) for n, t in state.parameters.items()}
    return replace(state, moments=state.moments | {how: zero})


SGD = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("how", ["absent", "exp_avg_sq", "momentum_buffer"])
def test_moments_that_are_no_past_are_refused_where_a_step_is_taken(
    workplace: Path, make_config: Callable[..., TrainConfig], tiny: Benchmark, how: str
) -> None:
    changes = {"optimizer": SGD} if how == "momentum_buffer" else {}
    config = make_config(steps=6, checkpoint_every=3, eval_every=6, **changes)
    train(config, stop_at=3)
    path = Path(config.output_dir) / "checkpoints/step_000003.pt"
    whole = load_checkpoint(path)
    save_checkpoint(path, without_a_past(whole, how))
    what = "no optimizer moments" if how == "absent" else f"{how} that is zero in every parameter"
    said = f"the state of step 3 holds {what}"
    with pytest.raises(CircuitError, match=said):
        TrainingSession(Setup(config, benchmark=tiny), state=load_checkpoint(path))
    for take in (
        lambda: train(config, resume=True),
        lambda: record_trace(config, "t", RecordOptions(num_steps=2, resume_checkpoint=path)),
    ):
        with pytest.raises(CircuitError, match=rf"^{path}: {said}"):
            take()
    assert open_run(config.output_dir).model(3) is not None  # its weights are sound
    # at step 0 no gradient has been seen, so zero is what there is
    start = TrainingSession(Setup(config, benchmark=tiny)).state()
    assert TrainingSession(Setup(config, benchmark=tiny), state=start).step == 0
    save_checkpoint(path, whole)
    assert train(config, resume=True).step == 6


def test_a_state_without_moments_says_so(
    session_after: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    whole = session_after(2).state()
    path = tmp_path / "x.pt"
    save_checkpoint(path, replace(whole, moments=None))
    description = read_description(path)
    assert description.moments == "absent"
    assert list(description.tensors) == ["parameters"]
    state = load_checkpoint(path)
    assert state.moments is None
    assert encode_checkpoint(state) == path.read_bytes()
    # plain SGD keeps none, which is not the same: its next step needs none
    sgd = {"name": "sgd", "learning_rate": 0.1}
    save_checkpoint(path, session_after(2, optimizer=sgd).state())
    assert read_description(path).moments is None
    assert load_checkpoint(path).past_moments() == {}
