"""Charts below each other in one picture."""

from __future__ import annotations

import pytest

from circuit.figures.charts import Chart, chart, colour, lines, named, stacked, steps


def _chart(name: str, of: list[str]) -> Chart:
    rows = [{"step": step, "of": one, "value": step} for step in (0, 1) for one in of]
    drawn = lines(name, "value", "value", colour("of", of), ("step", "of", "value"))
    return chart(name, f"chart {name}", {name: rows}, drawn)


def test_each_of_the_stacked_charts_has_the_legend_of_its_own_names() -> None:
    charts = {"one": ["alpha", "beta"], "two": ["gamma"]}
    picture = stacked([_chart(name, of) for name, of in charts.items()])
    assert picture.count('role-legend"') == len(charts)
    for of in charts.values():
        for name in of:
            assert picture.count(f">{name}</text>") == 1


@pytest.mark.parametrize("mark", ["rule", "tick", "point"])
def test_steps_begin_with_the_first_whatever_is_drawn(mark: str) -> None:
    rows = [{"step": 400, "low": 3, "high": 4}]
    drawn = named("rows").encode(x=steps(), y="low:Q", y2="high:Q")
    drawn = getattr(drawn, f"mark_{mark}")()
    picture = stacked([chart("one", "one", {"rows": rows}, drawn)])
    assert ">400</text>" in picture
    assert ">100</text>" not in picture
