"""The one way in for files, whatever stands under their names.

A path is checked before the system sees it; only regular files are opened, so that a pipe, a socket
or a device can neither hang nor fill the memory; the size is held against the memory before a byte
is read; JSON goes through the strict parser, and from there into a typed schema
(circuit/documents.py). Nothing here imports pydantic: what is not there is refused before it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from circuit.errors import CircuitError
from circuit.sizes import require_memory
from circuit.strict_json import parse_json

MAX_NAME, MAX_PATH = 255, 4095
"""Bytes of a file's name, and of a whole path: Linux's limits; no system has larger ones."""

MAX_LINE = 2**26
"""Bytes of a line of a row file."""

_JSON_OVERHEAD = 30
"""Bytes of memory for a byte of JSON, at most: `[[],[],...]` takes 28 (CPython 3.11)."""


class MissingFileError(CircuitError):
    """There is no such file."""


def checked_path(path: str | Path) -> Path:
    """A path that a file can have.

    Raises:
        CircuitError: it is empty, holds NUL or half of a surrogate pair, or is too long.
    """
    text = os.fspath(path)
    if not text:
        raise CircuitError("an empty path", expected="a path, such as . for the current folder")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise CircuitError("no file has such a name", where=ascii(text), expected="UTF-8") from None
    if b"\0" in encoded:
        raise CircuitError("a path with NUL in it", where=ascii(text), expected="one without")
    longest = max(map(len, encoded.split(b"/")))
    if longest > MAX_NAME or len(encoded) > MAX_PATH:
        raise CircuitError(
            f"a path of {len(encoded)} bytes whose longest name has {longest}",
            where=text,
            expected=f"at most {MAX_PATH}, and {MAX_NAME} a name",
        )
    return Path(path)


def open_file(path: str | Path, *, missing: str = "no such file") -> BufferedReader:
    """A regular file, open for reading.

    Raises:
        MissingFileError: there is nothing of that name; `missing` says so.
        CircuitError: it is something else than a file, or may not be read.
    """
    path = checked_path(path)
    try:  # not waiting for a pipe's other end
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(missing, where=path) from None
    except OSError as error:
        raise CircuitError(f"cannot be read ({error.strerror})", where=path) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = next((name for is_one, name in _KINDS if is_one(mode)), "no regular file")
        raise CircuitError(f"is {what}", where=path, expected="a file")
    return BufferedReader(FileIO(descriptor))


_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"))


def read_bytes(path: str | Path, *, missing: str = "no such file", overhead: int = 2) -> bytes:
    """The content of a file.

    Args:
        path: of the file.
        missing: what is said where there is none.
        overhead: bytes of memory that a byte of the file takes until it is used.

    Raises:
        CircuitError: as `open_file`, or the memory cannot hold it.
    """
    with open_file(path, missing=missing) as handle:
        size = os.fstat(handle.fileno()).st_size
        require_memory({"reading the file": overhead * size}, where=path)
        try:
            return handle.read(size) or b""  # no more, if somebody writes on
        except OSError as error:
            raise CircuitError(f"cannot be read ({error.strerror})", where=path) from None


def read_lines(path: str | Path) -> Iterator[bytes]:
    """The lines of a file one by one, each with its newline if it has one.

    Raises:
        CircuitError: as `open_file`, or a line is longer than `MAX_LINE`.
    """
    with open_file(path) as handle:
        number = 0
        while line := handle.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                raise CircuitError(
                    f"a line of more than {MAX_LINE} bytes",
                    where=f"{path}:{number}",
                    expected="a row file of this program",
                )
            yield line


def file_digest(path: str | Path, *, missing: str = "no such file") -> str:
    """sha256 of a file's bytes; raises as `open_file`."""
    with open_file(path, missing=missing) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: str | Path, *, missing: str = "no such file", fix: str | None = None) -> Any:
    """The JSON document in a file.

    Args:
        path: of the file.
        missing: what is said where there is none.
        fix: what to do about a file that is no JSON.

    Raises:
        CircuitError: as `read_bytes`, or it is no JSON, or such as `parse_json` refuses.
    """
    content = read_bytes(path, missing=missing, overhead=_JSON_OVERHEAD)
    try:
        return parse_json(content)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise CircuitError(f"not valid JSON ({error.msg})", where=where, fix=fix) from None
    except ValueError as error:
        raise CircuitError(f"not valid JSON ({error})", where=path, fix=fix) from None


@contextmanager
def values_of(path: str | Path, *, fix: str) -> Iterator[None]:
    """A block that takes values out of a document of this program that has no schema.

    Its digest proves that it is as somebody wrote it, and not that its values are such as this
    program writes: what cannot be done with them is said of the file.

    Raises:
        CircuitError: a value is of another type, missing or out of range.
    """
    try:
        yield
    except CircuitError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CircuitError(
            f"holds other values than this program writes ({type(error).__name__}: {error})",
            where=path,
            fix=fix,
        ) from error
