"""What every attribution is: scalars of a family, step by step along a trace; and shards joined.

Rows are those of `StepAttribution.rows`; everything else is computed from rows alone, so that
shards that are joined give the bytes of an unsharded run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import field_validator

from circuit.artifacts import Row, dump_row
from circuit.attribution.attribute import LossScope
from circuit.attribution.groups import Partition
from circuit.attribution.series import Collected, Series, check_windows
from circuit.attribution.window import Job, Rows, attribute_window
from circuit.core.paths import path_rule
from circuit.errors import CircuitError
from circuit.figures.attribution import scalars_chart, series_charts
from circuit.figures.charts import Chart
from circuit.options import Option, ProbeOptions
from circuit.reports.inputs import Inputs, traced_inputs
from circuit.reports.report import Findings, Report, ReportResult, Results, open_report
from circuit.reports.tables import Table
from circuit.reports.written import SUFFIX, Written, read_report
from circuit.scalars.family import OwnScalars, ScalarFamily
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig

if TYPE_CHECKING:
    from circuit.scalars.base import Scalar

_WINDOW = re.compile(r"(\d+):(\d+)")
_OF_A_SHARD = ("start_step", "end_step", "windows", "workers")
_PATHS = ("probe_set", "optimizer_trace_dir", "scalar_pair_rows")
_DIGESTS = ("_digest", "_sha256")
_MERGED = "shard_overrides"
SHORT_TERMS = {
    "weight_decay": "decay",
    "adam_current_gradient": "gradient",
    "adam_historical_momentum": "momentum",
    "current_gradient": "gradient",
    "historical_momentum": "momentum",
}
"""The terms of an update as headings of narrow columns."""


class AttributionOptions(ProbeOptions):
    """Which steps of which trace are attributed, and how.

    Attributes:
        start_step, end_step: states that the steps take one to the other; the trace's ends.
        windows: `a:b`, summed up besides the whole.
    """

    optimizer_trace_dir: Annotated[Path, Option("Folder of a trace.", kind="trace")]
    path: Annotated[
        str,
        Option(
            "How gradients are averaged along a step: midpoint, simpson or gauss:N.",
            kind="path_rule",
        ),
    ] = "simpson"
    partitions: Annotated[
        tuple[Partition, ...], Option("Parameter groups in the rows.", flag="--partition")
    ] = ("circuit",)
    loss_scope: Annotated[
        LossScope,
        Option("full_lm, or answer: also what SGD on the answers' loss alone would have done."),
    ] = "full_lm"
    start_step: Annotated[
        int | None, Option("First state.", least=0, unset="the trace's first")
    ] = None
    end_step: Annotated[int | None, Option("Last state.", least=1, unset="the trace's last")] = None
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
        """The path rule and the windows have a form."""
        super().check()
        path_rule(self.path)
        parse_windows(self.windows)

    def within(self, trace: ReplayedRun) -> tuple[int, int]:
        """The steps in a trace; all of it by default.

        Raises:
            CircuitError: they are not recorded, or a window is not within them.
        """
        start = trace.manifest.start_step if self.start_step is None else self.start_step
        end = trace.store.last_step if self.end_step is None else self.end_step
        trace.store.check_window(start, end)
        check_windows(parse_windows(self.windows), start, end)
        return start, end


def parse_windows(texts: Iterable[str]) -> list[tuple[int, int]]:
    """Windows `a:b` as pairs of steps.

    Raises:
        CircuitError: one is none.
    """
    windows = []
    for text in texts:
        match = _WINDOW.fullmatch(text)
        if match is None or int(match[1]) >= int(match[2]):
            raise CircuitError(
                f"window '{text}'", where="`windows`", expected="a:b with a < b, such as 0:750"
            )
        windows.append((int(match[1]), int(match[2])))
    return windows


Scalars = ScalarFamily | OwnScalars
A = TypeVar("A", bound=AttributionOptions)


@dataclass(frozen=True)
class TracedScalars:
    """The scalars of some families on a trace (a `ScalarSource`)."""

    config: TrainConfig
    probe_set: Path
    families: tuple[Scalars, ...]
    splits: tuple[str, ...] = ()

    def inputs(self, run: ReplayedRun) -> Inputs:
        """What they are made of, after what the trace does not have is refused.

        Raises:
            CircuitError: names the step; or config or probe set are of another run.
        """
        for family in self.families:
            family.check_run(run)
        return traced_inputs(self.config, self.probe_set, run, splits=self.splits or None)

    def scalars(self, inputs: Inputs) -> list[Scalar]:
        """All of them, family by family."""
        return [scalar for family in self.families for scalar in family.build(inputs)]


class Attribution(Report[A]):
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
    origin: Mapping[str, Any]

    def families(self) -> tuple[Scalars, ...]:
        """What is followed."""
        names = self.family.declared()
        return (self.family(**{name: getattr(self.options, name) for name in names}),)

    def scalar_facts(self, inputs: Inputs) -> dict[str, Any]:
        """What the families say of what they read."""
        (family,) = self.followed
        return family.provenance(inputs)

    def check(self) -> None:
        super().check()
        self.followed = self.families()
        for family in self.followed:
            family.check_model(self.config.model)

    def prepare(self) -> None:
        asked = self.options
        self.run = trace = ReplayedRun.open(asked.optimizer_trace_dir)
        start, end = asked.within(trace)
        self.options = asked.model_copy(update={"start_step": start, "end_step": end})
        source = TracedScalars(self.config, asked.probe_set, self.followed, asked.splits)
        folder = asked.optimizer_trace_dir
        self.job = Job(folder, source, asked.path, asked.partitions, asked.loss_scope)
        self.inputs = source.inputs(trace)
        store = trace.store
        self.origin = {
            **self.inputs.provenance(),
            **self.scalar_facts(self.inputs),
            "trace": {
                "config_digest": store.manifest.config.digest(),
                "benchmark_digest": store.manifest.benchmark_digest,
                "state_at_start": store.state_digests(start),
                "state_at_end": store.state_digests(end),
                "environment": store.manifest.environment,
            },
        }
        self.kept = _Kept()

    def points(self) -> Iterator[Rows]:
        start, end = self._steps()
        worker = self.job.prepare(self.run, self.inputs)
        yield from attribute_window(worker, start, end, workers=self.options.workers)

    @property
    def total(self) -> int:
        start, end = self._steps()
        return end - start

    def measure(self, point: Rows) -> list[Row]:
        self.kept.add(point)
        return []  # as dicts, the rows of a long run with its groups would fill the memory

    def conclude(self, rows: list[Row]) -> Findings:
        return self.kept.findings(self.options.windows)

    def provenance(self) -> dict[str, Any]:
        return dict(self.origin)

    @property
    def device(self) -> str:
        return str(self.origin["trace"]["environment"]["device"])

    def _steps(self) -> tuple[int, int]:
        start, end = self.options.start_step, self.options.end_step
        assert start is not None and end is not None, "prepare() has set them"  # noqa: PT018
        return start, end

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
            f"Path rule `{results.options.path}`; the terms' shares are path contributions, which"
            " add up to the actual change. "
            + (
                "What the scalars hold constant is fixed, so changes telescope from window to"
                " window."
                if all(s["telescopes"] for s in summaries)
                else "A basis is taken anew at each step, so changes are per step and their sum is"
                " not the last value minus the first."
            ),
            f"Charts are of {lead['scalar']}, the scalar that changed most. What is not in its"
            f" sum, first order: {references}. Mean clip factor {lead['mean_clip_factor']:.4f}.",
        ]

    @classmethod
    def tables(cls, results: Results[A]) -> list[Table]:
        summaries = results.summary["windows"]
        lead = next(s for s in summaries if s["scalar"] == results.summary["lead"])
        shared = _shared_prefix([s["scalar"] for s in summaries])
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
                "closure": _percent(s["closure"]["path"]),
                "closure_first_order": _percent(s["closure"]["first_order"]),
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
        lead, summaries = results.summary["lead"], results.summary["windows"]
        rows = results.rows(holding=f'"scalar": "{lead}"')
        series = Series.collect(row for row in rows if row["scalar"] == lead)[lead]
        steps = (results.summary["start_step"], results.summary["end_step"])
        whole = [s for s in summaries if (s["start_step"], s["end_step"]) == steps]
        whole = list({s["scalar"]: s for s in whole}.values())
        return [*series_charts(series), *([scalars_chart(whole)] if len(whole) > 1 else [])]


class _Kept:
    """Rows as text, and their columns."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.collected = Collected()

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.lines.append(dump_row(row))
            self.collected.add(row)

    def findings(self, windows: Sequence[str], series: dict[str, Series] | None = None) -> Findings:
        """The rows, and what they add up to."""
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
        return Findings("\n".join([*self.lines, ""]), summary, law)


