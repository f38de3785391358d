"""Panels about the value code: readable where, causal where, and what puts it back."""

from __future__ import annotations

from collections.abc import Sequence

from circuit.lazy import alt
from circuit.figures.charts import (
    CATEGORY,
    INK,
    TICKS,
    at_step,
    chart,
    chosen,
    colour,
    exact,
    last_dashed,
    lines,
    named,
)
from circuit.page.commands import CODE, INTERVENTION, RESCUE, Home, command_for
from circuit.page.found import Found, Reports
from circuit.page.panel import Chart, Missing, Panel, Record, Table, pick

READABLE = (
    *("step", "stage", "position_role", "group_by", "reads", "centroid_accuracy"),
    *("lens_value_accuracy", "final_value_accuracy", "identity_projection"),
)
READOUTS = {"centroid_accuracy": "nearest centroid", "lens_value_accuracy": "stage lens"}
VIEWS = (("prediction", "answer_value"), ("support_value", "support_value"))
"""Role and grouping of the readouts that are drawn, where the report has them."""
MEANS = (
    *("step", "rank", "split", "reads", "baseline_margin", "intervened_margin"),
    *("baseline_answer_accuracy", "intervened_answer_accuracy"),
)
RESCUED = ("negative_answer_loss", "removed_competitor_margin")
"""Scalars whose rescue fraction is drawn."""


def readability_panel(reports: Reports, home: Home) -> Panel:
    """How well a stage tells the value, over training."""
    head = (
        "readability",
        "Value readability by stage",
        "From which stage, and from which step on, can the value be read at a position?",
    )
    report = reports.best(CODE, lambda r: (r.summary["reads"], len(r.summary["steps"])))
    if report is None:
        missing = Missing("readability by stage", command_for(CODE, home))
        return Panel(*head, missing=[missing])
    rows = [pick(row, READABLE) for row in report.rows()]
    views = list(dict.fromkeys((row["position_role"], row["group_by"]) for row in rows))
    drawn = [view for view in VIEWS if view in views] or views[:1]
    rows = [row for row in rows if (row["position_role"], row["group_by"]) in drawn]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    charts = []
    for role, group in drawn:
        where = f"datum.position_role === '{role}' && datum.group_by === '{group}'"
        for column, title in READOUTS.items():
            shade = colour("stage", stages)
            curve = lines(
                *("readability", column, "accuracy", shade, READABLE),
                where=where,
                domain=[0, 1],
                dashed=last_dashed("stage", stages),
            )
            charts.append(
                chart(f"{group} at {role}: {title}", "readability", curve, at_step(), height=180)
            )
    return Panel(
        *head,
        charts=charts,
        tables=[_readability_table()],
        data={"readability": rows},
        sources=[report.source(home.folder)],
    )


def interventions_panel(reports: Reports, home: Home) -> Panel:
    """What is left when a subspace is removed or kept, at the step, by rank."""
    head = (
        "interventions",
        "Interventions on subspaces",
        "Does the answer need the subspace, and does the subspace suffice for it?",
    )
    found = reports.all(INTERVENTION)
    if not found:
        missing = Missing("an intervention", command_for(INTERVENTION, home))
        return Panel(*head, missing=[missing])
    rows = intervention_rows(found)
    names = list(dict.fromkeys(row["intervention"] for row in rows))
    split = rows[0]["split"]
    places = dict.fromkeys(_place(report) for report in found)
    return Panel(
        *head,
        charts=[
            _by_rank(names, "answer_accuracy", "answer accuracy", split),
            _by_rank(names, "margin", "value margin", split),
        ],
        tables=[_interventions_table()],
        data={"interventions": rows},
        sources=[report.source(home.folder, report.path.name) for report in found],
        notes=[f"At {', '.join(places)}; drawn: {split}; dashed: nothing changed."],
    )


def intervention_rows(found: Sequence[Found]) -> list[Record]:
    """The means of every report; where two speak of the same, the newer one."""
    rows: dict[tuple[object, ...], Record] = {}
    alike = len({_place(report) for report in found}) == 1
    for report in found:
        head = report.parameters["head"]
        name = f"{report.parameters['operation']} {report.parameters['subspace']}"
        name += (f" of {head}" if head else "") + ("" if alike else f", {_place(report)}")
        for mean in report.summary["means"]:
            row = {"intervention": name, **pick(mean, MEANS)}
            rows[name, row["step"], row["rank"], row["split"]] = row
    return list(rows.values())


def _place(report: Found) -> str:
    stage, role = report.parameters["stage"], report.parameters["position_role"]
    mode = report.parameters["query_mode"]
    return f"{stage} / {role}" + ("" if mode == "single_query" else f", {mode}")


