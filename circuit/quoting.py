"""Texts of others where they are read: on a console, in a shell, in Markdown, in CSV.

Names of files, runs, splits, tokens and labels are whatever somebody has called them. Each kind of
reader is given them in one way, in which they stay names: no terminal obeys them, no shell runs
them, no page and no spreadsheet takes them for its own language. (HTML is made by Jinja, which
escapes, and no string ends its JSON.)
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from typing import Any
from unicodedata import category

_MARKUP = re.compile(r"[\\`*\[\]<&|~]|(?<!\w)_|_(?!\w)")
_MARKS = re.compile(r"\\([\W_])|\*\*|`")
_FORMULA = ("=", "+", "-", "@")


def shown(text: object) -> str:
    """On one line of a terminal: what is no letter, sign or space stands as Python escapes it."""
    line = str(text)
    return line if line.isprintable() else "".join(map(_letter, line))


def _letter(letter: str) -> str:
    if letter.isprintable() or category(letter) == "Zs":
        return letter
    return letter.encode("unicode_escape").decode()


def shell_line(words: Iterable[str]) -> str:
    """Words of a command as a shell takes them, on one line.

    A word with a letter that does not print stands in `$'...'`, which bash and zsh know.
    """
    return " ".join(shlex.quote(word) if word.isprintable() else _ansi_c(word) for word in words)


def _ansi_c(word: str) -> str:
    letters = (
        "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))
        if not letter.isprintable()
        else "\\" * (letter in "\\'") + letter
        for letter in word
    )
    return f"$'{''.join(letters)}'"


def counted(number: int, noun: str) -> str:
    """`1 step`, `2 steps`: a number with its noun, which stands for one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def markdown_text(text: object) -> str:
    """In a line or a table's cell of Markdown, as it stands: no markup, no HTML, no other cell."""
    return _MARKUP.sub(r"\\\g<0>", shown(" ".join(str(text).split())))


def plain_text(markdown: str) -> str:
    """A line of Markdown without the marks of bold and code, its escaped signs as they were."""
    return _MARKS.sub(lambda mark: mark[1] or "", markdown)


def csv_cell(value: Any) -> Any:
    """In a CSV: a text on one line, an apostrophe before what a spreadsheet takes for a formula.

    Numbers stay numbers.
    """
    if not isinstance(value, str):
        return value
    text = shown(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
