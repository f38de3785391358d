"""What changes the bits of training on this machine, and at which stage it begins.

    python benchmarks/what_changes_bits.py [--steps N]

Trains the reference model for a few steps on synthetic tokens, once as it is and once per change,
and prints the first stage of the first step whose digest differs, as in docs/exactness.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from circuit.config import load_config
from circuit.core.digests import tensor_digest
from circuit.environment import prepare_process
from circuit.model.build import build_model
from circuit.train_config import Kernels, TrainConfig
from circuit.training.optimizers import build_optimizer, learning_rate, read_moments
from circuit.training.recipe import Batch, Recipe
from circuit.training.step import next_token_loss, training_step

VOCABULARY, POSITIONS = 141, 56
Stages = list[tuple[int, str, str]]
Forward = Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]
"""Of a model, the function that stands in for its forward pass."""


class Synthetic(Recipe):
    """The reference recipe on synthetic tokens, through another forward pass or optimizer."""

    def __init__(self, kernels: Kernels, fused: bool, forward: Forward) -> None:
        self.config = load_config("configs/train/symbolic_kv_formation.json", TrainConfig)
        self.kernels, self.fused, self.forward = kernels, fused, forward
        self.clip = self.config.gradient_clip

    def module(self) -> torch.nn.Module:
        return build_model(
            self.config.model, vocabulary_size=VOCABULARY, seed=7, kernels=self.kernels
        )

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        size = (self.config.batch_size, POSITIONS)
        tokens = torch.randint(5, VOCABULARY, size, generator=generator)
        return Batch(tokens[:, :-1], tokens[:, 1:], np.arange(len(tokens)))

    def outputs(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return self.forward(module)(batch.inputs)

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return next_token_loss(outputs, batch.targets)

    def optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = build_optimizer(module, self.config.optimizer)
        for group in optimizer.param_groups:
            group["fused"] = self.fused
        return optimizer

    def rates(self, step: int) -> list[float]:
        return [learning_rate(self.config, step)]


def train(
    steps: int,
    *,
    threads: int = 1,
    kernels: Kernels = "fast",
    fused: bool = False,
    forward: Forward = lambda model: model,
) -> Stages:
    """Digests by step and stage."""
    prepare_process(threads=threads)
    recipe = Synthetic(kernels, fused, forward)
    model = recipe.module()
    optimizer = recipe.optimizer(model)
    found: Stages = []
    for step in range(1, steps + 1):
        gradient: list[str] = []

        def keep(into: list[str] = gradient) -> None:
            into.append(tensor_digest(torch.cat([p.grad.flatten() for p in model.parameters()])))

        outcome = training_step(recipe, model, optimizer, step, on_gradient=keep)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        moments = read_moments(model, optimizer, recipe.config.optimizer)
        found += [
            (step, "logits", tensor_digest(outcome.outputs)),
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
