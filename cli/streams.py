"""Standard output and error as the world has them: closed, full, of an encoding with few letters.

A closed pipe is nobody listening: the command goes on in silence, and its exit code keeps its
meaning. An output that is full is a refusal; where standard error is, there is nobody to tell. What
an encoding lacks has a stand-in of the same width, or is written as Python escapes it.
"""

from __future__ import annotations

import codecs
import os
import sys
from typing import Any, TextIO

from circuit import CircuitError

BLOCKS = "▁▂▃▄▅▆▇█"
_STAND_INS = str.maketrans(
    dict(zip(BLOCKS, "_.:-=+*#", strict=True)) | {"…": "~", "━": "=", "╸": "-", "╺": "-", "•": "*"}
)
_LACKING = "circuit.lacking"


def _stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for letters that an encoding lacks; see `codecs.register_error`."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end].translate(_STAND_INS)
    return lacking.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error(_LACKING, _stand_in)


class Stream:
    """A text stream whose writes end in silence, or in a refusal, and never in a traceback."""

    def __init__(self, inner: TextIO, name: str) -> None:
        self._inner, self._name = inner, name
        self.refusal: CircuitError | None = None
        reconfigure = getattr(inner, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_LACKING)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, text: str) -> int:
        """Write text, all of it as far as the caller can know."""
        try:
            return self._inner.write(text)
        except (OSError, ValueError) as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Force it out."""
        try:
            self._inner.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Send what follows to nowhere, so that the interpreter's own last flush is quiet, too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._inner.fileno())
        os.close(nowhere)
        full = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
        if full and self._name == "output":
            self.refusal = CircuitError(
                f"cannot be written ({getattr(error, 'strerror', error)})",
                where="standard output",
                fix="what the command has made is on the disk",
            )
            raise self.refusal from None


def finish() -> None:
    """Flush the output, behind a command.

    Raises:
        CircuitError: it is full, also where the one who wrote has caught that.
    """
    sys.stdout.flush()
    refusal = getattr(sys.stdout, "refusal", None)
    if refusal is not None:
        raise refusal


def take_over() -> None:
    """Put the streams in order, before a command begins.

    A standard stream that is closed leads to nowhere, and not to the first file that is opened.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))
    for attribute, name in (("stdout", "output"), ("stderr", "error")):
        stream = getattr(sys, attribute)
        if not isinstance(stream, Stream):
            setattr(sys, attribute, Stream(stream, name))
