"""The page of one run: every panel, in the order in which the story is told."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from circuit.artifacts import OutputFolder, read_jsonl
from circuit.page.example import example_panel
from circuit.page.html import render
from circuit.page.learning import METRICS, learning_panel, loss_panel, slice_names, slice_panel
from circuit.page.panel import Missing, Panel, Source, slider_steps, training_command
from circuit.page.reports import Reports, attribution_asked_for, report_panels, with_inputs
from circuit.page.watched import watched_panel
from circuit.reading import values_of
from circuit.reports.report import all_reports
from circuit.runs.checkpointed import CheckpointedRun, open_folder
from circuit.runs.recording import ROWS
from circuit.train_config import (
    ForeignConfig,
    ImportedConfig,
    RecipeConfig,
    RecordedConfig,
    TrainConfig,
)
from circuit.training.run_folder import read_metrics

COMMAND = "page"
FILE = "formation.html"
"""Name of the page in the run's folder."""
TRAINED_ANEW = "train the run again"


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
        reports = Reports(opened)
        panels, further, steps = _panels(opened, reports, progress)
        config = opened.config
        text = render(
            title=config.name,
            facts=[
                *_model_facts(config),
                *_training_facts(config),
                *left_out_fact(reports.left_out),
            ],
            panels=panels,
            steps=steps,
            further=further,
        )
        folder.write_text(path.name, text)
    return PageResult(path, path.stat().st_size, tuple(panels), tuple(reports.left_out))


def _several(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def left_out_fact(reports: Sequence[str]) -> list[str]:
    """What a page says of reports that it does not draw because they are of another run."""
    return [f"left out, as reports of another run: {', '.join(reports)}"] if reports else []


def _model_facts(config: TrainConfig) -> list[str]:
    shape = config.shape
    if shape is None:
        return []
    return [
        f"{_several(shape.layers, 'layer')}, {_several(shape.heads, 'head')}",
        f"width {shape.d_model}",
    ]


def _training_facts(config: TrainConfig) -> list[str]:
    if isinstance(config, RecordedConfig):
        recorded = config.recorded
        return [f"recorded from a loop of its own, {recorded.last_step} steps of {recorded.module}"]
    if isinstance(config, ImportedConfig):
        return [f"trained elsewhere, {len(config.imported.files)} states imported"]
    if isinstance(config, RecipeConfig):
        return [f"of the recipe {config.recipe.word}", f"seed {config.seed}"]
    optimizer = config.optimizer
    return [f"{optimizer.name}, learning rate {optimizer.learning_rate:g}", f"seed {config.seed}"]


def page_folder(path: Path, *, overwrite: bool) -> OutputFolder:
    """This command's share of the folder that a page goes to: that one file."""
    name = f"{COMMAND}.{path.stem}"
    return OutputFolder(path.parent, name, writes=[path.name], overwrite=overwrite)


def _panels(
    run: CheckpointedRun, reports: Reports, progress: Callable[[int, int], None] | None
) -> tuple[list[Panel], list[Source], list[int]]:
    kinds = sorted(all_reports(), key=lambda kind: (kind.place is None, kind.place))
    panels = _log_panels(run, reports)
    if isinstance(run.config, RecordedConfig | RecipeConfig):
        panels += attribution_asked_for(reports)
    panels += [panel for kind in kinds for panel in report_panels(reports, kind)]
    if run.config.shape is not None and run.config.benchmark_dir is not None:
        panels.append(example_panel(run, run.config.output_dir, reports.head(), progress))
    panels = _told_apart(_told_first(panels))
    panels = [replace(panel, missing=with_inputs(panel.missing, reports)) for panel in panels]
    drawn = {source.file for panel in panels for source in panel.sources}
    written = [one for of_command in reports.by_command.values() for one in of_command]
    further = [
        Source(reports.relative(one.path), reports.relative(one.file()), "", one.law)
        for one in written
        if reports.relative(one.path) not in drawn
    ]
    with values_of(run.path, fix="make its reports again"):
        steps = slider_steps(panels, run.steps)
    return panels, sorted(further, key=lambda source: source.file), steps


def _log_panels(run: CheckpointedRun, reports: Reports) -> list[Panel]:
    """What was written down while the run went on."""
    config, folder = run.config, run.config.output_dir
    if isinstance(config, RecordedConfig):
        path = run.path / ROWS
        rows = read_jsonl(path, tolerate_torn_tail=True) if os.path.lexists(path) else []
        with values_of(path, fix="record the loop again"):
            return watched_panel(rows)
    rows = read_metrics(run.path)
    with values_of(run.path / METRICS, fix=TRAINED_ANEW):
        if not rows and (isinstance(config, ForeignConfig) or config.edit is not None):
            return []  # `circuit train` would refuse an imported run, and a counterfactual one
        if not isinstance(config, RecipeConfig):
            slices = [slice_panel(rows, folder, by, reports.task()) for by in slice_names(rows)]
            return [learning_panel(rows, folder), *slices]
        train = training_command(folder, *config.recipe_words)
        return [loss_panel(rows, train)] if rows else []


def _told_first(panels: Sequence[Panel]) -> list[Panel]:
    """What there is to see, then what could be made; nothing is asked for under a title shown."""
    titles = {panel.title for panel in panels if panel.sources}
    once = [panel for panel in panels if panel.sources or panel.title not in titles]
    return sorted(once, key=lambda panel: not (panel.sources or panel.example))


def _told_apart(panels: Sequence[Panel]) -> list[Panel]:
    """Each panel says which one it is only where another one has its title."""
    titles = Counter(panel.title for panel in panels)
    return [panel if titles[panel.title] > 1 else replace(panel, which="") for panel in panels]
