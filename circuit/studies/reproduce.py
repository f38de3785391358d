"""The study as a workflow: what is asked of it, and what there is to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from circuit.errors import CircuitError
from circuit.studies.costs import Cost, cost_of
from circuit.studies.jobs import Job
from circuit.studies.scales import Scale
from circuit.studies.study import Study, check_target, missing_configs
from circuit.studies.workflow import PlannedRule, Workflow, dry_run


@dataclass(frozen=True)
class Request(Workflow):
    """What is to be reproduced, and how.

    Attributes:
        target: of the study.
        scale: of it.
    """

    snakefile: ClassVar[str] = "Snakefile"
    log: ClassVar[Path] = Path("artifacts/logs/snakemake.log")
    target: str
    scale: Scale

    @property
    def folder(self) -> Path:
        return self.scale.folder

    @property
    def settings(self) -> tuple[str, ...]:
        seeds = ",".join(map(str, self.scale.seeds))
        base = () if self.scale.seed is None else (f"base={self.scale.seed}",)
        return f"scale={self.scale.name}", f"seeds={seeds}", *base

    @property
    def goal(self) -> str:
        return self.target.replace("-", "_")

    def check(self) -> None:
        """Also refuses what is no target, or a target whose configs are not here."""
        check_target(self.target)
        super().check()
        missing = missing_configs(self.scale)
        if missing:
            raise CircuitError(
                f"{len(missing)} configs of the contract are not here",
                where=missing[0],
                fix="run it in the project's root, or choose another scale",
            )


@dataclass(frozen=True)
class Plan:
    """What there is to do.

    Attributes:
        jobs: commands that will run, those that wait for a selection included.
        outputs: what all jobs of the target end with, done or not.
        again: rules whose outputs are there and will be made again, with the reason.
        cost: estimate for `jobs`.
    """

    request: Request
    jobs: tuple[Job, ...]
    outputs: tuple[str, ...]
    again: tuple[PlannedRule, ...]
    cost: Cost

    @property
    def by_kind(self) -> dict[str, Cost]:
        """The cost of each kind of command, in the order of their first job."""
        kinds: dict[str, list[Job]] = {}
        for job in self.jobs:
            kinds.setdefault(job.kind, []).append(job)
        return {kind: cost_of(jobs, self.request.scale) for kind, jobs in kinds.items()}


def make_plan(request: Request) -> Plan:
    """What Snakemake would do, with estimates.

    Raises:
        CircuitError: as `dry_run`.
    """
    rules = dry_run(request)
    study = Study(request.scale)
    jobs = tuple(planned_jobs(study, rules))
    outputs = tuple(study.outputs(request.target))
    again = tuple(rule for rule in rules if rule.again)
    return Plan(request, jobs, outputs, again, cost_of(jobs, request.scale))


def planned_jobs(study: Study, rules: Sequence[PlannedRule]) -> Iterator[Job]:
    """The commands behind the rules; what waits for a pending selection is added."""
    batches = {batch.name: batch for batch in study.batches}
    listed = {(rule.name, rule.wildcards.get("seed")) for rule in rules}
    selections = {f"select_{what}" for what in ("heads", "write_paths")}
    for rule in rules:
        if rule.name in batches:
            yield from batches[rule.name].jobs
        elif rule.name == "compare_seeds":
            yield study.comparison
    for seed in study.seeds:
        own = f"{seed.seed:04}"
        for job in (*seed.jobs(), *seed.selections()):
            if (job.kind, own) in listed:
                yield job
        rest = study.later(seed)
        waits = {name: (name, own) in listed for name in selections}
        for job in rest:
            match = job.folder.rpartition("analysis/")[2].startswith("bilinear")
            shown = ("match" if match else "write") + (
                "_merge" if "merge" in job.kind else "_shard"
            )
            if waits["select_heads" if match else "select_write_paths"] or (shown, own) in listed:
                yield job
