"""The signals that end a program: Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed.

From the program's first line on, each of them ends it with one line and 128 plus its number. While
the program is imported, nothing is being written, and it ends at once; in a command the signal is a
`KeyboardInterrupt`. What was ignored when the program was started (`nohup`, a background job of a
script) stays ignored. Nothing is imported here that takes time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []


def take_over(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Have the signals that are not ignored handled so; the handlers from before."""
    heeded = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    return {each: signal.signal(each, handler) for each in heeded}


def begin() -> None:
    """Heed the signals from here on, before anything is at stake."""
    _received.clear()
    take_over(leave)


def leave(number: int, _: Any) -> None:
    """A handler: end the program at once. For where no file is open and no child runs."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def interrupt(number: int, _: Any) -> None:
    """A handler: as Ctrl-C."""
    _received.append(number)
    raise KeyboardInterrupt


def received() -> bool:
    """Whether a signal has come, and was to end the command."""
    return bool(_received)


def exit_code() -> int:
    """Of a program that a signal has ended: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.

    Also of a `KeyboardInterrupt` that no signal has caused: 130.
    """
    return 128 + (_received[-1] if _received else signal.SIGINT)


@contextmanager
def stop_on_first() -> Iterator[Callable[[], bool]]:
    """Within the block the first signal asks for a stop, which the yielded function tells.

    The second one ends all.
    """
    asked = False

    def ask(number: int, _: Any) -> None:
        nonlocal asked
        asked = True
        _received.append(number)
        take_over(interrupt)

    before = take_over(ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
