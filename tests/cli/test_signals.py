"""Ctrl-C, SIGTERM and SIGHUP at any moment: one line, 128 plus the number, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
import transformer_lens  # noqa: F401  what a fork would else import anew
from circuit.cli import signals
from command_line import type_in
from warm import warm_program

CIRCUIT = (sys.executable, "-m", "circuit.cli")
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AT_IMPORT = """
import os, sys
number, at = map(int, sys.argv.pop(1).split(","))
seen = 0
def watch(event, _):
    global seen
    if event == "import":
        seen += 1
        if seen == at:
            os.kill(os.getpid(), number)
from circuit.cli import main
sys.addaudithook(watch)
main()
"""


@pytest.fixture(autouse=True)
def _heeded() -> Iterator[None]:
    """What a script has put into the background ignores SIGINT, and so do its children."""
    ignored = [number for number in NUMBERS if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("at", "number"), list(zip([2, 40, 90, 150, 200, 250, 300], cycle(NUMBERS), strict=False))
)
def test_a_signal_while_the_program_is_imported(at: int, number: signal.Signals) -> None:
    """At an import, whatever the machine's speed: this command has more than three hundred."""
    done = subprocess.run(
        [sys.executable, "-c", AT_IMPORT, f"{int(number)},{at}", "trace", "qk", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + number, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("interrupted")
    assert done.stdout == ""


def until(happened: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in NUMBERS[1:])]
)
def test_a_signal_leaves_a_checkpoint_and_one_line(
    desk: Path, tmp_path: Path, number: signal.Signals
) -> None:
    program, metrics = tmp_path / "bin" / "circuit", Path("runs/tiny/metrics.jsonl")
    words = ["train", "--config", "configs/train/tiny.json", "--set", "steps=100000"]
    with warm_program(program, type_in):
        process = subprocess.Popen(
            [program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        until(lambda: metrics.exists() and len(metrics.read_bytes()) > 2000, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert b"Traceback" not in err
    line = err.decode().splitlines()[-1]
    assert line.startswith("interrupted after step ")
    assert line.endswith("with a checkpoint; go on with --resume")
    assert list(Path("runs/tiny/checkpoints").glob("step_*.pt"))


def test_what_was_ignored_stays_ignored() -> None:
    before = {each: signal.getsignal(each) for each in NUMBERS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert set(signals.take_over(signals.leave)) == {signal.SIGINT, signal.SIGTERM}
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with signals.stop_on_first() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def working_below(folder: Path) -> list[str]:
    """Processes whose working directory is there."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cwd").readlink().is_relative_to(folder):
                found.append((place / "cmdline").read_text())
        except OSError:
            continue
    return [line for line in found if "circuit" in line]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_reproduction_ends_with_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen(
        [*CIRCUIT, "reproduce", "reference", "--scale", "smoke"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    logs = tmp_path / "artifacts/scale/smoke/artifacts/logs"
    until(lambda: any("$ circuit" in log.read_text() for log in logs.glob("*__*.log")), process)
    assert len(working_below(tmp_path)) > 2
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert err.decode().splitlines()[-1] == "interrupted; start it again to go on"
    assert b"Traceback" not in err
    assert working_below(tmp_path) == []
    assert not (tmp_path / "artifacts/scale/smoke/artifacts/claims").exists()
