"""Lightning's loop: its automatic optimization steps through a closure, and accumulates."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

import circuit
from circuit.core.digests import tensors_digest

FRESH = """
import json, sys
import circuit
from circuit.core.digests import tensors_digest
run = circuit.open_run(sys.argv[1])
print(json.dumps([tensors_digest(run.state(s).parameters) for s in json.loads(sys.argv[2])]))
"""
STEPS = 120


class Sums(lightning.LightningModule):
    """Two parameter groups, a schedule, dropout."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(16, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 7)]
        self.net = nn.Sequential(nn.Embedding(7, 8), nn.Flatten(), *hidden)
        self.seen: list[str] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == len(self.seen) + 1:
            self.seen.append(tensors_digest(dict(self.named_parameters())))

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def parts() -> tuple[Sums, Any, lightning.Trainer]:
    """Module, data and trainer, as somebody has them."""
    lightning.seed_everything(3, verbose=False)
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    data = torch.utils.data.TensorDataset(pairs, pairs.sum(1) % 7)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Sums()
    return module, torch.utils.data.DataLoader(data, batch_size=16, shuffle=True), trainer


@pytest.mark.filterwarnings("ignore")  # theirs
def test_a_lightning_fit_is_recorded_and_stays_as_it_is(tmp_path: Path) -> None:
    plain, data, trainer = parts()
    trainer.fit(plain, data)

    module, data, trainer = parts()
    with ExitStack() as stack:  # these lines change
        watched = lambda: circuit.watch(module, trainer.optimizers, tmp_path)  # noqa: E731
        module.on_fit_start = lambda: stack.enter_context(watched())
        trainer.fit(module, data)

    assert module.seen == plain.seen
    assert len(module.seen) == STEPS
    run = circuit.open_run(tmp_path)
    assert run.steps == list(range(STEPS + 1))
    steps = sorted(random.Random(0).sample(range(1, STEPS + 1), 100))
    words = [sys.executable, "-c", FRESH, str(tmp_path), json.dumps(steps)]
    again = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    equal = sum(module.seen[step - 1] == digest for step, digest in zip(steps, again, strict=True))
    print(f"{equal} of {len(steps)} random steps equal in a fresh process, 0 bits differ")
    assert equal == len(steps)
    assert max(step.update.rounding_ulps() for step in run.replay(0, 20)) <= 8
