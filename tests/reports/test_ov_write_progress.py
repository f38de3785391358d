"""ov-write-progress-report: means, deltas and correlations are those of its rows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from circuit import open_run, read_rows
from circuit.artifacts import read_jsonl
from circuit.errors import CircuitError
from circuit.figures.progress import heads_over_steps
from circuit.reports.base import ReportResult
from circuit.reports.correlation import chance_level, pearson
from circuit.reports.inputs import PairOptions
from circuit.reports.ov_write_progress import (
    AT_STEP,
    OUTPUTS,
    ProgressOptions,
    ov_write_progress,
)
from circuit.scalars.head_progress import COLUMNS, REDUNDANT
from circuit.training.checkpoints import load_checkpoint, save_checkpoint

RUN = Path("runs/tiny")
PROBE = RUN / "analysis" / "probe_set.jsonl"
CHECKPOINTS = RUN / "checkpoints"
OUTPUT = RUN / "analysis" / "ov_write_progress" / "all"
COMMAND = [
    *("ov-write-progress-report", "--config", str(RUN / "run_config.json")),
    *("--probe-set", str(PROBE), "--checkpoint-dir", str(CHECKPOINTS)),
    *("--output-dir", str(OUTPUT), "--device", "cpu", "--split", "validation_iid"),
    *("--pair-type", "support_value", "--max-pairs-per-type", "8", "--min-pairs-per-type", "4"),
    *("--score-query-role", "prediction", "--support-key-role", "support_value"),
    *("--distractor-key-role", "value_distractors", "--record-side", "clean"),
    *("--top-k-correlations", "5"),
]
FEW = ProgressOptions(pairs=PairOptions(max_per_type=4, min_per_type=4))
ALL = ProgressOptions(
    pairs=PairOptions(max_per_type=8, min_per_type=4),
    splits=("validation_iid",),
    top_k_correlations=5,
)
Type = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def reported_once(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one report over all heads and checkpoints of the tiny run."""
    folder = tmp_path_factory.mktemp("progress")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _report(sorted(CHECKPOINTS.glob("step_*.pt")), OUTPUT, ALL)
    return folder / OUTPUT


@pytest.fixture
def desk(trained: Path, reported_once: Path) -> Path:
    """The working directory, with the tiny run and that report."""
    shutil.copytree(reported_once, OUTPUT)
    return Path.cwd()


