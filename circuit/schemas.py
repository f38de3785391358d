"""The row files that one command writes and another reads, and their one reader.

    answer_scalar_residual_diagnosis_pair_rows.jsonl   ScalarPairRow
    route_to_margin_closure_rows.jsonl                 RouteRow

Both speak of one *interval* between two checkpoints, one pair and one side of it: these four are a
row's key. Checkpoints are named relative to the run's folder, and by the digest of their weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, get_args

from pydantic import ValidationError, model_validator

from circuit.artifacts import read_jsonl
from circuit.documents import FiniteDocument
from circuit.errors import CircuitError
from circuit.strict_json import refuse_not_finite

SWITCH_BUCKETS = ("all", "same_competitor", "competitor_switch")
"""Which rows of an interval enter: all, or by whether the competitor switched."""

Side = Literal["clean", "corrupted"]
"""Side of a pair."""
SIDES = get_args(Side)

RouteBasis = Literal["refit", "source"]
"""Bases of route scores: those of each checkpoint, or the source's at both ends of an interval."""


class RowKey(NamedTuple):
    """What tells the rows of a file apart."""

    source_step: int
    target_step: int
    pair_id: str
    margin_side: str

    def __str__(self) -> str:
        """As an error names the row."""
        return f"{self.source_step} -> {self.target_step}, {self.pair_id}, {self.margin_side}"


class IntervalRow(FiniteDocument):
    """What every row of an interval, a pair and a side says.

    Attributes:
        source_step, target_step: of the two checkpoints.
        source_digest, target_digest: sha256 of their weights.
        pair_id, pair_type: the pair (definitions.md section 2).
        margin_side: side of the pair whose logits are read, `clean` or `corrupted`.
    """

    source_step: int
    target_step: int
    source_digest: str
    target_digest: str
    pair_id: str
    pair_type: str
    margin_side: Side

    @classmethod
    def measured(cls, **facts: Any) -> Self:
        """A row of what was computed.

        Raises:
            CircuitError: a number is not finite.
        """
        try:
            return cls(**facts)
        except ValidationError:
            refuse_not_finite(facts)
            raise

    @property
    def key(self) -> RowKey:
        """Interval, pair and side."""
        return RowKey(self.source_step, self.target_step, self.pair_id, self.margin_side)

    @model_validator(mode="after")
    def _forward(self) -> Self:
        if not 0 <= self.source_step < self.target_step:
            raise ValueError(f"steps {self.source_step} -> {self.target_step} are no interval")
        return self


class TokenLogit(FiniteDocument):
    """One token and its logit."""

    token: int
    logit: float


class ScalarPairRow(IntervalRow):
    """Every answer scalar of one side of a pair at both ends of an interval (definitions.md 5).

    Attributes:
        source_checkpoint, target_checkpoint: paths relative to the run's folder; see
            `find_checkpoint`.
        split: of the pair's record.
        answer: token id of the side's right value.
        source_competitor, target_competitor: token ids of the best wrong value at either end.
        switched: whether the two competitors differ.
        source_values, target_values, deltas: each answer scalar by name.
        first_order, curvature, switch: the parts of each delta.
        source_top_wrong, target_top_wrong: the best wrong values, the competitor first.
    """

    source_checkpoint: str
    target_checkpoint: str
    split: str
    answer: int
    source_competitor: int
    target_competitor: int
    switched: bool
    source_values: dict[str, float]
    target_values: dict[str, float]
    deltas: dict[str, float]
    first_order: dict[str, float]
    curvature: dict[str, float]
    switch: dict[str, float]
    source_top_wrong: list[TokenLogit]
    target_top_wrong: list[TokenLogit]

    def in_bucket(self, bucket: str) -> bool:
        """Whether the row is of one of `SWITCH_BUCKETS`."""
        return bucket == "all" or self.switched == (bucket == "competitor_switch")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.switched != (self.source_competitor != self.target_competitor):
            raise ValueError("'switched' contradicts the competitors")
        names = set(self.deltas)
        for name in ("source_values", "target_values", "first_order", "curvature", "switch"):
            if set(getattr(self, name)) != names:
                raise ValueError(f"'{name}' and 'deltas' hold different scalars")
        return self


