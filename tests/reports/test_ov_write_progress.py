"""ov-write-progress-report: means, deltas and correlations are those of its rows."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from unsound import save_unsound

from circuit import open_run, read_rows
from circuit.artifacts import read_jsonl
from circuit.core.intervals import RecordDraws
from circuit.reports.ov_write_progress import (
    AT_STEP,
    OUTPUTS,
    OvWriteProgress,
    ProgressOptions,
    chance_level,
    pearson,
)
from circuit.reports.report import ReportResult, run_report
from circuit.reports.written import read_report
from circuit.scalars.head_progress import COLUMNS, REDUNDANT
from circuit.tasks.pairs import record_of
from circuit.training.checkpoints import load_checkpoint

RUN = Path("runs/tiny")
CHECKPOINTS = RUN / "checkpoints"
SIX, TWELVE = (CHECKPOINTS / f"step_{step:06d}.pt" for step in (6, 12))
ALL: dict[str, Any] = {
    "checkpoint_dir": CHECKPOINTS,
    "max_pairs_per_type": 8,
    "min_pairs_per_type": 4,
    "splits": ("validation_iid",),
    "top_k_correlations": 5,
}
FEW = {"max_pairs_per_type": 4, "min_pairs_per_type": 4}


def report(output: str, **asked: Any) -> ReportResult:
    options = ProgressOptions(probe_set=RUN / "analysis" / "probe_set.jsonl", **asked)
    return run_report(OvWriteProgress, open_run(RUN), options, output)


@pytest.fixture(scope="module")
def reported_once(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one report over all heads and checkpoints of the tiny run."""
    folder = tmp_path_factory.mktemp("progress")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        report("all", **ALL)
    return folder / "all"


@pytest.fixture
def frames(reported_once: Path) -> dict[str, pd.DataFrame]:
    """Its row files."""
    names = ("rows", "means", "deltas", "correlations")
    return {name: read_rows(reported_once / f"ov_write_progress_{name}.jsonl") for name in names}


@pytest.fixture
def summary(reported_once: Path) -> dict[str, Any]:
    text = (reported_once / "ov_write_progress_report.json").read_text("utf-8")
    return dict(json.loads(text)["summary"])


def test_there_is_a_row_for_every_head_checkpoint_and_pair_with_every_column(
    frames: dict[str, pd.DataFrame],
) -> None:
    rows = frames["rows"]
    heads = ["L0H0", "L0H1", "L1H0", "L1H1"]
    keys = rows[["step", "head"]].drop_duplicates().to_numpy().tolist()
    assert keys == [[step, head] for step in (3, 6, 9, 12) for head in heads]
    assert len(rows) == 4 * 4 * 8
    assert {*COLUMNS, *AT_STEP, "pair_id", "lag"} <= set(rows.columns)
    assert not rows[[*COLUMNS, *AT_STEP]].isna().any(axis=None)


def test_means_and_deltas_are_those_of_the_rows(frames: dict[str, pd.DataFrame]) -> None:
    own = frames["rows"].groupby(["step", "head"])[[*COLUMNS, *AT_STEP]].mean()
    for _, mean in frames["means"].iterrows():
        for name in (*COLUMNS, *AT_STEP):
            assert mean[name] == pytest.approx(own.loc[(mean["step"], mean["head"]), name])
    deltas = frames["deltas"]
    assert [(d["source_step"], d["target_step"]) for _, d in deltas.iterrows()] == [
        pair for pair in ((3, 6), (6, 9), (9, 12)) for _ in range(4)
    ]
    for _, delta in deltas.iterrows():
        after, before = (own.loc[(delta[f"{e}_step"], delta["head"])] for e in ("target", "source"))
        for name in (*COLUMNS, *AT_STEP):
            assert delta[name] == pytest.approx(after[name] - before[name], abs=1e-12)
    # a frozen competitor bounds the moving margin's delta on either side
    moving = deltas["moving_answer_margin"]
    assert (moving <= deltas["fixed_source_competitor_margin"] + 1e-12).all()
    assert (moving >= deltas["fixed_target_competitor_margin"] - 1e-12).all()


def test_correlations_are_scipys_over_the_intervals(
    frames: dict[str, pd.DataFrame], summary: dict[str, Any]
) -> None:
    deltas, correlations = frames["deltas"], frames["correlations"]
    assert len(correlations) == 4 * len(COLUMNS) * len(OUTPUTS)
    for _, row in correlations.iterrows():
        own = deltas[deltas["head"] == row["head"]]
        expected = stats.pearsonr(own[row["write"]], own[row["output"]]).statistic
        assert row["pearson"] == pytest.approx(expected, abs=1e-9)
        assert row["intervals"] == 3
    # the summary lists the largest, without the columns that stand twice
    once = correlations[~correlations["write"].isin(REDUNDANT)]
    largest = once["pearson"].abs().sort_values(ascending=False)[:5].to_list()
    assert [abs(row["pearson"]) for row in summary["top_correlations"]] == largest
    assert summary["correlations"] == len(once)


def test_the_summary_counts_the_pairs_of_each_lag(
    frames: dict[str, pd.DataFrame], summary: dict[str, Any]
) -> None:
    pairs = frames["rows"].drop_duplicates("pair_id")
    counts = {str(lag): count for lag, count in pairs["lag"].value_counts().items()}
    assert summary["pairs_by_lag"] == counts
    assert sum(counts.values()) == summary["pairs"] == 8


