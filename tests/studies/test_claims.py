"""Claims and comparison pages on synthetic results: a verdict follows its numbers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuit.artifacts import dump_rows
from circuit.errors import CircuitError
from circuit.studies.ablation import COMPARISON, ROOT
from circuit.studies.claims import Claim, claims_page, judge
from circuit.studies.commands import DONE
from circuit.studies.compare_optimizers import compare_optimizers
from circuit.studies.compare_seeds import compare_seeds
from circuit.studies.cross_seed import ROOT as SEEDS
from circuit.studies.jobs import report_file
from circuit.studies.scales import SCALES
from circuit.studies.study import Study

STUDY = Study(SCALES["short"])


def write(path: str | Path, payload: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(payload))


def claim(target: str, words: str) -> Claim:
    return next(c for c in judge(STUDY, Path(), target) if words in c.statement)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_reports_nothing_is_judged() -> None:
    claims = judge(STUDY, Path(), "paper")
    assert len(claims) >= 15
    assert {c.holds for c in claims} == {None}
    assert all(c.note for c in claims)


@pytest.mark.parametrize(
    ("accuracy", "shortcut", "holds"), [(0.97, 0.8, True), (0.85, 0.3, False), (0.93, 0.95, False)]
)
def test_learning_means_passing_the_shortcut_too(
    accuracy: float, shortcut: float, holds: bool
) -> None:
    found = {"answer_accuracy": accuracy, "shortcut_accuracy": shortcut}
    write(DONE, {"evaluations": {"validation_iid": found}})
    assert claim("reference", "learns the lookup").holds is holds


def optimizers(adamw: float, sgd: float, separation: tuple[float, float]) -> None:
    own = {"adamw_baseline": ("AdamW", adamw, separation[0]), "sgd": ("SGD", sgd, separation[1])}
    runs = {
        name: {
            "group": group,
            "run": name,
            "diverged": None,
            "answer_accuracy": accuracy,
            "best_answer_accuracy": accuracy,
            "qk_separation_last": match,
            "answer_logit_write_last": match,
        }
        for name, (group, accuracy, match) in own.items()
    }
    write(report_file(f"{ROOT}/comparison", COMPARISON), {"summary": {"runs": runs, "groups": {}}})


def test_sgd_falls_behind_only_where_adamw_has_learned() -> None:
    optimizers(0.98, 0.02, (8.0, 0.2))
    assert claim("ablation", "SGD at the contract").holds is True
    assert claim("ablation", "QK separation").holds is True
    optimizers(0.98, 0.7, (8.0, 5.0))
    assert claim("ablation", "SGD at the contract").holds is False
    assert claim("ablation", "QK separation").holds is False
    optimizers(0.02, 0.01, (0.5, 0.1))
    assert claim("ablation", "SGD at the contract").holds is None


def seed_reports(seed: int, head: str, path: str, *, wins: float, amount: float) -> list[Path]:
    window = {
        "start_step": 0,
        "end_step": 8,
        "actual": 2.0,
        "path": {"weight_decay": -0.5, "adam_current_gradient": 2.5, "rounding": 0.0},
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
            "selected": {role: {"path": path, "final_write": amount} for role in roles}
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
            "windows": [{**window, "scalar": "functional_write"}],
        },
    }
    paths = []
    for command, summary in summaries.items():
        paths.append(Path(f"seed_{seed:04}/{command}/report.json"))
        write(paths[-1], {"command": command, "summary": summary})
    return paths


def test_roles_repeat_and_addresses_move() -> None:
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=3.0)
    reports += seed_reports(13, "L2H1", "L1H1_to_L2MLP", wins=0.2, amount=2.0)
    result = compare_seeds(reports, f"{SEEDS}/comparison")
    assert result.summary["head_role_repeats"] == 1
    assert result.summary["same_layer_readers"] == 1
    assert claim("cross-seed", "matching role repeats").holds is False
    assert claim("cross-seed", "writing role repeats").holds is True
    assert claim("cross-seed", "its path moves").holds is True
    rows = Path(f"{SEEDS}/comparison/cross_seed_comparison_rows.jsonl").read_text()
    row = json.loads(rows.splitlines()[0])
    assert row["match_actual"] == 2.0, "the attribution of the winner, not of a control"
    lines = Path(f"{SEEDS}/comparison/winners.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines] == ["winner_head", "L1H3", "L2H1"]


def test_one_seed_shows_no_movement() -> None:
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=3.0)
    compare_seeds(reports, f"{SEEDS}/comparison")
    assert claim("cross-seed", "its address moves").holds is None


def test_a_seed_without_a_report_is_refused() -> None:
    reports = seed_reports(11, "L1H3", "L1H3_to_L1MLP", wins=0.9, amount=3.0)
    with pytest.raises(CircuitError, match="seed 11 has no report of head-selection"):
        compare_seeds(reports[1:], "out")
    with pytest.raises(CircuitError, match="a second head-selection of seed 11"):
        compare_seeds([*reports, reports[0]], "out")
    assert not Path("out").exists()


def finished_run(
    name: str, train_payload: Callable[..., dict[str, Any]], optimizer: Any, accuracy: list[float]
) -> Path:
    folder = Path(name)
    write(folder / "run_config.json", train_payload(name=name, optimizer=optimizer))
    write(folder / "summary.json", {})
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
        compare_optimizers(runs, "out")
    write(runs[1] / "outcome.json", {"name": "plain", "diverged": "training diverged at step 5"})
    found = compare_optimizers(runs, "out").summary
    assert found["runs"]["adamw"]["learned_at_step"] == 8
    assert found["groups"]["SGD"]["diverged"] == 1
    heavy = found["groups"]["SGD with momentum"]
    assert (heavy["best_run"], heavy["learned"]) == ("heavy", 0)
    assert found["runs"]["heavy"]["best_answer_accuracy"] == 0.4
    assert found["runs"]["adamw"]["qk_separation_last"] is None, "no audit, no number"


def test_the_page_counts_verdicts() -> None:
    claims = [
        Claim("reference", "a", True, {"x": 1.0}),
        Claim("reference", "b", None, {}, "not there"),
    ]
    text = "\n".join(claims_page(claims, "Claims"))
    assert "1 claims hold, 0 do not, 1 could not be judged." in text
    assert "| reference | b | ? | not there |" in text
