"""Shards of an attribution, joined into the report of the whole window."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circuit.artifacts import OutputFolder
from circuit.attribution.arrays import as_netcdf
from circuit.attribution.series import Series, check_windows
from circuit.errors import CircuitError
from circuit.reading import values_of
from circuit.reports.attribution import Attribution, AttributionOptions, KeptRows, parse_windows
from circuit.reports.report import Progress, ReportResult, open_report
from circuit.reports.seams import MERGED, inputs_of, refuse_difference
from circuit.reports.written import SUFFIX, Written, read_report

_ANEW = "make the attribution again"
_OF_A_SHARD = ("start_step", "end_step", "windows", "workers")
_PATHS = ("probe_set", "optimizer_trace_dir", "scalar_pair_rows")


def merge_attributions(
    output_dir: str | Path,
    parts: Sequence[Path],
    *,
    windows: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
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
    with values_of(Path(parts[0]).parent, fix=_ANEW):
        return _merged(output_dir, parts, windows, overwrite=overwrite, progress=progress)


def _merged(
    output_dir: str | Path,
    parts: Sequence[Path],
    windows: Sequence[str],
    *,
    overwrite: bool,
    progress: Progress | None,
) -> ReportResult:
    shards = sorted((_read_shard(Path(part)) for part in parts), key=lambda shard: shard.start)
    for earlier, later in itertools.pairwise(shards):
        _refuse_seam(earlier, later)
    first, last = shards[0], shards[-1]
    check_windows(parse_windows(windows), first.start, last.end)
    overrides = [entry for shard in shards for entry in shard.overrides]
    whole = {"end_step": last.end, "windows": tuple(windows)}
    report = first.kind(type(first.options)(**first.options.to_json() | whole))
    report.origin = {
        **first.inputs,
        "trace": {**first.trace, "state_at_end": last.trace["state_at_end"]},
        "merged_from": [[shard.start, shard.end] for shard in shards],
        **({MERGED: overrides} if overrides else {}),
    }
    with open_report(first.kind, output_dir, overwrite=overwrite) as writer:
        kept = KeptRows()
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
        findings = kept.findings(windows, report.options.path, series)
        said = {name: of for name, of in first.report.summary.items() if name == "pairs"}
        return writer.write(report, replace(findings, summary={**findings.summary, **said}))


def attribution_arrays(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write an attribution's rows as arrays (circuit/attribution/arrays.py).

    Args:
        folder: of the report.
        output: netCDF file.
        overwrite: replace a file that an earlier call wrote.

    Raises:
        CircuitError: the folder holds no attribution, or the name is not free.
    """
    output = Path(output)
    if output.suffix != ".nc":
        raise CircuitError(f"{output}", where="`output`", expected="a name that ends in .nc")
    with values_of(folder, fix=_ANEW):
        arrays = as_netcdf(Series.collect(_read_shard(Path(folder)).report.results.rows()))
    command = f"trace-arrays.{output.stem}"
    with OutputFolder(output.parent, command, writes=[output.name], overwrite=overwrite) as place:
        return place.write_bytes(output.name, arrays)


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
        """See `inputs_of`."""
        return inputs_of(self.report.provenance)

    @property
    def overrides(self) -> list[dict[str, Any]]:
        """Steps and overrides of those calls behind the shard that had any."""
        if self.report.overrides is None:  # none, or a shard that was merged itself
            return list(self.report.provenance.get(MERGED, ()))
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
        options, trace = report.results.options, report.provenance["trace"]
        return _Shard(kind, report, int(options.start_step), int(options.end_step), trace)
    raise CircuitError(
        "holds no attribution", where=folder, expected="the output folder of an attribution"
    )


def _refuse_seam(earlier: _Shard, later: _Shard) -> None:
    where = later.report.path.parent
    refuse_difference(
        earlier.settings(),
        later.settings(),
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
