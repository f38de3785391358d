"""One update = weight decay + current gradient + history (+ rounding).

The update itself is torch's own optimizer; the decomposition is ours, in float64, from the float32
tensors that the optimizer read and wrote (definitions.md section 4). `rounding` is what is left:
the real update minus the three terms, so the four sum to the update by construction, and its size
says how well the three do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuit.config import AdamWConfig, TrainConfig
from circuit.core.flat import Flat
from circuit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TERMS = {
    "adamw": ("weight_decay", "adam_current_gradient", "adam_historical_momentum"),
    "sgd": ("weight_decay", "current_gradient", "historical_momentum"),
}
"""Column names of the three terms of an update, by optimizer."""

REFERENCES = ("raw_sgd", "clipped_sgd")
"""Columns that are not in the sum: what plain SGD would have done."""


@dataclass(frozen=True)
class UpdateTerms:
    """One update and its terms; float64 vectors of `[parameter]`."""

    total: Flat
    """`theta_t - theta_{t-1}`, exact in float64."""
    weight_decay: Flat
    current: Flat
    history: Flat
    rounding: Flat
    """`total` minus the three terms."""
    raw_sgd: Flat
    clipped_sgd: Flat
    optimizer: str
    largest: Flat
    """The largest magnitude that entered each sum, float32, to which `rounding` is held."""

    def named(self) -> dict[str, Flat]:
        """The three terms under their column names, then `rounding`; they sum to `total`."""
        terms = (self.weight_decay, self.current, self.history)
        return dict(zip(TERMS[self.optimizer], terms, strict=True)) | {"rounding": self.rounding}

    def references(self) -> dict[str, Flat]:
        """The vectors that are not in the sum, under their column names."""
        return {"raw_sgd": self.raw_sgd, "clipped_sgd": self.clipped_sgd}

    def rounding_ulps(self) -> float:
        """The largest residual, in units in the last place of the largest number in its sum.

        That is the largest of the old parameter, the new one, the current-gradient term and the
        history term: where the last two cancel, their rounding outlives their sum.
        """
        spacing = torch.nextafter(self.largest, torch.tensor(torch.inf)) - self.largest
        return float((self.rounding.abs() / spacing.double()).max())


def decompose(
    config: TrainConfig,
    *,
    step: int,
    lr: float,
    before: Flat,
    after: Flat,
    gradient: Flat,
    clipped: Flat,
    moments_before: Mapping[str, Flat],
    moments_after: Mapping[str, Flat],
) -> UpdateTerms:
    """Split one update into its terms.

    Args:
        step: `t`, counted from 1.
        lr: `lr_t`.
        before, after: `theta_{t-1}` and `theta_t`.
        gradient, clipped: `g` and `c g`.
        moments_before, moments_after: the optimizer's moments at `t-1` and `t`.
    """
    optimizer = config.optimizer
    old, g_hat = before.double(), clipped.double()
    total = after.double() - old
    decay = old.mul(-lr * optimizer.weight_decay)
    if isinstance(optimizer, AdamWConfig):
        b1, b2 = optimizer.beta1, optimizer.beta2
        scale = lr / (1 - b1**step)
        denominator = moments_after["exp_avg_sq"].double().sqrt_()
        denominator.div_(math.sqrt(1 - b2**step)).add_(optimizer.eps)
        current = (g_hat * (-scale * (1 - b1))).div_(denominator)
        history = moments_before["exp_avg"].double().mul_(-scale * b1).div_(denominator)
    else:
        current = g_hat * -lr
        history = (
            moments_before["momentum_buffer"].double().mul_(-lr * optimizer.momentum)
            if optimizer.momentum
            else torch.zeros_like(old)
        )
    return UpdateTerms(
        total=total,
        weight_decay=decay,
        current=current,
        history=history,
        rounding=(total - decay).sub_(current).sub_(history),
        raw_sgd=gradient.double() * -lr,
        clipped_sgd=g_hat * -lr,
        optimizer=optimizer.name,
        largest=_largest(before, after, current.float(), history.float()),
    )


def _largest(*vectors: Tensor) -> Tensor:
    return torch.stack([vector.abs() for vector in vectors]).amax(0)


def norm(vector: Tensor) -> float:
    """Euclidean norm in float64."""
    return float(vector.double().norm())
