"""The reports that stand under a run's folder, as panels; and the commands of those that do not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.page.panel import MOST, Missing, Panel, Source, Table
from circuit.quoting import plain_text, shell_line
from circuit.reading import values_of
from circuit.reports.report import Place, Report, all_reports
from circuit.reports.written import ANEW, SUFFIX, Written, read_report
from circuit.runs.checkpointed import CheckpointedRun
from circuit.tasks.base import Task
from circuit.trace.store import MANIFEST
from circuit.train_config import ForeignConfig, RecordedConfig
from circuit.training.run_folder import Identity

PROBES = 96
"""Records of the probe set that the page asks for, at most."""
TRACE = "optimizer-update-trace"
ATTRIBUTION = "scalar-attribution"
TRACE_FOLDER = "analysis/optimizer_update_trace"
MATCH = "bilinear-qk-match-separation"
"""The head that is named where none is known to stand out."""


class Reports:
    """Every report under a run's folder.

    Attributes:
        by_command: the oldest first.
        left_out: of another run, relative to the run's folder.
    """

    def __init__(self, run: CheckpointedRun) -> None:
        """Read them.

        Raises:
            CircuitError: a file that is named like a report is damaged.
        """
        self.run = run
        self.by_command: dict[str, list[Written]] = {}
        self.left_out: list[str] = []
        identity = Identity.of(run.path) if (run.path / RUN_CONFIG).exists() else None
        every = map(read_report, _reports_below(run.path / "analysis"))
        for report in sorted(every, key=lambda one: one.written):
            if identity is not None and identity.denies(report.provenance):
                self.left_out.append(self.relative(report.path))
            else:
                self.by_command.setdefault(report.command, []).append(report)

    def relative(self, path: Path) -> str:
        """A path below the run's folder."""
        return path.relative_to(self.run.path).as_posix()

    def of(self, kind: type[Report[Any]]) -> list[Written]:
        """Those of a kind that this version can read, the most complete and newest last."""

        def completeness(report: Written) -> Any:
            with values_of(report.path, fix=ANEW):
                return kind.size(report.results), report.written

        readable = [one for one in self.by_command.get(kind.command, []) if _is_readable(one)]
        with values_of(self.run.path / "analysis", fix=ANEW):  # sizes that do not compare
            return sorted(readable, key=completeness)

    def shown(self, kind: type[Report[Any]]) -> list[Written]:
        """Those that the page shows: the most complete one, or each, the newest of equals."""
        if not kind.every:
            return self.of(kind)[-1:]
        each = list({str(one.results.options): one for one in self.of(kind)}.values())
        return each[-MOST:]

    def source(self, report: Written, file: str = "") -> Source:
        """Where the numbers of one of a report's files stand, and what makes it again."""
        folder = f"{self.run.config.output_dir}/{self.relative(report.path.parent)}"
        return Source(
            self.relative(report.path),
            self.relative(report.file(file)),
            report.command_line(self.run.config, folder),
            report.law,
        )

    def head(self) -> str | None:
        """The head whose match grew most, if that was measured."""
        (kind,) = (kind for kind in all_reports() if kind.command == MATCH)
        measured = self.of(kind)
        if not measured:
            return None
        with values_of(measured[-1].path, fix=ANEW):
            return str(measured[-1].summary["winner"]["head"])

    def task(self) -> Task | None:
        """The run's task; None where its benchmark is not there."""
        try:
            return self.run.setup.benchmark.task
        except CircuitError:
            return None

    def is_of_task(self, kind: type[Report[Any]]) -> bool:
        """Whether a kind of report is usual for runs of any task, or of this run's."""
        usual = kind.asked_of or kind.task
        task = self.task() if usual else None
        return not usual or (task is not None and task.config.benchmark_type == usual)

    def trace(self) -> str | None:
        """The folder of the longest trace, relative to the run's; a recording is its own."""
        if isinstance(self.run.config, RecordedConfig):
            return "."

        def length(report: Written) -> tuple[int, float]:
            with values_of(report.path, fix=ANEW):
                return int(
                    report.summary["end_step"] - report.summary["start_step"]
                ), report.written

        longest = max(self.by_command.get(TRACE, []), key=length, default=None)
        if longest is not None:
            return self.relative(longest.path.parent)
        # of a counterfactual run, or a training that was stopped: a trace without its report
        return TRACE_FOLDER if os.path.lexists(self.run.path / TRACE_FOLDER / MANIFEST) else None


