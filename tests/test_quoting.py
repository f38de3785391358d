"""Names of others stay names: for a terminal, a shell, Markdown and a spreadsheet."""

from __future__ import annotations

import ast
import csv
import io
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from circuit.artifacts import dump_csv
from circuit.quoting import counted, csv_cell, markdown_text, plain_text, shell_line, shown
from circuit.reports.tables import Table

ROOT = Path(__file__).parents[1]
NASTY = [
    *("runs/a b;$(touch PWNED)", "-rf", "", "a|b", "a\nb", "it's", 'say "x"', "`id`", "\\", "ü"),
    *("<script>alert(1)</script>", "[red]", "[a](b)", "**x**", "_x_", "~~x~~", "&lt;", "# x"),
    *("\x1b[31m", "\x9b", "\u202e", "\u2028", "\r", "\x7f", "\U000e0001", "a\\|b", "$'x'"),
]
texts = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def test_a_shell_is_given_the_words_and_runs_none(tmp_path: Path) -> None:
    words = [word for word in NASTY if "\0" not in word]
    line = shell_line(["printf", "%s\\0", *words])
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "told"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps")])
def test_a_number_stands_with_its_noun(number: int, told: str) -> None:
    assert counted(number, "step") == told


@given(texts)
def test_what_is_shown_prints_on_one_line(text: str) -> None:
    line = shown(text)
    assert all(letter.isprintable() or letter.isspace() for letter in line)
    assert "\n" not in line
    assert shown(line) == line
    assert line == text or not text.isprintable()


@settings(max_examples=60)
@given(texts, texts)
def test_a_cell_of_markdown_says_the_name_and_nothing_else(first: str, second: str) -> None:
    values = {"first": first, "second": second}
    table = Table("", {"first": "a", "second": "b"}, [values])
    tokens = (
        MarkdownIt("commonmark")
        .enable(["table", "strikethrough"])
        .parse("\n".join(table.markdown()))
    )
    cells = [
        "".join(child.content for child in token.children or ())
        for token in tokens
        if token.type == "inline"
    ]
    assert cells == ["a", "b", *(shown(" ".join(v.split())) for v in values.values())]
    kinds = {child.type for token in tokens for child in token.children or ()}
    assert kinds <= {"text", "text_special"}


@given(texts)
def test_the_console_shows_of_a_note_what_its_markdown_says(text: str) -> None:
    name = shown(" ".join(text.split()))
    assert plain_text(f"**{markdown_text(text)}** of `x`") == f"{name} of x"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "plain", "L1H3", ""])
def test_a_spreadsheet_computes_no_name_and_keeps_every_number(name: str) -> None:
    row = {"name": name, "change": -1.5, "steps": -3, "none": None}
    (read,) = csv.DictReader(io.StringIO(dump_csv([row])))
    assert read["name"] in (shown(name), f"'{name}")
    assert not read["name"].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert (float(read["change"]), int(read["steps"]), read["none"]) == (-1.5, -3, "")
    assert csv_cell(-1.5) == -1.5


def test_there_is_one_quoting() -> None:
    """No other module of the program quotes for a shell, or takes marks out of Markdown."""
    others = []
    for path in [*ROOT.glob("circuit/**/*.py"), *ROOT.glob("cli/**/*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
        names = [one.name for node in imports for one in node.names]
        if "shlex" in names and path.name not in ("quoting.py", "shells.py"):
            others.append(path.name)
        if '.replace("**"' in path.read_text("utf-8"):
            others.append(path.name)
    assert others == []
