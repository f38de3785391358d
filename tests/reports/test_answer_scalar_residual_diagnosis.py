"""answer-scalar-residual-diagnosis: parts add up, changes add, rows are what they say."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from circuit.artifacts import read_jsonl
from circuit.attribution import line
from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.reports.answer_scalar_residual_diagnosis import (
    PAIR_ROWS,
    AnswerScalarDiagnosis,
    DiagnosisOptions,
)
from circuit.reports.inputs import open_inputs
from circuit.reports.report import ReportResult, run_report
from circuit.reports.written import read_report
from circuit.scalars.answers import ANSWER_SCALARS, FIXED_SOURCE, FIXED_TARGET, MOVING
from circuit.schemas import SIDES, SWITCH_BUCKETS, ScalarPairRow, find_checkpoint, read_typed_rows
from circuit.tasks.symbolic_kv.stream import program_of
from circuit.train_config import TrainConfig

RUN = Path("runs/tiny")
PROBE = RUN / "analysis" / "probe_set.jsonl"
CHECKPOINTS = RUN / "checkpoints"
INTERVALS = [(3, 6), (6, 9), (9, 12)]
OPTIONS = DiagnosisOptions(
    probe_set=PROBE,
    checkpoint_dir=CHECKPOINTS,
    pair_types=("support_value", "query_key"),
    max_pairs_per_type=7,
    min_pairs_per_type=3,
    top_k_wrong=4,
)
Rows = list[ScalarPairRow]


def diagnose(folder: Path, **changes: Any) -> ReportResult:
    config = load_config(RUN / "run_config.json", TrainConfig)
    options = DiagnosisOptions(**{**dict(OPTIONS), **changes})
    return run_report(AnswerScalarDiagnosis, config, options, folder)


@pytest.fixture(scope="module")
def report(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report over every checkpoint: its result, rows and pair rows."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained_once)
        result = diagnose(folder)
    pair_rows = read_typed_rows(folder / PAIR_ROWS, ScalarPairRow)
    return {"result": result, "rows": read_jsonl(result.rows[0]), "pair_rows": pair_rows}


@pytest.fixture(scope="module")
def pair_rows(report: dict[str, Any]) -> Rows:
    found: Rows = report["pair_rows"]
    return found


def by_pair(rows: Rows) -> dict[tuple[str, str], Rows]:
    """The intervals of each pair and side, in time."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        found.setdefault((row.pair_id, row.margin_side), []).append(row)
    return found


def test_every_interval_pair_and_side_has_one_row(pair_rows: Rows) -> None:
    chains = by_pair(pair_rows)
    assert {side for _, side in chains} == set(SIDES)
    assert len(chains) == 2 * len({pair for pair, _ in chains})
    for rows in chains.values():
        assert [(r.source_step, r.target_step) for r in rows] == INTERVALS


@pytest.mark.parametrize("name", [MOVING, "correct_value_logit", "negative_answer_loss"])
def test_changes_add_over_intervals(pair_rows: Rows, name: str) -> None:
    for rows in by_pair(pair_rows).values():
        total = rows[-1].target_values[name] - rows[0].source_values[name]
        assert sum(row.deltas[name] for row in rows) == pytest.approx(total, abs=1e-12)
        assert abs(total) > 0
        for one, following in pairwise(rows):
            assert one.target_values[name] == following.source_values[name]
            assert one.target_competitor == following.source_competitor
            assert one.target_digest == following.source_digest


def test_the_parts_sum_to_the_change(pair_rows: Rows, report: dict[str, Any]) -> None:
    for name in ANSWER_SCALARS:
        for chosen in INTERVALS:
            rows = [row for row in pair_rows if (row.source_step, row.target_step) == chosen]
            missed = [
                row.deltas[name] - row.first_order[name] - row.curvature[name] - row.switch[name]
                for row in rows
            ]
            size = sum(abs(row.deltas[name]) for row in rows)
            assert sum(map(abs, missed)) < 0.02 * size
    lines = report["result"].summary["line_integral"]
    assert all(entry["closed"] and entry["gap"] <= 0.01 for entry in lines)


