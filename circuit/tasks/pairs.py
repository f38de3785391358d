"""Pairs: a read of one record, and a copy of the record that differs in exactly one variable.

| type | corrupted copy | transfer tokens |
|---|---|---|
| `support_value` | the support write gets another value, the answer too | clean, new answer |
| `query_key` | the read asks another key, and gets that key's answer | clean, that key's answer |
| `recency` | support and latest stale write swap values, the answer follows | clean, stale value |
| `distractor` | a write of another key gets another value | old, new distractor value |

The rules stand in definitions.md section 2. A copy is right up to its read's answer only; later
tokens stay as they are, for causality makes them irrelevant. It is parsed with `through_read`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.tasks.positions import Batch, EncodedSplit
from circuit.tasks.symbolic_kv import Program, Read, Record, Vocabulary, Write


@dataclass(frozen=True, slots=True)
class Pair:
    """One read of one record, and the copy that differs in one variable.

    Attributes:
        pair_id: `type:sample_id:read_index:what`.
        type: one of `PAIR_TYPES`.
        clean: the record.
        corrupted: the copy; its sample id is the pair's, its source the clean record.
        read_index: number of the read in both.
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


SIDES = ("clean", "corrupted")


def check_side(name: str) -> None:
    """Refuse a side that pairs do not have.

    Raises:
        CircuitError: lists those that they have.
    """
    if name not in SIDES:
        raise CircuitError(f"unknown side {name!r}", expected=" or ".join(SIDES))


@dataclass(frozen=True, slots=True)
class PairSet:
    """The pairs, type by type in the order asked for, and the reads skipped, by type and reason."""

    pairs: tuple[Pair, ...]
    skipped: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class _Change:
    """New token ids by position, what to call the change, the transfer tokens."""

    tokens: dict[int, int]
    what: str
    transfer: tuple[int, int]
    changed_write: int | None = None


class _SkippedError(Exception):
    """A read that gives no pair; the message is the reason."""


@dataclass(frozen=True, slots=True)
class _Site:
    """One read in its record, with what the four types ask about it."""

    program: Program
    read: Read
    vocab: Vocabulary
    heldout_pairs: frozenset[tuple[int, int]]

    def earlier(self) -> tuple[Write, ...]:
        """The writes before the read."""
        return self.program.writes[: self.read.writes_before]

    def read_before(self) -> set[int]:
        """Numbers of the writes that support an earlier read."""
        return {read.support.index for read in self.program.reads[: self.read.index]}

    def another_value(self, write: Write) -> int:
        """The first unwritten value of the same seen/held-out status with the write's key."""
        written = {other.value for other in self.program.writes}
        status = (write.key, write.value) in self.heldout_pairs
        for value in self.vocab.value_ids:
            if value not in written and ((write.key, value) in self.heldout_pairs) == status:
                return value
        raise _SkippedError("no other value is admissible")


def _support_value(site: _Site) -> _Change:
    read, support = site.read, site.read.support
    if support.index in site.read_before():
        raise _SkippedError("the support write was read before")
    value = site.another_value(support)
    return _Change(
        {support.value_pos: value, read.answer_pos: value},
        site.vocab.tokens[value],
        (read.answer, value),
        support.index,
    )


def _query_key(site: _Site) -> _Change:
    read = site.read
    latest = {write.key: write.value for write in site.earlier()}
    others = [key for key in sorted(latest) if latest[key] != read.answer]
    if not others:
        raise _SkippedError("no other key has another value")
    key = others[0]
    return _Change(
        {read.key_pos: key, read.answer_pos: latest[key]},
        site.vocab.tokens[key],
        (read.answer, latest[key]),
    )


def _recency(site: _Site) -> _Change:
    read, support, before = site.read, site.read.support, site.read_before()
    if support.index in before:
        raise _SkippedError("the support write was read before")
    stale = [
        write
        for write in site.program.writes[: support.index]
        if write.key == read.key and write.index not in before
    ]
    if not stale:
        raise _SkippedError("no earlier write of the key that was not read before")
    swapped = stale[-1]
    return _Change(
        {
            swapped.value_pos: support.value,
            support.value_pos: swapped.value,
            read.answer_pos: swapped.value,
        },
        str(swapped.index),
        (read.answer, swapped.value),
    )


