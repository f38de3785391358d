"""The comparison page: rows of every run beside each other, under names that tell them apart."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuit.artifacts import read_jsonl
from circuit.page import comparison_page
from circuit.page.compare import share_rows

Circuit = Callable[..., tuple[int, str, str]]


def test_each_runs_records_are_its_rows(told: Path, other: Path) -> None:
    result = comparison_page([told, other])
    assert result.path == Path("runs/comparison.html")
    panels = {panel.name: panel for panel in result.panels}
    metrics = [r for r in read_jsonl(told / "metrics.jsonl") if r["kind"] == "evaluation"]
    records = panels["learning"].data["evaluation"]
    for name in ("tiny", "other"):
        own = [r for r in records if r["run"] == name]
        assert [(r["step"], r["split"], r["answer_accuracy"]) for r in own] == [
            (r["step"], r["split"], r["answer_accuracy"]) for r in metrics
        ]
    (rows,) = (told / "analysis").rglob("bilinear_qk_match_separation_rows.jsonl")
    known = {
        (r["step"], r["head"], r["score"], r["lag"], r["separation"]) for r in read_jsonl(rows)
    }
    match = panels["separation"].data["match"]
    assert {(r["step"], r["head"], r["score"], "all", r["separation"]) for r in match} <= known
    assert {r["run"] for r in match} == {"tiny", "other"}


def test_settings_are_those_that_differ(told: Path, other: Path) -> None:
    result = comparison_page([told, other], "page.html")
    rows = result.panels[0].data["settings"]
    assert rows == [
        {"setting": "name", "tiny": "tiny", "other": "other"},
        {"setting": "optimizer.learning_rate", "tiny": 0.01, "other": 0.02},
    ]


def test_shares_are_contributions_over_the_actual_change() -> None:
    window: dict[str, Any] = {
        **{"scalar": "s", "start_step": 0, "end_step": 4, "actual": 2.0},
        "path": {"adam_current_gradient": 1.5, "weight_decay": 0.5, "rounding": 0.0},
        "closure": {"path": 1e-6},
    }
    rows = share_rows("run", window)
    assert [row["share"] for row in rows] == [0.75, 0.25, 0.0]
    assert [row["term"] for row in rows] == [
        "current gradient",
        "weight decay",
        "rounding residual",
    ]
    assert {row["share"] for row in share_rows("run", {**window, "actual": 0.0})} == {None}


def test_shares_add_up_but_for_the_closure(told: Path, other: Path) -> None:
    result = comparison_page([told, other], "page.html")
    rows = result.panels[-1].data["shares"]
    for name in ("tiny", "other"):
        own = [row for row in rows if row["run"] == name]
        assert abs(math.fsum(row["share"] for row in own) - 1) <= own[0]["closure_path"] + 1e-9


def test_a_run_without_reports_gets_the_commands(bare: Path, other: Path, circuit: Circuit) -> None:
    shutil.rmtree(bare / "analysis")
    code, out, _ = circuit("page", "--compare", str(bare), str(other), "--json")
    assert code == 0
    payload = json.loads(out)
    assert payload["panels"]["separation"] == [
        "other: analysis/bilinear_qk_match_separation/bilinear_qk_match_separation_report.json"
    ]
    assert {what.partition(":")[0] for what in payload["missing"]} == {"tiny"}
    assert all("runs/tiny/" in command for command in payload["missing"].values())
    assert any("generate-probe-set" in command for command in payload["missing"].values())


@pytest.mark.parametrize(
    "words", [("runs/tiny",), ("runs/tiny", "runs/tiny"), ("runs/tiny", "nowhere")]
)
def test_bad_choices_give_one_clear_line(
    bare: Path, circuit: Circuit, words: tuple[str, ...]
) -> None:
    code, out, err = circuit("page", "--compare", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not Path("runs/comparison.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_folders(told: Path, other: Path) -> None:
    shutil.copy(told / "run_config.json", other / "run_config.json")
    result = comparison_page([told, other], "page.html")
    assert {r["run"] for r in result.panels[1].data["evaluation"]} == {"tiny", "other"}
