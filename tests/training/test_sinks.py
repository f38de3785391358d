"""What trackers are told of a training is what its metrics hold, and no bit of it changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import type_and_read

from circuit.artifacts import read_jsonl
from circuit.errors import CircuitError
from circuit.sinks import KINDS, flattened, open_sinks
from circuit.train_config import TrainConfig
from circuit.training.loop import train

Told = list[tuple[int, dict[str, float]]]


def of_metrics(rows: list[dict[str, Any]]) -> Told:
    return [(row["step"], flattened(row, f"{row.get('split', 'train')}/")) for row in rows]


def test_a_sink_gets_every_row(workplace: Path, make_config: Callable[..., TrainConfig]) -> None:
    told: Told = []
    config = make_config(steps=4)
    train(config, sinks=[lambda step, numbers: told.append((step, numbers))])
    rows = read_jsonl(Path(config.output_dir) / "metrics.jsonl")
    assert told == of_metrics(rows)
    assert {"train/loss", "train/lr"} <= set(told[-3][1])
    before = (Path(config.output_dir) / "checkpoints/step_000004.pt").read_bytes()
    train(config, overwrite=True)
    assert (Path(config.output_dir) / "checkpoints/step_000004.pt").read_bytes() == before


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Trackers that write down what they are told."""
    said: dict[str, list[Any]] = {kind: [] for kind in KINDS}

    def log(kind: str) -> Any:
        return SimpleNamespace(
            init=lambda project: said[kind].append(project) or log(kind),
            log=lambda numbers, *, step: said[kind].append((step, numbers)),
            finish=lambda: said[kind].append("closed"),
        )

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            said["tensorboard"].append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            said["tensorboard"].append((step, {name: value}))

        def close(self) -> None:
            said["tensorboard"].append("closed")

    monkeypatch.setitem(sys.modules, "wandb", log("wandb"))
    monkeypatch.setitem(sys.modules, "trackio", log("trackio"))
    board = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return said


def test_a_word_opens_and_closes_its_tracker(trackers: dict[str, list[Any]]) -> None:
    with open_sinks([f"{kind}:a:b" for kind in KINDS]) as sinks:
        assert len(sinks) == len(KINDS)
    assert all(said == ["a:b", "closed"] for said in trackers.values())


def test_on_the_command_line(
    workplace: Path,
    make_config: Callable[..., TrainConfig],
    trackers: dict[str, list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(steps=2)
    Path("tiny.json").write_text(config.to_json())
    words = [word for kind in KINDS for word in ("--sink", f"{kind}:here")]
    done = type_and_read(["train", "--config", "tiny.json", *words], capsys)
    assert done.code == 0, done.err
    rows = of_metrics(read_jsonl(Path(config.output_dir) / "metrics.jsonl"))
    assert trackers["wandb"] == trackers["trackio"] == ["here", *rows, "closed"]
    apart = [(step, {name: value}) for step, numbers in rows for name, value in numbers.items()]
    assert trackers["tensorboard"] == ["here", *apart, "closed"]
    for word in ("wandb", "wandb:", "mlflow:x"):
        done = type_and_read(["train", "--config", "tiny.json", "--sink", word], capsys)
        assert done.code == 2
        assert f"--sink: '{word}'; expected tensorboard:FOLDER" in done.err


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    message = r"trackio cannot be imported .*circuit-formation\[sinks\]"
    with pytest.raises(CircuitError, match=message), open_sinks(["trackio:x"]):
        pass
