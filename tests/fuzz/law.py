"""What every fuzzer holds a command to, and how one is typed so that nothing it does gets out.

A command runs in a fork with limits of processor time, time and memory. It ends with 0, 2, 130 or
143 (`trace verify` also with 1), without a traceback, and a refusal is one line or Click's box.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair  # noqa: F401  what a fork would else import anew
import pytest
import transformer_lens  # noqa: F401
from command_line import type_in
from wide import watch

import circuit.page
import circuit.reports.export
import circuit.trace.replay
import circuit.training.imported
import circuit.training.loop  # noqa: F401
from circuit.errors import CircuitError
from circuit.sealed import unsealed
from circuit.strict_json import parse_json

CODES = {0, 2, 130, 143}
SYSTEM, WHOLE = [pytest.mark.system], [pytest.mark.system, pytest.mark.slow]
"""`make test-system` runs some of what is fuzzed in full size, five minutes; `make fuzz` it all."""
SECONDS = 120
"""Of a processor, after which a command that takes a second is said to hang."""
MEMORY = 3 << 30
"""Bytes beyond what the tests themselves have; tiny inputs need none of it."""
CLOCK = rb'"(?:seconds\w*|steps_per_second|started_unix|steps_of_this_call)": [^,\n}]+'
COSTS = rb'"costs": \{(?:[^{}]|\{[^{}]*\})*\}'
"""What methods have cost, each a time over another."""


def in_parts(parts: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Of the full size, each to be run apart; the first of them by `make test-system`."""
    return [pytest.param(*part, marks=WHOLE if at else SYSTEM) for at, part in enumerate(parts)]


@dataclass(frozen=True)
class Ended:
    """How a command ended; by a signal if its code is negative."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def breach(self) -> str:
        """What of the law it broke; empty if nothing."""
        code = "hang or crash" if self.code < 0 else f"exit code {self.code}"
        boxed = self.err.lstrip().startswith("Usage: ")
        verdict = self.code == 1 and "verify" in self.words[:2]
        lines = [line for line in self.err.splitlines() if not line.startswith("step ")]
        if "Traceback" in self.err:
            code = "traceback"
        elif self.code not in CODES and not verdict:
            pass
        elif self.code == 2 and not boxed and not (len(lines) == 1 and lines[0][:7] == "error: "):
            code = "a refusal that is not one line"
        else:
            return ""
        return f"{code}: circuit {' '.join(map(ascii, self.words))}\n{self.err[-1500:]}"


def typed(words: Sequence[str], before: Callable[[], object] = lambda: None) -> Ended:
    """Types `circuit ...` in a fork, which first does something to itself."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            _work(words, before, out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Ended(tuple(words), code, *texts)


def _work(words: Sequence[str], before: Callable[[], object], out: int, err: int) -> None:
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (have + MEMORY, have + MEMORY))
        before()
        code = watched(words[1:]) if words[0] == "watch" else type_in(words)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watched(words: Sequence[str]) -> int:
    """Runs a loop of somebody's own, whose refusals are told as those of a command; the code."""
    try:
        watch(words)
    except CircuitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def renewed(world: Path, place: Path) -> None:
    """Makes the working directory a copy of a folder; of links, but for what is appended to."""
    os.chdir(place.parent)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place, copy_function=linked)
    os.chdir(place)


def linked(source: str, target: str) -> None:
    """Give a file another name, or copy one that commands write in place."""
    in_place = source.endswith((".journal", "replays.jsonl"))
    _ = shutil.copy2(source, target) if in_place else os.link(source, target)


def files() -> dict[str, bytes]:
    """Every file here but locks and what a killed writer has left of one, without clocks.

    A digest that covers a clock goes, too; the order in which a manifest lists files is of claims.
    """
    every = (path for path in Path().rglob("*") if path.is_file())
    kept = (path for path in every if not path.name.endswith((".lock", ".circuit-tmp")))
    return {path.as_posix(): _timeless(path) for path in kept}


def _timeless(path: Path) -> bytes:
    data = re.sub(COSTS, b"", re.sub(CLOCK, b"", path.read_bytes()))
    if path.name.endswith(".manifest.json"):  # its digests are of what stood there meanwhile, too
        return json.dumps(sorted(claimed(data) or ())).encode()
    if path.name == "costs.json":
        return b"".join(re.findall(rb'"(?!digest)\w+":', data))
    clocked = path.name.endswith(("_report.json", "summary.json"))
    return re.sub(rb'"digest": "\w+"', b"", data) if clocked else data


def claimed(manifest: bytes) -> list[str] | None:
    """The names that a manifest lists; None if it is not as it was written."""
    try:
        return list(unsealed(parse_json(manifest), where="", fix="")["files"])
    except (ValueError, KeyError, CircuitError):
        return None


def differing(ours: dict[str, bytes], theirs: dict[str, bytes]) -> list[str]:
    """Names of files that are not in both with the same content."""
    return sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
