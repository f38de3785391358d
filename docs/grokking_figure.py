"""Draw docs/grokking.svg from docs/data/grokking_*.json (benchmarks/grokking_tables.py).

    python docs/grokking_figure.py

Losses of a run modulo 113, test accuracy of all of them, and what each term of AdamW did to the
log-odds of test sums and training sums in the pieces of a run modulo 59.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from circuit.figures.charts import TERM_NAMES, Chart, chart, colour, lines, stacked
from circuit.reading import read_json

HERE = Path(__file__).parent
TARGET = HERE / "grokking.svg"
LOSSES = {"train_loss": "train", "test_loss": "test"}
LOSSES |= {"restricted_loss": "restricted (all inputs)", "excluded_loss": "excluded (train)"}
TERMS = ("weight_decay", "adam_current_gradient", "adam_historical_momentum")


def runs(name: str) -> list[dict[str, Any]]:
    """The runs of a recipe."""
    told: list[dict[str, Any]] = read_json(HERE / "data" / f"grokking_{name}.json")["runs"]
    return told


def course(name: str, title: str, rows: list[dict[str, Any]], y: str, log: bool = False) -> Chart:
    """A line for each `of` of the rows."""
    names = list(dict.fromkeys(row["of"] for row in rows))
    drawn = lines(name, y, y, colour("of", names), ("step", "of", y), log=log)
    return chart(name, title, {name: rows}, drawn)


def losses(run: dict[str, Any]) -> Chart:
    """Loss of both splits, and of parts of the logits."""
    of = run["course"]
    rows = [
        {"step": step, "of": words, "nats": loss}
        for column, words in LOSSES.items()
        for step, loss in zip(of["step"], of[column], strict=True)
    ]
    return course("losses", f"p = 113, seed {run['seed']}: losses", rows, "nats", log=True)


def accuracies() -> Chart:
    """Test accuracy of every run modulo 113."""
    told = {f"seed {run['seed']}": run for run in runs("p113")}
    told |= {f"seed {run['seed']}, no decay": run for run in runs("p113_no_decay")}
    rows = [
        {"step": step, "of": name, "accuracy": accuracy}
        for name, run in told.items()
        for step, accuracy in zip(
            run["course"]["step"], run["course"]["test_accuracy"], strict=True
        )
    ]
    return course("accuracies", "p = 113: accuracy on test sums", rows, "accuracy")


def terms(run: dict[str, Any], split: str) -> Chart:
    """What each term did in each piece, per 100 steps, at its last step; and their sum."""
    rows = []
    for piece in run["pieces"]:
        start, end = piece["steps"]
        shares = {TERM_NAMES[term]: piece[split][term] for term in TERMS}
        shares["sum"] = sum(shares.values())
        rows += [
            {"step": end, "of": name, "per 100 steps": 100 * share / (end - start)}
            for name, share in shares.items()
        ]
    title = f"p = 59, seed {run['seed']}: change of the log-odds of {split} sums, by term"
    return course(f"terms_{split}", title, rows, "per 100 steps")


def attributed(run: dict[str, Any]) -> float:
    """Share of the run's steps."""
    steps: int = sum(phase["steps"] for phase in run["attribution"].values())
    return steps / run["course"]["step"][-1]


if __name__ == "__main__":
    grokked = next(run for run in runs("p113") if run["learned_at"]["test"])
    most = max(runs("p59"), key=attributed)
    charts = [losses(grokked), accuracies(), terms(most, "test"), terms(most, "train")]
    TARGET.write_text(stacked(charts, width=640))
    sys.stdout.write(f"wrote {TARGET} ({TARGET.stat().st_size / 1000:.0f} kB)\n")
