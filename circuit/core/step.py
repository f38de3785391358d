"""A step of any run, as those see it who ask what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from circuit.core.flat import Flat
    from circuit.core.state import FlatState
    from circuit.core.update import DifferentiableRule, Hyper, MomentumForm, UpdateTerms


class Objective(Protocol):
    """What a step made smaller; light enough to be held for many steps."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the batch's examples, in their order; one may stand twice."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors `[example, ...]`, of which `losses` takes all rows or some."""

    def losses(
        self, model: Callable[[Tensor], Tensor], *inputs: Tensor
    ) -> Float[Tensor, example * where]:
        """Shares of the batch's loss by example, and by the position that predicts.

        Over all rows of `inputs` they sum to the loss.

        Args:
            model: tokens to logits.
        """

    def examples(self) -> Any:
        """The batch, with what the run's task says of it."""


class Step(Protocol):
    """Step `t`, which took `before` (`theta_{t-1}`) to `after` (`theta_t`)."""

    @property
    def step(self) -> int:
        """`t`, counted from 1."""

    @property
    def lr(self) -> float:
        """`lr_t`."""

    @property
    def clip(self) -> float:
        """The clip factor `c`."""

    @property
    def before(self) -> FlatState:
        """Weights and moments before the step."""

    @property
    def after(self) -> FlatState:
        """Weights and moments after it."""

    @property
    def gradient(self) -> Flat:
        """`g`, before clipping."""

    @property
    def graded(self) -> tuple[str, ...]:
        """Names of the parameters that had a gradient: none is taken of those that are frozen."""

    @property
    def objective(self) -> Objective:
        """Whose gradient `g` is."""

    @property
    def update(self) -> UpdateTerms:
        """The update and its terms."""

    @property
    def rule(self) -> DifferentiableRule:
        """Of the optimizer."""

    @property
    def hyper(self) -> Hyper:
        """What the step set for each parameter."""

    @property
    def momentum(self) -> MomentumForm:
        """The update as a sum over the gradients so far."""

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The batch, padded on the right."""

    @property
    def answers(self) -> Bool[Tensor, "batch pos"]:
        """Where the answers stand in the batch."""