def _by_rank(names: Sequence[str], column: str, title: str, split: str) -> Chart:
    place = (
        named("interventions")
        .transform_filter(chosen())
        .transform_filter(f"datum.split === {split!r}")
        .encode(x=alt.X("rank:O").title("rank").axis(labelAngle=0))
    )
    columns = ["intervention", *MEANS]
    domain = alt.Scale(domain=[0, 1]) if column == "answer_accuracy" else alt.Scale()
    after = place.mark_line(point=alt.OverlayMarkDef(size=50, filled=True)).encode(
        y=alt.Y(f"intervened_{column}:Q").title(title).scale(domain),
        color=colour("intervention", names),
        tooltip=exact(*columns),
    )
    before = place.mark_line(color=INK, strokeDash=[5, 4]).encode(
        y=f"baseline_{column}:Q", tooltip=exact("step", "reads", f"baseline_{column}")
    )
    return chart(f"{title.capitalize()} at the step, by rank", "interventions", before, after)


def rescue_panel(reports: Reports, home: Home) -> Panel:
    """How much of what removal cost each code gives back."""
    head = (
        "rescue",
        "Rescue",
        "Which code, put back where the value code was removed, gives the answer back?",
    )
    report = reports.best(
        RESCUE, lambda r: (r.summary["evaluation_reads"], len(r.summary["steps"]))
    )
    if report is None:
        missing = Missing("transfer and rescue", command_for(RESCUE, home))
        return Panel(*head, missing=[missing])
    columns = ["step", "condition", "reads", "value_accuracy"]
    columns += [f"rescue_{scalar}{end}" for scalar in RESCUED for end in ("", "_low", "_high")]
    rows = [pick(row, columns) for row in report.rows()]
    names = list(dict.fromkeys(row["condition"] for row in rows))
    rescued = [name for name in names if name not in ("clean", "removed")]
    charts = [_fractions(scalar, rescued) for scalar in RESCUED]
    return Panel(
        *head,
        charts=[_accuracies(names), *charts],
        tables=[_rescue_table()],
        data={"rescue": rows},
        sources=[report.source(home.folder)],
        notes=[
            f"{report.summary['evaluation_reads']} reads, held out from the fit. Where removal did"
            " not lower a scalar there is nothing to rescue and no mark; ctx: context."
        ],
    )


def _accuracies(names: Sequence[str]) -> Chart:
    bars = (
        named("rescue")
        .transform_filter(chosen())
        .mark_bar(color=CATEGORY[0])
        .encode(
            y=_conditions(names),
            x=alt.X("value_accuracy:Q")
            .title("value accuracy")
            .axis(tickCount=TICKS)
            .scale(domain=[0, 1]),
            tooltip=exact("step", "condition", "reads", "value_accuracy"),
        )
    )
    return chart("Value accuracy at the step", "rescue", bars, height=20 * len(names))


def _conditions(names: Sequence[str]) -> alt.Y:
    text = "replace(replace(datum.label, '_plus_context', ' +ctx'), /_/g, ' ')"
    axis = alt.Axis(labelExpr=text, labelLimit=alt.ExprRef("width < 300 ? 170 : 240"), title=None)
    return alt.Y("condition:N").axis(axis).sort(list(names))


def _fractions(scalar: str, names: Sequence[str]) -> Chart:
    column = f"rescue_{scalar}"
    kept = f"isValid(datum.{column}) && indexof(['clean', 'removed'], datum.condition) < 0"
    place = (
        named("rescue")
        .transform_filter(chosen())
        .transform_filter(kept)
        .encode(y=_conditions(names))
    )
    axis = alt.Scale(domain=[-1, 1.5], clamp=True)
    tooltip = exact("step", "condition", "reads", column, f"{column}_low", f"{column}_high")
    bars = place.mark_rule(color=CATEGORY[0], strokeWidth=2).encode(
        x=alt.X(f"{column}_low:Q").title("rescue fraction").axis(tickCount=TICKS).scale(axis),
        x2=f"{column}_high:Q",
        tooltip=tooltip,
    )
    points = place.mark_point(color=CATEGORY[0], filled=True, size=60, opacity=1).encode(
        x=alt.X(f"{column}:Q").scale(axis), tooltip=tooltip
    )
    ends = alt.Chart(alt.InlineData(values=[{"at": 0}, {"at": 1}]))
    edge = ends.mark_rule(color=INK, strokeDash=[3, 3], opacity=0.6).encode(x="at:Q")
    title = f"Rescue of the {scalar.replace('_', ' ')} at the step"
    return chart(title, "rescue", bars, points, edge, height=20 * len(names))


def _readability_table() -> Table:
    return Table(
        "Readability",
        "readability",
        {
            "group_by": "token",
            "position_role": "role",
            "stage": "stage",
            "centroid_accuracy": "nearest centroid",
            "lens_value_accuracy": "stage lens",
            "final_value_accuracy": "model's answer",
        },
    )


def _interventions_table() -> Table:
    return Table(
        "Interventions",
        "interventions",
        {
            "intervention": "intervention",
            "rank": "rank",
            "split": "split",
            "baseline_answer_accuracy": "accuracy",
            "intervened_answer_accuracy": "after",
            "baseline_margin": "margin",
            "intervened_margin": "after",
        },
    )


def _rescue_table() -> Table:
    return Table(
        "Rescue",
        "rescue",
        {
            "condition": "condition",
            "value_accuracy": "value accuracy",
            **{f"rescue_{scalar}": f"rescue, {scalar.replace('_', ' ')}" for scalar in RESCUED},
        },
    )
