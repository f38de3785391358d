"""The rows of data-influence add up, and its gauges are those of its rows."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from tiny_run import RUN

from circuit.artifacts import Row
from circuit.core.edit import Edit
from circuit.errors import CircuitError
from circuit.reports.data_influence import DataInfluence, DataInfluenceOptions
from circuit.reports.report import ReportResult, run_report
from circuit.reports.written import read_report
from circuit.runs.opening import open_run


def asked(traced: Path, *scalars: str, **options: Any) -> DataInfluenceOptions:
    probe_set = RUN / "analysis/probe_set.jsonl"
    return DataInfluenceOptions(
        optimizer_trace_dir=traced, probe_set=probe_set, scalars=scalars, **options
    )


@pytest.fixture(params=["example", "position"])
def written(request: pytest.FixtureRequest, traced: Path, tmp_path: Path) -> ReportResult:
    options = asked(
        traced,
        "loss",
        "loss,scope=answer",
        by=request.param,
        start_step=1,
        end_step=8,
        check_trainings=3,
        check_share=0.1,
    )
    return run_report(DataInfluence, open_run(RUN), options, tmp_path / "out")


def test_rows_add_up_and_gauges_are_theirs(written: ReportResult) -> None:
    results = read_report(written.report).results
    rows, steps, examples, checks = (
        [*results.rows(f"data_influence_{what}.jsonl")]
        for what in ("rows", "steps", "examples", "checks")
    )
    assert [row["step"] for row in steps if row["rough"]] == [2, 2]
    assert "the steps up to 2 are rough" in written.law
    for one in results.summary["scalars"]:

        def of(rows: list[Row], name: str = one["scalar"]) -> list[Row]:
            return [row for row in rows if row["scalar"] == name]

        sums = {row["example"]: row["share"] for row in of(examples)}
        for name, share in sums.items():
            mine = [row["influence"] for row in of(rows) if row["example"] == name]
            assert math.fsum(mine) == pytest.approx(share)
        assert one["growth"] == max(row["growth"] for row in of(steps))
        predicted, actual = ([row[key] for row in of(checks)] for key in ("predicted", "actual"))
        assert one["spread"] == pytest.approx(stdev(predicted) / stdev(actual))
        apart = math.fsum(predicted) / 3 - math.fsum(actual) / 3
        assert one["offset"] == pytest.approx(apart / stdev(actual))
        assert len(of(checks)) == 3


def test_what_takes_long_is_told_before_it_begins(traced: Path, tmp_path: Path) -> None:
    options = asked(traced, "loss", start_step=4, end_step=6, check_trainings=2)
    told: list[tuple[int, str]] = []
    run_report(
        DataInfluence,
        open_run(RUN),
        options,
        tmp_path / "out",
        progress=lambda done, _, note: told.append((done, note)) if note else None,
    )
    (examples,) = {note.split()[-2] for _, note in told if note.startswith("training")}
    assert told == [
        (0, "building the scalars"),
        *((1 + n, f"training {n} of 2 without 1 of {examples} examples") for n in (1, 2)),
    ]


def test_without_trainings_the_law_says_so(traced: Path, tmp_path: Path) -> None:
    options = asked(traced, "loss", start_step=4, end_step=6)
    result = run_report(DataInfluence, open_run(RUN), options, tmp_path / "out")
    assert "not held against trainings" in result.law
    assert "rough" not in result.law
    (one,) = result.summary["scalars"]
    assert (one["spread"], one["correlation"], one["offset"]) == (None, None, None)


def test_a_training_with_an_edit_is_held_against_none(traced: Path, tmp_path: Path) -> None:
    """Refused before its steps are walked."""
    options = asked(traced, "loss", check_trainings=3)
    config = open_run(RUN).config.replace(edit=Edit(3, 4))
    with pytest.raises(CircuitError, match="no training leaves one that has an edit itself"):
        run_report(DataInfluence, config, options, tmp_path / "out")
