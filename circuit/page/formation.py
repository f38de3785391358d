"""The page of one run: every panel, in the order in which the story is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from circuit.artifacts import OutputFolder, Row, read_jsonl
from circuit.page.asking import home_of, with_inputs
from circuit.page.attribution import attribution_panels
from circuit.page.example import example_panel
from circuit.page.found import Reports
from circuit.page.heads import heads_panel, weights_panel, winner_of
from circuit.page.html import render
from circuit.page.learning import METRICS, lag_panel, learning_panel
from circuit.page.panel import Missing, Panel, Source, slider_steps
from circuit.page.value_code import interventions_panel, readability_panel, rescue_panel
from circuit.runs.checkpointed import CheckpointedRun, open_folder
from circuit.train_config import ImportedConfig, TrainConfig

COMMAND = "page"
FILE = "formation.html"
"""Name of the page in the run's folder."""


@dataclass(frozen=True)
class PageResult:
    """A written page.

    Attributes:
        path: the HTML file.
        size: its bytes.
        panels: in their order.
    """

    path: Path
    size: int
    panels: tuple[Panel, ...]
    left_out: tuple[str, ...] = ()
    """Reports that stand in the run's folder and are of another run."""

    @property
    def missing(self) -> list[Missing]:
        """Reports that the page asks for; each once."""
        return list(dict.fromkeys(one for panel in self.panels for one in panel.missing))


def formation_page(
    run: str | Path,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PageResult:
    """Write the page of a run.

    Args:
        run: the run's folder.
        output: the HTML file; `formation.html` in the run's folder by default.
        overwrite: replace a page that this command wrote there before.
        progress: called with the checkpoints that the example has looked at and their number.

    Raises:
        CircuitError: there is no run, a report or row file is damaged, or the name is not free.
    """
    opened = open_folder(run)
    path = Path(output) if output is not None else opened.path / FILE
    with page_folder(path, overwrite=overwrite) as folder:
        reports = Reports(opened.path)
        panels, further, steps = _panels(opened, reports, progress)
        config = opened.config
        shape = config.model
        text = render(
            title=config.name,
            facts=[
                f"{shape.layers} layers, {shape.heads} heads, width {shape.d_model}",
                *_training_facts(config),
                *left_out_fact(reports.left_out),
            ],
            panels=panels,
            steps=steps,
            further=further,
        )
        folder.write_text(path.name, text)
    return PageResult(path, path.stat().st_size, tuple(panels), tuple(reports.left_out))


def left_out_fact(reports: Sequence[str]) -> list[str]:
    """What a page says of reports that it does not draw because they are of another run."""
    return [f"left out, as reports of another run: {', '.join(reports)}"] if reports else []


def _training_facts(config: TrainConfig) -> list[str]:
    if isinstance(config, ImportedConfig):
        return [f"trained elsewhere, {len(config.imported.files)} states imported"]
    optimizer = config.optimizer
    return [f"{optimizer.name}, learning rate {optimizer.learning_rate:g}", f"seed {config.seed}"]


def page_folder(path: Path, *, overwrite: bool) -> OutputFolder:
    """This command's share of the folder that a page goes to: that one file."""
    return OutputFolder(path.parent, f"{COMMAND}.{path.stem}", overwrite=overwrite)


def metrics_of(run: CheckpointedRun) -> list[Row]:
    """Rows of the run's metrics; none where it has not logged yet."""
    path = run.path / METRICS
    return list(read_jsonl(path, tolerate_torn_tail=True)) if path.exists() else []


def _panels(
    run: CheckpointedRun, reports: Reports, progress: Callable[[int, int], None] | None
) -> tuple[list[Panel], list[Source], list[int]]:
    home = home_of(run)
    folder = home.folder
    rows = metrics_of(run)
    winner = winner_of(reports)
    first = [
        learning_panel(rows, folder),
        lag_panel(rows, folder),
        heads_panel(reports, home),
        weights_panel(reports, home),
    ]
    last = [
        readability_panel(reports, home),
        interventions_panel(reports, home),
        rescue_panel(reports, home),
        example_panel(run, folder, winner[0] if winner else None, progress),
    ]
    slider = slider_steps([*first, *last], run.steps)
    panels = [*first, *attribution_panels(reports, home, slider), *last]
    panels = [replace(panel, missing=with_inputs(panel.missing, run, reports)) for panel in panels]
    return panels, _further(reports, panels, folder), slider


def _further(reports: Reports, panels: Sequence[Panel], home: str) -> list[Source]:
    """Reports that no panel draws."""
    drawn = {source.file for panel in panels for source in panel.sources}
    found = [one for command in reports.by_command for one in reports.all(command)]
    sources = [report.source(home) for report in found]
    return sorted((s for s in sources if s.file not in drawn), key=lambda source: source.file)
