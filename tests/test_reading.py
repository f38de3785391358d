"""Whatever stands under a name that a command reads: one line, and neither hang nor memory."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import Done, type_and_read
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import circuit, trained, trained_once

from circuit.artifacts import OutputFolder, iter_jsonl, read_jsonl
from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.reading import MAX_LINE, checked_path, file_digest, read_bytes, read_json
from circuit.reports.written import read_report
from circuit.runs.opening import open_run
from circuit.sizes import MEMORY
from circuit.tasks.benchmark import load_benchmark
from circuit.tasks.probes import read_probe_set
from circuit.trace.store import TraceStore
from circuit.train_config import TrainConfig, load_run_config
from circuit.training.checkpoints import load_checkpoint, read_header

__all__ = ["circuit", "trained", "trained_once"]

NO_BENCHMARK: Any = None
"""What a probe set is held against after its files have been read."""

READERS: dict[str, Callable[[Path], object]] = {
    "bytes": read_bytes,
    "json": read_json,
    "digest": file_digest,
    "rows": read_jsonl,
    "one row": lambda path: next(iter_jsonl(path)),
    "config": lambda path: load_config(path, TrainConfig),
    "run config": load_run_config,
    "checkpoint": load_checkpoint,
    "header": read_header,
    "report": read_report,
    "benchmark": load_benchmark,
    "probe set": lambda path: read_probe_set(path.with_suffix(".jsonl"), NO_BENCHMARK),
    "trace": TraceStore,
    "run": open_run,
}


def put(kind: str, place: Path) -> Path:
    """Something that is no file of this program, in a folder."""
    path = place / kind.replace(" ", "_")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))  # a socket's name has about a hundred bytes
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**43)
    elif kind == "long name":
        return place / ("x" * 5000)
    elif kind == "long path":
        return place / "/".join(["y" * 200] * 25)
    elif kind == "nul":
        return place / "a\0b"
    elif kind == "surrogate":
        return place / "a\ud800b"
    elif kind == "empty":
        path.touch()
    elif kind == "noise":
        path.write_bytes(bytes(range(256)) * 10)
    elif kind == "deep":
        path.write_text("[" * 10**5)
    elif kind == "digits":
        path.write_text("1" * 5000)
    return path


THINGS = [
    *("pipe", "socket", "folder", "device", "loop", "sparse", "long name", "long path", "nul"),
    *("surrogate", "empty", "noise", "deep", "digits", "nothing"),
]


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_such_file_is_refused_in_one_line(
    reader: str, thing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if thing == "sparse":
        monkeypatch.delenv(MEMORY, raising=False)
    path = put(thing, tmp_path)
    if reader in ("bytes", "digest") and thing in ("empty", "noise", "deep", "digits"):
        return  # they are files
    if reader == "digest" and thing == "sparse":
        return  # it is read piece by piece, which takes no memory
    if reader == "rows" and thing == "empty":
        assert read_jsonl(path) == []
        return
    if reader == "one row" and thing == "empty":
        assert list(iter_jsonl(path)) == []
        return
    with pytest.raises(CircuitError) as refusal:
        READERS[reader](path)
    assert "\n" not in str(refusal.value)
    assert "Errno" not in str(refusal.value)


COMMANDS = (
    "train --config {}",
    "train --config tiny.json --overwrite --set output_dir={}",
    "train --config tiny.json --overwrite --set output_dir=elsewhere --set benchmark_dir={}",
    "evaluate --config runs/tiny/run_config.json --checkpoint {}",
    "trace verify {}",
    "trace record --config {} --from-initialization --end-step 3 --output-dir elsewhere",
    "generate-benchmark --config {}",
    "generate-probe-set --benchmark-dir {} --output elsewhere.jsonl --examples-per-split 2",
    "import-checkpoints {} --benchmark-dir data/tiny --output-dir elsewhere",
    "export --config runs/tiny/run_config.json --checkpoint {} --output-dir elsewhere",
    "page {}",
    "weight-svd-trace --config runs/tiny/run_config.json --checkpoint {} --output-dir elsewhere",
    "weight-svd-trace --config runs/tiny/run_config.json --checkpoint-dir {} --output-dir there",
    "bilinear-qk-match-separation --config runs/tiny/run_config.json --probe-set {}"
    " --checkpoint runs/tiny/checkpoints/best.pt --output-dir elsewhere",
    "study select-heads --separation-rows {} --start-step 0 --end-step 3 --output-dir elsewhere",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_in_one_line(
    command: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for thing in ("pipe", "socket", "device", "long name", "loop", "deep"):
        path = put(thing, Path())
        words = [word.format(path) for word in command.split()]
        done: Done = type_and_read(words, capsys)
        assert done.code == 2, (thing, done)
        assert done.err.startswith("error: "), (thing, done.err)
        assert done.err.count("\n") == 1, (thing, done.err)


@given(st.text(min_size=1, max_size=600))
def test_a_path_that_is_taken_is_one_for_the_system(text: str) -> None:
    with suppress(CircuitError):
        checked_path(Path("/", text)).exists()


def test_a_line_without_an_end_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(CircuitError, match=f"a line of more than {MAX_LINE} bytes"):
        list(iter_jsonl(path))


def test_a_footer_does_not_decide_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.pt"
    with path.open("wb") as file:
        file.truncate(2**40)
        file.seek(2**40)
        file.write(struct.pack(">Q32s16s", 2**39, b"", b"circuit-state-1\n"))
    with pytest.raises(CircuitError, match=r"would need .* of memory"):
        read_header(path)


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{}", '{"command": 1, "files": []}', '{"command": "c", "files": [1]}'):
        (tmp_path / "c.manifest.json").write_text(text)
        with (
            pytest.raises(CircuitError, match=r"c\.manifest\.json: .*move the folder away"),
            OutputFolder(tmp_path, "c", writes=["*"]),
        ):
            pass
