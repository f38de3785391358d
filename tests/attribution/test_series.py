"""Series: sums, windows and closure errors, against plain loops over the rows."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit.artifacts import dump_json
from circuit.attribution.series import Series, check_windows
from circuit.errors import CircuitError

TERMS = ("weight_decay", "current_gradient", "historical_momentum", "rounding")
GROUPS = ("embed", "L0H0.q", "L0.mlp")
Rows = list[dict[str, Any]]


def made_rows(seed: int, steps: int, *, first: int = 1, still: bool = False) -> Rows:
    """Rows of two scalars; `a` telescopes, and nothing moves it where `still`."""
    rng = np.random.default_rng(seed)
    rows, value = [], 1.0
    for step in range(first, first + steps):
        for scalar in ("a", "b"):
            shares = {
                group: {kind: rng.normal(size=4).tolist() for kind in ("first_order", "path")}
                for group in GROUPS
            }
            if still and scalar == "a":
                shares = {g: {k: [0.0] * 4 for k in kinds} for g, kinds in shares.items()}
            total = {
                kind: [math.fsum(shares[g][kind][i] for g in GROUPS) for i in range(4)]
                for kind in ("first_order", "path")
            }
            moved = 0.0 if still and scalar == "a" else float(rng.normal())
            before = value if scalar == "a" else float(rng.normal())
            row = {
                "step": step,
                "scalar": scalar,
                "lr": 0.1,
                "clip_factor": float(rng.uniform()),
                "telescopes": scalar == "a",
                "before": before,
                "after": before + moved,
                "actual": moved,
                **{kind: dict(zip(TERMS, total[kind], strict=True)) for kind in total},
                "references": {"raw_sgd": float(rng.normal())},
                "groups": {
                    "circuit": {
                        group: {
                            kind: dict(zip(TERMS, values, strict=True))
                            for kind, values in kinds.items()
                        }
                        for group, kinds in shares.items()
                    }
                },
            }
            value = row["after"] if scalar == "a" else value
            rows.append(row)
    return rows


def close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-10)


@given(st.integers(0, 1000), st.integers(1, 9))
def test_the_summary_is_the_loops(seed: int, steps: int) -> None:
    rows = made_rows(seed, steps, first=8)
    for name, series in Series.collect(rows).items():
        own = [row for row in rows if row["scalar"] == name]
        found = series.summary()
        assert (found["start_step"], found["end_step"]) == (7, 7 + steps)
        assert found["value_at_start"] == own[0]["before"]
        assert found["value_at_end"] == own[-1]["after"]
        actual = sum(row["after"] - row["before"] for row in own)
        assert close(found["actual"], actual)
        for kind in ("first_order", "path"):
            total = 0.0
            for term in TERMS:
                share = sum(row[kind][term] for row in own)
                total += share
                assert close(found[kind][term], share)
                for group in GROUPS:
                    part = sum(row["groups"]["circuit"][group][kind][term] for row in own)
                    assert close(found["groups"]["circuit"][group][kind][term], part)
            assert close(found["predicted"][kind], total)
            absolute = moved = matches = 0.0
            for row in own:
                predicted = sum(row[kind].values())
                change = row["after"] - row["before"]
                absolute += abs(predicted - change)
                moved += abs(change)
                matches += (predicted > 0) == (change > 0)
            assert close(found["closure"][kind], abs(total - actual) / abs(actual))
            assert close(found["closure"][f"{kind}_absolute"], absolute / moved)
            assert close(found["sign_matches"][kind], matches / steps)
        assert close(found["references"]["raw_sgd"], sum(r["references"]["raw_sgd"] for r in own))
        assert close(found["mean_clip_factor"], sum(r["clip_factor"] for r in own) / steps)
        if series.telescopes:
            assert close(found["actual"], found["value_at_end"] - found["value_at_start"])


def sums(summary: dict[str, Any]) -> list[float]:
    """Every number of a summary that adds up over windows."""
    found = [summary["actual"], *summary["predicted"].values(), *summary["references"].values()]
    for kinds in (summary, *summary["groups"]["circuit"].values()):
        found += [value for kind in ("first_order", "path") for value in kinds[kind].values()]
    return found


@given(st.integers(0, 1000), st.lists(st.integers(0, 12), min_size=3, max_size=3, unique=True))
def test_windows_add_up(seed: int, cuts: list[int]) -> None:
    a, b, c = sorted(cuts)
    for series in Series.collect(made_rows(seed, 12)).values():
        one, other, both = (
            sums(series.window(*window).summary()) for window in ((a, b), (b, c), (a, c))
        )
        assert all(close(x + y, z) for x, y, z in zip(one, other, both, strict=True))
        assert series.window(a, c).window(a, b).summary() == series.window(a, b).summary()
        assert series.window(0, 12).summary() == series.summary()


def test_a_series_is_its_rows_wherever_they_were_cut() -> None:
    rows = made_rows(3, 9)
    whole = Series.collect(rows)["b"]
    tail = Series.collect(row for row in rows if row["step"] > 4)["b"]
    assert tail.summary() == whole.window(4, 9).summary()


def test_scalars_and_groups_keep_their_order_and_names() -> None:
    rows = made_rows(0, 3)
    found = Series.collect(rows)
    assert list(found) == ["a", "b"]
    assert [series.telescopes for series in found.values()] == [True, False]
    for name, series in found.items():
        for number, row in enumerate(row for row in rows if row["scalar"] == name):
            for group, kinds in row["groups"]["circuit"].items():
                for kind, terms in kinds.items():
                    for term, share in terms.items():
                        assert series.groups["circuit"][group][kind][term][number] == share


def test_where_nothing_moved_the_closure_is_null() -> None:
    series = Series.collect(made_rows(0, 4, still=True))["a"]
    summary = series.summary()
    assert set(summary["closure"].values()) == {None}
    assert summary["sign_matches"] == {"first_order": 1.0, "path": 1.0}
    assert json.loads(dump_json(summary)) == summary


def test_a_change_that_cancels_flatters_one_error_only() -> None:
    """Off by 1 up, then by 1 down: the sums agree, the steps do not."""
    rows = made_rows(0, 2)[::2]
    for row, moved, off in zip(rows, (2.0, 3.0), (1.0, -1.0), strict=True):
        row.update(before=0.0, after=moved, path=dict.fromkeys(TERMS, (moved + off) / 4))
    closure = Series.collect(rows)["a"].closure()
    assert closure.path == 0.0
    assert closure.path_absolute == pytest.approx(2 / 5)


def test_a_step_that_is_missing_or_twice_is_refused() -> None:
    rows = made_rows(0, 4)
    with pytest.raises(CircuitError, match="step 3 of a follows step 1; expected step 2"):
        Series.collect(row for row in rows if row["step"] != 2)
    with pytest.raises(CircuitError, match="step 1 of a follows step 4; expected step 5"):
        Series.collect(rows + rows)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("path", "rest"), 1.0, r"step 4 tells of .*rest; expected "),
        (("references",), {}, "step 4 tells of nothing; expected raw_sgd, as the steps before"),
        (("groups", "circuit", "all"), {}, "step 4 tells of .*, all; expected "),
        (("groups", "parts"), {}, "step 4 tells of circuit, parts; expected circuit, as"),
        (("groups", "circuit"), 1.0, "step 4 tells otherwise of circuit than"),
        (("references", "raw_sgd"), {"more": 1.0}, "step 4 tells otherwise of raw_sgd than"),
    ],
)
def test_a_step_of_other_terms_or_groups_is_refused(path: Any, value: Any, says: str) -> None:
    rows = made_rows(0, 4)
    *within, last = path
    node = rows[-1]
    for name in within:
        node = node[name]
    node[last] = value
    with pytest.raises(CircuitError, match=says):
        Series.collect(rows)


@pytest.mark.parametrize("window", [(7, 9), (8, 8), (10, 9), (9, 13), (-1, 9)], ids=str)
def test_windows_outside_are_refused(window: tuple[int, int]) -> None:
    series = Series.collect(made_rows(0, 4, first=9))["a"]
    assert (series.start, series.end) == (8, 12)
    a, b = window
    with pytest.raises(CircuitError, match=rf"window {a}:{b}; expected start < end within 8:12"):
        series.window(a, b)
    with pytest.raises(CircuitError, match=rf"`windows`: window {a}:{b}; expected .* 8:12"):
        check_windows([(8, 12), window], 8, 12)
    check_windows([(8, 9), (9, 12), (8, 12)], 8, 12)
