"""Whole numbers in the words that users type: of a bounded length, so that int() reads each."""

from __future__ import annotations

import re

WHOLE = "[0-9]{1,18}"
"""As a pattern; what is longer is no number of anything here, and int() raises beyond 4,300."""


def whole_number(text: str) -> int | None:
    """The number, 0 or more; None if the text is none."""
    return int(text) if re.fullmatch(WHOLE, text) else None
