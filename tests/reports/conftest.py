"""A tiny trained run with a probe set, and the command line, for the tests of reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Done, type_and_read, type_in

from circuit.config import TrainConfig, load_config
from circuit.trace.record import RecordOptions, record_trace

RUN = Path("runs/tiny")


@pytest.fixture(scope="session")
def trained_once(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Path,
    train_payload: Callable[..., dict[str, Any]],
) -> Path:
    """A folder with a run of two layers (checkpoints 3, 6, 9, 12) and a probe set of two splits."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_folder, folder / "data" / "tiny")
    payload = train_payload()
    payload["model"]["layers"] = 2
    (folder / "tiny.json").write_text(json.dumps(payload))
    probes = (
        *("--split", "validation_iid", "--split", "heldout_pairs", "--examples-per-split", "8"),
        *("--output", str(RUN / "analysis" / "probe_set.jsonl")),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert type_in(("train", "--config", "tiny.json")) == 0
        assert type_in(("generate-probe-set", "--benchmark-dir", "data/tiny", *probes)) == 0
    return folder


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
def traced_once(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of that run, all of its 12 steps, with anchors at 0, 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("traced") / "trace"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained_once)
        config = load_config(RUN / "run_config.json", TrainConfig)
        record_trace(config, folder, RecordOptions(end_step=12, anchor_every=4))
    return folder


@pytest.fixture
def traced(trained: Path, traced_once: Path) -> Path:
    """A copy of the trace, relative to the working directory."""
    shutil.copytree(traced_once, "trace")
    return Path("trace")
