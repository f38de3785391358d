"""How tests type `circuit ...`, without a process of its own."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from signal import SIGHUP, SIGINT, SIGTERM
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


def type_in(words: Sequence[str]) -> int:
    """Types `circuit ...`; the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["circuit", *words])
        before = {each: signal.getsignal(each) for each in (SIGHUP, SIGINT, SIGTERM)}
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def type_and_read(words: Sequence[str], captured: pytest.CaptureFixture[str]) -> Done:
    """Types `circuit ...`; what it printed, and nothing from before."""
    captured.readouterr()
    code = type_in(words)
    said = captured.readouterr()
    return Done(code, said.out, said.err)
