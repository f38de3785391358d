"""What benchmarks/grokking_seeds.py measured in FOLDER, as one JSON file a recipe.

    python benchmarks/grokking_tables.py FOLDER TARGET

Phases, by checkpoints: *memorization* ends at the first with 99 % of the training sums right,
*formation* at the first with 50 % of the test sums right, *cleanup* at the first with 99 % of them
right; *after* is the rest.

Attributions are sums over the steps whose pieces were done in time, a share of each phase that is
told; over seeds they are means of rates, per 100 steps, with 95 % percentile intervals of 10,000
seeded bootstrap draws. `memory` is the training sums' log-odds minus the test sums'.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from grokking_seeds import LEARNED, PLANS, REPORT, TINY

from circuit.artifacts import atomic_write_text, read_jsonl
from circuit.attribution.series import Series
from circuit.reading import read_json
from circuit.tasks.modular_addition.task import TEST, TRAIN
from circuit.train_config import load_run_config

HALF = 0.5
PHASES = ("memorization", "formation", "cleanup", "after")
MEMORY = "memory"
TAKES = {TEST: np.array([1, 0]), TRAIN: np.array([0, 1]), MEMORY: np.array([-1, 1])}
"""Each scalar as a combination of the two that were attributed."""
COURSE = ("step", "train_loss", "test_loss", "restricted_loss", "excluded_loss")
COURSE += ("train_accuracy", "test_accuracy", "key_power", "spread_W_E", "squared_weights")
Row = dict[str, Any]
Piece = tuple[int, int, Row]
"""First state, last state, arrays."""


def phases(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """First and last step of each phase that the run has reached."""
    starts = [0]
    for split, accuracy in ((TRAIN, LEARNED), (TEST, HALF), (TEST, LEARNED)):
        later = (row for row in rows if row["step"] >= starts[-1])
        reached = next((r["step"] for r in later if r[f"{split}_accuracy"] >= accuracy), None)
        if reached is None:
            break
        starts.append(reached)
    spans = zip(PHASES, itertools.pairwise([*starts, rows[-1]["step"]]), strict=False)
    return {name: span for name, span in spans if span[0] < span[1]}


def below_for_good(rows: Sequence[Row], column: str, bound: float) -> int | None:
    """The first checkpoint from which on a column is below a bound."""
    later = itertools.takewhile(lambda row: row[column] < bound, reversed(rows))
    return min((row["step"] for row in later), default=None)


def read_pieces(run: Path) -> list[Piece]:
    """Every piece of a run, in the order of steps."""
    pieces = []
    for path in sorted((run / "pieces").glob("*.npz")):
        start, end = map(int, path.stem.split("_"))
        with np.load(path) as arrays:
            pieces.append((start, end, dict(arrays)))
    return pieces


def series_of(pieces: Sequence[Piece]) -> dict[str, Series]:
    """One series a scalar; steps between pieces may be missing."""
    names = ("before", "after", "first_order", "path")
    joined = {name: np.concatenate([arrays[name] for *_, arrays in pieces]) for name in names}
    terms = pieces[0][2]["terms"].tolist()
    steps = np.concatenate([np.arange(start + 1, end + 1) for start, end, _ in pieces])

    def by_term(kind: str, take: Any) -> Row:
        return dict(zip(terms, np.einsum("nst,s->tn", joined[kind], take), strict=True))

    return {
        name: Series(
            scalar=name,
            telescopes=True,
            steps=steps,
            before=joined["before"] @ take,
            after=joined["after"] @ take,
            clip=np.ones(len(steps)),
            first_order=by_term("first_order", take),
            path=by_term("path", take),
            references={},
            groups={},
        )
        for name, take in TAKES.items()
    }


def by_group(pieces: Sequence[Piece]) -> Row:
    """Path contributions by scalar, part of the model and term."""
    total = sum(arrays["by_atom"] for *_, arrays in pieces)  # [scalar, term, atom]
    part = ["attention" if g.startswith("L0H") else g for g in pieces[0][2]["groups"].tolist()]
    terms = pieces[0][2]["terms"].tolist()
    return {
        name: {
            group: dict(zip(terms, of[:, [p == group for p in part]].sum(1), strict=True))
            for group in dict.fromkeys(part)
        }
        for name, take in TAKES.items()
        for of in [np.einsum("sta,s->ta", total, take)]
    }


def attribution(pieces: Sequence[Piece], spans: dict[str, tuple[int, int]]) -> Row:
    """By phase and scalar: change, terms, closure and nodes over the pieces that lie in it."""
    phases: Row = {}
    for phase, (start, end) in spans.items():
        inside = [piece for piece in pieces if start <= piece[0] and piece[1] <= end]
        if not inside:
            continue
        steps = sum(b - a for a, b, _ in inside)
        nodes = np.concatenate([arrays["nodes"] for *_, arrays in inside])
        summaries = {name: series.summary() for name, series in series_of(inside).items()}
        phases[phase] = {
            "steps": steps,
            "share": steps / (end - start),
            "nodes": {TEST: float(nodes[:, 0].mean()), TRAIN: float(nodes[:, 1].mean())},
            **{
                name: {key: told[key] for key in ("actual", "first_order", "path", "closure")}
                for name, told in summaries.items()
            },
            "by_group": by_group(inside),
        }
    return phases


def course_of(pieces: Sequence[Piece]) -> list[Row]:
    """Each piece: its steps, the scalars before it, and what each term did to them."""
    return [
        {
            "steps": [start, end],
            **{
                name: {"before": float(series.before[0]), **series.summary()["path"]}
                for name, series in series_of([(start, end, arrays)]).items()
                if name != MEMORY
            },
        }
        for start, end, arrays in pieces
    ]


def table(run: Path) -> Row:
    """Everything about one run."""
    rows = read_jsonl(run / REPORT / f"{REPORT}_rows.jsonl")
    summary = read_json(run / REPORT / f"{REPORT}_report.json")["summary"]
    environment = read_json(run / "environment.json")
    learned, spans = summary["learned_at"], phases(rows)
    memorized = [row for row in rows if row["step"] >= (learned[TRAIN] or 0)]
    excluded = sorted((row["excluded_loss"], row["step"]) for row in memorized)
    pieces = read_pieces(run)
    thinned = rows[:: max(1, len(rows) // 60)]
    bound = math.log(summary["modulus"]) / 2
    return {
        "seed": load_run_config(run).seed,
        "device": environment["device_name"],
        "torch": environment["torch"],
        "spent": read_json(run / "spent.json"),
        "learned_at": learned,
        "key_frequencies": summary["key_frequencies"],
        "last": summary["last"],
        "below_half_of_chance": {
            name: below_for_good(rows, f"{name}_loss", bound) for name in ("restricted", TEST)
        },
        "excluded_loss": {"least": excluded[0][::-1], "most": excluded[-1][::-1]},
        "phases": spans,
        "executed_again": {
            "pieces": len(pieces),
            "that_differ": [str(p[2]["differs"]) for p in pieces if p[2]["differs"]],
        },
        "attribution": attribution(pieces, spans),
        "course": {name: [row[name] for row in thinned] for name in COURSE},
        "pieces": course_of(pieces),
    }


def spread(values: Iterable[float]) -> Row:
    """Mean, and the 95 % percentile interval of the mean of 10,000 seeded bootstrap draws."""
    of = np.array(list(values))
    drawn = np.random.default_rng(0).choice(of, (10_000, len(of))).mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
    return {"n": len(of), "mean": float(of.mean()), "low": low, "high": high}


def spreads(tables: Sequence[Row]) -> Row:
    """Of runs of one recipe: steps, and each phase's rates per 100 steps, over seeds."""
    told: Row = {}
    for name in (TRAIN, TEST):
        reached = [one["learned_at"][name] for one in tables if one["learned_at"][name]]
        told[f"{name}_learned_at"] = spread(reached) if reached else None
    for phase in PHASES:
        having = [one["attribution"][phase] for one in tables if phase in one["attribution"]]
        if having:
            told[phase] = {scalar: _rates(having, scalar) for scalar in TAKES}
    return told


