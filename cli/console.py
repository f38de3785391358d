"""The console of rich's that commands print on; imported where one prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

from circuit.quoting import shown


class Plain(Console):
    """A console on which nothing that is printed is more than letters: no name reaches a terminal
    as a command to it."""

    def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
        """Segments with texts that print."""
        for one in super().render(*args, **options):
            if one.control or one.text.isprintable():
                yield one
            else:
                yield Segment("\n".join(map(shown, one.text.split("\n"))), one.style)
