"""Influence: the derivative of the end of a window with respect to each example's weight.

Example `e`'s loss is multiplied by `w_e` where it occurs in the window, and `dC(theta_b) / dw_e` is
taken at `w = 1` through everything: gradients, clipping, moments, decay (definitions.md section 7;
MAGIC, Ilyas and Engstrom 2025). One pass backwards over the steps, at the states that they had:

    u  = dC / d(c g)                                       `DifferentiableRule.back`
    h  = c u - [c < 1] c (u . g) g / (n (n + 1e-6))        through clipping, n = |g|
    dC / dw_e  +=  h . g_{t,e}
    a          +=  grad (g . h)                            through the gradient, to the weights

It is exact for infinitesimal changes. How far it carries is another matter, of which the norm of
the adjoint `a` along the pass warns: where it grows, small changes are blown up on their way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuit.attribution.attribute import Attributor
from circuit.attribution.backward import backwards
from circuit.attribution.losses import Losses
from circuit.attribution.window import attributor_of
from circuit.core.flat import Flat
from circuit.core.graphs import Graphs
from circuit.core.step import Objective, Step
from circuit.core.update import Adjoint, DifferentiableRule, Hyper
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.runs.base import Run
from circuit.scalars.base import Scalar
from circuit.sizes import memory_limit

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

APART = 0.01
"""Most that the norm of a step's gradient may differ by, relatively, when it is computed again: a
module that drops out or draws otherwise is no function of the weights, whose slope could be told.
"""
SHARE = 4
"""Of the memory that this process may take, held graphs take at most one part in so many."""
ROUGH = 2
"""The first steps of a run: AdamW's are a sign of the gradient there, which has no useful slope."""


@dataclass(frozen=True)
class StepInfluence:
    """What the weights of one step's examples do to the scalars at the end of the window.

    Attributes:
        step: `t`.
        objective: whose batch it was.
        influence: `dC(theta_b) / dw` by scalar, example and the position that predicts, float64.
        growth: norm of the adjoint of the weights before the step over that at the end, by scalar.
    """

    step: int
    objective: Objective
    influence: Float[Tensor, "scalar example pos"]
    growth: Float[Tensor, " scalar"]


@dataclass(frozen=True)
class _Noted:
    """What the way back has to know of a step beside its vectors."""

    step: int
    clip: float
    norm: float
    """Of the gradient that was taken."""
    graded: tuple[str, ...]
    """Parameters that it is of."""
    rule: DifferentiableRule
    hyper: Hyper
    objective: Objective
    end: Flat | None
    """The weights after the window's last step."""


class InfluencePass:
    """One pass over a window, from its last step to its first.

    Attributes:
        value: of each scalar at the end, float64 `[scalar]`; once the pass has begun.
        slope: norm of its gradient there.
        bound: the scalars, with their constants of there.
    """

    def __init__(self, run: Run, attributor: Attributor, start: int, end: int) -> None:
        """Describe the pass.

        Args:
            attributor: of the scalars, whose constants are taken at the end of the window.
            start, end: the states that the window takes one to the other.
        """
        self.run, self.attributor = run, attributor
        self.start, self.end = start, end
        self.losses = Losses(attributor.model)

    def __iter__(self) -> Iterator[StepInfluence]:
        """The steps, last first."""
        adjoint: Adjoint | None = None
        # but of the last step, whose gradient is taken again: a module that draws gives another
        steps = range(self.start + 1, self.end)
        room = memory_limit() // SHARE if self.losses.device.type == "cpu" else 0
        self.graphs = Graphs(steps, self.losses.dtype, room)  # a GPU's would wait in its memory
        walk = backwards(self.run, self.start, self.end, self._note, self.graphs)
        for noted, (theta, *moments) in walk:
            if adjoint is None:
                assert noted.end is not None, "the pass begins at the end"
                adjoint = noted.rule.start(self._gradients(noted.end))
            adjoint, influence = self._back(adjoint, noted, theta, moments)
            growth = adjoint.parameters.norm(dim=1) / self.slope
            yield StepInfluence(noted.step, noted.objective, influence, growth)

    def _gradients(self, end: Flat) -> Float[Tensor, "scalar parameter"]:
        """Of the scalars at the end.

        Raises:
            CircuitError: one has none there, of which no growth could be told.
        """
        self.bound = self.attributor.bind(end)
        self.value, gradients = self.attributor.evaluate(end, self.bound)
        gradients = gradients.double()
        self.slope = gradients.norm(dim=1)
        for scalar, slope in zip(self.attributor.scalars, self.slope.tolist(), strict=True):
            if not slope:
                raise CircuitError(
                    f"the gradient of scalar {scalar.name} at step {self.end} is zero: no example"
                    " has an influence on it",
                    expected="a scalar that changes with the weights",
                )
        return gradients

    def _back(
        self, after: Adjoint, noted: _Noted, theta: Flat, moments: Sequence[Flat]
    ) -> tuple[Adjoint, Tensor]:
        """The adjoint before a step, and the derivatives by its losses' weights."""
        before: list[Adjoint] = []
        c = noted.clip

        def by_gradient(gradient: Flat) -> Tensor:
            gradient = self._taken(gradient, noted.graded)
            u, adjoint = noted.rule.back(
                after,
                clipped=c * gradient,
                moments_after=moments,
                step=noted.step,
                hyper=noted.hyper,
            )
            before.append(adjoint)  # before the gradient's own way to the weights is added
            n = gradient.norm()  # of what was clipped: frozen parameters are left out
            _refuse_another(float(n), noted)
            if c >= 1:
                return u
            # clipping turns with the gradient's norm
            along: Tensor = (u @ gradient)[:, None] * gradient / (n * (n + 1e-6))
            return c * (u - along)

        graph = self.graphs.pop(noted.step) or self.losses.gradient(noted.objective, theta)
        curved, influence = self.losses.back(graph, by_gradient)
        (adjoint,) = before
        return Adjoint(adjoint.parameters + curved, adjoint.moments), influence

    def _taken(self, gradient: Flat, graded: tuple[str, ...]) -> Flat:
        """Without the frozen parameters, which are no part of the norm by which it is clipped."""
        layout = self.losses.layout
        if len(graded) == len(layout.names):
            return gradient
        taken = torch.zeros_like(gradient)
        for name in graded:
            at = slice(*layout.range(name))
            taken[at] = gradient[at]
        return taken

    def _note(self, step: Step) -> tuple[_Noted, list[Tensor]]:
        end = step.after.parameters if step.step == self.end else None
        norm = float(step.gradient.double().norm())
        noted = _Noted(
            step=step.step,
            clip=step.clip,
            norm=norm,
            graded=step.graded,
            rule=step.rule,
            hyper=step.hyper,
            objective=step.objective,
            end=end,
        )
        return noted, [step.before.parameters, *step.after.moments.values()]


