"""The kind of model that the installed TransformerLens builds, for laws that hold for both."""

from __future__ import annotations

from typing import Any

from circuit.model.kinds import installed_kind


def of_installed(payload: dict[str, Any]) -> dict[str, Any]:
    """A training config's JSON, whose model the installed TransformerLens builds."""
    if installed_kind() == "hooked_transformer":
        return payload
    return {**payload, "model": {**payload["model"], "kind": "bridge"}, "kernels": "plain"}
