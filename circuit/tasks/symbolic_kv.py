"""Latest-write lookup in a stream: its vocabulary, its records and how tokens are parsed.

A record is one sequence: `<bos>`, events, `<eos>`. `W K V` writes value V into key K; `R K V` reads
key K, and V is the value most recently written to K (definitions.md section 1). A record stores its
tokens only; writes, reads, answers and lags are parsed from them, here and nowhere else.

Keys and values are token ids throughout. This module is pure Python.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from circuit.errors import CircuitError
from circuit.strict_json import parse_json

PAD, BOS, EOS, WRITE, READ = range(5)
"""Token ids of `<pad> <bos> <eos> W R`; keys and then values follow."""

_SPECIAL = ("<pad>", "<bos>", "<eos>", "W", "R")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens in id order: `<pad> <bos> <eos> W R`, keys `K00..`, values `V000..`.

    Numbers are zero-padded to equal width, at least two digits.
    """

    num_keys: int
    num_values: int

    pad = PAD
    bos = BOS
    eos = EOS
    write = WRITE
    read = READ

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(_SPECIAL) + self.num_keys + self.num_values

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

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Every token's text, by id."""
        return (
            *_SPECIAL,
            *_numbered("K", self.num_keys),
            *_numbered("V", self.num_values),
        )

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a string of tokens separated by spaces.

        Raises:
            CircuitError: a token is not of this vocabulary.
        """
        try:
            return tuple([self._ids[token] for token in text.split(" ")])
        except KeyError as error:
            raise CircuitError(
                f"unknown token {error.args[0]!r}",
                expected=f"{self.tokens[0]} .. {self.tokens[-1]}, separated by single spaces",
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The tokens of `ids` as one string, separated by spaces.

        Raises:
            CircuitError: an id is not of this vocabulary.
        """
        ids = list(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.size):
            wrong = next(i for i in ids if not 0 <= i < self.size)
            raise CircuitError(f"unknown token id {wrong}", expected=f"0 .. {self.size - 1}")
        return " ".join([self.tokens[i] for i in ids])


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


@dataclass(frozen=True, slots=True)
class Record:
    """One sequence of a split.

    Attributes:
        tokens: token ids, `<bos>` to `<eos>`, unpadded.
        source_id: id of the record that this one is a copy of (counterfactual records, pairs).
        changed_write: number of the write whose value differs from the source's.
    """

    sample_id: str
    split: str
    tokens: tuple[int, ...]
    source_id: str | None = None
    changed_write: int | None = None

    def program(self, vocab: Vocabulary, *, through_read: int | None = None) -> Program:
        """Parse the writes and reads.

        Args:
            vocab: the vocabulary of the tokens.
            through_read: stop after this read; later tokens are not looked at. A corrupted copy
                of a pair is consistent up to its read's answer only.

        Raises:
            CircuitError: the tokens are no record, or an answer is not the latest write; the
                record and the position are named.
        """
        return parse(self.tokens, vocab, where=self.sample_id, through_read=through_read)

    def writes(self, vocab: Vocabulary, *, through_read: int | None = None) -> tuple[Write, ...]:
        """The writes, in order; see `program`."""
        return self.program(vocab, through_read=through_read).writes

    def reads(self, vocab: Vocabulary, *, through_read: int | None = None) -> tuple[Read, ...]:
        """The reads, in order; see `program`."""
        return self.program(vocab, through_read=through_read).reads


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
        found = "the record ends"
    elif 0 <= tokens[pos] < vocab.size:
        found = f"found {vocab.tokens[tokens[pos]]}"
    else:
        found = f"found unknown token id {tokens[pos]}"
    return CircuitError(found, where=f"record {where}, position {pos}", expected=expected)


def record_to_json(record: Record, vocab: Vocabulary) -> str:
    """One line of a split's JSONL file, without the newline."""
    payload: dict[str, Any] = {
        "id": record.sample_id,
        "split": record.split,
        "tokens": vocab.decode(record.tokens),
    }
    if record.source_id is not None:
        payload["source"] = record.source_id
    if record.changed_write is not None:
        payload["changed_write"] = record.changed_write
    return json.dumps(payload)


_FIELDS: dict[str, tuple[type, bool]] = {
    "id": (str, True),
    "split": (str, True),
    "tokens": (str, True),
    "source": (str, False),
    "changed_write": (int, False),
}


def record_from_json(line: str, vocab: Vocabulary, *, where: object) -> Record:
    """The record that one JSONL line holds.

    Args:
        line: the line's text.
        vocab: the vocabulary of its tokens.
        where: file and line number, for messages.

    Raises:
        CircuitError: the line is not JSON, a field is missing, unknown or of the wrong type, or
            a token is unknown.
    """
    try:
        payload = parse_json(line)
    except ValueError as error:
        raise CircuitError(
            f"not valid JSON ({error})",
            where=where,
            expected="one complete record",
        ) from None
    if not isinstance(payload, dict):
        raise CircuitError("not a JSON object", where=where, expected="one record")
    for name in sorted(payload.keys() - _FIELDS.keys()):
        raise CircuitError(f"unknown field {name!r}", where=where, expected=", ".join(_FIELDS))
    for name, (kind, required) in _FIELDS.items():
        if name not in payload and not required:
            continue
        if type(payload.get(name)) is not kind:
            given = f"field {name!r} is {payload[name]!r}" if name in payload else f"no {name!r}"
            raise CircuitError(given, where=where, expected=f"{name!r} as {kind.__name__}")
    try:
        tokens = vocab.encode(payload["tokens"])
    except CircuitError as error:
        raise CircuitError(error.what, where=where, expected=error.expected) from None
    return Record(
        sample_id=payload["id"],
        split=payload["split"],
        tokens=tokens,
        source_id=payload.get("source"),
        changed_write=payload.get("changed_write"),
    )
