"""The world that fuzzers work in: a tiny run of two layers with its trace and some reports."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import type_in
from each_report import make
from law import renewed
from tiny_run import RUN, MadeOnce, traced_once, trained_once
from wide import widen

import circuit.page.html

__all__ = ["traced_once", "trained_once"]

REPORT = "bilinear-qk-match-separation"
ANALYSIS = RUN / "analysis" / "bilinear_qk_match_separation"


@pytest.fixture(scope="session")
def made_world(
    made_once: MadeOnce,
    trained_once: Path,
    traced_once: Path,
    benchmark_payload: Callable[[], dict[str, Any]],
) -> Path:
    """Run, trace, probe set, configs, a report of the run, and one that reads others."""

    def fill() -> None:
        shutil.copytree(trained_once, ".", dirs_exist_ok=True)
        shutil.copytree(traced_once, "trace")
        Path("benchmark.json").write_text(json.dumps(benchmark_payload()))
        make(REPORT, ANALYSIS)
        half = ["--set", "output_dir=runs/half", "--set", "threads=null", "--stop-at-step", "6"]
        out = ["--checkpoint", f"{RUN}/checkpoints/best.pt", "--output-dir", "exported"]
        for words in (
            ["train", "--config", "tiny.json", *half],
            ["evaluate", "--config", str(RUN), *out[:2]],
            ["page", str(RUN)],
            ["export", "--config", str(RUN), *out],
        ):
            assert type_in(words) == 0

    world = made_once("fuzzed", fill)
    circuit.page.html._vega()  # read before a command forks, and by none that is cut off
    return world


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder that is no disk, where there is such a one: `fsync` costs nothing there."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def narrow(made_world: Path, memory: Path) -> Iterator[Path]:
    """A copy of that world, of which `renewed` makes others; it is the same at the end."""
    world = shutil.copytree(made_world, memory / "world")
    with kept(world):
        yield world


@pytest.fixture(scope="session")
def wide(made_world: Path, made_once: MadeOnce, memory: Path) -> Iterator[Path]:
    """The same with recordings, recipes, counterfactual runs, queues and scores."""

    def fill() -> None:
        shutil.copytree(made_world, ".", dirs_exist_ok=True)
        widen()

    world = shutil.copytree(made_once("widened", fill), memory / "wide")
    with kept(world):
        yield world


@contextmanager
def kept(world: Path) -> Iterator[None]:
    """Hold that nothing in a folder is changed."""
    before = [path.read_bytes() for path in sorted(world.rglob("*")) if path.is_file()]
    yield
    assert before == [path.read_bytes() for path in sorted(world.rglob("*")) if path.is_file()]


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Path:
    """The wide one for what is run by hand, else the narrow one."""
    of_system = request.node.get_closest_marker("system") is not None
    world: Path = request.getfixturevalue("wide" if of_system else "narrow")
    return world


@pytest.fixture
def place(world: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, a copy of that world."""
    monkeypatch.delenv("CIRCUIT_DEVICE", raising=False)
    monkeypatch.chdir(memory)
    renewed(world, memory / "place")
    return memory / "place"
