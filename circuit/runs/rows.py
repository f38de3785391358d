"""Row files as data frames."""

from __future__ import annotations

from pathlib import Path

from circuit.artifacts import read_jsonl
from circuit.lazy import pd


def read_rows(path: str | Path) -> pd.DataFrame:
    """A row file (JSON Lines) as a DataFrame; nested objects become dotted columns.

    Raises:
        CircuitError: the file is missing, or a line is damaged (file and line named).
    """
    return pd.json_normalize(read_jsonl(Path(path)))
