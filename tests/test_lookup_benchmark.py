"""benchmarks/lookup_seeds.py: a line of its table, whatever a claim's numbers are."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from circuit.reports.claims_comparison import _over_seeds

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.25, 0.25], "0.25"),
        ([1.0, 3.0], "2 (-10.7 to 14.7), 1 to 3"),
        ([None, 3.0], "3, 3 to 3"),
        ([None, None], "-"),
        (["L1H1", "L2H0"], "L1H1, L2H0"),
        ([None, "L2H0"], "-, L2H0"),
    ],
)
def test_a_number_may_be_undefined_in_some_seeds(
    monkeypatch: pytest.MonkeyPatch, values: list[Any], told: str
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("lookup_seeds")
    numbers = {"of_it": _over_seeds(dict(enumerate(values)))}
    claim = {"claim": "it holds", "holds": 1, "judged": 2, "numbers": numbers}
    assert script.claim_line(claim) == f"| it holds | 1 of 2 | of it {told} |"
