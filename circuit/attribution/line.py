"""The straight line between two checkpoints, and what scalars of the logits do along it.

For smooth `C`, `C(target) - C(source)` is the integral over `s` in [0, 1] of
`d/ds C(source + s (target - source))`: first order is the integrand at `s = 0`, curvature is the
rest (definitions.md section 5). The integrand is a directional derivative, which one forward pass
in forward mode gives for every example and every scalar at once; the nodes are Clenshaw and
Curtis', as many as closing the integral needs. Those of a rule are also nodes of the next finer
one, and the first is the source itself, so that no derivative is taken twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from circuit.core.functional import function_of
from circuit.core.paths import clenshaw_curtis
from circuit.lazy import no_grad, torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

Values: TypeAlias = "dict[str, Float[Tensor, ' example']]"
ScalarsOfLogits: TypeAlias = "Callable[[Float[Tensor, 'example vocab']], Values]"
"""Scalars by name from the logits `[example, vocab]` at the examples' positions, in float64."""

TOLERANCE = 0.01
"""The integral closes when its mean absolute gap is at most this share of the mean change."""
FIRST_INTERVALS, MOST_INTERVALS = 2, 64
"""Of the quadrature: there is one node more."""
CHUNK = 32
"""Rows of one forward pass."""


@dataclass(frozen=True)
class LineIntegral:
    """What the scalars did along the line, example by example.

    Attributes:
        actual: target minus source.
        first_order: derivative along the line at the source.
        integral: of the derivative over the line.
        nodes: that the integral took.
        gap: by scalar, `mean |integral - actual| / mean |actual|`; null where nothing changed.
        closed: whether every gap is within `TOLERANCE`; with `MOST_INTERVALS` it may not be.
    """

    actual: Values
    first_order: Values
    integral: Values
    nodes: int
    gap: dict[str, float | None]

    @property
    def closed(self) -> bool:
        """Whether the integral agrees with what happened."""
        return all(gap is None or gap <= TOLERANCE for gap in self.gap.values())

    @property
    def curvature(self) -> Values:
        """Integral minus first order."""
        return {name: value - self.first_order[name] for name, value in self.integral.items()}


class Line:
    """The weights `source + s (target - source)`, seen at some positions of some sequences."""

    def __init__(
        self,
        model: HookedTransformer,
        source: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        tokens: Int[Tensor, "sequence pos"],
        places: tuple[Int[Tensor, " example"], Int[Tensor, " example"]],
        *,
        source_logits: Float[Tensor, "example vocab"] | None = None,
    ) -> None:
        """Describe the line.

        Args:
            model: gives the function; its own weights play no part and stay as they are.
            source, target: parameters by name.
            places: row and position of each example; no token behind a row's last position is
                read, which causality allows.
            source_logits: at the source, where they are known: those at the target of the line
                before.
        """
        self._function = function_of(model)
        self.source, self.target = dict(source), dict(target)
        self.delta = {name: target[name] - value for name, value in source.items()}
        self._source_logits = source_logits
        self._chunks = list(_chunks(tokens, *places))
        self._order = torch.cat([chunk.examples for chunk in self._chunks]).argsort()

    @no_grad
    def logits(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, "example vocab"]:
        """Logits at the examples' positions under some weights."""
        parts = [
            self._function(parameters, chunk.tokens)[chunk.row, chunk.pos] for chunk in self._chunks
        ]
        return torch.cat(parts)[self._order]

    @cached_property
    def ends(self) -> tuple[Float[Tensor, "example vocab"], Float[Tensor, "example vocab"]]:
        """Logits at the source and at the target, in float64."""
        known = self._source_logits
        start = self.logits(self.source).double() if known is None else known
        return start, self.logits(self.target).double()

    def derivatives(self, scalars: ScalarsOfLogits, s: float) -> Values:
        """Derivatives of the scalars with respect to `s`, by one pass in forward mode."""
        with torch.autograd.forward_ad.dual_level():
            with warnings.catch_warnings():  # the first dual number makes torch script its rules
                warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
                # weights with their velocity along the line, which the pass carries to the scalars
                dual = {
                    name: torch.autograd.forward_ad.make_dual(
                        value + s * self.delta[name], self.delta[name]
                    )
                    for name, value in self.source.items()
                }
            values = scalars(self.logits(dual).double())
            return {name: _tangent(value) for name, value in values.items()}

    def integrate(
        self, scalars: ScalarsOfLogits, progress: Callable[[int, int], None] | None = None
    ) -> LineIntegral:
        """Follow the scalars along the line, halving the intervals until the integral closes.

        Args:
            progress: called with the nodes done and those of the rule that is being taken.
        """
        start, end = map(scalars, self.ends)
        actual = {name: end[name] - value for name, value in start.items()}
        taken: dict[float, Values] = {}
        intervals = FIRST_INTERVALS
        while True:
            rule = clenshaw_curtis(intervals)
            for s in rule.nodes:
                if s not in taken:  # a rule of half the width holds the nodes of the one before
                    taken[s] = self.derivatives(scalars, s)
                    if progress is not None:
                        progress(len(taken), len(rule.nodes))
            weighted = [(taken[s], w) for s, w in zip(rule.nodes, rule.weights, strict=True)]
            integral = {name: _sum(w * values[name] for values, w in weighted) for name in actual}
            gap = {name: _gap(integral[name], value) for name, value in actual.items()}
            line = LineIntegral(actual, taken[0.0], integral, len(rule.nodes), gap)
            if line.closed or intervals >= MOST_INTERVALS:
                return line
            intervals *= 2


@dataclass(frozen=True)
class _Chunk:
    """Some rows of about equal length, with the examples that stand in them."""

    tokens: Int[Tensor, "row pos"]
    examples: Int[Tensor, " example"]
    row: Int[Tensor, " example"]
    pos: Int[Tensor, " example"]


def _chunks(tokens: Tensor, row: Tensor, pos: Tensor) -> Iterator[_Chunk]:
    """Rows by the length that their examples need, `CHUNK` at a time, with little padding."""
    needed = torch.zeros(len(tokens), dtype=pos.dtype, device=pos.device)
    needed = needed.scatter_reduce(0, row, pos + 1, "amax")  # [row]: tokens up to its last example
    used = needed.argsort(stable=True)[int((needed == 0).sum()) :]  # without rows of no example
    for rows in used.split(CHUNK):
        place = torch.full_like(needed, -1)  # [row]: where each stands in the chunk
        place[rows] = torch.arange(len(rows), device=pos.device)
        examples = (place[row] >= 0).nonzero()[:, 0]
        width = int(needed[rows].max())
        yield _Chunk(tokens[rows, :width], examples, place[row[examples]], pos[examples])


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _tangent(dual: Tensor) -> Tensor:
    tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    return torch.zeros_like(dual) if tangent is None else tangent.clone()


def _gap(integral: Tensor, actual: Tensor) -> float | None:
    size = float(actual.abs().mean())
    return float((integral - actual).abs().mean()) / size if size else None
