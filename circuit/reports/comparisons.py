"""How claims compare numbers: `NUMBER [- NUMBER] SIGN BOUND`.

A bound is a threshold, `THRESHOLD * NUMBER` or a number.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_TEST = re.compile(r"(\w+)(?: - (\w+))? ([<>]=?|==) (?:(\d+\.?\d*)(?: \* (\w+))?|(\w+))")
_SIGNS = {
    **{">=": operator.ge, ">": operator.gt, "==": operator.eq},
    **{"<=": operator.le, "<": operator.lt},
}


class NotShownError(Exception):
    """A report is not there, or the scale cannot show a claim."""


@dataclass(frozen=True)
class Comparison:
    """`number - minus sign bound * times`; without `minus` and `times`, if it has none."""

    number: str
    minus: str
    sign: str
    bound: float
    times: str

    @classmethod
    def parse(cls, text: str) -> Comparison:
        """A comparison as `claims.json` writes it.

        Raises:
            ValueError: it is none.
        """
        match = _TEST.fullmatch(text)
        if match is None:
            raise ValueError(f"no comparison: {text}")
        number, minus, sign, bound, times, other = match.groups()
        return cls(number, minus or "", sign, float(bound or 1), times or other or "")

    @property
    def names(self) -> list[str]:
        """Of the numbers that it compares."""
        return [name for name in (self.number, self.minus, self.times) if name]

    def holds(self, numbers: Mapping[str, Any]) -> bool:
        """Whether it does.

        Raises:
            NotShownError: one of the numbers is null.
        """
        for name in self.names:
            if numbers[name] is None:
                raise NotShownError(f"{name.replace('_', ' ')} is not defined at this scale")
        left = numbers[self.number] - (numbers[self.minus] if self.minus else 0)
        right = self.bound * (numbers[self.times] if self.times else 1)
        return bool(_SIGNS[self.sign](left, right))


def compared(tests: Iterable[str]) -> set[str]:
    """Names of the numbers that some tests compare; of what is no comparison, none."""
    read = (Comparison.parse(test) for test in tests if _TEST.fullmatch(test))
    return {name for one in read for name in one.names}
