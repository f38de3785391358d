"""Edits as words, and what trainings with them say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from circuit.cli.complete import edit
from tiny_run import RUN

from circuit.core.edit import Edit
from circuit.errors import CircuitError
from circuit.page import formation_page
from circuit.reports.counterfactual_training import CounterfactualOptions, CounterfactualTraining
from circuit.reports.edits import KEYS, parse_edit, read_edits
from circuit.reports.report import run_report
from circuit.reports.written import read_report
from circuit.runs.opening import open_run
from circuit.trace.replay import ReplayedRun
from circuit.training.loop import train


def test_words_say_edits() -> None:
    word = "mine, drop=a, drop=b, weight=c*0.5, scale=weight_decay*-1e-1, steps=3:5"
    examples = {"a": 0.0, "b": 0.0, "c": 0.5}
    assert parse_edit(word, 0, 9) == ("mine", Edit(3, 5, examples, {"weight_decay": -0.1}))
    assert parse_edit("x,drop=a", 0, 9) == ("x", Edit(0, 9, {"a": 0.0}))
    word = (
        "all,replace=a->b,swap=2:4,pattern=L0H1,set=rate*0.5,set=clip*2,direction=momentum"
        ",freeze=L0H1.q,update=L1*0.5,clamp=*.W_E*0.1"
    )
    edit = Edit(
        0,
        9,
        replaced={"a": "b"},
        swapped=((2, 4),),
        patterns={"L0H1": 1.0},
        settings={"rate": 0.5, "clip": 2.0},
        direction={"momentum": 1.0},
        parameters={"L0H1.q": 0.0, "L1": 0.5},
        bounds={"*.W_E": 0.1},
    )
    assert parse_edit(word, 0, 9) == ("all", edit)
    assert all(f",{key}=" in f"{word},drop=,weight=,scale=,steps=" for key in KEYS)


def test_a_file_says_edits(tmp_path: Path) -> None:
    edit = Edit(3, 9, {"a": 0.0}, swapped=((4, 6),), settings={"rate": 2.0})
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps({"label": "x", "edit": edit.to_json()}) + "\n")
    assert read_edits(path) == {"x": edit}
    for line, said in (
        ("{", "no edit"),
        ("[]", "no edit"),
        ('{"label": "y", "edit": {"start": 3, "end": 9, "speed": 1}}', "speed"),
        ('{"label": "y", "edit": {"start": 3}}', r"no edit \(end: Field required\)"),
        ('{"label": "y", "edit": {"start": 9, "end": 3}}', "an edit of steps 9:3"),
        (path.read_text().strip(), "label 'x'; expected .*each label once"),
    ):
        other = tmp_path / "other.jsonl"
        other.write_text(path.read_text() + line)
        with pytest.raises(CircuitError, match=said) as refused:
            read_edits(other)
        assert "other.jsonl:2" in str(refused.value)


def test_an_edit_is_completed_behind_its_label() -> None:
    assert edit("x") == []
    assert edit("x,") == [f"x,{key}=" for key in sorted(KEYS)]
    assert edit("x,set=r") == ["x,set=rate*"]
    assert edit("x,drop=a,scale=weight") == ["x,drop=a,scale=weight_decay*"]


def options(traced: Path, *edits: str, **given: Any) -> CounterfactualOptions:
    asked = {
        "optimizer_trace_dir": traced,
        "probe_set": RUN / "analysis/probe_set.jsonl",
        "scalars": ("loss", "loss,scope=answer"),
        "start_step": 2,
        "end_step": 9,
        "edits": edits,
    }
    return CounterfactualOptions(**{**asked, **given})


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (("nothing,drop=a",), "label 'nothing'; expected another label"),
        (("x,drop=a", "x,drop=b"), "label 'x'; expected another label"),
        ((), "no edit; expected one"),
        (("x",), "'x'; expected label"),
        (("x,swap=3",), "swap=3; expected swap=STEP:STEP"),
        (("x,replace=a",), "'a'; expected replace=NAME->NAME"),
        (("x,lose=a",), "'x,lose=a'; expected label"),
        (("x,scale=weight_decay",), r"'scale=weight_decay'; expected scale=NAME\*FACTOR"),
        (("x,drop=a,steps=3",), "steps=3; expected steps=A:B"),
        (("x,drop=a,steps=1:2,steps=3:4",), "steps=1:2,steps=3:4; expected steps=A:B, once"),
        (("x,drop=a,weight=a*0.5",), "'a' twice; expected one factor for each"),
        (("x,scale=weight_decay*2,scale=weight_decay*0",), "'weight_decay' twice"),
        (("x,clamp=*",), r"`edits`: 'clamp=\*'; expected clamp=NAME\*FACTOR"),
        (("x,set=lr*0.5",), r"`edits`, key set: 'x,set=lr\*0.5': an edit of 'lr'; expected one of"),
    ],
)
def test_words_that_say_nothing_are_refused(edits: tuple[str, ...], said: str) -> None:
    with pytest.raises(CircuitError, match=said):
        options(Path("trace"), *edits)


def test_a_label_of_the_file_is_told_of_the_file(traced: Path, tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text('{"label": "a@7", "edit": {"start": 2, "end": 9, "terms": {"rest": 0.0}}}\n')
    asked = options(traced, "x,drop=a", edits_file=file, runs_dir=tmp_path)
    with pytest.raises(CircuitError, match="`edits_file`: label 'a@7'; expected letters"):
        run_report(CounterfactualTraining, open_run(RUN), asked, tmp_path / "out")


def test_a_word_may_leave_its_window_to_the_report() -> None:
    assert options(Path("trace"), "x,swap=305:310").edits == ("x,swap=305:310",)


def test_it_tells_of_every_edit_and_of_none(traced: Path, tmp_path: Path) -> None:
    (step,) = ReplayedRun.open(traced).replay(2, 3)
    edits = (f"less,drop={step.objective.ids[0]}", "no decay,scale=weight_decay*0,steps=8:9")
    asked = options(traced, *edits, runs_dir=tmp_path / "runs")
    result = run_report(CounterfactualTraining, open_run(RUN), asked, tmp_path / "out")
    for label, steps in (("less", [2, 9]), ("no decay", [8, 9])):
        left = open_run(tmp_path / "runs" / label)
        assert left.steps == steps
        assert left.trace.steps == list(range(steps[0], 10))
        with pytest.raises(CircuitError, match="is a counterfactual training, which goes on from"):
            train(left.config, resume=True)
        asked_for = [one.command for one in formation_page(tmp_path / "runs" / label).missing]
        assert not [command for command in asked_for if command.startswith("circuit train ")]
    assert result.summary["differing_bits"] == 0
    assert "2 trainings with an edit over steps 2:9" in result.law
    (table,) = result.tables
    changes = {(row["edit"], row["scalar"]): row["change"] for row in table.rows}
    assert len(changes) == 6
    assert all((change == 0) == (edit == "nothing") for (edit, _), change in changes.items())
    assert [row["steps"] for row in table.rows] == ["2:9"] * 4 + ["8:9"] * 2
    with pytest.raises(CircuitError, match="'x' is of steps 1:4; expected steps within 2:9"):
        run_report(
            CounterfactualTraining,
            open_run(RUN),
            options(traced, "x,scale=weight_decay*0,steps=1:4"),
            tmp_path / "other",
        )


def test_an_edit_of_nothing_is_named_before_any_is_trained(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ReplayedRun, "counterfactual")
    asked = options(traced, "x,scale=weight_decay*0", "y,drop=nobody")
    with pytest.raises(CircuitError, match="'y': example 'nobody' occurs in no step of 2:9"):
        run_report(CounterfactualTraining, open_run(RUN), asked, tmp_path / "out")


def test_a_training_that_diverges_in_its_last_step_is_told(traced: Path, tmp_path: Path) -> None:
    asked = options(traced, "x,update=**1e38,steps=8:9", replays=tmp_path / "replays")
    with pytest.raises(CircuitError, match="an edit of parameters over steps 8:9 has diverged"):
        run_report(CounterfactualTraining, open_run(RUN), asked, tmp_path / "out")


def test_workers_share_what_is_done(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each does its part; a start does what is missing, and ends with the rows of one alone."""
    edits = [Edit(at, 9, settings={"rate": 0.5}) for at in (6, 3, 8, 4)]
    lines = [json.dumps({"label": f"e{e.start}", "edit": e.to_json()}) + "\n" for e in edits]
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(lines))
    trained: list[int] = []
    train = ReplayedRun.counterfactual

    def counted(run: ReplayedRun, edit: Edit, end: int) -> Any:
        trained.append(edit.start)
        return train(run, edit, end)

    monkeypatch.setattr(ReplayedRun, "counterfactual", counted)

    def rows(name: str, **more: Any) -> bytes:
        asked = options(traced, edits_file=file, **more)
        run_report(CounterfactualTraining, open_run(RUN), asked, tmp_path / name)
        return (tmp_path / name / "counterfactual_training_rows.jsonl").read_bytes()

    folder = tmp_path / "replays"
    alone = rows("alone")
    assert trained == [2, 3, 4, 6, 8]  # nothing otherwise, then in the order of their starts
    trained.clear()
    rows("first", replays=folder, part="1/2")
    kept = folder / "replays.jsonl"
    with kept.open("ab") as handle:  # a worker was killed in a write
        handle.write(b'{"edit": {"st')
    rows("second", replays=folder, part="2/2")
    assert trained == [2, 3, 6, 2, 4, 8]
    trained.clear()
    assert rows("both", replays=folder) == alone
    assert trained == [2]
    gone = file.rename(tmp_path / "moved.jsonl")  # what is written is read all the same
    report = read_report(tmp_path / "both/counterfactual_training_report.json")
    assert len(CounterfactualTraining.tables(report.results)[0].rows) == 10
    gone.rename(file)
    with pytest.raises(CircuitError, match="trainings of another run, or values of other scalars"):
        rows("other", replays=folder, scalars=("loss",))
    for more in (  # of the same names
        {"splits": ("validation_iid",)},
        {"scalars": ("loss,scope=full_lm", "loss,scope=answer")},
    ):
        with pytest.raises(CircuitError, match="trainings of another run, or values of other sc"):
            rows("other", replays=folder, **more)
    for part in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(CircuitError, match=f"part '{part}'; expected i/n"):
            options(traced, "x,drop=a", part=part)
