"""What all tests share: a tiny benchmark, tiny configs, and shapes checked at run time.

The hook must stand before the modules that it checks are first imported, hence the order below.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(["circuit.tasks.examples", "circuit.training.step"], "beartype.beartype")
# what jupyterlab brings for the jsonschema of altair: importing it builds 38 grammars of addresses,
# three quarters of altair's import, and no schema here has an address
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

import beartype  # noqa: E402, F401
import circuit.cli.program  # noqa: E402
import numpy.typing  # noqa: E402, F401
import torch  # noqa: E402
from altair.utils import schemapi  # noqa: E402

import circuit.lazy  # noqa: E402
import circuit.page.html  # noqa: E402
import circuit.tasks.base  # noqa: E402
import circuit.training.recipe  # noqa: E402

with pytest.MonkeyPatch.context() as patch:  # of these alone: the hook reads their annotations
    patch.setattr("typing.TYPE_CHECKING", True)
    import circuit.tasks.examples
    import circuit.training.step

from installed import of_installed  # noqa: E402
from tiny_run import MadeOnce  # noqa: E402

from circuit.config import parse_config  # noqa: E402
from circuit.figures.charts import Chart  # noqa: E402
from circuit.tasks.benchmark import Benchmark, generate_benchmark, load_benchmark  # noqa: E402
from circuit.tasks.symbolic_kv.config import BenchmarkConfig  # noqa: E402
from circuit.train_config import TrainConfig  # noqa: E402
from circuit.training.session import TrainingSession  # noqa: E402
from circuit.training.setup import Setup  # noqa: E402

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

MakeConfig = Callable[..., TrainConfig]
DRAW = Chart.svg

gc.disable()  # while modules are imported, of which nothing is garbage
os.register_at_fork(after_in_child=gc.freeze)


def pytest_collection_finish() -> None:
    """What is there now stays, and is not searched for garbage again and again, least in forks."""
    gc.freeze()
    gc.enable()


def tiny_benchmark_payload() -> dict[str, Any]:
    split = {
        "samples": 60,
        "active_keys": {"min": 3, "max": 4},
        "overwrite_count": {"min": 4, "max": 5},
        "num_queries": {"min": 1, "max": 2},
        "query_lag": {"min": 1, "max": 2},
    }
    return {
        "name": "tiny",
        "benchmark_type": "symbolic_kv_stream",
        "output_dir": "data/tiny",
        "seed": 5,
        "num_keys": 4,
        "num_values": 32,
        "holdout_answer_pair_fraction": 0.3,
        "heuristic_max_accuracy": 1.0,
        "lag_sampling": "uniform",
        "splits": {
            "train": split,
            "validation_iid": {**split, "samples": 24},
            "heldout_pairs": {**split, "samples": 24, "answer_pairs": "heldout"},
        },
    }


def tiny_train_payload(**changes: Any) -> dict[str, Any]:
    payload: dict[str, Any] = {
        "name": "tiny",
        "output_dir": "runs/tiny",
        "benchmark_dir": "data/tiny",
        "seed": 11,
        "threads": 1,
        "model": {
            "layers": 1,
            "heads": 2,
            "d_model": 16,
            "d_ff": 32,
            "max_sequence_length": 40,
        },
        "steps": 12,
        "batch_size": 8,
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
        "log_every": 1,
        "eval_every": 4,
        "checkpoint_every": 3,
        "tracked_splits": ["validation_iid", "heldout_pairs"],
        "best": {"split": "validation_iid", "metric": "token_accuracy"},
    }
    return of_installed({**payload, **changes})


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """One thread and deterministic kernels, as training sets them."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture(autouse=True, scope="session")
def _no_disk() -> Iterator[None]:
    """No test pulls the plug, so nobody waits for the disk: fifty times in the tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_command_line() -> Iterator[None]:
    """The commands and their options are put together once, not for every line that is typed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        whole = functools.cache(circuit.cli.program.program)
        patch.setattr("circuit.cli.program.program", lambda _=(): whole())
        yield


@pytest.fixture(autouse=True, scope="session")
def _sketches() -> Iterator[None]:
    """Charts are made and not drawn, which would take half of a report's time; see `drawn`."""

    def sketch(chart: Chart) -> str:
        return f'<svg xmlns="http://www.w3.org/2000/svg"><!-- {chart.title} --></svg>\n'

    def setter(setter: Any, of: Any, kind: Any) -> Any:
        setter.obj, setter.cls = of, kind
        return setter

    with pytest.MonkeyPatch.context() as patch, schemapi.debug_mode(False):
        patch.setattr(Chart, "svg", sketch)
        # nor is each part checked on its own (the whole is: test_each_report.py), or the docstring
        # of each `.scale` of an axis put together, which take nearly half of what is left
        patch.setattr(schemapi._PropertySetter, "__get__", setter)
        yield


@pytest.fixture(scope="module")
def drawn() -> Iterator[None]:
    """In the module that asks for it, charts are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chart, "svg", DRAW)
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Makes a folder of that name once a test run, whichever of its processes asks first.

    It is made by a call in it, and to be left as it is.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, fill: Callable[[], Any]) -> Path:
        folder, draft = root / f"once_{name}", root / f"draft_{name}"
        with (root / f"once_{name}.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                patch.chdir(draft)
                fill()
                draft.rename(folder)
        return folder

    return make


@pytest.fixture(autouse=True, scope="session")
def _one_runtime(made_once: MadeOnce) -> Iterator[None]:
    """What pages are drawn with is put together once, which takes two seconds, not by each fork."""
    whole = circuit.page.html._vega

    @functools.cache
    def read() -> str:
        folder = made_once("runtime", lambda: Path("vega.js").write_text(whole(), "utf-8"))
        return (folder / "vega.js").read_text("utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuit.page.html, "_vega", read)
        yield


@pytest.fixture(scope="session")
def benchmark_payload() -> Callable[[], dict[str, Any]]:
    """A new copy of the tiny benchmark's config, as JSON."""
    return tiny_benchmark_payload


@pytest.fixture(scope="session")
def train_payload() -> Callable[..., dict[str, Any]]:
    """Builds the tiny run's config as JSON, with some top-level fields replaced."""
    return tiny_train_payload


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """Builds the tiny run's config, with some top-level fields replaced."""

    def make(**changes: Any) -> TrainConfig:
        return parse_config(tiny_train_payload(**changes), TrainConfig, where="test")

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny benchmark on disk; tests copy it, or leave it as it is."""
    folder = tmp_path_factory.mktemp("tiny_benchmark")
    config = parse_config(tiny_benchmark_payload(), BenchmarkConfig, where="test")
    generate_benchmark(config).save(
        lambda name, text: (folder / name).write_text(text, encoding="utf-8") and None
    )
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Benchmark:
    """The tiny benchmark in memory."""
    return load_benchmark(tiny_folder)


@pytest.fixture
def workplace(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds the tiny benchmark at `data/tiny` and nothing else."""
    shutil.copytree(tiny_folder, tmp_path / "data" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def session_after(make_config: MakeConfig, tiny: Benchmark) -> Callable[..., TrainingSession]:
    """A tiny run in memory after some steps; keywords replace fields of its config."""

    def advance(steps: int, **changes: Any) -> TrainingSession:
        session = TrainingSession(Setup(make_config(**changes), benchmark=tiny))
        for _ in range(steps):
            session.advance()
        return session

    return advance
