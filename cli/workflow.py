"""What commands print of a workflow: why it does something again, and which jobs run."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Any

from .output import stderr, stdout

if TYPE_CHECKING:
    from circuit.studies.workflow import Event, PlannedRule, Workflow


def print_again(rules: Iterable[PlannedRule], workflow: Workflow) -> None:
    """A line for each rule whose outputs are there."""
    for rule in rules:
        cut_off = rule.reason == "Forced execution" and not workflow.options
        reason = "it was cut off" if cut_off else rule.reason
        stdout.print(f"again: {rule.job}: {reason}", soft_wrap=True)


def print_ends(paths: Iterable[Any]) -> None:
    """What the jobs leave, a line each."""
    stdout.print("it ends with:")
    for path in paths:
        stdout.print(f"  {path}", soft_wrap=True)


class Live:
    """Shows which rules run, and a line for each that is done."""

    def __init__(self, bar: Any, *, quiet: bool, aside: Container[str] = ()) -> None:
        """Begin.

        Args:
            bar: that it moves.
            quiet: no lines.
            aside: rules that do nothing.
        """
        self.bar, self.quiet, self.aside = bar, quiet, aside
        self.task = bar.add_task("jobs", total=None, note="")
        self.began: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Take one event in."""
        if event.kind == "started":
            self.began[event.rule] = time.monotonic()
        elif event.kind in ("finished", "failed"):
            seconds = time.monotonic() - self.began.pop(event.rule, time.monotonic())
            if not self.quiet and event.rule not in self.aside:
                stderr.print(f"{event.kind} {event.rule} ({seconds:.0f} s)", style="dim")
        else:
            self.bar.update(self.task, completed=event.done, total=event.total)
        self.bar.update(self.task, note=", ".join(list(self.began)[:3]))
