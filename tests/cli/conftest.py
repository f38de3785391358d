"""What the tests of the command line share: a working directory, and typing in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Done, type_and_read
from tiny_run import traced, traced_once, trained, trained_once

__all__ = ["traced", "traced_once", "trained", "trained_once"]

Run = Callable[..., Done]


@pytest.fixture
def desk(
    workplace: Path,
    benchmark_payload: Callable[[], dict[str, Any]],
    train_payload: Callable[..., dict[str, Any]],
) -> Path:
    """A working directory with the tiny benchmark and both tiny configs."""
    for kind, payload in (("benchmark", benchmark_payload()), ("train", train_payload(steps=4))):
        path = workplace / "configs" / kind / "tiny.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(payload, indent=2))
    return workplace


@pytest.fixture
def circuit(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Types `circuit ...` in the working directory, on a machine without a GPU."""
    monkeypatch.delenv("CIRCUIT_DEVICE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    for device in ("torch.cuda", "torch.backends.mps"):
        monkeypatch.setattr(f"{device}.is_available", lambda: False)

    def run(*words: str) -> Done:
        return type_and_read(words, capsys)

    return run