def _lead(series: Mapping[str, Series]) -> Series:
    """The scalar that changed most; parts of another one (`<name>.lag2`) do not stand for it."""
    whole = [s for n, s in series.items() if not any(n.startswith(f"{m}.") for m in series)]
    return max(whole, key=lambda one: abs(float(one.actual.sum())))


def closing_law(summaries: Sequence[Mapping[str, Any]], lead: str) -> str:
    """How well the contributions add up over the whole window, in one sentence."""
    of_lead = next(s for s in summaries if s["scalar"] == lead)
    closure, rounding = of_lead["closure"], of_lead["path"]["rounding"]
    shown = {name: "-" if v is None else f"{_percent(v):.2g} %" for name, v in closure.items()}
    law = (
        f"the contributions to {lead} over steps {of_lead['start_step']}:{of_lead['end_step']}"
        f" close to {shown['path']} of the actual change {of_lead['actual']:+.4g} (first order:"
        f" {shown['first_order']}), step by step to {shown['path_absolute']} (first order:"
        f" {shown['first_order_absolute']}); the rounding residual carries {rounding:+.1g}"
    )
    others = [s for s in summaries if s["closure"]["path_absolute"] is not None]
    if len(summaries) > 1 and others:
        worst = max(others, key=lambda s: s["closure"]["path_absolute"])
        law += (
            f"; the worst of {len(summaries)} scalars, {worst['scalar']}, closes step by step to"
            f" {_percent(worst['closure']['path_absolute']):.2g} %"
        )
    return law


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _shared_prefix(names: Sequence[str]) -> str:
    """The dotted parts that all names begin with; the whole name if there is one only."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    same = itertools.takewhile(lambda column: len(set(column)) == 1, parts)
    return ".".join(column[0] for column in same)


# --- shards ---------------------------------------------------------------------------------------


def merge_attributions(
    output_dir: str | Path,
    parts: Sequence[Path],
    *,
    windows: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> ReportResult:
    """Join the shards of one attribution into the report of the whole window.

    Args:
        parts: folders of the shards, in any order.
        windows: `a:b`, of the whole's summary.

    Raises:
        CircuitError: a folder holds no attribution; the shards differ in command, options or
            inputs; there is a gap, an overlap, or the states at a seam are not the same.
    """
    if not parts:
        raise CircuitError("no shards to merge", expected="at least one folder")
    shards = sorted((_read_shard(Path(part)) for part in parts), key=lambda shard: shard.start)
    for earlier, later in itertools.pairwise(shards):
        _refuse_seam(earlier, later)
    first, last = shards[0], shards[-1]
    check_windows(parse_windows(windows), first.start, last.end)
    overrides = [entry for shard in shards for entry in shard.overrides]
    report = first.kind(
        first.options.model_copy(update={"end_step": last.end, "windows": tuple(windows)})
    )
    report.origin = {
        **first.inputs,
        "trace": {**first.trace, "state_at_end": last.trace["state_at_end"]},
        "merged_from": [[shard.start, shard.end] for shard in shards],
        **({_MERGED: overrides} if overrides else {}),
    }
    with open_report(first.kind, output_dir, overwrite=overwrite) as writer:
        kept = _Kept()
        for done, shard in enumerate(shards):
            if progress is not None:
                progress(done, len(shards), str(shard.report.path.parent))
            kept.add(shard.report.results.rows())
        series = kept.collected.series()
        if not series:
            raise CircuitError("the shards hold no rows", where=first.report.path.parent)
        for one in series.values():
            if (one.start, one.end) != (first.start, last.end):
                raise CircuitError(
                    f"the rows of {one.scalar} cover {one.start}:{one.end}",
                    where=first.report.path.parent,
                    expected=f"{first.start}:{last.end}, as the reports say",
                )
        return writer.write(report, kept.findings(windows, series))


@dataclass(frozen=True)
class _Shard:
    kind: type[Attribution[Any]]
    report: Written
    start: int
    end: int
    trace: Mapping[str, Any]

    @property
    def options(self) -> AttributionOptions:
        options: AttributionOptions = self.report.results.options
        return options

    @property
    def inputs(self) -> dict[str, Any]:
        """Digests of what was read, but for the trace."""
        facts = self.report.provenance.items()
        return {name: value for name, value in facts if name.endswith(_DIGESTS)}

    @property
    def overrides(self) -> list[dict[str, Any]]:
        """Steps and overrides of those calls behind the shard that had any."""
        if self.report.overrides is None:  # none, or a shard that was merged itself
            return list(self.report.provenance.get(_MERGED, ()))
        return [{"steps": [self.start, self.end], "overrides": self.report.overrides}]

    def settings(self) -> dict[str, Any]:
        """What has to be the same in all shards."""
        options = self.options.to_json().items()
        same = {name: value for name, value in options if name not in (*_OF_A_SHARD, *_PATHS)}
        trace = {f"trace {n}": self.trace[n] for n in ("config_digest", "benchmark_digest")}
        return {"command": self.report.command, **same, **self.inputs, **trace}


def _read_shard(folder: Path) -> _Shard:
    for path in sorted(folder.glob(f"*_attribution{SUFFIX}")):
        report = read_report(path)
        kind = report.kind
        if kind is None or not issubclass(kind, Attribution):
            continue
        report.refuse_another_runs()
        try:
            options, trace = report.results.options, report.provenance["trace"]
            shard = _Shard(kind, report, int(options.start_step), int(options.end_step), trace)
            _ = shard.settings(), trace["state_at_end"], trace["state_at_start"]
            return shard
        except (KeyError, TypeError) as error:
            raise CircuitError(
                f"is no report of {report.command} ({error!r})", where=path
            ) from None
    raise CircuitError(
        "holds no attribution", where=folder, expected="the output folder of an attribution"
    )


def _refuse_seam(earlier: _Shard, later: _Shard) -> None:
    ours, theirs = earlier.settings(), later.settings()
    where = later.report.path.parent
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise CircuitError(
                f"the shards differ in {name}: {ours.get(name)!r} and {theirs.get(name)!r}",
                where=where,
                expected=f"as in {earlier.report.path.parent}",
            )
    if later.start != earlier.end:
        what = "an overlap" if later.start < earlier.end else "a gap"
        raise CircuitError(
            f"{what} between {earlier.start}:{earlier.end} and {later.start}:{later.end}",
            where=where,
            expected=f"a shard that starts at {earlier.end}",
        )
    if earlier.trace["state_at_end"] != later.trace["state_at_start"]:
        raise CircuitError(
            f"the states at step {later.start} are not the same in both shards",
            where=where,
            fix="attribute both from traces of the same run",
        )
