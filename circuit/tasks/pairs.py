"""Pairs: an example of one record, and a copy of the record that differs in exactly one variable.

Which variables there are, and how the copy changes, the task says (`Task.pair_types`,
definitions.md section 2). A copy is right up to its example's answer only; later tokens stay as
they are, for causality makes them irrelevant. It is parsed up to that answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.numerals import whole_number
from circuit.schemas import SIDES
from circuit.tasks.base import Question, Record, SkippedError, Task
from circuit.tasks.examples import Examples


@dataclass(frozen=True, slots=True)
class Pair:
    """One example of one record, and the copy that differs in one variable.

    Attributes:
        pair_id: `type:sample_id:read_index:what`.
        type: one of the task's.
        clean: the record.
        corrupted: the copy; its sample id is the pair's, its source the clean record.
        read_index: number of the example in both.
        transfer_tokens: token ids (a, b): the clean side's and the corrupted side's.
        what: what changed, as in the id: a value, a key, a write's number, or `number:value`.
    """

    pair_id: str
    type: str
    clean: Record
    corrupted: Record
    read_index: int
    transfer_tokens: tuple[int, int]
    what: str

    def side(self, name: str) -> Record:
        """The record of the side `clean` or `corrupted`. Raises CircuitError for another name."""
        check_side(name)
        return self.clean if name == "clean" else self.corrupted


def check_side(name: str) -> None:
    """Refuse a side that pairs do not have.

    Raises:
        CircuitError: lists those that they have.
    """
    if name not in SIDES:
        raise CircuitError(f"unknown side {name!r}", expected=" or ".join(SIDES))


@dataclass(frozen=True, slots=True)
class PairSet:
    """The pairs, type by type in the order asked for, and what was skipped, by type and reason."""

    pairs: tuple[Pair, ...]
    skipped: Mapping[str, Mapping[str, int]]


def build_pairs(
    task: Task,
    records: Sequence[Record],
    *,
    types: Sequence[str] | None = None,
    max_per_type: int | None,
    min_per_type: int = 1,
) -> PairSet:
    """Scan the records in order, their questions in order, and build the pairs of each type.

    Args:
        task: of the records.
        records: the clean ones.
        types: some of the task's (all by default); the result has this order.
        max_per_type: the scan for a type ends with this many pairs; None takes all.
        min_per_type: fewer are an error.

    Raises:
        CircuitError: a type is unknown or named twice, the limits contradict each other, or a type
            has fewer than `min_per_type` pairs (the reasons for skipping are listed).
    """
    types = tuple(task.pair_types) if types is None else types
    most = math.inf if max_per_type is None else max_per_type
    check_pair_types(task, types, most, min_per_type)
    pairs: dict[str, list[Pair]] = {kind: [] for kind in types}
    skipped: dict[str, Counter[str]] = {kind: Counter() for kind in types}
    for record in records:
        wanting = [kind for kind in types if len(pairs[kind]) < most]
        if not wanting:
            break
        for question in task.parse(record).questions:
            for kind in wanting:
                if len(pairs[kind]) == most:
                    continue
                try:
                    pairs[kind].append(_pair(task, kind, record, question))
                except SkippedError as reason:
                    skipped[kind][str(reason)] += 1
    for kind in types:
        if len(pairs[kind]) < min_per_type:
            raise _too_few(kind, len(pairs[kind]), min_per_type, skipped[kind], len(records))
    return PairSet(tuple(pair for kind in types for pair in pairs[kind]), skipped)


def pair_batch(task: Task, pairs: Sequence[Pair], side: str) -> Examples:
    """One side of some pairs: each distinct record is one row, and example `i` is that of pair `i`.

    Raises:
        CircuitError: there is no pair, or no such side.
    """
    if not pairs:
        raise CircuitError("no pairs", expected="at least one")
    rows: dict[str, int] = {}
    records: list[Record] = []
    through: list[int | None] = []
    for pair in pairs:
        record = pair.side(side)
        if record.sample_id not in rows:
            rows[record.sample_id] = len(records)
            records.append(record)
            through.append(None if side == "clean" else pair.read_index)
    batch = task.split(records, through).batch()
    places = zip(batch.row.tolist(), batch.index.tolist(), strict=True)
    place = {key: number for number, key in enumerate(places)}
    chosen = [place[rows[p.side(side).sample_id], p.read_index] for p in pairs]
    return batch.select(torch.tensor(chosen))


def _pair(task: Task, kind: str, record: Record, question: Question) -> Pair:
    change = task.pair_types[kind](question.site)
    tokens = list(record.tokens)
    for pos, token in change.tokens.items():
        tokens[pos] = token
    pair_id = f"{kind}:{record.sample_id}:{question.index}:{change.what}"
    corrupted = Record(pair_id, record.split, tuple(tokens), record.sample_id, change.changed_write)
    task.parse(corrupted, question.index)
    return Pair(pair_id, kind, record, corrupted, question.index, change.transfer, change.what)


_PARTS = {"distractor": 2}
"""Of what changed, in the ids of a type, where it is more than one."""


def record_of(pair_id: str) -> str:
    """The sample id of a pair's clean record, as the pair's id has it.

    Raises:
        CircuitError: it is no id of a pair.
    """
    kind, _, rest = pair_id.partition(":")
    behind = 1 + _PARTS.get(kind, 1)  # the example's number, and what changed
    sample_id, *others = rest.rsplit(":", behind)
    if len(others) < behind or not sample_id or whole_number(others[0]) is None:
        raise CircuitError(f"no pair has the id '{pair_id}'", expected="type:record:read:what")
    return sample_id


def check_pair_types(
    task: Task | type[Task], types: Sequence[str], max_per_type: float = 1, min_per_type: int = 1
) -> None:
    """Refuse pair types that do not exist, and limits that contradict each other.

    Raises:
        CircuitError: as `build_pairs`.
    """
    unknown = [kind for kind in types if kind not in task.pair_types]
    if unknown:
        names = ", ".join(task.pair_types)
        raise CircuitError(f"unknown pair type {unknown[0]!r}", expected=names or "no pair type")
    if not types or len(set(types)) != len(types):
        raise CircuitError(
            f"pair types {', '.join(types) or '(none)'}",
            expected="at least one type, each named once",
        )
    if not 0 <= min_per_type <= max_per_type or max_per_type < 1:
        raise CircuitError(
            f"min_per_type {min_per_type} and max_per_type {max_per_type}",
            expected="0 <= min_per_type <= max_per_type and at least 1 pair a type",
        )


def _too_few(
    kind: str, built: int, needed: int, skipped: Counter[str], num_records: int
) -> CircuitError:
    reasons = "; ".join(f"{times} x {reason}" for reason, times in skipped.most_common())
    return CircuitError(
        f"{built} pairs of type {kind} from {num_records} records; reads skipped:"
        f" {reasons or 'none'}",
        expected=f"at least {needed}",
        fix="give more records or lower the least number of pairs",
    )
