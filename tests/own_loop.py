"""The loop of a run of ours, as somebody else would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import circuit
from circuit.training.data_order import batch_indices
from circuit.training.setup import Setup


def own_loop(config: Any, folder: Path) -> nn.Module:
    """The loop of `circuit train`, as somebody would write it, watched."""
    setup = Setup(config)
    model, data = setup.initial_model(), setup.training_split()
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=False,
    )
    with circuit.watch(model, optimizer, folder, anchor_every=4):
        for step in range(1, config.steps + 1):
            batch = data.batch(
                batch_indices(config.seed, step, size=len(data), batch_size=config.batch_size)
            )
            optimizer.zero_grad()
            logits = model(batch.tokens[:, :-1])
            loss = functional.cross_entropy(
                logits.flatten(0, 1), batch.targets().flatten(), ignore_index=-100
            )
            loss.backward()
            if config.gradient_clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip, foreach=False)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(
                    1, step / max(1, config.schedule.warmup_steps)
                )
            optimizer.step()
    return model
