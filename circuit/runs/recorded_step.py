"""What a recording gives out: a step, a state, and the outcome of executing steps again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

from circuit.core.flat import Flat, ParameterLayout
from circuit.core.optimizers import Past, TakenStep, moments_of, shared_rate
from circuit.core.state import FlatState, State
from circuit.core.update import UpdateTerms
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.quoting import counted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RecordedStep:
    """Step `t`, which took `before` to `after`; a `circuit.core.step.Step`.

    Attributes:
        step: `t`, counted from 1.
        layout: of the flat vectors.
        taken: what the optimizer read and wrote.
        buffers: of the module, as the step found them.
        columns: terms that are told of every step, zero or not.
    """

    step: int
    layout: ParameterLayout
    taken: TakenStep
    buffers: Mapping[str, Tensor]
    columns: tuple[str, ...] = ()

    @property
    def lr(self) -> float:
        """`lr_t`, of the first group."""
        return shared_rate(self.taken.groups)

    @property
    def lr_by_group(self) -> dict[str, float]:
        """`lr_t` of each group of the optimizer, by its number."""
        return {str(n): shared_rate((group,)) for n, group in enumerate(self.taken.groups)}

    @property
    def clip(self) -> float:
        """1: the gradient is recorded as the optimizer read it, behind any clipping."""
        return 1.0

    @cached_property
    def before(self) -> FlatState:
        """As the step before left it."""
        left = {**self.taken.before, **self.taken.outside}
        moments = moments_of(self.taken.past, self.layout)
        return FlatState(self.step - 1, self.layout.flatten(left), moments, self.buffers)

    @cached_property
    def after(self) -> FlatState:
        """After the step."""
        moments = moments_of(self.taken.memory, self.layout)
        parameters = self.layout.flatten(self.taken.after)
        return FlatState(self.step, parameters, moments, self.buffers)

    @property
    def gradient(self) -> Flat:
        """As the optimizer read it; zero where a parameter had none."""
        parameters = self.taken.before
        return self.layout.flatten(
            {
                name: self.taken.gradient.get(name, torch.zeros_like(tensor, device="cpu"))
                for name, tensor in parameters.items()
            }
        )

    @property
    def graded(self) -> tuple[str, ...]:
        """Parameters that had a gradient."""
        return tuple(self.taken.gradient)

    @cached_property
    def update(self) -> UpdateTerms:
        """The update and its terms; computed when first asked for."""
        return self.taken.terms(self.layout, self.columns)

    @property
    def tokens(self) -> NoReturn:
        """Refused: the batch is not known."""
        raise refused_without("batch", "the recording")

    answers = objective = rule = hyper = momentum = tokens


@dataclass(frozen=True)
class RecordedState(State):
    """A state of a recording, with what else the next step depends on.

    Attributes:
        buffers: of the module.
        pasts: what each optimizer remembers.
    """

    buffers: dict[str, Tensor]
    pasts: tuple[Past, ...]


@dataclass(frozen=True)
class Verification:
    """Steps that were executed again.

    Attributes:
        compared_anchors: stored states among them.
        difference: of the last of them, if it differs.
    """

    start: int
    end: int
    compared_anchors: int
    difference: str | None = None

    @property
    def law(self) -> str:
        """The closing sentence."""
        count = self.end - self.start
        of = "its gradient" if count == 1 else "their gradients"
        steps = f"executed {counted(count, 'step')} from {of}"
        return (
            f"{steps}, 0 bits differ" if self.difference is None else f"{steps}; {self.difference}"
        )


def refused_without(what: str, where: object) -> CircuitError:
    """The refusal of what only a run of `circuit train` has."""
    return CircuitError(
        f"was recorded from a loop of somebody's own, which has no {what} here",
        where=where,
        expected="what states and steps can tell: states, replay, circuit.attribute",
        fix="circuit import-recording says its module and its task; batches only a run of"
        " `circuit train` has",
    )
