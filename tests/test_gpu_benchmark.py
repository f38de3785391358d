"""benchmarks/gpu.py at its tiny size, on a stand-in for a GPU and on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import type_and_read
from stand_in import NAME, stand_in_gpu

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for what a name means
    spec.loader.exec_module(module)
    return module


def test_every_law_of_its_table_holds_on_both_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CIRCUIT_DEVICE", raising=False)

    def here(words: Sequence[str]) -> str:
        done = type_and_read(words, capsys)
        assert done.code == 0
        return done.out

    with stand_in_gpu():
        device, cpu = load().table("cuda", tiny=True, steps=8, run=here)
    assert [name for name in device if device[name].holds is False] == []
    assert [name for name in cpu if cpu[name].holds is False] == []
    for column in (device, cpu):
        assert column["verified"].text == "replayed 8 steps, 0 bits differ"
        assert sum(cell.holds is True for cell in column.values()) >= 8
    assert (device["device"].text, cpu["device"].text) == (NAME, "cpu")
