"""Closed pipes, full devices, encodings and signals: no traceback, and codes keep their meaning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import type_in

import circuit.model.build  # noqa: F401  (TransformerLens, which the forks then have)

CIRCUIT = (sys.executable, "-m", "circuit.cli")


def test_a_closed_pipe_is_nobody_listening() -> None:
    """Help and version go to a reader that has gone."""
    for words in (("--help",), ("--version",), ("--show-completion", "bash")):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [*CIRCUIT, *words], stdout=writer, stderr=subprocess.PIPE, check=False
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, b""), words


def test_a_full_device_is_a_refusal_in_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*CIRCUIT, "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert "standard output: cannot be written (No space left on device)" in line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_a_question_mark(encoding: str) -> None:
    words = ("trace", "show", "no\u03b1where")
    done = subprocess.run(
        [*CIRCUIT, *words],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"no?where: there is no trace here" in done.stderr
    assert b"Traceback" not in done.stderr


def in_a_fork(work: Callable[[], int], stderr: Path) -> int:
    """Starts some work in a fork, which has imported what it needs and writes there; its id."""
    child = os.fork()
    if not child:
        code = 1
        try:
            sys.stdout = sys.stderr = stderr.open("w", buffering=1)
            code = work()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_one_line(
    desk: Path, number: signal.Signals, code: int
) -> None:
    words = ["train", "--config", "configs/train/tiny.json", "--set", "steps=100000"]
    child = in_a_fork(lambda: type_in(words), stderr=Path("stderr"))
    metrics = Path("runs/tiny/metrics.jsonl")
    while not metrics.exists() or len(metrics.read_bytes()) < 2000:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    err = Path("stderr").read_text()
    assert "Traceback" not in err
    assert "with a checkpoint; go on with --resume" in err
    assert list(Path("runs/tiny/checkpoints").glob("step_*.pt"))
