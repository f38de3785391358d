"""Row files between commands: what is written is read back, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuit.artifacts import dump_rows
from circuit.errors import CircuitError
from circuit.schemas import (
    SWITCH_BUCKETS,
    IntervalRow,
    RouteRow,
    ScalarPairRow,
    find_checkpoint,
    names_of,
    read_typed_rows,
    run_relative,
)


def scalar_row(**changes: Any) -> dict[str, Any]:
    values = {"correct_value_logit": 1.5}
    row: dict[str, Any] = {
        **place(),
        "source_checkpoint": "checkpoints/step_000003.pt",
        "target_checkpoint": "checkpoints/step_000006.pt",
        "split": "validation_iid",
        "answer": 9,
        "source_competitor": 10,
        "target_competitor": 11,
        "switched": True,
        **dict.fromkeys(("source_values", "target_values", "deltas"), values),
        **dict.fromkeys(("first_order", "curvature", "switch"), values),
        "source_top_wrong": [{"token": 10, "logit": 0.5}],
        "target_top_wrong": [{"token": 11, "logit": 0.25}],
    }
    return {**row, **changes}


def place() -> dict[str, Any]:
    return {
        "source_step": 3,
        "target_step": 6,
        "source_digest": "aa",
        "target_digest": "bb",
        "pair_id": "support_value:x:0:V001",
        "pair_type": "support_value",
        "margin_side": "clean",
    }


def route_row(**changes: Any) -> dict[str, Any]:
    scores = {"ov": 1.0, "qk": -2.0}
    row = {
        **place(),
        **dict.fromkeys(
            ("source_route_scores", "target_route_scores", "route_score_deltas"), scores
        ),
        "target_scalar": "moving_answer_margin",
        "source_value": 1.0,
        "target_value": 3.0,
        "delta": 2.0,
    }
    return {**row, **changes}


MAKERS = [(ScalarPairRow, scalar_row), (RouteRow, route_row)]
Maker = Callable[..., dict[str, Any]]


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(dump_rows(rows))
    return path


@pytest.mark.parametrize(("kind", "make"), MAKERS)
def test_rows_survive_the_file_in_their_order(
    tmp_path: Path, kind: type[IntervalRow], make: Maker
) -> None:
    sides = [kind.model_validate(make(margin_side=side)) for side in ("corrupted", "clean")]
    path = written(tmp_path, *(row.model_dump() for row in sides))
    assert read_typed_rows(path, kind) == sides


@pytest.mark.parametrize(("kind", "make"), MAKERS)
def test_a_row_that_stands_there_twice_counts_once(
    tmp_path: Path, kind: type[IntervalRow], make: Maker
) -> None:
    assert len(read_typed_rows(written(tmp_path, make(), make()), kind)) == 1


@pytest.mark.parametrize(("kind", "make"), MAKERS)
@pytest.mark.parametrize("change", [{"target_digest": "cc"}, {"pair_type": "recency"}])
def test_different_rows_of_one_key_are_refused_by_name(
    tmp_path: Path, kind: type[IntervalRow], make: Maker, change: dict[str, str]
) -> None:
    path = written(tmp_path, make(), make(margin_side="corrupted"), make(**change))
    with pytest.raises(CircuitError, match="differs from line 1") as caught:
        read_typed_rows(path, kind)
    assert caught.value.where == f"{path}:3"
    assert "3 -> 6, support_value:x:0:V001, clean" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (ScalarPairRow, route_row(), "field 'source_checkpoint'"),
        (RouteRow, scalar_row(), "field 'source_route_scores'"),
        (ScalarPairRow, scalar_row(answer="9"), "field 'answer'"),
        (ScalarPairRow, scalar_row(extra=1), "field 'extra'"),
        (ScalarPairRow, scalar_row(margin_side="left"), "field 'margin_side'"),
        (ScalarPairRow, scalar_row(switched=False), "'switched' contradicts the competitors"),
        (ScalarPairRow, scalar_row(deltas={}), "'source_values' and 'deltas'"),
        (ScalarPairRow, scalar_row(curvature={"x": 1.0}), "'curvature' and 'deltas'"),
        (ScalarPairRow, scalar_row(target_step=3), "3 -> 3 are no interval"),
        (RouteRow, route_row(target_route_scores={"ov": 1.0}), "'target_route_scores' and"),
        (RouteRow, route_row(delta="2"), "field 'delta'"),
    ],
)
def test_a_wrong_row_is_named_with_its_line_and_field(
    tmp_path: Path, kind: type[IntervalRow], row: dict[str, Any], message: str
) -> None:
    good = (scalar_row if kind is ScalarPairRow else route_row)(pair_id="other")
    path = written(tmp_path, good, row)
    with pytest.raises(CircuitError) as caught:
        read_typed_rows(path, kind)
    assert message in str(caught.value)
    assert caught.value.where == f"{path}:2"


def test_an_empty_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match="holds no row; expected rows of route-to-margin"):
        read_typed_rows(written(tmp_path), RouteRow)
    with pytest.raises(CircuitError, match="no such file"):
        read_typed_rows(tmp_path / "none.jsonl", RouteRow)


def test_every_row_is_in_one_of_the_two_narrow_buckets() -> None:
    for target, bucket in ((11, "competitor_switch"), (10, "same_competitor")):
        row = scalar_row(target_competitor=target, switched=target != 10)
        found = ScalarPairRow.model_validate(row)
        assert [name for name in SWITCH_BUCKETS if found.in_bucket(name)] == ["all", bucket]


def test_names_are_those_that_all_rows_hold() -> None:
    assert names_of([{"b": 1.0, "a": 2.0}, {"a": 0.0, "b": 1.0}], "routes", "x") == ["b", "a"]
    with pytest.raises(CircuitError, match="x: rows hold different routes: 'c' is not in all"):
        names_of([{"a": 1.0}, {"a": 1.0, "c": 2.0}], "routes", "x")


def test_a_checkpoint_is_found_again_after_the_run_was_moved(tmp_path: Path) -> None:
    run, rows = tmp_path / "run", tmp_path / "run" / "analysis" / "a" / "rows.jsonl"
    checkpoint = run / "checkpoints" / "step_000003.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    name = run_relative(checkpoint, run)
    assert name == "checkpoints/step_000003.pt"
    assert find_checkpoint(name, run, "elsewhere.jsonl") == checkpoint
    moved = run.rename(tmp_path / "moved")
    found = find_checkpoint(name, run, moved / rows.relative_to(run))
    assert found.resolve() == (moved / name).resolve()
    with pytest.raises(CircuitError, match="no checkpoint 'checkpoints/step_000003"):
        find_checkpoint(name, run, "elsewhere.jsonl")


def test_a_step_that_a_trace_can_make_need_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "trace" / "checkpoints").mkdir(parents=True)
    name = "trace/checkpoints/step_000007.pt"
    assert find_checkpoint(name, tmp_path, "rows.jsonl") == tmp_path / name
