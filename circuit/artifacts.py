"""Output folders: what may be replaced, atomic writes, rows.

A command *opens* its output folder (which locks it), *claims* the names that it will write, and
*writes* them. The claimed names stand in `<command>.manifest.json` before the first byte is
written, so that even a killed command's files are known as its own, with digests of their contents
(`circuit.manifest`). One invariant: no file that the same command has not claimed and written so is
ever replaced or removed, and no folder is removed.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, Self

from circuit.documents import validated
from circuit.errors import CircuitError
from circuit.manifest import Claimed, Manifest
from circuit.quoting import csv_cell
from circuit.reading import checked_path, read_bytes, read_json, read_lines, values_of
from circuit.sealed import sealed, unsealed
from circuit.strict_json import finite_json, parse_json

Row = Mapping[str, Any]
"""One JSON object of a row file."""

ROW_DIGEST = "row_digest"
"""Key of a row's checksum: 16 hex digits of sha256 over the row's JSON without it."""

_TEMPORARY_SUFFIX = ".circuit-tmp"
_ROW_OVERHEAD = 12
"""Bytes of memory for a byte of rows that are read at once: 4 to 6 in this program's files."""


def dump_row(row: Row) -> str:
    """One row as one line of JSON without its newline; its last key is a digest of the others.

    Raises:
        CircuitError: a number in it is not finite.
    """
    body = finite_json(row)
    return f'{body[:-1]}, "{ROW_DIGEST}": "{_row_digest(body.encode())}"}}'


def in_row(name: str, value: str) -> str:
    """A field as the line of its row has it."""
    return f'"{name}": {json.dumps(value, ensure_ascii=False)}'


def _row_digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def dump_rows(rows: Iterable[Row]) -> str:
    """Rows as JSON Lines."""
    return "".join(dump_row(row) + "\n" for row in rows)


def dump_csv(rows: Sequence[Row]) -> str:
    """Rows with the same columns as CSV, none of them a formula (`csv_cell`)."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def dump_json(payload: Any) -> str:
    """A JSON document as this program writes it: indented, one trailing newline.

    Raises:
        CircuitError: a number in it is not finite.
    """
    return finite_json(payload, indent=2) + "\n"


def find_near(path: str | Path, near: Path | None) -> Path:
    """A file that a config names, relative to the nearest folder above `near` that has it.

    Configs name files from the project's root: that of the run, wherever the program is started;
    the current folder counts where no folder above `near` has it. Where it is not found, and
    without `near`, it is returned as it was given, so that the reader's error names it.
    """
    path = Path(path)
    if path.is_absolute() or near is None:
        return path
    above = Path(os.path.realpath(near)).parents  # `resolve` gives up on a loop of links
    root = next((root for root in above if (root / path).exists()), Path.cwd())
    return path if root == Path.cwd() else root / path


def atomic_write_bytes(path: Path, payload: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, whatever happens.

    Temporary file in the same folder, fsync, rename, fsync of the folder.

    Raises:
        CircuitError: the disk is full, a size limit is hit, or the folder is not writable; the
            old file is intact.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY_SUFFIX}")
    intact = "the previous file, if any, is intact; free space or choose another folder"
    with writing(path, fix=intact):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _new_file(temporary) as handle:
                handle.write(payload)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def writing(path: Path, *, fix: str) -> Iterator[None]:
    """A block that writes a file: what the system refuses is told in one line.

    Raises:
        CircuitError: the disk is full, a size limit is hit, or the folder is not writable.
    """
    try:
        yield
    except OSError as error:
        told = f"could not be written ({error.strerror or error})"
        raise CircuitError(told, where=path, fix=fix) from error


def _new_file(path: Path) -> IO[bytes]:
    """A file that nobody else has by another name, or waits for: what is left there goes.

    It may be of a killed writer, or a link or a pipe of somebody.
    """
    try:
        return path.open("xb")
    except FileExistsError:
        path.unlink()
        return path.open("xb")


def open_lock(path: Path) -> IO[str]:
    """A file to hold a lock on: through no link, and waiting for no pipe's other end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.fdopen(os.open(path, flags, 0o666), "a")


