"""What the tests of the command line share: a working directory, and typing in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from circuit.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def payload(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        (line,) = self.out.splitlines()
        found = json.loads(line)
        assert isinstance(found, dict)
        return found


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
    """Types `circuit ...` in the working directory."""
    monkeypatch.delenv("CIRCUIT_DEVICE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["circuit", *words])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run
