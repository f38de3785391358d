"""Path rules are exact for the polynomials that they are known for, and converge at kinks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from circuit.core.paths import Quadrature, clenshaw_curtis, midpoints, path_rule, simpson
from circuit.errors import CircuitError


def integral(level: Quadrature, function: Callable[[float], float]) -> float:
    return sum(w * function(s) for s, w in zip(level.nodes, level.weights, strict=True))


FIXED = [("midpoint", 1), ("midpoint:1", 1), ("midpoint:10", 1), ("simpson", 3), ("gauss:1", 1)]
FIXED += [("gauss:5", 9)]


@pytest.mark.parametrize(("name", "exact"), [*FIXED, ("auto:1e-3", 3)])
def test_a_rule_is_exact_up_to_its_degree_and_no_further(name: str, exact: int) -> None:
    rule = path_rule(name)
    assert rule.name == name
    for level in rule.levels:
        assert all(0 <= node <= 1 for node in level.nodes)
        assert sum(level.weights) == pytest.approx(1, abs=1e-14)
        for degree in range(exact + 1):
            found = integral(level, lambda s, degree=degree: s**degree)
            assert found == pytest.approx(1 / (degree + 1), abs=1e-14)
        above = integral(level, lambda s: s ** (exact + 1))
        assert above != pytest.approx(1 / (exact + 2), abs=1e-10)


@pytest.mark.parametrize(("family", "order"), [("midpoint", 2), ("simpson", 4)])
def test_composite_rules_converge_with_their_order(family: str, order: int) -> None:
    def error(intervals: int) -> float:
        level = midpoints(intervals) if family == "midpoint" else simpson(intervals)
        return abs(integral(level, math.exp) - (math.e - 1))

    for intervals in (4, 8, 16):
        ratio = error(intervals) / error(2 * intervals)
        assert ratio == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("jump", [0.0, 0.123, 0.5, 1 / 3, 0.871])
def test_at_a_jump_the_error_is_bounded_by_the_width_of_an_interval(jump: float) -> None:
    """One jump of size 1: as of the derivative of ReLU along a step."""
    for intervals in (2, 4, 8, 16, 32, 64):
        for level, most in ((midpoints(intervals), 0.5), (simpson(intervals), 4 / 3)):
            error = abs(integral(level, lambda s: float(s > jump)) - (1 - jump))
            assert error <= most / intervals + 1e-12


def test_the_levels_of_auto_are_nested_to_the_bit_and_end() -> None:
    rule = path_rule("auto:0.01")
    assert rule.tolerance == 0.01
    assert rule.levels[0] == path_rule("simpson").levels[0]
    assert [len(level.nodes) for level in rule.levels] == [3, 5, 9, 17, 33, 65]
    for coarse, fine in itertools.pairwise(rule.levels):
        assert set(coarse.nodes) <= set(fine.nodes)


@pytest.mark.parametrize("intervals", [2, 4, 8, 16])
def test_clenshaw_and_curtis_rule_is_exact_for_polynomials_and_nested(intervals: int) -> None:
    rule = clenshaw_curtis(intervals)
    assert rule.nodes[0] == 0.0
    assert rule.nodes[-1] == 1.0
    assert set(rule.nodes) <= set(clenshaw_curtis(2 * intervals).nodes)
    for degree in range(intervals + 2):
        total = integral(rule, lambda s, degree=degree: s**degree)
        assert total == pytest.approx(1 / (degree + 1), abs=1e-13)


WRONG = ["euler", "gauss:0", "gauss:100", "gauss:", "Simpson", "", "midpoint:0", "midpoint:x"]
WRONG += ["midpoint:100", "auto", "auto:", "auto:0", "auto:1", "auto:-1e-3", "auto:nan", "auto:inf"]


@pytest.mark.parametrize("name", WRONG)
def test_an_unknown_rule_is_named(name: str) -> None:
    with pytest.raises(CircuitError, match=f"unknown path rule '{name}'; expected midpoint"):
        path_rule(name)
