"""The chain diagnosis -> routes -> closure as it is typed: what it writes, how it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from circuit.cli import complete as cli_complete
from circuit.cli import main
from circuit.cli import routes as cli_routes

from circuit.artifacts import dump_rows, read_jsonl
from circuit.model.subspaces import SUBSPACES
from circuit.scalars.routes import parse_route
from circuit.schemas import SWITCH_BUCKETS
from circuit.tasks.pairs import SIDES

RUN = Path("runs/tiny")
SCALARS, ROUTES, CLOSURE = (RUN / "analysis" / name for name in ("scalars", "routes", "closure"))
ROUTE_ROWS = ROUTES / "route_to_margin_closure_rows.jsonl"
SCALAR_ROWS = SCALARS / "answer_scalar_residual_diagnosis_pair_rows.jsonl"
SELECTION = [
    *("--config", str(RUN / "run_config.json")),
    *("--probe-set", str(RUN / "analysis" / "probe_set.jsonl")),
    *("--checkpoint-dir", str(RUN / "checkpoints")),
    *(f"--checkpoint={RUN}/checkpoints/step_{step:06d}.pt" for step in (3, 6, 12)),
    *("--pair-type", "support_value", "--pair-type", "query_key"),
    *("--max-pairs-per-type", "6", "--min-pairs-per-type", "2"),
]
ROUTE_SPECS = [
    "label=whole,stage=final_norm,position_role=prediction",
    "label=value,stage=embedding,subspace=embedding_value_identity,rank=6,position_role=support_value",
    "label=query,stage=layer_0_post_mlp,subspace=head_qk_query,rank=4,head_layer=1,head=1,"
    "position_role=query_key",
]
MARGIN = [
    *("route-to-margin-closure", *SELECTION, "--output-dir", str(ROUTES)),
    *(word for spec in ROUTE_SPECS for word in ("--route", spec)),
]
DIAGNOSIS = ["answer-scalar-residual-diagnosis", *SELECTION, "--output-dir", str(SCALARS)]
SCALAR = [
    *("route-to-scalar-closure", "--route-closure-rows", str(ROUTE_ROWS)),
    *("--scalar-pair-rows", str(SCALAR_ROWS), "--output-dir", str(CLOSURE)),
]
ONE = [*SCALAR, "--scalar", "moving_answer_margin"]
Circuit = Callable[..., Any]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def chain_once(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of the diagnosis and of the routes, made once."""
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (DIAGNOSIS, MARGIN):
            patch.setattr(sys, "argv", ["circuit", *words])
            with pytest.raises(SystemExit, match=r"^0$"):
                main()
    return folder


@pytest.fixture
def chain(chain_once: Path, trained: Path) -> None:
    """A copy of them in the working directory."""
    shutil.copytree(chain_once / RUN / "analysis", RUN / "analysis", dirs_exist_ok=True)


def rewrite(path: Path, change: Callable[[Rows], Rows]) -> None:
    """Change the rows of a file, with right digests."""
    path.write_text(dump_rows(change(read_jsonl(path))), encoding="utf-8")


