"""Draw docs/lookup.svg from docs/data/lookup_seeds.json (benchmarks/lookup_seeds.py).

    python docs/lookup_figure.py

Which optimizer learns the lookup, and what each term of AdamW moved of the head whose match grew
most, over the seeds of the study at scale short.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from circuit.figures.charts import Chart, band, chart, colour, lines, stacked
from circuit.reading import read_json
from circuit.reports.cross_seed_comparison import terms_chart

HERE = Path(__file__).parent
TARGET = HERE / "lookup.svg"
RUNS = {
    **{"adamw_baseline": "AdamW", "adamw_beta1_0": "AdamW without momentum"},
    **{"sgd_momentum_09": "SGD with momentum", "sgd_plain": "SGD"},
}


def accuracies(studies: list[dict[str, Any]]) -> Chart:
    """Mean accuracy of each optimizer, and its ends over the seeds."""
    of: dict[tuple[str, int], list[float]] = defaultdict(list)
    for study in studies:
        for run in study["ablation"]:
            for step, right in zip(run["step"], run["answer_accuracy"], strict=True):
                of[run["run"], step].append(right)
    rows = [
        {
            **{"run": RUNS[name], "step": step, "accuracy": sum(right) / len(right)},
            **{"accuracy_low": min(right), "accuracy_high": max(right)},
        }
        for (name, step), right in of.items()
        if name in RUNS
    ]
    shade = colour("run", list(RUNS.values()))
    drawn = lines("optimizers", "accuracy", "accuracy", shade, ("step", "run", "accuracy"))
    title = f"Answer accuracy: mean and ends over {len(studies)} seeds"
    ends = band("optimizers", "accuracy", "accuracy", shade)
    return chart("optimizers", title, {"optimizers": rows}, ends, drawn)


def terms(studies: list[dict[str, Any]]) -> Chart:
    """What moved the winner of each seed."""
    rows = []
    for study in studies:
        match = study["match"]
        moved = {term: value for term, value in match["path"].items() if term != "rounding"}
        rows.append({"seed": study["seed"], "match_terms": moved, "match_actual": match["actual"]})
    return terms_chart("match", rows)


if __name__ == "__main__":
    told = read_json(HERE / "data" / "lookup_seeds.json")["studies"]
    TARGET.write_text(stacked([accuracies(told), terms(told)], width=640))
    sys.stdout.write(f"wrote {TARGET} ({TARGET.stat().st_size / 1000:.0f} kB)\n")
