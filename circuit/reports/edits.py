"""Edits of trainings as words of a command line, and as lines of a file.

    less,drop=train-00017,steps=2500:2600           drop=EXAMPLE, weight=EXAMPLE*FACTOR
    order,swap=2510:2520,replace=train-1->train-2   swap=STEP:STEP, replace=EXAMPLE->EXAMPLE
    still,pattern=L1H2,freeze=L0H1.q,clamp=L0*0.5   pattern=HEAD, freeze=NAME, clamp=NAME*BOUND
    slow,set=rate*0.5,update=L1*0.1                 set=rate|decay|clip*FACTOR, update=NAME*FACTOR
    other,scale=weight_decay*0,direction=gradient   scale=TERM*FACTOR, direction=gradient|momentum

where NAME is a tensor or a group of parameters (`L1`, `L1H0`, `L1H0.q`, `L0.mlp`, `*`), and EXAMPLE
may be one token that it is asked to predict: `train-00017@12`, by the position that predicts it.

A file has a JSON object a line, `{"label": "less", "edit": {"start": 2500, "end": 2600, "examples":
{"train-00017": 0.0}}}`, with the fields of `circuit.Edit`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from circuit.core.edit import Edit
from circuit.errors import CircuitError
from circuit.numerals import WHOLE
from circuit.reading import read_bytes
from circuit.scalars.family import split_word
from circuit.strict_json import parse_json

_SCALED = re.compile(r"(.+)\*([-+.\deE]+)")
_PAIR = re.compile(f"({WHOLE}):({WHOLE})")
_REPLACED = re.compile(r"(.+)->(.+)")

FACTORS: Mapping[str, str] = {
    "weight": "examples",
    "scale": "terms",
    "update": "parameters",
    "clamp": "bounds",
    "set": "settings",
}
"""Keys whose values are `NAME*FACTOR`, and the field of an `Edit` that they fill."""
FIXED: Mapping[str, tuple[str, float]] = {
    "drop": ("examples", 0.0),
    "freeze": ("parameters", 0.0),
    "pattern": ("patterns", 1.0),
    "direction": ("direction", 1.0),
}
"""Keys whose values are names, with the field and the factor."""
KEYS = (*FACTORS, *FIXED, "replace", "swap", "steps")
WORDS = (
    "label,KEY=VALUE[,KEY=VALUE...], such as 'less,drop=train-00017', with KEY one of"
    f" {', '.join(sorted(KEYS))}"
)


def parse_edit(word: str, start: int, end: int) -> tuple[str, Edit]:
    """Label and edit of a word.

    Args:
        start, end: its steps, unless it says which.

    Raises:
        CircuitError: it says nothing, or something else.
    """
    label, values = split_word(word)
    parts: dict[str, dict[str, Any]] = {}
    swapped: list[tuple[int, int]] = []
    steps = values.pop("steps", ())
    if steps:
        if len(steps) > 1:
            told = ",".join(f"steps={one}" for one in steps)
            raise CircuitError(told, where="`edits`", expected="steps=A:B, once")
        start, end = _pair("steps", steps[0], "steps=A:B, once")
    said = [(key, text) for key, texts in values.items() for text in texts]
    for key, text in said:
        if key in FIXED:
            field, value = FIXED[key]
            _put(parts, field, text, value)
        elif key in FACTORS:
            _put(parts, FACTORS[key], *_scaled(key, text))
        elif key == "replace":
            match = _REPLACED.fullmatch(text)
            if match is None:
                raise CircuitError(f"'{text}'", where="`edits`", expected="replace=NAME->NAME")
            _put(parts, "replaced", match[1], match[2])
        elif key == "swap":
            swapped.append(_pair("swap", text, "swap=STEP:STEP"))
        else:
            raise CircuitError(f"'{word}'", where="`edits`", expected=WORDS)
    if not said:
        raise CircuitError(f"'{word}'", where="`edits`", expected=WORDS)
    try:
        return label, Edit(start, end, swapped=tuple(swapped), **parts)
    except CircuitError as error:
        of_key = _KEYS_OF.get(error.where or "")
        where = "`edits`" if of_key is None else f"`edits`, key {of_key}"
        raise CircuitError(
            f"'{word}': {error.what}", where=where, expected=error.expected, fix=error.fix
        ) from None


_KEYS_OF = {"`settings`": "set", "`direction`": "direction"}
"""Keys by the fields of an `Edit` that they alone fill."""


def _put(parts: dict[str, dict[str, Any]], field: str, name: str, value: Any) -> None:
    of = parts.setdefault(field, {})
    if name in of:
        raise CircuitError(f"'{name}' twice", where="`edits`", expected="one factor for each")
    of[name] = value


def _scaled(key: str, text: str) -> tuple[str, float]:
    match = _SCALED.fullmatch(text)
    try:
        return (match[1] if match else ""), float(match[2] if match else "")
    except ValueError:
        expected = f"{key}=NAME*FACTOR"
        raise CircuitError(f"'{key}={text}'", where="`edits`", expected=expected) from None


def _pair(key: str, text: str, expected: str) -> tuple[int, int]:
    match = _PAIR.fullmatch(text)
    if match is None:
        raise CircuitError(f"{key}={text}", where="`edits`", expected=expected)
    return int(match[1]), int(match[2])


def read_edits(path: Path) -> dict[str, Edit]:
    """The edits of a file, by their labels, in its order.

    Raises:
        CircuitError: the file is missing, a line is none (it is named), or a label stands twice.
    """
    edits: dict[str, Edit] = {}
    expected = '{"label": ..., "edit": {"start": ..., "end": ..., ...}}'
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            payload = parse_json(line)
            label, edit = payload["label"], _EDIT.validate_python(payload["edit"])
            fits = isinstance(label, str) and len(payload) == 2
        except (ValueError, KeyError, TypeError, ValidationError, CircuitError) as error:
            raise CircuitError(
                f"no edit ({_told(error)})", where=where, expected=expected
            ) from None
        if not fits or label in edits:
            raise CircuitError(
                f"label {label!r}", where=where, expected=f"{expected}, each label once"
            )
        edits[label] = edit
    return edits


def _told(error: Exception) -> str:
    """What is wrong with a line, in the words of its fields."""
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()
        )
    return str(error).replace("\n", "; ")


_EDIT = TypeAdapter(Edit)
