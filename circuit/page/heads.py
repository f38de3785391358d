"""Panels about heads: where and when they match and write, and the weights of the winner."""

from __future__ import annotations

from collections.abc import Sequence

from circuit.lazy import alt
from circuit.figures.charts import (
    at_step,
    chart,
    chosen,
    colour,
    exact,
    heads_of,
    heat,
    lines,
    named,
    steps,
)
from circuit.page.commands import PROGRESS, SEPARATION, SVD, Home, command_for
from circuit.page.found import Found, Reports
from circuit.page.panel import Chart, Missing, Panel, Record, Source, Table, pick

MATCH = (
    *("step", "head", "score", "lag", "reads", "separation", "support_wins", "support_mean"),
    *("distractor_mean", "answer_margin", "top_singular_value"),
)
WRITE = (
    *("step", "head", "pairs", "ov_map_value_margin", "head_value_margin_dla", "head_margin_dla"),
    *("attention_support", "attention_distractors"),
)
WEIGHTS = ("step", "matrix", "component", "top_singular_value", "effective_rank", "top3_mass")
MEANS = "ov_write_progress_means.jsonl"
VALUES = "weight_svd_singular_values.jsonl"
SPECTRUM = ("step", "matrix", "component", "rank", "singular_value")


def separation_report(reports: Reports) -> Found | None:
    """The match separation of the most heads, then the most checkpoints."""
    return reports.best(
        SEPARATION,
        lambda r: (len({c["head"] for c in r.summary["heads"]}), len(r.parameters["checkpoints"])),
    )


def winner_of(reports: Reports) -> tuple[str, str] | None:
    """The head whose match grew most, and the score that says so."""
    found = separation_report(reports)
    if found is None:
        return None
    return found.summary["winner"]["head"], found.summary["winner"]["score"]


def match_rows(report: Found) -> list[Record]:
    """All heads over all reads, and the winner by lag; in the winner's score."""
    winner = report.summary["winner"]
    return [
        pick(row, MATCH)
        for row in report.rows()
        if row["score"] == winner["score"]
        and (row["lag"] == "all" or row["head"] == winner["head"])
    ]


def heads_panel(reports: Reports, home: Home) -> Panel:
    """The head map: QK separation and OV margin, heads by steps."""
    charts: list[Chart] = []
    data: dict[str, list[Record]] = {}
    tables, sources, missing, notes = [], list[Source](), [], []
    match = separation_report(reports)
    if match is None:
        command = command_for(SEPARATION, home)
        missing.append(Missing("QK separation of every head", command))
    else:
        rows = match_rows(match)
        data["match"] = [row for row in rows if row["lag"] == "all"]
        data["match_by_lag"] = rows = [row for row in rows if row["lag"] != "all"]
        sources.append(match.source(home.folder))
        winner = match.summary["winner"]
        charts += _match_charts(data["match"], rows, winner["head"], winner["score"])
        tables.append(_match_table())
        grown = match.summary["first_step"] < match.summary["last_step"]
        chosen_for = "grew most" if grown else "separates most"
        first = f" went from {winner['separation_at_first']:.2f} to" if grown else " is"
        notes.append(
            f"{winner['head']} {chosen_for}: its separation ({winner['score']}){first}"
            f" {winner['separation_at_last']:.2f}; at the end its support beats every distractor in"
            f" {100 * winner['support_wins_at_last']:.1f}\u00a0% of the reads."
        )
    write = reports.best(
        PROGRESS,
        lambda r: (len(r.parameters["heads"]), len(r.summary["steps"]), r.summary["pairs"]),
    )
    if write is None:
        command = command_for(PROGRESS, home)
        missing.append(Missing("OV margin of every head", command))
    else:
        data["write"] = [pick(row, WRITE) for row in write.rows(MEANS)]
        sources.append(write.source(home.folder, MEANS))
        heads = heads_of(data["write"])
        title = "OV margin of the support's value, by W_OV alone"
        layers_drawn = heat("write", "ov_map_value_margin", WRITE, data["write"])
        height = 22 * len(heads)
        charts.insert(1, chart(title, "write", *layers_drawn, height=height))
        tables.append(_write_table())
    return Panel(
        "heads",
        "The head map",
        "Which head comes to match the query to its support, which one writes the value, and when?",
        charts=charts,
        tables=tables,
        data=data,
        sources=sources,
        missing=missing,
        notes=notes,
    )


