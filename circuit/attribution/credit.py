"""Credit: what happened to scalars over a window, divided among the training examples.

Momentum carries the gradient of a step into every later one, so the change is split where the
gradients were taken (definitions.md section 7). With `G_t` the path-averaged gradient of a scalar,
and the update `- gain_t M_t` of `M_t = keep M_{t-1} + c_t g_t` (`MomentumForm`),

    H_t = keep H_{t+1} + gain_t G_t        backwards from H_{b+1} = 0
    credit(e, t) = - c_t H_t . g_{t,e}     for a < t <= b

and `sum of credit + inherited + decay + rounding = actual change`, to the closure of the path rule.
`H_t . g_{t,e}` is the derivative of an example's loss in the direction `H_t`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from circuit.attribution.attribute import Attributor
from circuit.attribution.backward import backwards
from circuit.attribution.losses import By, Losses, check_by
from circuit.attribution.window import attributor_of
from circuit.core.flat import Flat
from circuit.core.step import Objective, Step
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.runs.base import Run
from circuit.scalars.base import Scalar

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

APART, ROUNDED = 0.01, 1e-4
"""Most that the sums of the examples may be apart from the batches, and from their own sizes."""


@dataclass(frozen=True)
class StepCredit:
    """What the examples of one step have done to the scalars by the end of the window.

    Attributes:
        step: `t`.
        objective: whose batch it was.
        credit: by scalar, example and the position that predicts (one position, with all of them,
            where it is by example), float64.
        batch: `- c_t H_t . g_t` of each scalar, with the gradient that the optimizer was given.
    """

    step: int
    objective: Objective
    credit: Float[Tensor, "scalar example pos"]
    batch: Float[Tensor, " scalar"]


@dataclass
class Totals:
    """What a window adds up to, by scalar, in float64 `[scalar]`.

    Attributes:
        actual: changes that happened, step by step with each step's constants.
        credit: of all examples of all steps.
        inherited: of momentum from before the window.
        decay: of weight decay, where it is coupled with what momentum has made of it.
        rounding: of what the optimizer's float32 left out.
        apart: `sum over steps |sum of credit - batch|`.
        batch: `sum over steps |batch|`.
        every: `sum over steps and examples |credit|`.
    """

    actual: Tensor
    credit: Tensor
    inherited: Tensor
    decay: Tensor
    rounding: Tensor
    apart: Tensor
    batch: Tensor
    every: Tensor

    @property
    def predicted(self) -> Float[Tensor, " scalar"]:
        """The sum of the four."""
        return self.credit + self.inherited + self.decay + self.rounding

    @property
    def closure(self) -> Float[Tensor, " scalar"]:
        """`|predicted - actual| / |actual|`; not finite where nothing moved."""
        return (self.predicted - self.actual).abs() / self.actual.abs()

    @property
    def examples_error(self) -> Float[Tensor, " scalar"]:
        """How far the examples' sums are from the gradients that were taken: `apart / batch`."""
        return self.apart / self.batch

    def of(self, at: int) -> dict[str, float | None]:
        """One scalar's, as numbers; null where they are not finite."""
        names = ("actual", "credit", "inherited", "decay", "rounding", "closure", "examples_error")
        values = {name: float(getattr(self, name)[at]) for name in names}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True)
class Carried:
    """What a pass has at the first step of its window: all that one of the window before needs.

    Attributes:
        kernel: `H`, with what momentum keeps of it, float64 `[scalar, parameter]`.
        totals: so far.
    """

    kernel: Tensor
    totals: Totals


@dataclass(frozen=True)
class _Noted:
    """What the way back has to know of a step beside its vectors."""

    step: int
    clip: float
    keep: float
    coupled: float | Flat | None
    objective: Objective
    past: Flat | None
    """Of the window's first step."""
    actual: Float[Tensor, " scalar"]
    decay: Float[Tensor, " scalar"]
    """Of decoupled decay."""
    rounding: Float[Tensor, " scalar"]