def _distractor(site: _Site) -> _Change:
    before = site.read_before()
    others = [
        write
        for write in site.earlier()
        if write.key != site.read.key and write.index not in before
    ]
    if not others:
        raise _SkippedError("no earlier write of another key that was not read before")
    write = others[-1]
    value = site.another_value(write)
    return _Change(
        {write.value_pos: value},
        f"{write.index}:{site.vocab.tokens[value]}",
        (write.value, value),
        write.index,
    )


_TYPES: dict[str, Callable[[_Site], _Change]] = {
    "support_value": _support_value,
    "query_key": _query_key,
    "recency": _recency,
    "distractor": _distractor,
}

PAIR_TYPES = tuple(_TYPES)
"""The pair types of definitions.md section 2, in its order."""


def build_pairs(
    records: Sequence[Record],
    vocab: Vocabulary,
    heldout_pairs: Collection[tuple[int, int]],
    *,
    types: Sequence[str] = PAIR_TYPES,
    max_per_type: int,
    min_per_type: int = 1,
) -> PairSet:
    """Scan the records in order, their reads in order, and build the pairs of each type.

    Args:
        records: the clean records.
        vocab: their vocabulary.
        heldout_pairs: the held-out (key token id, value token id).
        types: some of `PAIR_TYPES`; the result has this order.
        max_per_type: the scan for a type ends with this many pairs.
        min_per_type: fewer are an error.

    Raises:
        CircuitError: a type is unknown or named twice, the limits contradict each other, or a type
            has fewer than `min_per_type` pairs (the reasons for skipping are listed).
    """
    check_pair_types(types, max_per_type, min_per_type)
    heldout = frozenset(heldout_pairs)
    found: dict[str, list[Pair]] = {kind: [] for kind in types}
    skipped: dict[str, Counter[str]] = {kind: Counter() for kind in types}
    for record in records:
        wanting = [kind for kind in types if len(found[kind]) < max_per_type]
        if not wanting:
            break
        program = record.program(vocab)
        for read in program.reads:
            site = _Site(program, read, vocab, heldout)
            for kind in wanting:
                if len(found[kind]) == max_per_type:
                    continue
                try:
                    found[kind].append(_pair(kind, record, site))
                except _SkippedError as reason:
                    skipped[kind][str(reason)] += 1
    for kind in types:
        if len(found[kind]) < min_per_type:
            raise _too_few(kind, len(found[kind]), min_per_type, skipped[kind], len(records))
    return PairSet(tuple(pair for kind in types for pair in found[kind]), skipped)


def pair_batch(
    pairs: Sequence[Pair],
    side: str,
    vocab: Vocabulary,
    heldout_pairs: Collection[tuple[int, int]],
) -> Batch:
    """One side of some pairs: each distinct record is one row, and read `i` is that of pair `i`.

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
    batch = EncodedSplit(records, vocab, heldout_pairs, through_reads=through).batch()
    places = zip(batch.reads.row.tolist(), batch.reads.index.tolist(), strict=True)
    place = {key: number for number, key in enumerate(places)}
    chosen = [place[rows[p.side(side).sample_id], p.read_index] for p in pairs]
    return batch.with_reads(torch.tensor(chosen))


def _pair(kind: str, record: Record, site: _Site) -> Pair:
    change = _TYPES[kind](site)
    tokens = list(record.tokens)
    for pos, token in change.tokens.items():
        tokens[pos] = token
    pair_id = f"{kind}:{record.sample_id}:{site.read.index}:{change.what}"
    corrupted = Record(pair_id, record.split, tuple(tokens), record.sample_id, change.changed_write)
    corrupted.program(site.vocab, through_read=site.read.index)
    return Pair(pair_id, kind, record, corrupted, site.read.index, change.transfer, change.what)


def record_of(pair_id: str) -> str:
    """The sample id of a pair's clean record, as the pair's id has it.

    Raises:
        CircuitError: it is no id of a pair.
    """
    kind, _, rest = pair_id.partition(":")
    behind = 3 if kind == "distractor" else 2  # the read, and what changed
    sample_id, *others = rest.rsplit(":", behind)
    if kind not in _TYPES or len(others) < behind or not sample_id:
        raise CircuitError(f"no pair has the id '{pair_id}'", expected="type:record:read:what")
    return sample_id


def check_pair_types(types: Sequence[str], max_per_type: int, min_per_type: int) -> None:
    """Refuse pair types that do not exist, and limits that contradict each other.

    Raises:
        CircuitError: as `build_pairs`.
    """
    unknown = [kind for kind in types if kind not in _TYPES]
    if unknown:
        raise CircuitError(f"unknown pair type {unknown[0]!r}", expected=", ".join(PAIR_TYPES))
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
