"""A report on disk with a summary of the test's choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuit.config import digest_of


def made_report(
    path: str | Path,
    command: str,
    summary: Mapping[str, Any],
    parameters: Mapping[str, Any] | None = None,
    **provenance: Any,
) -> Path:
    """Writes it as `run_report` would."""
    payload = {
        "schema_version": 2,
        "command": command,
        "parameters": dict(parameters or {}),
        "law": "",
        "summary": dict(summary),
        "provenance": {"started_unix": 0.0, **provenance},
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**payload, "digest": digest_of(payload)}))
    return path
