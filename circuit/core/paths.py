"""The gradient averaged along a step, so that contributions add up to what happened.

For a step from `theta` to `theta + delta` with `delta = sum_k u_k`, the fundamental theorem gives
`C(theta + delta) - C(theta) = G . delta` with `G = integral_0^1 grad C(theta + s delta) ds`, hence
the share `G . u_k` of every term (definitions.md section 5; the idea is that of Loss Change
Allocation, Lan, Liu, Zhou and Yosinski, NeurIPS 2019). A rule replaces the integral by a weighted
sum; first order is the rule that looks at `s = 0` alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from circuit.errors import CircuitError
from circuit.lazy import np

_GAUSS = re.compile(r"gauss:([1-9]\d?)")


@dataclass(frozen=True)
class PathRule:
    """Nodes in [0, 1] and their weights, which sum to 1."""

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]


def path_rule(name: str) -> PathRule:
    """`midpoint`, `simpson` or `gauss:N` (N Gauss-Legendre nodes, 1 to 99).

    Raises:
        CircuitError: there is no such rule.
    """
    if name == "midpoint":
        return PathRule(name, (0.5,), (1.0,))
    if name == "simpson":
        return PathRule(name, (0.0, 0.5, 1.0), (1 / 6, 4 / 6, 1 / 6))
    match = _GAUSS.fullmatch(name)
    if match is None:
        raise CircuitError(
            f"unknown path rule '{name}'", expected="midpoint, simpson or gauss:N with N >= 1"
        )
    nodes, weights = np.polynomial.legendre.leggauss(int(match[1]))
    return PathRule(name, tuple((nodes + 1) / 2), tuple(weights / 2))


def clenshaw_curtis(intervals: int) -> PathRule:
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
    name = f"clenshaw-curtis:{intervals}"
    return PathRule(name, tuple(nodes.tolist()), tuple(weights.tolist()))
