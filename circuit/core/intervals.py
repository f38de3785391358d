"""Percentile bootstrap by whole records: 95 % intervals of means, ratios of means and R².

Reads of one record share its stream, and pairs of one record its reads, so that they are no
independent draws. What is drawn are records, as many as there are, with replacement, each with all
its rows; every statistic here is a function of sums over rows, so that one product of
`[draw, record]` counts with `[record, column]` sums gives it in all draws. scipy.stats.bootstrap
would call the statistic draw by draw.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

DRAWS = 1000
SEED = 17
"""Of the draws, where nobody asks for another."""

Interval: TypeAlias = "tuple[float | None, float | None]"
"""Low and high end; None where there is one record, or draws in which the number is not finite."""


class RecordDraws:
    """Draws of the records that some rows (reads, pairs) belong to.

    Attributes:
        records: how many there are.
    """

    def __init__(self, record: Int[Tensor, " row"] | Sequence[Hashable], seed: int = SEED) -> None:
        """Draw them.

        Args:
            record: of each row, as a number or a name; on any device.

        Raises:
            CircuitError: there is no row.
        """
        if not len(record):
            raise CircuitError("no rows", expected="at least one, of a record that can be drawn")
        if not isinstance(record, torch.Tensor):
            numbers: dict[Hashable, int] = {}
            record = torch.tensor([numbers.setdefault(name, len(numbers)) for name in record])
        _, self._record = torch.unique(record.cpu(), return_inverse=True)
        self.records = int(self._record.max()) + 1
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(self.records, (DRAWS, self.records), generator=generator)
        # [draw, record]: how often each draw has each record
        self._times = torch.zeros(DRAWS, self.records, dtype=torch.float64)
        self._times.scatter_add_(1, drawn, torch.ones_like(self._times))

    def sums(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "draw column"]:
        """Sums over the rows of every draw, in float64."""
        zeros = torch.zeros(self.records, values.shape[1], dtype=torch.float64)
        return self._times @ zeros.index_add(0, self._record, values.cpu().double())

    def means(self, values: Float[Tensor, "row column"]) -> list[Interval]:
        """Of the mean of every column over all rows."""
        return self.ratios(values, torch.ones(len(values), 1))

    def ratios(
        self,
        over: Float[Tensor, "row column"],
        under: Float[Tensor, "row column_or_one"],
    ) -> list[Interval]:
        """Of `mean of over / mean of under`, column by column."""
        return self._between(self.sums(over) / self.sums(under))

    def r_squared_of(
        self, predicted: Float[Tensor, " row"], actual: Float[Tensor, " row"]
    ) -> Interval:
        """Of the R² of a prediction as it is, `1 - mean (actual - predicted)² / variance`."""
        z = actual.double() - actual.double().mean()  # about its mean, so that less cancels
        missed = (actual.double() - predicted.double()) ** 2
        columns = torch.stack([torch.ones_like(z), z, z**2, missed], 1)
        count, of_z, of_squares, of_missed = self.sums(columns).T
        return self._r_squared(of_missed, of_squares, of_squares - of_z**2 / count)

    def _r_squared(
        self,
        missed: Float[Tensor, " draw"],
        squares: Float[Tensor, " draw"],
        total: Float[Tensor, " draw"],
    ) -> Interval:
        """Of `1 - missed / total`, where the total is more than rounding leaves of equal values.

        Args:
            squares: of which the total is what their mean leaves.
        """
        varies = total > 1e-12 * squares
        return self._between(torch.where(varies, 1 - missed / total, torch.nan)[:, None])[0]

    def r_squared(
        self,
        x: Float[Tensor, "row column"],
        y: Float[Tensor, " row"],
        *,
        fit_intercept: bool,
        resolution: float,
    ) -> Interval:
        """Of the R² of least squares of `y` on the columns of `x`, fitted anew in every draw.

        Each fit is that of the draw's normal equations.

        Args:
            resolution: singular values of the design below this share of the largest count as 0.
        """
        z = y - y.mean()  # about its mean, so that sums of squares cancel less
        design, target = (x - x.mean(0), z) if fit_intercept else (x, y)
        columns = x.shape[1]
        products = torch.cat([design, target[:, None]], 1)
        squares = (products[:, :, None] * products[:, None, :]).flatten(1)
        ones = torch.ones(len(y), 1, dtype=torch.float64)
        sums = self.sums(torch.cat([ones, z[:, None], z[:, None] ** 2, products, squares], 1))
        count, of_z, of_squares, *_ = sums.T
        linear, square = sums[:, 3 : 4 + columns], sums[:, 4 + columns :]
        gram = square.unflatten(1, (columns + 1, columns + 1))
        if fit_intercept:  # about the means of the draw
            gram = gram - linear[:, :, None] * linear[:, None, :] / count[:, None, None]
        sizes, directions = torch.linalg.eigh(gram[:, :columns, :columns])
        along = (directions.mT @ gram[:, :columns, columns:])[..., 0]
        kept = sizes > resolution**2 * sizes[:, -1:]
        explained = torch.where(kept, along**2 / sizes, 0.0).sum(1)
        missed = gram[:, -1, -1] - explained
        return self._r_squared(missed, of_squares, of_squares - of_z**2 / count)

    def _between(self, draws: Float[Tensor, "draw column"]) -> list[Interval]:
        if self.records < 2:
            return [(None, None)] * draws.shape[1]
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = torch.quantile(draws, ends, dim=0)
        return [(finite(a), finite(b)) for a, b in zip(low, high, strict=True)]


def finite(value: Tensor) -> float | None:
    """A number; None where it is none."""
    return float(value) if bool(torch.isfinite(value)) else None