def _rates(having: Sequence[Row], scalar: str) -> Row:
    """Of one phase and scalar, over the seeds that have the phase."""

    def rate(pick: Callable[[Row], float]) -> Row:
        return spread(100 * pick(one) / one["steps"] for one in having)

    first = having[0]
    terms, groups = list(first[scalar]["path"]), list(first["by_group"][scalar])
    return {
        "actual": rate(lambda one: one[scalar]["actual"]),
        "path": {term: rate(lambda one, t=term: one[scalar]["path"][t]) for term in terms},
        "by_group": {
            group: rate(lambda one, g=group: sum(one["by_group"][scalar][g].values()))
            for group in groups
        },
        "worst_closure": {
            kind: max(one[scalar]["closure"][kind] for one in having)
            for kind in first[scalar]["closure"]
        },
    }


def rounded(value: Any) -> Any:
    """Numbers to five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def lines(value: Any, depth: int = 3, indent: str = "") -> str:
    """JSON with a line for each entry down to a depth."""
    if depth == 0 or not isinstance(value, dict | list) or not value:
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}: {lines(v, depth - 1, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}}}"
    parts = [inner + lines(one, depth - 1, inner) for one in value]
    return "[\n" + ",\n".join(parts) + f"\n{indent}]"


def main(folder: Path, target: Path) -> None:
    """Write a file for every recipe that has reports in FOLDER."""
    for plan in (*PLANS, TINY):
        named = (folder / "runs").glob(f"{plan.config}_seed*")
        runs = sorted(named, key=lambda run: int(run.name.rpartition("seed")[2]))
        tables = [table(run) for run in runs if (run / REPORT).is_dir()]
        if tables:
            told = {"plan": asdict(plan), "spread": spreads(tables), "runs": tables}
            for one in tables:
                for phase in one["attribution"].values():
                    del phase["by_group"]  # told over seeds
            path = target / f"{plan.config}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, lines(rounded(told)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
