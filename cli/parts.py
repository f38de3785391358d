"""`--parts N` of a report: its parts as jobs of a workflow, here or on a cluster."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuit import CircuitError

from . import options
from .output import interrupted_says, print_json, print_result, progress_bar, stdout, table
from .workflow import Live, print_again, print_ends

if TYPE_CHECKING:
    from circuit.options import Options
    from circuit.reports.report import Report
    from circuit.studies.parts import PartsPlan

OPTIONS = {
    "context": (typer.Context, inspect.Parameter.empty),
    "parts": (
        Annotated[
            int | None,
            typer.Option(
                min=2,
                max=1000,
                help="Do it in so many parts, each a job of a workflow, and one more that gathers;"
                " what follows after -- goes to Snakemake.",
            ),
        ],
        None,
    ),
    "cores": (options.Cores, 2),
    "dry_run": (options.DryRun, False),
    "profile": (options.Profile, None),
}
"""Of every report that one of several workers can do a part of."""


def asked_for(context: Any, parts: int | None, **others: Any) -> bool:
    """Whether a command line asks for parts.

    Raises:
        CircuitError: it does not, and says how they are to run.
    """
    if parts is not None:
        return True
    if context.args:
        raise CircuitError(
            f"unexpected '{context.args[0]}'",
            where=context.command_path,
            fix=f"see `{context.command_path} --help`",
        )
    for name in others:
        if context.get_parameter_source(name).name != "DEFAULT":
            raise CircuitError(f"`{name}` without `parts`", expected="both")
    return False


def run_and_print(
    kind: type[Report[Any]],
    run: Any,
    chosen: Options,
    reading: dict[str, Any],
    *,
    context: Any,
    parts: int,
    cores: int,
    dry_run: bool,
    profile: str | None,
    output_dir: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make a report in parts, and say what it found; or, in a dry run, what there is to do.

    Args:
        reading: what the command line says of the run.

    Raises:
        CircuitError: as `plan_parts`, or a job failed.
    """
    from circuit.reports.traced import TracedReport
    from circuit.reports.written import read_report
    from circuit.studies.parts import Parts, plan_parts
    from circuit.studies.workflow import check_executor, packaged_profile
    from circuit.studies.workflow import run as run_workflow

    assert issubclass(kind, TracedReport), kind
    workflow = Parts(
        kind,
        chosen,
        str(reading["config"]),
        _further(reading),
        str(output_dir),
        parts,
        cores=cores,
        profile=None if profile is None else packaged_profile(profile),
        options=tuple(context.args),
    )
    if not dry_run:
        check_executor(workflow)
    plan = plan_parts(workflow, run, overwrite=overwrite)
    if not as_json:
        _print_plan(plan, dry_run)
    elif dry_run:
        print_json(_payload(plan))
    if dry_run:
        return
    with interrupted_says("start it again to go on"), progress_bar(not as_json) as bar:
        run_workflow(plan.workflow, Live(bar, quiet=as_json)).refuse_failure()
    print_result(read_report(plan.workflow.gathering.outputs[0]).result, as_json)


def _further(reading: dict[str, Any]) -> tuple[str, ...]:
    """The words of a command line that say how a run is read, besides its config."""
    words = [word for text in reading["overrides"] or () for word in ("--set", text)]
    for name in ("recipe", "device", "threads"):
        words += [] if reading[name] is None else [f"--{name}", str(reading[name])]
    return tuple(words)


def _payload(plan: PartsPlan) -> dict[str, Any]:
    jobs = zip(plan.jobs, plan.trainings, strict=True)
    return {
        "jobs": [
            {"name": job.name, "argv": list(job.argv), "steps": list(steps)} for job, steps in jobs
        ],
        "outputs": list(plan.workflow.gathering.outputs),
        "again": [{"name": rule.job, "reason": rule.reason} for rule in plan.again],
    }


def _print_plan(plan: PartsPlan, every_path: bool) -> None:
    workflow = plan.workflow
    (whole,) = workflow.gathering.outputs
    if not plan.jobs:
        stdout.print(f"{whole} is there and current", soft_wrap=True)
        return
    shown = table(None, ["job", "trainings", "steps"])
    for job, steps in zip(plan.jobs, plan.trainings, strict=True):
        told = (str(len(steps)), str(sum(steps))) if steps else ("-", "-")
        shown.add_row(job.name.replace("_", " "), *told)
    stdout.print(shown)
    print_again(plan.again, workflow)
    if every_path:
        print_ends(job.outputs[0] for job in plan.jobs)
    where = f"{workflow.cores} cores" if workflow.profile is None else f"{workflow.profile.name}"
    stdout.print(
        f"{len(plan.jobs)} jobs on {where}; what is kept already is not trained again; logs under"
        f" {workflow.folder / workflow.log.parent}/",
        soft_wrap=True,
    )
