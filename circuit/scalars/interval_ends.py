"""The ends of the intervals of scalar pair rows: their steps, weights, pairs and competitors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from circuit.errors import CircuitError
from circuit.options import PairOptions
from circuit.scalars.answers import FIXED_SOURCE, FIXED_TARGET, MOVING
from circuit.scalars.write_products import Readout
from circuit.schemas import RowKey, ScalarPairRow, find_checkpoint, read_typed_rows
from circuit.tasks.examples import Examples
from circuit.tasks.pairs import Pair

if TYPE_CHECKING:
    from circuit.reports.inputs import Checkpointed, Inputs

ENDPOINTS = ("source", "target")

_SMOOTH = {
    MOVING: FIXED_SOURCE,
    FIXED_TARGET: FIXED_SOURCE,
    "target_best_wrong_logit": "source_best_wrong_logit",
}
_WITHOUT_COMPETITOR = ("correct_value_logit", "negative_answer_loss")


@dataclass(frozen=True)
class End:
    """One end of an interval.

    Attributes:
        endpoint: one of `ENDPOINTS`.
        rows: of the interval, one a pair.
    """

    endpoint: str
    rows: tuple[ScalarPairRow, ...]

    @property
    def step(self) -> int:
        """Of its checkpoint."""
        row = self.rows[0]
        return row.source_step if self.endpoint == "source" else row.target_step

    @cached_property
    def _competitors(self) -> dict[str, tuple[int, ...]]:
        return {
            "source": tuple(row.source_competitor for row in self.rows),
            "target": tuple(row.target_competitor for row in self.rows),
        }

    def readout(self, scalar: str) -> Readout:
        """A scalar with its competitors frozen; the moving margin's are those of this end."""
        smooth = _SMOOTH.get(scalar, scalar)
        if scalar in _WITHOUT_COMPETITOR:
            return Readout(smooth, ())
        if scalar == MOVING:
            return Readout(smooth, self._competitors[self.endpoint])
        return Readout(smooth, self._competitors["source" if scalar == smooth else "target"])

    def values(self, scalar: str) -> list[float | None]:
        """A scalar at this end as the rows have it; None where they do not hold it."""
        return [
            (r.source_values if self.endpoint == "source" else r.target_values).get(scalar)
            for r in self.rows
        ]


@dataclass(frozen=True)
class Weights:
    """The checkpoint that the rows name for a step, and the first row that does."""

    name: str
    digest: str
    key: RowKey

    def check(self, point: Checkpointed, rows: Path) -> None:
        """Refuse a checkpoint that has other weights now.

        Raises:
            CircuitError: the step or the digest is not the rows' (the row is named).
        """
        if point.digest != self.digest:
            raise CircuitError(
                f"the row of {self.key} was made from other weights than {point.path} has",
                where=rows,
                expected=f"digest {self.digest[:12]}, not {point.digest[:12]}",
                fix="run answer-scalar-residual-diagnosis again on these checkpoints",
            )


@dataclass(frozen=True)
class Intervals:
    """Some rows of a file of `ScalarPairRow`, interval by interval.

    Attributes:
        path: the file.
        by_steps: (source step, target step), ascending, and the interval's rows in the order of
            the first interval's pairs.
    """

    path: Path
    by_steps: Mapping[tuple[int, int], tuple[ScalarPairRow, ...]]

    @property
    def first(self) -> tuple[ScalarPairRow, ...]:
        """The rows of the first interval: one of each pair."""
        return next(iter(self.by_steps.values()))

    def ends(self, endpoints: Sequence[str]) -> list[End]:
        """The chosen ends, interval by interval."""
        return [End(name, rows) for rows in self.by_steps.values() for name in endpoints]

    def weights(self, endpoints: Sequence[str]) -> dict[int, Weights]:
        """The checkpoint of each step, ascending.

        Raises:
            CircuitError: rows name different checkpoints or weights for one step.
        """
        by_step: dict[int, Weights] = {}
        for rows in self.by_steps.values():
            for row in rows:
                for end in endpoints:
                    step, name, digest = (
                        getattr(row, f"{end}_{part}") for part in ("step", "checkpoint", "digest")
                    )
                    earlier = by_step.setdefault(step, Weights(name, digest, row.key))
                    if (name, digest) != (earlier.name, earlier.digest):
                        raise CircuitError(
                            f"rows {earlier.key} and {row.key} name different weights for step"
                            f" {step}",
                            where=self.path,
                        )
        return dict(sorted(by_step.items()))

    def checkpoints(self, weights: Mapping[int, Weights], run: Path) -> list[Path]:
        """The checkpoint of each step, below the run's folder or one above the row file."""
        return [find_checkpoint(w.name, run, self.path) for w in weights.values()]

    def pairs(self, inputs: Inputs) -> list[Pair]:
        """The pairs of the rows, in their order, built again from the probe records.

        Raises:
            CircuitError: the probe records do not give a row's pair.
        """
        types = tuple(dict.fromkeys(row.pair_type for row in self.first))
        options = PairOptions(pair_types=types, all_reads=True, min_pairs_per_type=0)
        by_id = {pair.pair_id: pair for pair in inputs.pairs(options)}
        for row in self.first:
            if row.pair_id not in by_id:
                raise CircuitError(
                    f"the probe set does not give the pair of row {row.key}",
                    where=self.path,
                    fix="give the probe set that the rows were made from",
                )
        return [by_id[row.pair_id] for row in self.first]

    def check_tokens(self, batch: Examples, values: range) -> None:
        """Refuse rows whose answers or competitors cannot be those of the pairs' reads.

        Args:
            batch: the pairs' reads, on the rows' side.
            values: the value tokens.

        Raises:
            CircuitError: names the row.
        """
        answers = batch.answer.tolist()
        for rows in self.by_steps.values():
            for row, answer in zip(rows, answers, strict=True):
                odd = [t for t in (row.source_competitor, row.target_competitor) if t not in values]
                what = f"competitor {odd[0]}, which is no value" if odd else ""
                if row.answer != answer:
                    what = f"answer {row.answer}, its pair {answer}"
                if what:
                    raise CircuitError(
                        f"row {row.key} has {what}",
                        where=self.path,
                        fix="give the probe set that the rows were made from",
                    )


