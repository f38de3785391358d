"""Milliseconds of one training step of the reference recipe, and its ratio to the matmul floor.

    python benchmarks/train_step.py [--threads N] [--compile] [--fused] [--steps N]

The floor is the time that the step's matrix products alone would take at the rate that this machine
reaches on products of the same shapes. Synthetic tokens of the benchmark's shape; no files needed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from circuit.config import AdamWConfig, TrainConfig, load_config
from circuit.environment import prepare_process
from circuit.model.build import build_model
from circuit.training.optimizers import build_optimizer
from circuit.training.step import next_token_loss

VOCABULARY, POSITIONS = 141, 56


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a call, after one call that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def floor_ms(config: TrainConfig) -> float:
    """Forward and backward matrix products of one step, each shape timed alone."""
    m = config.model
    rows = config.batch_size * (POSITIONS - 1)
    head = m.d_model // m.heads
    shapes = [(rows, m.d_model, m.d_model, 4 * m.layers), (rows, m.d_model, m.d_ff, m.layers)]
    shapes += [(rows, m.d_ff, m.d_model, m.layers), (rows, m.d_model, VOCABULARY, 1)]
    total = 0.0
    for n, inner, outer, count in shapes:
        x, w, g = torch.randn(n, inner), torch.randn(inner, outer), torch.randn(n, outer)
        for product in (lambda: x @ w, lambda: g @ w.T, lambda: x.T @ g):  # noqa: B023
            total += count * median_ms(product, 10)
    pairs = config.batch_size * m.heads
    p = POSITIONS - 1
    q, k, a = torch.randn(pairs, p, head), torch.randn(pairs, p, head), torch.randn(pairs, p, p)
    for product in (lambda: q @ k.mT, lambda: a @ k, lambda: a @ q, lambda: a.mT @ k):
        total += 1.5 * m.layers * median_ms(product, 10)  # six products of these four shapes
    return total


def main() -> None:
    """Measure and print; the ratio comes last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    config = load_config("configs/train/symbolic_kv_formation.json", TrainConfig)
    assert isinstance(config.optimizer, AdamWConfig)
    settings = config.optimizer.model_copy(update={"fused": args.fused})
    threads = prepare_process(threads=args.threads)
    model = build_model(config.model, vocabulary_size=VOCABULARY, seed=7)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    optimizer = build_optimizer(model, settings)
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, POSITIONS)
    tokens = torch.randint(5, VOCABULARY, shape, generator=generator)
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": [], "rest": []}

    def step() -> None:
        at = [time.perf_counter()]
        optimizer.zero_grad(set_to_none=True)
        loss = next_token_loss(forward(tokens[:, :-1]), tokens[:, 1:], 0)
        at.append(time.perf_counter())
        loss.backward()
        at.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        at.append(time.perf_counter())
        optimizer.step()
        at.append(time.perf_counter())
        for name, start in (("forward", 0), ("backward", 1), ("rest", 2), ("optimizer", 3)):
            parts[name].append(1e3 * (at[start + 1] - at[start]))

    whole = median_ms(step, args.steps)
    floor = floor_ms(config)
    print(f"threads {threads}, compile {args.compile}, fused {args.fused}")
    for name, times in parts.items():
        print(f"{name:>10} {statistics.median(times[1:]):8.1f} ms")
    print(f"{'step':>10} {whole:8.1f} ms")
    print(f"{'floor':>10} {floor:8.1f} ms  (its matrix products alone)")
    print(f"step / floor = {whole / floor:.2f}")


if __name__ == "__main__":
    main()
