"""circuit quickstart: the main job on a small task."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from . import options
from .output import percent, print_json, print_written, progress_bar, stdout
from .trace import StepBar
from .training import TrainBar, print_evaluations, print_slices

if TYPE_CHECKING:
    from circuit.quickstart import Example

PANEL = "Start here"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("quickstart", rich_help_panel=PANEL)(quickstart)


def quickstart(as_json: options.Json = False) -> None:
    """Train a small transformer on latest-write lookup, trace it, show what it learned."""
    began = time.perf_counter()
    if not as_json:
        stdout.print(
            "Training a 2-layer transformer to look up the latest write to a key"
            " (an earlier quickstart is replaced) ..."
        )
    from circuit import quickstart as library

    config = library.quickstart_configs()[1]
    with progress_bar(not as_json) as bar:
        result = library.quickstart(
            training_progress=TrainBar(bar, config.steps),
            trace_progress=StepBar(bar, "tracing", config.steps),
        )
    paths = [result.benchmark_folder, result.training.folder, result.trace.record.store.root]
    if as_json:
        print_json(
            {
                "evaluations": {e.split: e.to_row() for e in result.evaluations},
                "example": vars(result.example),
                "law": result.trace.law,
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
    print_written(paths)
    stdout.print(result.trace.law, soft_wrap=True)
    accuracy = next(
        e.answer_accuracy for e in result.evaluations if e.split == library.EXAMPLE_SPLIT
    )
    stdout.print(
        f"{library.EXAMPLE_SPLIT} answer accuracy {percent(accuracy)} at step {best['step']} of"
        f" {result.training.step}; {time.perf_counter() - began:.0f} s in all"
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
    stdout.print(f"one read of {example.sample_id} (lag {example.lag}):")
    stdout.print(line)
    right = "right" if example.predicted == example.answer else f"wrong: it is {example.answer}"
    stdout.print(
        f"the model says {example.predicted}"
        f" (p = {example.probability:.3f}, {right});"
        f" {example.head} puts {percent(example.attention[example.support_position])} of its"
        f" attention on the support, {example.tokens[example.support_position]} at position"
        f" {example.support_position}"
    )
