"""circuit quickstart: the main job on a small task."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from . import options
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


def quickstart(as_json: options.Json = False) -> None:
    """Train a small transformer on latest-write lookup, trace it, show what it learned."""
    began = time.perf_counter()
    from circuit import quickstart as library

    config = library.quickstart_configs()[1]
    if not as_json:
        stdout.print(
            "Training a 2-layer transformer to look up the latest write to a key"
            + (" (the earlier quickstart is replaced)" if Path(config.output_dir).exists() else "")
            + " ..."
        )
    with progress_bar(not as_json) as bar:
        result = library.quickstart(
            training_progress=TrainBar(bar, config),
            trace_progress=StepBar(bar, "tracing", config.steps),
            attribution_progress=ReportBar(bar, "attributing"),
        )
    paths = [result.benchmark_folder, result.training.folder, result.trace.record.store.root]
    paths += [result.separation.page, result.attribution.page, result.page]
    if as_json:
        print_json(
            {
                "evaluations": {e.split: e.to_row() for e in result.evaluations},
                "example": vars(result.example),
                "law": result.trace.law,
                "winner": result.separation.summary["winner"],
                "attribution": result.attribution.summary["windows"][0],
                "attribution_law": result.attribution.law,
                "paths": [str(path) for path in paths],
            }
        )
        return
    stdout.print()
    best = result.training.best or {}
    stdout.print(f"best checkpoint (step {best['step']}, by {best['split']} {best['metric']}):")
    print_evaluations(result.evaluations)
    stdout.print()
    print_slices([e for e in result.evaluations if e.split == library.EXAMPLE_SPLIT])
    stdout.print()
    _print_example(result.example)
    stdout.print()
    _print_attribution(result)
    stdout.print()
    print_written(paths)
    stdout.print(result.trace.law, soft_wrap=True)
    stdout.print(result.attribution.law, soft_wrap=True)
    stdout.print(f"open {result.page} in a browser to see it", soft_wrap=True)
    accuracy = next(
        e.answer_accuracy for e in result.evaluations if e.split == library.EXAMPLE_SPLIT
    )
    stdout.print(
        f"{library.EXAMPLE_SPLIT} answer accuracy {percent(accuracy)} at step {best['step']} of"
        f" {result.training.step}; {time.perf_counter() - began:.0f} s in all"
    )


def _print_attribution(result: QuickstartResult) -> None:
    """The head that learned to look up, how much its match grew, and which terms carried it."""
    from circuit.reports.attribution import SHORT_TERMS

    summary, found = result.separation.summary, result.attribution.summary["windows"][0]
    winner = summary["winner"]
    rivals = [head for head in summary["heads"] if head["score"] == winner["score"]]
    highest = max(rivals, key=lambda head: head["separation_at_last"])
    rank = winner["score"].removeprefix("rank")
    stdout.print(
        f"the QK match of {winner['head']} (rank {rank}: support above distractors) grew most, from"
        f" {winner['separation_at_first']:.2f} to {winner['separation_at_last']:.2f}; its support"
        f" beats every distractor in {percent(winner['support_wins_at_last'])} of the probed reads"
        + (
            ""
            if highest["head"] == winner["head"]
            else f" ({highest['head']} ends highest, at {highest['separation_at_last']:.2f})"
        ),
        soft_wrap=True,
    )
    actual = found["actual"]
    carried = ", ".join(
        f"{SHORT_TERMS.get(name, name)} {100 * share / actual:+.1f} %"
        for name, share in found["path"].items()
        if name != "rounding"
    )
    stdout.print(
        f"measured in the {rank} directions that it has at step {found['end_step']}, it went from"
        f" {found['value_at_start']:.2f} to {found['value_at_end']:.2f} in steps"
        f" {found['start_step']} to {found['end_step']}; of these {actual:+.2f}: {carried}",
        soft_wrap=True,
    )


def _print_example(example: Example) -> None:
    """The sequence up to the read, the attended tokens shaded, and the answer."""
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
    stdout.print(f"one read of {example.sample_id} ({example.slice}):")
    stdout.print(line)
    right = "right" if example.predicted == example.answer else f"wrong: it is {example.answer}"
    stdout.print(
        f"the model says {example.predicted}"
        f" (p = {example.probability:.3f}, {right});"
        f" {example.head} puts {percent(example.attention[example.support_position])} of its"
        f" attention on the support, {example.tokens[example.support_position]} at position"
        f" {example.support_position}"
    )
