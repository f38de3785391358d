"""docs/tasks.md end to end: its task is trained, traced, verified, attributed and drawn."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from command_line import type_and_read, type_in

from circuit.artifacts import read_jsonl
from circuit.errors import CircuitError
from circuit.runs.opening import open_run
from circuit.tasks.benchmark import load_benchmark
from circuit.tasks.pairs import build_pairs

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
BLOCKS = dict(re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
STEPS = 60
"""Instead of the page's, of small batches: as many as its attribution looks at."""
RUN = Path("artifacts/runs/sorting")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's two files lie, and where its commands have run."""
    folder = tmp_path_factory.mktemp("sorting")
    (folder / "sorting.py").write_text(BLOCKS["python"], encoding="utf-8")
    config = json.loads(BLOCKS["json"]) | {"steps": STEPS, "checkpoint_every": 20, "batch_size": 8}
    (folder / "sorting.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in BLOCKS["sh"].splitlines():
            assert type_in(shlex.split(line)[1:]) == 0, line
    return folder


def test_the_pages_commands_give_what_they_say(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    trace = open_run(RUN / "analysis/optimizer_update_trace")
    assert [trace.steps[0], trace.steps[-1]] == [0, STEPS]
    report = json.loads(next((RUN / "analysis/attribution").glob("*_report.json")).read_text())
    (window,) = report["summary"]["windows"]
    assert window["closure"]["path"] < 1e-3
    rows = read_jsonl(RUN / "analysis/separation/bilinear_qk_match_separation_rows.jsonl")
    assert {row["place"] for row in rows} == {"all", "0", "1", "2", "3"}
    page = (RUN / "formation.html").read_text(encoding="utf-8")
    assert "Accuracy by place" in page
    done = type_and_read(["page", str(RUN), "--overwrite"], capsys)
    asked = [line.split() for line in done.out.splitlines() if line.startswith("  circuit ")]
    assert asked
    assert not any("embedding_value_identity" in words for words in asked)
    for words in asked:  # what the page asks for can be typed as it stands
        assert type_in(words[1:]) == 0, words


def test_pairs_change_one_number_and_its_place_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    task = load_benchmark("data/generated/sorting").task
    records = load_benchmark("data/generated/sorting").records("test")
    pairs = build_pairs(task, records, max_per_type=50).pairs
    assert len(pairs) == 50
    for pair in pairs:
        differing = [
            (old, new)
            for old, new in zip(pair.clean.tokens, pair.corrupted.tokens, strict=True)
            if old != new
        ]
        assert differing == [pair.transfer_tokens] * 2


def test_an_edited_task_is_refused_by_whoever_reads_the_benchmark(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    source = Path("sorting.py")
    kept = source.read_text()
    try:
        source.write_text(kept + "\nimport pathlib\n\npathlib.Path('executed').touch()\n")
        done = type_and_read(
            ["evaluate", "--config", str(RUN), "--checkpoint", str(RUN / "checkpoints/best.pt")],
            capsys,
        )
    finally:
        source.write_text(kept)
    assert done.code == 2
    assert "the task's file is not the one that the benchmark was drawn with" in done.err
    assert not Path("executed").exists()  # no other code than the one that it was drawn with
    assert len(done.err.strip().splitlines()) == 1


def test_a_task_option_does_not_take_another_tasks_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    from circuit.tasks.benchmark import ensure_benchmark

    before = {p: p.read_bytes() for p in Path("data").rglob("*") if p.is_file()}
    with pytest.raises(CircuitError, match=r"holds a benchmark of the task 'sorting.py:Sorting'"):
        ensure_benchmark("induction", Path("data/generated/sorting"))
    with pytest.raises(CircuitError, match=r"without a default: .*generate-benchmark --config"):
        ensure_benchmark("induction", Path("data/generated/none"))
    ensure_benchmark("sorting.py:Sorting", Path("data/generated/sorting"))
    assert before == {p: p.read_bytes() for p in Path("data").rglob("*") if p.is_file()}
