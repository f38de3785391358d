"""Facts, roles and kinds of tokens against a naive reading of the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit.tasks.base import Record, Vocabulary
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import Examples, Split
from circuit.tasks.pairs import build_pairs
from circuit.tasks.symbolic_kv.task import LAST_WRITES, SymbolicKV


def naive_reads(record: Record, vocab: Vocabulary) -> list[dict[str, Any]]:
    """Roles and fields of every read, from the words of the record."""
    words = vocab.decode(record.tokens).split()
    found: list[dict[str, Any]] = []
    writes: list[int] = []
    for op in range(1, len(words) - 1, 3):
        if words[op] == "W":
            writes.append(op)
            continue
        support = [w for w in writes if words[w + 1] == words[op + 1]][-1]
        others = [w for w in writes if w != support]
        roles = {
            "prediction": {op + 1},
            "query_key": {op + 1},
            "support_op": {support},
            "support_key": {support + 1},
            "support_value": {support + 2},
            "support_write": {support, support + 1, support + 2},
            "key_distractors": {w + 1 for w in others},
            "value_distractors": {w + 2 for w in others},
            "causal_prefix": set(range(op + 2)),
        }
        found.append(
            {
                "roles": roles,
                "index": len(found),
                "at": op + 1,
                "key": record.tokens[op + 1],
                "answer": record.tokens[op + 2],
                "support_index": writes.index(support),
                "support_op_pos": support,
                "support_key_pos": support + 1,
                "support_value_pos": support + 2,
                "lag": len(writes) - 1 - writes.index(support),
                "token_lag": op - 1 - support,
                "writes_before": len(writes),
                "last_values": [record.tokens[w + 2] for w in reversed(writes)],
            }
        )
    keys = {words[i + 1] for i in range(1, len(words) - 1, 3)}
    return [{**read, "active_keys": len(keys), "num_reads": len(found)} for read in found]


@pytest.fixture(scope="module")
def encoded(small: Benchmark) -> Split:
    return small.task.split(everything(small))


def everything(benchmark: Benchmark) -> list[Record]:
    return [record for records in benchmark.splits.values() for record in records]


indices = st.lists(st.integers(0, 89), min_size=1, max_size=12)


@given(rows=indices)
@settings(max_examples=25, deadline=None)
def test_a_batch_says_what_the_text_says(small: Benchmark, encoded: Split, rows: list[int]) -> None:
    records = [everything(small)[i] for i in rows]
    batch = encoded.batch(rows)
    naive = [
        {"row": row, **read}
        for row, record in enumerate(records)
        for read in naive_reads(record, small.vocabulary)
    ]
    assert len(naive) == len(batch)
    for name in ("row", "index", "at", "answer"):
        assert getattr(batch, name).tolist() == [read[name] for read in naive], name
    for name, fact in batch.facts.items():
        if name in LAST_WRITES:
            k = LAST_WRITES.index(name)
            expected: list[Any] = [[*read["last_values"], *[0] * 6][k] for read in naive]
        elif name == "is_heldout":
            expected = [(r["key"], r["answer"]) in small.task.heldout_pairs for r in naive]
        else:
            expected = [read[name] for read in naive]
        assert fact.tolist() == expected, name
    for role in SymbolicKV.roles:
        mask = batch.role(role)
        assert mask.dtype == torch.bool
        assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == [
            read["roles"][role] for read in naive
        ], role
        positions, real = batch.positions(role)
        assert [p[r].tolist() for p, r in zip(positions, real, strict=True)] == [
            sorted(read["roles"][role]) for read in naive
        ]


def test_kinds_are_those_of_the_text(small: Benchmark, encoded: Split) -> None:
    kinds = {"W": ("op", "write_key", "write_value"), "R": ("op", "read_key", "answer")}
    batch = encoded.batch()
    for record, row in zip(everything(small), batch.kinds.tolist(), strict=True):
        words = small.vocabulary.decode(record.tokens).split()
        expected = [kind for op in words[1:-1:3] for kind in kinds[op]]
        events = row[1 : len(words) - 1]
        assert [SymbolicKV.kinds[kind] for kind in events] == expected
        assert row[len(words) - 1] == SymbolicKV.kinds.index("eos")
        assert set(row[len(words) :]) <= {-1}


def test_a_copy_that_is_read_up_to_its_answer_has_the_roles_before_it(small: Benchmark) -> None:
    pairs = build_pairs(small.task, small.records("train"), max_per_type=8, min_per_type=8).pairs
    split = small.task.split(
        [pair.corrupted for pair in pairs], [pair.read_index for pair in pairs]
    )
    batch = split.batch()
    last = batch.index == batch.facts["num_reads"] - 1
    assert batch.index[last].tolist() == [pair.read_index for pair in pairs]
    ends: Examples = batch.select(last)
    for pair, mask in zip(pairs, ends.role("value_distractors"), strict=True):
        naive = naive_reads(pair.corrupted, small.vocabulary)[pair.read_index]
        assert set(mask.nonzero()[:, 0].tolist()) == naive["roles"]["value_distractors"]
