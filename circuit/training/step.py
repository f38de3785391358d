"""ONE optimizer step, used by train, trace and replay alike.

A step is: forward on the batch, loss, backward, clip, set the learning rate, torch's optimizer.
Everything that the step depends on is an argument; it keeps no state of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from circuit.core.flat import Flat
from circuit.tasks.examples import UNPREDICTED
from circuit.training.recipe import Batch, Recipe

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from circuit.core.graphs import Graphs


@dataclass(frozen=True)
class StepOutcome:
    """What one step measured; tensors stay on the device until they are read."""

    step: int
    recipe: Recipe
    """What the step executed."""
    batch: Batch
    loss: Tensor
    """What was differentiated, before the update; scalar (of a task: mean loss in nats)."""
    grad_norm: Tensor
    """Euclidean norm of the gradient before clipping; scalar."""
    lr: float
    """Of the optimizer's first group."""
    led: Flat | None
    """Where the optimizer alone would have led, if the weights went elsewhere."""
    outputs: Tensor
    """What the loss was computed from (of a task: logits), detached."""

    @property
    def clip_factor(self) -> float:
        """`c = min(1, clip / (|g| + 1e-6))`, 1 without clipping."""
        if self.recipe.clip is None:
            return 1.0
        return min(1.0, float(self.recipe.clip / (self.grad_norm + 1e-6)))

    @property
    def accuracy(self) -> float | None:
        """Share of the batch's targets that the outputs hit."""
        return self.recipe.accuracy(self.outputs, self.batch)


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"],
    targets: Int[Tensor, "batch pos"],
    unpredicted: int = UNPREDICTED,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the targets but those that are not to be predicted."""
    rows = logits.flatten(0, 1)
    return functional.cross_entropy(rows, targets.flatten(), ignore_index=unpredicted)


def weighted_losses(
    recipe: Recipe, outputs: Tensor, batch: Batch
) -> Float[Tensor, example * where]:
    """The share of each example in the loss, times its weight."""
    losses = recipe.losses(outputs, batch)
    if batch.weights is None:
        return losses
    weights = batch.weights.to(losses.device, losses.dtype)
    if weights.ndim == 1:
        return losses * weights.view(-1, *[1] * (losses.ndim - 1))
    # the last column stands for all positions from there on
    columns = torch.arange(losses.shape[1], device=losses.device).clamp(max=weights.shape[1] - 1)
    return losses * weights[:, columns]


def training_step(
    recipe: Recipe,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    on_gradient: Callable[[], None] | None = None,
    graphs: Graphs | None = None,
) -> StepOutcome:
    """Take `theta_{step-1}` to `theta_step` in place.

    Args:
        recipe: gives batch, loss, clipping, rates and what takes the weights on.
        step: counted from 1.
        on_gradient: called once the raw gradients stand in `.grad`, before clipping.
        graphs: hold that of the gradient.
    """
    recipe = recipe.at(step)
    batch = recipe.batch(step)

    def taken(model: Any) -> tuple[Tensor, Tensor]:
        outputs = recipe.outputs(model, batch)
        return outputs, weighted_losses(recipe, outputs, batch)

    module.zero_grad(set_to_none=True)  # also what the optimizer does not move: it would add up
    with torch.enable_grad():  # a notebook may have switched gradients off
        held = None if graphs is None else graphs.outputs(step, module, taken)
        outputs = recipe.outputs(module, batch) if held is None else held
        if batch.weights is None:
            loss = recipe.loss(outputs, batch)
        else:
            loss = weighted_losses(recipe, outputs, batch).sum()
        if held is None:
            loss.backward()
    if on_gradient is not None:
        on_gradient()
    threshold = float("inf") if recipe.clip is None else recipe.clip
    grad_norm = torch.nn.utils.clip_grad_norm_(module.parameters(), threshold, foreach=False)
    for setting, values in (("lr", recipe.rates(step)), ("weight_decay", recipe.decays(step))):
        if values is not None:
            for group, value in zip(optimizer.param_groups, values, strict=True):
                group[setting] = value
    led = recipe.update(module, optimizer, step)
    return StepOutcome(
        step=step,
        recipe=recipe,
        batch=batch,
        loss=loss.detach(),
        grad_norm=grad_norm.detach(),
        lr=float(optimizer.param_groups[0]["lr"]),
        led=led,
        outputs=outputs.detach(),
    )
