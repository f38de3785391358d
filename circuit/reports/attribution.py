"""What every attribution is: scalars of families, step by step along a trace.

Rows are those of `StepAttribution.rows`; everything else is computed from rows alone, so that
shards that are joined (circuit/reports/shards.py) give the bytes of an unsharded run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import field_validator

from circuit.artifacts import Row, dump_row, in_row
from circuit.attribution.losses import LossScope
from circuit.attribution.series import Collected, Series, check_windows
from circuit.core.groups import Partition
from circuit.core.paths import path_rule
from circuit.options import Option, parse_window
from circuit.quoting import markdown_text
from circuit.reports.attribution_law import closing_law, path_words, percent
from circuit.reports.report import Findings, Results
from circuit.reports.tables import Table
from circuit.reports.traced import PathOptions, Scalars, TracedReport
from circuit.scalars.family import ScalarFamily

if TYPE_CHECKING:
    from circuit.attribution.window import Rows
    from circuit.figures.charts import Chart
    from circuit.runs.base import Replayable

SHORT_TERMS = {
    "weight_decay": "decay",
    "adam_current_gradient": "gradient",
    "adam_historical_momentum": "momentum",
    "current_gradient": "gradient",
    "historical_momentum": "momentum",
}
"""The terms of an update as headings of narrow columns."""
COURSES = 8
"""Further scalars whose course is drawn, at most."""


class AttributionOptions(PathOptions):
    """Which steps of which trace are attributed, and how.

    Attributes:
        windows: `a:b`, summed up besides the whole.
    """

    partitions: Annotated[
        tuple[Partition, ...],
        Option(
            "Parameter groups in the rows: by layer, component (heads, MLPs), circuit (q, k, v, o"
            " of each head) or parameter (each tensor).",
            flag="--partition",
        ),
    ] = ("circuit",)
    loss_scope: Annotated[
        LossScope,
        Option("full_lm, or answer: also what SGD on the answers' loss alone would have done."),
    ] = "full_lm"
    windows: Annotated[
        tuple[str, ...], Option("Window a:b to sum up besides the whole.", flag="--window")
    ] = ()
    workers: Annotated[
        int, Option("Processes; best with a trace recorded with --threads 1.", least=1)
    ] = 1

    @field_validator("windows", mode="before")
    @classmethod
    def _as_text(cls, windows: Iterable[Any]) -> list[Any]:
        """Also pairs of steps, as reports of schema 1 have them."""
        return [one if isinstance(one, str) else ":".join(map(str, one)) for one in windows]

    def check(self) -> None:
        """Also refuses windows without a form."""
        super().check()
        parse_windows(self.windows)

    def within(self, trace: Replayable) -> tuple[int, int]:
        """Also refuses windows that are not within the steps."""
        start, end = super().within(trace)
        check_windows(parse_windows(self.windows), start, end)
        return start, end


def parse_windows(texts: Iterable[str]) -> list[tuple[int, int]]:
    """Windows `a:b` as pairs of steps.

    Raises:
        CircuitError: one is none.
    """
    return [parse_window(text, "`windows`") for text in texts]


A = TypeVar("A", bound=AttributionOptions)


class Attribution(TracedReport[A]):
    """Attributes scalars over a window of a trace.

    Attributes:
        family: whose options are the report's own, where it is a named form.
    """

    panel = "Attribution"
    title = "Attribution by optimizer term"
    question = (
        "Which term of the optimizer's updates moved a number of the weights, by how much, and"
        " through which parameters?"
    )
    family: ClassVar[type[ScalarFamily]]

    def families(self) -> tuple[Scalars, ...]:
        """What is followed."""
        names = self.family.declared()
        return (self.family(**{name: getattr(self.options, name) for name in names}),)

    def scalar_facts(self, inputs: Any) -> dict[str, Any]:
        """What the families say of what they read."""
        (family,) = self.followed
        return family.provenance(inputs)

    def prepare(self) -> None:
        super().prepare()
        from circuit.attribution.window import Job

        asked = self.options
        folder = asked.optimizer_trace_dir
        self.job = Job(folder, self.source, asked.path, asked.partitions, asked.loss_scope)
        self.kept = KeptRows()

    def points(self) -> Iterator[Rows]:
        from circuit.attribution.window import attribute_window

        start, end = self.steps
        self.tell("building the scalars")
        worker = self.job.prepare(self.run, self.inputs)
        yield from attribute_window(worker, start, end, workers=self.options.workers)

    def measure(self, point: Rows) -> list[Row]:
        self.kept.add(point)
        return []

    def conclude(self, rows: list[Row]) -> Findings:
        findings = self.kept.findings(self.options.windows, self.options.path)
        facts = self.origin.get("scalars", [self.origin])
        pairs = [fact[name] for fact in facts for name in ("scored_reads", "pairs") if name in fact]
        return replace(findings, summary={**findings.summary, "pairs": pairs})

    # --- what is shown ---

    @classmethod
    def size(cls, results: Results[A]) -> tuple[float, ...]:
        return (results.summary["end_step"] - results.summary["start_step"],)

    @classmethod
    def notes(cls, results: Results[A]) -> list[str]:
        summaries = results.summary["windows"]
        lead = next(s for s in summaries if s["scalar"] == results.summary["lead"])
        references = ", ".join(f"`{k}` {value:+.4g}" for k, value in lead["references"].items())
        return [
            f"{_averaged(results)}"
            f"Path rule `{results.options.path}`; the terms' shares are path contributions, which"
            " add up to the actual change. "
            + (
                "What the scalars hold constant is fixed, so changes telescope from window to"
                " window."
                if all(s["telescopes"] for s in summaries)
                else "What a scalar holds constant (a basis, a competitor) is taken anew at each"
                " step, so changes are per step and their sum is not the last value minus the"
                " first."
            ),
            f"Charts are of {markdown_text(lead['scalar'])}{_further(results)}. What is not in its"
            f" sum, first order: {references}."
            # a recording's gradients are behind any clipping, whose factor nobody knows
            + (f" Mean clip factor {clip:.4f}." if (clip := lead["mean_clip_factor"]) < 1 else ""),
        ]

    @classmethod
    def tables(cls, results: Results[A]) -> list[Table]:
        summaries = results.summary["windows"]
        lead = next(s for s in summaries if s["scalar"] == results.summary["lead"])
        names = {s["scalar"] for s in summaries}
        shared = _shared_prefix(sorted(names)) if len(names) > 1 else ""
        terms = {f"path.{term}": SHORT_TERMS.get(term, term) for term in lead["path"]}
        columns = {
            "scalar": "scalar",
            "steps": "steps",
            "actual": ("actual", "+.4g"),
            **{
                key: (name, "+.4g" if name != "rounding" else "+.1g") for key, name in terms.items()
            },
            "closure": ("closure %", ".2g"),
            "closure_first_order": ("1st order %", ".2g"),
            "sign_matches": ("same sign", ".0%"),
        }
        rows = [
            {
                "scalar": s["scalar"].removeprefix(shared).lstrip(".") or "all",
                "steps": f"{s['start_step']}:{s['end_step']}",
                "actual": s["actual"],
                **{f"path.{term}": share for term, share in s["path"].items()},
                "closure": percent(s["closure"]["path"]),
                "closure_first_order": percent(s["closure"]["first_order"]),
                "sign_matches": s["sign_matches"]["path"],
            }
            for s in summaries
        ]
        title = f"Contributions to {shared}" if shared else "Contributions"
        tables = [Table(title, columns, rows, console=32)]
        for partition, groups in lead["groups"].items():
            sums = {group: sum(kinds["path"].values()) for group, kinds in groups.items()}
            ranked = sorted(sums, key=lambda group: -abs(sums[group]))[:16]
            columns = {"group": "group", "path": ("path", "+.4g")}
            columns |= {key: (name, "+.3g") for key, name in terms.items()}
            rows = [
                {"group": group, "path": sums[group]}
                | {f"path.{term}": share for term, share in groups[group]["path"].items()}
                for group in ranked
            ]
            tables.append(Table(f"{lead['scalar']} by group ({partition})", columns, rows))
        return tables

    @classmethod
    def charts(cls, results: Results[A]) -> list[Chart]:
        from circuit.figures.attribution import course_charts, scalars_chart, series_charts

        ranked = _ranked(results)
        drawn = [one["scalar"] for one in ranked[: 1 + COURSES]]
        # of one scalar other lines are not even parsed; of several the file is read once
        holding = in_row("scalar", drawn[0]) if len(drawn) == 1 else ""
        series = Series.collect(
            row for row in results.rows(holding=holding) if row["scalar"] in drawn
        )
        charts = series_charts(series[drawn[0]])
        if len(ranked) > 1:
            charts.append(scalars_chart(ranked))
        return charts + course_charts([series[name] for name in drawn[1:]])


def _ranked(results: Results[A]) -> list[Row]:
    """What every scalar did over the whole: the lead, then by how much each changed."""
    summary = results.summary
    steps = (summary["start_step"], summary["end_step"])
    whole = [s for s in summary["windows"] if (s["start_step"], s["end_step"]) == steps]
    by_name = {one["scalar"]: one for one in whole}
    return sorted(
        by_name.values(), key=lambda one: (one["scalar"] != summary["lead"], -abs(one["actual"]))
    )


def _averaged(results: Results[A]) -> str:
    """Over how many pairs each of the families that read pairs takes its means."""
    pairs = results.summary.get("pairs", ())
    return f"Means over {', '.join(map(str, pairs))} pairs. " if pairs else ""


def _further(results: Results[A]) -> str:
    """What a note says of the scalars besides the lead."""
    further = len(_ranked(results)) - 1
    if not further:
        return ""
    drawn = "every other one has"
    if further > COURSES:
        drawn = f"of {further} others the {COURSES} that follow have"
    return f", the scalar that changed most; {drawn} a chart below"


class KeptRows:
    """Rows as text, and their columns: as dicts, those of a long run would fill the memory."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.collected = Collected()

    def add(self, rows: Iterable[Row]) -> None:
        """Rows that follow those before."""
        for row in rows:
            self.lines.append(dump_row(row))
            self.collected.add(row)

    def findings(
        self, windows: Sequence[str], path: str, series: dict[str, Series] | None = None
    ) -> Findings:
        """The rows, and what they add up to by a path rule."""
        series = self.collected.series() if series is None else series
        lead = _lead(series)
        every = [(lead.start, lead.end), *parse_windows(windows)]
        summaries = [one.window(*window).summary() for window in every for one in series.values()]
        summary = {
            "lead": lead.scalar,
            "start_step": lead.start,
            "end_step": lead.end,
            "windows": summaries,
        }
        law = closing_law(summaries[: len(series)], lead.scalar)
        law += f"; {path_words(path_rule(path), list(series.values()))}"
        return Findings("\n".join([*self.lines, ""]), summary, law)


def _lead(series: Mapping[str, Series]) -> Series:
    """The scalar that changed most; parts of another one (`<name>.lag2`) do not stand for it."""
    whole = [s for n, s in series.items() if not any(n.startswith(f"{m}.") for m in series)]
    return max(whole, key=lambda one: abs(float(one.actual.sum())))


def _shared_prefix(names: Sequence[str]) -> str:
    """The dotted parts that all names begin with."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    same = itertools.takewhile(lambda column: len(set(column)) == 1, parts)
    return ".".join(column[0] for column in same)
