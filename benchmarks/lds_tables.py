"""What `circuit study data-attribution` measured of some runs: a table, and the rows behind it.

    python benchmarks/lds_tables.py TARGET [RUN ...]    # RUN/analysis/data_attribution

Puts the first scalar's rows of every run into TARGET, a JSON file, in place of those of the same
task, seed and window, with the cost of each method in trainings over the window. Prints a Markdown
table of the whole file: by task, window and share, the mean LDS of each method over the runs (one a
seed) and its ends; of one run its 95 % bootstrap interval; of random scores the median, and the
ends over all vectors of all runs. Runs have their windows in common, or in order of their steps:
the second of one seed stands beside the second of another.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuit.artifacts import atomic_write_text, dump_json, read_jsonl
from circuit.reading import read_json
from circuit.reports.data_attribution import ALL, RANDOM
from circuit.train_config import load_run_config

Row = dict[str, Any]
COLUMNS = ("window", "share", "removed", "sets", "method")


def of_run(run: Path) -> list[Row]:
    """Its rows of the first scalar, with task and seed."""
    config = load_run_config(run)
    folder = run / "analysis/data_attribution"
    report = read_json(folder / "data_attribution_report.json")
    lead, costs = report["summary"]["lead"], report["provenance"]["costs"]
    about = {"task": config.name, "seed": config.seed, "scalar": lead}
    told: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in read_jsonl(folder / "data_attribution_rows.jsonl"):
        if row["scalar"] == lead and row["lds"] is not None:
            told[row["window"], row["share"], row["method"]].append(row)
    return [
        {
            **about,
            **{column: rows[0][column] for column in COLUMNS},
            **ends(rows),
            "cost": costs[window].get(method),
        }
        for (window, _, method), rows in told.items()
    ]


def ends(rows: Sequence[Row]) -> dict[str, float | None]:
    """LDS, its interval and predicted over actual spread; of vectors the median and the ends."""
    if len(rows) == 1:
        only = {name: rows[0][name] for name in ("lds", "low", "high", "spread")}
        return {name: None if value is None else round(value, 4) for name, value in only.items()}
    values = sorted(row["lds"] for row in rows)
    return {
        "lds": round(float(np.median(values)), 4),
        "low": round(values[0], 4),
        "high": round(values[-1], 4),
    }


def cell(rows: Sequence[Row]) -> str:
    """Mean and ends over seeds, or the interval of one."""
    if not rows:
        return "-"
    apart = len(rows) == 1 or rows[0]["method"] == RANDOM
    low = min(row["low" if apart else "lds"] for row in rows)
    high = max(row["high" if apart else "lds"] for row in rows)
    return f"{np.mean([row['lds'] for row in rows]):.2f} ({low:.2f} to {high:.2f})"


def whose(row: Row) -> tuple[Any, ...]:
    """Task, seed and window."""
    return row["task"], row["seed"], row["window"]


def merged(target: Path, runs: Sequence[Path]) -> list[Row]:
    """The rows of the file, those of `runs` replaced or added."""
    rows = [row for run in runs for row in of_run(run)]
    replaced = {whose(row) for row in rows}
    before = read_json(target)["rows"] if target.exists() else []
    return [row for row in before if whose(row) not in replaced] + rows


def window_names(rows: Sequence[Row]) -> dict[tuple[Any, ...], str]:
    """By task, seed and window: the windows at this place in the order of each seed's."""
    windows: dict[tuple[str, int], list[str]] = defaultdict(list)
    for task, seed, window in sorted(
        {whose(row) for row in rows}, key=lambda of: int(of[2].split(":")[0])
    ):
        windows[task, seed].append(window)
    beside: dict[tuple[str, int], set[str]] = defaultdict(set)
    for (task, _), of_seed in windows.items():
        for place, window in enumerate(of_seed):
            beside[task, place].add(window)
    return {
        (task, seed, window): " or ".join(sorted(beside[task, place]))
        for (task, seed), of_seed in windows.items()
        for place, window in enumerate(of_seed)
    }


def main(target: Path, runs: Sequence[Path]) -> None:
    """Write the file, and print both tables."""
    rows = merged(target, runs)
    atomic_write_text(target, dump_json({"rows": rows}))
    names = window_names(rows)
    groups: dict[tuple[Any, ...], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    costs: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        window = names[whose(row)]
        groups[row["task"], window, row["share"]][row["method"]].append(row)
        if row["cost"] is not None:
            costs[row["task"], window][row["method"]].append(row["cost"])
    methods = [name for name in ALL if any(name in of for of in groups.values())]
    print(f"| task | seeds | window | removed | {' | '.join(methods)} |")
    print("|---|---:|---|---:|" + "---|" * len(methods))
    for (task, window, share), of in groups.items():
        seeds = len({row["seed"] for row in of[methods[0]]})
        cells = [cell(of[name]) for name in methods]
        print(f"| {task} | {seeds} | {window} | {share:.0%} | {' | '.join(cells)} |")
    paid = [name for name in methods if name != RANDOM]
    print(f"\n| trainings over the window | | {' | '.join(paid)} |")
    print("|---|---|" + "---:|" * len(paid))
    for (task, window), by in costs.items():
        cells = [f"{np.mean(by[name]):.3g}" if by[name] else "-" for name in paid]
        print(f"| {task} | {window} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
