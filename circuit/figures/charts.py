"""Vega-Lite charts in one style: named data, one parameter `step`, exact digits in tooltips.

One chart is drawn twice: on the page, where it follows the chosen step and the theme (colours are
CSS variables), and as SVG beside the report, in light colours and at its last step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from circuit.lazy import alt

Record = Mapping[str, Any]
Data = Mapping[str, Sequence[Record]]

INK = "var(--ink)"
LIGHT = {
    **{"paper": "#ffffff", "ink": "#16191d", "muted": "#59616b", "line": "#d9dde2"},
    **{"c1": "#0072b2", "c2": "#d55e00", "c3": "#009e73", "c4": "#b5578f", "c5": "#b07c00"},
    **{"c6": "#3a9bd0", "c7": "#6b4fb3", "c8": "#8a929c"},
}
"""Colours of page.css in its light theme; c1 to c8 are Okabe and Ito's palette."""
CATEGORY = [f"var(--c{number})" for number in range(1, 9)]
GREY = "var(--c8)"
TERM_NAMES = {
    "weight_decay": "weight decay",
    "adam_current_gradient": "current gradient",
    "adam_historical_momentum": "momentum history",
    "current_gradient": "current gradient",
    "historical_momentum": "momentum history",
    "rounding": "rounding residual",
}
"""Terms of an update as legends call them."""

TICKS = {"expr": "max(2, floor(width / 75))"}
"""Ticks that the width of a chart has room for."""
LABELS = {"expr": "min(360, 0.65 * containerSize()[0])"}
"""The most that labels beside bars take, so that there is room for the bars."""
POINT = {"size": 28, "filled": True}
_WIDTH_OF_A_LETTER, _WIDTH_OF_A_SYMBOL = 7, 34


STYLE: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        **dict.fromkeys(("labelColor", "titleColor"), "var(--muted)"),
        **dict.fromkeys(("gridColor", "domainColor", "tickColor"), "var(--line)"),
        **{"titleFontWeight": "normal", "labelFontSize": 12, "titleFontSize": 12},
        **{"labelOverlap": "greedy", "labelSeparation": 8},
    },
    # a first label that is pushed inwards leaves no room for the second one
    "axisX": {"grid": False, "labelFlush": False},
    "legend": {
        **{"labelColor": INK, "titleColor": "var(--muted)", "titleFontWeight": "normal"},
        **{"labelFontSize": 12, "titleFontSize": 12, "labelLimit": 320, "symbolStrokeWidth": 2},
        **{"symbolBaseFillColor": INK, "symbolBaseStrokeColor": INK},
    },
}
"""Vega-Lite's config of every chart."""


@dataclass(frozen=True)
class Chart:
    """One drawing.

    Attributes:
        name: stem of its file.
        spec: Vega-Lite over named data, with a parameter `step`.
        data: by name.
        follows: the data whose steps `step` takes: the last one at or before the page's step.
    """

    name: str
    title: str
    spec: Mapping[str, Any] = field(repr=False)
    data: Data = field(repr=False)
    follows: str

    def svg(self, width: int = 560) -> str:
        """The chart at the last step of its data, in light colours; equal charts, equal bytes.

        Args:
            width: of the drawing without axes and legends, in pixels.
        """
        return stacked([self], width)

    def _repr_png_(self) -> bytes:  # how a notebook shows it
        import vl_convert

        drawing: bytes = vl_convert.vegalite_to_png(_whole([self], 480))
        return drawing


def stacked(charts: Sequence[Chart], width: int = 560) -> str:
    """Charts below each other as one SVG, at the last step of all; see `Chart.svg`.

    Args:
        charts: whose data have different names.
    """
    import vl_convert

    numbers: dict[str, int] = {}  # Vega counts gradients and clips over all that are drawn
    return re.sub(
        r'(id="|url\(#)(gradient_|clip)(\d+)',
        lambda id: f"{id[1]}{id[2]}{numbers.setdefault(id[2] + id[3], len(numbers))}",
        vl_convert.vegalite_to_svg(_whole(charts, width)),
    )


def _whole(charts: Sequence[Chart], width: int) -> dict[str, Any]:
    """One Vega-Lite specification of several charts, without the page around them."""
    parts: list[dict[str, Any]] = []
    datasets: dict[str, Any] = {}
    last = 0
    for one in charts:
        title = {"text": one.title, "anchor": "start", "color": INK, "fontSize": 13}
        part = {**one.spec, "title": title, "width": width}
        datasets |= {**part.pop("datasets", {}), **one.data}
        parts.append({key: part[key] for key in part if key not in ("params", "autosize")})
        steps = [row["step"] for row in one.data[one.follows] if row.get("step") is not None]
        last = max([last, *steps])
    spec = {
        "vconcat": parts,
        "resolve": {"scale": {"color": "independent", "strokeDash": "independent"}},
        "params": [{"name": "step", "value": last}],
        "config": {**STYLE, "background": "var(--paper)"},
        "padding": 10,
    }
    text = json.dumps(spec, allow_nan=False).replace("containerSize()[0]", str(width))
    for name, shade in LIGHT.items():
        text = text.replace(f'"var(--{name})"', f'"{shade}"')
    return {**json.loads(text), "datasets": datasets}  # whose own texts are not the style's


