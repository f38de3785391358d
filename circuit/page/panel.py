"""What a page is made of: panels, their charts, tables and data, and where these come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from circuit.figures.charts import Chart
from circuit.folders import RUN_CONFIG
from circuit.quoting import shell_line

MOST = 24
"""Reports of a kind that are drawn, at most: a page is one file."""
Record = dict[str, Any]
"""One row of a panel's data: columns of a report's row under their own names."""


@dataclass(frozen=True)
class Table:
    """The records of some data at the page's step, or all of them where they have no steps.

    Attributes:
        columns: heading of each column that is shown.
    """

    title: str
    data: str
    columns: dict[str, str]


@dataclass(frozen=True)
class Source:
    """Where a panel's numbers stand, and what made them.

    Attributes:
        file: the report, relative to the run's folder.
        rows: the file that holds the numbers, relative to the run's folder.
        law: what the report checked.
    """

    file: str
    rows: str
    command: str
    law: str = ""


@dataclass(frozen=True)
class Missing:
    """A report that does not exist, and the command that makes it."""

    what: str
    command: str


@dataclass(frozen=True)
class Panel:
    """One question and what the reports say to it."""

    name: str
    title: str
    question: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    data: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    sources: Sequence[Source] = ()
    missing: Sequence[Missing] = ()
    notes: Sequence[str] = ()
    which: str = ""
    """Of several panels with one title: the report's folder, and what it is about."""
    example: Mapping[str, Any] | None = None
    """Of the panel that draws attention over tokens: see circuit.page.example."""

    @property
    def heading(self) -> str:
        """Title, and which one of several it is."""
        return f"{self.title}: {self.which}" if self.which else self.title


def training_command(home: str, *words: str) -> str:
    """What trains the run of this folder again, with further words."""
    config = f"{home}/{RUN_CONFIG}"
    return shell_line(["circuit", "train", "--config", config, *words, "--overwrite"])


def pick(row: Mapping[str, Any], columns: Iterable[str]) -> Record:
    """Some columns of a row."""
    return {column: row[column] for column in columns}


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of ascending steps, evenly, with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(i * last / (most - 1))] for i in range(most)]


def slider_steps(panels: Sequence[Panel], checkpoints: Sequence[int]) -> list[int]:
    """The steps that the slider stops at: of checkpoints and of everything that a chart follows."""
    steps = set(checkpoints)
    for panel in panels:
        for chart in panel.charts:
            steps |= {row["step"] for row in chart.data[chart.follows] if "step" in row}
    return sorted(steps)
