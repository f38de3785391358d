"""A report in parts: a job each, and a last one that gathers, as a workflow (`parts.smk`).

Of reports whose option `part` gives one of several workers its share of the trainings, which all of
them keep in one folder. Beside the report stands

    parts/                  where Snakemake runs
        plan_<digest>.json  what the rules are made from
        1_of_4/             the report of a part
        logs/               of Snakemake and of each job
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from circuit.artifacts import atomic_write_text, dump_json
from circuit.config import digest_of
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.options import Options
from circuit.reports.report import open_report
from circuit.reports.traced import TracedReport
from circuit.runs.recording import MANIFEST as RECORDING
from circuit.studies.costs import needs_of_rule
from circuit.studies.jobs import Job, Words, command_line, report_job
from circuit.studies.workflow import PlannedRule, Workflow, dry_run
from circuit.trace.store import MANIFEST
from circuit.train_config import TrainConfig

GATHER = "gather"


@dataclass(frozen=True)
class Parts(Workflow):
    """A report, and into how many parts it is divided.

    Attributes:
        kind: of report.
        asked: its options.
        config: path of the run's.
        more: further words of its command line, such as `--device`.
        output_dir: folder of the report.
        count: of parts.
        threads: that a job computes with.
        device: that it computes on.
        here: folder that paths are relative to.
    """

    snakefile: ClassVar[str] = "parts.smk"
    log: ClassVar[Path] = Path("logs/snakemake.log")
    kind: type[TracedReport[Any]]
    asked: Options
    config: str
    more: Words
    output_dir: str
    count: int
    threads: int = 1
    device: str = "cpu"
    here: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.output_dir, "parts")

    @property
    def settings(self) -> tuple[str, ...]:
        return (f"plan={self.plan}",)

    @cached_property
    def plan(self) -> str:
        """Name of the file that the rules are made from."""
        return f"plan_{digest_of(self.to_json())[:12]}.json"

    @property
    def goal(self) -> str:
        return GATHER

    def check(self) -> None:
        """Also refuses options that say a part already, or no folder that parts could share."""
        super().check()
        shared = [name for name, one in self.asked.declared().items() if one.folder]
        if all(getattr(self.asked, name) is None for name in shared):
            expected = " or ".join(f"`{name}`" for name in shared)
            raise CircuitError(
                "no folder that the parts share", where="`parts`", expected=f"also {expected}"
            )
        if getattr(self.asked, "part", "") != "1/1":
            raise CircuitError("`part` and `parts`", expected="one of them")

    # --- the jobs ---

    def part(self, number: int) -> Job:
        """One of the parts, from 1 on."""
        asked = self.asked.model_copy(update={"part": f"{number}/{self.count}"})
        return self._job(asked, f"{self.folder}/{number}_of_{self.count}", f"part_{number}", ())

    @cached_property
    def gathering(self) -> Job:
        """The report itself, from what the parts have left in the folder that they share."""
        parts = (path for part in self.parts for path in part.outputs)
        return self._job(self.asked, self.output_dir, GATHER, tuple(parts))

    @cached_property
    def parts(self) -> list[Job]:
        """All parts."""
        return [self.part(number) for number in range(1, self.count + 1)]

    def _job(self, asked: Options, folder: str, name: str, inputs: Words) -> Job:
        return report_job(
            "parts",
            self.kind,
            asked,
            folder,
            run=self.config,
            name=name,
            inputs=(*self._reads(), *inputs),
            more=self.more,
        )

    def _reads(self) -> Iterator[str]:
        """The files that the command line names, and what describes the folders that it names."""
        named: list[Any] = [Path(self.config)]
        for name, option in self.asked.declared().items():
            value = () if option.folder else getattr(self.asked, name)
            named += value if isinstance(value, tuple) else (value,)
        for path in (one for one in named if isinstance(one, Path)):
            there = [path / name for name in (RUN_CONFIG, MANIFEST, RECORDING)]
            yield from map(str, [one for one in (path, *there) if Path(self.here, one).is_file()])

    def to_json(self) -> dict[str, Any]:
        """What the rules are made from; paths are absolute or, of a part, below `folder`."""
        whole = self.gathering
        needs = needs_of_rule(whole.kind, cuda=self.device == "cuda") | {"threads": self.threads}
        return {
            "here": self.here,
            "reads": [str(Path(self.here, path)) for path in self._reads()],
            "report": Path(whole.outputs[0]).name,
            "parts": [command_line([part.argv]) for part in self.parts],
            "gather": command_line([whole.argv]),
            "needs": needs,
        }


@dataclass(frozen=True)
class PartsPlan:
    """What there is to do.

    Attributes:
        workflow: with what the trace says of its jobs.
        jobs: that will run, the gathering last.
        trainings: of each of them, the steps that each of its trainings takes; none where only
            the job will know.
        again: of those, whose outputs are there, with the reason.
    """

    workflow: Parts
    jobs: tuple[Job, ...]
    trainings: tuple[tuple[int, ...], ...]
    again: tuple[PlannedRule, ...]


def plan_parts(workflow: Parts, config: TrainConfig, *, overwrite: bool = False) -> PartsPlan:
    """What Snakemake would do, after all is refused that the report refuses before it computes.

    Raises:
        CircuitError: as `Parts.check` and `dry_run`, and as `run_report` of the options and of the
            folder.
    """
    workflow.check()
    report = workflow.kind(workflow.asked, config)
    report.check()
    report.prepare()
    threads = int(report.origin["trace"]["environment"]["threads"])
    here = str(Path.cwd())
    workflow = replace(workflow, threads=threads, device=report.device, here=here)
    gathering = workflow.gathering
    whole = Path(gathering.outputs[0])
    # what a job that was cut off has left is no report, and does not have to be replaced
    with open_report(workflow.kind, workflow.output_dir, overwrite=overwrite or not whole.exists()):
        pass
    atomic_write_text(workflow.folder / workflow.plan, dump_json(workflow.to_json()))
    rules = dry_run(workflow)
    numbers = sorted(int(rule.wildcards["part"]) for rule in rules if rule.wildcards)
    jobs = [workflow.parts[number - 1] for number in numbers]
    trainings = [report.trainings(f"{number}/{workflow.count}") for number in numbers]
    if any(rule.name == GATHER for rule in rules):
        jobs.append(gathering)
        trainings.append(report.trainings(None))
    again = tuple(  # without the command lines before and now, which only the log has room for
        replace(rule, reason=rule.reason.partition(": Union")[0]) for rule in rules if rule.again
    )
    return PartsPlan(workflow, tuple(jobs), tuple(map(tuple, trainings)), again)
