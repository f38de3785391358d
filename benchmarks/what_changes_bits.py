"""What changes the bits of training on this machine, and at which stage it begins.

    python benchmarks/what_changes_bits.py [--steps N]

Trains the reference model for a few steps on synthetic tokens, once as it is and once per change,
and prints the first stage of the first step whose digest differs, as in docs/exactness.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from circuit.config import load_config
from circuit.core.digests import tensor_digest
from circuit.environment import prepare_process
from circuit.model.build import build_model
from circuit.train_config import AdamWConfig, Kernels, TrainConfig
from circuit.training.optimizers import build_optimizer, read_moments
from circuit.training.step import training_step

VOCABULARY, POSITIONS = 141, 56
Stages = list[tuple[int, str, str]]


class Through(torch.nn.Module):
    """A model whose forward pass is another function."""

    def __init__(self, model: torch.nn.Module, function: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.function(tokens)


def train(
    steps: int,
    *,
    threads: int = 1,
    kernels: Kernels = "fast",
    fused: bool = False,
    forward: Callable[[Any], Callable[[torch.Tensor], torch.Tensor]] = lambda model: model,
) -> Stages:
    """Digests by step and stage."""
    config = load_config("configs/train/symbolic_kv_formation.json", TrainConfig)
    assert isinstance(config.optimizer, AdamWConfig)
    prepare_process(threads=threads)
    model = build_model(config.model, vocabulary_size=VOCABULARY, seed=7, kernels=kernels)
    run: Any = Through(model, forward(model))
    optimizer = build_optimizer(model, config.optimizer)
    for group in optimizer.param_groups:
        group["fused"] = fused
    found: Stages = []
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(5, VOCABULARY, (config.batch_size, POSITIONS), generator=generator)
        gradient: list[str] = []

        def keep(into: list[str] = gradient) -> None:
            into.append(tensor_digest(torch.cat([p.grad.flatten() for p in model.parameters()])))

        outcome = training_step(run, optimizer, batch, batch[:, 1:], config, step, on_gradient=keep)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        moments = read_moments(model, optimizer, config.optimizer)
        found += [
            (step, "logits", tensor_digest(outcome.logits)),
            (step, "loss", tensor_digest(outcome.loss)),
            (step, "gradient", gradient[0]),
            (step, "parameters", tensor_digest(weights)),
            (step, "m, v", str([tensor_digest(t) for g in moments.values() for t in g.values()])),
        ]
    return found


def compiled(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model through torch.compile."""
    return cast(Any, torch.compile(model, dynamic=False))


def halves(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward pass in two half batches."""
    return lambda t: torch.cat([model(t[: len(t) // 2]), model(t[len(t) // 2 :])])


def with_setting(apply: Callable[[], object], undo: Callable[[], object], steps: int) -> Stages:
    """Train under a global setting, then take it back."""
    apply()
    try:
        return train(steps)
    finally:
        undo()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    steps = parser.parse_args().steps
    base = train(steps)
    precision = torch.set_float32_matmul_precision
    onednn = torch.backends.mkldnn.flags
    changes: dict[str, Callable[[], Stages]] = {
        "run again": lambda: train(steps),
        "2 threads instead of 1": lambda: train(steps, threads=2),
        "plain kernels": lambda: train(steps, kernels="plain"),
        "plain kernels, compiled": lambda: train(steps, kernels="plain", forward=compiled),
        "AdamW fused": lambda: train(steps, fused=True),
        "rows of the batch reversed": lambda: train(
            steps, forward=lambda model: lambda t: model(t.flip(0)).flip(0)
        ),
        "two half batches": lambda: train(steps, forward=halves),
        "one more column of padding": lambda: train(
            steps,
            forward=lambda model: lambda t: model(torch.cat([t, t[:, :1] * 0], 1))[:, :-1],
        ),
        "matmul precision 'high'": lambda: with_setting(
            lambda: precision("high"), lambda: precision("highest"), steps
        ),
        "matmul precision 'medium'": lambda: with_setting(
            lambda: precision("medium"), lambda: precision("highest"), steps
        ),
        "flush denormal numbers": lambda: with_setting(
            lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False), steps
        ),
    }
    table = Table(box=None)
    for column in ("change", "bits", "first stage that differs"):
        table.add_column(column)
    for name, run in changes.items():
        table.add_row(name, *verdict(base, run()))
    with onednn(enabled=False):
        table.add_row("oneDNN off", *verdict(base, train(steps)))
    Console().print(table)


def verdict(base: Stages, other: Stages) -> tuple[str, str]:
    """Equal or not, and where it begins."""
    for ours, theirs in zip(base, other, strict=True):
        if ours != theirs:
            return "differ", f"{ours[1]} (step {ours[0]})"
    return "equal", ""


if __name__ == "__main__":
    main()
