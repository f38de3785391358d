"""Start Snakemake on the study: what there is to do, the run, what came of it.

Ordering, running, resuming and distributing are Snakemake's. Here its command line is put together,
its dry run is read as a plan, and its log as events.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import IO, Literal

from circuit.artifacts import open_lock
from circuit.errors import CircuitError
from circuit.reading import read_bytes
from circuit.studies.costs import Cost, cost_of
from circuit.studies.jobs import Job
from circuit.studies.scales import Scale
from circuit.studies.study import Study, check_target, missing_configs

SNAKEFILE = str(files("circuit.studies").joinpath("Snakefile"))
LOG = Path("artifacts/logs/snakemake.log")
_RULE = re.compile(r"^(?:local)?(?:rule|checkpoint) (\S+):$")
_FIELD = re.compile(r"^    (\w+): (.*)$")
_FINISHED = re.compile(r"^Finished jobid: (\d+) \(Rule: (\S+)\)")
_STEPS = re.compile(r"^(\d+) of (\d+) steps")
_FAILED = re.compile(r"^Error in rule (\S+):$")
_NOT_NEWS = ("Missing output files", "Input files updated by another job")


@dataclass(frozen=True)
class Request:
    """What is to be reproduced, and how.

    Attributes:
        target: of the study.
        scale: of it.
        cores: of this machine that may be used.
        profile: folder of a Snakemake profile, such as the packaged one for Slurm.
        options: further words for Snakemake.
    """

    target: str
    scale: Scale
    cores: int = 2
    profile: Path | None = None
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return self.scale.folder

    def words(self, *extra: str) -> list[str]:
        """The command line of Snakemake."""
        profile = ["--workflow-profile", str(self.profile)] if self.profile else []
        return [
            *(sys.executable, "-m", "circuit.studies.processes", "--snakefile", SNAKEFILE),
            *("--directory", str(self.folder), "--config", f"scale={self.scale.name}"),
            *("--cores", str(self.cores), *profile),
            *("--rerun-incomplete", "--nolock", "--keep-going", "--show-failed-logs"),
            *extra,
            *self.options,
            *("--", self.target.replace("-", "_")),
        ]


@dataclass(frozen=True)
class PlannedRule:
    """One rule of a dry run."""

    name: str
    reason: str
    seed: str | None = None


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


@dataclass(frozen=True)
class Event:
    """Something that Snakemake's log says.

    Attributes:
        kind: `started`, `finished`, `failed`, or `progress`.
        rule: whose job it is.
        done, total: of all jobs known so far.
    """

    kind: Literal["started", "finished", "failed", "progress"]
    rule: str = ""
    done: int = 0
    total: int = 0


@dataclass
class Outcome:
    """How a run ended."""

    code: int
    failed: list[str] = field(default_factory=list)
    log: Path = LOG

    def refuse_failure(self) -> None:
        """Refuse to go on after a run that failed.

        Raises:
            CircuitError: names the rules, and the cause as far as a command has told it.
        """
        if not self.code:
            return
        causes = {rule: _last_error(self.log.with_name(f"{rule}.log")) for rule in self.failed}
        what = "; ".join(f"{rule} ({cause})" if cause else rule for rule, cause in causes.items())
        raise CircuitError(
            f"failed: {what or 'Snakemake'}",
            where=self.log,
            fix="the log holds the last lines of each job; start it again to go on",
        )


def check_request(request: Request) -> None:
    """Refuse what cannot work, before anything is made.

    Raises:
        CircuitError: Snakemake or a config is missing, or there is no such target.
    """
    check_target(request.target)
    if importlib.util.find_spec("snakemake") is None:
        raise CircuitError(
            "Snakemake is not installed",
            fix="pip install 'circuit-formation[pipeline]' (Python 3.11 or later)",
        )
    missing = missing_configs(request.scale)
    if missing:
        raise CircuitError(
            f"{len(missing)} configs of the contract are not here",
            where=missing[0],
            fix="run it in the project's root, or choose --scale short or smoke",
        )


def check_executor(request: Request) -> None:
    """Refuse a profile or options whose jobs cannot be submitted from here.

    Raises:
        CircuitError: Snakemake's plugin for them, or Slurm's `sbatch`, is missing.
    """
    told = b"" if request.profile is None else read_bytes(request.profile / "config.yaml")
    said = told.decode("utf-8", "replace")
    named = re.search(r"^executor: *['\"]?([\w-]+)", said, re.MULTILINE)
    typed = re.search(r"(?:^| )(?:-e|--executor)[ =]([\w-]+)", " ".join(request.options))
    executor = typed[1] if typed else named[1] if named else "local"
    if executor in ("local", "dryrun", "touch"):
        return
    plugin = f"snakemake_executor_plugin_{executor.replace('-', '_')}"
    if importlib.util.find_spec(plugin) is None:
        raise CircuitError(
            f"Snakemake's executor '{executor}' is not installed",
            where=request.profile,
            fix=f"pip install {plugin.replace('_', '-')}, or leave the profile out to run here",
        )
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise CircuitError(
            "no Slurm here: sbatch is not on PATH",
            where=request.profile,
            fix="start it where jobs are submitted, or leave the profile out to run here",
        )


def make_plan(request: Request) -> Plan:
    """What Snakemake would do, with estimates.

    Raises:
        CircuitError: as `check_request`, or Snakemake refuses.
    """
    check_request(request)
    request.folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        request.words("--dry-run", "--quiet", "host"), capture_output=True, text=True, check=False
    )
    text = done.stdout + done.stderr
    if done.returncode:
        raise CircuitError(_last_words(text), where="snakemake --dry-run")
    rules = list(read_dry_run(text.splitlines()))
    study = Study(request.scale)
    jobs = tuple(planned_jobs(study, rules))
    outputs = tuple(study.outputs(request.target))
    again = tuple(rule for rule in rules if not rule.reason.startswith(_NOT_NEWS) and rule.reason)
    return Plan(request, jobs, outputs, again, cost_of(jobs, request.scale))


def read_dry_run(lines: Iterable[str]) -> Iterator[PlannedRule]:
    """The rules that a dry run lists, with Snakemake's reasons."""
    name, fields = "", dict[str, str]()
    for line in [*lines, "rule end:"]:
        rule, entry = _RULE.match(line), _FIELD.match(line)
        if rule:
            if name:
                seed = re.search(r"seed=(\d+)", fields.get("wildcards", ""))
                yield PlannedRule(name, fields.get("reason", ""), seed[1] if seed else None)
            name, fields = rule[1], {}
        elif entry:
            fields[entry[1]] = entry[2]


