"""What holds of the lookup study over its seeds: the tables of docs/results.md and their data.

    python benchmarks/lookup_seeds.py TARGET COMPARISON SPREAD STUDY ...

COMPARISON is the folder of `circuit study compare-claims` over the studies, SPREAD that of `circuit
study seed-spread` over their reference runs, each STUDY the folder of one
(`artifacts/scale/short_seed0011`). Puts into TARGET, a JSON file, the claims with their numbers by
seed; what plays a role, by steps from formation; the accuracies of each ablation run; and of each
seed's winners (the head whose match grew most, the path that writes most) what each term of the
optimizer moved, along the path and to first order. Prints claims, terms and when each run has
learned as Markdown; means have Student's t intervals of 95 %.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from circuit.artifacts import atomic_write_text, dump_json
from circuit.figures.charts import TERM_NAMES
from circuit.reading import read_json
from circuit.reports.intervals import said_between, spread
from circuit.reports.optimizer_comparison import LEARNED
from circuit.reports.tables import cell
from circuit.studies.ablation import ROOT as ABLATION
from circuit.studies.cross_seed import ROOT as CROSS_SEED
from circuit.studies.scales import PILOTS
from circuit.training.run_folder import METRICS, read_metrics

SPLIT = "validation_iid"
ATTRIBUTIONS = {
    "match": "bilinear_qk_rank_adam_state_attribution/winner_*",
    "write": "mlp_functional_write_adam_state_attribution/winner_*",
}
Row = dict[str, Any]


def courses(study: Path) -> list[Row]:
    """Validation accuracy of each ablation run at its evaluations."""
    told = []
    for name in PILOTS:
        (metrics,) = (study / ABLATION / name).glob(f"seed_*/{METRICS}")
        rows = [row for row in read_metrics(metrics.parent) if row.get("split") == SPLIT]
        steps, right = ([row[column] for row in rows] for column in ("step", "answer_accuracy"))
        told.append({"run": name, "step": steps, "answer_accuracy": right})
    return told


def winner(study: Path, what: str) -> Row:
    """What moved a winner over its window, by term."""
    (report,) = (study / CROSS_SEED).glob(f"seed_*/analysis/{ATTRIBUTIONS[what]}/*_report.json")
    window = read_json(report)["summary"]["windows"][0]
    kept = ("scalar", "start_step", "end_step", "actual", "path", "predicted", "references")
    return {name: window[name] for name in kept}


def study_of(folder: Path) -> Row:
    """All of it but the claims."""
    claims = read_json(folder / "artifacts/claims/claims_paper.json")
    winners = {what: winner(folder, what) for what in ATTRIBUTIONS}
    return {"seed": claims["seed"], "ablation": courses(folder), **winners}


def measured(values: Iterable[float | None], shown: str) -> str:
    """Mean, interval and ends."""
    of = spread(list(values))
    ends = f", {cell(of['least'], shown)} to {cell(of['most'], shown)}"
    return cell(of["mean"], shown) + said_between(of, "mean", shown) + ends


def claim_line(claim: Mapping[str, Any]) -> str:
    """A line of the table of claims; a number may be undefined in a seed."""
    numbers = []
    for name, of in claim["numbers"].items():
        values = list(of["by_seed"].values())
        shown = ".1%" if "accuracy" in name else ".3g"
        if "mean" not in of:
            told = ", ".join(map(cell, values))
        elif len(set(values)) == 1:
            told = cell(values[0], ".4g")
        else:
            told = measured(values, shown)
        numbers.append(f"{name.replace('_', ' ')} {told}")
    return f"| {claim['claim']} | {claim['holds']} of {claim['judged']} | {'; '.join(numbers)} |"


def terms_lines(studies: list[Row], what: str) -> list[str]:
    """The share that each term has in the change of the winners, and first order's error."""
    shares: dict[str, list[float | None]] = {}
    for study in studies:
        won = study[what]
        actual = won["actual"]
        for term, moved in won["path"].items():
            shares.setdefault(TERM_NAMES[term], []).append(moved / actual)
        missed = won["predicted"]["first_order"] / actual - 1
        shares.setdefault("first order misses", []).append(missed)
        for name, moved in won["references"].items():
            shares.setdefault(f"{name}, first order", []).append(moved / actual)
    return [f"| {what} | {name} | {measured(of, '.2%')} |" for name, of in shares.items()]


def learned_at(run: Row) -> int | None:
    """The first evaluation at which a run has learned."""
    right = zip(run["step"], run["answer_accuracy"], strict=True)
    return next((step for step, share in right if share >= LEARNED), None)


def learned_lines(studies: list[Row]) -> list[str]:
    """When each ablation run has learned, and where it ends."""
    lines = []
    for number, name in enumerate(PILOTS):
        runs = [study["ablation"][number] for study in studies]
        ends = measured((run["answer_accuracy"][-1] for run in runs), ".1%")
        lines.append(f"| {name} | {', '.join(str(learned_at(run)) for run in runs)} | {ends} |")
    return lines


def main() -> None:
    """Gather, write, print."""
    target, comparison, seed_spread, *folders = map(Path, sys.argv[1:])
    report = read_json(comparison / "claims_comparison_report.json")
    studies = sorted(map(study_of, folders), key=lambda study: int(study["seed"]))
    claims = report["summary"]["claims"]
    about = {name: report["summary"][name] for name in ("scale", "seeds", "recipe_digest")}
    spreads = read_json(seed_spread / "seed_spread_report.json")["summary"]
    about |= {name: spreads[name] for name in ("formed_at", "components", "roles")}
    atomic_write_text(target, dump_json({**about, "claims": claims, "studies": studies}))
    for claim in claims:
        print(claim_line(claim))
    for what in ATTRIBUTIONS:
        print(what, ", ".join(study[what]["scalar"] for study in studies))
        print("\n".join(terms_lines(studies, what)))
    print("\n".join(learned_lines(studies)))


if __name__ == "__main__":
    main()
