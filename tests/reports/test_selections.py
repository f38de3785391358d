"""Selections: the laws of the ranking, growth over a window, and writes against a naive loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from command_line import Done
from hypothesis import given
from hypothesis import strategies as st
from made_report import made_report

from circuit.artifacts import dump_rows, read_jsonl
from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.model.readout import read_answers
from circuit.options import Half
from circuit.reports.bilinear_qk_match_separation import MatchSeparation, SeparationOptions
from circuit.reports.head_selection import HeadSelection, HeadSelectionOptions
from circuit.reports.inputs import halved, open_inputs
from circuit.reports.ranking import name_roles, rank_candidates
from circuit.reports.report import ReportResult, run_report
from circuit.reports.write_path_selection import (
    WritePathOptions,
    WritePathSelection,
    final_writes,
    write_paths,
)
from circuit.scalars.answers import FIXED_SOURCE, Competitors, answer_scalars
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.functional_write import FunctionalWrite, WriteReads, readout_gradient
from circuit.tasks.base import Record
from circuit.train_config import TrainConfig

SCORES = st.dictionaries(
    st.text("HL0123456789", min_size=1, max_size=4), st.floats(-9, 9), min_size=3, max_size=20
)


@given(SCORES)
def test_roles_are_where_their_names_say(scores: dict[str, float]) -> None:
    roles = name_roles(rank_candidates(scores))
    ordered = sorted(scores.values(), reverse=True)
    assert scores[roles["winner"]] == ordered[0]
    assert scores[roles["runner_up"]] == ordered[1]
    assert scores[roles["bottom"]] == ordered[-1]
    above = sum(score > scores[roles["median"]] for score in ordered)
    below = sum(score < scores[roles["median"]] for score in ordered)
    assert max(above, below) <= (len(ordered) + 1) / 2


@given(SCORES, st.randoms())
def test_the_order_of_candidates_does_not_matter(scores: dict[str, float], chance: Any) -> None:
    names = list(scores)
    chance.shuffle(names)
    assert rank_candidates({name: scores[name] for name in names}) == rank_candidates(scores)


def test_two_candidates_are_too_few() -> None:
    with pytest.raises(CircuitError, match="at least three"):
        name_roles(["a", "b"])


def scan(growth: dict[str, float], steps: tuple[int, ...] = (0, 4, 8)) -> list[dict[str, Any]]:
    """Rows of a separation scan whose heads grow linearly; another score has the signs turned."""
    rows = []
    for head, slope in growth.items():
        for step in steps:
            for score, sign in (("rank8", 1), ("full", -1)):
                for lag, reads, beside in (("all", 4, 0.0), ("1", 3, 0.5), ("2", 1, -1.5)):
                    separation = 1 + sign * slope * step + beside
                    rows.append(
                        {
                            **{"step": step, "head": head, "score": score, "lag": lag},
                            **{"reads": reads, "separation": separation, "support_wins": 0.5},
                        }
                    )
    return rows


def select(rows: list[dict[str, Any]], **options: Any) -> ReportResult:
    """Selects from a scan that was written with these rows."""
    command = "bilinear-qk-match-separation"
    path = Path("scan/bilinear_qk_match_separation_rows.jsonl")
    made_report(path.with_name("bilinear_qk_match_separation_report.json"), command, {})
    path.write_text(dump_rows(rows))
    asked = {"start_step": 0, "end_step": 8, **options}
    chosen = HeadSelectionOptions(separation_rows=path, **asked)
    return run_report(HeadSelection, None, chosen, "out", overwrite=True)


GROWTH = {"L0H0": 1.0, "L0H1": 3.0, "L1H0": -1.0, "L1H1": 2.0}


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_elsewhere")
def test_heads_are_ranked_by_growth_between_the_ends_of_the_window_alone() -> None:
    selected = select(scan(GROWTH), start_step=4).summary["selected"]
    assert {role: (of["head"], of["growth"]) for role, of in selected.items()} == {
        "winner": ("L0H1", 12.0),
        "runner_up": ("L1H1", 8.0),
        "median": ("L0H0", 4.0),
        "bottom": ("L1H0", -4.0),
    }
    assert select(scan(GROWTH), score="full").summary["selected"]["winner"]["head"] == "L1H0"


@pytest.mark.usefixtures("_elsewhere")
def test_a_separation_that_its_lags_do_not_have_shows_in_the_law() -> None:
    rows = scan(GROWTH)
    assert select(rows).law.endswith("to 0")
    rows[0]["separation"] += 0.25
    assert select(rows).law.endswith("to 0.2")


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start_step": 3}, "rows.jsonl: step 3 was not scanned; .* the nearest: 0, 4; scan that"),
        ({"score": "rank4"}, "expected one of full, rank8"),
        ({"start_step": 8, "end_step": 4}, "window 8:4"),
    ],
)
def test_bad_windows_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CircuitError, match=said):
        select(scan(GROWTH), **changes)
    assert not list(Path("out").glob("*"))


@pytest.mark.usefixtures("_elsewhere")
def test_rows_of_another_report_are_refused() -> None:
    path = Path("scan/weight_svd_trace_rows.jsonl")
    made_report(path.with_name("weight_svd_trace_report.json"), "weight-svd-trace", {})
    path.write_text(dump_rows(scan(GROWTH)))
    asked = HeadSelectionOptions(separation_rows=path, start_step=0, end_step=8)
    with pytest.raises(CircuitError, match="holds rows of weight-svd-trace; expected rows of bil"):
        run_report(HeadSelection, None, asked, "out")


def halves(run: Path, **of_odd: Any) -> dict[str, ReportResult]:
    """A scan of each half of the probe records."""
    config, scans = load_config(run / "run_config.json", TrainConfig), {}
    for half, more in (("even", {}), ("odd", of_odd)):
        asked = SeparationOptions(
            probe_set=run / "analysis" / "probe_set.jsonl",
            checkpoint_dir=run / "checkpoints",
            ranks=(2,),
            **{"half": half, **more},
        )
        scans[half] = run_report(MatchSeparation, config, asked, half)
    return scans


def choose(even: ReportResult, odd: ReportResult) -> ReportResult:
    asked = HeadSelectionOptions(
        separation_rows=even.rows[0],
        held_out_rows=odd.rows[0],
        start_step=3,
        end_step=12,
        score="rank2",
    )
    return run_report(HeadSelection, None, asked, "out", overwrite=True)


def test_heads_that_one_half_chose_are_measured_on_the_other(trained: Path) -> None:
    scans = halves(trained)
    chosen = choose(scans["even"], scans["odd"])
    plain = HeadSelectionOptions(
        separation_rows=scans["even"].rows[0], start_step=3, end_step=12, score="rank2"
    )
    alone = run_report(HeadSelection, None, plain, "alone")
    heads = {role: of["head"] for role, of in chosen.summary["selected"].items()}
    assert heads == {role: of["head"] for role, of in alone.summary["selected"].items()}
    scanned, intervals = (read_jsonl(path) for path in scans["odd"].rows)
    there = {
        row["head"]: {**row, **of}
        for row, of in zip(scanned, intervals, strict=True)
        if (row["score"], row["lag"], row["step"]) == ("rank2", "all", 12)
    }
    for row in read_jsonl(chosen.rows[0]):
        for end in ("", "_low", "_high"):
            found = row[f"held_out_separation_at_end{end}"]
            assert found == there[row["head"]][f"separation{end}"]
    winner = chosen.summary["selected"]["winner"]
    assert f"its separation is {winner['held_out_separation_at_end']:.4g} (" in chosen.notes[1]
    assert [table.title for table in chosen.tables[2:]] == ["In the other half"]
    assert not any(name.startswith("held_out") for name in read_jsonl(alone.rows[0])[0])


def test_the_halves_of_a_probe_set_share_no_record_and_no_copy(trained: Path) -> None:
    scans = halves(trained)
    assert sum(scan.summary["reads"] for scan in scans.values()) == len(
        open_inputs(
            load_config(trained / "run_config.json", TrainConfig),
            trained / "analysis/probe_set.jsonl",
        ).reads()
    )
    own = [Record(f"r{i}", "s", (i,)) for i in range(5)]
    records = [*own, *(replace(r, sample_id=f"c{r.sample_id}", source_id=r.sample_id) for r in own)]
    even, odd = (halved(records, half) for half in get_args(Half))
    assert [r.sample_id for r in even] == ["r0", "r2", "r4", "cr0", "cr2", "cr4"]
    assert [r.sample_id for r in odd] == ["r1", "r3", "cr1", "cr3"]
    assert halved(records, None) == records
    # a copy whose source is not there goes by its own place, and others of that source with it
    copies = [*records[5:], replace(records[5], sample_id="again")]
    assert [r.sample_id for r in halved(copies, "even")] == ["cr0", "cr2", "cr4", "again"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"half": "even"}, "the scans are of even and even; expected one of even, one of odd"),
        ({"half": None}, "the scans are of even and both halves"),
        ({"layernorm_mode": "none"}, "the scans differ in layernorm_mode: head_ln1 and none"),
        ({"heads": ("L0H0",)}, "odd/.*rows.jsonl: no row of L0H1 at step 3"),
    ],
)
def test_scans_that_are_not_of_two_halves_are_refused(
    trained: Path, changes: dict[str, Any], said: str
) -> None:
    scans = halves(trained, **changes)
    with pytest.raises(CircuitError, match=said):
        choose(scans["even"], scans["odd"])


def test_the_command_line_names_the_scan_s_option(circuit: Callable[..., Done]) -> None:
    select(scan(GROWTH))
    rows = "scan/bilinear_qk_match_separation_rows.jsonl"
    window = ("--start-step", "0", "--end-step", "8", "--output-dir", "held_out")
    held_out = ("--separation-rows", rows, "--held-out-rows", rows)
    done = circuit("study", "select-heads", *held_out, *window)
    assert done.code == 2
    assert "make one with --half even and one with --half odd" in done.err


def options(run: Path, **more: Any) -> WritePathOptions:
    return WritePathOptions(
        probe_set=run / "analysis" / "probe_set.jsonl",
        checkpoint=run / "checkpoints" / "step_000012.pt",
        min_pairs_per_type=1,
        **more,
    )


@pytest.mark.parametrize("role", ["prediction", "value_distractors"])
@pytest.mark.parametrize("rows_a_pass", [512, 7])
def test_scan_equals_one_path_at_a_time(
    trained: Path, role: str, rows_a_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circuit.reports.write_path_selection._ROWS", rows_a_pass)
    config = load_config(trained / "run_config.json", TrainConfig)
    chosen = options(trained, max_pairs_per_type=5)
    study = open_inputs(config, chosen.probe_set)
    batch = study.side(study.pairs(chosen), "clean")
    (point,) = study.models([chosen.checkpoint])
    values = study.vocabulary.value_ids
    found = final_writes(point.model, batch, role, values)
    paths = write_paths(point.model)
    assert list(found) == [str(path) for path in paths]
    assert len(paths) == 2 * 1 + 2 * 2  # two heads a layer, two layers
    reads = WriteReads.of(batch, role)
    logits = point.model(batch.tokens)[batch.row, batch.at]
    own = read_answers(logits.detach(), batch.answer, values).competitor
    scalar = partial(_margin, answer=batch.answer, own=own, values=values)
    for path in paths:
        gradient = readout_gradient(point.model, reads, path, path.output_stage, scalar)
        write = FunctionalWrite(path, reads, gradient, layers=2)
        naive = evaluate_scalar(write, point.model).detach().double()
        torch.testing.assert_close(found[str(path)], naive, rtol=1e-4, atol=1e-6)


def _margin(logits: Any, *, answer: Any, own: Any, values: range) -> Any:
    return answer_scalars(logits, answer, Competitors(own, own), values)[FIXED_SOURCE]


def test_the_winner_is_the_path_with_the_largest_write(trained: Path) -> None:
    config = load_config(trained / "run_config.json", TrainConfig)
    result = run_report(WritePathSelection, config, options(trained), "out")
    writes = {row["path"]: row["final_write"] for row in read_jsonl(result.rows[0])}
    winner = dict(result.summary["selected"]["winner"])
    low, high = (winner.pop(f"final_write_{end}") for end in ("low", "high"))
    assert low < winner["final_write"] < high
    assert winner == {
        "path": max(writes, key=lambda path: writes[path]),
        "final_write": max(writes.values()),
    }
    assert "ablated in one batch" in result.law