def _match_charts(
    rows: Sequence[Record], lags: Sequence[Record], winner: str, score: str
) -> list[Chart]:
    heads = heads_of(rows)
    layers = heat("match", "separation", MATCH, rows)
    title = f"QK separation ({score}): support minus distractors"
    names = sorted({row["lag"] for row in lags}, key=int)
    shade = colour("lag", names, labels={name: f"lag {name}" for name in names})
    by_lag = lines("match_by_lag", "separation", "separation", shade, MATCH)
    return [
        chart(title, "match", *layers, height=22 * len(heads)),
        chart(f"{winner}: separation of the reads of each lag", "match_by_lag", by_lag, at_step()),
    ]


def weights_panel(reports: Reports, home: Home) -> Panel:
    """Singular values and effective rank of the winner's matrices."""
    title = "Singular values and effective rank"
    question = "Do the winner's QK and OV maps grow a few directions, or all of them?"
    report = reports.best(
        SVD, lambda r: (len(r.summary["steps"]), r.parameters["max_singular_values"])
    )
    if report is None:
        missing = Missing("SVD of every head", command_for(SVD, home))
        return Panel("weights", title, question, missing=[missing])
    winner = winner_of(reports)
    grown = report.summary["growth"]["W_QK"][0]["component"]
    head = winner[0] if winner else grown
    data = {
        "weights": [pick(r, WEIGHTS) for r in report.rows() if r["component"] == head],
        "spectrum": [
            pick(r, SPECTRUM) for r in report.rows(VALUES, holding=f'"component": "{head}"')
        ],
    }
    which = "whose match grew most" if winner else "whose W_QK grew most"
    ranks = [str(rank) for rank in sorted({row["rank"] for row in data["spectrum"]})]
    return Panel(
        "weights",
        title,
        question,
        charts=_weight_charts(head, ranks),
        tables=[_weights_table()],
        data=data,
        sources=[report.source(home.folder), report.source(home.folder, VALUES)],
        notes=[f"{head} is the head {which}."],
    )


def _weight_charts(head: str, ranks: Sequence[str]) -> list[Chart]:
    curves = []
    for matrix in ("W_QK", "W_OV"):
        drawn = (
            named("spectrum")
            .transform_filter(f"datum.matrix === '{matrix}'")
            .mark_line(strokeWidth=1.6, point=alt.OverlayMarkDef(size=20, filled=True))
            .encode(
                x=steps(),
                y=alt.Y("singular_value:Q").title("singular value"),
                color=alt.Color("rank:Q")
                .scale(scheme="viridis", reverse=True)
                .legend(orient="top", title="rank", tickMinStep=1, gradientLength=140),
                detail="rank:N",
                tooltip=exact(*SPECTRUM),
            )
        )
        curves.append(chart(f"{head} {matrix}: singular values", "spectrum", drawn, at_step()))
    shade = colour("matrix", ["W_QK", "W_OV"])
    rank = lines("weights", "effective_rank", "effective rank", shade, WEIGHTS)
    spectrum = (
        named("spectrum")
        .transform_filter(chosen())
        .mark_line(point=alt.OverlayMarkDef(size=28, filled=True))
        .encode(
            x=alt.X("rank:O").title("rank").axis(labelAngle=0).scale(domain=list(map(int, ranks))),
            y=alt.Y("singular_value:Q").title("singular value").scale(zero=True),
            color=shade,
            tooltip=exact(*SPECTRUM),
        )
    )
    return [
        *curves,
        chart(f"{head}: effective rank", "weights", rank, at_step()),
        chart(f"{head}: spectrum at the step", "spectrum", spectrum),
    ]


def _match_table() -> Table:
    return Table(
        "QK separation",
        "match",
        {
            "head": "head",
            "separation": "separation",
            "support_wins": "support wins",
            "support_mean": "support",
            "distractor_mean": "distractors",
        },
    )


def _write_table() -> Table:
    return Table(
        "OV margin",
        "write",
        {
            "head": "head",
            "ov_map_value_margin": "OV map margin",
            "head_value_margin_dla": "margin DLA",
            "attention_support": "attention on support",
            "attention_distractors": "on distractors",
        },
    )


def _weights_table() -> Table:
    return Table(
        "Weights",
        "weights",
        {
            "component": "head",
            "matrix": "matrix",
            "top_singular_value": "top singular value",
            "effective_rank": "effective rank",
            "top3_mass": "mass of the top 3",
        },
    )
