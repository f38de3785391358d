"""What has to be the same on both sides of the seam between two shards of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuit.errors import CircuitError

MERGED = "shard_overrides"
"""Where a merged report tells the overrides of its shards."""
_OF_A_CALL = (
    *("overrides", "trace", "environment", "started_unix", "seconds"),
    *("merged_from", MERGED),
)


def inputs_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What was read, but for the trace, and what families say of theirs."""
    return {name: fact for name, fact in provenance.items() if name not in _OF_A_CALL}


def refuse_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, where: Path, expected: str
) -> None:
    """Refuse two shards that were made otherwise.

    Args:
        where: the folder of theirs.

    Raises:
        CircuitError: names the first setting that differs, with both values.
    """
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise CircuitError(
                f"the shards differ in {name}: {ours.get(name)!r} and {theirs.get(name)!r}",
                where=where,
                expected=expected,
            )
