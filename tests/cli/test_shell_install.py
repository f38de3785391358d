"""Where `--install-completion` writes: everything or nothing, and what it refuses."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from circuit.cli import shells

Run = Callable[..., Any]
RC = {"bash": ".bashrc", "zsh": ".zshrc"}
SCRIPT = {"bash": ".bash_completions/circuit.sh", "zsh": ".zfunc/_circuit"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, with a quote and a space in its name."""
    path = tmp_path / "it's me"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    for variable in ("ZDOTDIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return path


def entries(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir())


def test_a_home_of_any_name_has_it(circuit: Run, home: Path) -> None:
    assert circuit("--install-completion", "bash").code == 0
    command = f". {shlex.quote(str(home / '.bashrc'))} && complete -p circuit"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "_circuit_completion" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("shell", RC)
@pytest.mark.parametrize("before", [b"", b"alias e='echo \xe9'\n", b"# no newline \xff"])
def test_a_start_up_file_gets_one_line_and_keeps_its_bytes(
    circuit: Run, home: Path, shell: str, before: bytes
) -> None:
    rc = home / "dotfiles"
    rc.write_bytes(before)
    (home / RC[shell]).symlink_to(rc)
    for _ in range(2):
        assert circuit("--install-completion", shell).code == 0
        lines = rc.read_bytes().splitlines()
        assert lines[:-1] == before.splitlines()
        assert b"compinit" in lines[-1] or b"source" in lines[-1]
    assert (home / RC[shell]).is_symlink()


@pytest.mark.parametrize("shell", RC)
def test_nothing_is_written_where_something_cannot_be(circuit: Run, home: Path, shell: str) -> None:
    rc = home / RC[shell]
    rc.symlink_to(home / "gone" / "rc")
    script = home / SCRIPT[shell]
    obstacles = [lambda: None, rc.unlink]  # the link leads nowhere; then the folder is a file
    for clear in obstacles:
        clear()
        if not rc.is_symlink():
            script.parent.touch()
        before = entries(home)
        done = circuit("--install-completion", shell)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "--install-completion: cannot be written" in done.err
        assert entries(home) == before
        assert not script.parent.is_dir()


def test_a_start_up_file_that_has_the_line_need_not_be_writable(
    circuit: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert circuit("--install-completion", "bash").code == 0
    script = home / SCRIPT["bash"]
    script.write_text("old")
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if path.name == RC["bash"] and mode != "rb":
            raise PermissionError(path)
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert circuit("--install-completion", "bash").code == 0
    assert script.read_text() == shells.BASH


@pytest.mark.parametrize("shell", shells.SCRIPTS)
@pytest.mark.parametrize("home", ["", "here"])
def test_without_a_home_nothing_is_written(
    circuit: Run, desk: Path, monkeypatch: pytest.MonkeyPatch, shell: str, home: str
) -> None:
    monkeypatch.setenv("HOME", home)
    for variable in ("ZDOTDIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(shells, "_write", lambda *_: pytest.fail("written"))
    before = entries(desk)
    done = circuit("--install-completion", shell)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "HOME names no folder" in done.err
    assert entries(desk) == before


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("option", [shells.INSTALL, shells.SHOW])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bash", "extra"], "unexpected 'extra'"),
        (["bash", "--help"], "unexpected '--help'"),
        (["ksh"], "no completion for 'ksh'"),
        (["-"], "no completion for '-'"),
        ([""], "the shell is not known"),
    ],
)
def test_a_shell_and_nothing_else_is_taken(
    circuit: Run, home: Path, option: str, words: list[str], said: str
) -> None:
    for typed in ([option, *words], [f"{option}={words[0]}", *words[1:]]):
        done = circuit(*typed)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert said in done.err
    assert entries(home) == []


def test_help_says_that_a_shell_is_taken(circuit: Run) -> None:
    shown = circuit("--help").out
    for option in (shells.INSTALL, shells.SHOW):
        assert re.search(rf"{option}\s+SHELL\s", shown), shown
    for line in (["--show-completion", "fish"], ["--show-completion=fish"]):
        assert circuit(*line).out == shells.FISH
