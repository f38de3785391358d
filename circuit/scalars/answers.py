"""Answer scalars: what the logits at the prediction position say about one right answer.

Over an interval between two checkpoints (definitions.md section 5), with the *competitor* the best
of the other value tokens:

    moving_answer_margin             logit of the answer - logit of the competitor of the moment
    correct_value_logit              logit of the answer
    negative_answer_loss             log-probability of the answer over the whole vocabulary
    fixed_{source,target}_competitor_margin
                                     logit of the answer - logit of that end's competitor
    {source,target}_best_wrong_logit logit of that end's competitor

All but the first are smooth in the weights, for their tokens are fixed; the first has a kink
wherever the competitor changes, so that only the others may be followed along a path:

    change of the moving margin = change of the fixed source margin + switch
    switch = (source competitor's logit - best wrong logit) at the target <= 0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.readout import read_answers
from circuit.options import Option

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

MOVING = "moving_answer_margin"
FIXED_SOURCE = "fixed_source_competitor_margin"
FIXED_TARGET = "fixed_target_competitor_margin"
ANSWER_SCALARS = (
    MOVING,
    "correct_value_logit",
    "negative_answer_loss",
    FIXED_SOURCE,
    FIXED_TARGET,
    "source_best_wrong_logit",
    "target_best_wrong_logit",
)
"""The answer scalars of definitions.md section 5, in its order."""

ScalarNames = Annotated[
    tuple[str, ...],
    Option("Answer scalar.", flag="--scalar", choices=ANSWER_SCALARS, unset="all"),
]

OF_THE_TARGET = (FIXED_TARGET, "target_best_wrong_logit")
"""Those whose competitor only the target of an interval has."""


@dataclass(frozen=True)
class Competitors:
    """Token ids of the best wrong values at both ends of an interval."""

    source: Int[Tensor, " read"]
    target: Int[Tensor, " read"]

    @property
    def switched(self) -> Bool[Tensor, " read"]:
        """Whether they differ."""
        return self.source != self.target


def fixed_scalars(
    logits: Float[Tensor, "read vocab"], answer: Int[Tensor, " read"], competitors: Competitors
) -> dict[str, Float[Tensor, " read"]]:
    """The smooth answer scalars, by name: every one but the moving margin.

    Args:
        logits: at the prediction positions.
        answer: token ids of the right values.
    """

    def of(tokens: Tensor) -> Tensor:
        return logits.gather(-1, tokens[:, None])[:, 0]

    correct, source, target = of(answer), of(competitors.source), of(competitors.target)
    return {
        "correct_value_logit": correct,
        "negative_answer_loss": correct - logits.logsumexp(-1),
        FIXED_SOURCE: correct - source,
        FIXED_TARGET: correct - target,
        "source_best_wrong_logit": source,
        "target_best_wrong_logit": target,
    }


def answer_scalars(
    logits: Float[Tensor, "read vocab"],
    answer: Int[Tensor, " read"],
    competitors: Competitors,
    values: range,
) -> dict[str, Float[Tensor, " read"]]:
    """Every answer scalar, by name, in the order of `ANSWER_SCALARS`.

    Args:
        values: the value tokens, a contiguous range of ids.
    """
    moving = read_answers(logits, answer, values).margin
    return {MOVING: moving, **fixed_scalars(logits, answer, competitors)}


def switch_part(
    target_logits: Float[Tensor, "read vocab"],
    answer: Int[Tensor, " read"],
    competitors: Competitors,
    values: range,
) -> Float[Tensor, " read"]:
    """What a change of competitor takes from the moving margin; never above zero."""
    best_wrong = read_answers(target_logits, answer, values).best_wrong
    return target_logits.gather(-1, competitors.source[:, None])[:, 0] - best_wrong


def top_wrong(
    logits: Float[Tensor, "read vocab"], answer: Int[Tensor, " read"], values: range, count: int
) -> tuple[Int[Tensor, "read rank"], Float[Tensor, "read rank"]]:
    """Token ids and logits of the best wrong values, the best first."""
    among = logits[:, values.start : values.stop]
    wrong = among.scatter(1, (answer - values.start)[:, None], -torch.inf)
    best, place = wrong.topk(count)
    return place + values.start, best


def check_scalar_names(names: Iterable[str]) -> None:
    """Refuse a name that is no answer scalar.

    Raises:
        CircuitError: lists the valid ones.
    """
    for name in names:
        if name not in ANSWER_SCALARS:
            raise CircuitError(
                f"unknown answer scalar '{name}'", expected=f"one of {', '.join(ANSWER_SCALARS)}"
            )
