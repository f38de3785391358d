"""One update = weight decay + current gradient + history (+ rounding).

The update itself is an optimizer's; the decomposition is ours, in float64, from the tensors that
the optimizer read and wrote (definitions.md section 4). `rounding` is what is left: the real update
minus the three terms, so the four sum to the update by construction, and its size says how well
the three do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias

from circuit.core.flat import Flat
from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

OUTSIDE = "outside_the_optimizer"
"""Column of what has changed the parameters beside an optimizer's step."""

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
class OptimizerStep:
    """What one step of an optimizer read and wrote; vectors `[parameter]`.

    Attributes:
        before, after: `theta_{t-1}` and `theta_t`.
        gradient, clipped: `g` and `c g`, which the optimizer reads; `g` may not be known.
        moments_before, moments_after: the optimizer's moments at `t-1` and `t`.
        step: `t`, counted from 1: the optimizer's own count.
        hyper: rate and decay of the step.
    """

    before: Flat
    after: Flat
    gradient: Flat | None
    clipped: Flat
    moments_before: Mapping[str, Flat]
    moments_after: Mapping[str, Flat]
    step: int
    hyper: Hyper


@dataclass(frozen=True)
class UpdateTerms:
    """One update and its terms; float64 vectors of `[parameter]`.

    Attributes:
        total: `theta_t - theta_{t-1}`, of float32 parameters exact in float64.
        terms: what is in the sum, by column name.
        rounding: `total` minus the terms.
        plain_sgd: what is not in the sum, by column name: what plain SGD would have done.
        largest: the largest magnitude that entered each sum, of the parameters' dtype: to its last
            place `rounding` is held.
    """

    total: Flat
    terms: Mapping[str, Flat]
    rounding: Flat
    plain_sgd: Mapping[str, Flat]
    largest: Flat

    def named(self) -> dict[str, Flat]:
        """The terms under their column names, then `rounding`; they sum to `total`."""
        return {**self.terms, "rounding": self.rounding}

    def with_outside(self, change: Flat) -> UpdateTerms:
        """With what something other than the optimizer has changed, float64, as one more term."""
        terms = {**self.terms, OUTSIDE: change}
        return replace(self, total=self.total + change, terms=terms)

    def references(self) -> dict[str, Flat]:
        """The vectors that are not in the sum, by column name."""
        return dict(self.plain_sgd)

    def rounding_ulps(self) -> float:
        """The largest residual, in units in the last place of the largest number in its sum.

        That is the largest of the old parameter, the new one and the terms that may cancel: their
        rounding outlives their sum.
        """
        if not self.largest.numel():
            return 0.0
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


def joined(size: int, parts: Sequence[tuple[Tensor, UpdateTerms]]) -> UpdateTerms:
    """The terms of one update of which parts follow rules of their own.

    Args:
        size: of the flat vector.
        parts: index `[own]` of each part's parameters in it, and its terms. Parameters of no part
            did not move, and every term that a part does not have is zero in it.
    """
    if len(parts) == 1 and torch.equal(parts[0][0], torch.arange(size)):
        return parts[0][1]

    def spread(vectors: Sequence[Flat | None], dtype: torch.dtype = torch.float64) -> Flat:
        whole = torch.zeros(size, dtype=dtype)
        for (index, _), vector in zip(parts, vectors, strict=True):
            if vector is not None:
                whole[index] = vector
        return whole

    def columns(of: Callable[[UpdateTerms], Mapping[str, Flat]]) -> dict[str, Flat]:
        names = dict.fromkeys(name for _, terms in parts for name in of(terms))
        return {name: spread([of(terms).get(name) for _, terms in parts]) for name in names}

    return UpdateTerms(
        total=spread([terms.total for _, terms in parts]),
        terms=columns(lambda terms: terms.terms),
        rounding=spread([terms.rounding for _, terms in parts]),
        plain_sgd=columns(lambda terms: terms.plain_sgd),
        largest=spread(
            [terms.largest for _, terms in parts],
            parts[0][1].largest.dtype if parts else torch.float32,
        ),
    )


class UpdateRule(Protocol):
    """How an optimizer makes an update of what it reads; a frozen dataclass of its constants."""

    @property
    def names(self) -> tuple[str, ...]:
        """Column names of the terms."""

    def terms(self, taken: OptimizerStep) -> UpdateTerms:
        """Split one update into its terms."""


