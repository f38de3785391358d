"""Faults under a command: the n-th call that touches the disk is the last, or fails; a small disk.

The interpreter tells of every call into C before it is made, so no writer can forget to ask.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED = 99
"""Exit code of a process that a fault has ended."""
CHANGES = {"fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link", "truncate"}
CHANGES |= {"writev", "ftruncate"}
WRITES = {"write", "writelines", "flush"}
FREES = {"unlink", "remove", "rmdir", "truncate", "ftruncate"}
"""Calls that no full disk refuses."""
NAMESPACES, PAGE = 0x10020000, 4096
"""CLONE_NEWUSER | CLONE_NEWNS; the unit of a disk in memory."""


def touches(call: Any) -> bool:
    """Whether a call into C changes what is on a disk."""
    owner, name = getattr(call, "__self__", None), getattr(call, "__name__", "")
    if name in WRITES and type(owner).__module__ == "_io":
        try:
            return bool(owner.fileno() > 2)
        except (OSError, ValueError, AttributeError):
            return False  # of no file
    return name in CHANGES and getattr(owner, "__name__", "") == "posix"


def fault(number: int, kind: str) -> Callable[[], None]:
    """To be called in the process that is to have it.

    Args:
        number: of the call, from 0.
        kind: `kill` ends the process before the call, `full` lets it fail as on a full disk.
    """
    left = number

    def watch(_: Any, event: str, call: Any) -> None:
        nonlocal left
        if event != "c_call" or not touches(call):
            return
        left -= 1
        if left < 0 and kind == "kill":
            os._exit(KILLED)
        if left < 0 and call.__name__ not in FREES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: sys.setprofile(watch)


def counting(file: Path) -> Callable[[], None]:
    """To be called in a process whose calls that touch the disk are counted: a byte each."""

    def watch(_: Any, event: str, call: Any) -> None:
        if event == "c_call" and touches(call):
            os.write(counted, b".")

    counted = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    return lambda: sys.setprofile(watch)


def small_disk(folder: Path, pages: int) -> str:
    """Gives this process, for good, a folder that is a disk of so many pages; what it is."""
    kernel, owners = ctypes.CDLL(None), {"uid": os.getuid(), "gid": os.getgid()}
    if sys.platform == "linux" and kernel.unshare(NAMESPACES) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        for name, owner in owners.items():
            Path(f"/proc/self/{name}_map").write_text(f"0 {owner} 1")
        options = f"size={pages * PAGE}".encode()
        if kernel.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options) == 0:
            return "disk"
    resource.setrlimit(resource.RLIMIT_FSIZE, (pages * PAGE, pages * PAGE))
    return "file size"
