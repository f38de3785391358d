"""One side of some pairs over one interval: answer scalars at both ends, parts of their changes.

First order and curvature come from the line integral of the smooth scalars (definitions.md section
5). The moving margin has those of the fixed source margin, and the switch of competitor, which is
exact; the other scalars have no switch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from circuit.attribution.line import Line, LineIntegral, Values
from circuit.lazy import torch
from circuit.model.readout import read_answers
from circuit.scalars.answers import (
    FIXED_SOURCE,
    MOVING,
    Competitors,
    answer_scalars,
    fixed_scalars,
    switch_part,
    top_wrong,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What became of the answers.

    Attributes:
        columns: of `ScalarPairRow`, one entry a pair.
        line: the integral that gave first order and curvature.
        split_error: largest |change of moving margin - change of fixed source margin - switch|.
    """

    columns: dict[str, list[Any]]
    line: LineIntegral
    split_error: float

    @classmethod
    def along(
        cls,
        line: Line,
        answer: Tensor,
        values: range,
        *,
        scalars: Sequence[str],
        top_k_wrong: int,
        progress: Callable[[int, int], None],
    ) -> Change:
        """Follow the answers along a line.

        Args:
            line: between the two checkpoints, at the prediction positions.
            answer: token ids of the right values, `[pair]`.
            values: the value tokens.
            scalars: some of `ANSWER_SCALARS`.
            top_k_wrong: that many of the best wrong values are listed.
            progress: see `Line.integrate`.
        """
        competitors = Competitors(
            *(read_answers(logits, answer, values).competitor for logits in line.ends)
        )
        needed = {_smooth(name) for name in scalars}

        def smooth(logits: Tensor) -> Values:
            every = fixed_scalars(logits, answer, competitors)
            return {name: value for name, value in every.items() if name in needed}

        source, target = (answer_scalars(x, answer, competitors, values) for x in line.ends)
        switch = switch_part(line.ends[1], answer, competitors, values)
        integral = line.integrate(smooth, progress)
        moving, fixed = (target[name] - source[name] for name in (MOVING, FIXED_SOURCE))
        zero = torch.zeros_like(switch)
        by_scalar: dict[str, Values] = {
            "source_values": source,
            "target_values": target,
            "deltas": {n: target[n] - source[n] for n in scalars},
            "first_order": {n: integral.first_order[_smooth(n)] for n in scalars},
            "curvature": {n: integral.curvature[_smooth(n)] for n in scalars},
            "switch": {n: switch if n == MOVING else zero for n in scalars},
        }
        tops = [top_wrong(logits, answer, values, top_k_wrong) for logits in line.ends]
        columns = {
            "answer": answer.tolist(),
            "source_competitor": competitors.source.tolist(),
            "target_competitor": competitors.target.tolist(),
            "switched": competitors.switched.tolist(),
            "source_top_wrong": _token_logits(*tops[0]),
            "target_top_wrong": _token_logits(*tops[1]),
            **{
                column: _by_pair({name: of[name] for name in scalars})
                for column, of in by_scalar.items()
            },
        }
        return cls(columns, integral, float((moving - fixed - switch).abs().max()))


def _smooth(name: str) -> str:
    """The smooth scalar whose integral gives a scalar's first order and curvature."""
    return FIXED_SOURCE if name == MOVING else name


def _by_pair(values: Values) -> list[dict[str, float]]:
    columns = (value.tolist() for value in values.values())
    return [dict(zip(values, row, strict=True)) for row in zip(*columns, strict=True)]


def _token_logits(tokens: Tensor, logits: Tensor) -> list[list[dict[str, float]]]:
    return [
        [{"token": token, "logit": logit} for token, logit in zip(*both, strict=True)]
        for both in zip(tokens.tolist(), logits.tolist(), strict=True)
    ]
