"""The terms of an update: the formulas of definitions.md section 4, and their sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from torch import Tensor

from circuit.artifacts import read_jsonl
from circuit.core.update import Hyper, OptimizerStep, UpdateTerms
from circuit.tasks.benchmark import Benchmark
from circuit.trace.record import RecordResult
from circuit.trace.step import TracedStep, Tracer
from circuit.train_config import TrainConfig
from circuit.training.optimizers import build_optimizer, learning_rate, update_rule
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

SessionAfter = Callable[..., TrainingSession]
MakeConfig = Callable[..., TrainConfig]

ADAMW = {"name": "adamw", "learning_rate": 0.01}
SGD = {"name": "sgd", "learning_rate": 0.1}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": ADAMW,
    "adamw with much decay": {**ADAMW, "weight_decay": 0.5, "beta2": 0.999},
    "adamw beta1=0": {**ADAMW, "beta1": 0.0},
    "sgd": SGD,
    "sgd with decay": {**SGD, "weight_decay": 0.3},
    "sgd momentum": {**SGD, "momentum": 0.9},
}
COLUMNS = {
    "adamw": ["weight_decay", "adam_current_gradient", "adam_historical_momentum", "rounding"],
    "sgd": ["weight_decay", "current_gradient", "historical_momentum", "rounding"],
}

EPS32, EPS64 = 2.0**-24, 2.0**-53
"""Largest relative error of one rounding."""

PARAMETER_ROUNDINGS, INNER_ROUNDINGS = 3, 6
"""Of the parameter itself: the factor 1 - lr wd, the decay, the addition. Within the terms: at most
2.2 roundings of their sizes were measured."""

WORST_ULPS = 8.0
"""Measured: at most 4.9 in the steps of these recipes. A parameter is at least half as large as its
update, so 3 roundings of the parameter and 2.2 of the update are at most 3 + 2 * 2.2 ulps, where
the terms do not cancel each other.
"""


def traced(session: TrainingSession, steps: int) -> Iterator[TracedStep]:
    tracer = Tracer(session)
    for _ in range(steps):
        yield tracer.advance()


def by_tensor(step: TracedStep, vector: Tensor) -> dict[str, Tensor]:
    return {name: part.double() for name, part in step.layout.unflatten(vector).items()}


def naive_terms(step: TracedStep, config: TrainConfig) -> dict[str, dict[str, Tensor]]:
    """The table of definitions.md section 4, tensor by tensor in float64, from t-1 and g alone."""
    optimizer = config.optimizer
    t, lr, clip = step.step, step.lr, config.gradient_clip
    g = by_tensor(step, step.gradient)
    theta = by_tensor(step, step.before.parameters)
    moments = {n: by_tensor(step, v) for n, v in step.before.moments.items()}
    norm = math.sqrt(math.fsum(float(x.pow(2).sum()) for x in g.values()))
    c = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
    terms: dict[str, dict[str, Tensor]] = {}
    for name in g:
        g_hat = c * g[name]
        decay = -lr * optimizer.weight_decay * theta[name]
        if optimizer.name == "adamw":
            b1, b2 = optimizer.beta1, optimizer.beta2
            v = b2 * moments["exp_avg_sq"][name] + (1 - b2) * g_hat**2
            D = v.sqrt() / math.sqrt(1 - b2**t) + optimizer.eps
            a = lr / (1 - b1**t)
            current = -a * (1 - b1) * g_hat / D
            history = -a * b1 * moments["exp_avg"][name] / D
        else:
            current = -lr * g_hat
            buffer = moments["momentum_buffer"][name] if optimizer.momentum else 0 * g_hat
            history = -lr * optimizer.momentum * buffer
        values = (decay, current, history, -lr * g[name], -lr * g_hat)
        columns = [*COLUMNS[optimizer.name][:3], "raw_sgd", "clipped_sgd"]
        for column, value in zip(columns, values, strict=True):
            terms.setdefault(column, {})[name] = value
    return terms


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_each_term_is_its_formula(
    session_after: SessionAfter, optimizer: dict[str, Any], clip: float | None
) -> None:
    schedule = {"name": "cosine", "warmup_steps": 2, "floor": 0.1}
    session = session_after(0, optimizer=optimizer, gradient_clip=clip, schedule=schedule)
    clipped_steps = 0
    for step in traced(session, 5):
        assert step.lr == learning_rate(session.config, step.step)
        clipped_steps += step.clip < 1
        found = {**step.update.named(), **step.update.references()}
        for column, tensors in naive_terms(step, session.config).items():
            for name, part in by_tensor(step, found[column]).items():
                # c and v_t of the program went through float32, those of the formula did not
                torch.testing.assert_close(
                    part, tensors[name], rtol=2e-6, atol=1e-15, msg=f"{column} of {name}"
                )
    assert (clipped_steps > 0) == (clip is not None)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_the_terms_sum_to_the_update(
    session_after: SessionAfter, optimizer: dict[str, Any], clip: float | None
) -> None:
    session = session_after(0, optimizer=optimizer, gradient_clip=clip)
    worst = 0.0
    for step in traced(session, 8):
        update = step.update
        exact = step.after.parameters.double() - step.before.parameters.double()
        assert torch.equal(update.total, exact)
        terms = update.named()
        assert list(terms) == COLUMNS[session.config.optimizer.name]
        assert list(update.references()) == ["raw_sgd", "clipped_sgd"]
        largest = sum(term.abs() for term in terms.values())
        missing = sum(terms.values()) - update.total
        assert (missing.abs() <= 4 * EPS64 * largest).all()
        assert_float32_explains(update, step.before.parameters, step.after.parameters)
        worst = max(worst, update.rounding_ulps())
    print(f"rounding residual: {worst:.2f} ulps")
    assert 0 < worst <= WORST_ULPS


def assert_float32_explains(update: UpdateTerms, before: Tensor, after: Tensor) -> None:
    inner = torch.stack([term.abs() for term in update.terms.values()]).sum(0)
    parameter = torch.maximum(before.abs(), after.abs()).double()
    roundings = PARAMETER_ROUNDINGS * parameter + INNER_ROUNDINGS * inner
    assert (update.rounding.abs() <= EPS32 * roundings).all()


def test_the_terms_of_special_recipes_vanish(session_after: SessionAfter) -> None:
    for optimizer in (OPTIMIZERS["adamw beta1=0"], SGD):
        for step in traced(session_after(0, optimizer=optimizer), 3):
            _, current, history = step.update.terms.values()
            assert not history.any()
            assert current.any()
    for step in traced(session_after(0, optimizer={**ADAMW, "weight_decay": 0.0}), 3):
        assert not step.update.terms["weight_decay"].any()
    for step in traced(session_after(0), 3):
        _, _, history = step.update.terms.values()
        assert history.any() == (step.step > 1)


def test_plain_sgd_without_clipping_is_its_own_reference(session_after: SessionAfter) -> None:
    session = session_after(0, optimizer=SGD, gradient_clip=None)
    for step in traced(session, 3):
        references = step.update.references()
        assert torch.equal(references["raw_sgd"], references["clipped_sgd"])
        assert torch.equal(references["raw_sgd"], step.update.terms["current_gradient"])
        assert torch.equal(step.gradient, step.clipped)


@laws(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 6),
    kind=st.sampled_from(["adamw", "sgd"]),
    lr=st.floats(1e-5, 0.5),
    history=st.sampled_from([0.0, 0.3, 0.9, 0.99]),
    beta2=st.sampled_from([0.9, 0.95, 0.999]),
    decay=st.sampled_from([0.0, 0.01, 0.7]),
    scale=st.floats(-6, 2),
)
def test_torchs_own_step_is_explained_whatever_the_settings(
    make_config: MakeConfig,
    seed: int,
    steps: int,
    kind: str,
    lr: float,
    history: float,
    beta2: float,
    decay: float,
    scale: float,
) -> None:
    """On random weights and gradients of any size, far from any model."""
    named = {"beta1": history, "beta2": beta2} if kind == "adamw" else {"momentum": history}
    optimizer = {"name": kind, "learning_rate": lr, "weight_decay": decay, **named}
    config = make_config(optimizer=optimizer, gradient_clip=None)
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.randn(40, generator=generator))
    torch_optimizer = build_optimizer(model, config.optimizer)
    names = {"adamw": ["exp_avg", "exp_avg_sq"], "sgd": ["momentum_buffer"] if history else []}
    moments = {name: torch.zeros(40) for name in names[kind]}
    for t in range(1, steps + 1):
        before, past = model.w.detach().clone(), moments
        g = torch.randn(40, generator=generator) * 10**scale
        model.w.grad = g.clone()
        torch_optimizer.step()
        moments = {n: torch_optimizer.state[model.w][n].clone() for n in names[kind]}
        update = update_rule(config.optimizer).terms(
            OptimizerStep(
                before=before,
                after=model.w.detach().clone(),
                gradient=g,
                clipped=g,
                moments_before=past,
                moments_after=moments,
                step=t,
                hyper=Hyper(lr, decay),
            )
        )
        assert_float32_explains(update, before, model.w.detach())


def test_rows_hold_the_norms_of_the_terms(
    workplace: Path,
    make_config: MakeConfig,
    tiny: Benchmark,
    recording: Callable[..., RecordResult],
) -> None:
    config = make_config(optimizer={**SGD, "momentum": 0.5}, gradient_clip=0.5)
    store = recording(config, end_step=4, top_k_parameters=3).store
    rows = read_jsonl(store.root / "optimizer_update_trace_rows.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    session = TrainingSession(Setup(config, benchmark=tiny))
    for row, step in zip(rows, traced(session, 4), strict=True):
        columns = {**step.update.named(), **step.update.references()}
        assert list(row["term_norms"]) == [*COLUMNS["sgd"], "raw_sgd", "clipped_sgd"]
        for name, vector in columns.items():
            exact = math.sqrt(math.fsum(x * x for x in vector.tolist()))
            assert row["term_norms"][name] == pytest.approx(exact, rel=1e-12)
        sizes = {n: float(p.norm()) for n, p in by_tensor(step, step.update.total).items()}
        weights = {n: float(p.norm()) for n, p in by_tensor(step, step.before.parameters).items()}
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        assert [entry["name"] for entry in row["top_parameters"]] == largest
        for entry in row["top_parameters"]:
            assert entry["update_norm"] == pytest.approx(sizes[entry["name"]], rel=1e-12)
            relative = sizes[entry["name"]] / weights[entry["name"]]
            assert entry["relative"] == pytest.approx(relative, rel=1e-12)
        assert row["batch_indices"] == session.recipe.indices(step.step).tolist()
        assert row["batch_shape"] == list(session.recipe.examples(step.step).tokens.shape)
        assert row["clip_factor"] == step.outcome.clip_factor < 1
        assert row["loss"] == float(step.outcome.loss)
        assert row["grad_norm"] == pytest.approx(float(step.gradient.double().norm()), rel=1e-6)
        targets = step.tokens[:, 1:]
        hits = [
            int(guess) == int(target)
            for guess, target in zip(
                step.outcome.outputs.argmax(-1).flatten(), targets.flatten(), strict=True
            )
            if int(target) != 0
        ]
        assert row["token_accuracy"] == pytest.approx(sum(hits) / len(hits), rel=1e-12)
