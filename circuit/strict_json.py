"""The one reader of JSON text.

What Python reads beyond JSON is refused: an object that has a key twice, NaN and Infinity.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


class RepeatedKeyError(ValueError):
    """An object has a key more than once; the message names it."""


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document.

    Raises:
        ValueError: it is none (`json.JSONDecodeError`), it is nested too deeply, a number has more
            digits than Python reads, or a key stands twice in an object (`RepeatedKeyError`).
    """
    repeated: list[str] = []  # named when all of the text is known to be JSON

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(name for name in found if names.count(name) > 1)
        return found

    try:
        payload = json.loads(text, object_pairs_hook=made, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if repeated:
        raise RepeatedKeyError(f"{repeated[0]!r} stands twice in an object")
    return payload


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
