"""The gradient averaged along a step, so that contributions add up to what happened.

For a step from `theta` to `theta + delta` with `delta = sum_k u_k`, the fundamental theorem gives
`C(theta + delta) - C(theta) = G . delta` with `G = integral_0^1 grad C(theta + s delta) ds`, hence
the share `G . u_k` of every term (definitions.md section 5; the idea is that of Loss Change
Allocation, Lan, Liu, Zhou and Yosinski, NeurIPS 2019). A rule replaces the integral by a weighted
sum; first order is the rule that looks at `s = 0` alone.

Where the gradient is smooth along a step, Simpson's rule is close with three nodes. ReLU makes it
jump, and then no rule converges faster than with the number of its nodes: `midpoint:N` and
`auto:TOL` are for that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from circuit.errors import CircuitError
from circuit.lazy import np

_NAMED = re.compile(r"(gauss|midpoint):([1-9]\d{0,2})")
_AUTO = re.compile(r"auto:(.+)")
FIRST_INTERVALS, MOST_INTERVALS = 2, 64
"""Of the Simpson rules that `auto` goes through; there is one node more."""
RULES = "midpoint, simpson, midpoint:N or gauss:N (N from 1 to 99), or auto:TOL (TOL below 1)"
"""What `path_rule` takes."""


@dataclass(frozen=True)
class Quadrature:
    """Nodes in [0, 1] and their weights, which sum to 1."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class PathRule:
    """How a gradient is averaged along a step.

    Attributes:
        name: as it is given.
        levels: quadratures, each finer than the one before. A fixed rule has one; an adaptive one
            goes on until a level and the one before agree, or cannot be told apart.
        tolerance: of an adaptive rule, as a share of the step's change.
    """

    name: str
    levels: tuple[Quadrature, ...]
    tolerance: float | None = None


def path_rule(name: str) -> PathRule:
    """`midpoint`, `simpson`, `gauss:N`, `midpoint:N` or `auto:TOL`.

    `gauss:N` has N Gauss-Legendre nodes; `midpoint:N` the middles of N equal intervals, for
    gradients that jump; `auto:TOL` goes through Simpson's rule on 2, 4, 8, ... intervals, whose
    nodes are among those of the next.

    Raises:
        CircuitError: there is no such rule.
    """
    if name == "midpoint":
        return PathRule(name, (midpoints(1),))
    if name == "simpson":
        return PathRule(name, (simpson(2),))
    if tolerance := _tolerance(name):
        doublings = range((MOST_INTERVALS // FIRST_INTERVALS).bit_length())
        levels = tuple(simpson(FIRST_INTERVALS * 2**doubling) for doubling in doublings)
        return PathRule(name, levels, tolerance)
    match = _NAMED.fullmatch(name)
    if match is None or int(match[2]) > 99:
        raise CircuitError(f"unknown path rule '{name}'", expected=RULES)
    count = int(match[2])
    return PathRule(name, (midpoints(count) if match[1] == "midpoint" else gauss(count),))


def _tolerance(name: str) -> float | None:
    """Of `auto:TOL`; None of anything else."""
    match = _AUTO.fullmatch(name)
    try:
        tolerance = float(match[1]) if match else 0.0
    except ValueError:
        return None
    return tolerance if 0 < tolerance < 1 else None


def midpoints(intervals: int) -> Quadrature:
    """The middles of equal intervals: exact for polynomials of degree 1."""
    nodes = tuple((2 * i + 1) / (2 * intervals) for i in range(intervals))
    return Quadrature(nodes, (1 / intervals,) * intervals)


def simpson(intervals: int) -> Quadrature:
    """Simpson's rule on pairs of equal intervals: exact for polynomials of degree 3.

    Args:
        intervals: even.
    """
    inner = (4 if i % 2 else 2 for i in range(1, intervals))
    nodes = tuple(i / intervals for i in range(intervals + 1))
    return Quadrature(nodes, tuple(w / (3 * intervals) for w in (1, *inner, 1)))


def gauss(count: int) -> Quadrature:
    """Gauss and Legendre's rule: exact for polynomials of degree `2 count - 1`."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return Quadrature(tuple((nodes + 1) / 2), tuple(weights / 2))


def clenshaw_curtis(intervals: int) -> Quadrature:
    """Clenshaw and Curtis' rule: `intervals + 1` nodes at the extrema of a Chebyshev polynomial.

    Exact for polynomials of degree `intervals`. The nodes, both ends among them, are also nodes of
    twice as many intervals (to the bit), so that a refinement pays for the new ones alone.

    Args:
        intervals: even.
    """
    k = np.arange(intervals + 1)
    nodes = (1 - np.cos(np.pi * (k / intervals))) / 2
    j = np.arange(1, intervals // 2 + 1)
    # Waldvogel, Fast construction of the Fejer and Clenshaw-Curtis quadrature rules, 2006, eq. 2.4
    b = np.where(j == intervals // 2, 1.0, 2.0) / (4 * j**2 - 1)
    weights = (1 - np.cos(2 * np.pi * np.outer(k, j) / intervals) @ b) / intervals
    weights[[0, -1]] /= 2
    return Quadrature(tuple(nodes.tolist()), tuple(weights.tolist()))
