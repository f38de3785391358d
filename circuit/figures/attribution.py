"""Charts of an attribution: terms over steps, closure, parameter groups, scalars side by side.

Rows are one step each; charts show sums of rows from the first step on, taken with `math.fsum` over
all rows, at steps few enough to draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields

from circuit.attribution.series import Closure, Kind, Series
from circuit.figures.charts import (
    INK,
    LABELS,
    TERM_NAMES,
    TICKS,
    Chart,
    Record,
    at_step,
    chart,
    chosen,
    colour,
    exact,
    named,
    steps,
)
from circuit.lazy import alt

STOPS = 120
"""Steps at which sums by term are drawn."""
COURSE_STOPS = 40
"""Steps at which the sums of a further scalar are drawn."""
GROUP_STOPS = 24
"""Steps at which sums by group are drawn."""
GROUPS = 16
"""Bars: groups, the others of which share one, and scalars."""
REST = "the others"
KINDS: dict[Kind, str] = {"path": "Path contributions", "first_order": "First-order contributions"}


def series_charts(series: Series) -> list[Chart]:
    """Terms by both kinds, closure, and the groups of every partition."""
    return [
        *(terms_chart(series, kind) for kind in KINDS),
        closure_chart(series),
        *(groups_chart(series, partition) for partition in series.groups),
    ]


def terms_chart(series: Series, kind: Kind = "path") -> Chart:
    """What each term has contributed since the first step, stacked; the actual change as a line."""
    return _terms_chart(series, kind, KINDS, STOPS)


def course_charts(further: Sequence[Series]) -> list[Chart]:
    """The terms of further scalars, small: by path alone, and at fewer steps."""
    return [
        _terms_chart(series, "path", ["path"], COURSE_STOPS, f"course_{number}_")
        for number, series in enumerate(further, start=1)
    ]


def _terms_chart(
    series: Series, kind: Kind, kinds: Iterable[Kind], most: int, prefix: str = ""
) -> Chart:
    stops = thinned(series.steps.tolist(), most)
    sums, lines = f"{prefix}term_sums", f"{prefix}totals"
    data = {sums: term_sums(series, stops, kinds), lines: totals(series, stops)}
    terms = list(series.path)
    bars = (
        named(sums)
        .transform_filter(f"datum.kind === '{kind}'")
        .mark_bar(binSpacing=0)
        .encode(
            x=steps("start", domain=[series.start, series.end]).bin("binned"),
            x2=alt.X2("step"),
            y=alt.Y("contribution:Q")
            .title("sum from the first step")
            .scale(domain=_extent(data[sums], data[lines]))  # one for both kinds
            .stack("zero"),
            color=colour("term", terms, labels=_labels(terms)),
            tooltip=exact("step", "term", "contribution"),
        )
    )
    # a bar of one or several steps is as high as the sum at its end; the line keeps to the bars
    actual = (
        named(lines)
        .mark_line(color=INK, strokeWidth=2, interpolate="step-before")
        .encode(x=steps(), y="actual:Q", tooltip=exact("step", "value", "actual", kind))
    )
    name = f"{prefix}terms" if kind == "path" else f"terms_{kind}"
    title = f"{KINDS[kind]} to {series.scalar}; line: the actual change"
    return chart(name, title, data, bars, actual, at_step(), height=160 if prefix else 240)


def closure_chart(series: Series) -> Chart:
    """How far the sums are from the actual change, for both kinds."""
    records = totals(series, thinned(series.steps.tolist(), STOPS))
    names = ["closure_first_order", "closure_path"]
    labels = {names[0]: "first order", names[1]: "path"}
    shade = colour("kind", names, labels=labels, palette=["var(--c2)", "var(--c1)"])
    lines = (
        named("totals")
        .transform_fold([*names], as_=["kind", "error"])
        .transform_filter("isValid(datum.error) && datum.error > 0")
        .mark_line(strokeWidth=1.6)
        .encode(
            x=steps(),
            y=alt.Y("error:Q")
            .title("closure error")
            .scale(type="log")
            .axis(format=".0e", values=_tens(records, names)),
            color=shade,
            tooltip=exact("step", "kind", "error", "actual"),
        )
    )
    title = "Closure error: |predicted - actual| / |actual|, sums from the first step"
    return chart("closure", title, {"totals": records}, lines, at_step())


def groups_chart(series: Series, partition: str, count: int = GROUPS) -> Chart:
    """The groups of a partition that end largest, split into terms, at the chosen step.

    Args:
        count: groups with a bar of their own; the others share one.
    """
    groups = series.groups[partition]
    sums = {
        group: math.fsum(math.fsum(values) for values in kinds["path"].values())
        for group, kinds in groups.items()
    }
    top = sorted(sums, key=lambda group: -abs(sums[group]))[:count]
    names = top if len(top) == len(sums) else [*top, REST]
    name = f"groups_{partition}"
    records = []
    for step in thinned(series.steps.tolist(), GROUP_STOPS):
        shares: dict[tuple[str, str], float] = {}
        for group, kinds in groups.items():
            for term, values in kinds["path"].items():
                key = (group if group in top else REST, term)
                shares[key] = shares.get(key, 0.0) + math.fsum(values[: step - series.start])
        records += [
            {"step": step, "group": group, "term": term, "contribution": share}
            for (group, term), share in shares.items()
        ]
    ranked = "groups" if len(top) == len(sums) else f"the {len(top)} groups that end largest"
    title = f"{series.scalar}, {ranked} ({partition}), up to the step; mark: the sum"
    return _bars(name, title, records, "group", names, list(series.path), at_chosen=True)


def scalars_chart(summaries: Sequence[Record], count: int = 3 * GROUPS) -> Chart:
    """The scalars that changed most, split into terms, over their whole window.

    Args:
        summaries: see `Series.summary`.
    """
    ranked = sorted(summaries, key=lambda one: -abs(one["actual"]))[:count]
    records = [
        {"scalar": one["scalar"], "term": term, "contribution": share, "actual": one["actual"]}
        for one in ranked
        for term, share in one["path"].items()
    ]
    start, end = ranked[0]["start_step"], ranked[0]["end_step"]
    title = f"Change of every scalar over steps {start} to {end}; mark: the sum"
    if len(ranked) < len(summaries):
        title = title.replace("every scalar", f"the {count} scalars that moved most")
    names = [one["scalar"] for one in ranked]
    return _bars("scalars", title, records, "scalar", names, list(ranked[0]["path"]))


def term_sums(series: Series, stops: Sequence[int], kinds: Iterable[Kind] = KINDS) -> list[Record]:
    """What each term has contributed from the first step to each stop."""
    starts = [series.start, *stops[:-1]]
    columns = {
        (kind, term): values.tolist()
        for kind in kinds
        for term, values in getattr(series, kind).items()
    }
    return [
        {
            "start": start,
            "step": step,
            "kind": kind,
            "term": term,
            "contribution": math.fsum(values[: step - series.start]),
        }
        for start, step in zip(starts, stops, strict=True)
        for (kind, term), values in columns.items()
    ]


def totals(series: Series, stops: Sequence[int]) -> list[Record]:
    """The scalar, its actual change, what was predicted, and the closure errors, at each stop.

    First of all the state that the first step starts from, of which nothing is predicted.
    """
    records: list[Record] = [
        {
            "step": series.start,
            "scalar": series.scalar,
            "value": float(series.before[0]),
            "actual": 0.0,
            **{str(kind): 0.0 for kind in KINDS},
            **{f"closure_{one.name}": None for one in fields(Closure)},
        }
    ]
    for step in stops:
        window = series.window(series.start, step)
        closure = {f"closure_{name}": value for name, value in asdict(window.closure()).items()}
        records.append(
            {
                "step": step,
                "scalar": series.scalar,
                "value": float(window.after[-1]),
                "actual": math.fsum(window.actual),
                **{str(kind): math.fsum(window.predicted(kind)) for kind in KINDS},
                **closure,
            }
        )
    return records


def thinned(every: Sequence[int], most: int) -> list[int]:
    """At most `most` of ascending steps, evenly, with the first and the last."""
    if len(every) <= most:
        return list(every)
    last = len(every) - 1
    return [every[round(i * last / (most - 1))] for i in range(most)]


def _bars(
    name: str,
    title: str,
    records: Sequence[Record],
    column: str,
    names: Sequence[str],
    terms: Sequence[str],
    *,
    at_chosen: bool = False,
) -> Chart:
    """A bar for each name, of the terms' contributions to either side, and a mark at their sum."""
    place = named(name).transform_filter(chosen()) if at_chosen else named(name)
    step = ["step"] if at_chosen else []
    y = alt.Y(f"{column}:N").title(None).scale(domain=list(names)).sort(list(names))
    y = y.axis(labelLimit=LABELS)
    bars = place.mark_bar().encode(
        y=y,
        x=alt.X("contribution:Q").title("path contribution").axis(tickCount=TICKS).stack("zero"),
        color=colour("term", terms, labels=_labels(terms)),
        tooltip=exact(*step, column, "term", "contribution"),
    )
    sums = (
        place.transform_aggregate(sum="sum(contribution)", groupby=[*step, column])
        .mark_tick(color=INK, thickness=2)
        .encode(y=y, x="sum:Q", tooltip=exact(*step, column, "sum"))
    )
    return chart(name, title, {name: records}, bars, sums, height=22 * len(names))


def _labels(terms: Sequence[str]) -> dict[str, str]:
    return {term: TERM_NAMES.get(term, term) for term in terms}


def _extent(sums: Sequence[Record], totals: Sequence[Record]) -> list[float]:
    """The largest pile of terms in either direction, of both kinds."""
    piles: dict[tuple[int, str, bool], float] = {}
    for record in sums:
        value = record["contribution"]
        key = (record["step"], record["kind"], value >= 0)
        piles[key] = piles.get(key, 0.0) + value
    edges = [*piles.values(), *(record["actual"] for record in totals), 0.0]
    low, high = min(edges), max(edges)
    room = 0.04 * (high - low or 1.0)
    return [low - room if low < 0 else 0.0, high + room]


def _tens(records: Sequence[Record], columns: Sequence[str]) -> list[float]:
    """The powers of ten between the smallest and the largest of some columns."""
    sizes = [math.log10(record[name]) for record in records for name in columns if record[name]]
    low, high = math.floor(min(sizes, default=0)), math.ceil(max(sizes, default=0))
    return [10.0**k for k in range(low, high + 1)]
