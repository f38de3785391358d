"""Traces that the tests of this folder share, and the ways to look at them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from circuit.core.state import FlatState
from circuit.trace.record import RecordOptions, RecordResult, record_trace
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import TrainState
from circuit.training.loop import train

MakeConfig = Callable[..., TrainConfig]
Vectors = dict[str, Tensor]


def record(config: TrainConfig, folder: str | Path = "trace", **wanted: Any) -> RecordResult:
    """Records all steps of a config with an anchor every 4; keywords are `RecordOptions`' and the
    switches of `record_trace`."""
    switches = {name: wanted.pop(name) for name in ("overwrite", "resume") if name in wanted}
    defaults: dict[str, Any] = {"end_step": config.steps, "anchor_every": 4}
    if "num_steps" in wanted:
        del defaults["end_step"]
    return record_trace(config, folder, RecordOptions(**{**defaults, **wanted}), **switches)


def trace_bytes(root: Path | str) -> dict[str, bytes]:
    """The files that equal recordings share: manifest, rows, states."""
    root = Path(root)
    files = [root / "trace.json", root / "optimizer_update_trace_rows.jsonl"]
    files += sorted((root / "checkpoints").glob("*.pt"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def vectors(state: TrainState | FlatState) -> Vectors:
    """A state as flat vectors by name."""
    flat = FlatState.of(state) if isinstance(state, TrainState) else state
    return {"parameters": flat.parameters, **flat.moments}


def equal(one: TrainState | FlatState, other: TrainState | FlatState) -> bool:
    """Whether two states are the same step and the same bits."""
    ours, theirs = vectors(one), vectors(other)
    return (
        one.step == other.step
        and list(ours) == list(theirs)
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


@pytest.fixture(scope="session")
def recording() -> Callable[..., RecordResult]:
    return record


@pytest.fixture(scope="session")
def bytes_of() -> Callable[[Path | str], dict[str, bytes]]:
    return trace_bytes


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], bool]:
    return equal


@contextmanager
def _beside_benchmark(folder: Path, benchmark: Path) -> Iterator[Path]:
    """Within the block a folder with a copy of the benchmark is the working directory."""
    shutil.copytree(benchmark, folder / "data" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="session")
def recorded_once(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, make_config: MakeConfig
) -> Path:
    """A trace of 12 steps with anchors at 0, 4, 8 and 12; tests work on copies of it."""
    with _beside_benchmark(tmp_path_factory.mktemp("recorded"), tiny_folder) as folder:
        record(make_config())
    return folder / "trace"


@pytest.fixture
def trace_folder(workplace: Path, recorded_once: Path) -> Path:
    """A copy of the trace at `trace`, relative to the working directory."""
    shutil.copytree(recorded_once, workplace / "trace")
    return Path("trace")


@pytest.fixture(scope="session")
def run_once(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, make_config: MakeConfig
) -> Path:
    """A run that was only trained, with checkpoints at 3, 6, 9 and 12."""
    with _beside_benchmark(tmp_path_factory.mktemp("trained"), tiny_folder) as folder:
        train(make_config())
    return folder / "runs"


@pytest.fixture
def run_folder(workplace: Path, run_once: Path) -> Path:
    """A copy of the run, relative to the working directory."""
    shutil.copytree(run_once, workplace / "runs")
    return Path("runs/tiny")
