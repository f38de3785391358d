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
from typing import TYPE_CHECKING

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.readout import read_answers
from circuit.scalars.base import Cache, Needs
from circuit.tasks.positions import Batch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

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

OF_THE_TARGET = (FIXED_TARGET, "target_best_wrong_logit")
"""Those whose competitor only the target of an interval has."""

LOGITS = "unembed.hook_out"


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


class AnswerScalar:
    """One smooth answer scalar over fixed reads; a `Scalar` that attribution can follow."""

    def __init__(
        self,
        name: str,
        batch: Batch,
        competitors: Int[Tensor, " read"] | None = None,
        *,
        values: range,
    ) -> None:
        """Describe the scalar.

        Args:
            name: one of `ANSWER_SCALARS` but the moving margin, which has kinks.
            batch: its reads are the examples.
            competitors: token id of the frozen competitor of each read. None takes them from the
                model before each step, which the scalars of the *source* competitor allow; then
                changes of different steps do not telescope.
            values: the value tokens, a contiguous range of ids.

        Raises:
            CircuitError: the name is unknown or the moving margin's, competitors are missing, or
                there is not one for each read.
        """
        check_scalar_names([name])
        if name == MOVING:
            raise CircuitError(
                f"{MOVING} has a kink wherever the competitor changes",
                expected=f"a smooth answer scalar, such as {FIXED_SOURCE}",
            )
        if name in OF_THE_TARGET and competitors is None:
            raise CircuitError(f"{name} needs the competitors at the target checkpoint")
        if competitors is not None and competitors.shape != batch.reads.answer.shape:
            raise CircuitError(
                f"{list(competitors.shape)} competitors", expected=f"one a read, {len(batch.reads)}"
            )
        self.name = name
        self.values_range = values
        self.reads = batch.reads
        sequences = tuple(
            tuple(row[:length].tolist())
            for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)
        )
        self.needs = Needs(sequences=sequences, hooks=(LOGITS,))
        self._tokens = batch.tokens
        self._competitors = None if competitors is None else competitors.to(batch.tokens.device)

    def bind(self, model: HookedTransformer) -> BoundAnswerScalar:
        """Freeze the competitors: the given ones, or the model's of this moment."""
        if self._competitors is not None or self.name in _WITHOUT_COMPETITOR:
            own = self.reads.answer if self._competitors is None else self._competitors
            return BoundAnswerScalar(self, own, constant=True)
        with torch.no_grad():
            logits = model(self._tokens)[self.reads.row, self.reads.key_pos]
        competitor = read_answers(logits, self.reads.answer, self.values_range).competitor
        return BoundAnswerScalar(self, competitor, constant=False)


_WITHOUT_COMPETITOR = ("correct_value_logit", "negative_answer_loss")


@dataclass(frozen=True)
class BoundAnswerScalar:
    """An answer scalar whose competitors are frozen."""

    scalar: AnswerScalar
    competitors: Int[Tensor, " read"]
    constant: bool

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """The scalar, one per read."""
        reads = self.scalar.reads
        logits = cache[LOGITS][reads.row, reads.key_pos]
        frozen = Competitors(self.competitors, self.competitors)
        return fixed_scalars(logits, reads.answer, frozen)[self.scalar.name]
