"""The one shape of every report: parameters in, `ReportResult` out, the same files for all.

    <name>_report.json   schema version, every parameter, law, summary, paths, provenance
    <name>_report.md     the same to read
    <name>_rows.jsonl    one object a row (and further row files that the report names)
    *.svg                figures

`<name>` is the command with underscores and without a trailing `-report`. A report opens its folder
before it computes anything, so that a folder that is not free is refused at once, and writes
everything at the end, so that nothing partial stands there. Clock times, host and versions stand
in `provenance` of the JSON alone: equal inputs give equal bytes everywhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.artifacts import OutputFolder, Row, dump_json, dump_rows
from circuit.environment import environment_facts
from circuit.errors import CircuitError
from circuit.figures.style import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReportResult:
    """A written report.

    Attributes:
        command: that made it.
        report, page: the JSON and the Markdown.
        rows: the row files, `<name>_rows.jsonl` first.
        figures: the SVGs.
        summary: the main numbers.
        law: what was checked, in one sentence; empty where there is nothing to check.
    """

    command: str
    report: Path
    page: Path
    rows: tuple[Path, ...]
    figures: tuple[Path, ...]
    summary: dict[str, Any]
    law: str = ""

    @property
    def paths(self) -> list[Path]:
        """Every file, the report first."""
        return [self.report, self.page, *self.rows, *self.figures]


def report_name(command: str) -> str:
    """`ov-write-progress-report` -> `ov_write_progress`."""
    return command.removesuffix("-report").replace("-", "_")


@dataclass
class ReportWriter:
    """Collects what a report says and writes it; see `open_report`."""

    command: str
    folder: OutputFolder
    began: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        """Stem of the file names."""
        return report_name(self.command)

    def fixed_names(self) -> tuple[str, str, str]:
        """Names of rows, page and report."""
        return f"{self.name}_rows.jsonl", f"{self.name}_report.md", f"{self.name}_report.json"

    def write(
        self,
        *,
        parameters: Mapping[str, Any],
        summary: Mapping[str, Any],
        rows: Iterable[Row] | str,
        page: Sequence[str],
        figures: Mapping[str, Figure] | None = None,
        further: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        law: str = "",
        device: str = "cpu",
    ) -> ReportResult:
        """Write every file of the report.

        Args:
            parameters: every parameter, JSON; paths as they were given.
            summary: the main numbers, JSON.
            rows: of `<name>_rows.jsonl`, or its text.
            page: lines of the Markdown after its title and law; `![...](stem.svg)` shows a figure.
            figures: stem of each SVG and the figure.
            further: text of further files by name.
            provenance: digests of what was read, beside the environment and the times.
            device: that was computed on.
        """
        row_file, page_file, report_file = self.fixed_names()
        tables = {row_file: rows if isinstance(rows, str) else dump_rows(rows), **(further or {})}
        drawn = {f"{stem}.svg": svg(figure) for stem, figure in (figures or {}).items()}
        title = [f"# {self.command}", ""] + ([f"**{_sentence(law)}**", ""] if law else [])
        texts = {
            **tables,
            **drawn,
            page_file: "\n".join([*title, *page]).rstrip("\n") + "\n",
        }
        payload = {
            "schema_version": 1,
            "command": self.command,
            "parameters": dict(parameters),
            "law": law,
            "summary": dict(summary),
            "paths": list(texts),
            "provenance": {
                **(provenance or {}),
                "environment": environment_facts(device),
                "started_unix": self.began,
                "seconds": time.time() - self.began,
            },
        }
        texts[report_file] = dump_json(payload)
        # everything is ready and every name is free before the earlier report goes
        self.folder.claim(texts)
        self.folder.remove([report_file])
        paths = {name: self.folder.write_text(name, text) for name, text in texts.items()}
        return ReportResult(
            self.command,
            paths[report_file],
            paths[page_file],
            tuple(paths[name] for name in tables),
            tuple(paths[name] for name in drawn),
            dict(summary),
            law,
        )


@contextmanager
def open_report(
    command: str, output_dir: str | Path, *, overwrite: bool = False
) -> Iterator[ReportWriter]:
    """Lock the output folder of a report; earlier files of the command are replaced on writing.

    Files that the earlier report wrote and the new one does not are removed when the block ends
    without an error.

    Raises:
        CircuitError: the folder holds a report of this command and `overwrite` was not given, a
            report of another command, or somebody else's file under a name that is needed.
    """
    with OutputFolder(output_dir, command, overwrite=overwrite) as folder:
        writer = ReportWriter(command, folder)
        folder.refuse_foreign(writer.fixed_names())
        for other in sorted(folder.root.glob("*_report.json")):
            if other.name not in folder.owned:
                raise CircuitError(
                    f"the folder holds another report, {other.name}",
                    where=folder.root,
                    fix="give each report a folder of its own",
                )
        yield writer
        folder.remove_stale()


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")
