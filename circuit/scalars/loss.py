"""The loss itself, over the probe records: Loss Change Allocation with the optimizer's terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.readout import LOGITS
from circuit.options import Option, Slices
from circuit.scalars.base import Cache, Needs
from circuit.scalars.family import ScalarFamily
from circuit.tasks.examples import UNPREDICTED, Examples

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformer_lens import HookedTransformer

    from circuit.reports.inputs import Inputs

Scope = Literal["full_lm", "answer"]


class Loss(ScalarFamily):
    """Which tokens of the probe records are predicted, and which of them apart."""

    any_module: ClassVar[bool] = True

    scope: Annotated[
        Scope, Option("full_lm (what training predicts) or answer (of every read).")
    ] = "full_lm"
    slices: Slices = ()

    def check(self) -> None:
        """A slice is of answers."""
        super().check()
        if self.slices and self.scope != "answer":
            raise CircuitError(
                "only answers have slices", where="`slices`", expected="`scope` answer"
            )

    def build(self, inputs: Inputs) -> list[LossScalar]:
        """The one scalar, and one a value of each slice."""
        batch = inputs.batch
        apart = [
            (f".{by}{value}", mask)
            for by in self.slices
            for value, mask in batch.by_slice(by).items()
            if value != "all"
        ]
        return [
            LossScalar(batch, self.scope),
            *(LossScalar(batch.select(mask), self.scope, suffix) for suffix, mask in apart),
        ]


class LossScalar:
    """Cross-entropy in nats, a value for each predicted token; it telescopes."""

    constant = True

    def __init__(self, batch: Examples, scope: Scope = "full_lm", suffix: str = "") -> None:
        """Describe the scalar.

        Args:
            batch: its records, or the answers of its reads, are predicted.
            suffix: of the name, such as `.lag2` for answers of that lag.
        """
        self.name = f"loss.{scope}{suffix}"
        self.needs = Needs(batch.sequences(), (LOGITS,))
        self._exact = batch.task.loss_dtype == "float64"  # as in the training loss
        if scope == "answer":
            self._row, self._at = batch.row, batch.at
            self._target = batch.answer
            return
        targets = batch.targets()  # those of the training loss
        self._row, self._at = (targets != UNPREDICTED).nonzero(as_tuple=True)
        self._target = targets[self._row, self._at]

    def bind(self, model: HookedTransformer) -> LossScalar:
        """Nothing depends on the step."""
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """The loss of each predicted token."""
        logits = cache[LOGITS][self._row, self._at]
        if self._exact:
            logits = logits.double()
        return torch.nn.functional.cross_entropy(logits, self._target, reduction="none")
