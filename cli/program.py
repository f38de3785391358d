"""The program: its hand-written commands, and those that reports declare.

Nothing here, nor anything imported here, imports torch: help stays quick. A command line gets only
the command that its words name, for each takes time to build, or what there is to list of all.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from typing import Annotated

import typer

from circuit import CircuitError, __version__

from . import (
    checkpoints,
    data,
    page,
    parsing,
    quickstart,
    reports,
    reproduce,
    shells,
    signals,
    streams,
    study,
    trace,
    training,
)
from .output import print_error, say_interrupted

HAND_WRITTEN = (quickstart, page, data, training, checkpoints, trace, reproduce, study)


def program(words: Sequence[str] | None = None) -> typer.Typer:
    """The program for a command line; all of it in full where none is given.

    Where the words name no command, the program only lists what there is.
    """
    app = parsing.Commands(
        name="circuit",
        cls=shells.Program,
        help="How training writes a circuit into a transformer, step by step and exactly.",
        rich_markup_mode="rich",
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for module in HAND_WRITTEN:
        module.register(app)
    groups = {}
    for info in app.registered_groups:  # copies: reports add to them
        assert info.typer_instance is not None
        info.typer_instance = group = copy(info.typer_instance)
        group.registered_commands = list(group.registered_commands)
        groups[str(group.info.name)] = group
    if words is None:
        reports.register(app, groups)
        return app
    words = words[1:] if words[:1] == ["--"] else words  # no option stands behind it
    narrow = _narrowed(app, words)
    if narrow is None:  # no hand-written command
        reports.register(app, groups, words)
        narrow = _narrowed(app, words)
    return narrow or _listed(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"circuit {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """How training writes a circuit into a transformer, step by step and exactly."""


def _narrowed(whole: typer.Typer, words: Sequence[str]) -> typer.Typer | None:
    """The program without the commands beside the one that is named; None where none is."""
    if not words:
        return None
    name, rest = words[0], words[1:]
    part = copy(whole)
    for command in whole.registered_commands:
        if command.name == name:
            part.registered_commands, part.registered_groups = [command], []
            return part
    for group in whole.registered_groups:
        inner = group.typer_instance
        if inner is not None and inner.info.name == name:
            chosen = copy(group)
            chosen.typer_instance = _narrowed(inner, rest)
            part.registered_commands, part.registered_groups = [], [chosen]
            return part if chosen.typer_instance else None
    return None


def _listed(whole: typer.Typer) -> typer.Typer:
    """The program with commands that have a name and a help, and no options."""
    part = copy(whole)
    part.registered_commands = [copy(command) for command in whole.registered_commands]
    for command in part.registered_commands:
        command.callback = reports.heading(command.callback.__doc__ or "")
    part.registered_groups = [copy(group) for group in whole.registered_groups]
    for group in part.registered_groups:
        assert group.typer_instance is not None
        group.typer_instance = _listed(group.typer_instance)
    return part


def main() -> None:
    """Run the program; a `CircuitError` becomes one line on stderr and exit code 2."""
    streams.take_over()
    signals.take_over(signals.interrupt)
    sys.exit(exit_code_of(_answer))


def _answer() -> int:
    words = sys.argv[1:]
    if shells.answer(words, os.environ):
        return 0
    typed = shells.typed(os.environ)
    if shells.ASKED in os.environ:
        os.environ["COLUMNS"] = shells.UNBROKEN
        program(typed)(prog_name="circuit")  # Typer answers, and exits
    return parsing.run(program(typed or words), words)


OUT_OF_MEMORY = (os.strerror(errno.ENOMEM), "out of memory", "failed to map segment")
"""What torch's allocators and the loader of libraries say, which have no exception of their own."""
OUT_OF_FILES = os.strerror(errno.EMFILE)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def of_the_machine(error: BaseException) -> CircuitError | None:
    """What to say of an error that the machine is the cause of; None of any other."""
    if isinstance(error, MemoryError) or any(said in str(error) for said in OUT_OF_MEMORY):
        return CircuitError("the memory ran out", fix="free some, or raise its limit (`ulimit -v`)")
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("circuit"):
        return CircuitError(
            f"{error.name} is not installed", fix='pip install "circuit-formation[lens]"'
        )
    if OUT_OF_FILES in str(error):
        return CircuitError("too many files are open", fix="raise their limit (`ulimit -n`)")
    if isinstance(error, OSError) and error.filename is not None:
        # of a path that was only looked at: no permission, a loop of links
        return CircuitError(str(error.strerror), where=os.fsdecode(error.filename))
    if isinstance(error, OSError) and error.errno in FULL:  # of an open file, which names none
        return CircuitError(str(error.strerror), fix="free some space there, or raise the limit")
    if isinstance(error, FileNotFoundError):  # what `os.getcwd` raises, which names no file
        return CircuitError("the current folder is gone", fix="change to one that is there")
    return None


BUG = 70
"""Exit code of a mistake in this program; 1 says that a difference was found, and nothing else."""


def exit_code_of(work: Callable[[], int]) -> int:
    """The exit code of some work, and whatever there is to say of its end."""
    try:
        code = work()
        streams.finish()
        return code
    except CircuitError as error:
        print_error(error)
        return 2
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001  what nobody has foreseen, a panic of Rust's too
        if signals.received() or isinstance(error, KeyboardInterrupt):  # whatever it has led to
            return say_interrupted("what was not finished is not written: start it again")
        refusal = of_the_machine(error)
        if refusal is not None:
            print_error(refusal)
            return 2
        traceback.print_exc()
        return BUG
    finally:
        with suppress(CircuitError):  # what there is to say has been said
            sys.stdout.flush()
