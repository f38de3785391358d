"""The notebooks as committed: small, clean, of this program; and they run on a new quickstart."""

from __future__ import annotations

import ast
import base64
import importlib.util
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from command_line import type_and_read

import circuit

ROOT = Path(__file__).parents[2]


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"notebooks_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _load(ROOT / "notebooks" / "run.py")
NOTEBOOKS: list[Path] = tool.notebooks()
OF_A_RUN = [path for path in NOTEBOOKS if tool.looks_at_the_run(tool.read(path))]
ALONE = [path for path in NOTEBOOKS if path not in OF_A_RUN]
"""Those that train what they look at."""
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tree(cell: Any) -> ast.Module:
    """A code cell as Python, without its magics."""
    return ast.parse(re.sub(r"^%.*$", "", cell.source, flags=re.MULTILINE))


def kinds(notebook: Any) -> list[list[Any]]:
    """What each code cell puts out, without the numbers."""
    return [
        [output.get("name") or sorted(output.get("data", {})) for output in cell.outputs]
        for cell in code(notebook)
    ]


def complaints(notebook: Any) -> list[str]:
    """Outputs that say that something went wrong."""
    return [
        str(output)[:300]
        for cell in code(notebook)
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def absolute_paths(text: str) -> list[str]:
    return re.findall(r"(?<![\w.<:/])(?:/[\w.@-]+){2,}|[A-Z]:\\\w+", text)


def test_they_are_numbered() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_"]
    assert [path.stem[:2] for path in ALONE] == ["4_"]


def test_absolute_paths_are_seen() -> None:
    for path in ("/home/me/x", "at /tmp/a.py:3", '"/Users/x/y"', r"C:\Users"):
        assert absolute_paths(path)
    for text in ("../artifacts/runs/quickstart", "</td></tr>", "steps/s", "https://a.b/c/d"):
        assert not absolute_paths(text)


@each
def test_committed_outputs_are_small_clean_and_in_order(path: Path) -> None:
    notebook = tool.read(path)
    assert path.stat().st_size <= 200 * 1024
    assert [cell.execution_count for cell in code(notebook)] == list(
        range(1, len(code(notebook)) + 1)
    )
    assert complaints(notebook) == []
    assert [found for text in tool.texts(notebook) for found in absolute_paths(text)] == []
    pictures = [
        base64.b64decode(output.data["image/png"])
        for cell in code(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3
    assert max(map(len, pictures)) <= 40 * 1024


@each
def test_notebooks_keep_neither_clock_nor_machine(path: Path) -> None:
    notebook = tool.read(path)
    assert {key for cell in notebook.cells for key in cell.metadata} == set()
    assert notebook.metadata.language_info == {"name": "python"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info", "circuit"}


@each
def test_notebooks_read_top_to_bottom(path: Path) -> None:
    notebook = tool.read(path)
    assert notebook.cells[0].cell_type == "markdown"
    lengths = {cell.id: len(cell.source.splitlines()) for cell in code(notebook)}
    assert [name for name, lines in lengths.items() if lines > 25] == []
    laws = [node for cell in code(notebook) for node in ast.walk(tree(cell))]
    assert len([node for node in laws if isinstance(node, ast.Assert)]) >= 2
    words = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", words)
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_without_the_run_one_line_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in OF_A_RUN:
        sources = "\n".join(cell.source for cell in code(tool.read(path)))
        (opened,) = re.findall(r'circuit\.open_run\("([^"]+)"\)', sources)
        assert opened == tool.RUN
        with pytest.raises(circuit.CircuitError, match=r"no such folder.*`circuit quickstart`$"):
            circuit.open_run(opened)


@pytest.mark.parametrize("in_place", [False, True])
def test_running_changes_the_committed_notebooks_only_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    committed = tmp_path / NOTEBOOKS[0].name
    committed.write_bytes(NOTEBOOKS[0].read_bytes())

    def execute(paths: list[Path], _: Path) -> Any:  # as on a machine that trains other weights
        found = [tool.read(path) for path in paths]
        for notebook in found:
            notebook.metadata.circuit.best_weights_sha256 = "0" * 64
        return found

    monkeypatch.setattr(tool, "quickstart", lambda: None)  # which `execute` would look at
    monkeypatch.setattr(tool, "execute", execute)
    monkeypatch.setattr(tool, "ELSEWHERE", tmp_path / "elsewhere")
    tool.main([*(["--write"] if in_place else []), str(committed)])
    assert (committed.read_bytes() == NOTEBOOKS[0].read_bytes()) is not in_place
    assert (tmp_path / "elsewhere" / committed.name).exists() is not in_place


@each
def test_notebooks_use_public_names_that_exist(path: Path) -> None:
    nodes = [node for cell in code(tool.read(path)) for node in ast.walk(tree(cell))]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.module
            home = import_module(node.module)
            assert [a.name for a in node.names if not hasattr(home, a.name)] == []
            assert [a.name for a in node.names if a.name.startswith("_")] == []
    reached = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    assert [name for name in reached if name.startswith("_") and name != "__init__"] == []


def executed(folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[Any, Any]]:
    """Each notebook as committed, and on a new quickstart in that folder."""
    place = folder / "notebooks"
    place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("CIRCUIT_DEVICE", raising=False)
        made = type_and_read(["quickstart"], capsys)
    assert made.code == 0, made.err
    for path, found in zip(OF_A_RUN, tool.execute(OF_A_RUN, place), strict=True):
        committed = tool.read(path)
        assert complaints(found) == []
        assert kinds(found) == kinds(committed)
        yield committed, found


STALE = "outputs are not of this program; run: python notebooks/run.py --write"


def test_notebooks_run_on_a_new_quickstart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test, so that the quickstart, of few steps, is made once.

    On the machine that made the committed outputs training gives the same weights, and then the
    digest of all words must come out again; elsewhere outputs must be of the same kinds.
    """
    with tool.small_quickstart():
        for committed, found in executed(tmp_path, capsys):
            said, before = tool.said_of(found), committed.metadata.circuit.small
            if said["best_weights_sha256"] == before["best_weights_sha256"]:
                assert said == before, STALE


@pytest.mark.system
@pytest.mark.parametrize("path", ALONE, ids=[path.stem for path in ALONE])
def test_notebooks_that_train_for_themselves_run(path: Path, tmp_path: Path) -> None:
    place = tmp_path / "notebooks"
    place.mkdir()
    committed, (found,) = tool.read(path), tool.execute([path], place)
    assert complaints(found) == []
    assert kinds(found) == kinds(committed)


@pytest.mark.slow
def test_every_word_comes_out_again_on_the_whole_quickstart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for committed, found in executed(tmp_path, capsys):
        weights = "best_weights_sha256"
        if found.metadata.circuit[weights] == committed.metadata.circuit[weights]:
            assert tool.texts(found) == tool.texts(committed), STALE
