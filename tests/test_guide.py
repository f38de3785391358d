"""The guide says what the program is: its option tables, its commands, and the examples that it gives."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("guide.md", "artifact_map.md")


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = _load(ROOT / "docs" / "option_tables.py")
COMMANDS: dict[str, Any] = tables.commands()


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its generated part."""
    return text_of(page).split(tables.BEGIN)[0]


def examples(text: str) -> list[str]:
    """Command lines: in bash blocks with their continuations, or in backticks."""
    fences = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in fences for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(circuit [^`]* --[^`]*)`", text)
    return [line for line in lines if line.startswith("circuit ")]


def split_command(line: str) -> tuple[str, list[str]]:
    """The command that a line names, and the words after it."""
    words = shlex.split(line)[1:]
    name = " ".join(words[:2]) if words[0] in ("trace", "study") else words[0]
    return name, words[len(name.split()) :]


def test_option_tables_are_those_of_the_program() -> None:
    text = text_of("guide.md")
    assert tables.regenerated(text) == text, f"the program has changed; run: {tables.COMMAND}"


def test_a_changed_table_is_seen() -> None:
    text = text_of("guide.md")
    changed = text.replace("| `--anchor-every` | `50` |", "| `--anchor-every` | `51` |")
    assert changed != text
    assert tables.regenerated(changed) == text
    with pytest.raises(ValueError, match="expected"):
        tables.regenerated(text.replace(tables.END, ""))


def test_every_command_is_explained() -> None:
    told = prose("guide.md")
    assert [name for name in COMMANDS if f"circuit {name}" not in told] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_example_is_one_that_the_program_takes(page: str) -> None:
    found = [split_command(line) for line in examples(prose(page))]
    assert len(found) >= 10
    for name, words in found:
        COMMANDS[name].make_context(name, words)  # parses, and refuses what it does not know


def test_an_example_that_the_program_does_not_take_is_refused() -> None:
    name, words = split_command("circuit trace show x --nope")
    with pytest.raises(Exception, match="nope"):
        COMMANDS[name].make_context(name, words)
