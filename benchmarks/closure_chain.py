"""How long the closure chain takes: answer scalars, 14 routes, closure by scalar.

    python benchmarks/closure_chain.py [--run FOLDER] [--threads N]

Types the three commands over 5 checkpoints of a trained run and 128 pairs (64 of two types), both
sides, as separate processes, so that starting the program counts too.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEADS = [(1, head) for head in range(2)] + [(2, head) for head in range(2)]
SPECS = [
    "label=embed_key,stage=embedding,subspace=embedding_key_identity,rank=7,position_role=query_key",
    "label=embed_value,stage=embedding,subspace=embedding_value_identity,rank=64,"
    "position_role=support_value",
    *(
        f"label=L{layer}H{head}_query,stage=layer_{layer - 1}_post_mlp,subspace=head_qk_query,"
        f"rank=8,head_layer={layer},head={head},position_role=prediction"
        for layer, head in HEADS
    ),
    *(
        f"label=L{layer}H1_ov_input,stage=layer_{layer - 1}_post_mlp,subspace=head_ov_input,"
        f"rank=16,head_layer={layer},head=1,position_role=support_value"
        for layer in (1, 2)
    ),
    *(
        f"label=L{layer}H1_ov_output,stage=layer_{layer}_post_attn,subspace=head_ov_output,"
        f"rank=16,head_layer={layer},head=1,position_role=prediction"
        for layer in (1, 2)
    ),
    *(
        f"label=L{layer}_{role},stage=layer_{layer}_post_mlp,position_role={role}"
        for layer in (0, 1)
        for role in ("support_value", "prediction")
    ),
]


def main() -> None:
    """Time the commands; their sum comes last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, default="artifacts/runs/symbolic_kv_reference_formation"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    assert len(SPECS) == 14
    selection = [
        *("--config", f"{args.run}/run_config.json", "--threads", str(args.threads)),
        *("--probe-set", f"{args.run}/analysis/probe_set.jsonl"),
        *(
            f"--checkpoint={args.run}/checkpoints/step_{step:06d}.pt"
            for step in range(1500, 2501, 250)
        ),
        *("--pair-type", "support_value", "--pair-type", "query_key"),
        *("--max-pairs-per-type", "64"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        scalars, routes, closure = (f"{folder}/{name}" for name in ("scalars", "routes", "closure"))
        commands = [
            ["answer-scalar-residual-diagnosis", *selection, "--output-dir", scalars],
            [
                *("route-to-margin-closure", *selection, "--output-dir", routes),
                *(f"--route={spec}" for spec in SPECS),
            ],
            [
                *("route-to-scalar-closure", "--output-dir", closure),
                *("--route-closure-rows", f"{routes}/route_to_margin_closure_rows.jsonl"),
                "--scalar-pair-rows",
                f"{scalars}/answer_scalar_residual_diagnosis_pair_rows.jsonl",
            ],
        ]
        total = busy = 0.0
        for command in commands:
            began, before = time.perf_counter(), cpu_seconds()
            subprocess.run(
                [sys.executable, "-m", "circuit.cli", *command],
                check=True,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"CIRCUIT_DEVICE": "cpu"},
            )
            seconds = time.perf_counter() - began
            used = cpu_seconds() - before
            total, busy = total + seconds, busy + used
            print(f"{command[0]:34} {seconds:6.1f} s, {used:6.1f} s of processor time")
    load = os.getloadavg()[0]
    print(f"load average at the end {load:.1f} (other work on the machine makes it slower)")
    print(f"the chain, threads {args.threads}: {total:.1f} s, {busy:.1f} s of processor time")


def cpu_seconds() -> float:
    """Processor time of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