def open_appended(path: Path) -> IO[bytes]:
    """A file to read and append to, which is made where there is none: through no link."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.fdopen(os.open(path, flags, 0o666), "a+b")


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_jsonl(path: Path, *, tolerate_torn_tail: bool = False) -> list[dict[str, Any]]:
    """Read a JSON Lines file.

    Args:
        tolerate_torn_tail: drop a last line that has no newline (a writer was killed in it).

    Raises:
        CircuitError: the file is missing, or a line is no row or not the row that was written
            (file and line named).
    """
    lines = read_bytes(path, overhead=_ROW_OVERHEAD).split(b"\n")
    tail = lines.pop()
    if tail and not tolerate_torn_tail:
        lines.append(tail)
    return [parse_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def iter_jsonl(path: Path, *, holding: str = "") -> Iterator[dict[str, Any]]:
    """The rows of a large JSON Lines file, one by one.

    Args:
        holding: only lines that hold this text are parsed.

    Raises:
        CircuitError: as `read_jsonl`.
    """
    text = holding.encode()
    for number, line in enumerate(read_lines(path), start=1):
        if text in line:
            yield parse_row(line.rstrip(b"\n"), f"{path}:{number}")


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """A row from its line without the newline.

    Raises:
        CircuitError: it is no row, or not the row that was written.
    """
    fix = "the file is damaged or was edited; make it again"
    try:
        row = parse_json(line)
    except ValueError as error:
        raise CircuitError(f"not a JSON object ({error})", where=where, fix=fix) from None
    if not isinstance(row, dict):
        raise CircuitError(f"not a JSON object ({type(row).__name__})", where=where, fix=fix)
    stored = row.pop(ROW_DIGEST, None)
    if stored is None:
        raise CircuitError(
            f"holds no {ROW_DIGEST}",
            where=where,
            expected="a row file of this program (a benchmark or probe set is none)",
        )
    # of the text as it stands, and not of what was read from it: no other way of writing counts
    tail = f', "{ROW_DIGEST}": "{stored}"}}'.encode()
    if not line.endswith(tail) or stored != _row_digest(line.removesuffix(tail) + b"}"):
        raise CircuitError("the row does not match its digest", where=where, fix=fix)
    return row


class RowLog:
    """An append-only JSON Lines file that survives a killed writer.

    Opening it drops a torn last line and every row beyond `last_step`, so that steps stay unique
    when a run resumes.
    """

    _INTACT = "free space, then resume; the rows before this one are intact"

    def __init__(self, path: Path, *, last_step: int | None = None) -> None:
        """Open for appending, keeping rows with `step` <= `last_step` (all others go)."""
        self.path = path
        kept: list[dict[str, Any]] = []
        if last_step is not None and os.path.lexists(path):
            rows = read_jsonl(path, tolerate_torn_tail=True)
            with values_of(path, fix="make it again"):
                kept = [row for row in rows if row["step"] <= last_step]
        atomic_write_text(path, dump_rows(kept))
        self._handle: IO[str] = path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Write one row and hand it to the operating system."""
        with writing(self.path, fix=self._INTACT):
            self._handle.write(dump_row(row) + "\n")
            self._handle.flush()

    def sync(self) -> None:
        """Force the rows to the disk."""
        with writing(self.path, fix=self._INTACT):
            os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._handle.close()


