"""TensorBoard, Weights & Biases (offline) and trackio hold what the rows of a loop hold."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import circuit
from circuit.sinks import flattened, open_sinks

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def watched(sinks: list[Any]) -> list[dict[str, float]]:
    """The numbers of three steps, which the sinks have got, too."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(module.parameters())

    def square(module: nn.Module) -> torch.Tensor:
        return module[0].weight.square().mean()

    with circuit.watch(module, optimizer, scalars=[square], sinks=sinks) as watching:
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
    numbers = [flattened(row) for row in watching.rows]
    assert {"scalars/square", "attribution/square/terms/weight_decay"} <= numbers[0].keys()
    return numbers


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_sinks([f"tensorboard:{tmp_path}"]) as sinks:
        rows = watched(sinks)
    board = EventAccumulator(str(tmp_path)).Reload()
    for name in rows[0]:
        told = [(event.step, event.value) for event in board.Scalars(name)]
        expected = [(step, pytest.approx(row[name])) for step, row in enumerate(rows, start=1)]
        assert told == expected, name


def offline_rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps and numbers in a W&B file of less than a block (32 KiB): a header, then records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at = path.read_bytes(), 7
    while at < len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)  # behind a checksum
        assert kind == 1, "a whole record"
        record = Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            told = {"/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            numbers = {name: value for name, value in told.items() if not name.startswith("_")}
            yield record.history.step.num, numbers


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its process has ended, which writes a step when the next one comes, or at the end."""
    import wandb

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_sinks(["wandb:circuit"]) as sinks:
        rows = watched(sinks)
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert list(offline_rows(path)) == list(enumerate(rows, start=1))


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    with open_sinks(["trackio:circuit"]) as sinks:
        rows = watched(sinks)
    (path,) = tmp_path.rglob("*.db")
    told = sqlite3.connect(path).execute("select step, metrics from metrics order by step")
    assert [(step, json.loads(numbers)) for step, numbers in told] == list(enumerate(rows, start=1))
