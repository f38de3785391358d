"""Which positions a query's scores are compared between, by role."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.tasks.examples import Examples

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor


def compared_positions(
    batch: Examples, query_role: str, support_role: str, distractor_role: str
) -> tuple[Int[Tensor, " read"], Bool[Tensor, "read pos"], Bool[Tensor, "read pos"]]:
    """The query's position in every read, and masks of its support and its distractors.

    A read may have no support or no distractor: whether it is left out is the caller's choice.

    Raises:
        CircuitError: there is no such role, the query role has several positions, a compared
            position lies behind the query, or one is both support and distractor.
    """
    query = batch.role(query_role)
    if (query.sum(1) != 1).any():
        raise CircuitError(
            f"role '{query_role}' has several positions", expected="one query position a read"
        )
    place = query.int().argmax(1)
    support, distractors = batch.role(support_role), batch.role(distractor_role)
    behind = torch.arange(query.shape[1], device=query.device) > place[:, None]
    for role, mask in ((support_role, support), (distractor_role, distractors)):
        if (mask & behind).any():
            raise CircuitError(
                f"role '{role}' has positions behind the query '{query_role}'",
                expected="positions that the query can attend to",
            )
    both = (support & distractors).any(1)
    if both.any():
        raise CircuitError(
            f"roles '{support_role}' and '{distractor_role}' share positions",
            where=batch.sample_ids[int(batch.row[both][0])],
            expected="a position to be support or distractor",
        )
    return place, support, distractors
