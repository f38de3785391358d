"""open_run finds a run by whatever names it; what it gives keeps the laws of a Run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import circuit
from circuit.core.state import State
from circuit.errors import CircuitError
from circuit.runs.base import Run
from circuit.runs.checkpointed import CheckpointedRun
from circuit.runs.opening import open_run
from circuit.scalars.qk_match import QKMatch, ReadMasks
from circuit.trace.replay import ReplayedRun
from circuit.trace.while_training import DEFAULT_FOLDER
from circuit.train_config import load_run_config
from circuit.training.checkpoints import checkpoint_name, save_checkpoint
from circuit.training.loop import train


def same(one: State, other: State) -> bool:
    groups = [(one.parameters, other.parameters)]
    if one.moments is not None and other.moments is not None:
        groups += [(one.moments[name], other.moments[name]) for name in one.moments]
    return all(mine[n].equal(theirs[n]) for mine, theirs in groups for n in mine)


@pytest.fixture
def with_trace(trained: Path, traced: Path) -> Path:
    """The run with its trace where `train --trace` puts it, and a bare copy of its checkpoints."""
    shutil.copytree(traced, trained / DEFAULT_FOLDER)
    shutil.copytree(trained / "checkpoints", "bare")
    return trained


NAMES: dict[str, tuple[str, type]] = {
    "folder": ("runs/tiny", CheckpointedRun),
    "config": ("runs/tiny/run_config.json", CheckpointedRun),
    "checkpoints": ("runs/tiny/checkpoints", CheckpointedRun),
    "bare checkpoints": ("bare", CheckpointedRun),
    "trace": ("trace", ReplayedRun),
    "manifest": ("trace/trace.json", ReplayedRun),
    "a trace's checkpoints": ("trace/checkpoints", ReplayedRun),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_run_gives_the_same_weights(with_trace: Path, name: str) -> None:
    where, kind = NAMES[name]
    run: Run = open_run(where)
    assert isinstance(run, kind)
    expected = circuit.open_run("runs/tiny")
    assert run.config.recipe_difference(expected.config) is None
    assert {3, 12} <= set(run.steps)
    for step in (3, 12):
        assert run.header(step).step == step
        assert same(run.state(step), expected.state(step))
        for mine, theirs in zip(
            run.model(step).parameters(), expected.model(step).parameters(), strict=True
        ):
            assert mine.equal(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_two_models_of_a_run_share_nothing(with_trace: Path, name: str) -> None:
    run = open_run(NAMES[name][0])
    one, other = run.model(12), run.model(12)
    batch = run.setup.split("validation_iid").batch(range(2)).tokens
    before = other(batch)
    for parameter in one.parameters():
        parameter.data.zero_()
    one.add_hook("hook_embed", lambda value, hook: value * 0)
    assert other(batch).equal(before)
    assert run.model(12)(batch).equal(before)


@pytest.mark.parametrize("name", ["folder", "trace"])
def test_replay_and_attribution_are_the_traces(with_trace: Path, name: str) -> None:
    run = open_run(NAMES[name][0])
    steps = list(run.replay(3, 6))
    assert [step.step for step in steps] == [4, 5, 6]
    states = [run.state(step) for step in (4, 5, 6)]
    for step, state in zip(steps, states, strict=True):
        assert step.after.parameters.equal(step.layout.flatten(state.parameters))
    reads = ReadMasks.of(run.setup.split("validation_iid").batch(range(6)))
    scalar = QKMatch("L1H0", reads, layers=2)
    found = circuit.attribute(run, [scalar], 3, 6)[scalar.name]
    assert np.array_equal(found.steps, [4, 5, 6])


def test_what_cannot_be_replayed_says_why(with_trace: Path) -> None:
    with pytest.raises(CircuitError, match=r"bare: steps 3 to 6 cannot be executed again from che"):
        open_run("bare").replay(3, 6)
    with pytest.raises(CircuitError, match="no checkpoint of step 4; expected one of 3, 6, 9, 12"):
        open_run("bare").state(4)
    with pytest.raises(CircuitError, match=r"holds no run_config\.json; expected the folder"):
        open_run("data/tiny")
    with pytest.raises(CircuitError, match="nowhere: there is no such folder; expected the folder"):
        open_run("nowhere")


def test_a_trace_of_another_run_is_not_taken(with_trace: Path) -> None:
    config = load_run_config(with_trace).replace(seed=99, output_dir="runs/other")
    other = train(config).folder
    shutil.copytree(with_trace / DEFAULT_FOLDER, other / DEFAULT_FOLDER)
    for ask in (lambda run: run.replay(3, 6), lambda run: run.state(4), lambda run: run.trace):
        with pytest.raises(CircuitError, match="belongs to another config: seed is 11 there and"):
            ask(open_run(other))


def test_a_trace_of_the_same_recipe_and_other_bits_is_not_taken(with_trace: Path) -> None:
    """As of another machine: recipe and benchmark are equal, the states are not."""
    run = open_run(with_trace)
    state = run.state(12)
    state.parameters["embed.W_E"][0, 0] += 1e-6
    save_checkpoint(with_trace / "checkpoints" / checkpoint_name(12), state)
    again = open_run(with_trace)
    for ask in (lambda: again.state(4), lambda: again.replay(3, 6), lambda: again.header(4)):
        with pytest.raises(CircuitError, match="is not this run's: the states of step 12 differ"):
            ask()
    assert same(again.state(12), state)


def test_best_is_found_beside_bare_checkpoints(with_trace: Path) -> None:
    assert same(open_run("bare").state("best"), open_run(with_trace).state())
    assert open_run(with_trace).header(4).step == 4
    assert same(open_run("bare").state(np.int64(3)), open_run("bare").state(3))
