"""The chain diagnosis -> routes -> closure: what it writes, how it refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from circuit.cli import complete
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from circuit.artifacts import dump_rows, read_jsonl
from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.reports.answer_scalar_residual_diagnosis import AnswerScalarDiagnosis, DiagnosisOptions
from circuit.reports.inputs import open_inputs
from circuit.reports.report import Report, ReportResult, run_report
from circuit.reports.route_to_margin_closure import MarginClosure, MarginClosureOptions
from circuit.reports.route_to_scalar_closure import ScalarClosure, ScalarClosureOptions
from circuit.scalars.least_squares import FOLDS
from circuit.scalars.routes import parse_route
from circuit.scalars.transfer import PairRuns, PairSides, route_bases, route_scores
from circuit.schemas import SIDES
from circuit.tasks.pairs import record_of
from circuit.train_config import TrainConfig

RUN = Path("runs/tiny")
SCALARS, ROUTES, CLOSURE = (RUN / "analysis" / name for name in ("scalars", "routes", "closure"))
ROUTE_ROWS = ROUTES / "route_to_margin_closure_rows.jsonl"
SCALAR_ROWS = SCALARS / "answer_scalar_residual_diagnosis_pair_rows.jsonl"
SELECTION: dict[str, Any] = {
    "probe_set": RUN / "analysis" / "probe_set.jsonl",
    "checkpoints": tuple(RUN / f"checkpoints/step_{step:06d}.pt" for step in (3, 6, 12)),
    "pair_types": ("support_value", "query_key"),
    "max_pairs_per_type": 6,
    "min_pairs_per_type": 2,
}
ROUTE_SPECS = (
    "label=whole,stage=final_norm,position_role=prediction",
    "label=value,stage=embedding,subspace=embedding_value_identity,rank=6,position_role=support_value",
    "label=query,stage=layer_0_post_mlp,subspace=head_qk_query,rank=4,head_layer=1,head=1,"
    "position_role=query_key",
)
MOVING = {"scalars": ("moving_answer_margin",)}
Rows = list[dict[str, Any]]


def of_run(kind: type[Report[Any]], options: Any, folder: Path) -> ReportResult:
    config = load_config(RUN / "run_config.json", TrainConfig)
    return run_report(kind, config, options, folder, overwrite=True)


def margin(**changes: Any) -> ReportResult:
    options = MarginClosureOptions(**{**SELECTION, "routes": ROUTE_SPECS, **changes})
    return of_run(MarginClosure, options, ROUTES)


def scalar(**changes: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """The fits of the scalars."""
    files = {"route_closure_rows": ROUTE_ROWS, "scalar_pair_rows": SCALAR_ROWS}
    options = ScalarClosureOptions(**files, **changes)
    result = run_report(ScalarClosure, None, options, CLOSURE, overwrite=True)
    return {(row["scalar"], row["switch_bucket"]): row for row in read_jsonl(result.rows[0])}


@pytest.fixture(scope="session")
def chain_once(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of the diagnosis and of the routes, made once."""
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        of_run(AnswerScalarDiagnosis, DiagnosisOptions(**SELECTION), SCALARS)
        margin()
    return folder


@pytest.fixture
def chain(chain_once: Path, trained: Path) -> None:
    """A copy of them in the working directory."""
    shutil.copytree(chain_once / RUN / "analysis", RUN / "analysis", dirs_exist_ok=True)


def rewrite(path: Path, change: Callable[[Rows], Rows]) -> None:
    """Change the rows of a file, with right digests."""
    path.write_text(dump_rows(change(read_jsonl(path))), encoding="utf-8")