def chart(
    name: str, title: str, data: Data, *layers: alt.Chart, follows: str = "", height: float = 200
) -> Chart:
    """Layers above each other as one chart.

    Args:
        follows: the data whose steps the chart follows, the first by default.
    """
    # put together here and without Altair's checks: its `layer` copies every layer three times
    context: dict[str, Any] = {"top_level": False, "datasets": {}}
    spec = {
        **{"width": "container", "height": height},
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [{"name": "step", "value": 0}],
        "layer": [layer.to_dict(validate=False, context=context) for layer in layers],
        "datasets": context["datasets"],  # what layers hold themselves
    }
    return Chart(name, title, spec, data, follows or next(iter(data)))


def named(data: str) -> alt.Chart:
    """A chart over named data of the panel."""
    return alt.Chart(alt.NamedData(name=data))


def at_step() -> alt.Chart:
    """A vertical rule at the chosen step."""
    one = alt.InlineData(values=[{"at": "step"}])
    rule = alt.Chart(one).mark_rule(color=INK, strokeWidth=1.5, opacity=0.75, aria=False, clip=True)
    drawn: alt.Chart = rule.encode(x=alt.XDatum(alt.ExprRef("step"), type="quantitative"))
    return drawn


def chosen() -> str:
    """The filter that leaves the records of the chosen step."""
    return "datum.step === step"


def steps(column: str = "step", **scale: Any) -> alt.X:
    """The x axis of optimizer steps, from the first that is drawn, whatever the mark is."""
    axis = alt.Axis(format="d", tickCount=TICKS, labelFlush=True, title="optimizer step")
    return alt.X(f"{column}:Q").axis(axis).scale(nice=False, zero=False, **scale)


def fitted(values: Iterable[float | None]) -> alt.Scale:
    """The y scale of a course that ends where its values do; a log one where they are far apart."""
    present = [value for value in values if value is not None]
    low, high = min(present, default=1.0), max(present, default=1.0)
    return alt.Scale(type="log", nice=False) if 0 < 3 * low < high else alt.Scale(zero=False)


def exact(*columns: str) -> list[alt.Tooltip]:
    """Tooltips with the digits of the rows."""
    return [alt.Tooltip(f"{column}:N", title=column) for column in columns]


def legend(names: Sequence[str], title: str | None = None) -> alt.Legend:
    """A legend above the chart, in as many columns as the chart's width has room for."""
    widest = max(map(len, names), default=1) * _WIDTH_OF_A_LETTER + _WIDTH_OF_A_SYMBOL
    columns = alt.ExprRef(f"max(1, floor((containerSize()[0] - 50) / {widest}))")
    return alt.Legend(orient="top", direction="horizontal", columns=columns, title=title)


def colour(
    column: str,
    names: Sequence[str],
    *,
    labels: Mapping[str, str] | None = None,
    palette: Sequence[str] = CATEGORY,
    title: str | None = None,
    first: bool = False,
) -> alt.Color:
    """One colour for each name, in this order.

    Args:
        first: the first name alone has a colour, and the legend; the others are grey.
    """
    if first:
        shades = [palette[0], *(GREY for _ in names[1:])]
        scale = alt.Scale(domain=list(names), range=shades)
        only = alt.Legend(**legend(names[:1], title).to_dict(), values=list(names[:1]))
        return alt.Color(f"{column}:N").scale(scale).legend(only)
    shown = legend([(labels or {}).get(name, name) for name in names], title)
    if labels:
        texts = json.dumps(dict(labels))
        shown = alt.Legend(**shown.to_dict(), labelExpr=f"({texts})[datum.label] || datum.label")
    picked = [palette[i % len(palette)] for i in range(len(names))]
    return alt.Color(f"{column}:N").scale(domain=list(names), range=picked).legend(shown)


def of_slices(column: str, rows: Sequence[Record]) -> alt.Color:
    """One colour for each value of the column by which figures are given apart, ascending."""
    names = sorted({row[column] for row in rows}, key=int)
    if len(names) > len(CATEGORY):  # more than can be told apart: shades from least to most
        scale = alt.Scale(domain=names, scheme=alt.SchemeParams("turbo", extent=[0.1, 0.9]))
        return alt.Color(f"{column}:O").scale(scale).legend(legend(names, column))
    return colour(column, names, labels={name: f"{column} {name}" for name in names})


