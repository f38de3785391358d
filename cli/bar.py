"""The columns of a progress bar; rich's part for them is imported where one is shown."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["COLUMNS", "Progress"]


class _Speed(ProgressColumn):
    """Finished units a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="dim")


COLUMNS = (
    TextColumn("{task.description}", markup=False),
    BarColumn(bar_width=28),
    MofNCompleteColumn(),
    _Speed(),
    TimeRemainingColumn(compact=True),
    TextColumn("{task.fields[note]}", style="dim", markup=False),
)