def planned_jobs(study: Study, rules: Sequence[PlannedRule]) -> Iterator[Job]:
    """The commands behind the rules; what waits for a pending selection is added."""
    batches = {batch.name: batch for batch in study.batches}
    listed = {(rule.name, rule.seed) for rule in rules}
    selections = {f"select_{what}" for what in ("heads", "write_paths")}
    for rule in rules:
        if rule.name in batches:
            yield from batches[rule.name].jobs
        elif rule.name == "compare_seeds":
            yield study.comparison
    for seed in study.seeds:
        own = f"{seed.seed:04}"
        for job in seed.selections():
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


def run(request: Request, heard: Callable[[Event], None]) -> Outcome:
    """Run the workflow; `heard` is told what happens.

    Raises:
        CircuitError: another reproduction is at work in the same folder.
    """
    check_request(request)
    check_executor(request)
    log = request.folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with _alone(request.folder), log.open("w", encoding="utf-8") as kept:
        failed: list[str] = []
        with subprocess.Popen(
            request.words(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",  # whatever a job prints
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            process_group=0,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    kept.write(line)
                    kept.flush()
                    event = read_event(line.rstrip("\n"))
                    if event is not None:
                        heard(event)
                        failed += [event.rule] if event.kind == "failed" else []
            except BaseException:
                _end(process, kept)
                raise
        return Outcome(process.returncode, list(dict.fromkeys(failed)), log)


def _end(process: subprocess.Popen[str], log: IO[str]) -> None:
    """Interrupt Snakemake and its jobs, which save what they can, and wait for them.

    A second interruption kills them.
    """
    assert process.stdout is not None
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        log.writelines(process.stdout)
        process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def read_event(line: str) -> Event | None:
    """What one line of Snakemake's log says, if it is one of ours."""
    if found := _RULE.match(line):
        return Event("started", found[1])
    if found := _FINISHED.match(line):
        return Event("finished", found[2])
    if found := _FAILED.match(line):
        return Event("failed", found[1])
    if found := _STEPS.match(line):
        return Event("progress", done=int(found[1]), total=int(found[2]))
    return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one reproduction at a time; a killed one leaves none behind."""
    place = folder / ".snakemake"
    place.mkdir(parents=True, exist_ok=True)
    with open_lock(place / "circuit.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CircuitError(
                "another `circuit reproduce` is at work here",
                where=folder,
                fix="wait for it to end",
            ) from None
        yield


def _last_error(log: Path) -> str:
    """What the log of a rule says last of what went wrong; empty where it says nothing."""
    lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return said[-1] if said else ""


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[-6:]) or "failed without a word"


def packaged_profile(name: str) -> Path:
    """A profile that ships with the package, or a folder.

    Raises:
        CircuitError: there is neither.
    """
    for place in (Path(str(files("circuit.studies").joinpath("profiles", name))), Path(name)):
        if (place / "config.yaml").is_file():
            return place
    raise CircuitError(f"no profile '{name}'", expected="slurm, or a folder with a config.yaml")
