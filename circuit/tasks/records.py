"""Records on disk: JSON Lines, one object a record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuit.errors import CircuitError
from circuit.reading import read_bytes
from circuit.strict_json import parse_json
from circuit.tasks.base import Record, Vocabulary

_OVERHEAD = 10
"""Bytes of memory for a byte of a split's file: of its text, its lines and its records."""


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
            problem = f"field {name!r} is {payload[name]!r}" if name in payload else f"no {name!r}"
            raise CircuitError(problem, where=where, expected=f"{name!r} as {kind.__name__}")
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


def records_to_jsonl(records: Sequence[Record], vocab: Vocabulary) -> str:
    """The records as JSON Lines, one object a line, each line ended by a newline."""
    return "".join([record_to_json(record, vocab) + "\n" for record in records])


def records_from_jsonl(path: Path, vocab: Vocabulary) -> tuple[list[Record], str]:
    """The records of a JSONL file, and the sha256 of its bytes.

    Raises:
        CircuitError: the file is missing or a line is no record; file and line are named.
    """
    data = read_bytes(path, overhead=_OVERHEAD)
    records = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise CircuitError("not valid UTF-8", where=where) from None
        records.append(record_from_json(text, vocab, where=where))
    return records, hashlib.sha256(data).hexdigest()
