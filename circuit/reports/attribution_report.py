"""What the two attribution commands share: run a job, join shards, write rows, page and figures.

Rows are those of `StepAttribution.rows`; everything else is computed from rows alone, so that
shards joined by `merge_attributions` give the bytes of an unsharded run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuit.artifacts import dump_row, read_jsonl
from circuit.attribution.series import Series, check_windows
from circuit.attribution.window import Job, attribute_window
from circuit.errors import CircuitError
from circuit.figures.attribution import changes_by_scalar, groups_of_terms, terms_and_closure
from circuit.reports.base import ReportResult, ReportWriter, open_report, report_name
from circuit.reports.inputs import Inputs
from circuit.strict_json import parse_json
from circuit.trace.replay import ReplayedRun

COMMANDS = (
    "bilinear-qk-rank-adam-state-attribution",
    "mlp-functional-write-adam-state-attribution",
)
_OWN_TO_A_SHARD = ("start_step", "end_step", "windows")
_PATHS = ("config", "probe_set", "optimizer_trace_dir", "scalar_pair_rows")


@dataclass(frozen=True)
class WindowOptions:
    """Which steps are attributed, by how many processes, and the windows of the summary."""

    start_step: int | None = None
    end_step: int | None = None
    windows: tuple[tuple[int, int], ...] = ()
    workers: int = 1

    def of(self, trace: ReplayedRun) -> tuple[int, int]:
        """The window in a trace; all of it by default.

        Raises:
            CircuitError: it is not recorded, or a window of the summary is not within it.
        """
        start = trace.manifest.start_step if self.start_step is None else self.start_step
        end = trace.store.last_step if self.end_step is None else self.end_step
        trace.store.check_window(start, end)
        check_windows(self.windows, start, end)
        return start, end


def report_attribution(
    command: str,
    job: Job,
    options: WindowOptions,
    output_dir: str | Path,
    *,
    parameters: Mapping[str, Any],
    provenance: Callable[[Inputs], Mapping[str, Any]],
    overwrite: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> ReportResult:
    """Attribute a window of a trace and write the report.

    Args:
        parameters: of the command, JSON; those of the job and the window are added.
        provenance: digests of what was read, given the inputs; those of inputs and trace are added.
        progress: called with the last step done, the first and the last of the window.

    Raises:
        CircuitError: bad parameters, a folder that is not free, or a step that does not replay.
    """
    with open_report(command, output_dir, overwrite=overwrite) as writer:
        trace = ReplayedRun.open(job.trace)
        start, end = options.of(trace)
        inputs = job.source.inputs(trace)
        origin = {**inputs.provenance(), **provenance(inputs)}
        worker = job.prepare(trace, inputs)
        store, lines = trace.store, _Lines()
        found = attribute_window(
            job,
            start,
            end,
            worker=worker,
            workers=options.workers,
            progress=None if progress is None else lambda step: progress(step, start, end),
        )
        series = Series.collect(lines.keep(row for rows in found for row in rows))
        return _write(
            writer,
            lines.text(),
            series,
            parameters={
                **parameters,
                "path": job.path,
                "partitions": list(job.partitions),
                "loss_scope": job.loss_scope,
                "start_step": start,
                "end_step": end,
                "windows": [list(window) for window in options.windows],
            },
            provenance={
                **origin,
                "trace": {
                    "config_digest": store.manifest.config.digest(),
                    "benchmark_digest": store.manifest.benchmark_digest,
                    "state_at_start": store.state_digests(start),
                    "state_at_end": store.state_digests(end),
                    "environment": store.manifest.environment,
                },
                "workers": options.workers,
            },
        )


def merge_attributions(
    output_dir: str | Path,
    parts: Sequence[Path],
    *,
    windows: Sequence[tuple[int, int]] = (),
    overwrite: bool = False,
) -> ReportResult:
    """Join the shards of one attribution into the report of the whole window.

    Args:
        parts: folders of the shards, in any order.

    Raises:
        CircuitError: a folder holds no attribution; the shards differ in command, parameters or
            inputs; there is a gap, an overlap, or the states at a seam are not the same.
    """
    if not parts:
        raise CircuitError("no shards to merge", expected="at least one folder")
    shards = sorted((_read_shard(Path(part)) for part in parts), key=lambda shard: shard.start)
    for earlier, later in itertools.pairwise(shards):
        _refuse_seam(earlier, later)
    first, last = shards[0], shards[-1]
    check_windows(windows, first.start, last.end)
    overrides = [entry for shard in shards for entry in shard.overrides]
    with open_report(first.command, output_dir, overwrite=overwrite) as writer:
        lines = _Lines()
        series = Series.collect(lines.keep(row for shard in shards for row in shard.rows()))
        if not series:
            raise CircuitError("the shards hold no rows", where=first.folder)
        for found in series.values():
            if (found.start, found.end) != (first.start, last.end):
                raise CircuitError(
                    f"the rows of {found.scalar} cover {found.start}:{found.end}",
                    where=first.folder,
                    expected=f"{first.start}:{last.end}, as the reports say",
                )
        return _write(
            writer,
            lines.text(),
            series,
            parameters={
                **first.payload["parameters"],
                "start_step": first.start,
                "end_step": last.end,
                "windows": [list(window) for window in windows],
            },
            provenance={
                **first.inputs,
                "trace": {
                    **first.trace,
                    "state_at_end": last.trace["state_at_end"],
                },
                "merged_from": [[shard.start, shard.end] for shard in shards],
                **({_MERGED: overrides} if overrides else {}),
            },
        )


class _Lines:
    """Rows as text, while they are looked at."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def keep(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            self._lines.append(dump_row(row))
            yield row

    def text(self) -> str:
        return "\n".join([*self._lines, ""])


