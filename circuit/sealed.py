"""JSON documents of this program that hold a digest of themselves: no digit of them can change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuit.config import digest_of
from circuit.errors import CircuitError

_DIGEST = "digest"


def sealed(payload: Mapping[str, Any]) -> dict[str, Any]:
    """A document as it is written: its last key is a digest of the others."""
    return {**payload, _DIGEST: digest_of(dict(payload))}


def unsealed(payload: Mapping[str, Any], *, where: object, fix: str) -> dict[str, Any]:
    """A document as it was before it was sealed; those of version 0.1.0 have no digest.

    Args:
        payload: as it stands in the file.
        where: the file.
        fix: what to do about one that was changed.

    Raises:
        CircuitError: it is not what was written.
    """
    content = dict(payload)
    stored = content.pop(_DIGEST, None)
    if stored is not None and stored != digest_of(content):
        raise CircuitError(
            "was changed after it was written: its digest is another", where=where, fix=fix
        )
    return content
