"""Numbers in words: each is read, or refused in one line, however many digits it has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from circuit.core.edit import Edit
from circuit.core.paths import path_rule
from circuit.errors import CircuitError
from circuit.model.components import parse_component
from circuit.numerals import whole_number
from circuit.options import parse_window
from circuit.reports.edits import parse_edit
from circuit.scalars.family import ScalarFamily, parse_scalars
from circuit.scalars.routes import parse_route
from circuit.train_config import ModelConfig

LONG = "9" * 5000
window = partial(parse_window, where="`windows`")
edit = partial(parse_edit, start=0, end=9)


def scalars(word: str) -> None:
    """What is looked at before anything is built."""
    family = parse_scalars(word)
    assert isinstance(family, ScalarFamily)
    family.check()
    family.check_model(ModelConfig(layers=2, heads=2, d_model=32, d_ff=8, max_sequence_length=8))


WORDS: list[tuple[Callable[[str], Any], str]] = [
    (parse_component, "L{}H0"),
    (parse_component, "L0H{}"),
    (parse_component, "L{}MLP"),
    (window, "{}:5"),
    (window, "0:{}"),
    (path_rule, "midpoint:{}"),
    (path_rule, "gauss:{}"),
    (edit, "x,steps=0:{},drop=a"),
    (edit, "x,swap={}:2"),
    (
        parse_route,
        "label=x,stage=embed,position_role=all,subspace=head_qk_query,head_layer=0,head=0,rank={}",
    ),
    (scalars, "qk_match,head=L0H0,rank={}"),
    (scalars, "qk_match,head=L0H{},rank=1"),
    (scalars, "qk_match,head=L0H0,basis=step:{}"),
]


@pytest.mark.parametrize(("read", "word"), WORDS, ids=[word for _, word in WORDS])
def test_a_number_of_any_length_is_read_or_refused(read: Callable[[str], Any], word: str) -> None:
    read(word.format(1))
    with pytest.raises(CircuitError):
        read(word.format(LONG))


def test_a_token_of_an_example_has_a_short_number() -> None:
    assert Edit(0, 1, examples={"a@7": 0.0}).weighed == {"a": {7: 0.0}}
    assert Edit(0, 1, examples={f"a@{LONG}": 0.0}).weighed == {f"a@{LONG}": {None: 0.0}}


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("007", 7), ("", None), ("-1", None), ("1.0", None), ("٣", None)]
)
def test_whole_numbers(text: str, number: int | None) -> None:
    assert whole_number(text) == number
