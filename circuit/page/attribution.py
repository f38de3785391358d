"""Panels of the attribution: by optimizer term, and by parameter group.

Rows are one step each; the page shows sums of rows from the first step on, taken with `math.fsum`
over all rows, at steps few enough for a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from circuit.attribution.series import Kind, Series
from circuit.figures.style import TERM_NAMES
from circuit.lazy import alt
from circuit.page.asking import trace_folder
from circuit.figures.charts import INK, TICKS, at_step, chart, chosen, colour, exact, named, steps
from circuit.page.commands import QK, Home, command_for
from circuit.page.found import Found, Reports
from circuit.page.heads import winner_of
from circuit.page.panel import Chart, Missing, Panel, Record, Source, Table, thinned

BARS = 120
"""Steps at which the sums by term are drawn, besides those of the slider."""
GROUP_STEPS = 40
"""Steps of the slider at which the sums by group are given, at most."""
GROUPS = 16
"""Groups with a bar of their own; the others share one."""
REST = "the others"
KINDS: tuple[Kind, Kind] = ("path", "first_order")
_KIND_NAMES = {"path": "path", "first_order": "first order"}


def attribution_report(reports: Reports) -> Found | None:
    """Of the winner, if there is one; then the longest window."""
    winner = winner_of(reports)

    def size(report: Found) -> tuple[float, ...]:
        of_winner = winner is not None and f".{winner[0]}." in report.summary["lead"]
        return (of_winner, report.summary["end_step"] - report.summary["start_step"])

    return reports.best(QK, size)


def series_of(report: Found) -> Series:
    """The attribution of the report's leading scalar."""
    lead = report.summary["lead"]
    rows = report.rows(holding=f'"scalar": "{lead}"')
    return Series.collect(row for row in rows if row["scalar"] == lead)[lead]


def attribution_panels(reports: Reports, home: Home, slider: Sequence[int]) -> list[Panel]:
    """By term and by group.

    Args:
        slider: steps of the page.
    """
    report = attribution_report(reports)
    terms = ("terms", "Attribution by optimizer term", _QUESTION)
    groups = ("groups", "Attribution by parameter group", "Which weights carried the change?")
    if report is None:
        missing = _missing(reports, home)
        return [Panel(*terms, missing=missing), Panel(*groups, missing=missing)]
    series, source = series_of(report), report.source(home.folder)
    inside = [step for step in slider if series.start < step <= series.end]
    stops = sorted({*inside, *thinned(series.steps.tolist(), BARS)})
    return [
        _terms_panel(terms, series, stops, source, report),
        _groups_panel(groups, series, thinned(sorted({*inside, series.end}), GROUP_STEPS), source),
    ]


_QUESTION = "Which term of the optimizer's update moved the winner's QK match, and by how much?"


def _missing(reports: Reports, home: Home) -> list[Missing]:
    winner = winner_of(reports)
    head = winner[0] if winner else "L1H0"
    command = command_for(QK, home, head=head, trace=trace_folder(reports))
    return [Missing("attribution of the winner", command)]


def term_sums(series: Series, stops: Sequence[int]) -> list[Record]:
    """What each term has contributed from the first step to each stop."""
    found = []
    starts = [series.start, *stops[:-1]]
    columns = {
        (kind, term): values.tolist()
        for kind in KINDS
        for term, values in getattr(series, kind).items()
    }
    for start, step in zip(starts, stops, strict=True):
        for (kind, term), values in columns.items():
            total = math.fsum(values[: step - series.start])
            found.append(
                {
                    "start": start,
                    "step": step,
                    "kind": kind,
                    "term": term,
                    "contribution": total,
                }
            )
    return found


def totals(series: Series, stops: Sequence[int]) -> list[Record]:
    """The scalar, its actual change, what was predicted, and the closure errors, at each stop."""
    found = []
    for step in stops:
        window = series.window(series.start, step)
        closure = {f"closure_{name}": value for name, value in asdict(window.closure()).items()}
        found.append(
            {
                "step": step,
                "scalar": series.scalar,
                "value": float(window.after[-1]),
                "actual": math.fsum(window.actual),
                "path": math.fsum(window.predicted("path")),
                "first_order": math.fsum(window.predicted("first_order")),
                **closure,
            }
        )
    return found


