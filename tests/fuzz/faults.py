"""Faults under a command: a kill before any call that touches the disk, a full or a small disk.

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


def full(number: int) -> Callable[[], None]:
    """To be called in a process for which the disk is full from that call on, counted from 0."""
    left = number

    def watch(_: Any, event: str, call: Any) -> None:
        nonlocal left
        if event == "c_call" and touches(call):
            left -= 1
            if left < 0 and call.__name__ not in FREES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: sys.setprofile(watch)


def recording(states: Path) -> Callable[[], None]:
    """To be called in a process of which every state of the disk is recorded.

    That is what a kill before each call that touches the disk would leave of the working directory.
    Each state stands once, in a folder of `states` that its number names; `states/order` lists them
    by call. Files that were there before are links, but for journals, which are written in place.
    """

    def watch(_: Any, event: str, call: Any) -> None:
        if event == "c_call" and touches(call):
            keep()

    def keep() -> None:
        here = {path: path.stat() for path in Path().rglob("*") if path.is_file()}
        made = {p: p.read_bytes() for p, of in here.items() if of.st_ino not in before}
        state = (frozenset(here), frozenset(made.items()))
        if state not in numbers:
            numbers[state] = len(numbers)
            for path in here:
                target = states / str(numbers[state]) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                _ = target.write_bytes(made[path]) if path in made else os.link(path, target)
        os.write(order, f"{numbers[state]}\n".encode())

    numbers: dict[Any, int] = {}
    old = (path for path in Path().rglob("*") if path.is_file() and path.suffix != ".journal")
    before = {path.stat().st_ino for path in old}
    states.mkdir()
    order = os.open(states / "order", os.O_WRONLY | os.O_CREAT)
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
