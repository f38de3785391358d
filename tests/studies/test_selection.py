"""Selections: the laws of the ranking, and the write scan against a naive loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit.artifacts import dump_rows
from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.model.readout import read_answers
from circuit.reports.inputs import PairOptions, open_inputs
from circuit.scalars.answers import FIXED_SOURCE, Competitors, answer_scalars
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.functional_write import FunctionalWrite, WriteReads, readout_gradient
from circuit.studies.selection import growth_of, name_roles, rank_candidates, select_heads
from circuit.studies.write_scan import final_writes, write_paths
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
    """Rows of a separation scan whose heads grow linearly; other scores and lags mislead."""
    rows = []
    for head, slope in growth.items():
        for step in steps:
            for score, lag, sign in (("rank8", "all", 1), ("full", "all", -1), ("rank8", "1", -1)):
                own = {"separation": 1 + sign * slope * step, "support_wins": 0.5}
                rows.append({"step": step, "head": head, "score": score, "lag": lag, **own})
    return rows


def test_growth_is_between_the_ends_of_the_window_alone() -> None:
    found = growth_of(scan({"L0H0": 1.0, "L0H1": -2.0}), "rank8", 4, 8)
    assert {head: of["growth"] for head, of in found.items()} == {"L0H0": 4.0, "L0H1": -8.0}


def test_selected_heads_are_written(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(dump_rows(scan({"L0H0": 1.0, "L0H1": 3.0, "L1H0": -1.0, "L1H1": 2.0})))
    result = select_heads(rows, tmp_path / "out", start=0, end=8)
    selected = result.summary["selected"]
    assert {role: of["head"] for role, of in selected.items()} == {
        "winner": "L0H1",
        "runner_up": "L1H1",
        "median": "L0H0",
        "bottom": "L1H0",
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start": 3}, "no row of L0H0 at step 3"),
        ({"score": "rank4"}, "expected one of full, rank8"),
        ({"start": 8, "end": 4}, "window 8:4"),
    ],
)
def test_bad_windows_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(dump_rows(scan({"L0H0": 1.0, "L0H1": 3.0, "L1H0": -1.0})))
    with pytest.raises(CircuitError, match=said):
        select_heads(rows, tmp_path / "out", **{"start": 0, "end": 8, **changes})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["prediction", "value_distractors"])
@pytest.mark.parametrize("rows_a_pass", [512, 7])
def test_scan_equals_one_path_at_a_time(
    trained: Path, role: str, rows_a_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circuit.studies.write_scan._ROWS", rows_a_pass)
    config = load_config(trained / "run_config.json", TrainConfig)
    study = open_inputs(config, trained / "analysis" / "probe_set.jsonl")
    batch = study.side(study.pairs(PairOptions(max_per_type=5, min_per_type=1)), "clean")
    (point,) = study.models([trained / "checkpoints" / "step_000012.pt"])
    values = study.vocabulary.value_ids
    found = final_writes(point.model, batch, role, values)
    paths = write_paths(point.model)
    assert list(found) == [str(path) for path in paths]
    assert len(paths) == 2 * 1 + 2 * 2  # two heads a layer, two layers
    reads = WriteReads.of(batch, role)
    logits = point.model(batch.tokens)[batch.reads.row, batch.reads.key_pos]
    own = read_answers(logits.detach(), batch.reads.answer, values).competitor
    scalar = partial(_margin, answer=batch.reads.answer, own=own, values=values)
    for path in paths:
        gradient = readout_gradient(point.model, reads, path, path.output_stage, scalar)
        write = FunctionalWrite(path, reads, gradient, layers=2)
        naive = evaluate_scalar(write, point.model).detach().double()
        torch.testing.assert_close(found[str(path)], naive, rtol=1e-4, atol=1e-6)


def _margin(logits: Any, *, answer: Any, own: Any, values: range) -> Any:
    return answer_scalars(logits, answer, Competitors(own, own), values)[FIXED_SOURCE]


def test_the_command_names_the_largest_write(circuit: Callable[..., Any], trained: Path) -> None:
    words = (
        *("study", "select-write-paths", "--config", str(trained / "run_config.json")),
        *("--probe-set", str(trained / "analysis" / "probe_set.jsonl")),
        *("--checkpoint", str(trained / "checkpoints" / "step_000012.pt")),
        *("--min-pairs-per-type", "1", "--output-dir", "out", "--json"),
    )
    done = circuit(*words)
    assert done.code == 0, done.err
    rows = Path("out/write_path_selection_rows.jsonl").read_bytes()
    selected = done.payload["summary"]["selected"]
    writes = [of["final_write"] for of in selected.values()]
    assert writes == sorted(writes, reverse=True)
    again = circuit(*words)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert circuit(*words, "--overwrite").code == 0
    assert Path("out/write_path_selection_rows.jsonl").read_bytes() == rows