class CreditPass:
    """One pass over a window, from its last step to its first.

    Attributes:
        totals: of the steps passed so far, those behind the window among them; complete when the
            pass is.
        carried: for the window before; once the pass is complete.
        bytes_a_step: that wait on disk, of one stretch between anchors at a time; once the pass
            has begun.
    """

    def __init__(
        self,
        run: Run,
        attributor: Attributor,
        start: int,
        end: int,
        by: By = "example",
        *,
        behind: Carried | None = None,
    ) -> None:
        """Describe the pass.

        Args:
            attributor: of the scalars, made with `averages`.
            start, end: the states that the window takes one to the other.
            by: whether the credit of an example is divided further, among its positions.
            behind: from the pass of the window that begins at `end`: credit is then what examples
                have done by the end of that one.

        Raises:
            CircuitError: there is no such division.
        """
        check_by(by)
        self.by: By = by
        self.run, self.attributor = run, attributor
        self.start, self.end = start, end
        self.losses = Losses(attributor.model)
        self.totals = Totals(*torch.zeros(8, len(attributor.scalars), dtype=torch.float64))
        self._behind = behind
        if behind is not None:
            # what was inherited there is divided among the examples of this window
            self.totals = replace(behind.totals, inherited=torch.zeros_like(self.totals.inherited))
        self.bytes_a_step = 0

    def __iter__(self) -> Iterator[StepCredit]:
        """The steps, last first.

        Raises:
            CircuitError: as `backwards`; or the examples do not sum to the gradients taken.
        """
        totals = self.totals
        if self._behind is None:
            size = (len(self.attributor.scalars), self.losses.layout.size)
            carried = torch.zeros(size, dtype=torch.float64)
        else:
            carried = self._behind.kernel.clone()
        for noted, (theta, gradient, kernel) in backwards(
            self.run, self.start, self.end, self._note
        ):
            carried.add_(kernel)  # [scalar, parameter]: H_t, for steps come last first
            # [scalar, example, pos]: a derivative of losses that were not clipped, hence -c
            credit = self.losses.derivatives(noted.objective, theta, carried, self.by) * -noted.clip
            batch = carried @ gradient.double() * -noted.clip
            totals.actual = totals.actual + noted.actual
            totals.rounding = totals.rounding + noted.rounding
            totals.decay = totals.decay + noted.decay
            if noted.coupled is not None:  # decay in the momentum is carried on as gradients are
                totals.decay = totals.decay - carried @ (noted.coupled * theta.double())
            totals.credit = totals.credit + credit.sum((1, 2))
            totals.apart = totals.apart + (credit.sum((1, 2)) - batch).abs()
            totals.batch = totals.batch + batch.abs()
            totals.every = totals.every + credit.abs().sum((1, 2))
            carried.mul_(noted.keep)  # what the step before finds of it
            if noted.past is not None:  # at the window's first step: momentum from before it
                totals.inherited = totals.inherited - carried @ noted.past
            yield StepCredit(noted.step, noted.objective, credit, batch)
        self.carried = Carried(carried, totals)
        # what cancels in a batch leaves the rounding of its examples' credit
        if (totals.apart > torch.maximum(APART * totals.batch, ROUNDED * totals.every)).any():
            worst = float(totals.examples_error.max())
            raise CircuitError(
                "the losses of the examples have other gradients than those that were taken: they"
                f" are {worst:.0%} apart",
                expected="a module that acts in training as in evaluation and draws nothing, and"
                " losses() that sum to loss()",
                fix="leave dropout out where data are asked about; trace attribute and trace"
                " counterfactual work",
            )

    def _note(self, step: Step) -> tuple[_Noted, list[Tensor]]:
        """Attribute a step to the terms, and keep what its gradient's way onwards hangs on."""
        attribution, form = self.attributor.step(step), step.momentum
        assert attribution.average is not None, "the attributor was made with `averages`"
        shares = dict(zip(attribution.terms, attribution.path.sum(2).T, strict=True))
        decay = shares["weight_decay"]
        coupled = form.coupled if torch.as_tensor(form.coupled).any() else None
        kernel = (attribution.average * form.gain).to(self.losses.dtype)
        noted = _Noted(
            step=step.step,
            clip=step.clip,
            keep=form.keep,
            coupled=coupled,
            objective=step.objective,
            past=form.past if step.step == self.start + 1 else None,
            actual=attribution.actual,
            decay=decay if coupled is None else torch.zeros_like(decay),
            rounding=shares["rounding"],
        )
        waiting = [step.before.parameters, step.gradient, kernel]
        self.bytes_a_step = sum(one.numel() * one.element_size() for one in waiting)
        return noted, waiting


@dataclass(frozen=True)
class Credit:
    """One scalar's change over a window, divided among the examples of its steps.

    Attributes:
        scalar: its name.
        steps: `[row]`, ascending.
        examples: name of the example of each row; one row a step and example.
        credit: float64 `[row]`.
        totals: see `Totals.of`.
    """

    scalar: str
    steps: list[int]
    examples: list[str]
    credit: Float[Tensor, " row"]
    totals: dict[str, float | None]

    def by_example(self) -> dict[str, float]:
        """The sum of each example over all steps, the largest first."""
        sums: dict[str, float] = {}
        for example, share in zip(self.examples, self.credit.tolist(), strict=True):
            sums[example] = sums.get(example, 0.0) + share
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def credit(
    run: Run,
    scalars: Sequence[Scalar],
    start: int,
    end: int,
    *,
    rule: str = "simpson",
    dtype: torch.dtype | None = None,
) -> dict[str, Credit]:
    """Divide what happened to scalars from state `start` to state `end` among the examples.

    Credit says who has moved the scalar, with learning rates, clip factors and denominators as
    they were. It does not say what would have happened without an example (definitions.md 7).

    Args:
        run: whose steps can be executed again.
        rule: path rule, of `circuit.core.paths.path_rule`.
        dtype: of the model that evaluates gradients, float32 by default.

    Returns:
        One `Credit` a scalar, by name.

    Raises:
        CircuitError: as `circuit.attribute`; the disk has no room for what waits between two
            anchors, 4 (2 + scalars) bytes a parameter and step; or the losses of the examples do
            not sum to what was differentiated.
    """
    attributor = attributor_of(run, scalars, rule=rule, dtype=dtype, averages=True)
    whole = CreditPass(run, attributor, start, end)
    passed = [(one.step, one.objective.ids, one.credit.sum(2)) for one in whole][::-1]
    steps = [step for step, ids, _ in passed for _ in ids]
    examples = [name for _, ids, _ in passed for name in ids]
    shares = torch.cat([share for _, _, share in passed], 1)
    return {
        scalar.name: Credit(scalar.name, steps, examples, shares[at], whole.totals.of(at))
        for at, scalar in enumerate(attributor.scalars)
    }