def read_intervals(
    path: Path,
    *,
    pair_types: Sequence[str],
    side: str,
    start_step: int | None = None,
    end_step: int | None = None,
) -> Intervals:
    """The rows of some pair types and one side, of intervals that lie within some steps.

    Raises:
        CircuitError: the file is missing, damaged or of another kind, holds none of a type or of
            the side or no such interval, or an interval lacks a pair (the row is named).
    """
    every = read_typed_rows(path, ScalarPairRow)
    for name, values, present in (
        ("pair type", pair_types, {row.pair_type for row in every}),
        ("side", [side], {row.margin_side for row in every}),
    ):
        for value in values:
            if value not in present:
                raise CircuitError(
                    f"no row of {name} '{value}'", where=path, expected=", ".join(sorted(present))
                )
    by_steps: dict[tuple[int, int], dict[str, ScalarPairRow]] = {}
    for row in sorted(every, key=lambda row: (row.source_step, row.target_step)):
        starts = start_step is None or row.source_step >= start_step
        ends = end_step is None or row.target_step <= end_step
        if starts and ends and row.margin_side == side and row.pair_type in pair_types:
            by_steps.setdefault((row.source_step, row.target_step), {})[row.pair_id] = row
    if not by_steps:
        steps = sorted({(row.source_step, row.target_step) for row in every})
        raise CircuitError(
            f"no interval lies within steps {start_step} to {end_step}",
            where=path,
            expected=f"some of {', '.join(f'{s} -> {t}' for s, t in steps)}",
        )
    return Intervals(path, _aligned(by_steps, path, side))


def read_interval_at(
    path: Path, pairs: Sequence[Pair], *, side: str, endpoint: str, step: int
) -> Intervals:
    """The one interval that has an end at a step, its rows in the order of some pairs.

    Raises:
        CircuitError: the file is missing, damaged or of another kind, it holds several such
            intervals, or none of a pair (the pair is named).
    """
    ending = [
        row
        for row in read_typed_rows(path, ScalarPairRow)
        if row.margin_side == side and getattr(row, f"{endpoint}_step") == step
    ]
    steps = sorted({(row.source_step, row.target_step) for row in ending})
    if len(steps) > 1:
        raise CircuitError(
            f"holds several intervals whose {endpoint} is step {step}:"
            f" {', '.join(f'{s} -> {t}' for s, t in steps)}",
            where=path,
            expected="one, whose competitors are taken",
        )
    rows = {row.pair_id: row for row in ending}
    for pair in pairs:
        if pair.pair_id not in rows:
            raise CircuitError(
                f"no row of pair {pair.pair_id}, side {side}, whose {endpoint} is step {step}",
                where=path,
                fix="diagnose an interval with that end, on the same pairs",
            )
    return Intervals(path, {steps[0]: tuple(rows[pair.pair_id] for pair in pairs)})


def _aligned(
    by_steps: Mapping[tuple[int, int], Mapping[str, ScalarPairRow]], path: Path, side: str
) -> dict[tuple[int, int], tuple[ScalarPairRow, ...]]:
    """Every interval's rows in the order of the first interval that has each pair."""
    ids = list(dict.fromkeys(pair for rows in by_steps.values() for pair in rows))
    for steps, rows in by_steps.items():
        for pair in ids:
            if pair not in rows:
                raise CircuitError(
                    f"no row of {RowKey(*steps, pair, side)}",
                    where=path,
                    expected="the same pairs in every interval",
                )
    return {steps: tuple(rows[pair] for pair in ids) for steps, rows in by_steps.items()}
