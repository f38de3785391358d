"""What scalars become in many counterfactual trainings: kept as they are done, by any workers.

    replays.jsonl    of which run and which scalars; then a row a training: its edit, their values

A row is one append under a lock. Workers share a folder, each with its part of the trainings; a
start does what is missing, and a writer that was killed leaves at most a torn last line, which the
next one drops.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from circuit.artifacts import dump_row, open_appended, open_lock, read_jsonl, writing
from circuit.config import digest_of
from circuit.core.edit import Edit
from circuit.errors import CircuitError
from circuit.reading import values_of

NAME = "replays.jsonl"
T = TypeVar("T")


@dataclass(frozen=True)
class Replay:
    """The end of one training.

    Attributes:
        edit: what was otherwise.
        values: of each scalar.
        state: sha256 of the weights and of each moment, by stage.

    Raises:
        CircuitError: a value is not finite.
    """

    edit: Edit
    values: tuple[float, ...]
    state: Mapping[str, str]

    def __post_init__(self) -> None:
        odd = [value for value in self.values if not math.isfinite(value)]
        if odd:
            parts = ", ".join(name for name in self.edit.to_json() if name not in ("start", "end"))
            raise CircuitError(
                f"a scalar became {odd[0]}: the training with an edit of {parts} over steps"
                f" {self.edit.start}:{self.edit.end} has diverged",
                fix="leave the edit out, or take a factor that is less far from 1",
            )


class Replays:
    """The trainings of one run that are kept in a folder, to one end."""

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        """Open the folder, which is made where there is none.

        Args:
            identity: of run, end and scalars: JSON that tells which trainings may share a folder;
                `of` has the scalars' names.

        Raises:
            CircuitError: the folder holds trainings of something else, or a damaged row.
        """
        self.path = Path(folder) / NAME
        self.identity, self.scalars = digest_of(dict(identity)), len(identity["of"])
        with writing(self.path, fix="choose another folder"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._at_end() as handle:
            if not handle.tell():
                handle.write(self._line({"identity": self.identity}))
        self.read()

    def read(self) -> dict[str, Replay]:
        """Those that are done by now, by `key`; also by other workers."""
        rows = read_jsonl(self.path, tolerate_torn_tail=True)
        if rows[:1] != [{"identity": self.identity}]:
            raise CircuitError(
                "holds trainings of another run, or values of other scalars",
                where=self.path,
                fix="choose another folder",
            )
        replays = {}
        for number, row in enumerate(rows[1:], start=2):
            with values_of(f"{self.path}:{number}", fix="remove the line; it is done again"):
                replay = self._read(row)
                replays[key(replay.edit)] = replay
        return replays

    def _read(self, row: dict[str, Any]) -> Replay:
        said, values, state = row["edit"], tuple(row["values"]), row["state"]
        pairs = tuple(map(tuple, said.pop("swapped", ())))
        if len(values) != self.scalars or not isinstance(state["parameters"], str):
            raise ValueError(f"{len(values)} values of {self.scalars} scalars")
        try:
            return Replay(Edit(**said, swapped=pairs), values, state)
        except CircuitError as error:  # which says nothing of the file
            raise ValueError(str(error)) from error

    def add(self, replay: Replay) -> None:
        """Keep one more.

        Raises:
            CircuitError: the disk is full; those before are whole.
        """
        row = {
            "edit": replay.edit.to_json(),
            "values": list(replay.values),
            "state": dict(replay.state),
        }
        with self._at_end() as handle:
            handle.write(self._line(row))

    @staticmethod
    def _line(row: Mapping[str, Any]) -> bytes:
        return (dump_row(row) + "\n").encode()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Among the workers that share the folder.

        Raises:
            CircuitError: as `add`.
        """
        intact = "free space, then start again; the trainings before this one are intact"
        lock = self.path.with_name(f".{NAME}.lock")
        with writing(self.path, fix=intact), open_lock(lock) as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _at_end(self) -> Iterator[IO[bytes]]:
        """The file behind its last whole line, where it is one of these trainings."""
        header = self._line({"identity": self.identity})
        with self.lock(), open_appended(self.path) as handle:
            handle.seek(0)
            content = handle.read()
            whole = content.rfind(b"\n") + 1
            if whole or not header.startswith(content):  # nobody else's tail is cut off
                self.read()
            if whole < len(content):
                handle.truncate(whole)
            handle.seek(whole)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())


def key(edit: Edit) -> str:
    """By which a training is found again: of equal edits one is done."""
    return digest_of(edit.to_json())


def share(of: Sequence[T], part: str) -> list[T]:
    """Every n-th of some things, from the i-th on, for the worker `i/n`.

    Raises:
        CircuitError: it is no such part.
    """
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if match is None or int(match[1]) > int(match[2]):
        raise CircuitError(f"part '{part}'", expected="i/n, from 1/n to n/n")
    return list(of[int(match[1]) - 1 :: int(match[2])])