@pytest.mark.usefixtures("chain")
def test_rows_hold_every_interval_pair_and_side_and_their_residuals() -> None:
    rows = read_jsonl(ROUTE_ROWS)
    assert len(rows) == 2 * 12 * 2
    assert [row["margin_side"] for row in rows[:2]] == ["clean", "corrupted"]
    for row in rows:
        assert list(row["route_score_deltas"]) == ["whole", "value", "query"]
        for label, delta in row["route_score_deltas"].items():
            change = row["target_route_scores"][label] - row["source_route_scores"][label]
            assert delta == pytest.approx(change, abs=1e-12)
        assert row["delta"] == pytest.approx(row["target_value"] - row["source_value"], abs=1e-12)
        assert row["predicted_delta"] + row["residual"] == pytest.approx(row["delta"], abs=1e-12)
    fits = read_jsonl(ROUTES / "route_to_margin_closure_fits.jsonl")
    groups = ["all rows", "clean", "corrupted", "support_value", "query_key"]
    every = [(group, basis) for basis in ("refit", "source") for group in groups]
    assert [(fit["group"], fit["basis"]) for fit in fits] == every
    means = read_jsonl(ROUTES / "route_to_margin_closure_mean_scores.jsonl")
    assert all(row["share"] == pytest.approx(1) for row in means if row["route"] == "whole")


@pytest.mark.usefixtures("trained")
def test_all_of_the_final_residual_is_the_change_of_the_contrast_margin() -> None:
    result = margin(target_scalar="contrast_margin")
    assert result.summary["largest_incomplete_transfer"] < 1e-5
    rows = read_jsonl(ROUTE_ROWS)
    for clean, corrupted in zip(rows[::2], rows[1::2], strict=True):
        gap = clean["delta"] - corrupted["delta"]
        assert clean["route_score_deltas"]["whole"] == pytest.approx(gap, abs=1e-4)
    assert max(abs(row["delta"]) for row in rows) > 0.1