def test_winners_are_the_heads_with_the_largest_mean_at_the_last_step(
    frames: dict[str, pd.DataFrame], summary: dict[str, Any], reported_once: Path
) -> None:
    means = frames["means"]
    last = means[means["step"] == 12].set_index("head")
    for name in ("match_winner", "write_winner"):
        winner = summary[name]
        assert last[winner["column"]].idxmax() == winner["head"]
        course = means[means["head"] == winner["head"]].set_index("step")[winner["column"]]
        assert (winner["first_step"], winner["last_step"]) == (course[3], course[12])
        half = (course[3] + course[12]) / 2
        rose = course[course >= half].index[0] if course[12] > course[3] else None
        assert winner["half_way_step"] == rose
    results = read_report(reported_once / "ov_write_progress_report.json").results
    titles = {chart.name: chart.title for chart in OvWriteProgress.charts(results)}
    for name in ("qk_separation", "attention_support", "head_value_margin_dla"):
        assert f"({last[name].idxmax()} most at step 12)" in titles[f"write_{name}"]


@pytest.mark.usefixtures("trained")
def test_chosen_heads_and_checkpoints_are_the_rows_that_all_of_them_have(
    frames: dict[str, pd.DataFrame],
) -> None:
    asked = {**ALL, "checkpoints": (TWELVE, SIX), "heads": ("L1H0",)}
    result = report("some", **asked)
    assert result.summary["steps"] == [6, 12]
    rows, everything = read_rows(result.rows[0]), frames["rows"]
    same = everything[everything["head"].eq("L1H0") & everything["step"].isin([6, 12])]
    numbers = [*COLUMNS, *AT_STEP]
    np.testing.assert_allclose(rows[numbers], same[numbers], rtol=1e-4, atol=1e-5)
    assert rows["pair_id"].to_list() == same["pair_id"].to_list()


@pytest.mark.usefixtures("trained")
def test_one_checkpoint_has_means_and_no_deltas() -> None:
    result = report("once", checkpoints=(SIX,), **FEW)
    assert read_jsonl(Path("once/ov_write_progress_deltas.jsonl")) == []
    correlations = read_jsonl(Path("once/ov_write_progress_correlations.jsonl"))
    assert {row["pearson"] for row in correlations} == {None}
    assert result.summary["top_correlations"] == []
    assert result.summary["chance_level"] is None


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(("broken", "whole"), [(TWELVE, SIX), (SIX, TWELVE)])
def test_a_run_that_diverged_gives_nulls(broken: Path, whole: Path) -> None:
    state = load_checkpoint(broken)
    state.parameters["embed.W_E"][:] = math.nan
    save_unsound(Path(broken.name), state)
    result = report("nan", checkpoints=(whole, Path(broken.name)), **FEW)
    rows = read_jsonl(result.rows[0])
    assert all((row["qk_separation"] is None) == (row["step"] == state.step) for row in rows)
    assert result.summary["match_winner"] is None
    assert result.summary["largest_dla_residual"] < 1e-5
    assert result.law.endswith("at 1 of 2 checkpoints; at the others that is not finite")
    assert all(figure.stat().st_size for figure in result.figures)


def test_pearson_is_numpys_for_every_pair_of_columns() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(6, 2, 3)), generator.normal(size=(6, 4))
    found = pearson(x, y)
    assert found.shape == (2, 3, 4)
    for a, b, c in np.ndindex(2, 3, 4):
        assert found[a, b, c] == pytest.approx(np.corrcoef(x[:, a, b], y[:, c])[0, 1])


def test_pearson_is_nothing_where_nothing_varies() -> None:
    x, y = np.array([[1.0, 0.1], [2.0, 0.1], [4.0, 0.1]]), np.array([[1.0], [3.0], [2.0]])
    x[1, 1] += 1e-17  # rounding is no variance
    found = pearson(x, y)
    assert np.isfinite(found[0, 0])
    assert np.isnan(found[1, 0])
    assert np.isnan(pearson(x[:1], y[:1])).all()


def test_independent_noise_exceeds_the_chance_level_as_rarely_as_it_says() -> None:
    generator, trials, exceeded = np.random.default_rng(2), 400, 0
    level = chance_level(10, 8)
    assert level is not None
    for _ in range(trials):
        noise = generator.normal(size=(8, 11))
        exceeded += bool((np.abs(pearson(noise[:, :1], noise[:, 1:])) > level).any())
    assert 0.02 < exceeded / trials < 0.08
    assert chance_level(10, 2) is None


@pytest.mark.usefixtures("trained")
def test_correlations_are_held_against_those_of_shifted_intervals(reported_once: Path) -> None:
    """Three intervals are too few; the rows of all else stay byte for byte."""
    result = report("out", **ALL, nulls=50)
    for path in result.rows:
        assert path.read_bytes() == (reported_once / path.name).read_bytes(), path.name
    assert result.summary["shifts"] == {"draws": 0, "seed": 17, "largest": None}
    assert any(note.startswith("No shifted intervals") for note in result.notes)


def test_intervals_are_those_of_means_over_whole_records(
    reported_once: Path, summary: dict[str, Any]
) -> None:
    rows = read_jsonl(reported_once / "ov_write_progress_rows.jsonl")
    found = read_jsonl(reported_once / "ov_write_progress_means_intervals.jsonl")
    last = found[-1]
    of_head = [row for row in rows if (row["step"], row["head"]) == (last["step"], last["head"])]
    draws = RecordDraws([record_of(row["pair_id"]) for row in of_head])
    assert draws.records > 2
    values = torch.tensor([[row["qk_separation"]] for row in of_head])
    ((low, high),) = draws.means(values)
    assert (last["qk_separation_low"], last["qk_separation_high"]) == pytest.approx((low, high))
    winner = summary["match_winner"]
    assert winner["last_step_low"] < winner["last_step"] < winner["last_step_high"]
