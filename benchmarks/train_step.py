"""One training step of the reference recipe: plain kernels, fast kernels and its matrix products.

    python benchmarks/train_step.py [--threads N] [--rounds N] [--compiled]

The floor is the time of the step's matrix products alone, each shape by itself. Plain step, fast
step and floor are timed in turn, A B C A B C ..., and the ratios are medians over the rounds, so
that a machine whose speed drifts moves all three alike. `--compiled` adds the plain step through
torch.compile. Synthetic tokens of the benchmark's shape; no files needed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from circuit.config import load_config
from circuit.environment import prepare_process
from circuit.model.build import build_model
from circuit.train_config import Kernels, TrainConfig
from circuit.training.optimizers import build_optimizer
from circuit.training.step import next_token_loss

VOCABULARY, POSITIONS = 141, 56
PARTS = ("forward", "backward", "clip", "optimizer")
Times = list[float]
"""Milliseconds of the parts of a step; of the floor, its sum alone."""


def step_of(
    config: TrainConfig, kernels: Kernels, *, compiled: bool = False
) -> Callable[[], Times]:
    """A training step on a fixed batch, which tells its times by part."""
    model = build_model(config.model, vocabulary_size=VOCABULARY, seed=7, kernels=kernels)
    forward: Any = torch.compile(model, dynamic=False) if compiled else model
    optimizer = build_optimizer(model, config.optimizer)
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, POSITIONS)
    tokens = torch.randint(5, VOCABULARY, shape, generator=generator)

    def step() -> Times:
        optimizer.zero_grad(set_to_none=True)
        at = [time.perf_counter()]
        loss = next_token_loss(forward(tokens[:, :-1]), tokens[:, 1:])
        at.append(time.perf_counter())
        loss.backward()
        at.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        at.append(time.perf_counter())
        optimizer.step()
        at.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(at)]

    return step


def floor_of(config: TrainConfig) -> Callable[[], Times]:
    """The forward and backward matrix products of one step, each shape timed alone."""
    m = config.model
    rows, head = config.batch_size * (POSITIONS - 1), m.d_model // m.heads
    products: list[tuple[float, Callable[[], torch.Tensor]]] = []
    shapes = [(m.d_model, m.d_model, 4 * m.layers), (m.d_model, m.d_ff, m.layers)]
    shapes += [(m.d_ff, m.d_model, m.layers), (m.d_model, VOCABULARY, 1)]
    for inner, outer, count in shapes:
        x, w, g = torch.randn(rows, inner), torch.randn(inner, outer), torch.randn(rows, outer)
        products += [
            (count, lambda x=x, w=w: x @ w),
            (count, lambda w=w, g=g: g @ w.T),
            (count, lambda x=x, g=g: x.T @ g),
        ]
    pairs, p = config.batch_size * m.heads, POSITIONS - 1
    q, k, a = torch.randn(pairs, p, head), torch.randn(pairs, p, head), torch.randn(pairs, p, p)
    for product in (lambda: q @ k.mT, lambda: a @ k, lambda: a @ q, lambda: a.mT @ k):
        products.append((1.5 * m.layers, product))  # six products of these four shapes

    def floor() -> Times:
        total = 0.0
        for count, product in products:
            product()  # its operands are in the cache, as they are after the step's previous part
            began = time.perf_counter()
            product()
            total += count * 1e3 * (time.perf_counter() - began)
        return [total]

    return floor


def main() -> None:
    """Measure and print; the ratios come last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    config = load_config("configs/train/symbolic_kv_formation.json", TrainConfig)
    threads = prepare_process(threads=args.threads)
    timed = {"plain": step_of(config, "plain"), "fast": step_of(config, "fast")}
    if args.compiled:
        timed["compiled"] = step_of(config, "plain", compiled=True)
    timed["floor"] = floor_of(config)
    for run in timed.values():
        run()
    rounds = [{name: run() for name, run in timed.items()} for _ in range(args.rounds)]
    print(f"{torch.backends.cpu.get_cpu_capability()}, threads {threads}, {args.rounds} rounds")
    print(f"{'ms':>10}" + "".join(f"{part:>11}" for part in (*PARTS, "step", "/ floor")))
    for name in timed:
        parts = [
            statistics.median(column) for column in zip(*(r[name] for r in rounds), strict=True)
        ]
        whole = statistics.median(sum(r[name]) for r in rounds)
        ratio = statistics.median(sum(r[name]) / sum(r["floor"]) for r in rounds)
        shown = [f"{ms:11.1f}" for ms in parts] if len(parts) > 1 else [f"{'-':>11}"] * len(PARTS)
        print(f"{name:>10}" + "".join(shown) + f"{whole:11.1f}{ratio:11.2f}")
    for name in timed.keys() - {"fast", "floor"}:
        gain = statistics.median(sum(r[name]) / sum(r["fast"]) for r in rounds)
        print(f"{name} / fast = {gain:.2f}")


if __name__ == "__main__":
    main()
