"""The formation page: its numbers are the rows', it needs nothing else, it asks for the rest."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from circuit.cli.app import app

from circuit.artifacts import read_jsonl
from circuit.config import digest_of
from circuit.page import comparison_page, formation_page
from circuit.page.html import _script_json
from circuit.page.panel import thinned
from circuit.page.reports import Reports
from circuit.reports.report import all_reports, run_report
from circuit.reports.weight_svd_trace import WeightSvdTrace
from circuit.reports.written import read_report
from circuit.runs.checkpointed import open_folder
from circuit.runs.opening import open_run

RUN = Path("runs/tiny")
Page = Any
"""See the conftest: `text`, `payload` and `records(panel, data)`."""
Circuit = Callable[..., tuple[int, str, str]]


LOOKUP = "symbolic_kv_stream"
PLACED = [
    kind for kind in all_reports() if kind.place and (kind.asked_of or kind.task) in ("", LOOKUP)
]
"""Reports that the page of a lookup run asks for."""


def key(record: dict[str, Any], columns: Iterable[str]) -> str:
    return json.dumps([record[column] for column in columns])


@pytest.mark.parametrize("kind", PLACED)
def test_a_panel_is_what_the_report_shows(told_once: Path, page: Page, kind: Any) -> None:
    """Charts, tables and notes of a report are those that it makes of its own files."""
    (path,) = (told_once / RUN / "analysis").rglob(f"{kind.stem()}_report.json")
    results = read_report(path).results
    panel = page.payload["panels"][kind.stem()]
    for drawn in kind.charts(results):
        for name, records in drawn.data.items():
            assert page.records(kind.stem(), name) == [dict(record) for record in records], name
    assert [chart["title"] for chart in panel["charts"]] == [c.title for c in kind.charts(results)]
    for place, table in enumerate(kind.tables(results)):
        records = page.records(kind.stem(), f"table_{place}")
        assert [key(r, table.columns) for r in records] == [
            key(r, table.columns) for r in table.rows
        ]
        columns = list(zip(table.columns, table.headings, strict=True))
        assert [tuple(pair) for pair in panel["tables"][place]["columns"]] == columns
    for note in kind.notes(results):
        assert html.escape(note.replace("**", "").replace("`", ""), quote=False) in html.escape(
            html.unescape(page.text), quote=False
        )


def test_what_there_is_to_see_comes_first(told: Path) -> None:
    """And a question is not asked for beside a panel that answers it."""
    weight_svd = told / "analysis/weight_svd_trace"
    moved = weight_svd.rename(told / "elsewhere")
    try:
        panels = formation_page(told, "page.html", overwrite=True).panels
    finally:
        moved.rename(weight_svd)
    seen = [bool(panel.sources or panel.example) for panel in panels]
    assert seen == sorted(seen, reverse=True)
    assert not all(seen)
    titles = {panel.title for panel, there in zip(panels, seen, strict=True) if there}
    assert not titles & {p.title for p, there in zip(panels, seen, strict=True) if not there}


def test_learning_and_lag_are_the_metrics(told_once: Path, page: Page) -> None:
    rows = read_jsonl(told_once / RUN / "metrics.jsonl")
    evaluated = [row for row in rows if row["kind"] == "evaluation"]
    for panel, data in (("learning", "evaluation"), ("lag", "whole")):
        records = page.records(panel, data)
        assert [key(row, records[0]) for row in evaluated] == [key(r, r) for r in records]
    varying = [
        by
        for by in evaluated[0]["by_slice"]
        if any(len(row["by_slice"][by]) > 1 for row in evaluated)
    ]
    assert {"lag", "writes_before"} <= set(varying)
    for by in varying:
        assert page.records(by, by) == [
            {"step": row["step"], "split": row["split"], by: value, **found}
            for row in evaluated
            for value, found in row["by_slice"][by].items()
        ]
    trained = [row for row in rows if row["kind"] == "train"]
    records = page.records("learning", "training")
    assert [key(row, records[0]) for row in trained] == [key(r, r) for r in records]


def test_the_examples_attention_is_the_models(
    told: Path, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = page.payload["panels"]["example"]["example"]
    run = open_run(told)
    split = run.batch("validation_iid")
    row = split.sample_ids.index(example["sample_id"])
    assert [run.vocabulary.tokens[t] for t in split.tokens[row]][
        : len(example["tokens"])
    ] == example["tokens"]
    assert example["steps"] == run.steps
    for step, of_step, said in zip(
        example["steps"], example["attention"], example["predictions"], strict=True
    ):
        logits, cache = run.model(step).run_with_cache(split.tokens[row : row + 1, :-1])
        for head, of_head in zip(example["heads"], of_step, strict=True):
            layer, number = int(head[1]), int(head[3])
            for read, weights in zip(example["reads"], of_head, strict=True):
                at = read["position"]
                real = cache["pattern", layer][0, number, at, : at + 1]
                assert torch.allclose(torch.tensor(weights), real, atol=6e-5)
        for read, told_so in zip(example["reads"], said, strict=True):
            best = int(logits[0, read["position"]].argmax())
            assert run.vocabulary.tokens[best] == told_so["token"]
            assert example["tokens"][read["position"] + 1] == read["answer"]
            assert example["tokens"][read["support"]] == read["answer"]
            assert list(read["slices"]) == list(split.task.slices)


def test_the_page_holds_everything_that_it_needs(page: Page) -> None:
    style, *scripts = re.findall(
        r"<(?:style|script)[^>]*>(.*?)</(?:style|script)>", page.text, re.S
    )
    assert len(scripts) == 3
    markup = re.sub(r"<(style|script).*?</\1>", "", page.text, flags=re.S)
    assert "://" not in markup + style + scripts[0] + scripts[2]
    links = re.findall(r"(?:src|href|action)=\"([^\"]*)\"", page.text.replace(scripts[1], ""))
    assert {link for link in links if not link.startswith("#")} == {"data:,"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", style + scripts[2])
    assert len(page.text.encode()) < 5e6


def test_a_bare_run_shows_the_commands_that_complete_it(bare: Path, told_once: Path) -> None:
    asked = formation_page(bare)
    placed = {kind.stem() for kind in PLACED}
    assert {panel.name for panel in asked.panels if panel.missing} == placed
    (example,) = (panel.example for panel in asked.panels if panel.example)
    supports = [read["support"] for read in example["reads"]]
    looks = {
        head: sum(row[at] for row, at in zip(of_head, supports, strict=True))
        for head, of_head in zip(example["heads"], example["attention"][-1], strict=True)
    }
    assert looks[example["winner"]] == max(looks.values())
    text = asked.path.read_text(encoding="utf-8")
    for missing in asked.missing:
        assert missing.command in text
    whole = formation_page(told_once / RUN, bare / "whole.html")  # the fixture typed them all
    assert whole.missing == []
    assert all(panel.charts or panel.example for panel in whole.panels)


def test_every_command_of_the_page_is_one_that_the_program_takes(told: Path, other: Path) -> None:
    run = told.rename(told.with_name("it's my run"))
    results = formation_page(run, "page.html"), comparison_page([run, other], "compared.html")
    panels = [panel for result in results for panel in result.panels]
    commands = [source.command for panel in panels for source in panel.sources]
    assert len(commands) >= 9
    for command in commands:
        name, subcommand, *words = shlex.split(command)
        assert name == "circuit"
        group = typer.main.get_command(app)
        found = group.commands[subcommand]  # type: ignore[attr-defined]
        found.make_context(subcommand, list(words))  # parses, and refuses what it does not know


def test_a_report_that_cannot_be_read_is_replaced(told: Path, circuit: Circuit) -> None:
    (path,) = (told / "analysis").rglob("weight_svd_trace_report.json")
    payload = json.loads(path.read_text())
    del payload["digest"]
    payload["parameters"]["option_of_another_version"] = 1
    path.write_text(json.dumps({**payload, "digest": digest_of(payload)}))
    manifest = path.with_name("weight-svd-trace.manifest.json")
    claimed = json.loads(manifest.read_text())  # of that version, too, it tells names alone
    manifest.write_text(json.dumps({name: claimed[name] for name in ("command", "files")}))
    (missing,) = formation_page(told, "page.html").missing
    assert circuit(*shlex.split(missing.command)[1:])[0] == 0
    assert formation_page(told, "page.html", overwrite=True).missing == []


def command_of_svd(run: Path) -> str:
    """The line that makes the run's SVD again, as its page has it."""
    reports = Reports(open_folder(run))
    (report,) = reports.by_command["weight-svd-trace"]
    return reports.source(report).command


