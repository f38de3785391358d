"""A Snakemake workflow from outside: its command line, its dry run, its log as events.

Ordering, running, resuming and distributing are Snakemake's. What is to be done is said by the
study (`reproduce.py`) and by a report in parts (`parts.py`).
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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import IO, ClassVar, Literal

from circuit.artifacts import open_lock
from circuit.errors import CircuitError
from circuit.reading import read_bytes

_RULE = re.compile(r"^(?:local)?(?:rule|checkpoint) (\S+):$")
_FIELD = re.compile(r"^    (\w+): (.*)$")
_FINISHED = re.compile(r"^Finished jobid: (\d+) \(Rule: (\S+)\)")
_STEPS = re.compile(r"^(\d+) of (\d+) steps")
_FAILED = re.compile(r"^Error in rule (\S+):$")
_NOT_NEWS = ("Missing output files", "Input files updated by another job")


@dataclass(frozen=True, kw_only=True)
class Workflow(ABC):
    """What is to be done, and how.

    Attributes:
        snakefile: in this folder.
        log: of Snakemake, below the folder where it runs; those of its jobs stand beside it.
        cores: of this machine that may be used.
        profile: folder of a Snakemake profile, such as the packaged one for Slurm.
        options: further words for Snakemake.
    """

    snakefile: ClassVar[str]
    log: ClassVar[Path]
    cores: int = 2
    profile: Path | None = None
    options: tuple[str, ...] = ()

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where it runs."""

    @property
    @abstractmethod
    def settings(self) -> tuple[str, ...]:
        """What the Snakefile is told, as `name=value`: values that no shell could take apart."""

    @property
    @abstractmethod
    def goal(self) -> str:
        """The rule that it ends with."""

    def check(self) -> None:
        """Refuse what cannot work, before anything is written.

        Raises:
            CircuitError: Snakemake, or something that a rule reads, is missing.
        """
        if importlib.util.find_spec("snakemake") is None:
            raise CircuitError(
                "Snakemake is not installed",
                fix="pip install 'circuit-formation[pipeline]' (Python 3.11 or later)",
            )

    def words(self, *extra: str) -> list[str]:
        """The command line of Snakemake."""
        snakefile = str(files("circuit.studies").joinpath(self.snakefile))
        profile = ["--workflow-profile", str(self.profile)] if self.profile else []
        return [
            *(sys.executable, "-m", "circuit.studies.processes", "--snakefile", snakefile),
            *("--directory", str(self.folder), "--config", *self.settings),
            *("--cores", str(self.cores), *profile),
            *("--rerun-incomplete", "--nolock", "--keep-going", "--show-failed-logs"),
            *extra,
            *self.options,
            *("--", self.goal),
        ]


@dataclass(frozen=True)
class PlannedRule:
    """One job of a dry run: its rule, Snakemake's reason, what tells it from others of the rule."""

    name: str
    reason: str
    wildcards: Mapping[str, str] = field(default_factory=dict)

    @property
    def job(self) -> str:
        """The job in words."""
        return " ".join([self.name, *self.wildcards.values()])

    @property
    def again(self) -> bool:
        """Whether its outputs are there."""
        return bool(self.reason) and not self.reason.startswith(_NOT_NEWS)


