"""Mistakes in the words of a command line: one line each, and no option counts silently."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from circuit.cli.app import app

Run = Callable[..., Any]


def commands(group: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *words, name)
        else:
            yield (*words, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))
every_command = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


def single(command: Any) -> list[str]:
    """Options that take one value."""
    options = [param for param in command.params if param.param_type_name == "option"]
    return [max(o.opts, key=len) for o in options if not (o.multiple or o.is_flag)]


@every_command
def test_an_option_that_takes_one_value_is_given_once(circuit: Run, words: tuple[str, ...]) -> None:
    for option in single(COMMANDS[words]):
        done = circuit(*words, option, "1", option, "2")
        assert done.code == 2
        (line,) = done.err.splitlines()
        named = " ".join(("error: circuit", *words, option))
        assert line == f"{named}: given 2 times; expected once, as it takes one value"


def test_repeatable_options_and_switches_may_stand_twice(circuit: Run) -> None:
    words = ("train", "--config", "configs/train/tiny.json", "--json", "--json")
    assert circuit(*words, "--set", "steps=1", "--set", "seed=1").code == 0


@every_command
def test_a_mistake_in_the_words_is_one_plain_line(circuit: Run, words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    numbers = [
        max(param.opts, key=len)
        for param in command.params
        if param.param_type_name == "option" and "int" in str(param.type_descriptor.annotation)
    ]
    tried = [(number, "many") for number in numbers] + [("--nowhere",), ("--config",)]
    for more in (() if any(p.required for p in command.params) else ("--nowhere",), *tried):
        done = circuit(*words, *([more] if isinstance(more, str) else more))
        assert (done.code, done.out) == (2, ""), more
        (line,) = done.err.splitlines()
        assert line.startswith("error: circuit"), more
        assert " --help`" in line, more
    for number in numbers:
        line = circuit(*words, number, "many").err
        assert f"{number}: 'many'; expected a valid integer; see `circuit {' '.join(words)}" in line


@every_command
def test_an_empty_path_is_not_the_current_folder(circuit: Run, words: tuple[str, ...]) -> None:
    params = COMMANDS[words].params
    arguments = [param for param in params if param.param_type_name == "argument"]
    for param in params:
        if "Path" not in str(param.type_descriptor.annotation):
            continue
        name = param.name if param in arguments else max(param.opts, key=len)
        typed = ["" if one is param else "x" for one in arguments]
        done = circuit(*words, *(typed if param in arguments else [name, "", *typed]))
        assert (done.code, done.out) == (2, ""), name
        (line,) = done.err.splitlines()
        assert line.startswith(f"error: circuit {' '.join(words)} {name}: an empty path;")


def test_the_first_quickstart_replaces_none(
    circuit: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("circuit.quickstart.quickstart", stopped)
    assert "replaced" not in circuit("quickstart").out
    Path("artifacts/runs/quickstart").mkdir(parents=True)
    assert "the earlier quickstart is replaced" in circuit("quickstart").out


@pytest.mark.parametrize("code", [None, 0, 1, "done"])
def test_somebodys_code_that_ends_the_program_is_a_refusal(
    circuit: Run, monkeypatch: pytest.MonkeyPatch, code: object
) -> None:
    """Otherwise it would end with the exit code of a command that has done its work."""

    def ended(*_: Any, **__: Any) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("circuit.quickstart.quickstart", ended)
    done = circuit("quickstart")
    assert done.code == 2
    assert f"error: code of yours ended the program (SystemExit: {code}); " in done.err


def test_a_later_command_of_a_process_goes_through_nothing_that_is_there(
    circuit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million objects of a process of tests, or of jobs, which took longer than most commands."""
    circuit("trace", "show", "nowhere")
    for name in ("freeze", "get_freeze_count", "get_objects", "collect"):
        monkeypatch.delattr(gc, name)
    assert circuit("trace", "show", "nowhere").code == 2
