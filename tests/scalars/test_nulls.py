"""Nulls of fits and correlations: what they keep, what they lose, what they tell apart."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from circuit.reports.closure import fit_deltas
from circuit.reports.closure_nulls import NULLS, RouteChanges, nulls_notes
from circuit.reports.ov_write_progress import pearson
from circuit.reports.shifted_correlations import hold_against_shifts, shifts_note
from circuit.scalars.least_squares import least_squares
from circuit.scalars.nulls import (
    LEAST_INTERVALS,
    beside,
    offsets,
    permuted_records,
    r_squared_of_designs,
)

LABELS = ("a", "b")


def test_p_counts_the_actual_number_among_the_draws() -> None:
    draws = np.arange(99.0)
    assert beside(draws, 1000.0)["p"] == 0.01
    assert beside(draws, 98.0)["p"] == 0.02
    assert beside(draws, -1.0)["p"] == 1.0
    assert beside(draws, -1.0, least=True)["p"] == 0.01
    assert beside(np.stack([draws, -draws], 1), np.array([50.0, 50.0]))["p"] == [0.5, 0.01]
    assert beside(draws, 0.0) == {"mean": 49.0, "low": 2.45, "high": 95.55, "p": 1.0}


def test_whole_records_of_one_kind_change_places() -> None:
    records, kinds = ["r", "r", "s", "t", "r", "s"], ["k", "k", "k", "k", "l", "l"]
    drawn = permuted_records(records, kinds, 300)
    assert drawn is not None
    for of_draw in drawn:
        assert [kinds[pair] for pair in of_draw] == kinds
        for kind in "kl":
            came = {(records[i], records[j]) for i, j in enumerate(of_draw) if kinds[i] == kind}
            ends = [set(end) for end in zip(*came, strict=True)]
            assert len(came) == len(ends[0]) == len(ends[1]), "one record for each, and each once"
    # every permutation of three records, about equally often
    counts = Counter(tuple(records[j] for j in of_draw[[0, 2, 3]]) for of_draw in drawn)
    assert len(counts) == 6
    assert min(counts.values()) > 20
    assert permuted_records(["r", "s"], ["k", "l"], 5) is None


@pytest.mark.parametrize("intervals", [LEAST_INTERVALS, 9, 50])
def test_offsets_are_all_that_there_are_each_once(intervals: int) -> None:
    every, some = offsets(intervals, 1000), offsets(intervals, 3)
    assert every is not None
    assert some is not None
    assert every.tolist() == list(range(1, intervals))
    assert len(set(some.tolist()) & set(every.tolist())) == 3
    assert offsets(LEAST_INTERVALS - 1, 1000) is None


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_many_designs_at_once_are_fitted_as_each_by_itself(fit_intercept: bool, rank: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(4, 60, rank)) @ generator.normal(size=(rank, 3)) + 0.5 * (rank == 3)
    y = x[0] @ [1.0, -2.0, 0.5] + 0.7 + generator.normal(size=60)
    groups = [str(i // 4) for i in range(60)]
    found = r_squared_of_designs(x, y, fit_intercept=fit_intercept, groups=groups)
    fits = [least_squares(d, y, "abc", fit_intercept=fit_intercept, groups=groups) for d in x]
    assert found[0] == pytest.approx([fit.r_squared for fit in fits], abs=1e-8)
    assert found[1] == pytest.approx([fit.r_squared_held_out for fit in fits], abs=1e-8)
    few = [str(i % 4) for i in range(60)]
    assert r_squared_of_designs(x, y, fit_intercept=fit_intercept, groups=few)[1] is None


def nulls_of(
    intervals: int, records: int, *, planted: float, course: float = 0.0, seed: int = 7
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A fit and its nulls: two pairs a record, changes with and without a route."""
    generator = np.random.default_rng(seed)
    keys, deltas, y = [], [], []
    shared = generator.normal(size=intervals) * course
    for interval in range(intervals):
        for pair in range(2 * records):
            scores = generator.normal(size=2) + shared[interval]
            noise = generator.normal() + shared[interval]
            for _ in range(2):  # sides
                keys.append((interval, interval + 1, f"k:r{pair // 2}:0:{pair % 2}"))
                deltas.append(dict(zip(LABELS, scores, strict=True)))
                y.append(planted * scores[0] + noise)
    changes = RouteChanges(keys, ["k"] * len(keys), deltas, LABELS)
    names = [key[2].split(":")[1] for key in keys]
    fit, _ = fit_deltas(deltas, y, names, fit_intercept=False)
    return fit, changes.nulls(keys, y, fit, fit_intercept=False, draws=60)