@pytest.mark.usefixtures("chain")
def test_the_source_s_basis_is_taken_at_both_ends() -> None:
    """Against scores of the target's model with bases of the source's."""
    refitted, by_basis = read_jsonl(ROUTE_ROWS), margin().summary["by_basis"]
    result = margin(basis="source")
    inputs = open_inputs(load_config(RUN / "run_config.json", TrainConfig), SELECTION["probe_set"])
    options = MarginClosureOptions(**SELECTION, routes=ROUTE_SPECS)
    pairs = inputs.pairs(options)
    sides = PairSides.of(pairs, *(inputs.side(pairs, side) for side in SIDES))
    bases: list[Any] = []
    expected: dict[int, list[list[float]]] = {}
    for point in inputs.models(options.checkpoints):
        runs = PairRuns.of(point.model, sides, options.routes)
        frozen = bases or route_bases(point.model, options.routes, inputs.task.token_sets)
        scores = route_scores(point.model, sides, runs, options.routes, frozen)
        expected[point.step] = scores.T.tolist()
        bases = route_bases(point.model, options.routes, inputs.task.token_sets)
    rows = read_jsonl(ROUTE_ROWS)
    for i, (row, other) in enumerate(zip(rows, refitted, strict=True)):
        target = list(row["target_route_scores"].values())
        assert target == pytest.approx(expected[row["target_step"]][i // 2 % 12], abs=1e-5)
        assert (row["basis"], other["basis"]) == ("source", "refit")
        assert row["source_route_scores"] == other["source_route_scores"]
        whole = row["route_score_deltas"]["whole"]
        assert whole == other["route_score_deltas"]["whole"]
    turned = [
        r["route_score_deltas"]["value"] - o["route_score_deltas"]["value"]
        for r, o in zip(rows, refitted, strict=True)
    ]
    assert max(map(abs, turned)) > 1e-3
    assert result.summary["by_basis"] == by_basis
    assert list(by_basis) == ["refit", "source"]
    assert result.summary["fits"]["all rows"]["r_squared"] == by_basis["source"]["r_squared"]
    (said,) = re.findall(r"(\S+) \(\S+ to \S+\) with those of the interval's", result.notes[1])
    assert said == f"{by_basis['source']['r_squared']:.3f}"
    scalar(**MOVING)
    assert "(basis: source)" in (CLOSURE / "route_to_scalar_closure_report.md").read_text()


@pytest.mark.usefixtures("trained")
def test_a_basis_of_every_direction_does_not_turn() -> None:
    """The projection is the identity, whatever the basis: both are the whole residual."""
    whole = "stage=layer_0_post_mlp,position_role=prediction"
    routes = f"label=whole,{whole}", f"label=all,{whole},subspace=embedding_value_identity,rank=16"
    both = margin(routes=routes).summary["by_basis"]
    for of_basis in both.values():
        changes = of_basis["mean_score_changes"]
        assert changes["all"] == pytest.approx(changes["whole"], abs=1e-4)
    alone = margin(routes=routes[:1])
    assert list(alone.summary["by_basis"]) == ["refit"]


@pytest.mark.usefixtures("chain")
def test_pairs_of_one_record_are_held_out_together() -> None:
    """As scikit-learn deals the records that the pairs' ids name."""
    fit = scalar(**MOVING, switch_buckets=("all",))["moving_answer_margin", "all"]
    rows = read_jsonl(SCALAR_ROWS)
    scores = {
        (r["source_step"], r["pair_id"]): r["route_score_deltas"] for r in read_jsonl(ROUTE_ROWS)
    }
    x = np.array([list(scores[row["source_step"], row["pair_id"]].values()) for row in rows])
    y = np.array([row["deltas"]["moving_answer_margin"] for row in rows])
    records = [record_of(row["pair_id"]) for row in rows]
    assert FOLDS <= len(set(records)) < 12
    folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
    model = LinearRegression(fit_intercept=False)
    predicted = cross_val_predict(model, x, y, groups=records, cv=folds)
    assert fit["r_squared_held_out"] == pytest.approx(r2_score(y, predicted), abs=1e-4)


@pytest.mark.usefixtures("chain")
def test_rows_of_earlier_versions_are_read_and_of_two_bases_refused() -> None:
    now = scalar(**MOVING)
    rewrite(ROUTE_ROWS, lambda rows: [{k: row[k] for k in row if k != "basis"} for row in rows])
    assert scalar(**MOVING) == now
    rewrite(ROUTE_ROWS, lambda rows: [*rows[:-2], *(r | {"basis": "source"} for r in rows[-2:])])
    with pytest.raises(CircuitError, match="route scores of bases refit and source"):
        scalar(**MOVING)


@pytest.mark.usefixtures("chain")
def test_the_moving_margin_closes_alike_in_both_reports() -> None:
    ours = scalar(**MOVING)["moving_answer_margin", "all"]
    theirs = read_jsonl(ROUTES / "route_to_margin_closure_fits.jsonl")[0]
    for name in ("r_squared", "r_squared_about_zero", "mean_actual"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
    assert ours["coefficients"] == pytest.approx(theirs["coefficients"], abs=1e-4)


@pytest.mark.usefixtures("chain")
def test_nulls_stand_beside_the_fits_and_change_none() -> None:
    """In both reports; two intervals are too few for shifts, which is said."""
    fits, of_scalars = (ROUTES / "route_to_margin_closure_fits.jsonl"), scalar(**MOVING)
    before = read_jsonl(fits)
    rows = ROUTE_ROWS.read_bytes()
    result, nulls = margin(nulls=9), scalar(**MOVING, nulls=9)
    assert ROUTE_ROWS.read_bytes() == rows
    assert [{k: fit[k] for k in fit if k != "nulls"} for fit in read_jsonl(fits)] == before
    assert not any("nulls" in fit for fit in before)
    assert {n: {k: v for k, v in fit.items() if k != "nulls"} for n, fit in nulls.items()} == (
        of_scalars
    )
    ours, theirs = nulls["moving_answer_margin", "all"], read_jsonl(fits)[0]
    for fit in (ours, theirs):
        assert fit["nulls"]["shifted_intervals"] is None
        permuted = fit["nulls"]["permuted_records"]
        assert permuted["draws"] == 9
        for number in ("r_squared", "r_squared_held_out"):
            told = permuted[number]
            assert told["low"] <= told["mean"] <= told["high"]
            assert 0 < told["p"] <= 1
    # the same fit of the same rows, in another order
    assert (
        ours["nulls"]["permuted_records"]["r_squared"]["p"]
        == (theirs["nulls"]["permuted_records"]["r_squared"]["p"])
    )
    assert result.summary["nulls"] == {"draws": 9, "seed": 17}
    assert any("No shifted intervals: fewer than 4" in note for note in result.notes)
    assert "Against nulls" in result.page.read_text()
    assert "of every fit (basis: refit) beside its nulls" in result.page.read_text()


@pytest.mark.usefixtures("chain")
@pytest.mark.parametrize("changes", [{"max_pairs_per_type": 1, "min_pairs_per_type": 1}])
def test_one_pair_has_no_nulls(changes: dict[str, Any]) -> None:
    asked = {"pair_types": ("support_value",), "checkpoints": SELECTION["checkpoints"][:2]}
    result = margin(**asked, **changes, nulls=3)
    nulls = result.summary["fits"]["all rows"]["nulls"]
    assert nulls == {"permuted_records": None, "shifted_intervals": None}
    assert sum(note.startswith("No ") for note in result.notes) == 2


@pytest.mark.usefixtures("chain")
def test_fits_add_as_their_scalars_do_and_buckets_share_the_rows() -> None:
    parts = "fixed_source_competitor_margin", "correct_value_logit", "source_best_wrong_logit"
    fits = scalar(scalars=(*parts, "moving_answer_margin"))
    assert len(fits) == 4 * 3
    for bucket in ("all", "same_competitor", "competitor_switch"):
        whole, correct, wrong = (fits[name, bucket]["coefficients"] for name in parts)
        assert fits["moving_answer_margin", bucket]["rows"] > 0
        for label, value in whole.items():
            assert value == pytest.approx(correct[label] - wrong[label], abs=1e-4)
    same, switched = (
        fits["moving_answer_margin", b] for b in ("same_competitor", "competitor_switch")
    )
    assert same["rows"] + switched["rows"] == fits["moving_answer_margin", "all"]["rows"] == 48
    fixed = fits["fixed_source_competitor_margin", "same_competitor"]
    assert fixed["coefficients"] == pytest.approx(same["coefficients"], abs=1e-4)


@pytest.mark.usefixtures("chain")
def test_options_choose_rows_and_columns() -> None:
    (fit,) = scalar(
        scalars=("correct_value_logit",),
        switch_buckets=("all",),
        route_labels=("value",),
        pair_types=("support_value",),
        margin_sides=("clean",),
        fit_intercept=True,
    ).values()
    assert (fit["rows"], list(fit["coefficients"])) == (12, ["value"])
    assert fit["intercept"] != 0
    rows = read_jsonl(CLOSURE / "route_to_scalar_closure_pair_rows.jsonl")
    assert {(row["pair_type"], row["margin_side"]) for row in rows} == {("support_value", "clean")}


@pytest.mark.usefixtures("chain")
def test_routes_of_one_side_serve_the_scalars_of_both() -> None:
    both = scalar(**MOVING)
    rewrite(ROUTE_ROWS, lambda rows: [row for row in rows if row["margin_side"] == "clean"])
    assert scalar(**MOVING) == both


@pytest.mark.usefixtures("chain")
def test_a_bucket_without_rows_says_nothing() -> None:
    def never(rows: Rows) -> Rows:
        return [
            row | {"switched": False, "target_competitor": row["source_competitor"]} for row in rows
        ]

    rewrite(SCALAR_ROWS, never)
    fit = scalar(**MOVING)["moving_answer_margin", "competitor_switch"]
    assert (fit["rows"], fit["r_squared"], fit["coefficients"]) == (0, None, None)
    with pytest.raises(CircuitError, match="no row is in bucket competitor_switch"):
        scalar(**MOVING, switch_buckets=("competitor_switch",))


def _other_weights(rows: Rows) -> Rows:
    return [*rows[:5], rows[5] | {"source_digest": "0" * 64}, *rows[6:]]


def _twice_but_different(rows: Rows) -> Rows:
    return [*rows, rows[3] | {"target_digest": "0" * 64}]


def _other_scores(rows: Rows) -> Rows:
    changed = {label: value + 1 for label, value in rows[1]["route_score_deltas"].items()}
    return [rows[0], rows[1] | {"route_score_deltas": changed}, *rows[2:]]


@pytest.mark.usefixtures("chain")
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (ROUTE_ROWS, lambda rows: rows[2:], "no route row of 3 -> 6, support_value:"),
        (SCALAR_ROWS, lambda rows: rows[:-1], "no scalar row of 6 -> 12, query_key:"),
        (SCALAR_ROWS, lambda rows: rows[24:], "no scalar row of 3 -> 6, support_value:"),
        (SCALAR_ROWS, _other_weights, "is of source weights 000000000000"),
        (SCALAR_ROWS, _twice_but_different, "49: differs from line 4, and both are of 3 -> 6"),
        (ROUTE_ROWS, _twice_but_different, "49: differs from line 4, and both are of 3 -> 6"),
        (ROUTE_ROWS, _other_scores, "corrupted differs from that of side clean"),
        (ROUTE_ROWS, lambda rows: [], "holds no row"),
    ],
)
def test_rows_that_do_not_match_are_refused_and_named(
    file: Path, change: Callable[[Rows], Rows], message: str
) -> None:
    rewrite(file, change)
    with pytest.raises(CircuitError, match=message):
        scalar()
    assert not list(CLOSURE.glob("*.json*"))


@pytest.mark.usefixtures("chain")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"route_labels": ("odd",)}, "the rows hold no route 'odd'"),
        ({"pair_types": ("recency",)}, "the rows hold no pair type 'recency'"),
    ],
)
def test_choices_that_the_rows_do_not_hold_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CircuitError, match=message):
        scalar(**changes)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ((*ROUTE_SPECS, ROUTE_SPECS[1].replace("value,", "whole,", 1)), "have the label 'whole'"),
        (("label=a,where=b",), "unknown key 'where'"),
        ((ROUTE_SPECS[1].replace("=6", "=99"),), "route 'value': rank 99"),
        ((ROUTE_SPECS[2].replace("head=1", "head=9"),), "route 'query': .*L1H9"),
        ((ROUTE_SPECS[0].replace("final_norm", "layer_7_post_mlp"),), "route 'whole': .*layer_7"),
    ],
)
def test_routes_that_cannot_be_are_refused(routes: tuple[str, ...], message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        margin(routes=routes)


def test_routes_are_read_back_from_json_and_words() -> None:
    options = MarginClosureOptions(**SELECTION, routes=ROUTE_SPECS)
    assert options.to_json()["routes"][2]["head"] == "L1H1"
    assert MarginClosureOptions.from_json(options.to_json()) == options
    words = options.words()
    given = [words[at + 1] for at, word in enumerate(words) if word == "--route"]
    assert tuple(map(parse_route, given)) == options.routes
    earlier = options.to_json() | {
        "pairs": {"types": ["support_value", "query_key"], "max_per_type": 6, "min_per_type": 2}
    }
    for name in ("pair_types", "max_pairs_per_type", "min_pairs_per_type"):
        del earlier[name]
    assert MarginClosureOptions.from_json(earlier, schema=1) == options


def test_completion_offers_what_the_library_knows() -> None:
    offered = partial(complete.route, SimpleNamespace(params={}))
    assert offered("label=a,st") == ["label=a,stage="]
    assert offered("label=a,stage=fin") == ["label=a,stage=final_norm"]
    assert offered("subspace=full") == ["subspace=full_residual"]
    keys = [word.removesuffix("=") for word in offered("")]
    words = {"label": "a", "stage": "b", "position_role": "prediction", "rank": "1"}
    words |= {"subspace": "head_qk_key", "head": "1", "head_layer": "0"}
    assert parse_route(",".join(f"{key}={words[key]}" for key in keys)).label == "a"
