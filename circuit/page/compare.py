"""One page over several runs: learning, separation of each winner, attribution shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuit.errors import CircuitError
from circuit.figures.charts import (
    TERM_NAMES,
    TICKS,
    at_step,
    chart,
    colour,
    exact,
    lines,
    named,
)
from circuit.lazy import alt
from circuit.page.formation import (
    PageResult,
    left_out_fact,
    page_folder,
)
from circuit.page.html import render
from circuit.page.learning import EVALUATED, METRICS, evaluations
from circuit.page.panel import (
    Missing,
    Panel,
    Record,
    Source,
    Table,
    pick,
    slider_steps,
    training_command,
)
from circuit.page.reports import MATCH, Reports, asked_for, with_inputs
from circuit.reading import values_of
from circuit.reports.report import find_report
from circuit.reports.written import ANEW, Written
from circuit.runs.checkpointed import CheckpointedRun, open_folder
from circuit.schemas import is_over_all
from circuit.training.run_folder import read_metrics

FILE = "comparison.html"
"""Name of the page beside the first run's folder."""
ATTRIBUTION = "bilinear-qk-rank-adam-state-attribution"
_SHARE = ("run", "scalar", "window", "actual", "term", "contribution", "share", "closure_path")


@dataclass(frozen=True)
class _Member:
    """One of the compared runs."""

    name: str
    run: CheckpointedRun
    reports: Reports

    @property
    def folder(self) -> str:
        return self.run.config.output_dir


def comparison_page(
    runs: Sequence[str | Path], output: str | Path | None = None, *, overwrite: bool = False
) -> PageResult:
    """Write one page over several runs, such as seeds or ablations.

    Args:
        output: the HTML file; `comparison.html` beside the first run's folder by default.
        overwrite: replace a page that this command wrote there before.

    Raises:
        CircuitError: there are fewer than two runs, one is named twice, as `formation_page`.
    """
    if len(runs) < 2:
        raise CircuitError(f"{len(runs)} run to compare", expected="two or more", where="RUN")
    opened = [open_folder(run) for run in runs]
    if len({run.path.resolve() for run in opened}) < len(opened):
        raise CircuitError("a run is named twice", where="RUN", fix="name each once")
    path = Path(output) if output is not None else opened[0].path.parent / FILE
    with page_folder(path, overwrite=overwrite) as folder:
        names = _names(opened)
        members = [_Member(n, r, Reports(r)) for n, r in zip(names, opened, strict=True)]
        panels = [_settings(members), _learning(members), _separation(members), _shares(members)]
        with values_of(path.parent, fix="make the reports of these runs again"):
            steps = slider_steps(panels, [])
        left_out = [f"{m.name}: {file}" for m in members for file in m.reports.left_out]
        text = render(
            title=f"{len(members)} runs compared",
            facts=[*names, *left_out_fact(left_out)],
            panels=panels,
            steps=steps,
            further=[],
        )
        folder.write_text(path.name, text)
    return PageResult(path, path.stat().st_size, tuple(panels), tuple(left_out))


