"""What geometry-subspace-intervention costs, and a loop with one forward pass a read.

    python benchmarks/geometry.py [--run FOLDER] [--stage STAGE] [--checkpoints N] [--sample N]

Runs the whole report (single_query, rank 16 of value identity removed at the prediction) on the
first checkpoints and the probe set of a trained run, beyond the start of Python and the imports.
The loop is timed on a sample of reads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from circuit.model.stages import patch
from circuit.model.subspaces import remove, subspace_basis
from circuit.reports.geometry_subspace_intervention import (
    GeometrySubspaceIntervention,
    InterventionOptions,
)
from circuit.reports.inputs import open_inputs
from circuit.reports.report import run_report
from circuit.runs.opening import open_run
from circuit.training.checkpoints import list_checkpoints

RANK = 16


def main() -> None:
    """Measure and print; the ratio comes last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="artifacts/runs/symbolic_kv_reference_formation")
    parser.add_argument("--stage", default="layer_2_post_mlp")
    parser.add_argument("--checkpoints", type=int, default=2)
    parser.add_argument("--sample", type=int, default=60)
    args = parser.parse_args()
    run = open_run(args.run)
    probes = run.path / "analysis" / "probe_set.jsonl"
    chosen = list(list_checkpoints(run.path / "checkpoints").values())[: args.checkpoints]
    options = InterventionOptions(
        probe_set=probes,
        checkpoints=tuple(chosen),
        stage=args.stage,
        subspace="embedding_value_identity",
        operation="remove",
        ranks=(RANK,),
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = run_report(GeometrySubspaceIntervention, run, options, Path(folder) / "report")
        seconds = time.perf_counter() - began
    reads = result.summary["reads"]
    one = naive_seconds(args.run, probes, chosen[-1], args.stage, args.sample)
    loop = one * reads * len(chosen)
    print(f"{args.stage}, {len(chosen)} checkpoints, {reads} reads, threads {run.config.threads}")
    print(f"whole report             {seconds:8.2f} s")
    print(f"one forward pass a read  {loop:8.2f} s ({1e3 * one:.1f} ms each)")
    print(f"ratio                    {loop / seconds:8.1f}")


@torch.no_grad()
def naive_seconds(folder: str, probes: Path, checkpoint: Path, stage: str, sample: int) -> float:
    """Seconds of one read by itself: hook, whole forward pass, logits at the prediction."""
    study = open_inputs(open_run(folder).config, probes)
    (point,) = study.models([checkpoint])
    batch = study.batch
    basis = subspace_basis(
        point.model, "embedding_value_identity", RANK, token_sets=study.task.token_sets
    )
    reads = batch.select(torch.arange(min(sample, len(batch))))
    began = time.perf_counter()
    for row, at in zip(reads.row, reads.at, strict=True):
        with patch(point.model, stage, (row.new_zeros(1), at[None]), partial(remove, basis=basis)):
            point.model(batch.tokens[row][None])[0, at].tolist()
    return (time.perf_counter() - began) / len(reads)


if __name__ == "__main__":
    main()
