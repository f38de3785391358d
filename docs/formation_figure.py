"""Draw the README's figure, docs/formation.svg, from the reports of the quickstart's run.

    circuit quickstart && python docs/formation_figure.py

Three charts over the same steps: what the model can do, where that is, which term wrote it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from circuit.artifacts import read_jsonl
from circuit.figures.charts import Chart, stacked
from circuit.page.learning import METRICS, slice_names, slice_panel
from circuit.reports.written import read_report

RUN = Path("artifacts/runs/quickstart")
REPORTS = ("bilinear_qk_match_separation", "bilinear_qk_rank_adam_state_attribution")
TARGET = Path(__file__).parent / "formation.svg"


def first_chart(name: str) -> Chart:
    """The first chart of one of the run's reports."""
    report = read_report(RUN / "analysis" / name / f"{name}_report.json")
    assert report.kind is not None
    return report.kind.charts(report.results)[0]


if __name__ == "__main__":
    if not (RUN / "analysis" / REPORTS[1]).is_dir():
        sys.exit(f"{RUN} is not there or has no attribution: run circuit quickstart first")
    rows = list(read_jsonl(RUN / METRICS))
    lookup = slice_panel(rows, str(RUN), slice_names(rows)[0], None).charts[0]
    TARGET.write_text(stacked([lookup, *map(first_chart, REPORTS)], width=640))
    sys.stdout.write(f"wrote {TARGET} ({TARGET.stat().st_size / 1000:.0f} kB)\n")
