"""Counterfactuals: what scalars are at the end of trainings in which something was otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuit.attribution.window import attributor_of
from circuit.core.edit import Edit
from circuit.errors import several
from circuit.runs.base import Run
from circuit.scalars.base import Scalar

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Counterfactual:
    """One edit, and what came of it.

    Attributes:
        edit: what was otherwise.
        scalars: names.
        actual: their values at the end of the run, float64 `[scalar]`.
        values: at the end of the edited training, with the constants of the run's end.
    """

    edit: Edit
    scalars: tuple[str, ...]
    actual: Float[Tensor, " scalar"]
    values: Float[Tensor, " scalar"]

    @property
    def changes(self) -> dict[str, float]:
        """What the edit changed, by scalar."""
        return dict(zip(self.scalars, (self.values - self.actual).tolist(), strict=True))


def counterfactual(
    run: Run, edits: Iterable[Edit], scalars: Sequence[Scalar], end: int
) -> list[Counterfactual]:
    """Train once for each edit, from where it starts to state `end`, and compare.

    Args:
        run: whose steps can be executed again.
        scalars: with the constants that they have at state `end` of the run.

    Raises:
        CircuitError: the run has no such steps, or as `Run.counterfactual`.
    """
    every = several(edits, "edits")
    attributor = attributor_of(run, scalars)
    names = tuple(scalar.name for scalar in attributor.scalars)
    (last,) = run.replay(end - 1, end)
    bound = attributor.bind(last.after.parameters)
    actual = attributor.values(last.after.parameters, bound)
    return [
        Counterfactual(
            edit,
            names,
            actual,
            attributor.values(run.counterfactual(edit, end).parameters, bound),
        )
        for edit in every
    ]
