"""What is to be otherwise in a counterfactual training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from circuit.errors import CircuitError


@dataclass(frozen=True)
class Edit:
    """Some examples, or terms of the update, count for more or less (definitions.md section 7).

    Attributes:
        start, end: the edit holds for the steps that take state `start` to the next ones, up to
            `end`.
        examples: factor of the loss of an example, by its name; 0 removes it. The number of targets
            by which the batch's loss is divided stays.
        terms: factor of a term of the update, by its name; 0 removes it.

    Raises:
        CircuitError: the window holds no step, or a factor is not finite.
    """

    start: int
    end: int
    examples: Mapping[str, float] = field(default_factory=dict)
    terms: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise CircuitError(
                f"an edit of steps {self.start}:{self.end}", expected="start < end, from 0 on"
            )
        for name, factor in (*self.examples.items(), *self.terms.items()):
            if not abs(factor) < float("inf"):
                raise CircuitError(f"factor {factor} of {name}", expected="a finite number")

    def holds(self, step: int) -> bool:
        """Whether a step (from 1) is otherwise."""
        return self.start < step <= self.end

    def weights(self, names: Sequence[str]) -> list[float] | None:
        """Factors of the examples of a batch; None where all are 1, which is the step as it was."""
        factors = [self.examples.get(name, 1.0) for name in names]
        return None if all(factor == 1.0 for factor in factors) else factors