def _reports_below(folder: Path) -> list[Path]:
    """The JSON of every report, and what stands in its place, which its reader refuses.

    `rglob` would leave out what may not be looked into.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=refuse) if folder.exists() else ()
    return sorted(
        Path(place, name)
        for place, folders, names in walk
        for name in (*folders, *names)
        if name.endswith(SUFFIX)
    )


def _is_readable(report: Written) -> bool:
    try:
        return report.results is not None
    except CircuitError:  # of another version; it is listed, not drawn
        return False


def report_panels(reports: Reports, kind: type[Report[Any]]) -> list[Panel]:
    """The panels of a kind of report; one that asks for it where there is none."""
    name, title, question = kind.stem(), kind.title or kind.command, kind.question
    shown = reports.shown(kind)
    if not shown and (kind.place is None or not reports.is_of_task(kind)):
        return []
    config = reports.run.config
    if not shown and (config.shape is None or config.benchmark_dir is None):
        return []  # of a recorded module that it cannot be asked of
    if not shown:
        try:
            return [Panel(name, title, question, missing=[asked_for(reports, kind)])]
        except CircuitError as error:
            expected = f"; it takes {error.expected}" if error.expected else ""
            return [
                Panel(name, title, question, notes=[f"Not of this run: {error.what}{expected}."])
            ]
    panels = []
    for number, report in enumerate(shown, start=1):
        with values_of(report.path, fix=ANEW):
            panel = _panel(reports, kind, report)
        panels.append(replace(panel, name=name if number == 1 else f"{name}_{number}"))
    return panels


def _panel(reports: Reports, kind: type[Report[Any]], report: Written) -> Panel:
    """What a report shows."""
    title, folder = kind.title or kind.command, reports.relative(report.path.parent)
    folder = folder.removeprefix("analysis/")
    charts = kind.charts(report.results)
    declared = kind.tables(report.results)
    data = {key: list(rows) for drawn in charts for key, rows in drawn.data.items()}
    tables = []
    for place, table in enumerate(declared):
        keys = [*(["step"] if any("step" in row for row in table.rows) else []), *table.columns]
        data[f"table_{place}"] = [{key: row.get(key) for key in keys} for row in table.rows]
        columns = dict(zip(table.columns, table.headings, strict=True))
        tables.append(Table(table.title or title, f"table_{place}", columns))
    return Panel(
        kind.stem(),
        title,
        kind.question,
        charts=charts,
        tables=tables,
        data=data,
        sources=[reports.source(report)],
        notes=[plain_text(note) for note in kind.notes(report.results)],
        which=", ".join(filter(None, (folder, kind.about(report.results)))),
    )


def asked_for(reports: Reports, kind: type[Report[Any]]) -> Missing:
    """The command of a report that does not exist, with its usual options.

    Raises:
        CircuitError: the run's task or model does not have what the report is about.
    """
    folder = Path(reports.run.config.output_dir)
    paths = {
        "probe_set": folder / "analysis/probe_set.jsonl",
        "checkpoint_dir": folder / "checkpoints",
        "optimizer_trace_dir": folder / (reports.trace() or TRACE_FOLDER),
    }
    shape = reports.run.config.model
    head = reports.head() or f"L{min(1, shape.layers - 1)}H0"
    task = reports.task()
    options = kind.usual(Place(shape, paths, head, task))
    if task is not None:
        options.check_task(task)
    words = ["circuit", kind.command, "--config", str(folder / RUN_CONFIG), *options.words()]
    words += ["--output-dir", str(folder / "analysis" / kind.stem())]
    return Missing(kind.title or kind.command, shell_line(words))


def attribution_asked_for(reports: Reports) -> list[Panel]:
    """The panel of a run of one's own code of which nothing has been attributed yet."""
    kind = next(kind for kind in all_reports() if kind.command == ATTRIBUTION)
    if reports.of(kind):
        return []
    config = reports.run.config
    folder = config.output_dir
    words = ["circuit", *kind.names[0].split(), "--config", folder, *config.recipe_words]
    trace = (Path(folder) / (reports.trace() or TRACE_FOLDER)).as_posix()
    words += ["--optimizer-trace-dir", trace, "--scalar", "FILE.py:NAME"]
    words += ["--output-dir", f"{folder}/analysis/NAME"]
    missing = Missing("a number of the module, named FILE.py:NAME", shell_line(words))
    return [Panel(kind.stem(), kind.title, kind.question, missing=[missing])]


def with_inputs(missing: Sequence[Missing], reports: Reports) -> list[Missing]:
    """The same, after the probe set and the trace that the commands read and that do not exist."""
    run, folder = reports.run, reports.run.config.output_dir
    if isinstance(run.config, ForeignConfig):  # it takes no step, so it has no log
        stepping = ["circuit train "]
        if reports.trace() is None:
            stepping.append("--optimizer-trace-dir")
        missing = [one for one in missing if not any(text in one.command for text in stepping)]
    needed = []
    probe_set = run.path / "analysis/probe_set.jsonl"
    if any("--probe-set" in one.command for one in missing) and not probe_set.exists():
        needed.append(Missing("the probe set that it reads", _probe_set(run)))
    if any("--optimizer-trace-dir" in one.command for one in missing) and reports.trace() is None:
        end = run.steps[-1] if run.steps else run.config.steps
        words = ["circuit", TRACE, "--config", f"{folder}/{RUN_CONFIG}", *run.config.recipe_words]
        words += ["--from-initialization"]
        words += ["--end-step", str(end), "--output-dir", f"{folder}/{TRACE_FOLDER}"]
        needed.append(Missing("the trace that it reads", shell_line(words)))
    return [_replacing(one, reports) for one in (*needed, *missing)]


def _replacing(one: Missing, reports: Reports) -> Missing:
    """With `--overwrite` where a report that the page cannot draw stands in the command's place."""
    home = reports.run.config.output_dir
    every = [
        reports.relative(written.path)
        for of_command in reports.by_command.values()
        for written in of_command
    ]
    taken = {f"{home}/{Path(name).parent.as_posix()}" for name in (*reports.left_out, *every)}
    if any(one.command.endswith(f" --output-dir {shell_line([folder])}") for folder in taken):
        return Missing(one.what, f"{one.command} --overwrite")
    return one


def _probe_set(run: CheckpointedRun) -> str:
    config = run.config
    split = config.tracked_splits[0] if config.tracked_splits else config.train_split
    try:
        records = run.setup.benchmark.files[split].records
    except (CircuitError, KeyError):  # the benchmark is not here; the example's panel says so
        records = PROBES
    words = ["circuit", "generate-probe-set", "--benchmark-dir", config.benchmark_dir]
    words += ["--split", split, "--examples-per-split", str(min(PROBES, records))]
    words += ["--output", f"{config.output_dir}/analysis/probe_set.jsonl"]
    return shell_line(words)