@dataclass(frozen=True)
class _Shard:
    folder: Path
    command: str
    payload: dict[str, Any]

    @property
    def start(self) -> int:
        return int(self.payload["parameters"]["start_step"])

    @property
    def end(self) -> int:
        return int(self.payload["parameters"]["end_step"])

    @property
    def trace(self) -> dict[str, Any]:
        return dict(self.payload["provenance"]["trace"])

    @property
    def inputs(self) -> dict[str, Any]:
        """Digests of what was read, but for the trace."""
        provenance = self.payload["provenance"]
        return {name: value for name, value in provenance.items() if name.endswith(_DIGESTS)}

    @property
    def overrides(self) -> list[dict[str, Any]]:
        """Steps and overrides of those calls behind the shard that had any."""
        provenance = self.payload["provenance"]
        if "overrides" not in provenance:  # none, or a shard that was merged itself
            return list(provenance.get(_MERGED, ()))
        return [{"steps": [self.start, self.end], "overrides": provenance["overrides"]}]

    def settings(self) -> dict[str, Any]:
        """What has to be the same in all shards."""
        parameters = self.payload["parameters"]
        same = {n: v for n, v in parameters.items() if n not in (*_OWN_TO_A_SHARD, *_PATHS)}
        trace = {f"trace {n}": self.trace[n] for n in ("config_digest", "benchmark_digest")}
        return {"command": self.command, **same, **self.inputs, **trace}

    def rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / f"{report_name(self.command)}_rows.jsonl")


_DIGESTS = ("_digest", "_sha256")
_MERGED = "shard_overrides"


def _read_shard(folder: Path) -> _Shard:
    for command in COMMANDS:
        path = folder / f"{report_name(command)}_report.json"
        if not path.exists():
            continue
        try:
            payload = parse_json(path.read_text(encoding="utf-8"))
            shard = _Shard(folder, command, payload)
            _ = shard.start, shard.end, shard.settings(), shard.trace["state_at_end"]
            return shard
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CircuitError(f"is no report of {command} ({error!r})", where=path) from None
    raise CircuitError(
        "holds no attribution",
        where=folder,
        expected=f"the output folder of {' or '.join(COMMANDS)}",
    )


def _refuse_seam(earlier: _Shard, later: _Shard) -> None:
    ours, theirs = earlier.settings(), later.settings()
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise CircuitError(
                f"the shards differ in {name}: {ours.get(name)!r} and {theirs.get(name)!r}",
                where=later.folder,
                expected=f"as in {earlier.folder}",
            )
    if later.start != earlier.end:
        what = "an overlap" if later.start < earlier.end else "a gap"
        raise CircuitError(
            f"{what} between {earlier.start}:{earlier.end} and {later.start}:{later.end}",
            where=later.folder,
            expected=f"a shard that starts at {earlier.end}",
        )
    if earlier.trace["state_at_end"] != later.trace["state_at_start"]:
        raise CircuitError(
            f"the states at step {later.start} are not the same in both shards",
            where=later.folder,
            fix="attribute both from traces of the same run",
        )


