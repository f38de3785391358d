"""Answer scalars over fixed reads, as attribution follows them: all but the moving margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from circuit import options
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.readout import LOGITS, logits_of, read_answers
from circuit.scalars.answers import (
    ANSWER_SCALARS,
    FIXED_SOURCE,
    MOVING,
    OF_THE_TARGET,
    Competitors,
    check_scalar_names,
    fixed_scalars,
)
from circuit.scalars.base import Cache, Needs
from circuit.scalars.family import ScalarFamily
from circuit.tasks.examples import Examples

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

    from circuit.reports.inputs import Inputs
    from circuit.runs.base import Replayable


class AnswerScalar:
    """One smooth answer scalar over fixed reads; a `Scalar` that attribution can follow."""

    def __init__(
        self,
        name: str,
        batch: Examples,
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
            raise _kinked()
        if name in OF_THE_TARGET and competitors is None:
            raise CircuitError(f"{name} needs the competitors at the target checkpoint")
        if competitors is not None and competitors.shape != batch.answer.shape:
            raise CircuitError(
                f"{list(competitors.shape)} competitors", expected=f"one a read, {len(batch)}"
            )
        self.name = name
        self.values_range = values
        self.reads = batch
        self.needs = Needs(batch.sequences(), (LOGITS,))
        self._tokens = batch.tokens
        self._competitors = None if competitors is None else competitors.to(batch.tokens.device)

    def bind(self, model: HookedTransformer) -> BoundAnswerScalar:
        """Freeze the competitors: the given ones, or the model's of this moment."""
        if self._competitors is not None or self.name in _WITHOUT_COMPETITOR:
            competitors = self.reads.answer if self._competitors is None else self._competitors
            return BoundAnswerScalar(self, competitors, constant=True)
        with torch.no_grad():
            logits = logits_of(model, self._tokens)[self.reads.row, self.reads.at]
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
        logits = cache[LOGITS][reads.row, reads.at]
        frozen = Competitors(self.competitors, self.competitors)
        return fixed_scalars(logits, reads.answer, frozen)[self.scalar.name]


class AnswerScalars(ScalarFamily, options.PairOptions):
    """Which answer scalars are followed, over one side of pairs (definitions.md section 5)."""

    any_module: ClassVar[bool] = True

    scalars: Annotated[
        tuple[str, ...],
        options.Option(
            "Answer scalar; the moving margin has kinks.", flag="--scalar", choices=ANSWER_SCALARS
        ),
    ] = (FIXED_SOURCE,)
    source_step: Annotated[
        int | None,
        options.Option(
            "Step whose best wrong values are the source's competitors.",
            least=0,
            unset="the one before each step",
        ),
    ] = None
    target_step: Annotated[
        int | None,
        options.Option("Step whose best wrong values are the target's competitors.", least=0),
    ] = None
    record_side: options.RecordSide = "clean"

    def check(self) -> None:
        """Only smooth scalars can be followed, and the target's competitors need its step."""
        super().check()
        for name in self.scalars:
            if name == MOVING:
                raise _kinked("`scalars`")
            if name in OF_THE_TARGET and self.target_step is None:
                raise CircuitError(
                    f"{name} needs the competitors of a target",
                    where="`scalars`",
                    fix="give `target_step`",
                )

    def check_run(self, run: Replayable) -> None:
        """The steps of the competitors have to be addressable."""
        for step in (self.source_step, self.target_step):
            if step is not None:
                run.check_addressable(step)

    def build(self, inputs: Inputs) -> list[AnswerScalar]:
        """One scalar a name."""
        batch = inputs.side(inputs.pairs(self), self.record_side)
        values = inputs.task.choices

        def competitors(step: int | None) -> Tensor | None:
            if step is None:
                return None
            with torch.no_grad():
                logits = logits_of(inputs.point(step).model, batch.tokens)[batch.row, batch.at]
            return read_answers(logits, batch.answer, values).competitor

        of_end = {False: competitors(self.source_step), True: competitors(self.target_step)}
        return [
            AnswerScalar(name, batch, of_end[name in OF_THE_TARGET], values=values)
            for name in self.scalars
        ]


def _kinked(where: str | None = None) -> CircuitError:
    return CircuitError(
        f"{MOVING} has a kink wherever the competitor changes",
        where=where,
        expected=f"a smooth answer scalar, such as {FIXED_SOURCE}",
    )
