"""Pairs against the table of definitions.md section 2, worked out on words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from circuit.errors import CircuitError
from circuit.tasks.base import Record, Vocabulary
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.pairs import Pair, build_pairs, record_of
from circuit.tasks.symbolic_kv.stream import program_of
from circuit.tasks.symbolic_kv.task import HeldOut, SymbolicKV

Changed = tuple[dict[int, str], str, tuple[str, str]]
"""New words by position, what changed, transfer words."""


def naive_change(benchmark: Benchmark, kind: str, words: list[str], op: int) -> Changed | None:
    """The table's row for one read (its op at `op`), or None if the read is skipped."""
    vocab = benchmark.vocabulary
    writes = [i for i in range(1, len(words) - 1, 3) if words[i] == "W"]
    before = [i for i in writes if i < op]
    key, answer = words[op + 1], words[op + 2]

    def latest(of: str, limit: int) -> int:
        return [w for w in writes if w < limit and words[w + 1] == of][-1]

    used = {
        latest(words[r + 1], r) for r in range(1, op, 3) if words[r] == "R"
    }  # supports of earlier reads
    support = latest(key, op)

    def another(write: int) -> str | None:
        written = {words[w + 2] for w in writes}
        held = {tuple(vocab.decode(pair).split()) for pair in benchmark.task.heldout_pairs}
        status = (words[write + 1], words[write + 2]) in held
        for value in vocab.tokens[vocab.value_ids.start :]:
            if value not in written and ((words[write + 1], value) in held) == status:
                return value
        return None

    if kind == "support_value":
        value = another(support)
        if support in used or value is None:
            return None
        return {support + 2: value, op + 2: value}, value, (answer, value)
    if kind == "query_key":
        others = sorted({words[w + 1] for w in before} - {key})
        if not others:
            return None
        value = words[latest(others[0], op) + 2]
        return {op + 1: others[0], op + 2: value}, others[0], (answer, value)
    if kind == "recency":
        stale = [w for w in before if w < support and words[w + 1] == key and w not in used]
        if support in used or not stale:
            return None
        old = words[stale[-1] + 2]
        new = {support + 2: old, stale[-1] + 2: answer, op + 2: old}
        return new, str(writes.index(stale[-1])), (answer, old)
    others_written = [w for w in before if words[w + 1] != key and w not in used]
    if not others_written:
        return None
    write = others_written[-1]
    value = another(write)
    if value is None:
        return None
    what = f"{writes.index(write)}:{value}"
    return {write + 2: value}, what, (words[write + 2], value)


def naive_pairs(benchmark: Benchmark, kind: str, records: list[Record]) -> list[tuple[str, ...]]:
    vocab = benchmark.vocabulary
    found: list[tuple[str, ...]] = []
    for record in records:
        words = vocab.decode(record.tokens).split()
        reads = [i for i in range(1, len(words) - 1, 3) if words[i] == "R"]
        for number, op in enumerate(reads):
            change = naive_change(benchmark, kind, words, op)
            if change is not None:
                new, what, transfer = change
                text = " ".join(new.get(i, word) for i, word in enumerate(words))
                found.append((f"{kind}:{record.sample_id}:{number}:{what}", text, *transfer))
    return found


def described(pair: Pair, vocab: Vocabulary) -> tuple[str, ...]:
    a, b = pair.transfer_tokens
    return pair.pair_id, vocab.decode(pair.corrupted.tokens), vocab.tokens[a], vocab.tokens[b]


@pytest.mark.parametrize("split", ["train", "heldout_pairs"])
@pytest.mark.parametrize("kind", SymbolicKV.pair_types)
def test_pairs_are_those_of_the_table(small: Benchmark, kind: str, split: str) -> None:
    vocab, records = small.vocabulary, small.records(split)
    found = build_pairs(small.task, records, types=[kind], max_per_type=10**6)
    expected = naive_pairs(small, kind, records)
    assert [described(pair, vocab) for pair in found.pairs] == expected
    reads = sum(len(program_of(record, vocab).reads) for record in records)
    assert len(found.pairs) + sum(found.skipped[kind].values()) == reads
    assert len(found.pairs) > 10


def test_the_id_of_a_pair_names_its_record() -> None:
    assert record_of("recency:a:b:2:14") == record_of("distractor:a:b:0:3:V001") == "a:b"
    for odd in ("other", "recency:2:14", "distractor:a:0:V001", "recency:a:x:2"):
        with pytest.raises(CircuitError, match=f"no pair has the id '{odd}'"):
            record_of(odd)