def fits_of(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = read_jsonl(folder / "route_to_scalar_closure_rows.jsonl")
    return {(row["scalar"], row["switch_bucket"]): row for row in rows}


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
    assert [fit["group"] for fit in fits] == groups
    means = read_jsonl(ROUTES / "route_to_margin_closure_mean_scores.jsonl")
    assert all(row["share"] == pytest.approx(1) for row in means if row["route"] == "whole")


def test_all_of_the_final_residual_is_the_change_of_the_contrast_margin(circuit: Circuit) -> None:
    done = circuit(*MARGIN, "--target-scalar", "contrast_margin")
    assert done.code == 0, done.err
    by_side: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = read_jsonl(ROUTE_ROWS)
    for row in rows:
        by_side[row["source_step"], row["pair_id"], row["margin_side"]] = row
    for (step, pair, side), row in by_side.items():
        if side == "clean":
            other = by_side[step, pair, "corrupted"]["delta"]
            gap = row["delta"] - other
            assert row["route_score_deltas"]["whole"] == pytest.approx(gap, abs=1e-4)
    assert max(abs(row["delta"]) for row in rows) > 0.1


def test_the_moving_margin_closes_alike_in_both_reports(circuit: Circuit, chain: None) -> None:
    done = circuit(*ONE, "--json")
    assert done.code == 0, done.err
    ours = fits_of(CLOSURE)["moving_answer_margin", "all"]
    theirs = read_jsonl(ROUTES / "route_to_margin_closure_fits.jsonl")[0]
    for name in ("r_squared", "r_squared_about_zero", "mean_actual"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
    assert ours["coefficients"] == pytest.approx(theirs["coefficients"], abs=1e-4)


def test_fits_add_as_their_scalars_do_and_buckets_share_the_rows(
    circuit: Circuit, chain: None
) -> None:
    four = [
        *("--scalar", "correct_value_logit", "--scalar", "source_best_wrong_logit"),
        *("--scalar", "fixed_source_competitor_margin", "--scalar", "moving_answer_margin"),
    ]
    assert circuit(*SCALAR, *four).code == 0
    fits = fits_of(CLOSURE)
    assert len(fits) == 4 * 3
    for bucket in ("all", "same_competitor", "competitor_switch"):
        margin, correct, wrong = (
            fits[name, bucket]["coefficients"]
            for name in (
                "fixed_source_competitor_margin",
                "correct_value_logit",
                "source_best_wrong_logit",
            )
        )
        assert fits["moving_answer_margin", bucket]["rows"] > 0
        for label, value in margin.items():
            assert value == pytest.approx(correct[label] - wrong[label], abs=1e-4)
    same, switched = (
        fits["moving_answer_margin", b] for b in ("same_competitor", "competitor_switch")
    )
    assert same["rows"] + switched["rows"] == fits["moving_answer_margin", "all"]["rows"] == 48
    fixed = fits["fixed_source_competitor_margin", "same_competitor"]
    assert fixed["coefficients"] == pytest.approx(same["coefficients"], abs=1e-4)


def test_options_choose_rows_and_columns(circuit: Circuit, chain: None) -> None:
    done = circuit(
        *SCALAR,
        *("--scalar", "correct_value_logit", "--switch-bucket", "all", "--fit-intercept"),
        *("--route-label", "value", "--pair-type", "support_value", "--margin-side", "clean"),
    )
    assert done.code == 0, done.err
    (fit,) = fits_of(CLOSURE).values()
    assert (fit["rows"], list(fit["coefficients"])) == (12, ["value"])
    assert fit["intercept"] != 0
    rows = read_jsonl(CLOSURE / "route_to_scalar_closure_pair_rows.jsonl")
    assert {(row["pair_type"], row["margin_side"]) for row in rows} == {("support_value", "clean")}


def test_routes_of_one_side_serve_the_scalars_of_both(circuit: Circuit, chain: None) -> None:
    assert circuit(*ONE).code == 0
    both = fits_of(CLOSURE)
    rewrite(ROUTE_ROWS, lambda rows: [row for row in rows if row["margin_side"] == "clean"])
    assert circuit(*ONE, "--overwrite").code == 0
    assert fits_of(CLOSURE) == both


def test_a_bucket_without_rows_says_nothing(circuit: Circuit, chain: None) -> None:
    def never(rows: Rows) -> Rows:
        return [
            row | {"switched": False, "target_competitor": row["source_competitor"]} for row in rows
        ]

    rewrite(SCALAR_ROWS, never)
    assert circuit(*ONE).code == 0
    fit = fits_of(CLOSURE)["moving_answer_margin", "competitor_switch"]
    assert (fit["rows"], fit["r_squared"], fit["coefficients"]) == (0, None, None)
    done = circuit(*ONE, "--switch-bucket", "competitor_switch", "--overwrite")
    assert (done.code, "no row is in bucket competitor_switch" in done.err) == (2, True)


def _other_weights(rows: Rows) -> Rows:
    return [*rows[:5], rows[5] | {"source_digest": "0" * 64}, *rows[6:]]


def _twice_but_different(rows: Rows) -> Rows:
    return [*rows, rows[3] | {"target_digest": "0" * 64}]


def _other_scores(rows: Rows) -> Rows:
    changed = {label: value + 1 for label, value in rows[1]["route_score_deltas"].items()}
    return [rows[0], rows[1] | {"route_score_deltas": changed}, *rows[2:]]


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
    circuit: Circuit, chain: None, file: Path, change: Callable[[Rows], Rows], message: str
) -> None:
    rewrite(file, change)
    done = circuit(*SCALAR)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not list(CLOSURE.glob("*.json*"))


def test_the_report_says_which_rows_it_joined(circuit: Circuit, chain: None) -> None:
    assert circuit(*ONE).code == 0
    found = json.loads((CLOSURE / "route_to_scalar_closure_report.json").read_text())["provenance"]
    for name, path in (("route_closure_rows", ROUTE_ROWS), ("scalar_pair_rows", SCALAR_ROWS)):
        assert found[f"{name}_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_wrong_file_is_refused(circuit: Circuit, chain: None) -> None:
    shutil.copy(SCALAR_ROWS, ROUTE_ROWS)
    done = circuit(*SCALAR)
    assert done.code == 2
    assert "expected a row of route-to-margin-closure" in done.err
    ROUTE_ROWS.unlink()
    done = circuit(*SCALAR)
    assert (done.code, done.err.endswith("no such file\n")) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scalar", "odd"], "the rows hold no scalar 'odd'"),
        (["--route-label", "odd"], "the rows hold no route 'odd'"),
        (["--pair-type", "recency"], "the rows hold no pair type 'recency'"),
        (["--switch-bucket", "odd"], "unknown switch bucket 'odd'"),
        (["--switch-bucket", "all", "--switch-bucket", "all"], "a switch bucket is named twice"),
        (["--margin-side", "left"], "margin sides left; expected clean and corrupted"),
    ],
)
def test_choices_that_the_rows_do_not_hold_are_refused(
    circuit: Circuit, chain: None, words: list[str], message: str
) -> None:
    done = circuit(*SCALAR, *words)
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--route", ROUTE_SPECS[0]], "two routes have the label 'whole'"),
        (["--route", "label=a,where=b"], "unknown key 'where'"),
        (["--route", ROUTE_SPECS[1].replace("value,", "v,").replace("=6", "=99")], "rank 99"),
        (["--target-scalar", "odd"], "unknown target scalar 'odd'"),
        (["--min-pairs-per-type", "50", "--max-pairs-per-type", "60"], "expected at least 50"),
        (["--split", "train"], "no record of split 'train'"),
        (["--margin-side", "clean", "--margin-side", "clean"], "margin sides clean, clean"),
        (
            ["--checkpoint", f"{RUN}/checkpoints/step_000006.pt"],
            "expected one checkpoint a step, named once",
        ),
    ],
)
def test_a_closure_that_cannot_be_is_refused_before_anything_is_written(
    circuit: Circuit, words: list[str], message: str
) -> None:
    done = circuit(*MARGIN, *words)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not list(ROUTES.glob("*.json*"))


