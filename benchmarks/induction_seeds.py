"""The order in which induction forms: trains configs/train/induction.json, one row a seed.

    python benchmarks/induction_seeds.py FOLDER [SEEDS]    # 5 seeds, about 30 s each on one core

Runs and reports go below FOLDER. The table has the steps at which each measure of
`induction-progress-report` passes half of its way, and its values at the last checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from circuit.quickstart import quickstart_configs
from circuit.reports.induction_progress import InductionOptions, InductionProgress
from circuit.reports.report import run_report
from circuit.tasks.benchmark import write_benchmark
from circuit.tasks.probes import write_probe_set
from circuit.training.loop import train

MEASURES = {
    "previous_token_attention": "previous token",
    "k_composition": "K-composition",
    "prefix_matching": "prefix matching",
    "answer_loss": "loss of the answers",
    "in_context_score": "in-context score",
}


def main(folder: Path, seeds: int) -> None:
    """Print the table as Markdown."""
    benchmark, config = quickstart_configs("induction")
    data = folder / "data"
    write_benchmark(benchmark.model_copy(update={"output_dir": str(data)}), overwrite=True)
    write_probe_set(data, folder / "probe_set.jsonl", ["validation"], 128, overwrite=True)
    print(f"| seed | answers | {' | '.join(MEASURES.values())} |")
    print("|---:|---:|" + "---|" * len(MEASURES))
    for seed in range(1, seeds + 1):
        run = folder / f"seed_{seed}"
        chosen = config.replace(seed=seed, output_dir=str(run), benchmark_dir=str(data))
        result = train(chosen, overwrite=True)
        options = InductionOptions(
            probe_set=folder / "probe_set.jsonl", checkpoint_dir=run / "checkpoints"
        )
        report = run_report(InductionProgress, chosen, options, run / "report", overwrite=True)
        cells, measures = [], {one["measure"]: one for one in report.summary["measures"]}
        for name in MEASURES:
            one = measures[name]
            of = f"{one['of']} " if one["of"] else ""
            cells.append(f"{one['half_step'] or '-'} ({of}{one['first']:.2f} to {one['last']:.2f})")
        accuracy = result.evaluations["validation"].answer_accuracy
        print(f"| {seed} | {100 * accuracy:.1f} % | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
