"""Commands that make data: generate-benchmark, generate-probe-set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import complete, options
from .output import print_json, print_written, progress_bar, stdout, table

if TYPE_CHECKING:
    from circuit.tasks.benchmark import Benchmark

PANEL = "Data"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("generate-benchmark", rich_help_panel=PANEL)(generate_benchmark)
    app.command("generate-probe-set", rich_help_panel=PANEL)(generate_probe_set)


def generate_benchmark(
    config: options.BenchmarkConfigPath,
    overrides: options.BenchmarkSet = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Draw a task's records, check them, and write the benchmark."""
    from circuit.tasks.benchmark import write_benchmark
    from circuit.tasks.registry import load_benchmark_config

    settings = load_benchmark_config(config, overrides or ())
    with progress_bar(not as_json) as bar:
        total = sum(count for count, _ in settings.stored().values()) or None
        task = bar.add_task("records", total=total, note="")
        made, paths = write_benchmark(
            settings,
            overwrite=overwrite,
            progress=lambda split, done: bar.update(task, advance=1, note=f"{split} {done}"),
        )
    if as_json:
        print_json({"name": settings.name, "digest": made.digest, "paths": [str(p) for p in paths]})
        return
    _print_benchmark(made)
    print_written(paths)


def generate_probe_set(
    benchmark_dir: Annotated[
        Path,
        typer.Option(help="Folder of a generated benchmark.", autocompletion=complete.benchmark),
    ],
    output: Annotated[Path, typer.Option(help="JSONL file to write; metadata stands beside it.")],
    examples_per_split: Annotated[int, typer.Option(min=1, help="Records drawn from each split.")],
    split: options.Splits = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 17,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Draw a fixed set of records that later reports look at."""
    from circuit.tasks.probes import write_probe_set

    splits = split or ["validation_iid"]
    made, paths = write_probe_set(
        benchmark_dir, output, splits, examples_per_split, seed=seed, overwrite=overwrite
    )
    if as_json:
        print_json({"records": len(made.records), "paths": [str(p) for p in paths]})
        return
    stdout.print(f"{len(made.records)} records from {', '.join(splits)} (seed {seed})")
    print_written(paths)


def _print_benchmark(made: Benchmark) -> None:
    """The task's figures, a row a split; then the warnings."""
    told = made.task.tell(made.figures)
    shown = table(f"{made.config.name} (digest {made.digest[:12]})", list(told.columns))
    for row in told.rows:
        shown.add_row(*row)
    stdout.print(shown)
    if told.note:
        stdout.print(told.note, style="dim", soft_wrap=True)
    from rich.text import Text

    for warning in told.warnings:
        stdout.print(Text("warning: ", style="yellow") + Text(warning), soft_wrap=True)
