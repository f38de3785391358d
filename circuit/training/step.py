"""ONE optimizer step, used by train, trace and replay alike.

A step is: forward on the batch without its last column, loss of the task's targets, backward, clip,
set the learning rate, torch's optimizer. Everything that the step depends on is an argument; it
keeps no state of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens import HookedTransformer

from circuit.tasks.examples import UNPREDICTED
from circuit.train_config import TrainConfig
from circuit.training.optimizers import learning_rate


@dataclass(frozen=True)
class StepOutcome:
    """What one step measured; tensors stay on the device until they are read."""

    step: int
    tokens: Int[Tensor, "batch pos"]
    """The batch."""
    targets: Int[Tensor, "batch pos-1"]
    """What is predicted behind each token but the last; `UNPREDICTED` where nothing is."""
    loss: Tensor
    """Mean loss in nats of the targets, before the update; scalar."""
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
    unpredicted: int = UNPREDICTED,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the targets but those that are not to be predicted."""
    rows = logits.flatten(0, 1)
    return functional.cross_entropy(rows, targets.flatten(), ignore_index=unpredicted)


def training_step(
    model: HookedTransformer,
    optimizer: torch.optim.Optimizer,
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch pos-1"],
    config: TrainConfig,
    step: int,
    *,
    loss_dtype: Literal["float32", "float64"] = "float32",
    on_gradient: Callable[[], None] | None = None,
) -> StepOutcome:
    """Take `theta_{step-1}` to `theta_step` in place.

    Args:
        tokens: the batch, padded on the right, on the model's device.
        targets: what is predicted behind each token but the last (`Examples.targets`).
        step: counted from 1.
        loss_dtype: of the logits in the loss; `float64` keeps gradients alive where a small
            loss would round to 0.
        on_gradient: called once the raw gradients stand in `.grad`, before clipping.
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.enable_grad():  # a notebook may have switched gradients off
        logits = model(tokens[:, :-1])
        exact = logits.double() if loss_dtype == "float64" else logits
        loss = next_token_loss(exact, targets)
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
        targets=targets,
        loss=loss.detach(),
        grad_norm=grad_norm.detach(),
        lr=lr,
        clip=config.gradient_clip,
        logits=logits.detach(),
    )