def group_sums(series: Series, stops: Sequence[int]) -> list[Record]:
    """What each group of the finest partition has contributed (path), by term, at each stop."""
    found = []
    partition = max(series.groups.values(), key=len)
    columns = {
        (group, term): values.tolist()
        for group, kinds in partition.items()
        for term, values in kinds["path"].items()
    }
    for step in stops:
        for (group, term), values in columns.items():
            total = math.fsum(values[: step - series.start])
            found.append({"step": step, "group": group, "term": term, "contribution": total})
    return found


def _terms_panel(
    head: tuple[str, str, str],
    series: Series,
    stops: Sequence[int],
    source: Source,
    report: Found,
) -> Panel:
    data = {
        "term_sums": term_sums(series, stops),
        "totals": totals(series, stops),
        "windows": [_window(found) for found in report.summary["windows"]],
    }
    terms = list(series.path)
    charts = [_stack(kind, series, data, terms) for kind in KINDS]
    names = ["closure_first_order", "closure_path"]
    shade = colour(
        "kind", names, labels={names[0]: "first order", names[1]: "path"}, palette=[*_PAIR]
    )
    closure = (
        named("totals")
        .transform_fold([*names], as_=["kind", "error"])
        .transform_filter("isValid(datum.error) && datum.error > 0")
        .mark_line(strokeWidth=1.6)
        .encode(
            x=steps(),
            y=alt.Y("error:Q")
            .title("closure error")
            .scale(type="log")
            .axis(format=".0e", values=_tens(data["totals"], names)),
            color=shade,
            tooltip=exact("step", "kind", "error", "actual"),
        )
    )
    title = "Closure error: |predicted - actual| / |actual|, sums from the first step"
    charts.append(chart(title, "totals", closure, at_step()))
    return Panel(
        *head,
        charts=charts,
        tables=[_terms_table(), _totals_table(), _windows_table()],
        data=data,
        sources=[source],
        notes=_term_notes(series, data["totals"][-1]),
    )


def _tens(records: Sequence[Record], columns: Sequence[str]) -> list[float]:
    """The powers of ten between the smallest and the largest of some columns."""
    found = [math.log10(r[name]) for r in records for name in columns if r[name]]
    return [
        10.0**k
        for k in range(math.floor(min(found, default=0)), math.ceil(max(found, default=0)) + 1)
    ]


_PAIR = ("var(--c2)", "var(--c1)")


def _term_notes(series: Series, last: Record) -> list[str]:
    notes = [
        f"{series.scalar} over steps {series.start} to {series.end}: actual change"
        f" {last['actual']:+.4g}; the path contributions sum to {last['path']:+.4g} (closure error"
        f" {_percent(last['closure_path'])}), the first-order ones to {last['first_order']:+.4g}"
        f" ({_percent(last['closure_first_order'])})."
    ]
    if not series.telescopes:
        notes.append(
            "The basis is taken anew before each step: actual changes are per step, and their sum"
            " is not the last value minus the first."
        )
    return notes


def _percent(share: float | None) -> str:
    return "none: nothing moved" if share is None else f"{100 * share:.2g} %"


def _stack(kind: Kind, series: Series, data: dict[str, list[Record]], terms: list[str]) -> Chart:
    domain = _extent(data)
    labels = {term: TERM_NAMES.get(term, term) for term in terms}
    bars = (
        named("term_sums")
        .transform_filter(f"datum.kind === '{kind}'")
        .mark_bar(binSpacing=0)
        .encode(
            x=steps("start", domain=[series.start, series.end]).bin("binned"),
            x2=alt.X2("step"),
            y=alt.Y("contribution:Q")
            .title("sum from the first step")
            .scale(domain=domain)
            .stack("zero"),
            color=colour("term", terms, labels=labels),
            tooltip=exact("step", "term", "contribution"),
        )
    )
    actual = (
        named("totals")
        .mark_line(color=INK, strokeWidth=2)
        .encode(x=steps(), y="actual:Q", tooltip=exact("step", "value", "actual", kind))
    )
    title = f"{_KIND_NAMES[kind].capitalize()}; line: the actual change"
    return chart(title, "term_sums", bars, actual, at_step(), height=240)


