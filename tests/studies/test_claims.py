"""Claims on synthetic results: a verdict follows its numbers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_report import made_report

from circuit.artifacts import dump_json, dump_rows
from circuit.errors import CircuitError
from circuit.reports.claims_comparison import read_claims
from circuit.reports.comparisons import Comparison
from circuit.reports.cross_seed_comparison import CrossSeedComparison
from circuit.reports.optimizer_comparison import OptimizerComparison
from circuit.studies.ablation import ROOT
from circuit.studies.claims import (
    Claim,
    claims_document,
    claims_page,
    judge,
    statements,
)
from circuit.studies.commands import DONE, SPARSE
from circuit.studies.configs import FORMATION, scaled
from circuit.studies.cross_seed import ROOT as SEED_ROOT
from circuit.studies.jobs import report_file
from circuit.studies.scales import SCALES, find_scale
from circuit.studies.study import Study

STUDY = Study(SCALES["short"])
OPTIMIZERS = report_file(f"{ROOT}/comparison", OptimizerComparison.command)


def claim(target: str, words: str, study: Study = STUDY) -> Claim:
    return next(c for c in judge(study, Path(), target) if words in c.statement)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_reports_nothing_is_judged() -> None:
    claims = judge(STUDY, Path(), "paper")
    assert len(claims) >= 15
    assert {c.holds for c in claims} == {None}
    assert all(c.note.endswith("is not there") for c in claims)


def test_every_claim_compares_its_own_numbers_and_states_its_thresholds() -> None:
    named = {c.name for c in statements()}
    for entry in statements():
        assert "{" not in entry.sentence
        tests = [*entry.tests, *([entry.given] if entry.given not in ("", *named) else [])]
        for test in map(Comparison.parse, tests):
            assert {test.number, test.times, test.minus} <= {"", *entry.numbers}
    sentence = next(c.sentence for c in statements() if c.name == "adamw_learns")
    assert sentence.endswith("at least 90 %")


@pytest.mark.parametrize(
    ("test", "holds"),
    [
        ("a >= 2 * b", True),
        ("a > 2 * b", False),
        ("a - b == 1.5", True),
        ("b < a", True),
        ("a <= 2.5", False),
    ],
)
def test_comparisons(test: str, holds: bool) -> None:
    assert Comparison.parse(test).holds({"a": 3.0, "b": 1.5}) is holds


@pytest.mark.parametrize(
    ("accuracy", "shortcut", "holds"), [(0.97, 0.8, True), (0.85, 0.3, False), (0.93, 0.95, False)]
)
def test_learning_means_passing_the_shortcut_too(
    accuracy: float, shortcut: float, holds: bool
) -> None:
    path = Path(DONE)
    path.parent.mkdir(parents=True)
    found = {"answer_accuracy": accuracy, "shortcut_accuracy": shortcut}
    row = {"kind": "evaluation", "split": "validation_iid", "step": 8, **found}
    rows = dump_rows([row | {"step": 4, "answer_accuracy": 0.5}, row])
    path.with_name("metrics.jsonl").write_text(rows)
    retouched = {"answer_accuracy": 0.99, "shortcut_accuracy": 0.0}
    path.write_text(json.dumps({"steps": 8, "evaluations": {"validation_iid": retouched}}))
    said = claim("reference", "learns the lookup")
    assert (said.holds, said.numbers["answer_accuracy"]) == (holds, accuracy)
    path.with_name("metrics.jsonl").write_text(rows.splitlines(keepends=True)[0])
    with pytest.raises(CircuitError, match="has no answer accuracy"):
        claim("reference", "learns the lookup")


@pytest.mark.parametrize("accuracy", ["0.97", None, True, []])
def test_an_evaluation_that_is_no_number_is_damaged(accuracy: Any) -> None:
    path = Path(SPARSE, "evaluation/best.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"evaluations": {"heldout_pairs": {"answer_accuracy": accuracy}}}))
    with pytest.raises(CircuitError, match=r"best.json: has no heldout answer accuracy.*no number"):
        judge(STUDY, Path(), "reference")


def optimizers(adamw: float, sgd: float, separation: tuple[float | None, float]) -> None:
    own = {"adamw_baseline": ("AdamW", adamw, separation[0]), "sgd": ("SGD", sgd, separation[1])}
    own["adamw_beta1_0"] = ("AdamW", adamw, separation[0])
    runs = {
        name: {
            **{"group": group, "run": name, "diverged": None},
            **dict.fromkeys(("answer_accuracy", "best_answer_accuracy"), accuracy),
            **dict.fromkeys(("qk_separation_last", "answer_logit_write_last"), match),
        }
        for name, (group, accuracy, match) in own.items()
    }
    made_report(OPTIMIZERS, OptimizerComparison.command, {"runs": runs, "groups": {}})


def test_sgd_falls_behind_only_where_adamw_has_learned() -> None:
    optimizers(0.98, 0.02, (8.0, 0.2))
    assert claim("ablation", "SGD at the contract").holds is True
    assert claim("ablation", "QK separation").holds is True
    optimizers(0.98, 0.7, (8.0, 5.0))
    assert claim("ablation", "SGD at the contract").holds is False
    assert claim("ablation", "QK separation").holds is False
    optimizers(0.02, 0.01, (0.5, 0.1))
    assert claim("ablation", "SGD at the contract").holds is None


def test_what_the_scale_cannot_show_is_not_judged() -> None:
    optimizers(0.98, 0.02, (None, 0.2))
    assert claim("ablation", "QK separation").note == "adamw baseline is not defined at this scale"
    smoke = Study(SCALES["smoke"])
    assert (
        claim("ablation", "without momentum", smoke).note == "this scale has no run adamw_beta1_0"
    )


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[:-9])


def _retouched(path: Path) -> None:
    path.write_text(path.read_text().replace("0.02", "0.03"))


def _with_text(path: Path) -> None:
    summary = json.loads(path.read_text())["summary"]
    summary["runs"]["adamw_baseline"]["answer_accuracy"] = "0.98"
    made_report(path, OptimizerComparison.command, summary)


def _without_a_key(path: Path) -> None:
    made_report(path, OptimizerComparison.command, {"groups": {}})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "not valid JSON"),
        (_retouched, "was changed after it was written"),
        (_with_text, "has no answer accuracy .*is no number"),
        (_without_a_key, "has no answer accuracy"),
    ],
)
def test_a_damaged_report_is_an_error(damage: Callable[[Path], Any], said: str) -> None:
    optimizers(0.98, 0.02, (8.0, 0.2))
    damage(Path(OPTIMIZERS))
    with pytest.raises(CircuitError, match=said):
        judge(STUDY, Path(), "ablation")


def seeds(**summary: Any) -> None:
    command = CrossSeedComparison.command
    made_report(report_file(f"{SEED_ROOT}/comparison", command), command, SUMMARY | summary)


SUMMARY = {
    **{"seeds": [11, 13], "head_role_repeats": 1, "write_role_repeats": 2},
    **{"head_addresses": ["L1H3"], "path_addresses": ["L1H3_to_L1MLP", "L1H1_to_L2MLP"]},
    **{"worst_match_closure": 0.002, "worst_write_closure": 0.02},
    "largest_raw_sgd_share": 0.02,
}


def test_roles_repeat_and_addresses_move() -> None:
    seeds()
    assert claim("cross-seed", "matching role repeats").holds is False
    assert claim("cross-seed", "writing role repeats").holds is True
    assert claim("cross-seed", "its address moves").holds is False
    assert claim("cross-seed", "raw SGD").holds is True
    assert claim("cross-seed", "its path moves").holds is True
    assert claim("cross-seed", "attributions of the winners").holds is False
    seeds(seeds=[11])
    assert claim("cross-seed", "its path moves").note == "one seed cannot show it"


def test_the_page_counts_verdicts() -> None:
    claims = [
        Claim("reference", "a", True, {"x": 1.0}),
        Claim("reference", "b", None, {}, "not there"),
    ]
    text = "\n".join(claims_page(claims, "Claims"))
    assert "1 claims hold, 0 do not, 1 could not be judged." in text
    assert "| reference | b | ? | not there |" in text


def test_the_file_of_claims_says_of_which_study_they_are() -> None:
    files = []
    for seed in (11, 13):
        study = Study(find_scale("short", seed=seed))
        config = Path(str(seed), FORMATION)
        config.parent.mkdir(parents=True)
        config.write_text(scaled(FORMATION, study.scale))
        judged = judge(study, Path(), "paper")
        files.append(Path(f"claims_{seed}.json"))
        written = claims_document(study, Path(str(seed)), "paper", judged)
        files[-1].write_text(dump_json(written))
    read = read_claims(files)
    assert list(read) == [11, 13]
    assert [one["statement"] for one in read[13]["claims"]] == [c.statement for c in judged]
