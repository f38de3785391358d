"""Checkpoints as reports take them: by the step that they hold, each step once, finite."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unsound import save_unsound

from circuit.errors import CircuitError
from circuit.reports.inputs import choose_checkpoints, states_at
from circuit.runs.opening import open_run
from circuit.trace.states import States
from circuit.training.checkpoints import load_checkpoint

RUN = Path("runs/tiny")
CHECKPOINTS = RUN / "checkpoints"
PROBE = ("--probe-set", f"{RUN}/analysis/probe_set.jsonl")
FEW = ("--max-pairs-per-type", "4", "--min-pairs-per-type", "2")
COMMANDS = {
    "bilinear-qk-match-separation": (*PROBE, "--rank", "2"),
    "weight-svd-trace": (),
    "geometry-subspace-intervention": (
        *(*PROBE, "--stage", "layer_1_post_mlp", "--operation", "remove", "--rank", "2"),
        *("--subspace", "embedding_value_identity"),
    ),
    "answer-scalar-residual-diagnosis": (*PROBE, *FEW),
    "route-to-margin-closure": (
        *(*PROBE, *FEW, "--route"),
        "label=all,stage=final_norm,subspace=full_residual,position_role=prediction",
    ),
    "value-code-subspace-report": (*PROBE, "--stage", "layer_1_post_mlp", "--pca-rank", "2"),
    "value-code-transfer-rescue": (
        *(*PROBE, "--source-stage", "layer_0_post_mlp", "--target-stage", "layer_1_post_mlp"),
        *("--basis-rank", "2", "--split", "validation_iid"),
    ),
}
"""Commands that read checkpoints, but ov-write-progress-report, which shows what diverged."""


def step(number: int) -> Path:
    return CHECKPOINTS / f"step_{number:06d}.pt"


@pytest.mark.usefixtures("trained")
def test_a_name_without_a_step_takes_the_place_of_its_own() -> None:
    shutil.copy(step(9), "any.pt")
    mixed = [step(12), Path("any.pt"), step(3)]
    assert choose_checkpoints(mixed, None) == [step(3), Path("any.pt"), step(12)]
    run = open_run(RUN)
    found = [(state.step, path) for path, state in states_at(run.setup, States(), mixed)]
    assert found == [(3, step(3)), (9, Path("any.pt")), (12, step(12))]
    with pytest.raises(CircuitError, match=r"nowhere.pt: no such checkpoint"):
        choose_checkpoints([step(3), Path("nowhere.pt")], None)


def test_an_addressable_step_of_a_trace_is_its_names(traced: Path) -> None:
    there = traced / "checkpoints"
    made = [there / "step_000005.pt", there / "step_000002.pt"]
    assert not any(path.exists() for path in made)
    assert choose_checkpoints(made, None) == made[::-1]


@pytest.mark.usefixtures("trained")
def test_two_checkpoints_of_one_step_are_refused_in_one_line() -> None:
    shutil.copy(step(6), "any.pt")
    Path("other").mkdir()
    shutil.copy(step(6), "other/step_000006.pt")
    run = open_run(RUN)
    for again in (Path("any.pt"), Path("other/step_000006.pt"), step(6)):
        for ask in (
            lambda named: choose_checkpoints(named, None),
            lambda named: list(states_at(run.setup, States(), named)),
        ):
            with pytest.raises(CircuitError) as refused:
                ask([step(6), step(3), again])
            assert str(refused.value).startswith(f"{again}: is of step 6, as is {step(6)}")


def diverge() -> None:
    state = load_checkpoint(step(3))
    state.parameters["blocks.1.attn.W_Q"][0, 0, 0] = math.inf
    state.parameters["blocks.0.mlp.W_in"][0, 0] = math.nan
    save_unsound(step(3), state)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_run_that_diverged_is_refused_by_checkpoint(
    circuit: Callable[..., Any], command: str
) -> None:
    diverge()
    words = (f"--checkpoint={step(3)}", f"--checkpoint={step(12)}", "--output-dir", "out")
    done = circuit(command, "--config", f"{RUN}/run_config.json", *COMMANDS[command], *words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert f"{step(3)}: weights of blocks.0.mlp.W_in are not finite at step 3" in done.err
    assert not list(Path("out").glob("*.json"))


def test_weights_that_diverged_are_not_evaluated(circuit: Callable[..., Any]) -> None:
    diverge()
    done = circuit("evaluate", "--config", f"{RUN}/run_config.json", "--checkpoint", str(step(3)))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert f"{step(3)}: weights of blocks.0.mlp.W_in are not finite at step 3" in done.err


def test_an_evaluation_stands_in_the_run_that_holds_the_checkpoint(
    circuit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(RUN).resolve()
    other = Path("other.json")  # the same recipe under another name
    payload = json.loads((run / "run_config.json").read_text())
    other.write_text(json.dumps(payload | {"name": "other", "output_dir": "runs/other"}))
    config, checkpoint = str(other.resolve()), str(step(3).resolve())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    done = circuit("evaluate", "--config", config, "--checkpoint", checkpoint)
    assert done.code == 0, done.err
    assert (run / "evaluation" / f"{step(3).stem}.json").is_file()
    assert list(Path().iterdir()) == []
