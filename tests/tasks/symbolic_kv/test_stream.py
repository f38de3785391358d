"""The vocabulary's order, and the parser, which is the only judge of what a record says."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit.errors import CircuitError
from circuit.tasks.base import Record
from circuit.tasks.records import record_from_json, record_to_json
from circuit.tasks.symbolic_kv.stream import Vocabulary, program_of

VOCAB = Vocabulary(8, 128)


def record(text: str) -> Record:
    return Record("r", "s", VOCAB.encode(text))


def test_vocabulary_is_in_the_documented_order() -> None:
    tokens = VOCAB.tokens
    assert tokens[:7] == ("<pad>", "<bos>", "<eos>", "W", "R", "K00", "K01")
    assert tokens[12:14] == ("K07", "V000")
    assert tokens[-1] == "V127"
    assert len(tokens) == VOCAB.size == 141
    assert [VOCAB.tokens[VOCAB.value_id(i)] for i in (0, 127)] == ["V000", "V127"]
    assert Vocabulary(2, 48).tokens[-1] == "V47"


@given(st.integers(2, 120), st.integers(2, 1200), st.data())
def test_decode_inverts_encode(keys: int, values: int, data: st.DataObject) -> None:
    vocab = Vocabulary(keys, values)
    assert len(set(vocab.tokens)) == vocab.size
    ids = tuple(data.draw(st.lists(st.integers(0, vocab.size - 1), min_size=1, max_size=20)))
    assert vocab.encode(vocab.decode(ids)) == ids


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VOCAB.encode("<bos> K99"), "unknown token 'K99'"),
        (lambda: VOCAB.encode("<bos>  K00"), "unknown token ''"),
        (lambda: VOCAB.decode([1, 141]), "unknown token id 141"),
        (lambda: VOCAB.decode([-1]), "unknown token id -1"),
        (lambda: VOCAB.key_id(8), "unknown key 8"),
        (lambda: VOCAB.value_id(-1), "unknown value -1"),
    ],
)
def test_unknown_tokens_are_refused(call: object, message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        call()  # type: ignore[operator]


def test_reads_and_writes_are_parsed_from_the_tokens() -> None:
    text = "<bos> W K00 V001 W K01 V002 W K00 V003 R K01 V002 W K02 V004 R K00 V003 <eos>"
    program = program_of(record(text), VOCAB)
    assert [w.value_pos for w in program.writes] == [3, 6, 9, 15]
    first, second = program.reads
    assert (first.op_pos, first.key_pos, first.answer_pos) == (10, 11, 12)
    assert (first.support.index, first.lag, first.token_lag, first.writes_before) == (1, 1, 5, 3)
    assert (second.support.index, second.lag, second.token_lag) == (2, 1, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W K00 V001 <eos>", "position 0: found W; expected <bos>"),
        ("<bos> K00 K00 V001 <eos>", "position 1: found K00; expected W, R or <eos>"),
        ("<bos> W V001 V001 <eos>", "position 2: found V001; expected a key"),
        ("<bos> W K00 K00 <eos>", "position 3: found K00; expected a value"),
        ("<bos> W K00 V001", "position 4: the record ends; expected <eos>"),
        ("<bos> W K00", "position 3: the record ends; expected a value"),
        ("<bos> W K00 V001 <eos> <pad>", "position 5: found <pad>; expected <eos> as the last"),
        ("<bos> R K00 V001 <eos>", "position 2: found K00; expected a key that was written"),
        (
            "<bos> W K00 V001 W K00 V002 R K00 V001 <eos>",
            "position 9: found V001; expected V002, the latest value",
        ),
    ],
)
def test_invalid_records_are_named_with_the_position(text: str, message: str) -> None:
    with pytest.raises(CircuitError, match=f"record r, {message}"):
        program_of(record(text), VOCAB)


def test_a_copy_is_validated_up_to_its_answer_only() -> None:
    text = "<bos> W K00 V001 R K00 V001 R K00 V009 <eos>"
    copy = record(text)
    assert len(program_of(copy, VOCAB, through_read=0).reads) == 1
    with pytest.raises(CircuitError, match="position 9"):
        program_of(copy, VOCAB, through_read=1)
    with pytest.raises(CircuitError, match="no read 3; the record has 1"):
        program_of(record("<bos> W K00 V001 R K00 V001 <eos>"), VOCAB, through_read=3)


@given(st.text(max_size=8), st.none() | st.tuples(st.text(max_size=5), st.integers(0, 9)))
def test_a_line_holds_the_record(name: str, source: tuple[str, int] | None) -> None:
    source_id, changed_write = source or (None, None)
    tokens = VOCAB.encode("<bos> W K00 V001 <eos>")
    original = Record(name, "s", tokens, source_id, changed_write)
    line = record_to_json(original, VOCAB)
    assert "\n" not in line
    assert record_from_json(line, VOCAB, where="f:1") == original


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"', "f:4: not valid JSON"),
        ("[]", "f:4: not a JSON object"),
        ('{"id": "a", "split": "s"}', "f:4: no 'tokens'"),
        ('{"id": 1, "split": "s", "tokens": "<bos>"}', "f:4: field 'id' is 1; expected 'id' as"),
        ('{"id": "a", "split": "s", "tokens": "<bos>", "lag": 1}', "f:4: unknown field 'lag'"),
        ('{"id": "a", "split": "s", "tokens": "<bxs>"}', "f:4: unknown token '<bxs>'"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        record_from_json(line, VOCAB, where="f:4")


def test_generating_needs_no_torch() -> None:
    code = (
        "import sys, circuit.tasks.symbolic_kv.task, circuit.tasks.benchmark;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
