"""circuit quickstart: the main job on a small task."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import complete, options
from .output import percent, print_json, print_written, progress_bar, stdout
from .reports import ReportBar
from .trace import StepBar
from .training import TrainBar, print_evaluations, print_slices

if TYPE_CHECKING:
    from circuit.quickstart import Example, QuickstartResult

PANEL = "Start here"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("quickstart", rich_help_panel=PANEL)(quickstart)


def quickstart(
    task: Annotated[
        str,
        typer.Option(
            help="symbolic_kv (latest-write lookup), induction or modular_addition.",
            autocompletion=complete.quickstart_task,
        ),
    ] = "symbolic_kv",
    as_json: options.Json = False,
) -> None:
    """Train a small transformer on a task, trace it, show what it learned."""
    began = time.perf_counter()
    from circuit import quickstart as library

    tour, config = library.find_tour(task), library.quickstart_configs(task)[1]
    if not as_json:
        replaced = Path(config.output_dir).exists()
        note = " (the earlier quickstart is replaced)" if replaced else ""
        stdout.print(f"Training {tour.trains}{note} ...")
    with progress_bar(not as_json) as bar:
        result = library.quickstart(
            task,
            training_progress=TrainBar(bar, config),
            trace_progress=StepBar(bar, "tracing", config.steps),
            attribution_progress=ReportBar(bar, "attributing"),
        )
    report_pages = [] if result.formed.report is None else [result.formed.report.page]
    paths = [result.benchmark_folder, result.training.folder, result.trace.record.store.root]
    paths += [*report_pages, result.attribution.page, result.page]
    if as_json:
        print_json(_result_payload(result, paths))
        return
    stdout.print()
    best = result.training.best or {}
    shown = [e for e in result.evaluations if e.split == tour.split]
    stdout.print(f"best checkpoint (step {best['step']}, by {best['split']} {best['metric']}):")
    print_evaluations(result.evaluations, result.task)
    stdout.print()
    print_slices(shown, list(result.task.slices)[:1])
    stdout.print()
    _print_example(result.example)
    stdout.print()
    _print_attribution(result)
    stdout.print()
    print_written(paths)
    stdout.print(result.trace.law, soft_wrap=True)
    stdout.print(result.attribution.law, soft_wrap=True)
    stdout.print(f"open {result.page} in a browser to see it", soft_wrap=True)
    stdout.print(
        f"{tour.split} answer accuracy {percent(shown[0].answer_accuracy)} at step {best['step']}"
        f" of {result.training.step}; {time.perf_counter() - began:.0f} s in all"
    )


def _result_payload(result: QuickstartResult, paths: list[Path]) -> dict[str, Any]:
    return {
        "evaluations": {e.split: e.to_row() for e in result.evaluations},
        "example": vars(result.example),
        "law": result.trace.law,
        "winner": result.formed.who,
        "attribution": result.attribution.summary["windows"][0],
        "attribution_law": result.attribution.law,
        "paths": [str(path) for path in paths],
    }


def _print_attribution(result: QuickstartResult) -> None:
    """What has formed, how much it grew, and which terms carried it."""
    from circuit.reports.attribution import SHORT_TERMS

    formed, window = result.formed, result.attribution.summary["windows"][0]
    stdout.print(formed.words, soft_wrap=True)
    actual = window["actual"]
    carried = ", ".join(
        f"{SHORT_TERMS.get(name, name)} {100 * share / actual:+.1f} %"
        for name, share in window["path"].items()
        if name != "rounding"
    )
    stdout.print(
        f"{formed.measured} went from"
        f" {window['value_at_start']:.2f} to {window['value_at_end']:.2f} in steps"
        f" {window['start_step']} to {window['end_step']}; of these {actual:+.2f}: {carried}",
        soft_wrap=True,
    )


def _print_example(example: Example) -> None:
    """The sequence up to the read, the attended tokens shaded, and the answer."""
    from rich.text import Text

    line = Text()
    for position, weight in enumerate(example.attention):
        token = example.tokens[position]
        style = f"on color({232 + min(int(weight * 24), 23)})" if weight > 0.05 else ""
        if position == example.support_position:
            style += " bold green"
        elif position == example.prediction_position:
            style += " bold yellow"
        line.append(token, style=style)
        line.append(" ")
    of_slice = "" if example.slice is None else f" ({example.slice})"
    stdout.print(f"one read of {example.sample_id}{of_slice}:")
    stdout.print(line)
    right = "right" if example.predicted == example.answer else f"wrong: it is {example.answer}"
    stdout.print(
        f"the model says {example.predicted}"
        f" (p = {example.probability:.3f}, {right});"
        f" {example.head} puts {percent(example.attention[example.support_position])} of its"
        f" attention on the support, {example.tokens[example.support_position]} at position"
        f" {example.support_position}"
    )
