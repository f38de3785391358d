"""A step of any run, as those see it who ask what it did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from circuit.core.state import FlatState
from circuit.core.update import UpdateTerms

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor


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
    def update(self) -> UpdateTerms:
        """The update and its terms."""

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The batch, padded on the right."""

    @property
    def answers(self) -> Bool[Tensor, "batch pos"]:
        """Where the answers stand in the batch."""
