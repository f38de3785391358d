"""A tiny trained run with a probe set and its trace, made once a test run; fixtures of tests of
reports, pages and studies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Done, type_and_read

from circuit.artifacts import dump_json
from circuit.config import load_config
from circuit.sealed import sealed
from circuit.tasks.probes import write_probe_set
from circuit.trace.record import RecordOptions, record_trace
from circuit.train_config import TrainConfig
from circuit.training.loop import train

RUN, CLAIMS = Path("runs/tiny"), Path("claims_paper.json")
MadeOnce = Callable[[str, Callable[[], Any]], Path]


@pytest.fixture(scope="session")
def trained_once(
    made_once: MadeOnce, tiny_folder: Path, train_payload: Callable[..., dict[str, Any]]
) -> Path:
    """A folder with a run of two layers (checkpoints 3, 6, 9, 12), its probe set, and claims."""

    def fill() -> None:
        shutil.copytree(tiny_folder, "data/tiny")
        payload = train_payload()
        payload["model"]["layers"] = 2
        Path("tiny.json").write_text(json.dumps(payload))
        train(load_config(Path("tiny.json"), TrainConfig))
        splits = ["validation_iid", "heldout_pairs"]
        write_probe_set("data/tiny", RUN / "analysis" / "probe_set.jsonl", splits, 8)
        claim = {"target": "reference", "statement": "it learns", "holds": True, "note": ""}
        claim |= {"numbers": {"accuracy": 0.9}, "tests": ["accuracy >= 0.5"]}
        study = {"target": "paper", "scale": "short", "seed": 7, "recipe_digest": ""}
        CLAIMS.write_text(dump_json(sealed(study | {"claims": [claim]})))

    return made_once("trained", fill)


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder, relative to the working directory, which is a copy of its own."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return RUN


@pytest.fixture
def circuit(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Types `circuit ...` in that working directory."""
    monkeypatch.delenv("CIRCUIT_DEVICE", raising=False)

    def run(*words: str) -> Done:
        return type_and_read(words, capsys)

    return run


@pytest.fixture(scope="session")
def traced_once(made_once: MadeOnce, trained_once: Path) -> Path:
    """A trace of that run, all of its 12 steps, with anchors at 0, 4, 8 and 12."""

    def fill() -> None:
        shutil.copytree(trained_once, ".", dirs_exist_ok=True)
        config = load_config(RUN / "run_config.json", TrainConfig)
        record_trace(config, "trace", RecordOptions(end_step=12, anchor_every=4))

    return made_once("traced", fill) / "trace"


@pytest.fixture
def traced(trained: Path, traced_once: Path) -> Path:
    """A copy of the trace, relative to the working directory."""
    shutil.copytree(traced_once, "trace")
    return Path("trace")
