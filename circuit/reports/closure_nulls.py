"""What the R² of a closure is without its pairing: the nulls of `circuit.scalars.nulls`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.figures.charts import INK, Chart, chart, colour, exact, named
from circuit.lazy import alt, np
from circuit.options import Option
from circuit.reports.tables import Columns, Table, cell
from circuit.scalars.least_squares import Array
from circuit.scalars.nulls import (
    LEAST_INTERVALS,
    SEED,
    beside,
    offsets,
    permuted_records,
    r_squared_of_designs,
)
from circuit.tasks.pairs import record_of

Key: TypeAlias = tuple[int, int, str]
"""Source step, target step, pair."""
Nulls = Annotated[int, Option("Draws of each null: permuted records, shifted intervals.", least=0)]
NULLS = {"permuted_records": "permuted records", "shifted_intervals": "shifted intervals"}
NUMBERS = {"r_squared": "R²", "r_squared_held_out": "held out"}
_AT_ONCE = 2**22
"""Numbers of the designs that are fitted at once."""


class RouteChanges:
    """Changes of route scores, whose pairing with the changes that they explain can be broken."""

    def __init__(
        self,
        keys: Sequence[Key],
        kinds: Sequence[str],
        deltas: Sequence[Mapping[str, float]],
        labels: Sequence[str],
    ) -> None:
        """One entry a row; both sides of a pair have the same.

        Raises:
            CircuitError: a pair is not in every interval.
        """
        self.intervals = {key: i for i, key in enumerate(sorted({key[:2] for key in keys}))}
        kind_of = dict(zip((key[2] for key in keys), kinds, strict=True))
        self.pairs = {pair: i for i, pair in enumerate(kind_of)}
        if len(set(keys)) < len(self.intervals) * len(self.pairs):
            raise CircuitError("some pairs are not in every interval", fix="leave `nulls` out")
        self.scores = np.empty((len(self.intervals), len(self.pairs), len(labels)))
        for key, values in zip(keys, deltas, strict=True):
            self.scores[self._place(key)] = [values[label] for label in labels]
        self.records = [record_of(pair) for pair in self.pairs]
        self.kinds = list(kind_of.values())

    def _place(self, key: Key) -> tuple[int, int]:
        return self.intervals[key[:2]], self.pairs[key[2]]

    def nulls(
        self,
        keys: Sequence[Key],
        deltas: Sequence[float],
        fit: Mapping[str, Any],
        *,
        fit_intercept: bool,
        draws: int,
    ) -> dict[str, Any]:
        """Each null of one fit, null where nothing can be permuted or shifted.

        Args:
            keys, deltas: of the rows that were fitted.
            fit: the row of the fit.
        """
        interval, pair = np.array([self._place(key) for key in keys]).T
        others = permuted_records(self.records, self.kinds, draws)
        shifts = offsets(len(self.intervals), draws)
        places: dict[str, tuple[Any, Any] | None] = {
            "permuted_records": None
            if others is None
            else (np.broadcast_to(interval, (draws, len(keys))), others[:, pair]),
            "shifted_intervals": None
            if shifts is None
            else (
                (interval + shifts[:, None]) % len(self.intervals),
                np.broadcast_to(pair, (len(shifts), len(keys))),
            ),
        }
        y, records = np.array(deltas), [record_of(key[2]) for key in keys]
        return {
            name: None
            if at is None or fit["r_squared"] is None
            else self._beside(at, y, records, fit, fit_intercept)
            for name, at in places.items()
        }

    def _beside(
        self,
        at: tuple[Any, Any],
        y: Array,
        records: Sequence[str],
        fit: Mapping[str, Any],
        fit_intercept: bool,
    ) -> dict[str, Any]:
        draws, some = len(at[0]), max(1, _AT_ONCE // (len(y) * self.scores.shape[2]))
        parts = [
            r_squared_of_designs(
                self.scores[at[0][first : first + some], at[1][first : first + some]],
                y,
                fit_intercept=fit_intercept,
                groups=records,
            )
            for first in range(0, draws, some)
        ]
        told_of: dict[str, Any] = {"draws": draws}
        for name, values in zip(NUMBERS, zip(*parts, strict=True), strict=True):
            there = fit[name] is not None and values[0] is not None
            told_of[name] = beside(np.concatenate(values), fit[name]) if there else None
        return told_of


def told(draws: int) -> dict[str, Any]:
    """What the summary says of the draws; nothing without any."""
    return {"nulls": {"draws": draws, "seed": SEED}} if draws else {}


def nulls_notes(fits: Sequence[Row]) -> list[str]:
    """How to read them, and which there are not."""
    fits = [fit for fit in fits if fit.get("nulls")]
    if not fits:
        return []
    notes = [
        "Nulls: R² of the same fit where the route scores are those of another record's pairs"
        " (permuted records: the course of training that all pairs share stays), and where their"
        " intervals are shifted against the target's (shifted intervals: the course is lost, each"
        " offset once). p: share of the draws that reach the actual R², (1 + those) / (1 + draws):"
        " with n intervals never below 1 / n for the latter."
    ]
    told_of = [fit["nulls"] for fit in fits if fit["r_squared"] is not None]
    if not told_of:
        return [*notes, "No nulls: what is fitted does not vary."]
    missing = {
        "permuted_records": "there are no two records of one pair type",
        "shifted_intervals": f"fewer than {LEAST_INTERVALS} intervals have too few offsets",
    }
    for name, why in missing.items():
        if all(nulls[name] is None for nulls in told_of):
            notes.append(f"No {NULLS[name]}: {why}.")
    return notes


def nulls_table(names: Mapping[str, str], fits: Sequence[Row], *, console: int = 0) -> list[Table]:
    """A table of every fit's nulls, if there are any; see `fits_table`."""
    number, words = _number(fits)
    rows = [
        {
            **{key: fit[key] for key in names},
            **{"null": NULLS[null], "draws": of_fit["draws"], "actual": fit[number]},
            **of_number,
            "range": " to ".join(cell(of_number[end], ".3f") for end in ("low", "high")),
        }
        for fit, null, of_fit, of_number in _each(fits, number)
    ]
    if not rows:
        return []
    columns: Columns = {
        **names,
        **{"null": "null", "draws": "draws", "actual": (words, ".3f"), "mean": ("null", ".3f")},
        **{"range": "95 %", "p": ("p", ".3f")},
    }
    return [Table("Against nulls", columns, rows, console=console or len(rows))]


