"""What a page asks for: reports that do not exist, and what their commands read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from circuit.errors import CircuitError
from circuit.page.commands import TRACE, Home, command_for, probe_set_command
from circuit.page.found import Reports
from circuit.page.panel import Missing
from circuit.runs.checkpointed import CheckpointedRun
from circuit.train_config import ImportedConfig

PROBES = 96
"""Records of the probe set that the page asks for, at most."""


def home_of(run: CheckpointedRun) -> Home:
    """The run as the page's commands name it."""
    config, steps = run.config, run.steps
    shape = config.model
    return Home(
        folder=config.output_dir,
        layers=shape.layers,
        width=shape.d_model,
        head_width=shape.d_model // shape.heads,
        end_step=steps[-1] if steps else config.steps,
    )


def trace_folder(reports: Reports) -> str | None:
    """The folder of the longest trace, relative to the run's."""
    found = reports.best(TRACE, lambda r: (r.summary["end_step"] - r.summary["start_step"],))
    return None if found is None else found.path.parent.relative_to(found.run).as_posix()


def with_inputs(
    missing: Sequence[Missing], run: CheckpointedRun, reports: Reports
) -> list[Missing]:
    """The same, after the probe set and the trace that the commands read and that do not exist."""
    if isinstance(run.config, ImportedConfig):  # it takes no step, so it has neither log nor trace
        steps = ("circuit train ", f"circuit {TRACE} ", "--optimizer-trace-dir")
        missing = [one for one in missing if not any(text in one.command for text in steps)]
    wanted = []
    probe_set = run.path / "analysis" / "probe_set.jsonl"
    if any("--probe-set" in one.command for one in missing) and not probe_set.exists():
        wanted.append(Missing("the probe set that it reads", _probe_set(run)))
    reads_trace = any("--optimizer-trace-dir" in one.command for one in missing)
    if reads_trace and trace_folder(reports) is None:
        wanted.append(Missing("the trace that it reads", command_for(TRACE, home_of(run))))
    return [_replacing(one, run, reports) for one in (*wanted, *missing)]


def _replacing(one: Missing, run: CheckpointedRun, reports: Reports) -> Missing:
    """With `--overwrite` where a report of another run stands in the command's place."""
    stale = {f"{run.config.output_dir}/{Path(name).parent.as_posix()}" for name in reports.left_out}
    if any(one.command.endswith(f" --output-dir {shlex.quote(folder)}") for folder in stale):
        return replace(one, command=f"{one.command} --overwrite")
    return one


def _probe_set(run: CheckpointedRun) -> str:
    config = run.config
    split = config.tracked_splits[0] if config.tracked_splits else config.train_split
    try:
        records = run.setup.benchmark.files[split].records
    except (CircuitError, KeyError):  # the benchmark is not here; the example's panel says so
        records = PROBES
    return probe_set_command(config.output_dir, config.benchmark_dir, split, min(PROBES, records))
