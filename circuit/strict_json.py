"""The one parser of JSON text, and its one writer.

What Python reads beyond JSON is refused (NaN, Infinity), and so is JSON that this program cannot
hold or write again: an object that has a key twice, a number that no float can hold, half of a
surrogate pair, deep nesting. What is written holds finite numbers alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from circuit.errors import CircuitError

MAX_DEPTH = 64
"""Objects and arrays within each other; this program writes at most 7."""

_MAX_DIGITS = 308
"""Of an integer: what a float can hold."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class RefusedJsonError(ValueError):
    """JSON that this program does not take; the message says what is in it."""


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document.

    Args:
        text: bytes are UTF-8.

    Raises:
        RefusedJsonError: it is JSON, and a key stands twice in an object, it is nested more than
            `MAX_DEPTH` deep, a number is beyond what a float can hold, or a text holds half of a
            surrogate pair.
        ValueError: it is none (`json.JSONDecodeError` tells line and column).
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start} is not UTF-8") from None
    repeated: list[str] = []  # named when all of the text is known to be JSON

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(name for name in members if names.count(name) > 1)
        return members

    try:
        payload = json.loads(
            text,
            object_pairs_hook=as_dict,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError:
        raise _too_deep() from None
    if repeated:
        raise RefusedJsonError(f"{repeated[0]!r} stands twice in an object")
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(payload):
        raise _too_deep()
    if not text.isascii() or _SURROGATE.search(text):
        _refuse_surrogates(payload)
    return payload


def finite_json(payload: Any, indent: int | None = None) -> str:
    """A document as JSON text.

    Raises:
        CircuitError: a number in it is not finite; the first is named.
    """
    try:
        return json.dumps(payload, indent=indent, allow_nan=False, ensure_ascii=False)
    except ValueError:
        refuse_not_finite(payload)
        raise


def refuse_not_finite(payload: Any) -> None:
    """Refuse a document that holds a number that is not finite.

    Raises:
        CircuitError: names the first.
    """
    for name, value in _not_finite(payload, ""):
        facts = payload if isinstance(payload, Mapping) else {}
        of = f" of scalar {facts['scalar']}" if "scalar" in facts else ""
        step = facts.get("step", facts.get("target_step"))
        at = "" if step is None else f" at step {step}"
        raise CircuitError(
            f"{name}{of} is {value}{at}: it, or what it is computed from, has diverged",
            fix="look at the steps before",
        ) from None


def _not_finite(node: Any, name: str) -> Iterator[tuple[str, float]]:
    """Numbers in a document that are not finite, with the fields and places that lead to them."""
    if isinstance(node, float) and not math.isfinite(node):
        yield name, node
    inner: Any = enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in node.items() if isinstance(node, Mapping) else inner:
        yield from _not_finite(value, f"{name}.{key}".lstrip("."))


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RefusedJsonError(f"the number {text[:20]} is beyond what a float can hold")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise RefusedJsonError(f"a number has {len(text)} digits, more than {_MAX_DIGITS}")
    return int(text)


def _is_deep(payload: Any) -> bool:
    level = [payload]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level = [value for value in inner if isinstance(value, dict | list)]
    return bool(level)


def _too_deep() -> RefusedJsonError:
    return RefusedJsonError(f"objects and arrays are nested more than {MAX_DEPTH} deep")


def _refuse_surrogates(payload: Any) -> None:
    try:
        json.dumps(payload, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise RefusedJsonError(f"a text holds {half}, half of a character and no UTF-8") from None
