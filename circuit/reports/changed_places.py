"""Vectors of a stage and role replaced, and the rest of the network run on from there.

In `single_query` each read has its own row, in which only its own positions are changed; in
`batch_union` all reads of a record share one row, in which the positions of all of them are. Only
what lies downstream of the stage is run, from clean states that are computed once; a row ends at
its last prediction position, since what comes later cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from circuit.lazy import torch
from circuit.model.stages import run_from
from circuit.tasks.examples import Examples

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

QueryMode = Literal["single_query", "batch_union"]

_ROWS = 128
"""Rows of one forward pass."""


@dataclass(frozen=True)
class ChangedPlaces:
    """What is run: the record that each row holds, where it is changed, where its reads stand."""

    record: Int[Tensor, " row"]
    changed: Bool[Tensor, "row pos"]
    end: Int[Tensor, " row"]
    """Position after the row's last prediction."""
    of_read: Int[Tensor, " read"]

    @classmethod
    def of(cls, batch: Examples, role: str, mode: QueryMode) -> Self:
        """Of a role.

        Raises:
            CircuitError: there is no such role.
        """
        mask = batch.role(role)
        if mode == "single_query":
            each = torch.arange(len(batch), device=mask.device)
            return cls(batch.row, mask, batch.at + 1, each)
        records = torch.arange(len(batch.tokens), device=mask.device)
        changed = torch.zeros(batch.tokens.shape, dtype=torch.int64, device=mask.device)
        changed.index_add_(0, batch.row, mask.long())
        end = torch.zeros_like(records).scatter_reduce(0, batch.row, batch.at + 1, "amax")
        return cls(records, changed > 0, end, batch.row)

    @property
    def of_places(self) -> Int[Tensor, " place"]:
        """The record of every changed place: row by row, position by position."""
        return self.record[self.changed.nonzero()[:, 0]]

    def vectors(self, states: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "place d_model"]:
        """Of every changed place, in this order."""
        row, pos = self.changed.nonzero().unbind(1)
        return states[self.record[row], pos]

    @cached_property
    def passes(self) -> list[_Pass]:
        """What is run at once: rows that are alike in length, for little padding."""
        places = torch.zeros_like(self.changed, dtype=torch.int64)
        places[self.changed] = torch.arange(int(self.changed.sum()), device=places.device)
        found = []
        for rows in torch.split(self.end.argsort(stable=True), _ROWS):
            width = max(int(self.end[rows].max()), 1)
            changed = self.changed[rows, :width]
            found.append(_Pass(rows, width, changed, places[rows, :width][changed]))
        return found

    def each(
        self, change: Callable[[Tensor], Tensor], vectors: Float[Tensor, "place d_model"]
    ) -> Float[Tensor, "place d_model"]:
        """Vectors changed each by itself, pass by pass: another number at once moves last bits."""
        changed = vectors.clone()
        for one in self.passes:
            changed[one.places] = change(vectors[one.places])
        return changed


class _Pass(NamedTuple):
    rows: Int[Tensor, " row"]
    width: int
    changed: Bool[Tensor, "row pos"]
    places: Int[Tensor, " place"]
    """The number of each changed place, in the order of the rows."""


def intervene(
    model: HookedTransformer,
    stage: str,
    clean: Float[Tensor, "batch pos d_model"],
    batch: Examples,
    role: str,
    change: Callable[[Float[Tensor, "place d_model"]], Float[Tensor, "place d_model"]],
    mode: QueryMode = "single_query",
) -> Float[Tensor, "read vocab"]:
    """Logits at every read's prediction position, with the vectors of a stage and role changed.

    Args:
        clean: the residual stream at the stage, of every row of the batch.
        change: takes vectors to their replacements, each by itself.

    Raises:
        CircuitError: there is no such stage or role.
    """
    rows = ChangedPlaces.of(batch, role, mode)
    vectors = rows.each(change, rows.vectors(clean))
    return run_changed(model, stage, clean, batch, rows, vectors)


def run_changed(
    model: HookedTransformer,
    stage: str,
    clean: Float[Tensor, "batch pos d_model"],
    batch: Examples,
    rows: ChangedPlaces,
    vectors: Float[Tensor, "place d_model"],
) -> Float[Tensor, "read vocab"]:
    """The same, with these vectors at the changed places."""
    logits = clean.new_empty(len(batch), model.cfg.d_vocab_out)
    for chosen, width, changed, places in rows.passes:
        states = clean[rows.record[chosen], :width]
        states[changed] = vectors[places]
        place = torch.full_like(rows.end, -1)
        place[chosen] = torch.arange(len(chosen), device=place.device)
        reads = (place[rows.of_read] >= 0).nonzero()[:, 0]
        at = place[rows.of_read[reads]], batch.at[reads]
        logits[reads] = run_from(model, stage, states)[at]
    return logits
