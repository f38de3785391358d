"""Loops of others: of a run of ours, copied; of nanoGPT's kind; of Hugging Face's Trainer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from own_loop import own_loop
from torch import Tensor, nn
from torch.nn import functional

import circuit
from circuit.runs.opening import open_run
from circuit.train_config import load_run_config


def test_a_copied_loop_gives_the_traces_terms_and_attribution(
    trained: Path, traced: Path, tmp_path: Path
) -> None:
    config = load_run_config(trained)
    source = inspect.getsource(own_loop)
    print(f"{len(source.splitlines()) - 2} lines")
    model = own_loop(config, tmp_path / "watched")
    ours, theirs = open_run(tmp_path / "watched", module=model), open_run(traced)
    for step, other in zip(ours.replay(0, 12), theirs.replay(0, 12), strict=True):
        assert torch.equal(step.before.parameters, other.before.parameters)
        assert torch.equal(step.after.parameters, other.after.parameters)
        assert torch.equal(step.gradient, other.clipped)
        assert list(step.update.named()) == list(other.update.named())
        for name, vector in other.update.named().items():
            assert torch.equal(step.update.named()[name], vector), name
        assert step.lr == other.lr

    def write(module: Any) -> Tensor:
        return module.W_O[1, 0].pow(2).sum()

    reads = open_run(trained).batch("validation_iid", range(6))
    from circuit.scalars.loss import LossScalar

    scalars = [write, LossScalar(reads)]
    mine = circuit.attribute(ours, scalars, 2, 12)
    trace = circuit.attribute(theirs, scalars, 2, 12)
    assert list(mine) == ["write", "loss.full_lm"]
    for name, series in trace.items():
        assert mine[name].summary()["path"] == series.summary()["path"]
        assert mine[name].summary()["groups"] == series.summary()["groups"]
        assert (mine[name].actual == series.actual).all()


class Block(nn.Module):
    """A block of nanoGPT's kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.ln_1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT's shape: `transformer.h.0...`, tied unembedding."""

    def __init__(self, vocabulary: int = 11, width: int = 8, length: int = 6) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(length, width),
                "h": nn.ModuleList([Block(width) for _ in range(2)]),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(len(tokens[0])))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(x)


def nanogpt(model: GPT, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Its loop: accumulation, clipping, GradScaler, cosine schedule set by hand."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        for _ in range(2):
            tokens = torch.randint(0, 11, (4, 7))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(tokens[:, :-1])
                loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


def test_a_loop_of_nanogpts_kind_and_its_parameter_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    with circuit.watch(model, optimizer, tmp_path):
        nanogpt(model, optimizer, 8)

    probe = torch.arange(6)[None]

    def loss(module: nn.Module) -> Tensor:
        return functional.cross_entropy(module(probe)[0, :-1], probe[0, 1:])

    run = circuit.open_run(tmp_path, module=model)
    series = circuit.attribute(run, [loss], 0, 8, partitions=("layer", "circuit"))["loss"]
    assert series.closure().path_absolute < 1e-2
    assert set(series.groups["layer"]) == {
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.0",
        "transformer.h.1",
    }
    assert "transformer.h.0.c_attn" in series.groups["circuit"]
    assert "transformer.h.1.mlp.0" in series.groups["circuit"]
    assert max(step.update.rounding_ulps() for step in run.replay(0, 8)) <= 8


def trainer(folder: Path) -> Any:
    """Hugging Face's Trainer on a tiny GPT-2, with accumulation, clipping and a schedule."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(3)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 8, "vocab_size": 11}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(0, 11, (24, 8))
    settings = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return Trainer(model, settings, train_dataset=[{"input_ids": t, "labels": t} for t in tokens])


@pytest.mark.filterwarnings("ignore")  # theirs
def test_hugging_faces_trainer(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "out")
    plain.train()
    ours = trainer(tmp_path / "out")
    with circuit.watch(ours.model, ours.create_optimizer(), tmp_path / "watched"):
        ours.train()
    expected = dict(plain.model.named_parameters())
    assert all(torch.equal(p, expected[n]) for n, p in ours.model.named_parameters())
    run = circuit.open_run(tmp_path / "watched", module=ours.model)
    last = run.state(6).parameters
    assert all(torch.equal(p, last[n]) for n, p in ours.model.named_parameters())
    steps = list(run.replay(0, 6))
    assert [step.lr for step in steps] == sorted([step.lr for step in steps], reverse=True)
    assert len(steps[0].taken.groups) == 2
    assert max(step.update.rounding_ulps() for step in steps) <= 8
