"""How command lines are read: as Typer does, but for what it says of mistakes in them.

A mistake in the words is a `CircuitError`, as any other mistake in the input is. An option that is
not repeatable is given once: Typer would take its last value and forget the others. What the
library says of a field, which it names in backticks, is told of the option that the command has
for it.
"""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from circuit import CircuitError

MISTAKE: type[Any] = typer.BadParameter.__mro__[2]
"""click's `ClickException`, of which some versions of Typer have a copy of their own."""
_TYPED = "circuit.typed"
_PLAIN_NUMBER = re.compile("[0-9]{1,15}")
_ELSEWHERE = {
    name: f"--{name.replace('_', '-')}" for name in ("overwrite", "resume", "allow_drift", "half")
}
"""What a command may have to say of the option of another one."""


def once(command: Any, context: Any, parser: Any) -> Any:
    """The parser, which refuses an option that stands twice and takes one value."""
    parse = parser.parse_args

    def parsed(args: list[str]) -> Any:
        values, rest, order = parse(args)
        context.meta[_TYPED] = values
        for param, times in Counter(order).items():
            single = param.param_type_name == "option" and not (param.multiple or param.is_flag)
            if single and times > 1 and not context.resilient_parsing:
                raise CircuitError(
                    f"given {times} times",
                    where=f"{context.command_path} {max(param.opts, key=len)}",
                    expected="once, as it takes one value",
                )
        return values, rest, order

    parser.parse_args = parsed
    return parser


class Reading:
    """How the values of an option are read: by Typer, unless they need no reading.

    Typer asks pydantic, which takes longer than all else, also of what is not given, and of texts.
    """

    def __init__(self, param: Any) -> None:
        annotation = param.type_descriptor.annotation
        self.info = param.type_descriptor.parameter_info
        self.kind = get_args(annotation)[0] if get_origin(annotation) is list else annotation
        self.by_typer: Callable[[], Any] = param.get_runtime_param

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value, or the values of an option that takes several."""
        several = param.multiple or param.nargs == -1
        if value is None:
            return () if several else None
        values = value if several else [value]
        if self.kind is Path and "" in values and not ctx.resilient_parsing:
            # which Path would take for the current folder
            raise CircuitError(
                "an empty path",
                where=_place(ctx.command_path, param),
                expected="a path, such as . for the current folder",
            )
        if all(map(self.is_plain, values)):
            return [self.kind(one) for one in value] if several else self.kind(value)
        return self.by_typer().coerce(value, param=param, ctx=ctx)

    def is_plain(self, value: Any) -> bool:
        """Whether the type alone makes it of the text, and nothing is to be said of it."""
        if self.kind in (str, Path):
            return self.kind is str or _may_be_read(value)
        least, most = self.info.min, self.info.max
        return (
            self.kind is int
            and _PLAIN_NUMBER.fullmatch(str(value)) is not None
            and (least is None or int(value) >= least)
            and (most is None or int(value) <= most)
        )


def _may_be_read(path: Any) -> bool:
    """Whether a path is nothing's, or of what may be read: what may not Typer refuses."""
    try:
        return os.access(path, os.R_OK) or not os.access(path, os.F_OK)
    except ValueError:  # no path
        return False


def quick(params: list[Any]) -> list[Any]:
    """The options, whose values are read without pydantic where that can be.

    Switches are off by default: Typer's own are None, of which it asks pydantic.
    """
    for param in params:
        if not hasattr(param, "type_descriptor"):
            continue  # another Typer: it reads them itself
        if param.type_descriptor.annotation is bool and param.default is None:
            param.default = False
        if "get_runtime_param" not in vars(param):
            param.get_runtime_param = lambda reading=Reading(param): reading
    return params


@cache
def keep_what_is_imported() -> None:
    """What is there now stays, and is not searched for garbage; once a process."""
    gc.freeze()


class Command(TyperCommand):
    """A command of this program."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Typer's."""
        return quick(super().get_params(ctx))

    def make_parser(self, ctx: Any) -> Any:
        """Typer's, which takes no option twice."""
        return once(self, ctx, super().make_parser(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Typer's; a refusal names options."""
        keep_what_is_imported()
        gc.enable()
        try:
            return super().invoke(ctx)
        except CircuitError as error:
            options = (param for param in self.params if param.param_type_name == "option")
            flags = _ELSEWHERE | {param.name: max(param.opts, key=len) for param in options}
            message = re.sub(r"`(\w+)`", lambda word: flags.get(word[1], word[0]), str(error))
            raise CircuitError(message) from error


class Group(TyperGroup):
    """A group of commands, or the whole program."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Typer's."""
        return quick(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Without a word, the help, and the exit code of a mistake."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help(), nl=False)  # which rich has printed
            ctx.exit(2)
        return super().parse_args(ctx, args)


class Commands(typer.Typer):
    """A group, whose commands are of this kind."""

    def __init__(self, *, cls: type[TyperGroup] = Group, **settings: Any) -> None:
        super().__init__(cls=cls, **settings)

    def command(self, name: str | None = None, *, cls: Any = Command, **settings: Any) -> Any:
        """As Typer's."""
        return super().command(name, cls=cls, **settings)


def _place(path: str, param: Any) -> str:
    """An option or an argument of the command of that path."""
    return f"{path} {max(param.opts, key=len) if param.opts[0][0] == '-' else param.name}"


def refusal(mistake: Any) -> CircuitError:
    """What Typer says of a mistake in the words, in one line, with the value that was given."""
    context: Any = getattr(mistake, "ctx", None)
    param: Any = getattr(mistake, "param", None)
    path = "circuit" if context is None else context.command_path
    fix = f"see `{path} --help`"
    typed: dict[str, Any] = {} if context is None else context.meta.get(_TYPED, {})
    typed_value = None if param is None else typed.get(param.name)
    if param is not None and typed_value not in (None, ()):
        values = typed_value if isinstance(typed_value, list | tuple) else [typed_value]
        expected = mistake.message.removeprefix("Input should be ").partition(", unable")[0]
        return CircuitError(
            ", ".join(map(repr, values)),
            expected=expected.rstrip("."),
            where=_place(path, param),
            fix=fix,
        )
    text = mistake.format_message().rstrip(".")
    return CircuitError(text[0].lower() + text[1:], where=path, fix=fix)


def run(app: typer.Typer, words: list[str]) -> int:
    """One command line; its exit code.

    Raises:
        CircuitError: its words are mistaken, or the command refuses.
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context("circuit", list(words)) as context:
            command.invoke(context)
    except typer.Exit as ending:
        return int(ending.exit_code)
    except SystemExit as ending:  # Typer has its own: it is code of somebody's that ends itself
        raise CircuitError(
            f"code of yours ended the program (SystemExit: {ending.code})",
            expected="that it returns",
            fix="take `sys.exit` out of what a task, a scalar or a recipe does",
        ) from ending
    except MISTAKE as mistake:
        raise refusal(mistake) from None
    return 0