@pytest.mark.parametrize(
    "texts", [["name=other name"], ["log_every=2", 'tracked_splits=["validation_iid"]']]
)
@pytest.mark.parametrize("config", [RUN / "run_config.json", Path("tiny.json")])
def test_a_command_repeats_what_was_set(
    told: Path, circuit: Circuit, config: Path, texts: list[str]
) -> None:
    file = "weight_svd_trace_report.json"
    (path,) = (told / "analysis").rglob(file)

    def provenance() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text())["provenance"]
        return {name: found[name] for name in ("config_digest", "overrides")}

    words = shlex.split(command_of_svd(told))[1:]
    assert "--set" not in words
    words[words.index("--config") + 1] = str(config)
    given = [word for text in texts for word in ("--set", text)]
    assert circuit(*words, *given)[0] == 0
    made = provenance()
    assert circuit(*shlex.split(command_of_svd(told))[1:])[0] == 0
    assert provenance() == made


def test_a_command_leaves_out_what_the_runs_own_config_says(told: Path, circuit: Circuit) -> None:
    config = told / "run_config.json"
    of_run = {"config": "gone.json", "set": ["seed=11"]}
    config.write_text(json.dumps({**json.loads(config.read_text()), "overrides": of_run}))
    command = command_of_svd(told)
    assert circuit(*shlex.split(command)[1:])[0] == 0
    (path,) = (told / "analysis").rglob("weight_svd_trace_report.json")
    assert json.loads(path.read_text())["provenance"]["overrides"] == of_run
    assert command_of_svd(told) == command


