"""The pages of the repository: no placeholder is left, every link and anchor leads somewhere, prose
is wrapped, and every public name says what it is.
"""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import circuit

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = sorted(path for at in ("benchmarks", "docs") for path in (ROOT / at).glob("*.py"))
WIDTH = 100
UNBROKEN = re.compile(r"`[^`]*`|!\[[^]]*\]|\]\([^)]*\)")
"""What stands on one line, however long: code, the words for an image, where a link leads."""
LISTED = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them; a name that stands twice has a number."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    slugs: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        bare = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slugs.add(re.sub(r"[^\w\- ]", "", bare.lower()).replace(" ", "-"))
    return slugs


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_pages_are_whole(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z_]{3,}@", text) == []
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_lists_stand_apart(page: Path) -> None:
    """Behind an empty line; the site takes them for prose else, as GitHub does not."""
    mark = r"(?:[-*]|\d+\.) "
    joined = rf"^(?!{mark}|#)\S.*\n{mark}.*$"
    assert re.findall(joined, without_code(page), re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_prose_is_wrapped(page: Path) -> None:
    """So that it reads in an editor and a change shows its lines; not tables, headings and code."""
    text = without_code(page)
    prose = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#"))]
    lines = [UNBROKEN.sub(lambda code: code[0].replace(" ", "_"), line) for line in prose]
    after_mark = re.compile(r"^\s*(?:[-*]|\d+\.)?\s*\S* (.*)")
    assert [line for line in lines if len(line) > WIDTH and after_mark.match(line)] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_scripts_import_what_there_is(script: Path) -> None:
    """No other test executes most of them, so that a name that has moved would not be missed."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("circuit"):
            home = import_module(str(node.module))
            assert [one.name for one in node.names if not hasattr(home, one.name)] == []


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [
        page.name for page in PAGES if page.parent.name == "docs" and page.name not in nav
    ] == []


def test_environment_yml_has_the_floors_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    floors = [line.strip().removeprefix("- ") for line in lines if line.startswith("      - ")]
    assert floors == project["project"]["dependencies"]


def test_the_readme_s_loop_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert sum(names["series"].summary()["path"].values()) < 0, "the loss did not fall"
    assert names["series"].closure().path < 1e-2
    assert "adam_current_gradient" in capsys.readouterr().out


def test_the_api_page_has_every_public_name() -> None:
    names = {name.removeprefix("circuit.") for name in LISTED}
    assert set(circuit.__all__) - {"__version__"} <= names


def documented(name: str) -> Iterator[tuple[str, Any]]:
    """A name of the API page, and the public functions that it defines."""
    module, _, last = name.rpartition(".")
    thing = getattr(import_module(module), last)
    yield name, thing
    if inspect.isclass(thing):
        for member, value in list(vars(thing).items()):  # a wrapped method is made when it is read
            bare = getattr(value, "fget", None) or getattr(value, "func", None) or value
            bare = getattr(bare, "__func__", bare)
            if not member.startswith("_") and inspect.isfunction(bare):
                yield f"{name}.{member}", bare


@pytest.mark.parametrize("name", LISTED)
def test_public_names_have_docstrings(name: str) -> None:
    for path, thing in documented(name):
        said = (thing.__doc__ or "").strip()
        assert said, path
        assert not said.startswith(f"{thing.__name__}("), f"{path}: the signature alone"