def _write(
    writer: ReportWriter,
    rows: str,
    series: Mapping[str, Series],
    *,
    parameters: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> ReportResult:
    lead = _lead(series)
    windows = [(lead.start, lead.end), *(tuple(w) for w in parameters["windows"])]
    summaries = [found.window(*window).summary() for window in windows for found in series.values()]
    figures = {
        "terms": terms_and_closure(lead, windows[1:]),
        **{f"groups_{name}": groups_of_terms(lead, name) for name in lead.groups},
    }
    if len(series) > 1:
        figures["scalars"] = changes_by_scalar(list(series.values()))
    summary = {
        "lead": lead.scalar,
        "start_step": lead.start,
        "end_step": lead.end,
        "windows": summaries,
    }
    return writer.write(
        parameters=parameters,
        summary=summary,
        rows=rows,
        page=_page(parameters, summaries, lead.scalar, list(figures)),
        figures=figures,
        provenance=provenance,
        law=closing_law(summaries[: len(series)], lead.scalar),
        device=provenance["trace"]["environment"]["device"],
    )


def _lead(series: Mapping[str, Series]) -> Series:
    """The scalar that changed most; parts of another one (`<name>.lag2`) do not stand for it."""
    whole = [s for n, s in series.items() if not any(n.startswith(f"{m}.") for m in series)]
    return max(whole, key=lambda found: abs(float(found.actual.sum())))


def closing_law(summaries: Sequence[Mapping[str, Any]], lead: str) -> str:
    """How well the contributions add up over the whole window, in one sentence."""
    found = next(s for s in summaries if s["scalar"] == lead)
    closure, rounding = found["closure"], found["path"]["rounding"]
    law = (
        f"the contributions to {lead} over steps {found['start_step']}:{found['end_step']} close to"
        f" {percent(closure['path'])} of the actual change {found['actual']:+.4g} (first order:"
        f" {percent(closure['first_order'])}), step by step to {percent(closure['path_absolute'])}"
        f" (first order: {percent(closure['first_order_absolute'])}); the rounding residual carries"
        f" {rounding:+.1g}"
    )
    others = [s for s in summaries if s["closure"]["path_absolute"] is not None]
    if len(summaries) > 1 and others:
        worst = max(others, key=lambda s: s["closure"]["path_absolute"])
        law += (
            f"; the worst of {len(summaries)} scalars, {worst['scalar']}, closes step by step to"
            f" {percent(worst['closure']['path_absolute'])}"
        )
    return law


def percent(value: float | None) -> str:
    """A closure error: `0.0031 %`, or a dash where nothing moved."""
    return "-" if value is None else f"{100 * value:.2g} %"


def _page(
    parameters: Mapping[str, Any],
    summaries: Sequence[Mapping[str, Any]],
    lead: str,
    figures: Sequence[str],
) -> list[str]:
    terms = list(summaries[0]["path"])
    lines = [
        f"Path rule `{parameters['path']}`; shares of the terms are path contributions, which add"
        " up to the actual change. "
        + (
            "What the scalars hold constant is fixed, so changes telescope from window to window."
            if all(s["telescopes"] for s in summaries)
            else "The basis is taken anew at each step, so changes are per step and their sum is"
            " not the last value minus the first."
        ),
        "",
        f"| scalar | steps | actual | {' | '.join(f'`{t}`' for t in terms)} | closure, path |"
        " closure, first order | sign matches |",
        "|---|---|" + "---:|" * (len(terms) + 4),
    ]
    for s in summaries:
        shares = " | ".join(f"{s['path'][term]:+.4g}" for term in terms)
        lines.append(
            f"| {s['scalar']} | {s['start_step']}:{s['end_step']} | {s['actual']:+.4g} | {shares}"
            f" | {percent(s['closure']['path'])} | {percent(s['closure']['first_order'])}"
            f" | {100 * s['sign_matches']['path']:.0f} % |"
        )
    lines += ["", f"Figures are of {lead}, the scalar that changed most.", ""]
    lines += [line for stem in figures for line in (f"![{stem}]({stem}.svg)", "")]
    whole = next(s for s in summaries if s["scalar"] == lead)
    lines += [
        f"What is not in the sum for {lead}, first order: "
        + ", ".join(f"`{name}` {value:+.4g}" for name, value in whole["references"].items())
        + f". Mean clip factor {whole['mean_clip_factor']:.4f}.",
    ]
    for partition, groups in whole["groups"].items():
        ranked = sorted(groups.items(), key=lambda item: -abs(sum(item[1]["path"].values())))
        lines += ["", f"| group ({partition}) | path | {' | '.join(f'`{t}`' for t in terms)} |"]
        lines += ["|---|---:|" + "---:|" * len(terms)]
        for name, kinds in ranked[:16]:
            shares = " | ".join(f"{kinds['path'][term]:+.3g}" for term in terms)
            lines.append(f"| {name} | {sum(kinds['path'].values()):+.4g} | {shares} |")
    return lines