def test_equal_inputs_give_equal_pages(told: Path) -> None:
    first = formation_page(told, "one.html").path.read_bytes()
    assert formation_page(told.resolve(), "two.html").path.read_bytes() == first


def test_a_page_is_replaced_only_when_asked(bare: Path, circuit: Circuit) -> None:
    assert circuit("page", str(bare))[0] == 0
    code, _, err = circuit("page", str(bare))
    assert code == 2
    assert "--overwrite" in err
    assert circuit("page", str(bare), "--overwrite")[0] == 0
    Path("mine.html").write_text("mine")
    code, _, err = circuit("page", str(bare), "--output", "mine.html", "--overwrite")
    assert code == 2
    assert Path("mine.html").read_text() == "mine"
    assert err.count("\n") == 1


def test_json_names_the_page_and_what_is_missing(bare: Path, circuit: Circuit) -> None:
    _, out, _ = circuit("page", str(bare), "--json")
    payload = json.loads(out)
    assert payload["paths"] == [str(bare / "formation.html")]
    assert payload["bytes"] == (bare / "formation.html").stat().st_size
    assert any("weight-svd-trace" in command for command in payload["missing"].values())


@pytest.mark.parametrize("words", [("nowhere",), ("data/tiny",), ("runs/tiny", "runs/tiny")])
def test_a_bad_run_gives_one_clear_line(
    bare: Path, circuit: Circuit, words: tuple[str, ...]
) -> None:
    code, out, err = circuit("page", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "run" in err
    assert not list(Path().rglob("formation.html"))


def test_a_damaged_report_or_row_is_named(told: Path, circuit: Circuit) -> None:
    (report,) = (told / "analysis").rglob("weight_svd_trace_report.json")
    kept = report.read_text()
    report.write_text("{}")
    code, _, err = circuit("page", str(told), "--output", "page.html")
    assert code == 2
    assert report.name in err
    report.unlink()
    report.mkdir()
    code, _, err = circuit("page", str(told), "--output", "page.html")
    assert (code, f"{report}: is a folder" in err) == (2, True), err
    report.rmdir()
    report.write_text(kept)
    rows = report.with_name("weight_svd_trace_rows.jsonl")
    rows.write_text(rows.read_text().replace('"step": 6', '"step": 7', 1))
    code, _, err = circuit("page", str(told), "--output", "page.html")
    assert code == 2
    assert "weight_svd_trace_rows.jsonl" in err


@pytest.mark.parametrize("left", ["", "[" * 100, "half", "all but one", "torn", "loop", "gone"])
def test_rows_that_the_last_checkpoint_has_counted_and_that_are_gone_are_told(
    other: Path, circuit: Circuit, left: str
) -> None:
    """Each row has a digest, and the checkpoint the number of rows: what is cut off is noticed."""
    metrics = other / "metrics.jsonl"
    whole = metrics.read_text()
    lines = whole.splitlines(keepends=True)
    cut = {"half": lines[:9], "all but one": lines[:-1], "torn": [whole[:-9]]}
    metrics.unlink()
    if left == "loop":
        metrics.symlink_to(metrics.name)
    elif left != "gone":
        metrics.write_text("".join(cut.get(left, [left])))
    for words in (
        ("page", str(other), "--output", "page.html"),
        ("page", "--compare", str(RUN), str(other), "--output", "page.html"),
        ("study", "compare-optimizers", "--run", str(RUN), "--run", str(other)),
    ):
        code, _, err = circuit(*words, *(() if words[0] == "page" else ("--output-dir", "out")))
        assert (code, err.count("\n")) == (2, 1), (words, err)
        assert str(metrics) in err, err
        assert not Path("page.html").exists()


def test_a_missing_benchmark_is_asked_for(bare: Path) -> None:
    Path("data").rename("elsewhere")
    result = formation_page(bare)
    (example,) = (panel for panel in result.panels if panel.name == "example")
    assert "generate-benchmark" in example.missing[0].command


def test_the_most_complete_report_is_shown_then_the_newest(told: Path) -> None:
    kind = WeightSvdTrace
    (whole,) = (told / "analysis").rglob("weight_svd_trace_report.json")
    options = read_report(whole).results.options
    less = options.model_copy(update={"checkpoints": options.checkpoints[:2]})
    for name, asked in (("less", less), ("newer", options), ("least", less)):
        run_report(kind, open_folder(told), asked, told / "analysis" / name)
    shown = Reports(open_folder(told)).shown(kind)
    assert [report.path.parent.name for report in shown] == ["newer"]


def test_reports_of_one_kind_are_told_apart(told: Path) -> None:
    file = "bilinear_qk_rank_adam_state_attribution_report.json"
    (path,) = (told / "analysis").rglob(file)
    shutil.copytree(path.parent, told / "analysis/again")
    payload = json.loads(path.read_text())
    del payload["digest"]
    payload["parameters"]["windows"] = ["0:1"]  # of equal options the newest alone is drawn
    (told / "analysis/again" / file).write_text(
        json.dumps({**payload, "digest": digest_of(payload)})
    )
    headings = [panel.heading for panel in formation_page(told, "page.html").panels]
    assert len(set(headings)) == len(headings)
    assert [": again, steps " in heading for heading in headings].count(True) == 1


def test_no_text_ends_the_data_element() -> None:
    text = _script_json({"a": "</script><!--"})
    assert "<" not in text
    assert json.loads(text) == {"a": "</script><!--"}


def test_thinning_keeps_both_ends() -> None:
    steps = list(range(0, 1001, 7))
    for most in (2, 3, 40, 500):
        few = thinned(steps, most)
        assert len(few) == min(most, len(steps))
        assert (few[0], few[-1]) == (steps[0], steps[-1])
        assert few == sorted(set(few))
