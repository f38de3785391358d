"""Intervals of scalar pair rows: chosen by steps, and refused by name where they do not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from circuit.artifacts import dump_rows, read_jsonl
from circuit.scalars.interval_ends import read_intervals

RUN = Path("runs/tiny")
PROBE = RUN / "analysis" / "probe_set.jsonl"
ROWS = Path("answers") / "answer_scalar_residual_diagnosis_pair_rows.jsonl"
OUTPUT = Path("out")
STUDY = ("--config", str(RUN / "run_config.json"), "--probe-set", str(PROBE))
COMMAND = (
    *("mlp-input-functional-subspace-report", *STUDY, "--scalar-pair-rows", str(ROWS)),
    *("--output-dir", str(OUTPUT), "--source-component", "L0H1", "--component", "L0MLP"),
    *("--endpoint-role", "target", "--subspace-rank", "3"),
)
INTERVALS = [(3, 6), (6, 9), (9, 12)]
Circuit = Callable[..., Any]
Rows = list[dict[str, Any]]


@pytest.fixture
def rows(diagnosed_once: Path, trained: Path) -> Rows:
    """Pair rows of three intervals, two pair types and both sides, also in a file."""
    shutil.copytree(diagnosed_once, ROWS.parent)
    return read_jsonl(ROWS)


def test_steps_choose_intervals(rows: Rows) -> None:
    for start, end, expected in (
        (6, None, INTERVALS[1:]),
        (None, 9, INTERVALS[:2]),
        (4, 9, [(6, 9)]),
    ):
        found = read_intervals(
            ROWS, pair_types=["recency"], side="corrupted", start_step=start, end_step=end
        )
        assert list(found.by_steps) == expected
        assert {row.pair_type for row in found.first} == {"recency"}
        assert {row.margin_side for row in found.first} == {"corrupted"}
        for one, other in pairwise(found.by_steps.values()):
            assert [row.pair_id for row in one] == [row.pair_id for row in other]


def test_rows_that_do_not_fit_are_refused_by_name(circuit: Circuit, rows: Rows) -> None:
    mine = [r for r in rows if (r["margin_side"], r["pair_type"]) == ("clean", "support_value")]
    last, first = mine[-1], mine[0]
    name = f"{last['source_step']} -> {last['target_step']}, {last['pair_id']}, clean"
    without = [row for row in rows if row is not last]
    renamed = [
        row | {"pair_id": "support_value:nowhere:0:V000"}
        if row["pair_id"] == first["pair_id"] and row["margin_side"] == "clean"
        else row
        for row in rows
    ]
    other = [row | {"answer": row["answer"] + 1} if row is last else row for row in rows]
    outside = [
        row | {"source_competitor": 3, "switched": True} if row is last else row for row in rows
    ]
    two = [row | {"target_digest": "0" * 64} if row is last else row for row in rows]
    for changed, message in (
        (without, f"no row of {name}"),
        (renamed, "does not give the pair of row 3 -> 6, support_value:nowhere:0:V000, clean"),
        (other, f"row {name} has answer"),
        (outside, f"row {name} has competitor 3, which is no value"),
        (two, f"and {name} name different weights for step 12"),
    ):
        ROWS.write_text(dump_rows(changed))
        done = circuit(*COMMAND)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert message in done.err
        assert not OUTPUT.exists()


def test_a_checkpoint_with_other_weights_is_refused_by_row(circuit: Circuit, rows: Rows) -> None:
    """As if step 6 had been trained again since the diagnosis."""
    changed = [
        row | {f"{end}_digest": "0" * 64 for end in ("source", "target") if row[f"{end}_step"] == 6}
        for row in rows
    ]
    ROWS.write_text(dump_rows(changed))
    done = circuit(*COMMAND)
    assert (done.code, done.err.count("\n")) == (2, 1)
    row = f"the row of 3 -> 6, {rows[0]['pair_id']}, clean"
    assert f"{row} was made from other weights than {RUN}/checkpoints/step_000006.pt" in done.err
    assert not OUTPUT.exists()
