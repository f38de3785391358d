"""The pages say what the program is (tables, commands, examples), the map where results stand."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

import circuit

ROOT = Path(__file__).parents[1]
RESULTS = ("results.md", "results_routes.md")


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = _load(ROOT / "docs" / "option_tables.py")
COMMANDS: dict[str, Any] = tables.commands()
ALIASED = {
    "trace record",
    "bilinear-qk-rank-adam-state-attribution",
    "mlp-functional-write-adam-state-attribution",
}
"""Commands that the guide's examples call by their other name."""


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


GUIDE = ("guide.md", "training_data.md")
"""Pages that lead from questions to commands."""


def prose() -> str:
    """The pages of the guide, one after the other."""
    return "\n".join(map(text_of, GUIDE))


def examples(text: str) -> list[str]:
    """Command lines: in bash blocks with their continuations, or in backticks."""
    fences = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in fences for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(circuit [^`]* --[^`]*)`", text)
    return [line for line in lines if line.startswith("circuit ")]


def split_command(line: str) -> tuple[str, list[str]]:
    """The command that a line names, and the words after it."""
    words = shlex.split(line)[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    return name, words[len(name.split()) :]


def test_the_page_of_options_is_that_of_the_program() -> None:
    assert tables.page() == text_of("commands.md"), f"it has changed; run: {tables.COMMAND}"


def test_every_help_reads_as_it_stands() -> None:
    """A terminal shows it through rich, to which `:B:` is an emoji and `[i]` a style."""
    helps = [told.help for one in COMMANDS.values() for told in (one, *one.params)]
    assert [text for text in helps if Text.from_markup(text).plain != text] == []


def test_an_option_without_help_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    command = COMMANDS["trace show"]
    monkeypatch.setattr(command.params[-1], "help", "")
    monkeypatch.setattr(tables, "commands", lambda: {"trace show": command})
    with pytest.raises(ValueError, match="circuit trace show --json has no help"):
        tables.page()


def test_every_command_is_explained() -> None:
    told = prose()
    assert [name for name in COMMANDS if f"circuit {name}" not in told] == []


def test_every_example_is_one_that_the_program_takes() -> None:
    found = [split_command(line) for line in examples(prose())]
    assert {name for name, _ in found} >= set(COMMANDS) - ALIASED
    for name, words in found:
        COMMANDS[name].make_context(name, words)  # parses, and refuses what it does not know


def test_an_example_that_the_program_does_not_take_is_refused() -> None:
    name, words = split_command("circuit trace show x --nope")
    with pytest.raises(Exception, match="nope"):
        COMMANDS[name].make_context(name, words)


def headings(page: str) -> list[str]:
    """The sections of a page, from `##` down."""
    return re.findall(r"^##+ (.+)$", text_of(page), flags=re.MULTILINE)


def test_every_section_of_the_results_is_in_the_map() -> None:
    assert headings("artifact_map.md") == [name for page in RESULTS for name in headings(page)]


def test_the_map_names_commands_and_options_that_exist() -> None:
    found = [
        split_command(line)
        for line in re.findall(r"`(circuit [^`]+)`", text_of("artifact_map.md"))
        if line != "circuit --help"
    ]
    assert len(found) >= 20
    for name, words in found:
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert [word for word in words if word.startswith("--") and word not in known] == [], name


def test_every_row_of_the_map_has_claim_command_and_file() -> None:
    rows = [line for line in text_of("artifact_map.md").splitlines() if line.startswith("|")]
    assert len(rows) > 40
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3, row
        assert all(cells), row


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {circuit.__version__}" in lines
    assert f"license: {project['license']}" in lines
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d\S*)", changes, re.MULTILINE)
    assert newest
    assert newest[1] == circuit.__version__