class RouteRow(IntervalRow):
    """Transfer score of every route and a target scalar at both ends of an interval.

    Attributes:
        basis: that the scores have; rows of earlier versions, which do not say, are refitted.
        source_route_scores, target_route_scores, route_score_deltas: by label of the route.
        target_scalar: name of the answer scalar that the routes are held against.
        source_value, target_value, delta: of that scalar.
        predicted_delta: by the least squares of all rows.
        residual: delta minus predicted.
    """

    basis: RouteBasis = "refit"
    source_route_scores: dict[str, float]
    target_route_scores: dict[str, float]
    route_score_deltas: dict[str, float]
    target_scalar: str
    source_value: float
    target_value: float
    delta: float
    predicted_delta: float | None = None
    residual: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        labels = set(self.route_score_deltas)
        for name in ("source_route_scores", "target_route_scores"):
            if set(getattr(self, name)) != labels:
                raise ValueError(f"'{name}' and 'route_score_deltas' hold different routes")
        return self


AnyRow = TypeVar("AnyRow", bound=IntervalRow)


def read_typed_rows(path: str | Path, kind: type[AnyRow]) -> list[AnyRow]:
    """The rows of a file in their order; a row that stands there twice is returned once.

    Raises:
        CircuitError: the file is missing, empty or damaged, a row is not of this kind (file, line
            and field named), or two different rows have one key.
    """
    path = Path(path)
    rows: dict[RowKey, AnyRow] = {}
    lines: dict[RowKey, int] = {}
    for line, payload in enumerate(read_jsonl(path), start=1):
        try:
            row = kind.model_validate(payload)
        except ValidationError as error:
            raise _wrong_row(error, f"{path}:{line}", kind) from None
        first = rows.setdefault(row.key, row)
        if first != row:
            raise CircuitError(
                f"differs from line {lines[row.key]}, and both are of {row.key}",
                where=f"{path}:{line}",
                expected="one row for each interval, pair and side",
            )
        lines.setdefault(row.key, line)
    if not rows:
        raise CircuitError("holds no row", where=path, expected=f"rows of {_WRITERS[kind]}")
    return list(rows.values())


_WRITERS: dict[type[IntervalRow], str] = {
    ScalarPairRow: "answer-scalar-residual-diagnosis (its ..._pair_rows.jsonl)",
    RouteRow: "route-to-margin-closure",
}


def _wrong_row(error: ValidationError, where: str, kind: type[IntervalRow]) -> CircuitError:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return CircuitError(
        f"field '{field}': {message}" if field else message,
        where=where,
        expected=f"a row of {_WRITERS[kind]}",
    )


def names_of(rows: Iterable[dict[str, float]], what: str, where: str | Path) -> list[str]:
    """The keys that every one of some mappings holds, in the order of the first.

    Raises:
        CircuitError: two of them hold different keys.
    """
    rows = list(rows)
    names = list(rows[0]) if rows else []
    for row in rows:
        if set(row) != set(names):
            odd = sorted(set(row) ^ set(names))[0]
            raise CircuitError(f"rows hold different {what}: '{odd}' is not in all", where=where)
    return names


def run_relative(checkpoint: str | Path, run: str | Path) -> str:
    """A checkpoint's path relative to the run's folder, with forward slashes."""
    return Path(os.path.relpath(checkpoint, run)).as_posix()


def find_checkpoint(name: str, run: str | Path, rows: str | Path) -> Path:
    """The checkpoint that a row names: below the run's folder, or below one above the row file.

    It need not be a file: a trace makes its addressable steps. Whoever loads it compares the digest
    of its weights with the row's.

    Raises:
        CircuitError: there is no such folder of checkpoints.
    """
    places = [folder / name for folder in (Path(run), *Path(rows).resolve().parents)]
    for place in places:
        if place.is_file():
            return place
    for place in places:
        if place.parent.is_dir():
            return place
    raise CircuitError(
        f"no checkpoint '{name}' in the run's folder {run}",
        where=rows,
        fix="give the config of the run whose checkpoints the rows were made from",
    )


def is_over_all(row: Mapping[str, Any]) -> bool:
    """Whether a row of matches is over all reads; the column that says so is named by the task."""
    return "all" in row.values()
