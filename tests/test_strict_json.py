"""The one parser of JSON: what it returns can be written again, whatever it was given."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit.strict_json import MAX_DEPTH, RefusedJsonError, parse_json

PLAIN = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**300), 10**300)
    | st.floats(allow_nan=False)
    | PLAIN,
    lambda inner: st.lists(inner) | st.dictionaries(PLAIN, inner),
    max_leaves=20,
)


@given(VALUES)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    text = json.dumps(value)
    if "Infinity" in text:
        with pytest.raises(ValueError, match="no JSON number"):
            parse_json(text)
    else:
        assert parse_json(text) == parse_json(text.encode()) == value


@given(st.text() | st.binary())
def test_any_text_is_json_or_a_value_error(text: str | bytes) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert parse_json(json.dumps(copy.deepcopy(value))) == value


@given(
    st.integers(1, 2 * MAX_DEPTH) | st.sampled_from([900, 10**5]),
    st.sampled_from([("[", "]"), ('{"a":', "}")]),
)
def test_nesting_is_refused_beyond_a_depth_and_only_there(
    depth: int, kind: tuple[str, str]
) -> None:
    opening, closing = kind
    text = opening * depth + ("1" if ":" in opening else "") + closing * depth
    if depth <= MAX_DEPTH:
        assert parse_json(text) is not None
    else:
        with pytest.raises(RefusedJsonError, match="nested more than 64 deep"):
            parse_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1" * 5000, "5000 digits"),
        ("-" + "1" * 400, "digits, more than 308"),
        ("1e400", "beyond what a float can hold"),
        ("-1E+999", "beyond what a float can hold"),
        ("1" * 400 + ".5", "beyond what a float can hold"),
        (r'"a\ud800"', r"half of a character"),
        (r'{"\uDFFFa": 1}', r"half of a character"),
        ('"a\ud800"', r"half of a character"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(text: str, message: str) -> None:
    for inside in (text, f"[{text}]", f'{{"x": [{text}]}}'):
        with pytest.raises(RefusedJsonError, match=message):
            parse_json(inside)


def test_a_surrogate_pair_is_a_character() -> None:
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600"
