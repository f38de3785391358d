"""One update = weight decay + current gradient + history (+ rounding).

The update itself is an optimizer's; the decomposition is ours, in float64, from the tensors that
the optimizer read and wrote (definitions.md section 4). `rounding` is what is left: the real update
minus the three terms, so the four sum to the update by construction, and its size says how well
the three do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias

from circuit.core.flat import Flat
from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

TermNames: TypeAlias = tuple[str, str, str]
"""Column names of the decay, of the current gradient and of the history."""


@dataclass(frozen=True)
class Hyper:
    """What a step sets for each parameter.

    Each is one number for all parameters, or a float64 vector `[parameter]` of the flat layout,
    which holds the number of each parameter's group.

    Attributes:
        rate: `lr_t`.
        decay: weight decay `wd`.

    Raises:
        CircuitError: a tensor is not a vector of float64.
    """

    rate: float | Flat
    decay: float | Flat

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("decay", self.decay)):
            if isinstance(value, float | int):
                continue
            if value.dtype != torch.float64 or value.ndim != 1:
                raise CircuitError(
                    f"{name} is {value.dtype} {list(value.shape)}",
                    expected="a number, or a float64 vector with an entry for each parameter",
                )


@dataclass(frozen=True)
class UpdateTerms:
    """One update and its terms; float64 vectors of `[parameter]`."""

    names: TermNames
    """Of the three terms."""
    total: Flat
    """`theta_t - theta_{t-1}`, of float32 parameters exact in float64."""
    weight_decay: Flat
    current: Flat
    history: Flat
    rounding: Flat
    """`total` minus the three terms."""
    raw_sgd: Flat
    clipped_sgd: Flat
    largest: Flat
    """The largest magnitude that entered each sum, of the parameters' dtype: to its last place
    `rounding` is held."""

    def named(self) -> dict[str, Flat]:
        """The three terms under their column names, then `rounding`; they sum to `total`."""
        terms = (self.weight_decay, self.current, self.history)
        return dict(zip(self.names, terms, strict=True)) | {"rounding": self.rounding}

    def references(self) -> dict[str, Flat]:
        """The vectors that are not in the sum (what plain SGD would have done), by column name."""
        return {"raw_sgd": self.raw_sgd, "clipped_sgd": self.clipped_sgd}

    def rounding_ulps(self) -> float:
        """The largest residual, in units in the last place of the largest number in its sum.

        That is the largest of the old parameter, the new one, the current-gradient term and the
        history term: where the last two cancel, their rounding outlives their sum.
        """
        infinity = torch.tensor(torch.inf, dtype=self.largest.dtype)
        spacing = torch.nextafter(self.largest, infinity) - self.largest
        return float((self.rounding.abs() / spacing.double()).max())


@dataclass(frozen=True)
class MomentumForm:
    """A step as a sum over all gradients so far (definitions.md section 7).

    With `M_t = keep M_{t-1} + c g_t`, to which coupled decay adds `coupled theta_{t-1}`, the update
    is `- gain M_t`, and besides what decoupled decay takes.

    Attributes:
        keep: share of `M` that the next step keeps.
        gain: float64, or a number for all parameters.
        past: `M_{t-1}`, float64.
        coupled: decay that enters `M`; 0 where it is decoupled.
    """

    keep: float
    gain: float | Flat
    past: Flat
    coupled: float | Flat


@dataclass(frozen=True)
class Adjoint:
    """Derivatives of numbers with respect to a state, one row a number (definitions.md section 7).

    Attributes:
        parameters: float64.
        moments: with respect to each of the optimizer's moments, float64.
    """

    parameters: Float[Tensor, "scalar parameter"]
    moments: tuple[Float[Tensor, "scalar parameter"], ...]


class UpdateRule(Protocol):
    """How an optimizer makes an update of what it reads; a frozen dataclass of its constants."""

    @property
    def names(self) -> TermNames:
        """Column names of the three terms."""

    def terms(
        self,
        *,
        before: Flat,
        after: Flat,
        gradient: Flat,
        clipped: Flat,
        moments_before: Mapping[str, Flat],
        moments_after: Mapping[str, Flat],
        step: int,
        hyper: Hyper,
    ) -> UpdateTerms:
        """Split one update into its terms.

        Args:
            before, after: `theta_{t-1}` and `theta_t`.
            gradient, clipped: `g` and `c g`.
            moments_before, moments_after: the optimizer's moments at `t-1` and `t`.
            step: `t`, counted from 1: the optimizer's own count.
            hyper: rate and decay of the step.
        """

    def momentum_form(
        self,
        *,
        before: Flat,
        moments_before: Mapping[str, Flat],
        moments_after: Mapping[str, Flat],
        step: int,
        hyper: Hyper,
    ) -> MomentumForm:
        """How the update sums the gradients so far; arguments as of `terms`."""

    def start(self, parameters: Float[Tensor, "scalar parameter"]) -> Adjoint:
        """The adjoint of numbers that look at the parameters alone, by their gradients."""

    def back(
        self,
        after: Adjoint,
        *,
        clipped: Flat,
        moments_after: Sequence[Flat],
        step: int,
        hyper: Hyper,
    ) -> tuple[Float[Tensor, "scalar parameter"], Adjoint]:
        """Take an adjoint back through a step, at a gradient that stays as it is.

        Args:
            after: of the state after the step.
            clipped: `c g`.
            moments_after: in the optimizer's order.

        Returns:
            The derivative with respect to `c g`, and the adjoint of the state before.
        """


@dataclass(frozen=True)
class AdamWRule:
    """AdamW: decoupled decay, bias-corrected moments `exp_avg` and `exp_avg_sq`."""

    beta1: float
    beta2: float
    eps: float

    names: ClassVar[TermNames] = (
        "weight_decay",
        "adam_current_gradient",
        "adam_historical_momentum",
    )

    def terms(
        self,
        *,
        before: Flat,
        after: Flat,
        gradient: Flat,
        clipped: Flat,
        moments_before: Mapping[str, Flat],
        moments_after: Mapping[str, Flat],
        step: int,
        hyper: Hyper,
    ) -> UpdateTerms:
        """See `UpdateRule.terms`."""
        # theta_t = (1 - lr lambda) theta_{t-1} - lr m_hat / (sqrt(v_hat) + eps), and m_t is linear
        # in the present gradient and in m_{t-1}: two terms over one denominator (definitions.md, 4)
        scale = hyper.rate / (1 - self.beta1**step)
        denominator = _double(moments_after["exp_avg_sq"]).sqrt_()
        denominator.div_(math.sqrt(1 - self.beta2**step)).add_(self.eps)
        current = _double(clipped).mul_(-scale * (1 - self.beta1)).div_(denominator)
        history = _double(moments_before["exp_avg"]).mul_(-scale * self.beta1).div_(denominator)
        return _with_rest(self.names, hyper, before, after, gradient, clipped, current, history)

    def momentum_form(
        self,
        *,
        before: Flat,
        moments_before: Mapping[str, Flat],
        moments_after: Mapping[str, Flat],
        step: int,
        hyper: Hyper,
    ) -> MomentumForm:
        """See `UpdateRule.momentum_form`: `M = m / (1 - beta1)`, `gain = a (1 - beta1) / D`."""
        kept = 1 - self.beta1
        denominator = _double(moments_after["exp_avg_sq"]).sqrt_()
        denominator.div_(math.sqrt(1 - self.beta2**step)).add_(self.eps)
        gain = hyper.rate / (1 - self.beta1**step) * kept / denominator
        return MomentumForm(self.beta1, gain, _double(moments_before["exp_avg"]).div_(kept), 0.0)

    def start(self, parameters: Float[Tensor, "scalar parameter"]) -> Adjoint:
        """See `UpdateRule.start`."""
        return Adjoint(parameters, (torch.zeros_like(parameters), torch.zeros_like(parameters)))

    def back(
        self,
        after: Adjoint,
        *,
        clipped: Flat,
        moments_after: Sequence[Flat],
        step: int,
        hyper: Hyper,
    ) -> tuple[Float[Tensor, "scalar parameter"], Adjoint]:
        """See `UpdateRule.back`; names as in definitions.md section 7."""
        m, v = map(_double, moments_after)
        alpha, b = hyper.rate / (1 - self.beta1**step), math.sqrt(1 - self.beta2**step)
        root = v.sqrt()
        d = root / b + self.eps
        moved = after.parameters * alpha / d
        p = after.moments[0] - moved
        by_v = torch.where(root > 0, m / (2 * d * root * b), 0.0)  # of a parameter that never moved
        q = after.moments[1] + moved * by_v
        by_gradient = (1 - self.beta1) * p + 2 * (1 - self.beta2) * q * _double(clipped)
        parameters = after.parameters * (1 - hyper.rate * hyper.decay)
        return by_gradient, Adjoint(parameters, (self.beta1 * p, self.beta2 * q))


@dataclass(frozen=True)
class SGDRule:
    """torch's SGD: coupled decay, so that `momentum_buffer` holds past decay too."""

    momentum: float

    names: ClassVar[TermNames] = ("weight_decay", "current_gradient", "historical_momentum")

    def terms(
        self,
        *,
        before: Flat,
        after: Flat,
        gradient: Flat,
        clipped: Flat,
        moments_before: Mapping[str, Flat],
        moments_after: Mapping[str, Flat],
        step: int,
        hyper: Hyper,
    ) -> UpdateTerms:
        """See `UpdateRule.terms`; without momentum no moment is looked at."""
        # the buffer is momentum * buffer + gradient + decay * weights, all of it times the rate
        current = _double(clipped).mul_(-hyper.rate)
        history = (
            _double(moments_before["momentum_buffer"]).mul_(-hyper.rate * self.momentum)
            if self.momentum
            else torch.zeros_like(current)
        )
        return _with_rest(self.names, hyper, before, after, gradient, clipped, current, history)

    def momentum_form(
        self,
        *,
        before: Flat,
        moments_before: Mapping[str, Flat],
        moments_after: Mapping[str, Flat],
        step: int,
        hyper: Hyper,
    ) -> MomentumForm:
        """See `UpdateRule.momentum_form`: `M` is torch's buffer, `gain` the rate."""
        past = _double(
            moments_before["momentum_buffer"] if self.momentum else before.new_zeros(before.shape)
        )
        return MomentumForm(self.momentum, hyper.rate, past, hyper.decay)

    def start(self, parameters: Float[Tensor, "scalar parameter"]) -> Adjoint:
        """See `UpdateRule.start`."""
        return Adjoint(parameters, (torch.zeros_like(parameters),))

    def back(
        self,
        after: Adjoint,
        *,
        clipped: Flat,
        moments_after: Sequence[Flat],
        step: int,
        hyper: Hyper,
    ) -> tuple[Float[Tensor, "scalar parameter"], Adjoint]:
        """See `UpdateRule.back`; decay is part of what enters the buffer."""
        buffer = after.moments[0] - hyper.rate * after.parameters
        parameters = after.parameters + hyper.decay * buffer
        return buffer, Adjoint(parameters, (self.momentum * buffer,))


def _with_rest(
    names: TermNames,
    hyper: Hyper,
    before: Flat,
    after: Flat,
    gradient: Flat,
    clipped: Flat,
    current: Flat,
    history: Flat,
) -> UpdateTerms:
    """Adds to the terms of a rule those that all rules share."""
    old = before.double()
    total = after.double() - old
    decay = old * (-hyper.rate * hyper.decay)
    entered = (before, after, current.to(before.dtype), history.to(before.dtype))
    return UpdateTerms(
        names=names,
        total=total,
        weight_decay=decay,
        current=current,
        history=history,
        rounding=(total - decay).sub_(current).sub_(history),
        raw_sgd=gradient.double() * -hyper.rate,
        clipped_sgd=clipped.double() * -hyper.rate,
        largest=torch.stack([vector.abs() for vector in entered]).amax(0),
    )


def _double(vector: Tensor) -> Tensor:
    """A copy in float64, to compute in place; also of what is float64 already."""
    return vector.to(torch.float64, copy=True)