def test_the_moving_margin_splits_exactly_and_only_it_switches(pair_rows: Rows) -> None:
    assert {row.switched for row in pair_rows} == {True, False}
    for row in pair_rows:
        split = row.deltas[FIXED_SOURCE] + row.switch[MOVING]
        assert row.deltas[MOVING] == pytest.approx(split, abs=1e-13)
        assert (row.switch[MOVING] < 0) == row.switched
        assert row.switch[MOVING] <= 0
        assert not any(row.switch[name] for name in ANSWER_SCALARS if name != MOVING)
        if not row.switched:
            for values in (row.source_values, row.target_values, row.deltas, row.first_order):
                assert values[FIXED_SOURCE] == values[FIXED_TARGET]


def test_values_and_checkpoints_are_those_of_the_models(
    pair_rows: Rows, trained_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained_once)
    study = open_inputs(load_config(RUN / "run_config.json", TrainConfig), PROBE)
    pairs = {p.pair_id: p for p in study.pairs(OPTIONS)}
    values = study.vocabulary.value_ids
    for row in pair_rows[::9]:
        path = find_checkpoint(row.target_checkpoint, RUN, PROBE)
        (point,) = study.models([path])
        assert (point.step, point.digest) == (row.target_step, row.target_digest)
        record = pairs[row.pair_id].side(row.margin_side)
        read = program_of(
            record, study.vocabulary, through_read=pairs[row.pair_id].read_index
        ).reads[pairs[row.pair_id].read_index]
        with torch.no_grad():
            logits = point.model(torch.tensor([record.tokens]))[0, read.key_pos].double()
        wrong = {token: float(logits[token]) for token in values if token != read.answer}
        best = sorted(wrong, key=wrong.__getitem__)[::-1][:4]
        assert row.answer == read.answer
        assert row.target_competitor == best[0]
        assert [entry.token for entry in row.target_top_wrong] == best
        right, found = float(logits[read.answer]), row.target_values
        assert found["correct_value_logit"] == pytest.approx(right, abs=1e-5)
        assert found[MOVING] == pytest.approx(right - wrong[best[0]], abs=1e-5)
        assert found[FIXED_SOURCE] == pytest.approx(right - wrong[row.source_competitor], abs=1e-5)
        loss = float(logits.logsumexp(0)) - right
        assert found["negative_answer_loss"] == pytest.approx(-loss, abs=1e-5)


def test_the_rows_are_means_of_the_pair_rows(pair_rows: Rows, report: dict[str, Any]) -> None:
    for row in report["rows"]:
        own = [
            pair
            for pair in pair_rows
            if (pair.source_step, pair.target_step) == (row["source_step"], row["target_step"])
            and row["margin_side"] in (pair.margin_side, "all")
            and row["pair_type"] in (pair.pair_type, "all")
            and pair.in_bucket(row["switch_bucket"])
        ]
        assert row["pairs"] == len(own)
        columns = {"delta": "deltas", "source": "source_values", "switch": "switch"}
        for part, column in {**columns, "curvature": "curvature"}.items():
            values = [getattr(pair, column)[row["scalar"]] for pair in own]
            mean = sum(values) / len(own) if own else None
            assert row[f"mean_{part}"] == (None if mean is None else pytest.approx(mean))
    assert {row["switch_bucket"] for row in report["rows"]} == set(SWITCH_BUCKETS)


@pytest.mark.usefixtures("trained")
def test_an_integral_that_does_not_close_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "TOLERANCE", 1e-12)
    monkeypatch.setattr(line, "MOST_INTERVALS", 4)
    one = {"margin_sides": ("clean",), "scalars": (MOVING,), "pair_types": ("support_value",)}
    result = diagnose(Path("report"), **one)
    assert "3 of 3 line integrals do NOT close" in result.law
    (scalars,) = {tuple(row.deltas) for row in read_typed_rows(result.rows[1], ScalarPairRow)}
    assert scalars == (MOVING,)


@pytest.mark.usefixtures("trained")
def test_no_more_wrong_values_than_there_are() -> None:
    with pytest.raises(CircuitError, match="`top_k_wrong`: 32; expected 1 to 31"):
        diagnose(Path("report"), top_k_wrong=32)


def test_charts_draw_every_interval_and_pair(report: dict[str, Any], pair_rows: Rows) -> None:
    written = read_report(report["result"].report)
    course, parts, pairs = AnswerScalarDiagnosis.charts(written.results)
    assert [row["step"] for row in course.data["answer_course"]] == [6, 9, 12]
    assert {row["scalar"] for row in parts.data["answer_parts"]} == set(ANSWER_SCALARS)
    assert len(pairs.data["answer_pairs"]) == len(pair_rows)
