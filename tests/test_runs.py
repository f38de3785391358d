"""What a notebook starts from: a run on disk, its models, its batches, its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

import circuit
from circuit.artifacts import dump_rows, read_jsonl
from circuit.errors import CircuitError
from circuit.model.weights import named_tensors
from circuit.runs.opening import open_run
from circuit.runs.rows import read_rows
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import load_checkpoint
from circuit.training.evaluate import evaluate
from circuit.training.loop import train
from circuit.training.setup import encode_split

RUN = Path("runs/tiny")


@pytest.fixture
def trained(workplace: Path, make_config: Callable[..., TrainConfig]) -> TrainConfig:
    """A tiny run of eight steps in the working directory."""
    config = make_config(steps=8, checkpoint_every=4, eval_every=4)
    train(config)
    return config


def test_a_runs_models_are_its_checkpoints(trained: TrainConfig) -> None:
    run = open_run(RUN)
    assert run.config == trained
    assert run.steps == [4, 8]
    shape = "1 layers, 2 heads, d_model 16, fast kernels"
    assert repr(run) == f"CheckpointedRun({RUN}: {shape}, 2 checkpoints, 4 to 8)"
    for step in (4, 8, "best"):
        name = "best.pt" if step == "best" else f"step_{step:06d}.pt"
        saved = load_checkpoint(RUN / "checkpoints" / name)
        found = named_tensors(run.model(step))
        assert list(found) == list(saved.parameters)
        assert all(torch.equal(tensor, saved.parameters[n]) for n, tensor in found.items())
    assert open_run(RUN / "run_config.json").steps == [4, 8]


def test_the_rows_of_a_run_repeat_from_its_checkpoints(trained: TrainConfig) -> None:
    run = open_run(RUN)
    rows = [row for row in read_jsonl(RUN / "metrics.jsonl") if row["kind"] == "evaluation"]
    for step in run.steps:
        for split in trained.tracked_splits:
            again = evaluate(run.model(step), encode_split(run.benchmark, split), split).to_row()
            (row,) = [r for r in rows if (r["step"], r["split"]) == (step, split)]
            assert {"kind": "evaluation", "step": step, **again} == row


def test_batches_hold_the_records_and_feed_the_model(trained: TrainConfig) -> None:
    run = open_run(RUN)
    records = run.benchmark.records("train")
    for indices in (None, [5, 0, 5], torch.tensor([7])):
        batch = run.batch("train", indices)
        chosen = range(len(records)) if indices is None else [int(i) for i in indices]
        assert batch.sample_ids == tuple(records[i].sample_id for i in chosen)
        for row, i in enumerate(chosen):
            assert tuple(batch.tokens[row, : batch.lengths[row]].tolist()) == records[i].tokens
    logits = run.model(8)(run.batch("train", [0, 1]).tokens)
    assert logits.shape[-1] == run.vocabulary.size


def test_rows_become_columns(trained: TrainConfig, tmp_path: Path) -> None:
    frame = open_run(RUN).metrics()
    steps = frame[frame.kind == "train"]
    assert steps.step.tolist() == [*range(1, 9)]
    rows = [row for row in read_jsonl(RUN / "metrics.jsonl") if row["kind"] == "train"]
    assert steps.loss.tolist() == [row["loss"] for row in rows]
    evaluations = frame[frame.kind == "evaluation"]
    assert (evaluations["by_slice.lag.1.reads"] > 0).all()
    path = tmp_path / "rows.jsonl"
    path.write_text(dump_rows([{"a": {"b": 1}, "c": 2}, {"c": 3}]))
    expected = pd.DataFrame({"c": [2, 3], "a.b": [1.0, None]})
    pd.testing.assert_frame_equal(read_rows(path), expected, check_like=True)


def test_the_public_names_are_those_of_the_page() -> None:
    for name in circuit.__all__:
        assert getattr(circuit, name) is not None
    assert circuit.open_run is open_run
    assert circuit.read_rows is read_rows
    assert dir(circuit) == circuit.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        circuit.nothing  # noqa: B018


def test_what_is_missing_is_named(trained: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match=r"runs: holds no run_config\.json; expected the folder"):
        open_run("runs")
    with pytest.raises(CircuitError, match="there is no such folder"):
        open_run(tmp_path / "nowhere")
    run = open_run(RUN)
    with pytest.raises(CircuitError, match="no checkpoint of step 5; expected one of 4, 8 or"):
        run.model(5)
    with pytest.raises(CircuitError, match="unknown split 'nowhere'; expected train, valid"):
        run.batch("nowhere")
    with pytest.raises(CircuitError, match=r"record indices \[60\]; expected some of 0 \.\. 59"):
        run.batch("train", [60])
    with pytest.raises(CircuitError, match="no such file"):
        read_rows("nowhere.jsonl")


def test_an_edited_run_config_is_refused(trained: TrainConfig) -> None:
    path = RUN / "run_config.json"
    payload = json.loads(path.read_text())
    path.write_text(json.dumps({**payload, "sed": 1}))
    with pytest.raises(CircuitError, match=r"run_config\.json: unknown field 'sed'"):
        open_run(RUN)
    path.write_text(json.dumps({**payload, "seed": 1}))
    with pytest.raises(CircuitError, match="belongs to another config: seed is 11 there and 1 her"):
        open_run(RUN).model(8)
