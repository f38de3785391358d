"""How well path rules close where gradients jump: steps of the grokking transformer on addition.

    python benchmarks/path_rules.py [--modulus P] [--rate LR] [--steps A:B] [--double]

Trains the grokking transformer (one layer, ReLU, no LayerNorm, no biases) on modular addition in
full batch with AdamW, and attributes the mean loss on the pairs held out over a window of steps by
every rule. Closure is `sum |predicted - actual| / sum |actual|` over the steps; nodes are what a
step took of forward and backward passes, and the largest number of nodes of a step.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit.attribution.attribute import Attributor, StepAttribution
from circuit.core.flat import ParameterLayout
from circuit.core.state import FlatState
from circuit.core.update import AdamWRule, Hyper, OptimizerStep, UpdateTerms
from circuit.model.build import build_model
from circuit.scalars.base import Cache, Needs
from circuit.train_config import ModelConfig

RULES = ("midpoint", "simpson", "gauss:3", "gauss:10", "midpoint:10", "midpoint:30")
RULES += ("auto:1e-2", "auto:1e-3")


@dataclass(frozen=True)
class Loss:
    """Mean loss at the last position (a `Scalar`)."""

    needs: Needs
    answers: Tensor
    name: str = "test_loss"
    constant: bool = True

    def bind(self, model: HookedTransformer) -> Loss:
        """The loss has no constants."""
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """One per pair."""
        logits = cache["unembed.hook_out"][:, -1]
        return torch.nn.functional.cross_entropy(logits, self.answers, reduction="none")


@dataclass(frozen=True)
class PlainStep:
    """A step without a trace (a `circuit.core.step.Step`)."""

    step: int
    lr: float
    clip: float
    before: FlatState
    after: FlatState
    update: UpdateTerms
    tokens: Tensor
    answers: Tensor


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modulus", type=int, default=31)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--steps", default="400:420")
    parser.add_argument("--double", action="store_true", help="scalars and gradients in float64")
    args = parser.parse_args()
    first, last = map(int, args.steps.split(":"))
    config = ModelConfig(
        layers=1,
        heads=4,
        d_model=128,
        d_ff=512,
        max_sequence_length=3,
        activation="relu",
        normalization="none",
        biases=False,
        tied_unembedding=False,
        initialization="transformer_lens",
    )
    model = build_model(config, vocabulary_size=args.modulus + 1, seed=0)
    tokens, answers = _pairs(args.modulus)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(order) * 3 // 10], order[len(order) * 3 // 10 :][:300]
    steps = list(_steps(model, tokens[train], answers[train], args.rate, first, last))
    scalar = Loss(
        Needs(tuple(map(tuple, tokens[test].tolist())), ("unembed.hook_out",)), answers[test]
    )
    dtype = torch.float64 if args.double else torch.float32
    model = model.to(dtype, print_details=False)
    for rule in RULES:
        _report(rule, [Attributor(model, [scalar], rule=rule).step(step) for step in steps])


def _pairs(modulus: int) -> tuple[Tensor, Tensor]:
    a, b = (x.flatten() for x in torch.meshgrid(*[torch.arange(modulus)] * 2, indexing="ij"))
    return torch.stack([a, b, torch.full_like(a, modulus)], 1), (a + b) % modulus


def _steps(
    model: HookedTransformer, tokens: Tensor, answers: Tensor, rate: float, first: int, last: int
) -> Iterator[PlainStep]:
    """The steps that take state `first` to state `last`."""
    layout, rule = ParameterLayout.of_model(model), AdamWRule(0.9, 0.98, 1e-8)
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=1.0
    )
    no_answers = torch.zeros_like(tokens, dtype=torch.bool)
    for step in range(1, last + 1):
        before = _state(step - 1, model, optimizer, layout) if step > first else None
        optimizer.zero_grad()
        logits = model(tokens)[:, -1].double()
        loss = torch.nn.functional.cross_entropy(logits, answers)
        loss.backward()
        optimizer.step()
        if before is None:
            continue
        after = _state(step, model, optimizer, layout)
        gradient = layout.flatten({n: p.grad for n, p in model.named_parameters()})
        update = rule.terms(
            OptimizerStep(
                before=before.parameters,
                after=after.parameters,
                gradient=gradient,
                clipped=gradient,
                moments_before=before.moments,
                moments_after=after.moments,
                step=step,
                hyper=Hyper(rate, 1.0),
            )
        )
        yield PlainStep(step, rate, 1.0, before, after, update, tokens, no_answers)


def _state(
    step: int, model: HookedTransformer, optimizer: torch.optim.Optimizer, layout: ParameterLayout
) -> FlatState:
    named = dict(model.named_parameters())
    moments = {
        key: layout.flatten(
            {name: optimizer.state[p].get(key, torch.zeros_like(p)) for name, p in named.items()}
        )
        for key in ("exp_avg", "exp_avg_sq")
    }
    return FlatState(step, layout.flatten(named), moments)


def _report(rule: str, steps: list[StepAttribution]) -> None:
    actual = np.array([float(step.actual) for step in steps])
    off = np.array([float(step.path.sum()) for step in steps]) - actual
    first = np.array([float(step.first_order.sum()) for step in steps]) - actual
    nodes = [step.nodes[0] for step in steps]
    ends = [(step.agrees, step.rounded) for step in steps]
    missed = sum(not (a[0] or r[0]) for a, r in ends if a is not None and r is not None)
    scale = math.fsum(abs(actual))
    print(
        f"{rule:12} closure {math.fsum(abs(off)) / scale:.1e} (first order"
        f" {math.fsum(abs(first)) / scale:.1e}), worst step {max(abs(off / actual)):.1e},"
        f" nodes {np.mean(nodes):.1f}, at most {max(nodes)}, {missed} steps without agreement",
        flush=True,
    )


if __name__ == "__main__":
    main()
