"""Comparisons of runs and of seeds, on results of the test's choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_report import made_report
from scipy.stats import ttest_1samp

from circuit.artifacts import dump_rows, read_jsonl
from circuit.errors import CircuitError
from circuit.reports.claims_comparison import ClaimsComparison, ClaimsOptions
from circuit.reports.cross_seed_comparison import CrossSeedComparison, CrossSeedOptions
from circuit.reports.intervals import spread
from circuit.reports.optimizer_comparison import OptimizerComparison, OptimizerComparisonOptions
from circuit.reports.report import ReportResult, run_report
from circuit.reports.seed_spread import SeedSpread, SeedSpreadOptions
from circuit.sealed import sealed
from circuit.train_config import load_run_config


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compare_seeds(reports: list[Path]) -> ReportResult:
    chosen = CrossSeedOptions(reports=tuple(reports))
    return run_report(CrossSeedComparison, None, chosen, "out", overwrite=True)


def compare_optimizers(runs: list[Path]) -> ReportResult:
    chosen = OptimizerComparisonOptions(runs=tuple(runs))
    return run_report(OptimizerComparison, None, chosen, "out", overwrite=True)


def compare_claims(claims: list[Path]) -> ReportResult:
    chosen = ClaimsOptions(claims=tuple(claims))
    return run_report(ClaimsComparison, None, chosen, "out", overwrite=True)


JUDGED: dict[str, Any] = {
    **{"target": "reference", "statement": "it learns", "tests": ["accuracy >= 0.9"]},
    **{"holds": True, "note": "", "numbers": {"accuracy": 0.95}},
}


def study_claims(seed: int, accuracy: float | None, **other: Any) -> Path:
    """The claims of the study with one seed; with no accuracy there is nothing to judge."""
    learns = JUDGED | {
        "holds": None if accuracy is None else accuracy >= 0.9,
        "numbers": {} if accuracy is None else {"accuracy": accuracy, "head": f"L1H{seed}"},
    }
    study = {"target": "paper", "scale": "short", "recipe_digest": "a", "seed": seed}
    path = Path(f"{seed}/claims_paper.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(sealed({**study, "claims": [learns | other]})))
    return path


def test_claims_are_counted_and_their_numbers_have_t_intervals_over_seeds() -> None:
    accuracies = {2: 0.95, 1: 0.99, 3: 0.85, 4: None}
    result = compare_claims([study_claims(*one) for one in accuracies.items()])
    (claim,) = result.summary["claims"]
    assert (claim["holds"], claim["judged"]) == (2, 3)
    assert result.summary["seeds"] == [1, 2, 3, 4]
    accuracy, head = claim["numbers"]["accuracy"], claim["numbers"]["head"]
    own = ttest_1samp([0.99, 0.95, 0.85], 0).confidence_interval()
    assert (accuracy["mean_low"], accuracy["mean_high"]) == pytest.approx((own.low, own.high))
    assert head == {"by_seed": {"1": "L1H1", "2": "L1H2", "3": "L1H3"}}
    assert result.law == "the 3 verdicts of 4 studies follow from their numbers"


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        ({"scale": "smoke"}, r"2/claims_paper.json: is of another scale than 1/claims_paper.json"),
        ({"target": "reference"}, "is of another target"),
        ({"recipe_digest": "b"}, "is of another recipe than"),
        ({"seed": 1}, "is a second study of seed 1"),
        ({"claims": [{}]}, "make it again"),
        ({"claims": [JUDGED | {"tests": None}]}, "make it again"),
        ({"claims": [JUDGED | {"tests": ["accuracy => 0.9"]}]}, "make it again"),
        ({"claims": [JUDGED | {"tests": ["accuracy >= 0.9.1"]}]}, "make it again"),
        ({"claims": [JUDGED | {"numbers": None}]}, "make it again"),
        ({"claims": [JUDGED | {"numbers": {}}]}, "says nothing of 'accuracy'"),
        ({"claims": [JUDGED | {"numbers": {"accuracy": "L1H2"}}]}, "make it again"),
        ({"claims": [JUDGED | {"numbers": {"accuracy": None}}]}, "does not follow from"),
        ({"claims": [JUDGED | {"statement": ["it learns"]}]}, "make it again"),
    ],
)
def test_claims_of_another_study_are_refused(spoil: dict[str, Any], refusal: str) -> None:
    one, two = study_claims(1, 0.95), study_claims(2, 0.95)
    payload = json.loads(two.read_text())
    del payload["digest"]
    two.write_text(json.dumps(sealed(payload | spoil)))
    with pytest.raises(CircuitError, match=refusal):
        compare_claims([one, two])


def test_a_verdict_that_does_not_follow_from_its_numbers_is_refused() -> None:
    one, two = study_claims(1, 0.95), study_claims(2, 0.85, holds=True)
    with pytest.raises(CircuitError, match=r"verdict of seed 2 does not follow.*it learns"):
        compare_claims([one, two])
    two.write_text(two.read_text().replace("0.85", "0.95"))
    with pytest.raises(CircuitError, match="was changed after it was written"):
        compare_claims([one, two])


def seed_reports(seed: int, head: str, path: str, *, wins: float, amount: float) -> list[Path]:
    window: dict[str, Any] = {
        "start_step": 0,
        "end_step": 8,
        "telescopes": True,
        "actual": 2.0,
        "value_at_start": amount - 2.0,
        "value_at_end": amount,
        "path": {"weight_decay": -0.5, "adam_current_gradient": 2.5, "rounding": 0.0},
        "predicted": {"path": 2.0},
        "references": {"raw_sgd": -0.1},
        "closure": {"path": 1e-4, "first_order": 0.2},
    }
    ends = {"growth": 1.0, "support_wins_at_end": wins}
    roles = ("winner", "runner_up", "median", "bottom")
    span = {"start_step": 0, "end_step": 8}
    summaries = {
        "head-selection": {
            "score": "rank8",
            "selected": {role: {"head": head, **ends} for role in roles},
        },
        "write-path-selection": {
            "step": 8,
            "selected": {role: {"path": path, "final_write": amount} for role in roles},
        },
        "bilinear-qk-rank-adam-state-attribution": {
            **span,
            "windows": [
                {**window, "scalar": "qk_match.L9H9.rank8", "actual": 9.0},
                {**window, "scalar": f"qk_match.{head}.rank8"},
            ],
        },
        "mlp-functional-write-adam-state-attribution": {
            **span,
            "windows": [
                {**window, "scalar": "functional_write.L9H9_to_L9MLP.margin", "actual": 9.0},
                {**window, "scalar": f"functional_write.{path}.margin"},
            ],
        },
    }
    paths = []
    for command, summary in summaries.items():
        paths.append(made_report(f"seed_{seed:04}/{command}/a_report.json", command, summary))
    return paths


def test_roles_repeat_and_addresses_move() -> None:
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=3.0)
    reports += seed_reports(13, "L2H1", "L1H1_to_L2MLP", wins=0.2, amount=2.0)
    result = compare_seeds(reports)
    assert result.summary["head_role_repeats"] == 1
    shares = result.summary["raw_sgd_shares"]
    assert shares == {seed: pytest.approx(-0.05) for seed in shares}  # -0.1 of 2.0
    assert result.summary["largest_raw_sgd_share"] == pytest.approx(0.05)
    assert result.summary["write_role_repeats"] == 2
    assert result.summary["same_layer_readers"] == 1
    row = read_jsonl(result.rows[0])[0]
    assert (row["match_actual"], row["write_actual"]) == (2.0, 2.0), "the winners', no control's"
    lines = Path("out/winners.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines] == ["winner_head", "L1H3", "L2H1"]
    assert "sum to the change that its attribution states, to 0 of it" in result.law


def changed(report: Path, **change: Any) -> None:
    """Another last window of an attribution."""
    payload = json.loads(report.read_text())
    payload["summary"]["windows"][-1] |= change
    made_report(report, payload["command"], payload["summary"])


def test_a_change_that_the_terms_do_not_sum_to_shows_in_the_law() -> None:
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=3.0)
    changed(reports[2], actual=4.0, telescopes=False)
    telescoped = "where steps telescope, that is the last value minus the first"
    assert f"states, to 0.5 of it; {telescoped}, to 0 of it" in compare_seeds(reports).law
    changed(reports[2], actual=2.0, telescopes=True, value_at_start=0.0)
    assert f"states, to 0 of it; {telescoped}, to 0.5 of it" in compare_seeds(reports).law


def test_a_closure_that_is_not_defined_leaves_the_worst_undefined() -> None:
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=3.0)
    reports += seed_reports(13, "L2H1", "L1H1_to_L2MLP", wins=0.2, amount=2.0)
    changed(reports[2], closure={"path": None, "first_order": None})
    summary = compare_seeds(reports).summary
    assert (summary["worst_match_closure"], summary["worst_write_closure"]) == (None, 1e-4)


def test_a_match_that_did_not_move_leaves_the_share_of_raw_sgd_undefined() -> None:
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=3.0)
    reports += seed_reports(13, "L2H1", "L1H1_to_L2MLP", wins=0.2, amount=2.0)
    changed(reports[2], actual=0.0)
    summary = compare_seeds(reports).summary
    assert summary["raw_sgd_shares"] == {"11": None, "13": -0.05}
    assert summary["largest_raw_sgd_share"] is None


def test_the_seed_is_that_of_the_innermost_folder_named_so() -> None:
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=3.0)
    for parent, seed in (("seed_0042/of", 11), ("seed_00421", 11), ("seed_0011/seed_12345", 12345)):
        moved = [Path(parent, *path.parts[seed == 12345 :]) for path in reports]
        for old, new in zip(reports, moved, strict=True):
            new.parent.mkdir(parents=True)
            new.write_bytes(old.read_bytes())
        assert compare_seeds(moved).summary["seeds"] == [seed]


def test_a_write_that_was_not_the_selected_one_shows_in_the_law() -> None:
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=4.0)
    assert compare_seeds(reports).law.endswith("attribution ends, to 0 of it")
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=5.0)
    selection = json.loads(reports[1].read_text())["summary"]
    selection["selected"]["winner"]["final_write"] = 4.0
    made_report(reports[1], "write-path-selection", selection)
    assert compare_seeds(reports).law.endswith("attribution ends, to 0.2 of it")


def test_reports_that_are_not_all_of_a_seed_are_refused() -> None:
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=3.0)
    of_another = seed_reports(13, "L1H3", "L2H1_to_L2MLP", wins=0.9, amount=3.0)[3]
    made_report(
        reports[3], *(json.loads(of_another.read_text())[k] for k in ("command", "summary"))
    )
    with pytest.raises(CircuitError, match="holds no scalar of L1H3_to_L1MLP"):
        compare_seeds(reports)
    with pytest.raises(CircuitError, match="seed 11 has no report of head-selection"):
        compare_seeds(reports[1:])
    copy = made_report("seed_0011/b_report.json", "head-selection", {})
    with pytest.raises(CircuitError, match="a second head-selection of seed 11"):
        compare_seeds([*reports, copy])
    reports[0].write_text(reports[0].read_text().replace('"L1H3"', '"L1H2"'))
    with pytest.raises(CircuitError, match="was changed after it was written"):
        compare_seeds(reports)


def finished_run(
    name: str, train_payload: Callable[..., dict[str, Any]], optimizer: Any, accuracy: list[float]
) -> Path:
    folder = Path(name)
    folder.mkdir()
    config = train_payload(name=name, optimizer=optimizer)
    (folder / "run_config.json").write_text(json.dumps(config))
    last = {"answer_accuracy": accuracy[-1], "loss": 1.0}
    summary = {"evaluations": {"validation_iid": last}}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [
        {
            "kind": "evaluation",
            "step": 4 * i,
            "split": "validation_iid",
            "loss": 1.0,
            "answer_accuracy": value,
        }
        for i, value in enumerate(accuracy)
    ]
    (folder / "metrics.jsonl").write_text(dump_rows(rows))
    return folder


def test_runs_are_compared_by_optimizer(train_payload: Callable[..., dict[str, Any]]) -> None:
    adamw = {"name": "adamw", "learning_rate": 0.01}
    sgd = {"name": "sgd", "learning_rate": 1.0}
    runs = [
        finished_run("adamw", train_payload, adamw, [0.0, 0.5, 0.95, 0.99]),
        finished_run("plain", train_payload, sgd, [0.0, 0.1]),
        finished_run("heavy", train_payload, sgd | {"momentum": 0.9}, [0.0, 0.4, 0.1]),
    ]
    (runs[1] / "summary.json").unlink()
    with pytest.raises(CircuitError, match="finish the run first"):
        compare_optimizers(runs)
    ending = {"name": "plain", "diverged": "training diverged at step 5"}
    (runs[1] / "outcome.json").write_text(json.dumps(ending))
    result = compare_optimizers(runs)
    found = result.summary
    assert result.law.startswith("the course of each of 2 finished runs")
    assert result.law.endswith("to 0")
    assert found["runs"]["adamw"]["learned_at_step"] == 8
    assert found["groups"]["SGD"]["diverged"] == 1
    heavy = found["groups"]["SGD with momentum"]
    assert (heavy["best_run"], heavy["learned"]) == ("heavy", 0)
    assert found["runs"]["heavy"]["best_answer_accuracy"] == 0.4
    assert found["runs"]["adamw"]["qk_separation_last"] is None, "no audit, no number"
    (runs[0] / "summary.json").write_text(
        json.dumps({"evaluations": {"validation_iid": {"answer_accuracy": 0.49, "loss": 1.0}}})
    )
    assert compare_optimizers(runs).law.endswith("to 0.5")


def test_a_course_that_lacks_its_end_is_damaged(
    train_payload: Callable[..., dict[str, Any]],
) -> None:
    sgd = {"name": "sgd", "learning_rate": 1.0}
    runs = [finished_run(name, train_payload, sgd, [0.0, 0.1]) for name in ("one", "two")]
    (runs[1] / "metrics.jsonl").write_text("")
    with pytest.raises(CircuitError, match=r"metrics.jsonl of run two is damaged.*train it again"):
        compare_optimizers(runs)
    (runs[1] / "summary.json").write_text(json.dumps({"evaluations": {}}))
    assert compare_optimizers(runs).law.startswith("the course of each of 1 finished runs")
    for outcome in ({}, {"diverged": True}):
        (runs[1] / "outcome.json").write_text(json.dumps(outcome))
        with pytest.raises(CircuitError, match=r"outcome.json: is damaged"):
            compare_optimizers(runs)


MEASURES = ("loss", "token_accuracy", "answer_accuracy", "q", "r", "w")


def plain_run(
    name: str, train_payload: Callable[..., dict[str, Any]], seed: int, value: float, **changes: Any
) -> Path:
    """A finished run in a folder of any name."""
    folder = Path(name)
    folder.mkdir()
    config = train_payload(name=name, seed=seed, output_dir=name, **changes)
    (folder / "run_config.json").write_text(json.dumps(config))
    last = dict.fromkeys(MEASURES, value)
    splits = ("validation_iid", "heldout_pairs")
    (folder / "summary.json").write_text(json.dumps({"evaluations": dict.fromkeys(splits, last)}))
    rows = [
        {"kind": "evaluation", "step": step, "split": split, **dict.fromkeys(MEASURES, of)}
        for step, of in ((0, 0.0), (12, value))
        for split in splits
    ]
    (folder / "metrics.jsonl").write_text(dump_rows(rows))
    return folder


def spread_of(runs: list[Path]) -> ReportResult:
    chosen = SeedSpreadOptions(runs=tuple(runs))
    return run_report(SeedSpread, None, chosen, "out", overwrite=True)


def test_plain_runs_are_compared_by_the_seeds_of_their_configs(
    train_payload: Callable[..., dict[str, Any]],
) -> None:
    values = {3: 0.2, 1: 0.5, 2: 0.8}
    runs = [plain_run(f"of {seed}", train_payload, seed, v) for seed, v in values.items()]
    result = spread_of(runs)
    assert result.summary["seeds"] == [1, 2, 3]
    for split in ("validation_iid", "heldout_pairs"):
        low, high = ttest_1samp(list(values.values()), 0).confidence_interval()
        assert result.summary["splits"][split]["answer_accuracy"] == pytest.approx(
            {"mean": 0.5, "sd": 0.3, "least": 0.2, "most": 0.8, "mean_low": low, "mean_high": high}
        )
    assert result.law.endswith("to 0")
    assert {(row["seed"], row["step"]) for row in read_jsonl(result.rows[0])} == {
        (seed, step) for seed in values for step in (0, 12)
    }
    alone = {"mean": 0.5, "sd": None, "least": 0.5, "most": 0.5}
    assert spread([0.5]) == alone | {"mean_low": None, "mean_high": None}


LATE = {1: 0, 2: 4, 3: 8}
"""How much later the run of each seed forms."""


def role_reports(folder: Path, seed: int, **asked: Any) -> list[Path]:
    """Scan and decomposition of a run, which are functions of the steps since it formed alone."""
    digest = load_run_config(folder / "run_config.json").recipe_digest()
    told = {"recipe_digest": digest, "probe_set_sha256": "0", "slice": "lag"}
    head, since = f"L1H{seed}", {step: step - LATE[seed] for step in range(0, 25, 4)}
    scan = [
        {"step": step, "head": one, "score": score, "lag": lag, "separation": sign * offset**2}
        for step, offset in since.items()
        for one, score, lag, sign in (
            *((head, "rank8", "all", 1), (head, "full", "all", 9)),
            *((head, "rank8", "1", 9), ("L0H0", "rank8", "all", 9)),
        )
    ]
    shares = [
        {"step": step, "part": part, "lag": lag, "contribution": sign * offset}
        for step, offset in since.items()
        for part, lag, sign in (("b_U", "all", 9), ("L1MLP", "all", 1), ("L1MLP", "2", 9))
    ]
    paths = []
    for command, rows, summary in (
        ("bilinear-qk-match-separation", scan, {"winner": {"head": head, "score": "rank8"}}),
        ("path-logit-decomposition", shares, {"parts": [{"part": "b_U"}, {"part": "L1MLP"}]}),
    ):
        stem = f"{folder}/{command}/{command.replace('-', '_')}"
        parameters = {"probe_set": f"{folder}/probe_set.jsonl", **asked}
        paths.append(made_report(f"{stem}_report.json", command, summary, parameters, **told))
        Path(f"{stem}_rows.jsonl").write_text(dump_rows(rows))
    return paths


def forming_runs(train_payload: Callable[..., dict[str, Any]]) -> tuple[list[Path], list[Path]]:
    """Runs whose reads of lag 2 are answered from step 4 on, or as much later; their reports."""
    runs, reports = [], []
    for seed, late in LATE.items():
        folder = plain_run(f"of {seed}", train_payload, seed, 0.5)
        slices = [
            {"lag": {"1": {"answer_accuracy": 1.0}, "2": {"answer_accuracy": share}}}
            for share in (0.1, 0.7)
        ]
        rows = [
            {"kind": "evaluation", "step": step, "split": split, **dict.fromkeys(MEASURES, 0.5)}
            | {"by_slice": slices[step >= late + 4]}
            for step in range(0, 25, 4)
            for split in ("validation_iid", "heldout_pairs")
        ]
        (folder / "metrics.jsonl").write_text(dump_rows(rows))
        runs.append(folder)
        reports += role_reports(folder, seed)
    return runs, reports


def roles_of(runs: list[Path], reports: list[Path], **asked: Any) -> ReportResult:
    chosen = SeedSpreadOptions(runs=tuple(runs), reports=tuple(reports), **asked)
    return run_report(SeedSpread, None, chosen, "out", overwrite=True)


def test_what_only_begins_later_is_equal_once_it_is_aligned(
    train_payload: Callable[..., dict[str, Any]],
) -> None:
    runs, reports = forming_runs(train_payload)
    found = roles_of(runs, reports).summary
    assert found["formed_at"] == {"1": 4, "2": 8, "3": 12}
    assert found["components"]["best-matching head"] == {"1": "L1H1", "2": "L1H2", "3": "L1H3"}
    assert set(found["components"]["strongest writer"].values()) == {"L1MLP"}, "no constant"
    means = [(of["role"], of["offset"]) for of in found["roles"]]
    # from the first to the last step at which all of them were measured
    assert [offset for role, offset in means if role == "strongest writer"] == [-4, 0, 4, 8, 12]
    for of in found["roles"]:
        value = of["offset"] + 4 if of["role"] == "strongest writer" else (of["offset"] + 4) ** 2
        assert (of["seeds"], of["mean"]) == (3, value)
        assert (of["mean_low"], of["mean_high"]) == pytest.approx((value, value))
    never = roles_of(runs, reports, formed_share=0.8).summary
    assert set(never["formed_at"].values()) == {None}
    assert never["roles"] == []
    at_once = roles_of(runs, reports, formed_value=1).summary
    assert set(at_once["formed_at"].values()) == {0}
    (begin,) = (m for m in at_once["roles"] if (m["role"], m["offset"]) == (means[0][0], 0))
    squares = [float(late**2) for late in LATE.values()]
    interval = ttest_1samp(squares, 0).confidence_interval()
    assert (begin["mean_low"], begin["mean_high"]) == pytest.approx(tuple(interval))


def test_reports_that_are_not_one_of_each_run_asked_alike_are_refused(
    train_payload: Callable[..., dict[str, Any]],
) -> None:
    runs, reports = forming_runs(train_payload)
    for given, said in (
        ([*runs[:2]], "is of none of the runs"),
        ([*runs], "a second bilinear-qk-match-separation of seed 1"),
    ):
        with pytest.raises(CircuitError, match=said):
            roles_of(given, [*reports, made_copy(reports[0])])
    with pytest.raises(CircuitError, match="`formed_value`: no lag is 3; expected one of 1, 2"):
        roles_of(runs, reports, formed_value=3)
    role_reports(runs[2], 3, half="even")
    with pytest.raises(CircuitError, match="was asked otherwise than of 1/bilinear"):
        roles_of(runs, reports)
    with pytest.raises(CircuitError, match="is of head-selection; expected a report of bilinear"):
        roles_of(runs, [made_report("a_report.json", "head-selection", {})])


def made_copy(report: Path) -> Path:
    copy = Path("copy") / report.name
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(report.read_text())
    return copy


def test_runs_of_another_recipe_or_of_one_seed_are_no_spread(
    train_payload: Callable[..., dict[str, Any]],
) -> None:
    first = plain_run("first", train_payload, 1, 0.5)
    for other, said in (
        (plain_run("again", train_payload, 1, 0.5), "again: has seed 1, as first has"),
        (plain_run("wider", train_payload, 2, 0.5, batch_size=4), "wider: is of another recipe"),
    ):
        with pytest.raises(CircuitError, match=said):
            spread_of([first, other])
    (first / "summary.json").unlink()
    with pytest.raises(CircuitError, match=r"first: holds no summary\.json; finish the run first"):
        spread_of([first])


@pytest.mark.parametrize("told", [{"formed_share": 0.5}, {"formed_value": 2}])
def test_what_is_aligned_on_nothing_is_refused(told: dict[str, Any]) -> None:
    with pytest.raises(CircuitError, match=f"`{next(iter(told))}`: .*no report to align"):
        run_report(SeedSpread, None, SeedSpreadOptions(runs=(Path("a"),), **told), "out")


def test_reports_outside_the_studys_folders_are_told_what_to_do() -> None:
    reports = seed_reports(7, "L1H3", "L1H3_to_L1MLP", wins=1.0, amount=2.0)
    place = reports[0].parent.rename("elsewhere") / reports[0].name
    said = r"names its seed; expected .* below a folder such as seed_0007; .* study seed-spread"
    with pytest.raises(CircuitError, match=said):
        compare_seeds([place])