def last_dashed(column: str, names: Sequence[str]) -> alt.StrokeDash:
    """The last name's line dashed, so that an equal one beneath it stays visible."""
    dashes = [[1, 0]] * (len(names) - 1) + [[5, 5]]
    return (
        alt.StrokeDash(f"{column}:N").scale(domain=list(names), range=dashes).legend(legend(names))
    )


def lines(
    data: str,
    y: str,
    y_title: str,
    shade: alt.Color,
    tooltip: Sequence[str],
    *,
    where: str | None = None,
    domain: Sequence[float] | None = None,
    log: bool = False,
    dashed: alt.StrokeDash | None = None,
) -> alt.Chart:
    """A line for each name of a colour, with a point at each record.

    Args:
        where: filter.
        dashed: see `last_dashed`.
    """
    scale = alt.Scale(type="log") if log else alt.Scale()
    if domain is not None:
        scale = alt.Scale(domain=list(domain))
    base = named(data)
    if where is not None:
        base = base.transform_filter(where)
    drawn: alt.Chart = base.mark_line(point=POINT, strokeWidth=1.8, clip=log).encode(
        x=steps(),
        y=alt.Y(f"{y}:Q").title(y_title).scale(scale),
        color=shade,
        tooltip=exact(*tooltip),
    )
    if dashed is not None:
        drawn = drawn.encode(strokeDash=dashed)
    return drawn


def band(data: str, y: str, y_title: str, shade: alt.Color) -> alt.Chart:
    """The intervals of `lines`, from `<y>_low` to `<y>_high`, shaded beneath them."""
    base = named(data).transform_filter(f"isValid(datum.{y}_low) && isValid(datum.{y}_high)")
    drawn: alt.Chart = base.mark_area(opacity=0.16, aria=False).encode(
        x=steps(),
        y=alt.Y(f"{y}_low:Q").title(y_title),
        y2=f"{y}_high:Q",
        # not as the colour, whose legend has the symbols of the lines
        fill=alt.Fill(**{**cast("dict[str, Any]", shade.to_dict()), "legend": None}),
    )
    return drawn


def heat(
    data: str, value: str, tooltip: Sequence[str], rows: Sequence[Record], of: str = "head"
) -> list[alt.Chart]:
    """Heads (or what `of` names) by steps, coloured by a value; the chosen step is framed.

    Zero has the middle colour and both signs have one scale, so that equal sizes look equal.

    Args:
        rows: the data, from which the heads, in their order, and the largest size are taken.
    """
    heads = list(dict.fromkeys(row[of] for row in rows))
    largest = max((abs(row[value]) for row in rows if row[value] is not None), default=1.0)
    place = named(data).encode(
        x=alt.X("step:O").title("optimizer step").axis(labelOverlap="greedy", labelAngle=0),
        y=alt.Y(f"{of}:N").title(None).sort(heads),
    )
    shades = alt.Scale(scheme="blueorange", domain=[-largest, largest])
    bar = alt.Legend(orient="top", title=None, gradientLength=alt.ExprRef("min(width, 260)"))
    cells = place.mark_rect().encode(
        color=alt.Color(f"{value}:Q").scale(shades).legend(bar),
        tooltip=exact(*tooltip),
    )
    frame = place.transform_filter(chosen()).mark_rect(
        fill=None, stroke="black", strokeWidth=1.5, aria=False
    )
    return [cells, frame]


def thinned(rows: Sequence[Record], most: int = 2000) -> list[Record]:
    """Every so many of the rows, so that there are no more than `most`."""
    return list(rows[:: max(1, -(-len(rows) // most))])


def equals(
    data: str,
    x: tuple[str, str],
    y: tuple[str, str],
    shade: alt.Color,
    rows: Sequence[Record],
    *,
    where: str | None = None,
) -> list[alt.Chart]:
    """A point a record, and the line on which both of its numbers are equal.

    Args:
        x, y: column and title.
        rows: the data, whose range the line has; a record with a null has no point.
        where: filter.
    """
    places = [(row[x[0]], row[y[0]]) for row in rows]
    values = [value for place in places if None not in place for value in place] or [0.0]
    ends = [{"at": bound(values)} for bound in (min, max)]
    line = alt.Chart(alt.InlineData(values=ends)).mark_line(color=INK, strokeWidth=1, aria=False)
    points = named(data) if where is None else named(data).transform_filter(where)
    return [
        line.encode(x=alt.X("at:Q").title(x[1]), y=alt.Y("at:Q").title(y[1])),
        points.mark_circle(size=16, opacity=0.55).encode(
            x=alt.X(f"{x[0]}:Q").title(x[1]),
            y=alt.Y(f"{y[0]}:Q").title(y[1]),
            color=shade,
            tooltip=exact(*(rows[0] if rows else ())),
        ),
    ]
