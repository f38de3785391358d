"""Least squares of changes on route changes: scikit-learn's solution, and what it cannot know."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from circuit.errors import CircuitError
from circuit.scalars.least_squares import FOLDS, least_squares

LABELS = ("a", "b", "c", "d")


def design(rows: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, 4)) + 0.5
    return x, x @ [1.0, -2.0, 0.5, 0.0] + 0.7 + generator.normal(size=rows)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_the_fit_is_that_of_scikit_learn(fit_intercept: bool) -> None:
    x, y = design()
    fit = least_squares(x, y, LABELS, fit_intercept=fit_intercept)
    known = LinearRegression(fit_intercept=fit_intercept).fit(x, y)
    assert np.allclose(fit.coefficients, known.coef_, rtol=0, atol=1e-12)
    assert fit.intercept == pytest.approx(known.intercept_, abs=1e-12)
    assert np.allclose(fit.predicted, known.predict(x), rtol=0, atol=1e-12)
    assert fit.r_squared == pytest.approx(known.score(x, y), abs=1e-12)
    assert (fit.rank, fit.dependent) == (4, ())


def test_contributions_and_intercept_sum_to_the_mean_prediction() -> None:
    x, y = design()
    for fit_intercept in (True, False):
        fit = least_squares(x, y, LABELS, fit_intercept=fit_intercept)
        total = fit.mean_contributions.sum() + fit.intercept
        assert total == pytest.approx(fit.predicted.mean(), abs=1e-12)
    assert least_squares(x, y, LABELS, fit_intercept=True).predicted.mean() == pytest.approx(
        y.mean()
    )


def test_whole_groups_are_held_out() -> None:
    x, y = design()
    groups = [f"record{index % 13}" for index in range(len(y))]
    folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
    predicted = cross_val_predict(LinearRegression(), x, y, groups=groups, cv=folds)
    fit = least_squares(x, y, LABELS, fit_intercept=True, groups=groups)
    assert fit.r_squared is not None
    assert fit.r_squared_held_out == pytest.approx(r2_score(y, predicted), abs=1e-12)
    assert fit.r_squared_held_out < fit.r_squared
    few = [group for group in ("p", "q", "r", "s") for _ in range(10)]
    assert least_squares(x, y, LABELS, groups=few).r_squared_held_out is None


def test_what_a_group_shares_helps_no_fit_that_holds_it_out() -> None:
    """Rows of one group are alike, and tell nothing of another's: held out, nothing is left."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 4)
    x = np.eye(20)[groups] + 1e-3 * generator.normal(size=(80, 20))
    y = np.repeat(generator.normal(size=20), 4)
    labels = [str(index) for index in range(20)]
    by_group = least_squares(x, y, labels, groups=[str(group) for group in groups])
    by_row = least_squares(x, y, labels, groups=[str(index) for index in range(80)])
    assert by_group.r_squared_held_out is not None
    assert by_row.r_squared_held_out is not None
    assert by_group.r_squared_held_out < 0.1 < 0.9 < by_row.r_squared_held_out


def test_a_rank_deficient_design_says_so_and_takes_the_least_norm() -> None:
    x, y = design()
    x[:, 2] = 2 * x[:, 0]
    fit = least_squares(x, y, LABELS)
    assert (fit.rank, fit.dependent, fit.condition) == (3, ("a", "c"), None)
    assert np.allclose(fit.coefficients, np.linalg.pinv(x) @ y, atol=1e-10)
    without = least_squares(x[:, [0, 1, 3]], y, ("a", "b", "d"))
    assert np.allclose(fit.predicted, without.predicted, atol=1e-10)


def test_a_route_that_never_moves_is_not_determined() -> None:
    x, y = design()
    x[:, 1] = 0
    fit = least_squares(x, y, LABELS)
    assert (fit.rank, fit.dependent) == (3, ("b",))
    assert fit.coefficients[1] == pytest.approx(0, abs=1e-12)
    x[:, 1] = 3
    assert least_squares(x, y, LABELS).rank == 4
    assert least_squares(x, y, LABELS, fit_intercept=True).dependent == ("b",)


def test_many_rows_take_no_memory_of_their_square() -> None:
    x, y = design(rows=3000)
    x[:, 2] = x[:, 0] - x[:, 3]
    tracemalloc.start()
    fit = least_squares(x, y, LABELS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (fit.rank, fit.dependent) == (3, ("a", "c", "d"))
    assert peak < 20 * x.nbytes
    few = least_squares(x[:2], y[:2], LABELS)
    assert (few.rank, few.dependent) == (2, LABELS)


def test_the_rounding_of_scores_is_no_direction() -> None:
    x, y = design()
    x[:, 3] = x[:, 0] + 1e-7 * np.random.default_rng(1).normal(size=len(y))
    fit = least_squares(x, y, LABELS)
    assert (fit.rank, fit.dependent) == (3, ("a", "d"))
    assert np.abs(fit.coefficients).max() < 10


def test_exact_relations_are_found_and_nothing_is_said_of_what_does_not_vary() -> None:
    x, _ = design()
    fit = least_squares(x, x @ [1.0, 2.0, 3.0, 4.0], LABELS)
    assert np.allclose(fit.coefficients, [1, 2, 3, 4])
    assert fit.r_squared == pytest.approx(1)
    assert fit.r_squared_about_zero == pytest.approx(1)
    constant = least_squares(x, np.full(40, 0.1), LABELS)
    assert constant.r_squared is None
    assert constant.r_squared_about_zero is not None
    assert least_squares(x, np.zeros(40), LABELS).r_squared_about_zero is None


def test_an_empty_design_is_refused() -> None:
    with pytest.raises(CircuitError, match="a design of 0 rows and 4 columns for 0 values"):
        least_squares(np.empty((0, 4)), np.empty(0), LABELS)
