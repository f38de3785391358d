"""What `ov-write-progress-report` costs: all heads, 64 pairs, 16 checkpoints of the reference run.

    python benchmarks/ov_progress.py [--threads N] [--pairs N]

Runs the whole report into a temporary folder, after imports. Needs the reference run
(`circuit train --config configs/train/symbolic_kv_formation.json`) and its probe set.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from circuit.config import load_config
from circuit.environment import prepare_process
from circuit.model.components import all_heads
from circuit.reports.inputs import open_inputs
from circuit.reports.ov_write_progress import OvWriteProgress, ProgressOptions
from circuit.reports.report import run_report
from circuit.scalars.head_progress import ScoredReads, head_progress
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import list_checkpoints

RUN = Path("artifacts/runs/symbolic_kv_reference_formation")


def main() -> None:
    """Measure and print; the time that matters comes last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=64)
    args = parser.parse_args()
    config = load_config(RUN / "run_config.json", TrainConfig)
    config = config.replace(threads=prepare_process(threads=args.threads))
    probe = RUN / "analysis" / "probe_set.jsonl"
    checkpoints = list(list_checkpoints(RUN / "checkpoints").values())[:16]
    options = ProgressOptions(
        probe_set=probe, checkpoints=tuple(checkpoints), max_pairs_per_type=args.pairs
    )
    study = open_inputs(config, probe)
    reads = ScoredReads.of(study.side(study.pairs(options), "clean"))
    for point in study.models(checkpoints[:1]):
        heads = all_heads(point.model)
        began = time.perf_counter()
        for _ in range(10):
            head_progress(point.model, reads, heads, study.task.choices)
        measuring = (time.perf_counter() - began) / 10
    print(f"one checkpoint, {len(heads)} heads, {args.pairs} pairs: {1e3 * measuring:.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run_report(OvWriteProgress, config, options, folder)
        seconds = time.perf_counter() - began
    print(
        f"report over {len(heads)} heads, {len(checkpoints)} checkpoints, {args.pairs} pairs,"
        f" {config.threads} threads = {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
