"""The order in which induction forms, and what carried it: configs/train/induction.json by seed.

    python benchmarks/induction_seeds.py FOLDER [SEEDS]    # 5 seeds, a minute or two each

Runs, traces and reports go below FOLDER. The first table has the steps at which each measure of
`induction-progress-report` passes half of its way, and its values at the last checkpoint. The
second splits what each measure gained over the whole run among the terms of the optimizer's steps
(Simpson's rule along every step) and names the parameters that carried most of it: means over
seeds with 95 % bootstrap intervals over seeds.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from over_seeds import interval

import circuit
from circuit.quickstart import quickstart_configs
from circuit.reports.induction_progress import InductionOptions, InductionProgress
from circuit.reports.report import run_report
from circuit.scalars.base import Scalar
from circuit.scalars.induction import KComposition, prefix_matching, previous_token_attention
from circuit.scalars.loss import LossScalar
from circuit.tasks.benchmark import write_benchmark
from circuit.tasks.examples import Examples
from circuit.tasks.probes import write_probe_set
from circuit.trace.while_training import DEFAULT_FOLDER, TraceRecorder
from circuit.training.loop import train

MEASURES = {
    "previous_token_attention": "previous token",
    "k_composition": "K-composition",
    "prefix_matching": "prefix matching",
    "answer_loss": "loss of the answers",
    "in_context_score": "in-context score",
}
RECORDS = 128


class Shares(NamedTuple):
    """Of one seed's change of a measure."""

    terms: dict[str, float]
    groups: dict[str, float]
    closure: float
    """Relative error of the sum of the contributions."""
    first_order: float
    """The same of first-order estimates."""


def main(folder: Path, seeds: int) -> None:
    """Print both tables as Markdown."""
    benchmark, config = quickstart_configs("induction")
    data = folder / "data"
    write_benchmark(benchmark.model_copy(update={"output_dir": str(data)}), overwrite=True)
    write_probe_set(data, folder / "probe_set.jsonl", ["validation"], RECORDS, overwrite=True)
    print(f"| seed | answers | {' | '.join(MEASURES.values())} |")
    print("|---:|---:|" + "---|" * len(MEASURES))
    carried: dict[str, list[Shares]] = defaultdict(list)
    for seed in range(1, seeds + 1):
        run = folder / f"seed_{seed}"
        chosen = config.replace(seed=seed, output_dir=str(run), benchmark_dir=str(data))
        result = train(chosen, overwrite=True, recorder=TraceRecorder())
        options = InductionOptions(
            probe_set=folder / "probe_set.jsonl", checkpoint_dir=run / "checkpoints"
        )
        report = run_report(InductionProgress, chosen, options, run / "report", overwrite=True)
        measures = {one["measure"]: one for one in report.summary["measures"]}
        accuracy = result.evaluations["validation"].answer_accuracy
        cells = " | ".join(_course(measures[name]) for name in MEASURES)
        print(f"| {seed} | {100 * accuracy:.1f} % | {cells} |", flush=True)
        for name, shares in attributed(run / DEFAULT_FOLDER, measures, chosen.steps).items():
            carried[name].append(shares)
    print_shares(carried)


def attributed(trace: Path, measures: Mapping[str, Any], steps: int) -> dict[str, Shares]:
    """What carried each measure of the head (or pair) that is best at the end, in one replay."""
    run = circuit.open_run(trace)
    batch = run.setup.split("validation").batch(range(RECORDS))
    scalars = {
        name: scalar_of(name, measures[name]["of"], batch)
        for name in MEASURES
        if name != "in_context_score"
    }
    series = circuit.attribute(run, scalars.values(), 0, steps)
    return {name: shares_of(series[scalar.name].summary()) for name, scalar in scalars.items()}


def scalar_of(name: str, of: str | None, batch: Examples) -> Scalar:
    """A measure of the report as an attributable scalar."""
    if of is None:
        return LossScalar(batch, "answer")
    if name == "k_composition":
        return KComposition(*of.split(" > "))
    if name == "prefix_matching":
        return prefix_matching(of, batch)
    return previous_token_attention(of, batch)


def shares_of(summary: Mapping[str, Any]) -> Shares:
    """Contributions over the actual change."""
    actual = summary["actual"]
    by_group = {
        group: sum(kinds["path"].values()) / actual
        for group, kinds in summary["groups"]["circuit"].items()
    }
    # heads play other parts in other seeds: a group is told by layer and matrix
    by_kind: dict[str, float] = defaultdict(float)
    for group, share in by_group.items():
        layer, _, matrix = group.partition("H")
        by_kind[f"{layer} {matrix.partition('.')[2]}" if matrix else group] += share
    closure = summary["closure"]
    return Shares(
        {term: value / actual for term, value in summary["path"].items()},
        dict(by_kind),
        closure["path"],
        closure["first_order"],
    )


def print_shares(carried: Mapping[str, Sequence[Shares]]) -> None:
    """A row a measure: mean and interval of each share; the groups with the largest means."""
    terms = list(next(iter(carried.values()))[0].terms)
    print(f"\n| measure | {' | '.join(terms)} | most of it by parameters | closure | first order |")
    print("|---|" + "---|" * len(terms) + "---|---|---|")
    for name, seeds in carried.items():
        groups = {key: [one.groups[key] for one in seeds] for key in seeds[0].groups}
        largest = sorted(groups, key=lambda key: -abs(sum(groups[key])))[:4]
        cells = [interval([one.terms[term] for one in seeds], ".1%") for term in terms]
        cells.append(", ".join(f"{key} {interval(groups[key], '.1%')}" for key in largest))
        cells.append(f"{max(one.closure for one in seeds):.1e}")
        cells.append(interval([one.first_order for one in seeds], ".1%"))
        print(f"| {MEASURES[name]} | {' | '.join(cells)} |")


def _course(measure: Mapping[str, Any]) -> str:
    of = f"{measure['of']} " if measure["of"] else ""
    half = measure["half_step"] or "-"
    return f"{half} ({of}{measure['first']:.2f} to {measure['last']:.2f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
