"""Path rules are exact for the polynomials that they are known for."""

from __future__ import annotations

import pytest

from circuit.core.paths import PathRule, clenshaw_curtis, path_rule
from circuit.errors import CircuitError


def integral(rule: PathRule, degree: int) -> float:
    return sum(w * s**degree for s, w in zip(rule.nodes, rule.weights, strict=True))


@pytest.mark.parametrize(
    ("name", "exact"), [("midpoint", 1), ("simpson", 3), ("gauss:1", 1), ("gauss:5", 9)]
)
def test_a_rule_is_exact_up_to_its_degree_and_no_further(name: str, exact: int) -> None:
    rule = path_rule(name)
    assert rule.name == name
    assert all(0 <= node <= 1 for node in rule.nodes)
    for degree in range(exact + 1):
        assert integral(rule, degree) == pytest.approx(1 / (degree + 1), abs=1e-14)
    assert integral(rule, exact + 1) != pytest.approx(1 / (exact + 2), abs=1e-9)


@pytest.mark.parametrize("intervals", [2, 4, 8, 16])
def test_clenshaw_and_curtis_rule_is_exact_for_polynomials_and_nested(intervals: int) -> None:
    rule = clenshaw_curtis(intervals)
    assert rule.nodes[0] == 0.0
    assert rule.nodes[-1] == 1.0
    assert set(rule.nodes) <= set(clenshaw_curtis(2 * intervals).nodes)
    for degree in range(intervals + 2):
        total = sum(w * s**degree for s, w in zip(rule.nodes, rule.weights, strict=True))
        assert total == pytest.approx(1 / (degree + 1), abs=1e-13)


@pytest.mark.parametrize("name", ["euler", "gauss:0", "gauss:100", "gauss:", "Simpson", ""])
def test_an_unknown_rule_is_named(name: str) -> None:
    with pytest.raises(CircuitError, match=f"unknown path rule '{name}'; expected midpoint"):
        path_rule(name)
