"""A report in parts: the same as in one process, whichever of its jobs was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from circuit.cli.jobs import run_commands
from tiny_run import RUN

ROWS = "counterfactual_training_rows.jsonl"
KEPT = "replays.jsonl"
WORDS = (
    *("trace", "counterfactual", "--config", f"{RUN}/run_config.json", "--scalar", "loss"),
    *("--probe-set", f"{RUN}/analysis/probe_set.jsonl", "--optimizer-trace-dir", "trace"),
    *("--start-step", "4", "--end-step", "9"),
)


def edits(*starts: int) -> tuple[str, ...]:
    """Words of edits from these steps on."""
    said = (f"from {at},set=rate*0.5,steps={at}:9" for at in starts)
    return tuple(word for text in said for word in ("--edit", text))


def left(folder: str, shared: str) -> tuple[bytes, list[bytes]]:
    """The rows of a report, and what its trainings have left."""
    kept = Path(shared, KEPT).read_bytes().splitlines()
    return Path(folder, ROWS).read_bytes(), sorted(kept)


def test_the_jobs_of_parts_end_with_what_one_process_finds(
    circuit: Callable[..., Any], traced: Path
) -> None:
    """In any order of the parts."""
    words = (*WORDS, *edits(8, 5, 7))
    assert circuit(*words, "--replays", "one", "--output-dir", "alone").code == 0
    parts = ("--replays", "shared", "--output-dir", "whole", "--parts", "2")
    done = circuit(*words, *parts, "--dry-run", "--json")
    assert done.code == 0, done.err
    *jobs, gather = done.payload["jobs"]
    assert [job["name"] for job in (*jobs, gather)] == ["part_1", "part_2", "gather"]
    assert [job["steps"] for job in (*jobs, gather)] == [[5, 4, 1], [5, 2], [5]]
    assert done.payload["outputs"] == ["whole/counterfactual_training_report.json"]
    assert run_commands([job["argv"] for job in (*reversed(jobs), gather)]) == 0
    assert left("whole", "shared") == left("alone", "one")
    refused = circuit(*words, *parts)
    assert (refused.code, "pass --overwrite" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--parts", "2"), "--parts: no folder that the parts share; expected also --replays or"),
        (("--parts", "2", "--replays", "x", "--part", "1/2"), "--part and --parts; expected one"),
        (("--replays", "x", "--dry-run"), "--dry-run without --parts; expected both"),
        (("--cores", "2"), "--cores without --parts"),
        (("--", "--jobs", "2"), "unexpected '--jobs'"),
        (("--parts", "2", "--replays", "x", "--profile", "slurm"), "no Slurm here: sbatch"),
    ],
)
def test_what_no_parts_can_be_made_of_is_refused_in_one_line(
    circuit: Callable[..., Any],
    traced: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    done = circuit(*WORDS, *edits(5), "--output-dir", "out", *words)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert said in line
    assert not Path("out").exists()


def processes(*holding: str) -> list[int]:
    """Of this machine, by what stands in their command lines."""
    listed = subprocess.run(["pgrep", "-f", "circuit.cli.job"], capture_output=True, check=False)
    found = []
    for number in map(int, listed.stdout.split()):
        place = Path(f"/proc/{number}/cmdline")
        words = place.read_bytes().split(b"\0") if place.exists() else []
        if all(word.encode() in words for word in holding):
            found.append(number)
    return found


@pytest.mark.system
def test_a_part_that_is_killed_or_diverges_leaves_the_others_and_goes_on(
    circuit: Callable[..., Any], traced: Path
) -> None:
    """With all parts at work at the same time on one folder."""
    words = (*WORDS, *edits(4, 5, 6, 7))
    assert circuit(*words, "--replays", "one", "--output-dir", "alone").code == 0
    command = [sys.executable, "-m", "circuit.cli", *words]
    parts = ["--replays", "shared", "--output-dir", "whole", "--parts", "3", "--cores", "3"]
    wild = ["--edit", "wild,set=rate*1e30,steps=8:9"]  # the last of part 2
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *wild, *parts], **pipes) as started:  # type: ignore[call-overload]
        while not (victims := processes("--part", "3/3")):
            assert started.poll() is None
            time.sleep(0.05)
        os.kill(victims[0], signal.SIGKILL)
        _, told = started.communicate()
    assert started.returncode == 2
    assert "failed: " in told
    assert "part_3" in told
    assert "diverged" in told
    assert Path("whole/parts/1_of_3", ROWS).exists()
    assert not Path("whole", ROWS).exists()
    kept = [json.loads(line) for line in Path("shared", KEPT).read_text().splitlines()[1:]]
    assert {row["edit"]["start"] for row in kept} == {4, 7, 5}
    done = subprocess.run([*command, *parts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert left("whole", "shared") == left("alone", "one")
