"""What tracing costs: a traced step over a plain training step, and a random checkout.

    python benchmarks/trace.py [--steps N] [--threads N]

Alternates plain and traced steps of the reference recipe on its benchmark (made by `circuit
generate-benchmark --config configs/benchmark/symbolic_kv_base.json`), so that the ratio holds
when the speed of the machine drifts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from circuit.config import load_config
from circuit.environment import prepare_process
from circuit.tasks.benchmark import load_benchmark
from circuit.trace.record import RecordOptions, record_trace
from circuit.trace.replay import ReplayedRun
from circuit.trace.step import Tracer
from circuit.trace.writer import trace_row
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import encode_checkpoint
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup


def main() -> None:
    """Measure and print; the ratio comes last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    config = load_config("configs/train/symbolic_kv_formation.json", TrainConfig)
    config = config.replace(threads=prepare_process(threads=args.threads))
    benchmark = load_benchmark(config.benchmark_dir, splits=[config.train_split])
    plain = TrainingSession(Setup(config, benchmark=benchmark))
    tracer = Tracer(TrainingSession(Setup(config, benchmark=benchmark)))
    times: dict[str, list[float]] = {"plain": [], "traced": [], "anchor": []}
    for _ in range(args.steps):
        began = time.perf_counter()
        plain.advance()
        middle = time.perf_counter()
        trace_row(tracer.advance(), 40)
        times["plain"].append(middle - began)
        times["traced"].append(time.perf_counter() - middle)
    began = time.perf_counter()
    encode_checkpoint(tracer.train_state())
    anchor = time.perf_counter() - began
    plain_ms, traced_ms = (1e3 * statistics.median(times[name]) for name in ("plain", "traced"))
    ratios = [t / p for t, p in zip(times["traced"], times["plain"], strict=True)]
    print(f"threads {config.threads}, {args.steps} pairs of steps")
    print(f"plain step   {plain_ms:8.1f} ms")
    print(f"traced step  {traced_ms:8.1f} ms")
    print(f"anchor       {1e3 * anchor:8.1f} ms, every 50 steps: {1e3 * anchor / 50:.1f} ms a step")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        record_trace(config, path, RecordOptions(end_step=100))
        steps = random.Random(0).sample(range(1, 100), 3)
        for step in steps:
            began = time.perf_counter()
            ReplayedRun.open(path).state(step)
            print(f"checkout of step {step:>3}: {time.perf_counter() - began:.2f} s")
    ratio = statistics.median(ratios) + anchor / 50 / (plain_ms / 1e3)
    print(f"traced / plain = {ratio:.3f} (median over pairs, anchors included)")


if __name__ == "__main__":
    main()
