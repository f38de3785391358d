"""Charts of an attribution: bars and line end at the same steps, and show the same sums."""

from __future__ import annotations

import math

import numpy as np
import pytest

from circuit.attribution.series import Series
from circuit.figures.attribution import course_charts, terms_chart

TERMS = ("weight_decay", "current_gradient", "rounding")


def random_series(scalar: str, start: int, steps: int) -> Series:
    rng = np.random.default_rng(steps)
    path, first_order = ({term: rng.normal(size=steps) for term in TERMS} for _ in range(2))
    after = 1 + np.cumsum(np.sum(list(path.values()), axis=0))
    before = np.array([1.0, *after[:-1]])
    at = np.arange(start + 1, start + steps + 1)
    return Series(scalar, True, at, before, after, np.ones(steps), first_order, path, {}, {})


@pytest.mark.parametrize("steps", [1, 3, 60, 500])
def test_the_bars_end_where_the_line_has_its_corners(steps: int) -> None:
    series = random_series("a", 7, steps)
    charts = [terms_chart(series), terms_chart(series, "first_order"), *course_charts([series])]
    for drawn in charts:
        bars, line = drawn.data.values()
        corners = [record["step"] for record in line]
        assert (corners[0], corners[-1]) == (series.start, series.end)
        assert list(dict.fromkeys(bar["start"] for bar in bars)) == corners[:-1]
        assert list(dict.fromkeys(bar["step"] for bar in bars)) == corners[1:]
        for record in line[1:]:
            shares = [
                bar["contribution"]
                for bar in bars
                if (bar["step"], bar["kind"]) == (record["step"], "path")
            ]
            assert len(shares) == len(TERMS)
            assert math.fsum(shares) == pytest.approx(record["path"], rel=1e-9, abs=1e-9)
            assert math.fsum(shares) == pytest.approx(record["actual"], rel=1e-9, abs=1e-9)


def test_every_further_scalar_has_names_of_its_own() -> None:
    charts = course_charts([random_series(name, 0, 5) for name in "abc"])
    names = [name for drawn in charts for name in (drawn.name, *drawn.data)]
    assert len(set(names)) == len(names)
    assert [name for name in "abc" if any(f" to {name};" in one.title for one in charts)] == [
        *"abc"
    ]
