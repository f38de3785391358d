"""Charts of what training examples did: shares over steps, by fact, and the largest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from circuit.figures.attribution import STOPS, thinned
from circuit.figures.charts import (
    INK,
    LABELS,
    TICKS,
    Chart,
    Record,
    at_step,
    chart,
    colour,
    equals,
    exact,
    fitted,
    named,
)
from circuit.figures.charts import steps as step_axis
from circuit.lazy import alt

SIGNS = {"positive": "examples that raised it", "negative": "examples that lowered it"}
VALUES = 12
"""Bars of a fact."""
TEXT = 60
"""Letters of an example."""


def shares_chart(scalar: str, rows: Sequence[Record]) -> Chart:
    """What the examples of each stretch of steps did, both signs apart; line: their sum so far.

    Args:
        rows: one a step, ascending, with `positive` and `negative`.
    """
    steps = [row["step"] for row in rows]
    stops = thinned(steps, STOPS)
    first = steps[0] - 1
    records, sums = [], [{"step": first, "sum": 0.0}]
    start = first
    for stop in stops:
        part = rows[start - first : stop - first]
        for sign in SIGNS:
            share = math.fsum(row[sign] for row in part)
            records.append({"start": start, "step": stop, "sign": sign, "credit": share})
        so_far = rows[: stop - first]
        total = math.fsum(row[sign] for row in so_far for sign in SIGNS)
        sums.append({"step": stop, "sum": total})
        start = stop
    shade = colour("sign", list(SIGNS), labels=SIGNS, palette=["var(--c1)", "var(--c2)"])
    bars = (
        named("shares")
        .mark_bar(binSpacing=0)
        .encode(
            x=step_axis("start", domain=[first, steps[-1]]).bin("binned"),
            x2=alt.X2("step"),
            y=alt.Y("credit:Q").title("credit").stack("zero"),
            color=shade,
            tooltip=exact("step", "sign", "credit"),
        )
    )
    line = named("share_sums").mark_line(color=INK, strokeWidth=2, interpolate="step-before")
    line = line.encode(x=step_axis(), y="sum:Q", tooltip=exact("step", "sum"))
    title = f"Credit of the examples of each step for {scalar}; line: the sum so far"
    data = {"shares": records, "share_sums": sums}
    return chart("credit", title, data, bars, line, at_step(), height=240)


def facts_chart(
    scalar: str, facts: Mapping[str, Mapping[str, float]], what: str = "credit"
) -> list[Chart]:
    """A bar for each value of each fact; of facts with many values, those that are largest.

    A fact with one value divides nothing, and is left out.
    """
    records = []
    facts = {fact: values for fact, values in facts.items() if len(values) > 1}
    for fact, values in facts.items():
        largest = sorted(values, key=lambda value: -abs(values[value]))[:VALUES]
        records += [
            {"of": f"{fact} {value}", "fact": fact, what: share}
            for value, share in values.items()
            if value in largest
        ]
    if not records:
        return []
    title = f"{what.capitalize()} for {scalar} by fact"
    return [_bars("facts", title, records, what, colour("fact", list(facts)))]


def top_chart(scalar: str, rows: Sequence[Record], what: str = "credit") -> Chart:
    """The examples at both ends of a ranking, with their tokens."""
    records = [
        {"of": _shortened(f"{row['example']}  {row['text']}"), what: row["share"]} for row in rows
    ]
    title = f"The examples with the largest and the smallest {what} for {scalar}"
    return _bars("examples", title, records, what)


def growth_chart(scalar: str, rows: Sequence[Record]) -> Chart:
    """The norm of the adjoint along the steps, over that at the end.

    Args:
        rows: one a step, ascending, with `growth`.
    """
    chosen = set(thinned([row["step"] for row in rows], STOPS))
    records = [{k: row[k] for k in ("step", "growth")} for row in rows if row["step"] in chosen]
    scale = fitted(record["growth"] for record in records)
    line = (
        named("growth")
        .mark_line(strokeWidth=1.8)
        .encode(
            x=step_axis(),
            y=alt.Y("growth:Q").title("norm, over that at the end").scale(scale),
            color=alt.value("var(--c1)"),
            tooltip=exact("step", "growth"),
        )
    )
    title = f"How much a small change of the weights at a step moves {scalar} at the end"
    return chart("growth", title, {"growth": records}, line, at_step())


def checks_chart(scalar: str, rows: Sequence[Record]) -> Chart:
    """Predicted and actual change of each training that left examples out."""
    shade = colour("scalar", [scalar])
    ends = ("predicted", "predicted change"), ("actual", "actual change")
    title = f"Trainings without some examples: change of {scalar}; line: equal"
    layers = equals("checks", *ends, shade, rows)
    return chart("checks", title, {"checks": rows}, *layers, height=300)


def lds_chart(name: str, title: str, rows: Sequence[Record]) -> Chart:
    """How well each method orders what happens, with its interval.

    Args:
        rows: with `method`, `share`, and `lds` between `low` and `high`.
    """
    keys = ("method", "share", "lds", "low", "high")
    records = []
    for row in rows:
        share = f"{row['share']:.3g}"
        label = f"{share}  {row['method']}"
        records.append({"of": label, **{key: row[key] for key in keys}, "share": share})
    shares = list(dict.fromkeys(record["share"] for record in records))
    encoded = named(name).encode(
        y=alt.Y("of:N").title(None).sort([row["of"] for row in records]).axis(labelLimit=LABELS),
        color=colour("share", shares, title="removed"),
        tooltip=exact(*keys),
    )
    interval = encoded.mark_rule().encode(x=alt.X("low:Q").title("LDS"), x2="high:Q")
    points = encoded.mark_point(filled=True, size=50).encode(x="lds:Q")
    return chart(name, title, {name: records}, interval, points, height=22 * len(records))


def _bars(
    name: str, title: str, records: Sequence[Record], what: str, shade: alt.Color | None = None
) -> Chart:
    names = [row["of"] for row in records]
    encoded = named(name).encode(
        y=alt.Y("of:N").title(None).sort(names).axis(labelLimit=LABELS),
        x=alt.X(f"{what}:Q").title(what).axis(tickCount=TICKS),
        tooltip=exact(*records[0]),
    )
    bars = encoded.mark_bar().encode(color=alt.value("var(--c1)") if shade is None else shade)
    return chart(name, title, {name: records}, bars, height=20 * len(names))


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[: TEXT - 1]}…"
