"""Append-only files of digested records: a line of JSON, then the bytes that it speaks of.

A record is one write. A writer that is killed in it leaves a torn tail, which readers drop: all
records before it are whole. The line is a row (`circuit.artifacts.dump_row`) that tells the number
of bytes behind it and their sha256, so that no bit of either can change unseen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from circuit.artifacts import atomic_write_bytes, dump_row, parse_row, writing
from circuit.errors import CircuitError
from circuit.reading import MAX_LINE, open_file, values_of
from circuit.sizes import require_memory

BYTES, DIGEST = "bytes", "sha256"
"""Fields of a record's line: what stands behind it."""
_FIX = "the file is damaged; record again"
_INTACT = "free space; what was recorded before is intact"


class Journal:
    """A file of records, open for appending."""

    def __init__(self, path: Path, first: Mapping[str, Any], payload: Sequence[memoryview]) -> None:
        """Write the first record so that a reader sees no file or the whole record.

        Raises:
            CircuitError: as `append`.
        """
        self.path = path
        head = _line(first, payload)
        atomic_write_bytes(path, b"".join((head, *payload)))
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._size = os.fstat(self._handle).st_size

    def append(self, record: Mapping[str, Any], payload: Sequence[memoryview]) -> None:
        """Hand one record to the operating system.

        Raises:
            CircuitError: the disk is full, or a size limit is hit; the records before are whole.
        """
        head = memoryview(_line(record, payload))
        # few parts are written from where they stand; the system takes no more than 1024 at once
        parts = [head, *payload] if len(payload) < 8 else [memoryview(b"".join((head, *payload)))]
        size = sum(part.nbytes for part in parts)
        with writing(self.path, fix=_INTACT):
            try:
                left = size - os.writev(self._handle, parts)
                rest = memoryview(b"".join(parts))[size - left :] if left else memoryview(b"")
                while rest:  # one write takes 2 GB at most
                    rest = rest[os.write(self._handle, rest) :]
            except OSError:
                os.ftruncate(self._handle, self._size)
                raise
        self._size += size

    def close(self) -> None:
        """Force the records to the disk, and close the file.

        Raises:
            CircuitError: as `append`.
        """
        try:
            with writing(self.path, fix=_INTACT):
                os.fsync(self._handle)
        finally:
            os.close(self._handle)


def _line(record: Mapping[str, Any], payload: Sequence[memoryview]) -> bytes:
    digest = hashlib.sha256()
    for part in payload:
        digest.update(part)
    size = sum(part.nbytes for part in payload)
    return (dump_row({**record, BYTES: size, DIGEST: digest.hexdigest()}) + "\n").encode()


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The records of a journal without their bytes: each line, and where its bytes begin.

    Raises:
        CircuitError: the file is missing, or a line is not the one that was written.
    """
    with open_file(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        while line := handle.readline(MAX_LINE):
            if not line.endswith(b"\n"):
                return
            start = handle.tell()
            where = f"{path} at byte {start - len(line)}"
            record = parse_row(line.rstrip(b"\n"), where)
            behind = record.get(BYTES)
            if not isinstance(behind, int) or behind < 0:
                raise CircuitError(f"'{BYTES}' is {behind!r}", where=where, fix=_FIX)
            if start + behind > size:
                return
            yield record, start
            handle.seek(behind, os.SEEK_CUR)


def cut_behind(path: Path, last: int) -> None:
    """Drop the records of a journal behind the last one whose `step` is at most `last`."""
    end = 0
    with values_of(path, fix=_FIX):
        for record, start in read_records(path):
            if record["step"] > last:
                break
            end = start + record[BYTES]
    os.truncate(path, end)


def read_payload(path: Path, size: int, digest: str, start: int) -> bytes:
    """The bytes of a record.

    Args:
        size, digest: what its line says of them.
        start: where they begin.

    Raises:
        CircuitError: they are not those that were written, or the memory cannot hold them.
    """
    require_memory({"reading the record": 2 * size}, where=path)
    with open_file(path) as handle:
        handle.seek(start)
        payload = handle.read(size)
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CircuitError(
            "the bytes of a record do not match their digest",
            where=f"{path} at byte {start}",
            fix=_FIX,
        )
    return payload


def check_journal(path: Path) -> None:
    """Read all of a journal.

    Raises:
        CircuitError: something in it is not what was written.
    """
    for record, start in read_records(path):
        read_payload(path, record[BYTES], str(record.get(DIGEST)), start)
