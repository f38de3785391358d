"""One command of this program, what it reads and what it makes: what the rules are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.quoting import shell_line

if TYPE_CHECKING:
    from circuit.options import Options
    from circuit.reports.report import Report

Words = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        target: part of the study that it belongs to (`reference`, `ablation`, ...).
        kind: name of the rule: the command with underscores, as `resources.json` lists it.
        name: which instance of the kind; unique in it.
        argv: the words after `circuit`.
        inputs: files that have to be there and current.
        outputs: files that it makes; written last, so that they stand for all others.
        recipe: what decides its content besides the inputs: a change of it invalidates the outputs.
        units: how much of the kind's unit of cost it does (steps, checkpoints, ...).
        scalars: that it attributes in each unit; each has rows of its own.
        traced: steps that it traces while it trains them.
        taken: steps that it takes over, and does not train.
    """

    target: str
    kind: str
    name: str
    argv: Words
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    recipe: str = ""
    units: float = 1.0
    scalars: int = 1
    traced: int = 0
    taken: int = 0

    @property
    def folder(self) -> str:
        """Folder of its first output."""
        return str(Path(self.outputs[0]).parent)

    def renamed(self, rename: Callable[[str], str]) -> Job:
        """The job with its name, words and paths under other names."""
        texts = (tuple(map(rename, words)) for words in (self.argv, self.inputs, self.outputs))
        argv, inputs, outputs = texts
        return replace(self, name=rename(self.name), argv=argv, inputs=inputs, outputs=outputs)


@dataclass(frozen=True)
class Batch:
    """Jobs of one kind that run in one process, one after the other: one rule."""

    target: str
    kind: str
    name: str
    jobs: tuple[Job, ...] = field(repr=False)

    @property
    def inputs(self) -> list[str]:
        """What it has to find; what it makes itself is not among it."""
        outputs = set(self.outputs)
        needed = dict.fromkeys(path for job in self.jobs for path in job.inputs)
        return [path for path in needed if path not in outputs]

    @property
    def outputs(self) -> list[str]:
        """What it makes."""
        return [path for job in self.jobs for path in job.outputs]

    @property
    def command(self) -> str:
        """The words after `circuit`, quoted for a shell."""
        return command_line([job.argv for job in self.jobs])

    @property
    def recipe(self) -> str:
        """The recipes of its jobs."""
        return "; ".join(dict.fromkeys(job.recipe for job in self.jobs if job.recipe))


def command_line(argvs: Sequence[Words]) -> str:
    """Commands as `circuit.cli.job` takes them, `+` between them, quoted for a shell."""
    return " + ".join(shell_line(argv) for argv in argvs)


def split_commands(words: Iterable[str]) -> list[list[str]]:
    """The commands between the `+` signs of a command line."""
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "+":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def report_job(
    target: str,
    kind: type[Report[Any]],
    options: Options,
    folder: str,
    *,
    run: str = "",
    name: str = "",
    inputs: Words = (),
    more: Words = (),
    units: float = 1.0,
    scalars: int = 1,
) -> Job:
    """A report as a job; the probe set that its options name is among the inputs.

    Args:
        run: config of the run that it reads, if it reads one.
        more: words that are no options of the report.
    """
    command = (kind.names or (kind.command,))[0].split()
    rule = command[-1].removesuffix("-report").replace("-", "_")
    config = ("--config", run) if run else ()
    argv = (*command, *config, *options.words(), *more, "--output-dir", folder, "--overwrite")
    probes = (str(options.probe_set),) if hasattr(options, "probe_set") else ()
    outputs = (report_file(folder, kind.command),)
    return Job(
        *(target, rule, name or rule, argv, (*inputs, *probes), outputs),
        units=units,
        scalars=scalars,
    )


def checkpoints(folder: str, steps: Iterable[int]) -> dict[str, Any]:
    """A folder of checkpoints and those of some steps, as reports' options."""
    files = tuple(Path(folder, f"step_{step:06}.pt") for step in steps)
    return {"checkpoint_dir": Path(folder), "checkpoints": files}


def report_file(folder: str, command: str) -> str:
    """The file that a report writes last."""
    return f"{folder}/{command.removesuffix('-report').replace('-', '_')}_report.json"