@dataclass(frozen=True)
class Event:
    """Something that Snakemake's log says.

    Attributes:
        kind: `started`, `finished`, `failed`, or `progress`.
        rule: whose job it is; where a rule has several, the job, as its log is called.
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
    log: Path = Path()

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


def check_executor(workflow: Workflow) -> None:
    """Refuse a profile or options whose jobs cannot be submitted from here.

    Raises:
        CircuitError: Snakemake's plugin for them, or Slurm's `sbatch`, is missing.
    """
    told = b"" if workflow.profile is None else read_bytes(workflow.profile / "config.yaml")
    said = told.decode("utf-8", "replace")
    named = re.search(r"^executor: *['\"]?([\w-]+)", said, re.MULTILINE)
    typed = re.search(r"(?:^| )(?:-e|--executor)[ =]([\w-]+)", " ".join(workflow.options))
    executor = typed[1] if typed else named[1] if named else "local"
    if executor in ("local", "dryrun", "touch"):
        return
    plugin = f"snakemake_executor_plugin_{executor.replace('-', '_')}"
    if importlib.util.find_spec(plugin) is None:
        raise CircuitError(
            f"Snakemake's executor '{executor}' is not installed",
            where=workflow.profile,
            fix=f"pip install {plugin.replace('_', '-')}, or leave the profile out to run here",
        )
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise CircuitError(
            "no Slurm here: sbatch is not on PATH",
            where=workflow.profile,
            fix="start it where jobs are submitted, or leave the profile out to run here",
        )


def dry_run(workflow: Workflow) -> list[PlannedRule]:
    """What Snakemake would do.

    Raises:
        CircuitError: as `Workflow.check`, or Snakemake refuses.
    """
    workflow.check()
    workflow.folder.mkdir(parents=True, exist_ok=True)
    words = workflow.words("--dry-run", "--quiet", "host")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode:
        raise CircuitError(_last_words(text), where="snakemake --dry-run")
    return list(read_dry_run(text.splitlines()))


def read_dry_run(lines: Iterable[str]) -> Iterator[PlannedRule]:
    """The jobs that a dry run lists."""
    name, fields = "", dict[str, str]()
    for line in [*lines, "rule end:"]:
        rule, entry = _RULE.match(line), _FIELD.match(line)
        if rule:
            if name:
                said = (part.partition("=") for part in fields.get("wildcards", "").split(", "))
                wildcards = {key: value for key, _, value in said if key}
                yield PlannedRule(name, fields.get("reason", ""), wildcards)
            name, fields = rule[1], {}
        elif entry:
            fields[entry[1]] = entry[2]


def run(workflow: Workflow, heard: Callable[[Event], None]) -> Outcome:
    """Run it; `heard` is told what happens.

    Raises:
        CircuitError: as `Workflow.check` and `check_executor`, or another is at work in the folder.
    """
    workflow.check()
    check_executor(workflow)
    log = workflow.folder / workflow.log
    log.parent.mkdir(parents=True, exist_ok=True)
    with _alone(workflow.folder), log.open("w", encoding="utf-8") as kept:
        failed: list[str] = []
        with subprocess.Popen(
            workflow.words(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",  # whatever a job prints
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            process_group=0,
        ) as process:
            assert process.stdout is not None
            try:
                for event in read_events(_copied(process.stdout, kept)):
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


def _copied(lines: Iterable[str], log: IO[str]) -> Iterator[str]:
    for line in lines:
        log.write(line)
        log.flush()
        yield line.rstrip("\n")


def read_events(lines: Iterable[str]) -> Iterator[Event]:
    """What Snakemake's log says, line by line."""
    names: dict[str, str] = {}
    failed: set[str] = set()  # the log tells them again at its end
    kind: Literal["started", "failed"] | None = None  # of the block that these lines are in
    name = ""
    for line in lines:
        block, entry = _RULE.match(line) or _FAILED.match(line), _FIELD.match(line)
        if block:
            kind, name = "failed" if line.startswith("Error") else "started", block[1]
        elif kind == "started" and entry and entry[1] == "log":
            name = Path(entry[2].partition(", ")[0]).stem
        elif kind and entry and entry[1] == "jobid":  # behind the log, but in an error before it
            name = names.setdefault(entry[2], name)
            if kind == "started" or name not in failed:
                yield Event(kind, name)
            (failed.add if kind == "failed" else failed.discard)(name)
            kind = None
        elif found := _FINISHED.match(line):
            yield Event("finished", names.get(found[1], found[2]))
        elif found := _STEPS.match(line):
            yield Event("progress", done=int(found[1]), total=int(found[2]))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one workflow at a time; a killed one leaves none behind."""
    place = folder / ".snakemake"
    place.mkdir(parents=True, exist_ok=True)
    with open_lock(place / "circuit.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CircuitError(
                "another start of this command is at work here",
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
            return place.resolve()
    raise CircuitError(f"no profile '{name}'", expected="slurm, or a folder with a config.yaml")
