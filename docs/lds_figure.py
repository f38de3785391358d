"""Draw docs/lds.svg from docs/data/lds.json (benchmarks/lds_tables.py).

    python docs/lds_figure.py

How well each method orders what trainings without some examples do: means over the seeds of
induction with their ends, in the middle of the phase change and at the end of training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from circuit.figures.charts import Chart, stacked
from circuit.figures.data import lds_chart
from circuit.reading import read_json
from circuit.reports.data_attribution import RANDOM

HERE = Path(__file__).parent
TARGET = HERE / "lds.svg"
WINDOWS = {"180:260": "in the middle of the phase change", "520:600": "at the end of training"}


def of_window(rows: list[dict[str, Any]], window: str, when: str) -> Chart:
    """A line for each share and method; of random scores over all vectors of all seeds."""
    of: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["window"] == window and row["task"] == "induction":
            of.setdefault((row["share"], row["method"]), []).append(row)
    records = []
    for (share, method), seeds in of.items():
        low, high = ("low", "high") if method == RANDOM else ("lds", "lds")
        record = {"share": share, "method": method, "low": min(one[low] for one in seeds)}
        record |= {"high": max(one[high] for one in seeds)}
        records.append(record | {"lds": sum(one["lds"] for one in seeds) / len(seeds)})
    title = f"Induction, examples removed {when} (steps {window}): LDS by share and method"
    return lds_chart(f"lds_{window.replace(':', '_')}", title, records)


if __name__ == "__main__":
    rows = read_json(HERE / "data" / "lds.json")["rows"]
    TARGET.write_text(stacked([of_window(rows, *one) for one in WINDOWS.items()], width=560))
    sys.stdout.write(f"wrote {TARGET} ({TARGET.stat().st_size / 1000:.0f} kB)\n")
