"""Commands that are watched for what they open."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from command_line import type_in

OPENED, FAILED = 99, 98


def opens(folder: Path, lines: Iterable[Sequence[str]]) -> int:
    """Types commands in a fork that ends with `OPENED` when anything below a folder is opened.

    Otherwise with the exit code of the first that fails, or 0.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    hidden = str(folder.resolve()) + os.sep

    def watch(event: str, found: tuple[Any, ...]) -> None:
        path = found[0] if event == "open" else None
        if isinstance(path, str) and str(Path(path).absolute()).startswith(hidden):
            os.write(2, f"opened {path}\n".encode())
            os._exit(OPENED)

    code = FAILED
    try:
        sys.addaudithook(watch)
        code = next((code for code in map(type_in, lines) if code), 0)
    finally:
        os._exit(code)