@pytest.fixture
def type_in(desk: Path, circuit: Callable[..., Any]) -> Type:
    """Types `circuit ...` in it: exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        done = circuit(*words)
        return done.code, done.out, done.err

    return run


def frame(name: str) -> pd.DataFrame:
    return read_rows(OUTPUT / f"ov_write_progress_{name}.jsonl")


def report() -> dict[str, Any]:
    found = json.loads((OUTPUT / "ov_write_progress_report.json").read_text("utf-8"))
    assert isinstance(found, dict)
    return found


@pytest.mark.usefixtures("desk")
def test_there_is_a_row_for_every_head_checkpoint_and_pair_with_every_column() -> None:
    rows = frame("rows")
    heads = ["L0H0", "L0H1", "L1H0", "L1H1"]
    keys = rows[["step", "head"]].drop_duplicates().to_numpy().tolist()
    assert keys == [[step, head] for step in (3, 6, 9, 12) for head in heads]
    assert len(rows) == 4 * 4 * 8
    assert {*COLUMNS, *AT_STEP, "pair_id", "lag"} <= set(rows.columns)
    assert not rows[[*COLUMNS, *AT_STEP]].isna().any(axis=None)


@pytest.mark.usefixtures("desk")
def test_means_and_deltas_are_those_of_the_rows() -> None:
    rows, means, deltas = frame("rows"), frame("means"), frame("deltas")
    own = rows.groupby(["step", "head"])[[*COLUMNS, *AT_STEP]].mean()
    for _, mean in means.iterrows():
        for name in (*COLUMNS, *AT_STEP):
            assert mean[name] == pytest.approx(own.loc[(mean["step"], mean["head"]), name])
    assert [(d["source_step"], d["target_step"]) for _, d in deltas.iterrows()] == [
        pair for pair in ((3, 6), (6, 9), (9, 12)) for _ in range(4)
    ]
    for _, delta in deltas.iterrows():
        after, before = (own.loc[(delta[f"{e}_step"], delta["head"])] for e in ("target", "source"))
        for name in (*COLUMNS, *AT_STEP):
            assert delta[name] == pytest.approx(after[name] - before[name], abs=1e-12)


@pytest.mark.usefixtures("desk")
def test_a_frozen_competitor_bounds_the_moving_margins_delta_on_either_side() -> None:
    deltas = frame("deltas")
    moving = deltas["moving_answer_margin"]
    assert (moving <= deltas["fixed_source_competitor_margin"] + 1e-12).all()
    assert (moving >= deltas["fixed_target_competitor_margin"] - 1e-12).all()


@pytest.mark.usefixtures("desk")
def test_correlations_are_scipys_over_the_intervals() -> None:
    deltas, correlations = frame("deltas"), frame("correlations")
    assert len(correlations) == 4 * len(COLUMNS) * len(OUTPUTS)
    for _, row in correlations.iterrows():
        own = deltas[deltas["head"] == row["head"]]
        expected = stats.pearsonr(own[row["write"]], own[row["output"]]).statistic
        assert row["pearson"] == pytest.approx(expected, abs=1e-9)
        assert row["intervals"] == 3


@pytest.mark.usefixtures("desk")
def test_the_summary_lists_the_largest_correlations_without_columns_that_stand_twice() -> None:
    found, summary = frame("correlations"), report()["summary"]
    found = found[~found["write"].isin(REDUNDANT)]
    largest = found["pearson"].abs().sort_values(ascending=False)[:5].to_list()
    assert [abs(row["pearson"]) for row in summary["top_correlations"]] == largest
    assert summary["correlations"] == len(found)


@pytest.mark.usefixtures("desk")
def test_the_summary_counts_the_pairs_of_each_lag() -> None:
    pairs = frame("rows").drop_duplicates("pair_id")
    counts = {str(lag): count for lag, count in pairs["lag"].value_counts().items()}
    assert report()["summary"]["pairs_by_lag"] == counts
    assert sum(counts.values()) == report()["summary"]["pairs"] == 8


@pytest.mark.usefixtures("desk")
def test_winners_are_the_heads_with_the_largest_mean_at_the_last_step() -> None:
    means, summary = frame("means"), report()["summary"]
    last = means[means["step"] == 12].set_index("head")
    for name in ("match_winner", "write_winner"):
        winner = summary[name]
        assert last[winner["column"]].idxmax() == winner["head"]
        course = means[means["head"] == winner["head"]].set_index("step")[winner["column"]]
        assert (winner["first_step"], winner["last_step"]) == (course[3], course[12])
        half = (course[3] + course[12]) / 2
        rose = course[course >= half].index[0] if course[12] > course[3] else None
        assert winner["half_way_step"] == rose


def test_chosen_heads_and_checkpoints_are_the_rows_that_all_of_them_have(type_in: Type) -> None:
    chosen = [str(CHECKPOINTS / f"step_{step:06d}.pt") for step in (12, 6)]
    everything = frame("rows")
    words = [word for word in COMMAND if word not in ("--checkpoint-dir", str(CHECKPOINTS))]
    words += ["--checkpoint", chosen[0], "--checkpoint", chosen[1], "--head", "L1H0", "--json"]
    code, out, _ = type_in(*words, "--overwrite")
    assert code == 0
    assert json.loads(out)["summary"]["steps"] == [6, 12]
    rows = frame("rows")
    same = everything[everything["head"].eq("L1H0") & everything["step"].isin([6, 12])]
    numbers = [*COLUMNS, *AT_STEP]
    np.testing.assert_allclose(rows[numbers], same[numbers], rtol=1e-4, atol=1e-5)
    assert rows["pair_id"].to_list() == same["pair_id"].to_list()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--head", "L2H0"], "the model has no head 'L2H0'"),
        (["--head", "L0MLP"], "the model has no head 'L0MLP'"),
        (["--head", "L0H0", "--head", "L0H0"], "a head is named twice"),
        (["--support-key-role", "nowhere"], "unknown role 'nowhere'"),
        (["--record-side", "left"], "unknown side 'left'"),
        (["--pair-type", "nothing"], "unknown pair type 'nothing'"),
        (["--split", "train"], "no record of split 'train'"),
        (["--max-pairs-per-type", "99", "--min-pairs-per-type", "99"], "expected at least 99"),
        (["--checkpoint", "runs/tiny/none.pt"], "runs/tiny/none.pt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    type_in: Type, words: list[str], message: str
) -> None:
    shutil.rmtree(OUTPUT)
    code, out, err = type_in(*COMMAND, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(OUTPUT.glob("ov_write_progress*"))


@pytest.mark.usefixtures("desk")
def test_two_checkpoints_of_one_step_are_refused() -> None:
    shutil.copy(CHECKPOINTS / "step_000006.pt", "copy.pt")
    with pytest.raises(CircuitError, match=r"copy.pt: is of step 6, as is .*step_000006.pt"):
        _report([CHECKPOINTS / "step_000006.pt", Path("copy.pt")], "once")


@pytest.mark.usefixtures("desk")
def test_one_checkpoint_has_means_and_no_deltas() -> None:
    result = _report([CHECKPOINTS / "step_000006.pt"], "once")
    assert read_jsonl(Path("once/ov_write_progress_deltas.jsonl")) == []
    assert all(r["pearson"] is None for r in read_jsonl(Path(result.rows[-1])))
    assert result.summary["top_correlations"] == []
    assert result.summary["chance_level"] is None


@pytest.mark.usefixtures("desk")
def test_a_run_that_diverged_gives_nulls() -> None:
    state = load_checkpoint(CHECKPOINTS / "step_000012.pt")
    state.parameters["embed.W_E"][:] = math.nan
    save_checkpoint(Path("step_000012.pt"), state)
    result = _report([CHECKPOINTS / "step_000006.pt", Path("step_000012.pt")], "nan")
    rows = read_jsonl(result.rows[0])
    assert all(row["qk_separation"] is None for row in rows if row["step"] == 12)
    assert all(row["qk_separation"] is not None for row in rows if row["step"] == 6)
    assert result.summary["match_winner"] is None


def _report(
    checkpoints: list[Path], output: str | Path, options: ProgressOptions | None = None
) -> ReportResult:
    return ov_write_progress(open_run(RUN).config, PROBE, checkpoints, output, options or FEW)


def test_pearson_is_numpys_for_every_pair_of_columns() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(6, 2, 3)), generator.normal(size=(6, 4))
    found = pearson(x, y)
    assert found.shape == (2, 3, 4)
    for a in range(2):
        for b in range(3):
            for c in range(4):
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


def test_the_figure_has_a_line_a_head_and_names_the_winner() -> None:
    means = [
        {"step": step, "head": head, "qk_separation": value, "attention_support": None}
        | {"head_value_margin_dla": -value}
        for step in (1, 2)
        for head, value in (("L0H0", 1.0), ("L1H0", 2.0 * step))
    ]
    figure = heads_over_steps(means)
    assert isinstance(figure, Figure)
    assert [len(axis.get_lines()) - 1 for axis in figure.axes] == [2, 2, 2]  # one is the zero line
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [
        ["L1H0"],
        [],
        ["L0H0"],
    ]


@pytest.mark.usefixtures("desk")
def test_checkpoints_of_another_config_are_refused() -> None:
    other = open_run(RUN).config.replace(seed=12)
    with pytest.raises(CircuitError, match="seed"):
        ov_write_progress(other, PROBE, [CHECKPOINTS / "step_000006.pt"], "other", FEW)
    assert not list(Path("other").glob("ov_write_progress*"))
