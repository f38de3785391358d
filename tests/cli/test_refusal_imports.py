"""What a refusal does without: nothing is imported before what is already known has been looked at.

A refusal takes as long as its imports. Each kind is typed in a process of its own, which says what
it has imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ALWAYS = {"torch", "rich.console", "typer._adapters"}
"""By no refusal: Typer reads plain values by itself, and the line is printed without rich."""
RUNS = ALWAYS | {"circuit.runs", "circuit.trace", "circuit.training", "circuit.figures.attribution"}
CONFIGS = RUNS | {"circuit.tasks", "circuit.model", "circuit.core.update", "circuit.reports.report"}
WORDS = CONFIGS | {"pydantic", "circuit.config", "circuit.page"}

RUN = ("--config", "runs/tiny")
READ = ("--probe-set", "runs/tiny/analysis/probe_set.jsonl")
TO = ("--output-dir", "out")
FILE = ("--checkpoint", "runs/tiny/checkpoints/step_000003.pt")
CODE = ("value-code-subspace-report", *RUN, *FILE, *TO)
KINDS = {
    "unknown command": (("trian",), WORDS),
    "unknown option": (("train", "--nowhere"), WORDS),
    "no such config": (("train", "--config", "nowhere.json", "--threads", "1"), WORDS),
    "no folder of a run": (("page", "nowhere"), WORDS),
    "no folder of one of two runs": (("page", "--compare", "runs/tiny", "nowhere"), WORDS),
    "no folder of a trace": (("trace", "show", "nowhere"), WORDS),
    "no trace to verify": (("trace", "verify", "runs/tiny"), WORDS),
    "no trace to check out": (("trace", "checkout", "nowhere", "--step", "3"), WORDS),
    "unknown field": (("train", *RUN, "--set", "nowhere=1"), CONFIGS),
    "field out of bounds": (("train", *RUN, "--set", "steps=0"), CONFIGS),
    "option out of bounds": (
        ("weight-svd-trace", *RUN, *FILE, *TO, "--max-singular-values", "0"),
        RUNS,
    ),
    "unknown stage": ((*CODE, *READ, "--stage", "layer_9_post_mlp"), RUNS),
    "unknown head": (
        ("trace", "qk", *RUN, *READ, *TO, "--optimizer-trace-dir", "trace", "--head", "L9H9"),
        RUNS,
    ),
    "no such probe set": (
        (*CODE, "--probe-set", "nowhere.jsonl", "--stage", "embedding"),
        ALWAYS | {"circuit.trace", "circuit.training.setup", "circuit.tasks.benchmark"},
    ),
}
"""By kind: a command line, and what is not to be imported for it."""

TYPE = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules))))
from circuit.cli import main
main()
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_imports_only_what_it_looks_at(kind: str, trained: Path) -> None:
    words, without = KINDS[kind]
    done = subprocess.run(
        [sys.executable, "-c", TYPE, *words], capture_output=True, text=True, check=False
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line[:7]) == (2, "error: ")
    assert without.intersection(json.loads(done.stdout)) == set()