class OutputFolder:
    """One command's share of a folder; a context manager that holds the folder's lock.

    Raises (on entering):
        CircuitError: the path is a file; another writer is at work; or the folder holds outputs of
            this command and neither `overwrite` nor `resume` was given.
    """

    def __init__(
        self,
        path: str | Path,
        command: str,
        *,
        writes: Sequence[str],
        overwrite: bool = False,
        resume: bool = False,
        resumable: bool = False,
        appended: Mapping[str, Callable[[Path], object]] | None = None,
    ) -> None:
        """Describe the share; entering it does the rest.

        Args:
            path: the folder; made if it does not exist.
            command: whose share it is; a part after a dot tells shares of one command apart.
            writes: patterns of the names that the command writes, of which no other is ever its
                own, whatever its manifest says (`checkpoints/step_*.pt`).
            overwrite: earlier outputs may be replaced.
            resume: earlier outputs may be continued.
            resumable: the command can go on with earlier outputs, for the message to say.
            appended: by suffix, what reads the whole of a file that is appended to, and raises if
                it is not as it was written; rows are known.
        """
        self.root = checked_path(path)
        self.resumable = resumable
        self.command = command
        self.overwrite = overwrite
        self.resume = resume
        self.appended: dict[str, Callable[[Path], object]] = {
            ".jsonl": partial(read_jsonl, tolerate_torn_tail=True),
            **(appended or {}),
        }
        self._lock: IO[str] | None = None
        self._made: list[Path] = []
        self._manifest = Manifest(command, writes)
        self._claimed_now: set[str] = set()

    @property
    def manifest_name(self) -> str:
        """File name of this command's manifest in the folder."""
        return f"{self.command}.manifest.json"

    @property
    def _shown(self) -> str:
        return self.command.partition(".")[0]

    @property
    def owned(self) -> list[str]:
        """Names claimed by this command, in the order of their claims."""
        return list(self._manifest.owned)

    def __enter__(self) -> Self:
        if self.root.exists() and not self.root.is_dir():
            raise CircuitError("is a file", where=self.root, expected="a folder for the outputs")
        missing = [path for path in (self.root, *self.root.parents) if not path.exists()]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._made = missing
            self._lock = open_lock(self.root / f".{self.command}.lock")
        except OSError as error:
            raise CircuitError(
                f"cannot be used as output folder ({error.strerror})", where=self.root
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise CircuitError(
                f"another `circuit {self._shown}` is writing here",
                where=self.root,
                fix="wait for it to end, or choose another output folder",
            ) from None
        try:
            self._read_manifest()
            self._refuse_unless_allowed()
        except CircuitError:
            self._lock.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is None:
            return
        if error is not None and self._made and not self.owned:
            self._unmake()
        self._lock.close()

    def _unmake(self) -> None:
        """Remove the folders that this command has just made, as far as nothing stands in them."""
        (self.root / f".{self.command}.lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in self._made:
                path.rmdir()

    def clear(self, planned: Iterable[str] = ()) -> None:
        """Remove this command's earlier files, exactly those.

        Args:
            planned: names that the command is going to write; they become its own when it does.

        Raises:
            CircuitError: a planned name is taken by a file of somebody else, or an earlier file
                has become a folder; before anything is removed.
        """
        self.refuse_foreign(planned)
        self.remove(self.owned)

    def remove(self, names: Iterable[str]) -> None:
        """Remove some of this command's files, and forget them."""
        paths = {name: self.path(name) for name in names}
        self.refuse_foreign(paths)
        self._refuse_changed(paths)
        for name, path in paths.items():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
            self._manifest.forget(name)
        self._write_manifest()

    def remove_stale(self) -> None:
        """Remove this command's earlier files that it has not claimed again since it entered."""
        self.remove([name for name in self.owned if name not in self._claimed_now])

    def claim(self, names: Mapping[str, bytes] | Iterable[str]) -> None:
        """Reserve file names (relative, posix) for this command.

        Args:
            names: with their contents, where they are about to be written.

        Raises:
            CircuitError: a file of that name exists and this command did not write it.
        """
        names = names if isinstance(names, Mapping) else list(names)
        self.refuse_foreign(names)
        self._refuse_changed(names)
        self._claimed_now.update(names)
        if self._manifest.claim(names):
            self._write_manifest()

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Refuse names that are taken by what this command did not write: a file, or a folder.

        Raises:
            CircuitError: names the first of them.
        """
        for name in names:
            assert self._manifest.may_be(name), f"{name} is no name that {self.command} writes"
            path = self._inside(name)
            if not os.path.lexists(path):
                continue
            if name not in self._manifest.owned:
                raise CircuitError(
                    f"exists and was not written by `circuit {self._shown}`",
                    where=path,
                    fix="move it away or choose another output folder",
                )
            if path.is_dir() and not path.is_symlink():
                raise CircuitError(
                    "was written as a file and is a folder now", where=path, fix="move it away"
                )
            if not self.resume:  # it is going to be replaced
                self._refuse_changed([name])

    def _refuse_changed(self, names: Iterable[str]) -> None:
        """Refuse to lose what somebody has made of this command's files.

        Raises:
            CircuitError: names the first of them.
        """
        for name in names:
            path = self._inside(name)
            ours = name in self._manifest.owned and os.path.lexists(path)
            if ours and not self._is_as_written(name, path):
                raise CircuitError(
                    f"was changed since `circuit {self._shown}` wrote it",
                    where=path,
                    fix="move it away, or remove it, and start again",
                )

    def _is_as_written(self, name: str, path: Path) -> bool:
        told = self._manifest.is_as_written(name, path)
        if told is not None:
            return told
        read = self.appended.get(path.suffix)
        if read is None:  # claimed, and never written
            return False
        if self.resume:  # who goes on with rows reads them
            return True
        try:
            read(path)
        except CircuitError:
            return False
        return True

    def owned_bytes(self) -> int:
        """What this command's earlier files take on disk."""
        paths = (self._inside(name) for name in self.owned)
        return sum(path.stat().st_size for path in paths if path.is_file())

    def path(self, name: str) -> Path:
        """Where a claimed file stands."""
        if name not in self._manifest.owned:
            raise KeyError(f"{name} was not claimed by {self.command}")
        return self._inside(name)

    def write_bytes(self, name: str, payload: bytes) -> Path:
        """Claim `name` and write it atomically."""
        self.claim({name: payload})
        path = self.path(name)
        atomic_write_bytes(path, payload)
        self._manifest.wrote(name)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Claim `name` and write UTF-8 text atomically."""
        return self.write_bytes(name, text.encode("utf-8"))

    def _inside(self, name: str) -> Path:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise CircuitError(f"'{name}' leaves the output folder", where=self.root)
        if relative.name.endswith((".manifest.json", ".lock", _TEMPORARY_SUFFIX)):
            raise CircuitError(
                f"'{name}' is a name that this program keeps to itself", where=self.root
            )
        path = self.root / relative
        root = self.root.resolve()
        if not path.parent.resolve().is_relative_to(root):
            raise CircuitError(
                f"'{name}' leads outside the output folder through a link", where=self.root
            )
        return path

    def _read_manifest(self) -> None:
        manifest = self.root / self.manifest_name
        if not manifest.exists():
            return
        fix = "it says which files may be replaced; move the folder away"
        payload = read_json(manifest, fix=fix)
        if isinstance(payload, dict):
            payload = unsealed(payload, where=manifest, fix=fix)
        claimed = validated(payload, Claimed, where=manifest, fix=fix)
        if claimed.command != self.command:
            raise CircuitError(
                f"is a manifest of `{claimed.command}`",
                where=manifest,
                expected=f"one of `{self.command}`",
                fix=fix,
            )
        for name in claimed.files:
            self._inside(name)
        self._manifest = Manifest(self.command, self._manifest.writes, claimed)

    def _refuse_unless_allowed(self) -> None:
        present = [name for name in self.owned if os.path.lexists(self._inside(name))]
        if present and not self.overwrite and not self.resume:
            raise CircuitError(
                f"holds {len(present)} file{'s' if len(present) > 1 else ''} of an earlier"
                f" `circuit {self._shown}` ({present[0]}{', ...' if len(present) > 1 else ''})",
                where=self.root,
                fix=("pass `resume` to go on with it, " if self.resumable else "pass ")
                + "`overwrite` to replace exactly those files, or choose another folder",
            )

    def _write_manifest(self) -> None:
        payload = sealed(self._manifest.to_json())
        atomic_write_text(self.root / self.manifest_name, dump_json(payload))
