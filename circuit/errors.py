"""The one error that users see: what is wrong, where, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from circuit.quoting import shown

T = TypeVar("T")


class CircuitError(Exception):
    """A mistake in the input or the environment, as opposed to a bug in this program.

    The command line prints it in one line and exits with status 2.

    Args:
        what: what is wrong, with the value that was given.
        where: file, line, field, tensor or option.
        expected: what would have been accepted.
        fix: the next thing to do.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else shown(where)
        self.expected = expected
        self.fix = fix
        super().__init__(self._line())

    def _line(self) -> str:
        line = self.what if self.where is None else f"{_short(self.where)}: {self.what}"
        if self.expected:
            line += f"; expected {self.expected}"
        if self.fix:
            line += f"; {self.fix}"
        return " ".join(line.split())


def told(error: BaseException) -> str:
    """What somebody's code has raised, in one line, also where it cannot say so itself."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001  its `__str__` is somebody's code, too
        text = "which has no text"
    return f"{type(error).__name__}: {text}"


@contextmanager
def code_of_somebody(
    say: Callable[[str], str],
    *,
    where: object,
    expected: str | None = None,
) -> Iterator[None]:
    """A block that runs somebody's code: whatever it raises or ends itself with is one line.

    Args:
        say: what is said of it, given what was raised.

    Raises:
        CircuitError: the block has raised one, or anything but a keyboard interrupt.
    """
    try:
        yield
    except (CircuitError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise CircuitError(say(told(error)), where=where, expected=expected) from error


def several(values: Iterable[T], field: str) -> list[T]:
    """The values of an argument that takes several.

    Raises:
        CircuitError: it is one value, without a list around it.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        name = repr(values) if isinstance(values, str) else getattr(values, "__name__", None)
        raise CircuitError(
            f"{name or type(values).__name__} alone",
            where=f"`{field}`",
            expected="several",
            fix="put a list around it, also of one",
        )
    return list(values)


def _short(where: str) -> str:
    """A place without its middle, if it is longer than any that can be read."""
    return where if len(where) <= 400 else f"{where[:200]}[...]{where[-150:]}"
