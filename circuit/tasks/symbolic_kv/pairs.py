"""The four pair types of latest-write lookup (definitions.md section 2).

| type | corrupted copy | transfer tokens |
|---|---|---|
| `support_value` | the support write gets another value, the answer too | clean, new answer |
| `query_key` | the read asks another key, and gets that key's answer | clean, that key's answer |
| `recency` | support and latest stale write swap values, the answer follows | clean, stale value |
| `distractor` | a write of another key gets another value | old, new distractor value |
"""

from __future__ import annotations

from dataclasses import dataclass

from circuit.tasks.base import Change, PairRule, SkippedError
from circuit.tasks.symbolic_kv.stream import Program, Read, Vocabulary, Write


@dataclass(frozen=True, slots=True)
class Site:
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
        raise SkippedError("no other value is admissible")


def _support_value(site: Site) -> Change:
    read, support = site.read, site.read.support
    if support.index in site.read_before():
        raise SkippedError("the support write was read before")
    value = site.another_value(support)
    return Change(
        {support.value_pos: value, read.answer_pos: value},
        site.vocab.tokens[value],
        (read.answer, value),
        support.index,
    )


def _query_key(site: Site) -> Change:
    read = site.read
    latest = {write.key: write.value for write in site.earlier()}
    others = [key for key in sorted(latest) if latest[key] != read.answer]
    if not others:
        raise SkippedError("no other key has another value")
    key = others[0]
    return Change(
        {read.key_pos: key, read.answer_pos: latest[key]},
        site.vocab.tokens[key],
        (read.answer, latest[key]),
    )


def _recency(site: Site) -> Change:
    read, support, before = site.read, site.read.support, site.read_before()
    if support.index in before:
        raise SkippedError("the support write was read before")
    stale = [
        write
        for write in site.program.writes[: support.index]
        if write.key == read.key and write.index not in before
    ]
    if not stale:
        raise SkippedError("no earlier write of the key that was not read before")
    swapped = stale[-1]
    return Change(
        {
            swapped.value_pos: support.value,
            support.value_pos: swapped.value,
            read.answer_pos: swapped.value,
        },
        str(swapped.index),
        (read.answer, swapped.value),
    )


def _distractor(site: Site) -> Change:
    before = site.read_before()
    others = [
        write
        for write in site.earlier()
        if write.key != site.read.key and write.index not in before
    ]
    if not others:
        raise SkippedError("no earlier write of another key that was not read before")
    write = others[-1]
    value = site.another_value(write)
    return Change(
        {write.value_pos: value},
        f"{write.index}:{site.vocab.tokens[value]}",
        (write.value, value),
        write.index,
    )


PAIR_RULES: dict[str, PairRule] = {
    "support_value": _support_value,
    "query_key": _query_key,
    "recency": _recency,
    "distractor": _distractor,
}
"""In the order of definitions.md section 2."""
