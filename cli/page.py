"""circuit page: one HTML file that tells a run's story, or compares several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuit import CircuitError

from . import complete, options
from .output import print_json, print_written, progress_bar, stdout

if TYPE_CHECKING:
    from circuit.page import PageResult

PANEL = "Start here"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("page", rich_help_panel=PANEL)(page)


def page(
    run: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a run; several with --compare.", autocompletion=complete.run
        ),
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="One page over several runs, such as seeds.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file; RUN/formation.html, or comparison.html beside the first run."
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write one self-contained HTML page from whatever reports a run has."""
    if not compare and len(run) > 1:
        raise CircuitError(f"{len(run)} runs", expected="one", fix="pass --compare for several")
    from circuit.folders import run_folder

    if not compare or len(run) > 1:  # one alone has nothing to be compared with: refused below
        for one in run:
            run_folder(one)
    from circuit.page import comparison_page, formation_page

    if compare:
        result = comparison_page(run, output, overwrite=overwrite)
    else:
        with progress_bar(not as_json) as bar:
            task = bar.add_task("example", total=None, note="attention")
            result = formation_page(
                run[0],
                output,
                overwrite=overwrite,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    _print(result, as_json)


def _print(result: PageResult, as_json: bool) -> None:
    if as_json:
        panels = {panel.name: [s.file for s in panel.sources] for panel in result.panels}
        missing = {one.what: one.command for one in result.missing}
        paths, left_out = [str(result.path)], list(result.left_out)
        print_json(
            {
                "bytes": result.size,
                "panels": panels,
                "missing": missing,
                "left_out": left_out,
                "paths": paths,
            }
        )
        return
    width = max(len(panel.name) for panel in result.panels)
    for panel in result.panels:
        files = [source.file for source in panel.sources] or ["-"]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        charts = f"{len(panel.charts)} charts" if len(panel.charts) != 1 else "1 chart"
        line = f"{panel.name:<{width}}  {charts:<9}  from {files[0]}{more}"
        stdout.print(line, soft_wrap=True)
    for report in result.left_out:
        stdout.print(f"left out, a report of another run: {report}", soft_wrap=True)
    if result.missing:
        stdout.print("not there yet; these make it:")
        for one in result.missing:
            stdout.print(f"  {one.command}", soft_wrap=True)
    print_written([result.path])
    stdout.print(f"{result.size / 1e6:.2f} MB; open it in a browser, it needs no network")
