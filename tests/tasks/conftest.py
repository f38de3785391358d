"""Benchmarks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuit.config import parse_config
from circuit.tasks.benchmark import Benchmark, generate_benchmark
from circuit.tasks.symbolic_kv.config import BenchmarkConfig


def limits(low: int, high: int) -> dict[str, int]:
    return {"min": low, "max": high}


def benchmark_payload(**changes: Any) -> dict[str, Any]:
    """A small config; `changes` replace top-level fields."""
    train = {
        "samples": 40,
        "active_keys": limits(2, 3),
        "overwrite_count": limits(8, 8),
        "num_queries": limits(6, 7),
        "query_lag": limits(1, 2),
    }
    splits = {
        "train": train,
        "heldout_pairs": {**train, "samples": 30, "answer_pairs": "heldout"},
        "counterfactual": {"samples": 20, "counterfactual_of": "train"},
    }
    payload = {
        "name": "small",
        "benchmark_type": "symbolic_kv_stream",
        "output_dir": "data/generated/small",
        "seed": 3,
        "num_keys": 4,
        "num_values": 64,
        "holdout_answer_pair_fraction": 0.3,
        "heuristic_max_accuracy": 0.5,
        "splits": splits,
    }
    return {**payload, **changes}


def small_config(**changes: Any) -> BenchmarkConfig:
    return parse_config(benchmark_payload(**changes), BenchmarkConfig, where="test")


@pytest.fixture(scope="session")
def small() -> Benchmark:
    return generate_benchmark(small_config())


@pytest.fixture(scope="session")
def config_of() -> Callable[..., BenchmarkConfig]:
    """Builds the small config with some top-level fields replaced."""
    return small_config


@pytest.fixture
def saved(small: Benchmark, tmp_path: Path) -> Path:
    """The small benchmark on disk."""
    small.save(writer(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def write_into() -> Callable[[Path], Callable[[str, str], None]]:
    """Turns a folder into the `write(name, text)` that saving takes."""
    return writer


def writer(folder: Path) -> Callable[[str, str], None]:
    def write(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    return write
