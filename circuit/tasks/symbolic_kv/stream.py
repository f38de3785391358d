"""Latest-write lookup in a stream: its vocabulary, its records and how tokens are parsed.

A record is one sequence: `<bos>`, events, `<eos>`. `W K V` writes value V into key K; `R K V` reads
key K, and V is the value most recently written to K (definitions.md section 1). A record stores its
tokens only; writes, reads, answers and lags are parsed from them, here and nowhere else.

Keys and values are token ids throughout. This module is pure Python.
"""

from __future__ import annotations

from dataclasses import dataclass

from circuit.errors import CircuitError
from circuit.tasks import base
from circuit.tasks.base import Record

PAD, BOS, EOS, WRITE, READ = range(5)
"""Token ids of `<pad> <bos> <eos> W R`; keys and then values follow."""

_SPECIAL = ("<pad>", "<bos>", "<eos>", "W", "R")


class Vocabulary(base.Vocabulary):
    """The tokens in id order: `<pad> <bos> <eos> W R`, keys `K00..`, values `V000..`.

    Numbers are zero-padded to equal width, at least two digits.
    """

    def __init__(self, num_keys: int, num_values: int) -> None:
        super().__init__(
            (*_SPECIAL, *_numbered("K", num_keys), *_numbered("V", num_values)), pad=PAD
        )
        self.num_keys, self.num_values = num_keys, num_values

    @property
    def key_ids(self) -> range:
        """Token ids of the keys, in order."""
        return range(len(_SPECIAL), len(_SPECIAL) + self.num_keys)

    @property
    def value_ids(self) -> range:
        """Token ids of the values, in order."""
        return range(len(_SPECIAL) + self.num_keys, self.size)

    def key_id(self, key: int) -> int:
        """Token id of key number `key`. Raises CircuitError if there is no such key."""
        return _nth(self.key_ids, key, "key")

    def value_id(self, value: int) -> int:
        """Token id of value number `value`. Raises CircuitError if there is no such value."""
        return _nth(self.value_ids, value, "value")


def _nth(ids: range, number: int, what: str) -> int:
    if not 0 <= number < len(ids):
        raise CircuitError(f"unknown {what} {number}", expected=f"0 .. {len(ids) - 1}")
    return ids[number]


def _numbered(letter: str, count: int) -> list[str]:
    width = max(2, len(str(count - 1)))
    return [f"{letter}{i:0{width}d}" for i in range(count)]


@dataclass(frozen=True, slots=True)
class Write:
    """One write `W K V`: its number in the record, token positions and token ids."""

    index: int
    op_pos: int
    key_pos: int
    value_pos: int
    key: int
    value: int


@dataclass(frozen=True, slots=True)
class Read:
    """One read `R K V`: its number in the record, token positions, token ids and support.

    Attributes:
        key_pos: the prediction position: the answer is predicted here.
        support: the latest write of the read's key.
        lag: number of writes after the support and before this read.
        token_lag: tokens from the support's value to the prediction position.
        writes_before: number of writes before this read.
    """

    index: int
    op_pos: int
    key_pos: int
    answer_pos: int
    key: int
    answer: int
    support: Write
    lag: int
    token_lag: int
    writes_before: int


@dataclass(frozen=True, slots=True)
class Program:
    """What a sequence of tokens says: its writes and its reads, each in order."""

    writes: tuple[Write, ...]
    reads: tuple[Read, ...]


def program_of(record: Record, vocab: Vocabulary, *, through_read: int | None = None) -> Program:
    """The writes and reads of a record.

    Args:
        record: as said.
        vocab: the vocabulary of its tokens.
        through_read: stop after this read; later tokens are not looked at.

    Raises:
        CircuitError: as `parse`; the record is named.
    """
    return parse(record.tokens, vocab, where=record.sample_id, through_read=through_read)


def parse(
    tokens: tuple[int, ...], vocab: Vocabulary, *, where: str, through_read: int | None = None
) -> Program:
    """Parse one sequence by executing it (definitions.md section 1).

    Raises:
        CircuitError: naming `where` and the token position at fault.
    """
    writes: list[Write] = []
    reads: list[Read] = []
    latest: dict[int, Write] = {}
    if not tokens or tokens[0] != BOS:
        raise _at(where, 0, tokens, vocab, "<bos>")
    pos = 1
    while pos < len(tokens) and tokens[pos] != EOS:
        op, key, value = _event(tokens, pos, vocab, where)
        if op == WRITE:
            latest[key] = Write(len(writes), pos, pos + 1, pos + 2, key, value)
            writes.append(latest[key])
        else:
            support = latest.get(key)
            if support is None:
                raise _at(where, pos + 1, tokens, vocab, "a key that was written before")
            if support.value != value:
                answer = f"{vocab.tokens[support.value]}, the latest value of the key"
                raise _at(where, pos + 2, tokens, vocab, answer)
            lag = len(writes) - 1 - support.index
            span = pos + 1 - support.value_pos
            reads.append(
                Read(len(reads), pos, pos + 1, pos + 2, key, value, support, lag, span, len(writes))
            )
            if len(reads) - 1 == through_read:
                return Program(tuple(writes), tuple(reads))
        pos += 3
    if pos != len(tokens) - 1:
        raise _at(where, min(pos + 1, len(tokens)), tokens, vocab, "<eos> as the last token")
    if through_read is not None:
        raise CircuitError(f"no read {through_read}; the record has {len(reads)}", where=where)
    return Program(tuple(writes), tuple(reads))


def _event(
    tokens: tuple[int, ...], pos: int, vocab: Vocabulary, where: str
) -> tuple[int, int, int]:
    if tokens[pos] not in (WRITE, READ):
        raise _at(where, pos, tokens, vocab, "W, R or <eos>")
    if pos + 1 >= len(tokens) or tokens[pos + 1] not in vocab.key_ids:
        raise _at(where, pos + 1, tokens, vocab, "a key")
    if pos + 2 >= len(tokens) or tokens[pos + 2] not in vocab.value_ids:
        raise _at(where, pos + 2, tokens, vocab, "a value")
    return tokens[pos], tokens[pos + 1], tokens[pos + 2]


def _at(
    where: str, pos: int, tokens: tuple[int, ...], vocab: Vocabulary, expected: str
) -> CircuitError:
    if pos >= len(tokens):
        problem = "the record ends"
    elif 0 <= tokens[pos] < vocab.size:
        problem = f"found {vocab.tokens[tokens[pos]]}"
    else:
        problem = f"found unknown token id {tokens[pos]}"
    return CircuitError(problem, where=f"record {where}, position {pos}", expected=expected)