def _extent(data: dict[str, list[Record]]) -> list[float]:
    """One y axis for both kinds: the largest pile in either direction."""
    piles: dict[tuple[int, str, bool], float] = {}
    for record in data["term_sums"]:
        value = record["contribution"]
        key = (record["step"], record["kind"], value >= 0)
        piles[key] = piles.get(key, 0.0) + value
    edges = [*piles.values(), *(record["actual"] for record in data["totals"]), 0.0]
    low, high = min(edges), max(edges)
    room = 0.04 * (high - low or 1.0)
    return [low - room if low < 0 else 0.0, high + room]


def _groups_panel(
    head: tuple[str, str, str], series: Series, stops: Sequence[int], source: Source
) -> Panel:
    if not series.groups:
        return Panel(*head, sources=[source], notes=["The report holds no parameter groups."])
    records = group_sums(series, stops)
    own = _largest(records)
    names = own if len(own) == len({r["group"] for r in records}) else [*own, REST]
    terms = list(series.path)
    labels = {term: TERM_NAMES.get(term, term) for term in terms}
    known = "[" + ", ".join(repr(name) for name in own) + "]"
    place = (
        named("groups")
        .transform_filter(chosen())
        .transform_calculate(shown=f"indexof({known}, datum.group) < 0 ? {REST!r} : datum.group")
        .transform_aggregate(total="sum(contribution)", groupby=["step", "shown", "term"])
    )
    rows = alt.Y("shown:N").title(None).scale(domain=names).sort(names)
    bars = place.mark_bar().encode(
        y=rows,
        x=alt.X("total:Q")
        .title("path contribution from the first step")
        .axis(tickCount=TICKS)
        .stack("zero"),
        color=colour("term", terms, labels=labels),
        tooltip=[
            alt.Tooltip("step:N"),
            alt.Tooltip("shown:N", title="group"),
            alt.Tooltip("term:N"),
            alt.Tooltip("total:N", title="contribution"),
        ],
    )
    sums = (
        place.transform_aggregate(sum="sum(total)", groupby=["step", "shown"])
        .mark_tick(color=INK, thickness=2)
        .encode(y=rows, x="sum:Q", tooltip=exact("step", "shown", "sum"))
    )
    title = f"The {len(own)} groups that end largest, at the step; mark: the group's sum"
    return Panel(
        *head,
        charts=[chart(title, "groups", bars, sums, height=22 * len(names))],
        tables=[_groups_table()],
        data={"groups": records},
        sources=[source],
    )


def _largest(records: Sequence[Record]) -> list[str]:
    last = records[-1]["step"]
    sums: dict[str, float] = {}
    for record in records:
        if record["step"] == last:
            sums[record["group"]] = sums.get(record["group"], 0.0) + record["contribution"]
    return sorted(sums, key=lambda group: -abs(sums[group]))[:GROUPS]


def _window(found: Record) -> Record:
    """One scalar of the report's summary over its whole window."""
    closure = found["closure"]
    return {
        "scalar": found["scalar"],
        "window": f"{found['start_step']}:{found['end_step']}",
        "actual": found["actual"],
        **{f"path_{term.removeprefix('adam_')}": v for term, v in found["path"].items()},
        "closure_path": closure["path"],
        "closure_first_order": closure["first_order"],
    }


def _terms_table() -> Table:
    columns = {"kind": "kind", "term": "term", "contribution": "sum from the first step"}
    return Table("Contributions up to the step", "term_sums", columns)


def _totals_table() -> Table:
    return Table(
        "Closure up to the step",
        "totals",
        {
            "actual": "actual change",
            "path": "path",
            "closure_path": "closure error",
            "closure_path_absolute": "over single steps",
            "first_order": "first order",
            "closure_first_order": "closure error",
            "closure_first_order_absolute": "over single steps",
        },
    )


def _windows_table() -> Table:
    return Table(
        "Every scalar of the report, whole window",
        "windows",
        {
            "scalar": "scalar",
            "window": "steps",
            "actual": "actual change",
            "path_current_gradient": "current gradient",
            "path_historical_momentum": "momentum history",
            "path_weight_decay": "weight decay",
            "closure_path": "closure, path",
            "closure_first_order": "closure, first order",
        },
    )


def _groups_table() -> Table:
    return Table(
        "Contributions by group up to the step",
        "groups",
        {"group": "group", "term": "term", "contribution": "path contribution"},
    )
