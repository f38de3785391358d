"""Standard output and error as the world has them: closed pipes, full devices, other encodings; and
the signals that end a program.

A closed pipe is nobody listening: the command goes on in silence, and its exit code keeps its
meaning. A device that is full is a refusal. What an encoding lacks is shown as `?`.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any, TextIO

from circuit import CircuitError


class Stream:
    """A text stream whose writes end in silence, or in a refusal, and never in a traceback."""

    def __init__(self, inner: TextIO, name: str) -> None:
        self._inner, self._name = inner, name
        reconfigure = getattr(inner, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")

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
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise CircuitError(
                f"cannot be written ({error.strerror})",
                where=f"standard {self._name}",
                fix="what the command has made is on the disk",
            ) from None


_received = [signal.SIGINT]


def interrupt(number: int, _: FrameType | None) -> None:
    """A signal handler: as Ctrl-C, with the signal's own exit code."""
    _received.append(signal.Signals(number))
    raise KeyboardInterrupt


def note(number: int) -> None:
    """Remember the signal that a command has answered itself."""
    _received.append(signal.Signals(number))


def interrupted_code() -> int:
    """Exit code of a program that a signal has ended: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + _received[-1]


def take_over() -> None:
    """Put streams and signals in order, before a command begins."""
    if not isinstance(sys.stdout, Stream) and sys.stdout is not None:
        sys.stdout = Stream(sys.stdout, "output")
    if not isinstance(sys.stderr, Stream) and sys.stderr is not None:
        sys.stderr = Stream(sys.stderr, "error")
    signal.signal(signal.SIGTERM, interrupt)
