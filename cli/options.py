"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from circuit import CircuitError

from . import complete
from .parsing import Command

TrainConfigPath = Annotated[
    Path,
    typer.Option("--config", help="Training config (JSON).", autocompletion=complete.train_config),
]
TrainConfigPathOrNone = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Training config (JSON), or a run; needed without --recipe.",
        autocompletion=complete.train_config,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE.py:CLASS",
        help="Recipe of your own, a circuit.Recipe, whose code is executed; a run of one is"
        " executed only where it is named.",
        autocompletion=complete.own_code,
    ),
]
BenchmarkConfigPath = Annotated[
    Path,
    typer.Option(
        "--config", help="Benchmark config (JSON).", autocompletion=complete.benchmark_config
    ),
]
BaseSeed = Annotated[
    int | None,
    typer.Option(
        "--base-seed",
        min=0,
        max=9999,
        help="Seed of the study's runs but the cross-seed ones', in place of the contract's 7: it"
        " then has a folder of its own.",
        autocompletion=complete.values("11", "13"),
    ),
]
SET = typer.Option(
    "--set",
    metavar="FIELD=VALUE",
    help="Set a field of the config, such as optimizer.learning_rate=0.003; repeatable.",
    autocompletion=complete.train_field,
)
Set = Annotated[list[str] | None, SET]
BenchmarkSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Set a field of the config, such as splits.train.samples=100; repeatable.",
        autocompletion=complete.benchmark_field,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace the files that an earlier run of this command wrote, no others.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with every path that was written.")
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or mps; else CIRCUIT_DEVICE, else the config's.",
        autocompletion=complete.values(*complete.DEVICES),
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Intra-op threads; they decide bits too."),
]
Splits = Annotated[
    list[str] | None,
    typer.Option(
        "--split", help="Split of the benchmark; repeatable.", autocompletion=complete.split
    ),
]
Slices = Annotated[
    list[str] | None,
    typer.Option(
        "--slice",
        help="Fact by which accuracies are shown apart, such as lag; the JSON has all; repeatable.",
        autocompletion=complete.task_slice,
    ),
]
Checkpoint = Annotated[
    Path, typer.Option(help="Checkpoint file.", autocompletion=complete.checkpoint)
]

Task = Annotated[
    str | None,
    typer.Option(
        help="Task of the benchmark, or file.py:Class of your own; where benchmark_dir holds none,"
        " one is drawn with the task's defaults.",
        autocompletion=complete.task,
    ),
]

Sinks = Annotated[
    list[str] | None,
    typer.Option(
        "--sink",
        metavar="KIND:WHERE",
        help="Where metrics go besides: tensorboard:FOLDER, wandb:PROJECT, trackio:PROJECT;"
        " repeatable.",
        autocompletion=complete.values("tensorboard:", "wandb:", "trackio:"),
    ),
]

Trace = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="[FOLDER]",
        help="Also trace every step, in the same pass, into FOLDER;"
        " without one into analysis/optimizer_update_trace of the run.",
        autocompletion=complete.trace,
    ),
]
TraceEndStep = Annotated[
    int | None, typer.Option(min=1, help="Last step that --trace records; the run's last.")
]
TraceAnchorEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between the trace's stored full states; 50.")
]
TraceCheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between the trace's addressable checkpoints; 1.")
]
TraceTop = Annotated[
    int | None,
    typer.Option(
        "--trace-top-k-parameters", min=1, help="Tensors listed per step of the trace; 10."
    ),
]
Cores = Annotated[int, typer.Option(min=1, help="Cores of this machine to use.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", "-n", help="Print the plan with every path, and stop.")
]
Profile = Annotated[
    str | None,
    typer.Option(
        help="Snakemake profile: slurm (it ships with the program), or a folder.",
        autocompletion=complete.values("slurm"),
    ),
]
FOR_SNAKEMAKE = {"allow_extra_args": True, "ignore_unknown_options": False}
"""Settings of a command that leaves to Snakemake what follows after `--`."""
OutputDir = Annotated[Path, typer.Option(help="Folder of the report.")]


class TracingCommand(Command):
    """A command whose `--trace` may stand without a value, which Typer has no option for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give it an empty one where the next word is another option, or there is none."""
        filled = []
        for word, following in zip(args, [*args[1:], "-"], strict=False):
            filled.append(word)
            if word == "--trace" and following.startswith("-"):
                filled.append("")
        return super().parse_args(ctx, filled)


def resolve_device(option: str | None, configured: str) -> str:
    """`--device`, else `CIRCUIT_DEVICE`, else the config's.

    Raises:
        CircuitError: the name is no device.
    """
    source, device = "the config", configured
    if option is not None:
        source, device = "--device", option
    elif os.environ.get("CIRCUIT_DEVICE"):
        source, device = "CIRCUIT_DEVICE", os.environ["CIRCUIT_DEVICE"]
    if device not in complete.DEVICES:
        raise CircuitError(
            f"unknown device '{device}'",
            where=source,
            expected=f"one of {', '.join(complete.DEVICES)}",
        )
    return device
