"""How two executions of a step differ: first stage, first tensor, how many elements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from circuit.core.state import MOMENT_STAGES, State
from circuit.lazy import torch
from circuit.trace.step import STAGES, TracedStep

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """Where two states part."""

    stage: str
    tensor: str
    elements: int
    """Elements of the tensor that are not equal."""
    size: int
    largest: float
    """Largest absolute difference."""

    def __str__(self) -> str:
        return (
            f"{self.stage} {self.tensor}: {self.elements} of {self.size} elements differ, by at"
            f" most {self.largest:.3g}"
        )


def state_difference(one: State, other: State) -> Difference | None:
    """The first tensor in which two states are not equal bits, or None (0.0 and -0.0 differ)."""
    groups: list[tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]]] = [
        ("parameters", one.parameters, other.parameters)
    ]
    past, others = one.past_moments(), other.past_moments()
    groups += [
        (MOMENT_STAGES.get(moment, moment), past.get(moment, {}), others.get(moment, {}))
        for moment in {**past, **others}
    ]
    for stage, ours, theirs in groups:
        for name in {**ours, **theirs}:
            tensor, their = ours.get(name), theirs.get(name)
            if tensor is None or their is None:  # remembered of a parameter by one of them alone
                size = next(one.numel() for one in (tensor, their) if one is not None)
                return Difference(stage, name, size, size, math.inf)
            apart = _bits(tensor) != _bits(their)
            if apart.any():
                gap = (tensor.double() - their.double()).abs().max()
                return Difference(stage, name, int(apart.sum()), tensor.numel(), float(gap))
    return None


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def first_stage_that_differs(step: TracedStep, row: Mapping[str, Any]) -> str | None:
    """The first of `STAGES` in which a replayed step is not the recorded one, or None.

    The state after the step and the exact loss and gradient norm decide whether anything differs;
    the other stages are digested only to say where it began.
    """
    recorded = {**row["digests"], "loss": row["loss"], "grad_norm": row["grad_norm"]}
    decisive = [*step.final_stages, "loss", "grad_norm"]
    if all(recorded.get(stage) == step.stage(stage) for stage in decisive):
        return None
    return next(stage for stage in STAGES if recorded.get(stage) != step.stage(stage))


CAUSES = {
    "batch": "the data: another benchmark, seed or batch size",
    "logits": "the CPU, the attention kernel, compilation, precision or a shape",
    "loss": "the CPU, the attention kernel, compilation, precision or a shape",
    "gradient": "the thread count, or the order of rows or sums",
    "grad_norm": "the order of sums in the norm",
    "parameters": "the optimizer's flags or implementation",
    "m": "the optimizer's flags or implementation",
    "v": "the optimizer's flags or implementation",
    "memory": "the optimizer's flags or implementation",
}
"""What usually moves each stage first (docs/exactness.md)."""
