"""Processes that SIGKILL ends at a chosen point of their work, whatever the machine's speed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

Work = Callable[[], Any]


def calls_of(work: Work) -> int:
    """Does some work; how many calls and returns it was made of, in Python and in C.

    Work that was never done before in this process counts its imports, too, which a fork has not.
    """
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def killed_at(call: float, work: Work) -> bool:
    """Does the work in a forked process, killed at that one of its calls; whether it got there."""
    child = os.fork()
    if not child:
        left = call

        def counted(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.setprofile(counted)
            work()
            sys.setprofile(None)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
