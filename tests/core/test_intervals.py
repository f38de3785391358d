"""Laws of intervals over whole records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import r2_score
from torch import Tensor

from circuit.core.intervals import DRAWS, SEED, Interval, RecordDraws
from circuit.errors import CircuitError
from circuit.scalars.least_squares import RESOLUTION, least_squares

LOW, HIGH = 0.025, 0.975


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def reads_of(seed: int, records: int, rows: int) -> Tensor:
    """The record of each row, every record with at least one."""
    generator = torch.Generator().manual_seed(seed)
    further = torch.randint(records, (rows - records,), generator=generator)
    return torch.cat([torch.arange(records), further])


def drawn_rows(record: Tensor) -> list[Tensor]:
    """The rows of every draw, one after the other."""
    count = int(record.max()) + 1
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(count, (DRAWS, count), generator=generator)
    rows = [(record == one).nonzero()[:, 0] for one in range(count)]
    return [torch.cat([rows[one] for one in draw]) for draw in drawn.tolist()]


def alike(one: list[Interval], other: list[Interval]) -> bool:
    """To what another order of sums changes."""
    return one == [pytest.approx(of, rel=1e-9, abs=1e-12) for of in other]


def ends(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [100 * LOW, 100 * HIGH])
    return float(low), float(high)


@pytest.mark.parametrize("seed", range(3))
def test_they_contain_the_mean_of_symmetrical_data_and_mirror_with_it(seed: int) -> None:
    half = random(seed, 12, 20)
    values, record = torch.cat([half, -half]), torch.arange(24)
    found = RecordDraws(record).means(values)
    assert all(low < 0 < high for low, high in found)
    mirrored = RecordDraws(record).means(-values)
    assert alike(mirrored, [(-high, -low) for low, high in found])
    moved = RecordDraws(record).means(values + 5)
    assert alike(moved, [(low + 5, high + 5) for low, high in found])


def test_they_shrink_with_the_root_of_the_number_of_records() -> None:
    """Not with that of the rows: their number in a record does not matter."""

    def width(records: int, rows_each: int) -> float:
        values = random(records, records, 200).repeat_interleave(rows_each, 0)
        of_record = torch.arange(records).repeat_interleave(rows_each)
        found = RecordDraws(of_record).means(values)
        return float(np.mean([high - low for low, high in found]))

    assert width(40, 1) / width(160, 1) == pytest.approx(2, rel=0.06)
    assert width(40, 1) / width(160, 7) == pytest.approx(2, rel=0.06)
    # of a mean of normal values: that of the normal distribution
    assert width(160, 1) == pytest.approx(2 * 1.96 / 160**0.5, rel=0.06)


@pytest.mark.parametrize("seed", range(3))
def test_doubling_the_reads_of_every_record_changes_nothing(seed: int) -> None:
    record, values = reads_of(seed, 9, 30), random(seed, 30, 4)
    x, y = random(seed + 10, 30, 3), random(seed + 20, 30)
    once, twice = RecordDraws(record), RecordDraws(record.repeat(2))
    doubled = values.repeat(2, 1)
    assert alike(once.means(values), twice.means(doubled))
    assert alike(once.ratios(values, values**2), twice.ratios(doubled, doubled**2))
    for intercept in (False, True):
        fit = {"fit_intercept": intercept, "resolution": RESOLUTION}
        whole = twice.r_squared(x.repeat(2, 1), y.repeat(2), **fit)
        assert alike([once.r_squared(x, y, **fit)], [whole])


def test_records_may_have_any_names_and_rows_any_order() -> None:
    record, values = reads_of(1, 9, 30), random(1, 30, 4)
    found = RecordDraws(record).means(values)
    assert RecordDraws([f"r{one}" for one in record.tolist()]).means(values) == found
    assert RecordDraws(7 * record - 3).means(values) == found
    # the first rows are the records in their order, which the draws go by
    order = torch.cat([torch.arange(9), torch.randperm(21) + 9])
    assert alike(RecordDraws(record[order]).means(values[order]), found)
    assert RecordDraws(record, seed=3).means(values) != found


def test_they_are_those_of_scipy() -> None:
    """To the sampling error of the percentiles of 1000 draws: four of its standard deviations."""
    of_record, under = random(2, 30), random(3, 30).square() + 1
    draws = RecordDraws(torch.arange(30))
    columns = of_record[:, None], under[:, None]
    (mean,), (ratio,) = draws.means(columns[0]), draws.ratios(*columns)
    for found, data, statistic in (
        (mean, (of_record,), np.mean),
        (ratio, (of_record, under), lambda a, b, axis: a.mean(axis) / b.mean(axis)),
    ):
        theirs = bootstrap(
            tuple(map(np.asarray, data)),
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=20_000,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        density = np.exp(-(1.96**2) / 2) / np.sqrt(2 * np.pi) / theirs.standard_error
        error = np.sqrt(LOW * HIGH / DRAWS) / density
        assert found == pytest.approx(tuple(theirs.confidence_interval), abs=4 * error)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("dependent", [False, True])
def test_those_of_r_squared_are_a_loop_of_fits(fit_intercept: bool, dependent: bool) -> None:
    record, x = reads_of(4, 12, 60), random(5, 60, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 2 + 3 * random(6, 60)
    if dependent:
        x[:, 2] = x[:, 0] - x[:, 1]
    fits = [
        least_squares(
            x[rows].numpy(), y[rows].numpy(), ["a", "b", "c"], fit_intercept=fit_intercept
        ).r_squared
        for rows in drawn_rows(record)
    ]
    values = [value for value in fits if value is not None]
    assert len(values) == DRAWS
    draws = RecordDraws(record)
    found = draws.r_squared(x, y, fit_intercept=fit_intercept, resolution=RESOLUTION)
    assert found == pytest.approx(ends(values), rel=1e-9)


def test_those_of_a_predictions_r_squared_are_a_loop_of_scikit_learns() -> None:
    record = reads_of(4, 9, 40)
    actual = random(5, 40) + 3
    predicted = actual + 0.5 * random(6, 40)
    found = [float(r2_score(actual[rows], predicted[rows])) for rows in drawn_rows(record)]
    assert RecordDraws(record).r_squared_of(predicted, actual) == pytest.approx(ends(found))
    assert RecordDraws(record).r_squared_of(predicted, torch.ones(40)) == (None, None)


def test_those_of_ratios_are_a_loop_over_draws() -> None:
    record, values = reads_of(7, 10, 40), random(8, 40, 2)
    over, under = values[:, :1], values[:, 1:].square()
    ratios = [float(over[rows].sum() / under[rows].sum()) for rows in drawn_rows(record)]
    assert RecordDraws(record).ratios(over, under) == [pytest.approx(ends(ratios))]


@pytest.mark.parametrize("nothing", [[], torch.tensor([])])
def test_of_no_rows_nothing_is_drawn(nothing: Any) -> None:
    with pytest.raises(CircuitError, match="no rows"):
        RecordDraws(nothing)


def test_one_record_has_none_nor_has_a_number_that_some_draw_lacks() -> None:
    values, nothing = random(9, 6, 2), (None, None)
    one = RecordDraws(torch.zeros(6))
    assert one.means(values) == one.ratios(values, values) == [nothing, nothing]
    fit = {"fit_intercept": False, "resolution": RESOLUTION}
    assert one.r_squared(values, values[:, 0], **fit) == nothing
    three = RecordDraws(torch.tensor([0, 0, 1, 1, 2, 2]))
    under = torch.tensor([[1.0], [1.0], [0.0], [0.0], [0.0], [0.0]])
    over = torch.stack([under[:, 0], values[:, 0].abs()], 1)
    undefined, endless = three.ratios(over, under)  # in draws without the first record
    assert undefined == nothing  # 0 / 0
    assert endless[1] is None  # above 0 / 0: the low end is that of the other draws
    assert endless[0] is not None
    steps = torch.tensor([0.0, 1.0, 5.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    assert three.r_squared(values, steps, **fit) == nothing  # nor does it vary there