def test_a_pair_differs_in_one_variable_before_its_answer(small: Benchmark) -> None:
    vocab = small.vocabulary
    found = build_pairs(small.task, everything(small), max_per_type=200, min_per_type=20)
    for pair in found.pairs:
        clean = program_of(pair.clean, vocab, through_read=pair.read_index)
        corrupted = program_of(pair.corrupted, vocab, through_read=pair.read_index)
        read, other = clean.reads[-1], corrupted.reads[-1]
        assert (
            pair.clean.tokens[read.answer_pos + 1 :] == pair.corrupted.tokens[read.answer_pos + 1 :]
        )
        assert clean.reads[:-1] == corrupted.reads[:-1]
        assert (read.answer == other.answer) == (pair.type == "distractor")
        if pair.type != "distractor":
            assert pair.transfer_tokens == (read.answer, other.answer)
        changed = [
            i for i, (a, b) in enumerate(zip(clean.writes, corrupted.writes, strict=True)) if a != b
        ]
        assert len(changed) == {"query_key": 0, "recency": 2}.get(pair.type, 1)
        for a, b in zip(clean.writes, corrupted.writes, strict=True):
            status = [(write.key, write.value) in small.task.heldout_pairs for write in (a, b)]
            assert a.key == b.key
            assert status[0] == status[1]
        assert pair.side("clean") is pair.clean
        assert record_of(pair.pair_id) == pair.clean.sample_id
        assert pair.side("corrupted").source_id == pair.clean.sample_id


def everything(benchmark: Benchmark) -> list[Record]:
    return benchmark.records("train") + benchmark.records("heldout_pairs")


def test_the_scan_is_in_file_order_and_stops_at_the_maximum(small: Benchmark) -> None:
    args = (small.task, small.records("train"))
    every = build_pairs(*args, types=["recency"], max_per_type=10**6).pairs
    order = ["distractor", "recency"]
    some = build_pairs(*args, types=order, max_per_type=5, min_per_type=5)
    assert [pair.type for pair in some.pairs] == ["distractor"] * 5 + ["recency"] * 5
    assert some.pairs[5:] == every[:5]


def test_too_few_pairs_list_the_reasons(small: Benchmark) -> None:
    vocab = small.vocabulary
    text = "<bos> W K00 V01 W K01 V02 R K00 V01 R K00 V01 <eos>"
    record = Record("only", "train", vocab.encode(text))
    with pytest.raises(CircuitError) as caught:
        build_pairs(small.task, [record], max_per_type=9, min_per_type=2)
    assert "1 pairs of type support_value from 1 records" in str(caught.value)
    assert "1 x the support write was read before" in str(caught.value)
    alone = replace(record, tokens=vocab.encode("<bos> W K00 V01 R K00 V01 <eos>"))
    for kind, reason in (
        ("query_key", "no other key has another value"),
        ("recency", "no earlier write of the key"),
        ("distractor", "no earlier write of another key"),
    ):
        with pytest.raises(CircuitError, match=f"0 pairs of type {kind} .*1 x {reason}"):
            build_pairs(small.task, [alone], types=[kind], max_per_type=9)


def test_no_admissible_value_is_a_reason(small: Benchmark) -> None:
    vocab = small.vocabulary
    record = Record("only", "train", vocab.encode("<bos> W K00 V01 R K00 V01 <eos>"))
    lonely = SymbolicKV(small.config, HeldOut(heldout_pairs=[("K00", "V01")]))
    with pytest.raises(CircuitError, match="1 x no other value is admissible"):
        build_pairs(lonely, [record], types=["support_value"], max_per_type=9)


@pytest.mark.parametrize(
    ("types", "most", "least", "message"),
    [
        (["support"], 4, 1, "unknown pair type 'support'; expected support_value, query_key"),
        ([], 4, 1, "pair types \\(none\\)"),
        (["recency", "recency"], 4, 1, "each named once"),
        (["recency"], 4, 5, "min_per_type 5 and max_per_type 4"),
        (["recency"], 0, 0, "at least 1 pair"),
    ],
)
def test_bad_arguments_are_refused(
    small: Benchmark, types: list[str], most: int, least: int, message: str
) -> None:
    with pytest.raises(CircuitError, match=message):
        build_pairs(
            small.task,
            small.records("train"),
            types=types,
            max_per_type=most,
            min_per_type=least,
        )


def test_an_unknown_side_is_refused(small: Benchmark) -> None:
    args = (small.task, small.records("train"))
    pair = build_pairs(*args, types=["query_key"], max_per_type=1).pairs[0]
    with pytest.raises(CircuitError, match="unknown side 'dirty'; expected clean or corrupted"):
        pair.side("dirty")
