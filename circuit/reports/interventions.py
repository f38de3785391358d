"""Change the residual stream at one stage and role of many reads, and read their logits.

In `single_query` each read has its own row, in which only its own positions are changed; in
`batch_union` all reads of a record share one row, in which the positions of all of them are. Only
what lies downstream of the stage is run, from clean states that are computed once; a row ends at
its last prediction position, since what comes later cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from circuit.lazy import torch
from circuit.model.stages import run_from
from circuit.tasks.positions import Batch, role_mask

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

QueryMode = Literal["single_query", "batch_union"]

_ROWS = 128
"""Rows of one forward pass."""


@dataclass(frozen=True)
class _Rows:
    """What is run: the record that each row holds, where it is changed, where its reads stand."""

    record: Int[Tensor, " row"]
    changed: Bool[Tensor, "row pos"]
    end: Int[Tensor, " row"]
    """Position after the row's last prediction."""
    of_read: Int[Tensor, " read"]


def intervene(
    model: HookedTransformer,
    stage: str,
    clean: Float[Tensor, "batch pos d_model"],
    batch: Batch,
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
    rows, predicted_at = _rows(batch, role, mode), batch.reads.key_pos
    logits = clean.new_empty(len(batch.reads), model.cfg.d_vocab_out)
    order = rows.end.argsort(stable=True)  # rows of one pass are alike in length: little padding
    for start in range(0, len(order), _ROWS):
        chosen = order[start : start + _ROWS]
        width = max(int(rows.end[chosen].max()), 1)
        changed = rows.changed[chosen, :width]
        states = clean[rows.record[chosen], :width]
        states[changed] = change(states[changed])
        place = torch.full_like(rows.end, -1)
        place[chosen] = torch.arange(len(chosen), device=place.device)
        reads = (place[rows.of_read] >= 0).nonzero()[:, 0]
        at = place[rows.of_read[reads]], predicted_at[reads]
        logits[reads] = run_from(model, stage, states)[at]
    return logits


def _rows(batch: Batch, role: str, mode: QueryMode) -> _Rows:
    reads, mask = batch.reads, role_mask(batch, role)
    if mode == "single_query":
        own = torch.arange(len(reads), device=mask.device)
        return _Rows(reads.row, mask, reads.key_pos + 1, own)
    records = torch.arange(len(batch.tokens), device=mask.device)
    changed = torch.zeros(batch.tokens.shape, dtype=torch.int64, device=mask.device)
    changed.index_add_(0, reads.row, mask.long())
    end = torch.zeros_like(records).scatter_reduce(0, reads.row, reads.key_pos + 1, "amax")
    return _Rows(records, changed > 0, end, reads.row)
