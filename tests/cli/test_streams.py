"""Closed pipes, full devices, encodings and signals: no traceback, and codes keep their meaning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_one_line(
    desk: Path, number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [*CIRCUIT, "train", "--config", "configs/train/tiny.json", "--set", "steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    metrics = Path("runs/tiny/metrics.jsonl")
    while not metrics.exists() or len(metrics.read_bytes()) < 2000:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert b"Traceback" not in err
    assert b"with a checkpoint; go on with --resume" in err
    assert list(Path("runs/tiny/checkpoints").glob("step_*.pt"))