@pytest.mark.usefixtures("chain")
def test_the_report_holds_its_parameters_and_its_law() -> None:
    report = json.loads((ROUTES / "route_to_margin_closure_report.json").read_text())
    assert [route["label"] for route in report["parameters"]["routes"]] == [
        "whole",
        "value",
        "query",
    ]
    assert report["parameters"]["routes"][2]["head"] == "L1H1"
    assert report["summary"]["largest_incomplete_transfer"] < 1e-5
    assert "transfer the contrast margin completely" in report["law"]


def test_completion_offers_what_the_library_knows() -> None:
    assert cli_complete.SUBSPACES == SUBSPACES
    assert cli_routes.BUCKETS == SWITCH_BUCKETS
    assert cli_complete.SIDES == SIDES
    context = SimpleNamespace(params={})
    complete = partial(cli_routes.complete_route, context)
    assert complete("label=a,st") == ["label=a,stage="]
    assert complete("label=a,stage=fin") == ["label=a,stage=final_norm"]
    assert complete("subspace=full") == ["subspace=full_residual"]
    keys = [word.removesuffix("=") for word in complete("")]
    words = {"label": "a", "stage": "b", "position_role": "prediction", "rank": "1"}
    words |= {"subspace": "head_qk_key", "head": "1", "head_layer": "0"}
    assert parse_route(",".join(f"{key}={words[key]}" for key in keys)).label == "a"
