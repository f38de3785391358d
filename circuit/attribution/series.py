"""One scalar's attribution over consecutive steps, and what it adds up to.

`Series.collect(rows)` turns attribution rows into one `Series` a scalar; `series.window(a, b)` cuts
it; sums, closure errors and sign matches are those of definitions.md section 5. Everything that a
report prints comes from rows, so that merged shards and an unsharded run print the same.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from circuit.errors import CircuitError
from circuit.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Values: TypeAlias = "NDArray[np.float64]"
Kind = Literal["first_order", "path"]


@dataclass(frozen=True)
class Closure:
    """How far contributions are from what happened over some steps; null where nothing moved."""

    first_order: float | None
    """`|sum predicted - sum actual| / |sum actual|`."""
    path: float | None
    first_order_absolute: float | None
    """`sum |predicted - actual| / sum |actual|` over steps, which cancellation cannot flatter."""
    path_absolute: float | None


@dataclass(frozen=True)
class Series:
    """One scalar over steps `start + 1 .. end`.

    Attributes:
        telescopes: whether the actual changes sum to the last value minus the first.
        steps: step numbers `[step]`.
        before, after: values of the scalar at each step's two ends `[step]`.
        clip: clip factors `[step]`.
        first_order, path: contributions by term `[step]`.
        references: first-order contributions of what is not in the sum, by name `[step]`.
        groups: partition -> group -> kind -> term -> contributions `[step]`.
        nodes: of an adaptive path rule `[step]`; None of a fixed one.
        agrees: whether two of its levels agree `[step]`; None of a fixed one.
        rounded: whether they differ by no more than the scalar's own rounding, where the tolerance
            asks for less `[step]`; None of a fixed one, False in rows that do not tell.
    """

    scalar: str
    telescopes: bool
    steps: NDArray[np.int64]
    before: Values
    after: Values
    clip: Values
    first_order: dict[str, Values]
    path: dict[str, Values]
    references: dict[str, Values]
    groups: dict[str, dict[str, dict[str, dict[str, Values]]]]
    nodes: NDArray[np.int64] | None = None
    agrees: NDArray[np.bool_] | None = None
    rounded: NDArray[np.bool_] | None = None

    @classmethod
    def collect(cls, rows: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
        """One series a scalar, in the order of first appearance.

        Raises:
            CircuitError: the steps of a scalar do not follow each other.
        """
        collected = Collected()
        for row in rows:
            collected.add(row)
        return collected.series()

    @property
    def start(self) -> int:
        """The step whose state the series starts from."""
        return int(self.steps[0]) - 1

    @property
    def end(self) -> int:
        """The last step."""
        return int(self.steps[-1])

    @property
    def actual(self) -> Values:
        """Actual changes `[step]`."""
        return self.after - self.before

    def predicted(self, kind: Kind) -> Values:
        """Sum of the contributions of all terms `[step]`."""
        predicted: Values = np.sum(list(getattr(self, kind).values()), axis=0)  # [term, step]
        return predicted

    def window(self, start: int, end: int) -> Series:
        """The steps that take state `start` to state `end`.

        Raises:
            CircuitError: the window is not within the series.
        """
        if not self.start <= start < end <= self.end:
            raise CircuitError(
                f"window {start}:{end}", expected=f"start < end within {self.start}:{self.end}"
            )
        at = slice(start - self.start, end - self.start)

        def cut(columns: dict[str, Any]) -> dict[str, Any]:
            return {
                name: cut(column) if isinstance(column, dict) else column[at]
                for name, column in columns.items()
            }

        return Series(
            self.scalar,
            self.telescopes,
            self.steps[at],
            self.before[at],
            self.after[at],
            self.clip[at],
            cut(self.first_order),
            cut(self.path),
            cut(self.references),
            cut(self.groups),
            None if self.nodes is None else self.nodes[at],
            None if self.agrees is None else self.agrees[at],
            None if self.rounded is None else self.rounded[at],
        )

    def closure(self) -> Closure:
        """The closure errors of the contributions."""
        actual = self.actual

        def ratio(error: float, scale: float) -> float | None:
            return error / scale if scale else None

        def errors(kind: Kind) -> tuple[float | None, float | None]:
            # fsum: thousands of steps of either sign cancel, and shards add up in another order
            off = self.predicted(kind) - actual
            return (
                ratio(abs(math.fsum(off)), abs(math.fsum(actual))),
                ratio(math.fsum(np.abs(off)), math.fsum(np.abs(actual))),
            )

        (first, first_absolute), (path, path_absolute) = errors("first_order"), errors("path")
        return Closure(first, path, first_absolute, path_absolute)

    def sign_matches(self, kind: Kind) -> float:
        """Share of steps in which prediction and actual change have the same sign."""
        return float((np.sign(self.predicted(kind)) == np.sign(self.actual)).mean())

    def summary(self) -> dict[str, Any]:
        """Sums and closure as JSON."""
        return {
            "scalar": self.scalar,
            "start_step": self.start,
            "end_step": self.end,
            "telescopes": self.telescopes,
            "value_at_start": float(self.before[0]),
            "value_at_end": float(self.after[-1]),
            "actual": math.fsum(self.actual),
            "first_order": _sums(self.first_order),
            "path": _sums(self.path),
            "predicted": {k: math.fsum(self.predicted(k)) for k in ("first_order", "path")},
            "references": _sums(self.references),
            "closure": asdict(self.closure()),
            "sign_matches": {k: self.sign_matches(k) for k in ("first_order", "path")},
            "mean_clip_factor": math.fsum(self.clip) / len(self.clip),
            **self._adapted(),
            "groups": {
                partition: {
                    group: {kind: _sums(terms) for kind, terms in kinds.items()}
                    for group, kinds in groups.items()
                }
                for partition, groups in self.groups.items()
            },
        }

    def _adapted(self) -> dict[str, Any]:
        """What an adaptive rule needed; nothing of a fixed one, whose nodes its name tells."""
        if self.nodes is None or self.agrees is None or self.rounded is None:
            return {}
        return {
            "nodes": {
                "mean": float(self.nodes.mean()),
                "most": int(self.nodes.max()),
                "steps_within_rounding": int(self.rounded.sum()),
                "steps_without_agreement": int((~self.agrees & ~self.rounded).sum()),
            }
        }


def _sums(columns: Mapping[str, Values]) -> dict[str, float]:
    return {name: math.fsum(values) for name, values in columns.items()}


class Collected:
    """Rows while they are read, column by column, which takes a small part of their space."""

    def __init__(self) -> None:
        self._columns: dict[str, _Columns] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """One row more.

        Raises:
            CircuitError: its step does not follow the one before of its scalar, or it has other
                terms or groups.
        """
        self._columns.setdefault(row["scalar"], _Columns()).add(row)

    def series(self) -> dict[str, Series]:
        """One series a scalar, in the order of first appearance."""
        return {name: columns.series(name) for name, columns in self._columns.items()}


@dataclass
class _Columns:
    """Rows of one scalar, column by column, while they are read."""

    names: tuple[Any, ...] = ()
    telescopes: bool = True
    steps: list[int] = field(default_factory=list)
    scalars: list[tuple[float, ...]] = field(default_factory=list)
    numbers: array[float] = field(default_factory=lambda: array("d"))
    template: Mapping[str, Any] = field(default_factory=dict)
    adapted: dict[str, list[int]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        if self.steps and row["step"] != self.steps[-1] + 1:
            raise CircuitError(
                f"step {row['step']} of {row['scalar']} follows step {self.steps[-1]}",
                expected=f"step {self.steps[-1] + 1}",
            )
        self.steps.append(row["step"])
        self.telescopes = row["telescopes"]
        self.scalars.append((row["before"], row["after"], row["clip_factor"]))
        if "nodes" in row:
            for name in ("nodes", "agrees", "rounded"):
                self.adapted.setdefault(name, []).append(row.get(name, False))
        told = {key: row[key] for key in ("first_order", "path", "references", "groups")}
        self.template = self.template or told
        self.numbers.extend(_leaves(told, self.template, row["step"]))

    def series(self, scalar: str) -> Series:
        numbers = iter(np.array(self.numbers).reshape(len(self.steps), -1).T.copy())
        before, after, clip = np.array(self.scalars, dtype=np.float64).T.copy()

        def shaped(template: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: shaped(value) if isinstance(value, Mapping) else next(numbers)
                for name, value in template.items()
            }

        adapted: dict[str, Any] = {name: np.array(column) for name, column in self.adapted.items()}
        return Series(
            scalar,
            self.telescopes,
            np.array(self.steps),
            before,
            after,
            clip,
            **shaped(self.template),
            **adapted,
        )


def _leaves(told: Mapping[str, Any], like: Mapping[str, Any], step: int) -> Iterable[float]:
    """The numbers of a row, in the order of the first row's."""
    if told.keys() != like.keys():
        raise CircuitError(
            f"step {step} tells of {', '.join(told) or 'nothing'}",
            expected=f"{', '.join(like) or 'nothing'}, as the steps before",
        )
    for name, first in like.items():
        if isinstance(first, Mapping) != isinstance(told[name], Mapping):
            raise CircuitError(f"step {step} tells otherwise of {name} than the steps before")
        if isinstance(first, Mapping):
            yield from _leaves(told[name], first, step)
        else:
            yield told[name]


def check_windows(windows: Sequence[tuple[int, int]], start: int, end: int) -> None:
    """Refuse windows that are not within the attributed steps.

    Raises:
        CircuitError: names the first such window.
    """
    for a, b in windows:
        if not start <= a < b <= end:
            raise CircuitError(
                f"window {a}:{b}", where="`windows`", expected=f"start < end within {start}:{end}"
            )
