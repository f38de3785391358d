"""Examples by the token that they share, and the fixed halves of a set (definitions.md 6)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.tasks.base import Task
from circuit.tasks.examples import Examples, check_single

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64
    from torch import Tensor

OF_ANSWER, OF_POSITION = "answer_value", "position_token"
"""Groupings of every task, beside those by the token at a role of one position."""


def group_tokens(examples: Examples, group_by: str, role: str) -> Int64[Tensor, " example"]:
    """The token id by which each example is grouped; `position_token` is the token at `role`.

    Raises:
        CircuitError: there is no such grouping, or the role has several positions and the token at
            it is asked for.
    """
    check_group(examples.task, group_by, role)
    if group_by == OF_ANSWER:
        return examples.answer
    place = examples.position(role if group_by == OF_POSITION else group_by)
    return examples.tokens[examples.row, place]


def check_group(task: Task | type[Task], group_by: str, role: str) -> None:
    """Refuse a grouping that does not exist, or that a role does not allow.

    Raises:
        CircuitError: as `group_tokens`.
    """
    task.check_roles(role)
    groups = groups_of(task)
    if group_by not in groups:
        raise CircuitError(f"unknown group-by '{group_by}'", expected=f"one of {', '.join(groups)}")
    if group_by == OF_POSITION:
        check_single(task, role)


def groups_of(task: Task | type[Task]) -> tuple[str, ...]:
    """The groupings of a task's examples."""
    return (OF_ANSWER, *task.single_roles(), OF_POSITION)


def nonempty_mask(examples: Examples, role: str) -> Bool[Tensor, "example pos"]:
    """`Examples.role`, for what needs at least one position of every example.

    Raises:
        CircuitError: there is no such role, or an example has no position of it.
    """
    mask = examples.role(role)
    empty = (~mask.any(1)).nonzero()[:, 0].tolist()
    if empty:
        sample = examples.sample_ids[int(examples.row[empty[0]])]
        raise CircuitError(
            f"{len(empty)} reads have no position of role '{role}'", where=f"the first in {sample}"
        )
    return mask


def is_for_fitting(examples: Examples, fraction: float) -> Bool[Tensor, " example"]:
    """Which examples are for fitting, the others being for evaluation; the same in every run.

    One is for fitting if the first 8 bytes (big-endian) of sha256("sample_id:index"), divided by
    2^64, are below `fraction`.
    """
    names = [
        f"{examples.sample_ids[row]}:{index}"
        for row, index in zip(examples.row.tolist(), examples.index.tolist(), strict=True)
    ]
    drawn = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
    return torch.tensor(
        [int.from_bytes(first, "big") < fraction * 2**64 for first in drawn],
        device=examples.row.device,
    )
