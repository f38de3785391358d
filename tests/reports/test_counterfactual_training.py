"""Edits as words, and what trainings with them say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from circuit.cli.complete import edit
from tiny_run import RUN

from circuit.core.edit import Edit
from circuit.errors import CircuitError
from circuit.reports.counterfactual_training import (
    CounterfactualOptions,
    CounterfactualTraining,
    parse_edit,
)
from circuit.reports.report import run_report
from circuit.runs.opening import open_run
from circuit.trace.replay import ReplayedRun


def test_words_say_edits() -> None:
    word = "mine, drop=a, drop=b, weight=c*0.5, scale=weight_decay*-1e-1, steps=3:5"
    examples = {"a": 0.0, "b": 0.0, "c": 0.5}
    assert parse_edit(word, 0, 9) == ("mine", Edit(3, 5, examples, {"weight_decay": -0.1}))
    assert parse_edit("x,drop=a", 0, 9) == ("x", Edit(0, 9, {"a": 0.0}))


def test_an_edit_is_completed_behind_its_label() -> None:
    assert edit("x") == []
    assert edit("x,") == ["x,drop=", "x,scale=", "x,steps=", "x,weight="]
    assert edit("x,drop=a,scale=weight") == ["x,drop=a,scale=weight_decay*"]


def options(traced: Path, *edits: str, **given: Any) -> CounterfactualOptions:
    return CounterfactualOptions(
        optimizer_trace_dir=traced,
        probe_set=RUN / "analysis/probe_set.jsonl",
        scalars=("loss", "loss,scope=answer"),
        start_step=2,
        end_step=9,
        edits=edits,
        **given,
    )


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (("nothing,drop=a",), "label 'nothing'; expected another label"),
        (("x,drop=a", "x,drop=b"), "label 'x'; expected another label"),
        (("x",), "'x'; expected label"),
        (("x,lose=a",), "'x,lose=a'; expected label"),
        (("x,scale=weight_decay",), r"'weight_decay'; expected NAME\*FACTOR"),
        (("x,drop=a,steps=3",), "steps=3; expected steps=A:B"),
        (("x,drop=a,steps=1:2,steps=3:4",), "steps=1:2,steps=3:4; expected steps=A:B, once"),
        (("x,drop=a,weight=a*0.5",), "'a' twice; expected one factor for each"),
        (("x,scale=weight_decay*2,scale=weight_decay*0",), "'weight_decay' twice"),
    ],
)
def test_words_that_say_nothing_are_refused(edits: tuple[str, ...], said: str) -> None:
    with pytest.raises(CircuitError, match=said):
        options(Path("trace"), *edits)


def test_it_tells_of_every_edit_and_of_none(traced: Path, tmp_path: Path) -> None:
    (step,) = ReplayedRun.open(traced).replay(2, 3)
    edits = (f"less,drop={step.objective.ids[0]}", "no decay,scale=weight_decay*0,steps=8:9")
    result = run_report(
        CounterfactualTraining, open_run(RUN), options(traced, *edits), tmp_path / "out"
    )
    assert result.summary["differing_bits"] == 0
    assert "2 trainings with an edit over steps 2:9" in result.law
    (table,) = result.tables
    changes = {(row["edit"], row["scalar"]): row["change"] for row in table.rows}
    assert len(changes) == 6
    assert all((change == 0) == (edit == "nothing") for (edit, _), change in changes.items())
    assert [row["steps"] for row in table.rows] == ["2:9"] * 4 + ["8:9"] * 2
    with pytest.raises(CircuitError, match="'x' is of steps 1:4; expected steps within 2:9"):
        run_report(
            CounterfactualTraining,
            open_run(RUN),
            options(traced, "x,scale=weight_decay*0,steps=1:4"),
            tmp_path / "other",
        )
