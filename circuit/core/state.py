"""The weights after a step, with what the optimizer remembers: by name, and as flat vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from circuit.core.digests import tensor_digest, tensors_digest
from circuit.core.flat import Flat, ParameterLayout
from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Moments: TypeAlias = "dict[str, dict[str, Tensor]]"
"""Optimizer state: moment -> parameter name -> tensor of the parameter's shape."""

MOMENT_STAGES = {"exp_avg": "m", "exp_avg_sq": "v", "momentum_buffer": "m"}
"""The optimizer's moments under the names of definitions.md section 4."""
STATE_STAGES = ("parameters", "m", "v", "memory")
"""What a state is digested as."""


@dataclass(frozen=True)
class State:
    """A network after `step` optimizer steps.

    Attributes:
        step: 0 before the first.
        parameters: by name, in the model's order.
        moments: None where they are not known (a series of checkpoints, imported weights; see
            `past_moments`); empty where the optimizer keeps none.
    """

    step: int
    parameters: dict[str, Tensor]
    moments: Moments | None

    def past_moments(self, where: object | None = None) -> Moments:
        """The moments from which the next step can be taken.

        Args:
            where: the state was read from, for the message.

        Raises:
            CircuitError: the state has none, or such as no past leaves behind: after a step they
                are a sum over the gradients so far, and zero in every parameter only without one.
        """
        if self.moments is None:
            wrong = "holds no optimizer moments"
        elif (empty := self._empty_moment()) is not None:
            wrong = f"holds {empty} that is zero in every parameter, which no step leaves behind"
        else:
            return self.moments
        raise CircuitError(
            f"the state of step {self.step} {wrong}, so the next step cannot be taken from it",
            where=where,
            expected="a checkpoint that the training itself has written",
            fix="reports on its weights work; to train on or to trace, train with `circuit train`",
        )

    def _empty_moment(self) -> str | None:
        """The moment that tells of no gradient, though steps have been taken."""
        if self.step == 0 or self.moments is None:
            return None
        names = [name for name in ("exp_avg_sq", "momentum_buffer") if self.moments.get(name)]
        return next((n for n in names if not any(t.any() for t in self.moments[n].values())), None)


@dataclass(frozen=True)
class FlatState:
    """Weights and moments after a step; vectors of `[parameter]`, of the parameters' dtype.

    Attributes:
        buffers: of the module, by name, where it has some that training changes.
        memory: digest of what the optimizer remembers beside m and v; empty where that is nothing.
    """

    step: int
    parameters: Flat
    moments: dict[str, Flat]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    memory: str = ""

    @classmethod
    def of(cls, state: State) -> FlatState:
        """The vectors of a state; raises as `State.past_moments`."""
        return cls.of_tensors(state.step, state.parameters, state.past_moments())

    @classmethod
    def of_tensors(
        cls,
        step: int,
        parameters: Mapping[str, Tensor],
        moments: Mapping[str, Mapping[str, Tensor]],
    ) -> FlatState:
        """The vectors of tensors by name, which are copied.

        A parameter of which nothing is remembered yet has zeros, as torch starts from.
        """
        from circuit.core.optimizers import is_moment

        layout = ParameterLayout.of_shapes({n: t.shape for n, t in parameters.items()})
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        flat: dict[str, Flat] = {}
        rest: dict[str, Tensor] = {}
        for moment, tensors in moments.items():
            whole = is_moment(moment, tensors, shapes)
            if whole:
                absent = {n: torch.zeros_like(parameters[n]) for n in shapes if n not in tensors}
                flat[moment] = layout.flatten({**tensors, **absent})
            if not whole or moment not in MOMENT_STAGES:
                rest |= {f"{moment} {name}": tensor for name, tensor in tensors.items()}
        memory = tensors_digest(rest) if rest else ""
        return cls(step, layout.flatten(parameters), flat, memory=memory)

    def stages(self) -> dict[str, str]:
        """sha256 of the parameters, of m and v, and of what else is remembered, by stage."""
        digests = {"parameters": tensor_digest(self.parameters)}
        for name, vector in self.moments.items():
            if name in MOMENT_STAGES:
                digests[MOMENT_STAGES[name]] = tensor_digest(vector)
        return digests | ({"memory": self.memory} if self.memory else {})
