"""circuit reproduce: the whole study, through Snakemake."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import complete, options
from .output import interrupted_says, print_json, progress_bar, stdout, table
from .workflow import Live, print_again, print_ends

if TYPE_CHECKING:
    from circuit.studies.claims import Claim
    from circuit.studies.reproduce import Plan

PANEL = "Study"
TARGETS = ("reference", "ablation", "cross-seed", "sgd-wide", "paper")


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    settings = options.FOR_SNAKEMAKE
    app.command("reproduce", rich_help_panel=PANEL, context_settings=settings)(reproduce)


def reproduce(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="reference, ablation, cross-seed, sgd-wide, or paper (the first three).",
            autocompletion=complete.values(*TARGETS),
        ),
    ],
    scale: Annotated[
        str,
        typer.Option(
            help="full (the paper's), uniform (its model, lags that no position answers), short"
            " (forms the circuit), or smoke (every rule, minutes).",
            autocompletion=complete.values(*complete.SCALES),
        ),
    ] = "full",
    seed: Annotated[
        list[str] | None,
        typer.Option(
            help="Seed of the cross-seed study, or FIRST:LAST of several; the scale's without any.",
            autocompletion=complete.values("11", "1:10"),
        ),
    ] = None,
    base_seed: options.BaseSeed = None,
    cores: options.Cores = 2,
    dry_run: options.DryRun = False,
    profile: options.Profile = None,
    as_json: options.Json = False,
) -> None:
    """Reproduce the study, or a part of it: resumes, parallelises, runs on a cluster unchanged.

    What follows after -- goes to Snakemake as it is.
    """
    from circuit.studies.reproduce import Request, make_plan
    from circuit.studies.scales import find_scale, seeds_of
    from circuit.studies.workflow import check_executor, packaged_profile, run

    request = Request(
        target,
        find_scale(
            scale, [number for words in seed or () for number in seeds_of(words)], seed=base_seed
        ),
        cores=cores,
        profile=None if profile is None else packaged_profile(profile),
        options=tuple(context.args),
    )
    if not dry_run:
        check_executor(request)
    plan = make_plan(request)
    if not as_json:
        _print_plan(plan, dry_run)
    if dry_run:
        if as_json:
            print_json(_plan_payload(plan))
        return
    began = time.monotonic()
    with interrupted_says("start it again to go on"), progress_bar(not as_json) as bar:
        outcome = run(request, Live(bar, quiet=as_json, aside=(request.goal,)))
    outcome.refuse_failure()
    claims, paths = _claims(plan)
    if as_json:
        print_json(
            {
                "seconds": time.monotonic() - began,
                "claims": [claim.to_json() for claim in claims],
                "paths": [str(path) for path in paths],
            }
        )
    else:
        _print_claims(claims, paths)
        if not request.scale.shows_effects:
            stdout.print(
                f"scale {scale} runs every command, in {request.scale.long_steps} steps: too few to"
                " learn anything, so that its claims say nothing of the study"
            )
        stdout.print(f"{time.monotonic() - began:.0f} s; log of Snakemake: {outcome.log}")


def _plan_payload(plan: Plan) -> dict[str, Any]:
    cost = plan.cost
    return {
        "jobs": [{"rule": job.kind, "name": job.name, "argv": list(job.argv)} for job in plan.jobs],
        "outputs": list(plan.outputs),
        "again": [{"rule": rule.name, "reason": rule.reason} for rule in plan.again],
        "core_seconds": cost.seconds,
        "megabytes": cost.megabytes,
    }


def _print_plan(plan: Plan, every_path: bool) -> None:
    request = plan.request
    costs = table(None, ["rule", "commands", "core time", "disk"])
    for kind, cost in plan.by_kind.items():
        costs.add_row(kind, str(cost.jobs), duration(cost.seconds), size(cost.megabytes))
    cost = plan.cost
    if not plan.jobs:
        stdout.print(f"{request.target} ({request.scale.label}): everything is there and current")
    else:
        stdout.print(costs)
    print_again(plan.again, request)
    if every_path:
        print_ends(request.folder / path for path in plan.outputs)
    if plan.jobs:
        stdout.print(
            f"{request.target} at scale {request.scale.label}: {cost.jobs} commands, about"
            f" {duration(cost.seconds)} of one core, {duration(cost.wall(request.cores))} on"
            f" {request.cores}; {size(cost.megabytes)} on disk under {request.folder}/"
            " (estimates from measured rates)",
            soft_wrap=True,
        )


def _claims(plan: Plan) -> tuple[list[Claim], list[Path]]:
    """What holds in this reproduction, also written beside it."""
    from circuit.artifacts import OutputFolder, dump_json
    from circuit.studies.claims import claims_document, claims_page, judge
    from circuit.studies.study import Study

    request = plan.request
    study = Study(request.scale)
    claims = judge(study, request.folder, request.target)
    title = f"Claims of the study: {request.target}, scale {request.scale.label}"
    name = f"claims_{request.target.replace('-', '_')}"
    place, writes = request.folder / "artifacts" / "claims", [f"{name}.md", f"{name}.json"]
    with OutputFolder(place, f"reproduce.{name}", writes=writes, overwrite=True) as folder:
        page = folder.write_text(f"{name}.md", "\n".join(claims_page(claims, title)) + "\n")
        told = dump_json(claims_document(study, request.folder, request.target, claims))
        rows = folder.write_text(f"{name}.json", told)
    return claims, [page, rows]


def _print_claims(claims: list[Claim], paths: list[Path]) -> None:
    from circuit.studies.claims import numbers_of

    marks = {True: "holds", False: "DOES NOT HOLD", None: "not judged"}
    for claim in claims:
        stdout.print(
            f"{marks[claim.holds]:>14}  {claim.statement}: {numbers_of(claim) or claim.note}",
            soft_wrap=True,
        )
    held = sum(claim.holds is True for claim in claims)
    stdout.print(f"{held} of {len(claims)} claims hold in this reproduction")
    for path in paths:
        stdout.print(f"wrote {path}", soft_wrap=True)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(megabytes: float) -> str:
    """`3 MB`, `1.2 GB`."""
    return f"{megabytes:.1f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"