def _number(fits: Sequence[Row]) -> tuple[str, str]:
    """Which R² is shown, and in words: the held-out one, where there is any."""
    if any(fit["r_squared_held_out"] is not None for fit in fits):
        return "r_squared_held_out", "R² held out"
    return "r_squared", "R²"


def _each(fits: Sequence[Row], number: str) -> Iterator[tuple[Row, str, Row, Row]]:
    """Fit, name of the null, what it says, and what it says of a number; where that is."""
    for fit in fits:
        for null in NULLS:
            of_fit = (fit.get("nulls") or {}).get(null)
            if of_fit and of_fit[number]:
                yield fit, null, of_fit, of_fit[number]


def nulls_chart(name: str, fits: Sequence[Row], title: Sequence[str]) -> list[Chart]:
    """95 % of each null's draws as a bar, their mean a stroke, and the actual R² a point.

    Args:
        title: keys of what tells the fits apart.
    """
    number, words = _number(fits)
    data = [
        {
            "fit": " ".join(str(fit[key]) for key in title),
            **{"null": NULLS[null], "actual": fit[number], **of_number},
        }
        for fit, null, _, of_number in _each(fits, number)
    ]
    if not data:
        return []
    shown, nulls = (list(dict.fromkeys(row[key] for row in data)) for key in ("fit", "null"))
    place = named(name).encode(
        y=alt.Y("fit:N").title(None).sort(shown).axis(labelLimit=0),
        yOffset=alt.YOffset("null:N").sort(nulls),
        tooltip=exact(*data[0]),
    )
    shade = colour("null", nulls)
    low = alt.X("low:Q").title(f"{words} (point), and without the pairing").scale(nice=True)
    bar = place.mark_rule(strokeWidth=6, opacity=0.45).encode(x=low, x2="high:Q", color=shade)
    mean = place.mark_tick(orient="vertical", thickness=2, height=10).encode(
        x="mean:Q", color=shade
    )
    point = place.mark_point(filled=True, size=50, color=INK, opacity=1).encode(x="actual:Q")
    height = 32 * len(shown)
    of = "".join(f" (basis: {basis})" for basis in {fit["basis"] for fit in fits if "basis" in fit})
    text = f"{words} of every fit{of} beside its nulls"
    return [chart(name, text, {name: data}, bar, mean, point, height=height)]
