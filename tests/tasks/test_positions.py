"""Batches and roles against a naive reading of the text."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit.errors import CircuitError
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.pairs import build_pairs
from circuit.tasks.positions import (
    ROLES,
    Batch,
    EncodedSplit,
    make_batch,
    role_mask,
    role_positions,
    shortcut_values,
)
from circuit.tasks.symbolic_kv import Record, Vocabulary


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
                "op_pos": op,
                "key_pos": op + 1,
                "answer_pos": op + 2,
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
def encoded(small: Benchmark) -> EncodedSplit:
    return EncodedSplit(everything(small), small.vocabulary, small.heldout_pairs)


def everything(benchmark: Benchmark) -> list[Record]:
    return [record for records in benchmark.splits.values() for record in records]


indices = st.lists(st.integers(0, 89), min_size=1, max_size=12)


@given(rows=indices)
@settings(max_examples=25, deadline=None)
def test_a_batch_says_what_the_text_says(
    small: Benchmark, encoded: EncodedSplit, rows: list[int]
) -> None:
    records = [everything(small)[i] for i in rows]
    batch = encoded.batch(rows)
    assert batch.tokens.shape == (len(rows), max(len(record.tokens) for record in records))
    for row, record in enumerate(records):
        length = len(record.tokens)
        assert tuple(batch.tokens[row, :length].tolist()) == record.tokens
        assert not batch.tokens[row, length:].any()
        assert batch.lengths[row] == length
    assert batch.sample_ids == tuple(record.sample_id for record in records)
    naive = [
        {"row": row, **read}
        for row, record in enumerate(records)
        for read in naive_reads(record, small.vocabulary)
    ]
    assert len(naive) == len(batch.reads)
    for field in fields(batch.reads):
        if field.name == "is_heldout":
            expected: list[Any] = [(r["key"], r["answer"]) in small.heldout_pairs for r in naive]
        else:
            expected = [read[field.name] for read in naive]
        assert getattr(batch.reads, field.name).tolist() == expected, field.name
    for k in (1, 2, 3, 6, 20):
        last = [([*read["last_values"], *[0] * k])[k - 1] for read in naive]
        assert shortcut_values(batch, k).tolist() == last
    for role in ROLES:
        mask = role_mask(batch, role)
        assert mask.dtype == torch.bool
        assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == [
            read["roles"][role] for read in naive
        ], role
        positions, real = role_positions(batch, role)
        assert [p[r].tolist() for p, r in zip(positions, real, strict=True)] == [
            sorted(read["roles"][role]) for read in naive
        ]


def assert_same(left: Batch, right: Batch) -> None:
    assert torch.equal(left.tokens, right.tokens)
    assert left.sample_ids == right.sample_ids
    for one, other in ((left.reads, right.reads), (left.writes, right.writes)):
        for field in fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


@given(rows=indices)
@settings(max_examples=15, deadline=None)
def test_slicing_a_split_equals_encoding_the_records(
    small: Benchmark, encoded: EncodedSplit, rows: list[int]
) -> None:
    records = [everything(small)[i] for i in rows]
    direct = make_batch(records, small.vocabulary, small.heldout_pairs)
    assert_same(encoded.batch(torch.tensor(rows)), direct)


def test_writes_are_listed_record_by_record(small: Benchmark, encoded: EncodedSplit) -> None:
    batch = encoded.batch()
    writes = batch.writes
    assert len(batch.tokens) == len(encoded) == 90
    assert (batch.tokens[writes.row, writes.value_pos] == writes.value).all()
    assert (batch.tokens[writes.row, writes.key_pos] == writes.key).all()
    assert (batch.tokens[writes.row, writes.op_pos] == small.vocabulary.write).all()
    expected = [
        (row, write.index)
        for row, record in enumerate(everything(small))
        for write in record.writes(small.vocabulary)
    ]
    assert list(zip(writes.row.tolist(), writes.index.tolist(), strict=True)) == expected


def test_roles_never_pass_the_prediction_position(encoded: EncodedSplit) -> None:
    batch = encoded.batch()
    prefix = role_mask(batch, "causal_prefix")
    for role in ROLES:
        assert not (role_mask(batch, role) & ~prefix).any()


def test_selected_reads_keep_their_roles(encoded: EncodedSplit) -> None:
    batch = encoded.batch(range(10))
    chosen = batch.reads.lag == 2
    part = batch.with_reads(chosen)
    assert 0 < len(part.reads) < len(batch.reads)
    for role in ROLES:
        assert torch.equal(role_mask(part, role), role_mask(batch, role)[chosen])
    assert torch.equal(shortcut_values(part, 3), shortcut_values(batch, 3)[chosen])
    assert_same(batch, batch.to("cpu"))


def test_corrupted_copies_are_encoded_up_to_their_answer(small: Benchmark) -> None:
    vocab = small.vocabulary
    found = build_pairs(
        small.records("train"), vocab, small.heldout_pairs, max_per_type=8, min_per_type=8
    )
    split = EncodedSplit(
        [pair.corrupted for pair in found.pairs],
        vocab,
        small.heldout_pairs,
        through_reads=[pair.read_index for pair in found.pairs],
    )
    reads = split.batch().reads
    last = reads.index == reads.num_reads - 1
    assert reads.index[last].tolist() == [pair.read_index for pair in found.pairs]


def test_bad_arguments_are_refused(small: Benchmark, encoded: EncodedSplit) -> None:
    batch = encoded.batch([0])
    with pytest.raises(CircuitError, match=f"unknown role 'support'; expected {', '.join(ROLES)}"):
        role_mask(batch, "support")
    with pytest.raises(CircuitError, match="write number 0 from the last"):
        shortcut_values(batch, 0)
    for wrong in ([90], [-1], []):
        with pytest.raises(CircuitError, match=r"expected some of 0 .. 89"):
            encoded.batch(wrong)
    with pytest.raises(CircuitError, match="no records"):
        make_batch([], small.vocabulary, small.heldout_pairs)


def test_a_mask_of_records_chooses_them(encoded: EncodedSplit) -> None:
    mask = torch.zeros(len(encoded), dtype=torch.bool)
    mask[[3, 7]] = True
    assert encoded.batch(mask).sample_ids == encoded.batch([3, 7]).sample_ids
    for wrong in (mask[:5], torch.tensor([0.5, 1.2])):
        with pytest.raises(CircuitError, match="expected integers, or a mask of 90"):
            encoded.batch(wrong)
