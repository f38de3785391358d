"""Closed pipes, full devices, encodings: no traceback, and codes keep their meaning."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import circuit.cli.program
import pytest
import typer.main
from circuit.cli.app import app
from circuit.cli.output import print_error
from command_line import type_in

from circuit.errors import CircuitError

CIRCUIT = (sys.executable, "-m", "circuit.cli")


def every_command(group: Any, *words: str) -> Iterator[tuple[str, ...]]:
    """The words of every command and group of the program."""
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from every_command(command, *words, name)


COMMANDS = sorted(every_command(typer.main.get_command(app)))


@pytest.fixture(autouse=True, scope="module")
def _put_together(_one_command_line: None) -> None:
    """The commands are put together before the forks, once for all of them."""
    typer.main.get_command(circuit.cli.program.program())


@dataclass(frozen=True)
class Said:
    code: int
    out: bytes
    err: bytes


def forked(*words: str, out: str = "", err: str = "", encoding: str = "utf-8") -> Said:
    """Types `circuit ...` in a fork with outputs of its own.

    Args:
        out, err: `full`, `closed` (nobody reads) or `shut` (there is no such descriptor); a file
            by default.
    """
    with tempfile.TemporaryFile() as first, tempfile.TemporaryFile() as second:
        child = os.fork()
        if not child:
            code = 99
            try:
                for number, kind, file in ((1, out, first), (2, err, second)):
                    _lead(number, kind, file.fileno())
                for number, kind, name in ((1, out, "stdout"), (2, err, "stderr")):
                    raw = None if kind == "shut" else os.fdopen(number, "wb", closefd=False)
                    stream = None if raw is None else io.TextIOWrapper(raw, encoding=encoding)
                    setattr(sys, name, stream)
                code = type_in(words)
                sys.stderr.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = []
        for file in (first, second):
            file.seek(0)
            said.append(file.read())
        return Said(code, *said)


def _lead(number: int, kind: str, file: int) -> None:
    if kind == "shut":
        os.close(number)
        return
    if kind == "closed":
        reader, file = os.pipe()
        os.close(reader)
    if kind == "full":
        file = os.open("/dev/full", os.O_WRONLY)
    os.dup2(file, number)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_command_trips_over_its_outputs(words: tuple[str, ...]) -> None:
    """Its help, and its refusal of an option that there is not."""
    done = forked(*words, "--help", encoding="ascii")
    assert (done.code, done.err) == (0, b""), done
    assert b"--help" in done.out
    done.out.decode("ascii")
    done = forked(*words, "--n\u00fcrgends", encoding="ascii")
    assert (done.code, done.out, done.err.count(b"\n")) == (2, b"", 1), done
    assert b"no such option: --n\\xfcrgends" in done.err


@pytest.mark.parametrize(
    "words",
    [
        *(("--help",), ("trace", "--help"), ("trace", "qk", "--help")),
        *(("--version",), ("--show-completion", "bash")),
    ],
    ids=" ".join,
)
def test_nobody_has_to_listen(words: tuple[str, ...]) -> None:
    for out in ("closed", "shut"):
        assert forked(*words, out=out) == Said(0, b"", b""), out
    full = forked(*words, out="full")
    assert (full.code, full.err.count(b"\n")) == (2, 1), full
    assert b"standard output: cannot be written (No space left on device)" in full.err
    for err in ("closed", "shut", "full"):
        assert forked(*words, "--nowhere", err=err) == Said(2, b"", b""), err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_has_a_stand_in(traced: Path, encoding: str) -> None:
    home = Path("\u03b1" + str(traced))
    traced.rename(home)
    shown = forked("trace", "show", str(home), encoding=encoding)
    assert (shown.code, shown.err) == (0, b"")
    assert shown.out.startswith(b"\\u03b1trace")
    (line,) = [line for line in shown.out.splitlines() if line.startswith(b"loss (log)")]
    assert set(line.split()[3].decode()) <= set("_.:-=+*#")
    for words in (("trace", "verify", str(home)), ("trace", "show", str(home), "--json")):
        done = forked(*words, encoding=encoding)
        assert (done.code, done.err) == (0, b""), words


def test_nobody_listening_changes_no_exit_code(traced: Path) -> None:
    """1 says that a difference was found; a bug is 70."""
    for out in ("closed", "shut"):
        assert forked("trace", "verify", str(traced), out=out).code == 0
    assert forked("trace", "verify", str(traced), out="full").code == 2
    for err in ("closed", "shut", "full"):
        assert forked("trace", "verify", "nowhere", err=err).code == 2


def test_what_is_printed_is_no_command_to_the_terminal(traced: Path) -> None:
    home = Path("a\x1b[31m\x9b2J\u202e[red]\nb")
    traced.rename(home)
    for words in (("trace", "show"), ("trace", "verify"), ("page",)):
        done = forked(*words, str(home))
        said = (done.out + done.err).decode()
        assert all(line.isprintable() for line in said.split("\n")), said
    named = "a\\x1b[31m\\x9b2J\\u202e[red]"
    assert named in forked("trace", "show", str(home)).out.decode()
    assert f"{named}\\nb" in forked("page", str(home)).err.decode()


@pytest.mark.parametrize(
    ("settings", "coloured"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "Unknown"}, False),
    ],
)
def test_a_refusal_is_coloured_where_a_terminal_takes_it(
    settings: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm"} | settings).items():
        monkeypatch.setenv(name, value)
    print_error(CircuitError("no"))
    assert ("\x1b" in shown.getvalue()) == coloured
    assert "no" in shown.getvalue()


def test_a_shut_output_leaves_its_place_to_no_file(desk: Path) -> None:
    """What a library prints to descriptor 2 must not land in the first file that is opened."""
    code = (
        "import os, circuit.cli as c, circuit.cli.streams as s; s.take_over();"
        " print(os.open('.', os.O_RDONLY) > 2)"
    )
    script = '"$@" 2>&- <&-'
    words = ["bash", "-c", script, "-", sys.executable, "-c", code]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "True\n"


class Panic(BaseException):
    """As Rust's in Python."""


@pytest.mark.parametrize("bug", [ZeroDivisionError, Panic])
def test_a_bug_ends_with_a_code_of_its_own(
    bug: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise bug

    monkeypatch.setattr("circuit.folders.trace_folder", broken)
    done = forked("trace", "show", "any")
    assert (done.code, bug.__name__.encode() in done.err) == (70, True)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the memory ran out"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some"),
        (RuntimeError("DefaultCPUAllocator: ... (Cannot allocate memory)"), "the memory ran out"),
        (ImportError("libx.so: failed to map segment from shared object"), "the memory ran out"),
        (Panic('Os { code: 24, message: "Too many open files" }'), "too many files are open"),
    ],
)
def test_what_the_machine_lacks_is_said_in_one_line(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr("circuit.folders.trace_folder", broken)
    done = forked("trace", "show", "any")
    assert (done.code, done.err.count(b"\n")) == (2, 1)
    assert said in done.err.decode()