class DifferentiableRule(UpdateRule, Protocol):
    """A rule whose steps can be summed over gradients and differentiated (definitions.md 7)."""

    def momentum_form(self, taken: OptimizerStep) -> MomentumForm:
        """How the update sums the gradients so far."""

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
    """torch's Adam and AdamW: bias-corrected moments `exp_avg` and `exp_avg_sq`.

    Attributes:
        amsgrad: the denominator is made of `max_exp_avg_sq`.
        maximize: the gradient is read with the other sign.
        coupled_decay: of Adam: decay is added to the gradient, so that its term goes through the
            denominator, and the moments hold past decay too.
    """

    beta1: float
    beta2: float
    eps: float
    amsgrad: bool = False
    maximize: bool = False
    coupled_decay: bool = False

    flags: ClassVar[tuple[str, ...]] = ("amsgrad", "maximize", "coupled_decay")
    """Without which alone the rule can be differentiated."""
    names: ClassVar[TermNames] = (
        "weight_decay",
        "adam_current_gradient",
        "adam_historical_momentum",
    )

    def terms(self, taken: OptimizerStep) -> UpdateTerms:
        """See `UpdateRule.terms`."""
        # theta_t = (1 - lr lambda) theta_{t-1} - lr m_hat / (sqrt(v_hat) + eps), and m_t is linear
        # in the present gradient and in m_{t-1}: two terms over one denominator (definitions.md, 4)
        hyper = taken.hyper
        scale = hyper.rate / (1 - self.beta1**taken.step)
        fresh = -scale * (1 - self.beta1)
        second = taken.moments_after["max_exp_avg_sq" if self.amsgrad else "exp_avg_sq"]
        denominator = self._denominator(second, taken.step)
        current = _double(taken.clipped).mul_(-fresh if self.maximize else fresh).div_(denominator)
        # where there is no past
        mean = taken.moments_before.get("exp_avg", torch.zeros_like(taken.clipped))
        history = _double(mean).mul_(-scale * self.beta1).div_(denominator)
        decay = None
        if self.coupled_decay:  # read as lambda theta beside the gradient
            decay = _double(taken.before).mul_(fresh * hyper.decay).div_(denominator)
        return _with_rest(_Terms(self.names, decay, current, history), taken, self.maximize)

    def momentum_form(self, taken: OptimizerStep) -> MomentumForm:
        """`M = m / (1 - beta1)`, `gain = a (1 - beta1) / D`; see `DifferentiableRule`."""
        _refuse_flags(self)
        kept = 1 - self.beta1
        denominator = self._denominator(taken.moments_after["exp_avg_sq"], taken.step)
        gain = taken.hyper.rate / (1 - self.beta1**taken.step) * kept / denominator
        mean = taken.moments_before.get("exp_avg", torch.zeros_like(taken.clipped))
        past = _double(mean).div_(kept)
        return MomentumForm(self.beta1, gain, past, 0.0)

    def start(self, parameters: Float[Tensor, "scalar parameter"]) -> Adjoint:
        """See `DifferentiableRule.start`."""
        _refuse_flags(self)
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
        """See `DifferentiableRule.back`; names as in definitions.md section 7."""
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

    def _denominator(self, second: Flat, step: int) -> Flat:
        """`D = sqrt(v / (1 - beta2^t)) + eps`, in float64."""
        root = _double(second).sqrt_()
        return root.div_(math.sqrt(1 - self.beta2**step)).add_(self.eps)


@dataclass(frozen=True)
class SGDRule:
    """torch's SGD: coupled decay, so that `momentum_buffer` holds past decay too.

    Attributes:
        nesterov: the buffer is looked at ahead, times the momentum once more.
        dampening: what the buffer leaves out of all gradients but the first.
        maximize: the gradient is read with the other sign.
    """

    momentum: float
    nesterov: bool = False
    dampening: float = 0.0
    maximize: bool = False

    flags: ClassVar[tuple[str, ...]] = ("nesterov", "dampening", "maximize")
    """Without which alone the rule can be differentiated."""
    names: ClassVar[TermNames] = ("weight_decay", "current_gradient", "historical_momentum")

    def terms(self, taken: OptimizerStep) -> UpdateTerms:
        """See `UpdateRule.terms`; without momentum no moment is looked at.

        Without a `momentum_buffer` before the step, the gradient becomes it, undampened.
        """
        # buf_t = mu buf_{t-1} + (1 - dampening) (g + lambda theta), and the step is the rate times
        # buf_t, or with Nesterov times g + lambda theta + mu buf_t (torch.optim.SGD)
        buffer = taken.moments_before.get("momentum_buffer") if self.momentum else None
        entering = 1.0 if buffer is None else 1 - self.dampening
        fresh = 1 + self.momentum * entering if self.nesterov else entering
        past = self.momentum**2 if self.nesterov else self.momentum
        hyper = taken.hyper
        current = _double(taken.clipped).mul_(hyper.rate * (fresh if self.maximize else -fresh))
        history = (
            torch.zeros_like(current)
            if buffer is None
            else _double(buffer).mul_(-hyper.rate * past)
        )
        decay = None
        if fresh != 1:
            decay = _double(taken.before).mul_(-hyper.rate * hyper.decay * fresh)
        return _with_rest(_Terms(self.names, decay, current, history), taken, self.maximize)

    def momentum_form(self, taken: OptimizerStep) -> MomentumForm:
        """`M` is torch's buffer, `gain` the rate; see `DifferentiableRule`."""
        _refuse_flags(self)
        none = torch.zeros_like(taken.before)
        past = _double(taken.moments_before.get("momentum_buffer", none) if self.momentum else none)
        return MomentumForm(self.momentum, taken.hyper.rate, past, taken.hyper.decay)

    def start(self, parameters: Float[Tensor, "scalar parameter"]) -> Adjoint:
        """See `DifferentiableRule.start`."""
        _refuse_flags(self)
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
        """See `DifferentiableRule.back`; decay is part of what enters the buffer."""
        buffer = after.moments[0] - hyper.rate * after.parameters
        parameters = after.parameters + hyper.decay * buffer
        return buffer, Adjoint(parameters, (self.momentum * buffer,))