@pytest.mark.parametrize("name", NULLS)
def test_without_structure_the_actual_is_one_of_the_draws_around_zero(name: str) -> None:
    """Over many data sets p is as often small as it says, and R² held out is nearly zero."""
    found = [nulls_of(12, 8, planted=0.0, seed=seed) for seed in range(40)]
    held_out = [nulls[name]["r_squared_held_out"] for _, nulls in found]
    assert abs(np.mean([of["mean"] for of in held_out])) < 0.03
    assert np.mean([of["p"] for of in held_out]) == pytest.approx(0.5, abs=0.15)
    inside = [
        of["low"] - 1e-9 <= fit["r_squared_held_out"] <= of["high"] + 1e-9
        for (fit, _), of in zip(found, held_out, strict=True)
    ]
    assert np.mean(inside) > 0.7


def test_a_planted_route_stands_far_outside() -> None:
    fit, nulls = nulls_of(12, 8, planted=3.0)
    for name in NULLS:
        held_out = nulls[name]["r_squared_held_out"]
        assert fit["r_squared_held_out"] > 0.8 > 0.1 > held_out["high"]
        assert held_out["p"] == 1 / (1 + nulls[name]["draws"])


def test_a_shared_course_is_what_permuted_records_keep_and_shifts_lose() -> None:
    fit, nulls = nulls_of(12, 8, planted=0.0, course=4.0)
    permuted, shifts = (nulls[name]["r_squared_held_out"] for name in NULLS)
    assert fit["r_squared_held_out"] > 0.6
    assert permuted["mean"] > 0.6
    assert permuted["p"] > 0.05 > shifts["mean"]
    assert shifts["p"] == 1 / 12


@pytest.mark.parametrize(
    ("intervals", "records", "missing"),
    [(1, 8, ["shifted_intervals"]), (12, 1, ["permuted_records"]), (1, 1, list(NULLS))],
)
def test_where_nothing_can_be_permuted_or_shifted_there_is_null_and_a_sentence(
    intervals: int, records: int, missing: list[str]
) -> None:
    fit, nulls = nulls_of(intervals, records, planted=1.0)
    assert [name for name in NULLS if nulls[name] is None] == missing
    said = [note for note in nulls_notes([{**fit, "nulls": nulls}]) if note.startswith("No ")]
    assert len(said) == len(missing)


def test_where_no_target_varies_that_is_the_reason() -> None:
    fit, nulls = nulls_of(12, 8, planted=1.0)
    flat = {**fit, "r_squared": None, "nulls": dict.fromkeys(nulls)}
    assert nulls_notes([flat])[1:] == ["No nulls: what is fitted does not vary."]
    assert len(nulls_notes([flat, {**fit, "nulls": nulls}])) == 1


def test_a_shifted_course_tells_a_lasting_correlation_from_a_passing_one() -> None:
    generator = np.random.default_rng(2)
    y = generator.normal(size=(40, 1))
    x = np.stack([y[:, 0] + 0.1 * generator.normal(size=40), generator.normal(size=40)], 1)
    rows = [{"pearson": float(r)} for r in pearson(x, y).ravel()]
    told = hold_against_shifts(rows, range(2), x, y, pearson, 1000)
    assert told["draws"] == 39
    assert rows[0]["shifted_p"] == told["largest"]["p"] == 1 / 40
    assert rows[0]["shifted_high"] < 0.6 < rows[0]["pearson"]
    assert rows[1]["shifted_p"] > 0.05
    few = hold_against_shifts([{"pearson": 1.0}], [0], x[:2], y[:2], pearson, 1000)
    assert few["largest"] is None
    assert shifts_note(few).startswith("No shifted intervals: fewer than 4")
    none = hold_against_shifts([], [], x, y, pearson, 1000)
    assert shifts_note(none).startswith("No shifted intervals: there is no correlation")
