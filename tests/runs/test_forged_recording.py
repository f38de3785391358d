"""Recordings whose digests are right and whose lines say anything: read, or refused in one line."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import circuit
from circuit.artifacts import dump_row
from circuit.errors import CircuitError
from circuit.journal import BYTES, read_records
from circuit.runs.recording import journals

VALUES: list[Any] = [None, True, -1, 10**12, 1.5, "", "x", "float128", [], {}, [[]], {"tensor": 1}]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], bytes]]:
    """The records of a loop of two steps: a state, and the steps behind it."""
    folder = tmp_path_factory.mktemp("recorded")
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    with circuit.watch(module, optimizer, folder):
        for _ in range(2):
            optimizer.zero_grad()
            module(torch.ones(3, 2)).sum().backward()
            optimizer.step()
    (path,) = journals(folder).values()
    data = path.read_bytes()
    records = [(line, data[start : start + line[BYTES]]) for line, start in read_records(path)]
    return [({"manifest": (folder / "recording.json").read_text()}, b""), *records]


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every value in a document: what holds it, and its key or index there."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    inner = [node[key] for key in keys if isinstance(node[key], dict | list)]
    return [*((node, key) for key in keys), *(one for of in inner for one in places(of))]


@pytest.mark.parametrize("seed", range(60))
def test_a_forged_line_is_read_or_refused(
    seed: int, recorded: list[tuple[dict[str, Any], bytes]], tmp_path: Path
) -> None:
    rng = random.Random(seed)
    (manifest, _), *records = copy.deepcopy(recorded)
    (tmp_path / "recording.json").write_text(manifest["manifest"])
    line, _ = rng.choice(records)
    holder, key = rng.choice(places(line))
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(VALUES)
    (tmp_path / "steps").mkdir()
    parts = [(dump_row(line) + "\n").encode() + payload for line, payload in records]
    (tmp_path / "steps/from_000000.journal").write_bytes(b"".join(parts))
    told = ""
    try:
        run = circuit.open_run(tmp_path, module=torch.nn.Linear(2, 1))
        told = run.verify().law
        assert all(len(run.state(step).parameters) == 2 for step in run.steps)
    except CircuitError as refused:
        told = str(refused)
    assert len(told.splitlines()) == 1