def _names(runs: Sequence[CheckpointedRun]) -> list[str]:
    """The runs' names; where two have the same, those of their folders, then with their parents."""
    for name in (
        lambda run: run.config.name,
        lambda run: run.path.resolve().name,
        lambda run: "/".join(run.path.resolve().parts[-2:]),
    ):
        names = [str(name(run)) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _settings(members: Sequence[_Member]) -> Panel:
    """What the configs differ in."""
    flat = [_flat(member.run.config.model_dump(mode="json")) for member in members]
    keys = [key for key in dict.fromkeys(k for one in flat for k in one) if key != "output_dir"]
    rows: list[Record] = [
        {"setting": key, **{m.name: one.get(key) for m, one in zip(members, flat, strict=True)}}
        for key in keys
        if len({str(one.get(key)) for one in flat}) > 1
    ]
    columns = {"setting": "setting", **{member.name: member.name for member in members}}
    return Panel(
        "settings",
        "What differs",
        "Which settings tell these runs apart?",
        tables=[Table("Settings that differ", "settings", columns)],
        data={"settings": rows},
        sources=[
            Source(
                f"{member.name}: run_config.json",
                f"{member.folder}/run_config.json",
                training_command(member.folder),
            )
            for member in members
        ],
        notes=[] if rows else ["The configs are equal but for their folders."],
    )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _learning(members: Sequence[_Member]) -> Panel:
    rows: list[Record] = []
    sources, missing = list[Source](), list[Missing]()
    for member in members:
        evaluated = evaluations(read_metrics(member.run.path))
        rows += [{"run": member.name, **row} for row in evaluated]
        command = training_command(member.folder)
        if evaluated:
            sources.append(Source(f"{member.name}: {METRICS}", METRICS, command))
        else:
            missing.append(Missing(f"{member.name}: evaluation rows", command))
    shade = colour("run", [member.name for member in members])
    charts = [
        chart(
            f"accuracy_{split}",
            f"Answer accuracy, {split}",
            {"evaluation": rows},
            lines(
                *("evaluation", "answer_accuracy", "answer accuracy", shade),
                ("run", *EVALUATED),
                where=f"datum.split === {split!r}",
                domain=[0, 1],
            ),
            at_step(),
        )
        for split in dict.fromkeys(row["split"] for row in rows)
    ]
    columns = ("run", "step", "split", "answer_accuracy", "loss")
    return Panel(
        "learning",
        "Learning curves",
        "Which run learns to answer, and when?",
        charts=charts,
        tables=[Table("Evaluation", "evaluation", {column: column for column in columns})],
        data={"evaluation": rows},
        sources=sources,
        missing=missing,
    )


def _separation(members: Sequence[_Member]) -> Panel:
    rows: list[Record] = []
    sources, missing = list[Source](), list[Missing]()
    columns = ("run", "step", "head", "score", "separation", "support_wins", "answer_margin")
    for member in members:
        report = _best(member, MATCH, missing)
        if report is None:
            continue
        with values_of(report.path, fix=ANEW):
            head, score = (report.summary["winner"][name] for name in ("head", "score"))
            every = ({"run": member.name, **row} for row in report.results.rows())
            rows += [
                pick(row, columns)
                for row in every
                if (row["head"], row["score"]) == (head, score) and is_over_all(row)
            ]
        sources.append(_of(member, report))
    shade = colour("run", [member.name for member in members])
    charts = [
        chart(
            column,
            title,
            {"match": rows},
            lines("match", column, y_title, shade, columns),
            at_step(),
        )
        for column, title, y_title in (
            ("separation", "QK separation of each run's winner", "separation"),
            ("support_wins", "Reads whose support beats every distractor", "share of reads"),
        )
    ]
    return Panel(
        "separation",
        "Separation of the winners",
        "Does every run grow a head that matches, and when?",
        charts=charts if rows else [],
        tables=[Table("Winners", "match", {column: column for column in columns})] if rows else [],
        data={"match": rows} if rows else {},
        sources=sources,
        missing=missing,
    )


def _shares(members: Sequence[_Member]) -> Panel:
    rows: list[Record] = []
    sources, missing = list[Source](), list[Missing]()
    for member in members:
        report = _best(member, ATTRIBUTION, missing)
        if report is not None:
            with values_of(report.path, fix=ANEW):
                rows += share_rows(member.name, report.summary["windows"][0])
            sources.append(_of(member, report))
    terms = list(dict.fromkeys(row["term"] for row in rows))
    bars = (
        named("shares")
        .mark_bar()
        .encode(
            y=alt.Y("run:N").title(None).sort([member.name for member in members]),
            x=alt.X("share:Q")
            .title("share of the actual change")
            .axis(format="%", tickCount=TICKS)
            .stack("zero"),
            color=colour("term", terms),
            tooltip=exact(*_SHARE),
        )
    )
    title = "Path contribution of each term over the actual change, whole window"
    drawn = chart("shares", title, {"shares": rows}, bars, height=34 * len(members))
    return Panel(
        "shares",
        "Attribution shares",
        "Do the same terms of the optimizer carry the match in every run?",
        charts=[drawn] if rows else [],
        tables=[Table("Shares", "shares", {column: column for column in _SHARE})] if rows else [],
        data={"shares": rows} if rows else {},
        sources=sources,
        missing=missing,
        notes=[
            "A share is the term's path contribution over the actual change of the same window;"
            " windows and bases differ where the table says so."
        ]
        if rows
        else [],
    )


def _best(member: _Member, command: str, missing: list[Missing]) -> Written | None:
    """The member's most complete report of a command; asked for where there is none."""
    kind = find_report(command)
    assert kind is not None
    shown = member.reports.shown(kind)
    if shown:
        return shown[-1]
    needed = with_inputs([asked_for(member.reports, kind)], member.reports)
    missing += [Missing(f"{member.name}: {one.what}", one.command) for one in needed]
    return None


def share_rows(run: str, window: dict[str, Any]) -> list[Record]:
    """One row a term of a report's summary: its path contribution, over the actual change."""
    actual = window["actual"]
    return [
        {
            "run": run,
            "scalar": window["scalar"],
            "window": f"{window['start_step']}:{window['end_step']}",
            "actual": actual,
            "term": TERM_NAMES.get(term, term),
            "contribution": value,
            "share": value / actual if actual else None,
            "closure_path": window["closure"]["path"],
        }
        for term, value in window["path"].items()
    ]


def _of(member: _Member, report: Written) -> Source:
    source = member.reports.source(report)
    return Source(f"{member.name}: {source.file}", source.rows, source.command, source.law)
