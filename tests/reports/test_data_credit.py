"""The rows of data-credit add up to its summary, by example, step, fact and position."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_run import RUN

from circuit.artifacts import Row
from circuit.attribution.losses import By
from circuit.errors import CircuitError
from circuit.reports.data_credit import DataCredit, DataCreditOptions
from circuit.reports.report import ReportResult, run_report
from circuit.reports.written import read_report
from circuit.runs.opening import open_run

FILES = ("data_credit_rows.jsonl", "data_credit_steps.jsonl", "data_credit_examples.jsonl")


@pytest.fixture(params=["example", "position"])
def written(request: pytest.FixtureRequest, traced: Path, tmp_path: Path) -> ReportResult:
    options = DataCreditOptions(
        optimizer_trace_dir=traced,
        probe_set=RUN / "analysis/probe_set.jsonl",
        scalars=("loss", "loss,scope=answer"),
        by=request.param,
        start_step=2,
        end_step=9,
    )
    return run_report(DataCredit, open_run(RUN), options, tmp_path / "out")


def test_rows_add_up(written: ReportResult) -> None:
    results = read_report(written.report).results
    rows, steps, examples = ([*results.rows(file)] for file in FILES)
    batch = open_run(RUN).config.batch_size
    assert [row["step"] for row in rows] == [s for s in range(3, 10) for _ in range(2 * batch)]
    for one in results.summary["scalars"]:

        def of(rows: list[Row], name: str = one["scalar"]) -> list[Row]:
            return [row for row in rows if row["scalar"] == name]

        credit = pytest.approx(one["credit"])
        assert math.fsum(row["credit"] for row in of(rows)) == credit
        assert math.fsum(row["share"] for row in of(examples)) == credit
        assert math.fsum(row["positive"] + row["negative"] for row in of(steps)) == credit
        assert sum(row["times"] for row in of(examples)) == 7 * batch
        assert one["top"][0]["share"] == max(row["share"] for row in of(examples))
        parts = math.fsum(one[part] for part in ("credit", "inherited", "decay", "rounding"))
        assert abs(parts - one["actual"]) == pytest.approx(one["closure"] * abs(one["actual"]))
        assert one["closure"] < 1e-3
        facts = {fact: math.fsum(values.values()) for fact, values in one["facts"].items()}
        assert {"lag", "asked", "answer"} <= facts.keys()
        if results.options.by == "example":
            assert list(facts.values()) == [credit] * len(facts)
            continue
        assert facts.pop("predicted") == credit
        assert "other" not in one["facts"]["predicted"]
        answers = one["facts"]["predicted"]["answer"]
        assert list(facts.values()) == [pytest.approx(answers)] * len(facts)
        for row in of(rows):
            assert math.fsum(row["positions"]) == pytest.approx(row["credit"], abs=1e-12)


def test_the_tokens_of_the_ends_are_those_of_the_records(written: ReportResult) -> None:
    run = open_run(RUN)
    split = run.setup.benchmark.records(run.config.train_split)
    decode = run.setup.benchmark.vocabulary.decode
    texts = {one.sample_id: decode(one.tokens) for one in split}
    for one in written.summary["scalars"]:
        for row in (*one["top"], *one["bottom"]):
            assert row["text"] == texts[row["example"]]


@pytest.mark.parametrize("by", ["example", "position"])
def test_shards_are_the_whole_number_for_number(traced: Path, tmp_path: Path, by: By) -> None:
    """Three shards, the last one first, and one pass: equal row files and summaries."""

    def made(name: str, start: int, end: int, **changes: Any) -> ReportResult:
        options = DataCreditOptions(
            optimizer_trace_dir=traced,
            probe_set=RUN / "analysis/probe_set.jsonl",
            scalars=("loss", "loss,scope=answer"),
            by=by,
            start_step=start,
            end_step=end,
            **changes,
        )
        return run_report(DataCredit, open_run(RUN), options, tmp_path / name)

    whole = made("whole", 2, 9)
    last = made("last", 7, 9, shard=True)
    middle = made("middle", 4, 7, shard=True, behind=last.report.parent)
    first = made("first", 2, 4, behind=middle.report.parent)
    for file in FILES:
        assert (first.report.parent / file).read_bytes() == (
            whole.report.parent / file
        ).read_bytes()
    assert first.summary == whole.summary
    assert first.law == whole.law
    refused: list[tuple[dict[str, Any], str]] = [
        ({"behind": whole.report.parent}, "with `shard`"),
        ({"behind": last.report.parent}, "begins at 4"),
        ({"behind": middle.report.parent, "path": "midpoint"}, "differ in path"),
    ]
    for changes, words in refused:
        with pytest.raises(CircuitError, match=words):
            made("refused", 2, 4, **changes)