@dataclass(frozen=True)
class AnyRule:
    """Any other optimizer: its decoupled decay, if it has one, and the rest, which is not split.

    Attributes:
        decoupled_decay: weights are multiplied by `1 - lr * weight_decay` beside the update.
        maximize: the gradient is read with the other sign.
    """

    decoupled_decay: bool
    maximize: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Column names of the terms."""
        return ("decoupled_decay", "rest") if self.decoupled_decay else ("rest",)

    def terms(self, taken: OptimizerStep) -> UpdateTerms:
        """See `UpdateRule.terms`; no moment is looked at, and nothing is left to rounding."""
        old, hyper = taken.before.double(), taken.hyper
        total = taken.after.double() - old
        decay = old * (-hyper.rate * hyper.decay)
        rest = total - decay if self.decoupled_decay else total
        return UpdateTerms(
            total=total,
            terms=dict(zip(self.names, (decay, rest)[-len(self.names) :], strict=True)),
            rounding=torch.zeros_like(total),
            plain_sgd=_plain_sgd(taken, self.maximize),
            largest=torch.maximum(taken.before.abs(), taken.after.abs()),
        )


def _refuse_flags(rule: AdamWRule | SGDRule) -> None:
    """Refuse what the formulas of definitions.md section 7 leave out.

    Raises:
        CircuitError: a flag of the rule is set.
    """
    for flag in rule.flags:
        if getattr(rule, flag):
            raise CircuitError(
                f"data cannot be credited through an optimizer with {flag}",
                expected=f"one without {', '.join(rule.flags)}",
            )


@dataclass(frozen=True)
class _Terms:
    """The terms of a rule; without a decay of its own it is `-lr lambda theta`."""

    names: TermNames
    decay: Flat | None
    current: Flat
    history: Flat


def _with_rest(terms: _Terms, taken: OptimizerStep, maximize: bool) -> UpdateTerms:
    """Adds to the terms of a rule those that all rules share."""
    old, dtype = taken.before.double(), taken.before.dtype
    total = taken.after.double() - old
    plain = old * (-taken.hyper.rate * taken.hyper.decay)
    decay = plain if terms.decay is None else terms.decay
    entered = [taken.before, taken.after, terms.current.to(dtype), terms.history.to(dtype)]
    if terms.decay is not None:
        entered.append(terms.decay.to(dtype))
    return UpdateTerms(
        total=total,
        terms=dict(zip(terms.names, (decay, terms.current, terms.history), strict=True)),
        rounding=(total - decay).sub_(terms.current).sub_(terms.history),
        plain_sgd=_plain_sgd(taken, maximize),
        largest=torch.stack([vector.abs() for vector in entered]).amax(0),
    )


def _plain_sgd(taken: OptimizerStep, maximize: bool) -> dict[str, Flat]:
    """What plain SGD would have done with the gradient, and with what the optimizer read."""
    rate = taken.hyper.rate if maximize else -taken.hyper.rate
    raw = {} if taken.gradient is None else {"raw_sgd": taken.gradient.double() * rate}
    return raw | {"clipped_sgd": taken.clipped.double() * rate}


def _double(vector: Tensor) -> Tensor:
    """A copy in float64, to compute in place; also of what is float64 already."""
    return vector.to(torch.float64, copy=True)