def _refuse_another(norm: float, noted: _Noted) -> None:
    """Refuse a gradient that is not the one that was taken.

    Raises:
        CircuitError: tells both norms.
    """
    if abs(norm - noted.norm) > APART * noted.norm:
        raise CircuitError(
            f"the gradient of step {noted.step} is another when it is computed again: its norm was"
            f" {noted.norm:.4g}, and is {norm:.4g}",
            expected="a module that acts in training as in evaluation, and draws nothing",
            fix="leave dropout out where influence is asked for; trace attribute and trace"
            " counterfactual work",
        )


@dataclass(frozen=True)
class Influence:
    """The derivatives of one scalar at the end of a window.

    Attributes:
        scalar: its name.
        value: at the end.
        steps: `[row]`, ascending.
        examples: name of the example of each row; one row a step and example.
        influence: float64 `[row]`.
        growth: of the adjoint's norm, by step.
    """

    scalar: str
    value: float
    steps: list[int]
    examples: list[str]
    influence: Float[Tensor, " row"]
    growth: dict[int, float]

    def by_example(self) -> dict[str, float]:
        """`dC / dw_e` of each example, the largest first."""
        sums: dict[str, float] = {}
        for example, share in zip(self.examples, self.influence.tolist(), strict=True):
            sums[example] = sums.get(example, 0.0) + share
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def influence(
    run: Run,
    scalars: Sequence[Scalar],
    start: int,
    end: int,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Influence]:
    """Derivatives of scalars at state `end` with respect to the weights of the window's examples.

    Influence says what an infinitesimal change of an example's weight would do. It says nothing of
    who moved the scalar (`circuit.credit`), nor, where the adjoint grows, of finite changes.

    Args:
        run: whose steps can be executed again.
        scalars: with the constants that they have at `end`.
        dtype: of the model that evaluates losses and gradients, float32 by default.

    Returns:
        One `Influence` a scalar, by name.

    Raises:
        CircuitError: as `circuit.attribute`; the gradient of a scalar is zero at `end`; or that of
            a step is another when it is computed again.
    """
    attributor = attributor_of(run, scalars, dtype=dtype)
    whole = InfluencePass(run, attributor, start, end)
    # the pass goes from the last step to the first; [scalar, example, pos] -> [scalar, example]
    passed = [(o.step, o.objective.ids, o.influence.sum(2), o.growth) for o in whole][::-1]
    steps = [step for step, ids, _, _ in passed for _ in ids]
    examples = [name for _, ids, _, _ in passed for name in ids]
    shares = torch.cat([share for _, _, share, _ in passed], 1)
    return {
        scalar.name: Influence(
            scalar.name,
            float(whole.value[at]),
            steps,
            examples,
            shares[at],
            {step: float(growth[at]) for step, _, _, growth in passed},
        )
        for at, scalar in enumerate(attributor.scalars)
    }
