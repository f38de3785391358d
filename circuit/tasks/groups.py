"""Reads by the token that they share, and the fixed halves of a set of reads (definitions.md 6)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.tasks.positions import Batch, check_roles, role_mask, role_positions

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64
    from torch import Tensor

GROUPS = ("answer_value", "support_value", "query_key", "support_key", "position_token")
SINGLE_ROLES = ("prediction", "query_key", "support_op", "support_key", "support_value")
"""The roles that are one position of a read."""


def group_tokens(batch: Batch, group_by: str, role: str) -> Int64[Tensor, " read"]:
    """The token id by which each read is grouped; `position_token` is the token at `role`.

    In a valid record the support's value is the answer and its key the query's, so that
    `answer_value` and `support_value`, and the two keys, group alike.

    Raises:
        CircuitError: there is no such grouping, or the role has several positions and the token at
            it is asked for.
    """
    check_group(group_by, role)
    reads = batch.reads
    if group_by == "answer_value":
        return reads.answer
    if group_by == "query_key":
        return reads.key
    at = {
        "support_value": reads.support_value_pos,
        "support_key": reads.support_key_pos,
    }.get(group_by)
    if at is None:
        at = single_position(batch, role)
    return batch.tokens[reads.row, at]


def check_group(group_by: str, role: str) -> None:
    """Refuse a grouping that does not exist, or that a role does not allow.

    Raises:
        CircuitError: as `group_tokens`.
    """
    check_roles(role)
    if group_by not in GROUPS:
        raise CircuitError(f"unknown group-by '{group_by}'", expected=f"one of {', '.join(GROUPS)}")
    if group_by == "position_token":
        check_single(role)


def check_single(role: str) -> None:
    """Refuse a role that does not exist, or that has several positions.

    Raises:
        CircuitError: lists those that have one.
    """
    check_roles(role)
    if role not in SINGLE_ROLES:
        raise CircuitError(
            f"role '{role}' has several positions", expected=f"one of {', '.join(SINGLE_ROLES)}"
        )


def single_position(batch: Batch, role: str) -> Int64[Tensor, " read"]:
    """The position of a role that is one token of each read.

    Raises:
        CircuitError: there is no such role, or it has several positions.
    """
    check_single(role)
    return role_positions(batch, role)[0][:, 0]


def nonempty_mask(batch: Batch, role: str) -> Bool[Tensor, "read pos"]:
    """`role_mask`, for what needs at least one position of every read.

    Raises:
        CircuitError: there is no such role, or a read has no position of it.
    """
    mask = role_mask(batch, role)
    empty = (~mask.any(1)).nonzero()[:, 0].tolist()
    if empty:
        sample = batch.sample_ids[int(batch.reads.row[empty[0]])]
        raise CircuitError(
            f"{len(empty)} reads have no position of role '{role}'", where=f"the first in {sample}"
        )
    return mask


def is_for_fitting(batch: Batch, fraction: float) -> Bool[Tensor, " read"]:
    """Which reads are for fitting, the others being for evaluation; the same in every run.

    A read is for fitting if the first 8 bytes (big-endian) of sha256("sample_id:read_index"),
    divided by 2^64, are below `fraction`.
    """
    reads = batch.reads
    names = [
        f"{batch.sample_ids[row]}:{index}"
        for row, index in zip(reads.row.tolist(), reads.index.tolist(), strict=True)
    ]
    drawn = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
    return torch.tensor(
        [int.from_bytes(first, "big") < fraction * 2**64 for first in drawn],
        device=reads.row.device,
    )
