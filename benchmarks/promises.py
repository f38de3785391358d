"""Runs the command beside each promise of docs/exactness.md and looks for the figures there.

    python benchmarks/promises.py [WORD ...]     # of lines that hold one of the words; all: an hour

Prints one line a promise; exits with the number of those whose figures were not printed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = "| fault or bad input | what happens | figure | command |"
KILLS = "| job | calls | states tried | disks full at |"


def rows(head: str) -> Iterator[list[str]]:
    """Cells of every line of the page's tables with this head."""
    lines = (ROOT / "docs/exactness.md").read_text(encoding="utf-8").split("\n")
    starts = [number + 2 for number, line in enumerate(lines) if line == head]
    for start in starts:
        for line in takewhile(lambda line: line.startswith("|"), lines[start:]):
            yield line.strip("| ").split(" | ")


def promises() -> Iterator[tuple[str, list[str], str]]:
    """Fault, figures and command of every line; those of the kill points are a table of its own."""
    kills = [
        f"{job.strip('`')}: killed before {calls} calls, which leaves {states} states,"
        f" {states} tried; full at {fulls} of them; lost or unequal 0"
        for job, calls, states, fulls in rows(KILLS)
        if job != "in all"
    ]
    for fault, _, figure, command in rows(HEAD):
        figures = re.findall("`([^`]*)`", figure)
        if "cut_off" in command:
            figures += kills
        yield fault, figures, re.findall("`([^`]*)`", command)[0]


def main(words: list[str]) -> int:
    """How many promises do not print their figures."""
    failed = 0
    for fault, figures, command in promises():
        if words and not any(word in f"{fault} {command}" for word in words):
            continue
        done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
        missing = [f"not printed: {figure}" for figure in figures if figure not in done.stdout]
        holds = not missing and done.returncode == 0
        failed += not holds
        print("holds  " if holds else "DIFFERS", fault, *missing, sep="; ", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
