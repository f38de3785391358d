"""ONE optimizer step, used by train, trace and replay alike.

A step is: forward on the batch without its last column, next-token loss, backward, clip, set the
learning rate, torch's optimizer. Everything that the step depends on is an argument; it keeps no
state of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens import HookedTransformer

from circuit.train_config import TrainConfig
from circuit.training.optimizers import learning_rate


@dataclass(frozen=True)
class StepOutcome:
    """What one step measured; tensors stay on the device until they are read."""

    step: int
    tokens: Int[Tensor, "batch pos"]
    """The batch."""
    loss: Tensor
    """Mean next-token loss in nats, before the update; scalar."""
    grad_norm: Tensor
    """Euclidean norm of the gradient before clipping; scalar."""
    lr: float
    clip: float | None
    """The clipping threshold of the config."""
    logits: Float[Tensor, "batch pos-1 vocab"]
    """Detached; position i predicts token i + 1."""

    @property
    def clip_factor(self) -> float:
        """`c = min(1, clip / (|g| + 1e-6))`, 1 without clipping."""
        if self.clip is None:
            return 1.0
        return min(1.0, float(self.clip / (self.grad_norm + 1e-6)))


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"],
    targets: Int[Tensor, "batch pos"],
    pad: int,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the targets that are not padding."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad)


def training_step(
    model: HookedTransformer,
    optimizer: torch.optim.Optimizer,
    tokens: Int[Tensor, "batch pos"],
    config: TrainConfig,
    step: int,
    *,
    pad: int = 0,
    on_gradient: Callable[[], None] | None = None,
) -> StepOutcome:
    """Take `theta_{step-1}` to `theta_step` in place.

    Args:
        tokens: the batch, padded on the right, on the model's device.
        step: counted from 1.
        on_gradient: called once the raw gradients stand in `.grad`, before clipping.
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.enable_grad():  # a notebook may have switched gradients off
        logits = model(tokens[:, :-1])
        loss = next_token_loss(logits, tokens[:, 1:], pad)
        loss.backward()
    if on_gradient is not None:
        on_gradient()
    threshold = float("inf") if config.gradient_clip is None else config.gradient_clip
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), threshold, foreach=False)
    lr = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return StepOutcome(
        step=step,
        tokens=tokens,
        loss=loss.detach(),
        grad_norm=grad_norm.detach(),
        lr=lr,
        clip=config.gradient_clip,
        logits=logits.detach(),
    )
