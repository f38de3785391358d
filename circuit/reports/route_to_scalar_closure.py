"""route-to-scalar-closure: which answer scalar do changes of route scores explain, and when?

Joins the rows of route-to-margin-closure with the pair rows of answer-scalar-residual-diagnosis on
interval and pair (routes know no side), and fits the changes of every scalar in every bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from circuit.artifacts import dump_rows
from circuit.errors import CircuitError
from circuit.figures.closure import actual_against_predicted, contributions, r_squared_by_scalar
from circuit.reports.base import ReportResult, open_report
from circuit.reports.closure import (
    NOTE,
    check_sides,
    empty_fit,
    fit_deltas,
    fit_lines,
    markdown,
    number,
    warnings_of,
)
from circuit.schemas import (
    SWITCH_BUCKETS,
    IntervalRow,
    RouteRow,
    ScalarPairRow,
    names_of,
    read_typed_rows,
)

COMMAND = "route-to-scalar-closure"


@dataclass(frozen=True)
class ScalarClosure:
    """Parameters of the report; None takes everything that the rows hold.

    Attributes:
        scalars: answer scalars of the scalar rows.
        switch_buckets: some of `SWITCH_BUCKETS`.
        route_labels: of the route rows, in the order of the design's columns.
        pair_types, margin_sides: of the rows that enter; the sides are pooled.
        fit_intercept: whether the least squares have a constant.
    """

    scalars: tuple[str, ...] | None = None
    switch_buckets: tuple[str, ...] = SWITCH_BUCKETS
    route_labels: tuple[str, ...] | None = None
    pair_types: tuple[str, ...] | None = None
    margin_sides: tuple[str, ...] | None = None
    fit_intercept: bool = False


class Joined(NamedTuple):
    """One interval, pair and side: the pair's route row, and the side's scalars."""

    route: RouteRow
    scalars: ScalarPairRow


class _PairKey(NamedTuple):
    source_step: int
    target_step: int
    pair_id: str

    @classmethod
    def of(cls, row: IntervalRow) -> _PairKey:
        return cls(row.source_step, row.target_step, row.pair_id)

    def __str__(self) -> str:
        return f"{self.source_step} -> {self.target_step}, {self.pair_id}"


def route_to_scalar_closure(
    route_closure_rows: Path,
    scalar_pair_rows: Path,
    wanted: ScalarClosure,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
) -> ReportResult:
    """Join, fit every scalar and bucket, and write the report.

    Raises:
        CircuitError: a file is missing, damaged or of another kind; a row is missing, is there
            twice with different content, or is of other weights (it is named); a scalar, bucket,
            route, type or side is not in the rows; or the folder is not free.
    """
    for bucket in wanted.switch_buckets:
        if bucket not in SWITCH_BUCKETS:
            raise CircuitError(
                f"unknown switch bucket '{bucket}'", expected=f"one of {', '.join(SWITCH_BUCKETS)}"
            )
    if len(set(wanted.switch_buckets)) < len(wanted.switch_buckets):
        raise CircuitError("a switch bucket is named twice", expected="each once")
    if wanted.margin_sides is not None:
        check_sides(wanted.margin_sides)
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        routes = read_typed_rows(route_closure_rows, RouteRow)
        scalars = read_typed_rows(scalar_pair_rows, ScalarPairRow)
        held = names_of((row.route_score_deltas for row in routes), "routes", route_closure_rows)
        labels = _chosen("route", wanted.route_labels, held, route_closure_rows)
        held = names_of((row.deltas for row in scalars), "scalars", scalar_pair_rows)
        names = _chosen("scalar", wanted.scalars, held, scalar_pair_rows)
        joined = join_rows(
            routes,
            scalars,
            route_closure_rows,
            scalar_pair_rows,
            pair_types=wanted.pair_types,
            margin_sides=wanted.margin_sides,
        )
        fits, rows = _fit(joined, names, labels, wanted)
        intervals = sorted({(j.scalars.source_step, j.scalars.target_step) for j in joined})
        summary = {
            "intervals": [list(interval) for interval in intervals],
            "pairs": len({j.scalars.pair_id for j in joined}),
            "sides": _unique([j.scalars.margin_side for j in joined]),
            "rows": len(joined),
            "switched": sum(j.scalars.switched for j in joined),
            "routes": labels,
            "fits": [
                {k: v for k, v in fit.items() if k not in ("coefficients", "mean_contributions")}
                for fit in fits
            ],
        }
        shown = next((fit["switch_bucket"] for fit in fits if fit["rows"]), None)
        if shown is None:
            raise CircuitError(
                f"no row is in bucket {', '.join(wanted.switch_buckets)}",
                where=scalar_pair_rows,
                fix="choose another with --switch-bucket",
            )
        first = [fit for fit in fits if fit["switch_bucket"] == shown]
        return writer.write(
            parameters={
                "route_closure_rows": str(route_closure_rows),
                "scalar_pair_rows": str(scalar_pair_rows),
                **asdict(wanted),
            },
            summary=summary,
            rows=fits,
            page=_page(writer.name, summary, fits, first, labels, wanted),
            figures={
                f"{writer.name}_r_squared": r_squared_by_scalar(fits),
                f"{writer.name}_fit": actual_against_predicted(_points(rows, names, shown)),
                f"{writer.name}_contributions": contributions(first, "scalar"),
            },
            further={f"{writer.name}_pair_rows.jsonl": dump_rows(rows)},
            provenance={
                "route_closure_rows_sha256": _sha256(route_closure_rows),
                "scalar_pair_rows_sha256": _sha256(scalar_pair_rows),
            },
            law=f"every one of {len(joined)} scalar rows has the route row of its interval and"
            " pair, of the same weights, and no route row is left over",
        )


def join_rows(
    routes: Sequence[RouteRow],
    scalars: Sequence[ScalarPairRow],
    route_file: Path,
    scalar_file: Path,
    *,
    pair_types: Sequence[str] | None = None,
    margin_sides: Sequence[str] | None = None,
) -> list[Joined]:
    """Each chosen scalar row with the route row of its interval and pair, in the scalars' order.

    Raises:
        CircuitError: one of them is missing, they are of different weights, two sides of a pair
            have different route scores, or a type or side is in neither file; the row is named.
    """
    types = _unique([row.pair_type for row in (*routes, *scalars)])
    types = _chosen("pair type", pair_types, types, scalar_file)
    sides = _unique([row.margin_side for row in (*routes, *scalars)])
    sides = _chosen("margin side", margin_sides, sides, scalar_file)
    by_pair = _by_pair([row for row in routes if row.pair_type in types], route_file)
    joined = []
    for row in scalars:
        if row.pair_type not in types or row.margin_side not in sides:
            continue
        route = by_pair.get(_PairKey.of(row))
        if route is None:
            raise CircuitError(
                f"no route row of {_PairKey.of(row)}",
                where=route_file,
                expected=f"the intervals and pairs of {scalar_file}",
                fix="make both files from the same checkpoints, probe set and pair options",
            )
        _refuse_other_weights(route, row, route_file, scalar_file)
        joined.append(Joined(route, row))
    present = {(_PairKey.of(j.scalars), j.scalars.margin_side) for j in joined}
    for key in by_pair:
        for side in sides:
            if (key, side) not in present:
                raise CircuitError(
                    f"no scalar row of {key}, {side}",
                    where=scalar_file,
                    expected=f"the intervals, pairs and sides of {route_file}",
                    fix="make both files from the same checkpoints, probe set and pair options, or"
                    " choose with --pair-type and --margin-side",
                )
    return joined


def _by_pair(routes: Sequence[RouteRow], where: Path) -> dict[_PairKey, RouteRow]:
    found: dict[_PairKey, RouteRow] = {}
    for row in routes:
        first = found.setdefault(_PairKey.of(row), row)
        if (
            first.route_score_deltas != row.route_score_deltas
            or first.source_digest != row.source_digest
            or first.target_digest != row.target_digest
        ):
            raise CircuitError(
                f"the route row of {row.key} differs from that of side {first.margin_side}",
                where=where,
                expected="the same weights and route scores on both sides of a pair",
            )
    return found


def _refuse_other_weights(
    route: RouteRow, row: ScalarPairRow, route_file: Path, scalar_file: Path
) -> None:
    for end in ("source", "target"):
        ours, theirs = (getattr(one, f"{end}_digest") for one in (route, row))
        if ours != theirs:
            raise CircuitError(
                f"the row of {row.key} is of {end} weights {theirs[:12]}, the route row of"
                f" {ours[:12]}",
                where=scalar_file,
                expected=f"the weights of {route_file}",
                fix="make both files from the same checkpoints",
            )


def _fit(
    joined: Sequence[Joined], names: Sequence[str], labels: Sequence[str], wanted: ScalarClosure
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A fit for each scalar and bucket, and a row for each joined row."""
    rows = [
        {
            **{key: getattr(j.scalars, key) for key in _ROW_KEYS},
            "actual": {name: j.scalars.deltas[name] for name in names},
            "predicted": {},
            "residual": {},
        }
        for j in joined
    ]
    fits = []
    for name in names:
        for bucket in wanted.switch_buckets:
            own = [i for i, j in enumerate(joined) if j.scalars.in_bucket(bucket)]
            group = {"scalar": name, "switch_bucket": bucket}
            if not own:
                fits.append({**group, **empty_fit(labels)})
                continue
            fit, predicted = fit_deltas(
                [{k: joined[i].route.route_score_deltas[k] for k in labels} for i in own],
                [joined[i].scalars.deltas[name] for i in own],
                [joined[i].scalars.pair_id for i in own],
                fit_intercept=wanted.fit_intercept,
            )
            fits.append({**group, **fit})
            for i, value in zip(own, predicted, strict=True):
                rows[i]["predicted"].setdefault(bucket, {})[name] = value
                rows[i]["residual"].setdefault(bucket, {})[name] = rows[i]["actual"][name] - value
    return fits, rows


_ROW_KEYS = ("source_step", "target_step", "pair_id", "pair_type", "margin_side", "switched")


def _chosen(what: str, wanted: Sequence[str] | None, held: Sequence[str], where: Path) -> list[str]:
    """The names asked for, all that there are by default.

    Raises:
        CircuitError: a name is not in the rows, or stands twice.
    """
    for name in wanted or ():
        if name not in held:
            raise CircuitError(
                f"the rows hold no {what} '{name}'",
                where=where,
                expected=f"one of {', '.join(held)}",
            )
    chosen = list(wanted or held)
    if len(set(chosen)) < len(chosen):
        raise CircuitError(f"a {what} is named twice", expected="each once")
    return chosen


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _points(
    rows: Sequence[dict[str, Any]], names: Sequence[str], bucket: str
) -> list[dict[str, Any]]:
    """What the figure of actual against predicted shows: the rows of one bucket."""
    return [
        {
            "panel": name,
            "group": "competitor switched" if row["switched"] else "same competitor",
            "actual": row["actual"][name],
            "predicted": row["predicted"][bucket][name],
        }
        for name in names
        for row in rows
        if bucket in row["predicted"]
    ]


def _page(
    name: str,
    summary: dict[str, Any],
    fits: Sequence[dict[str, Any]],
    first: Sequence[dict[str, Any]],
    labels: Sequence[str],
    wanted: ScalarClosure,
) -> list[str]:
    steps = summary["intervals"]
    named = [{**fit, "fit": f"`{fit['scalar']}`, {fit['switch_bucket']}"} for fit in fits]
    return [
        f"Changes of answer scalars over {len(steps)} intervals of steps {steps[0][0]} to"
        f" {steps[-1][1]}, {summary['pairs']} pairs, {' and '.join(summary['sides'])} side pooled,"
        f" by changes of {len(labels)} route scores,"
        f" {'with' if wanted.fit_intercept else 'without'} intercept. The competitor switched in"
        f" {summary['switched']} of {summary['rows']} rows.",
        "",
        *fit_lines(fits, {"scalar": "scalar", "switch_bucket": "bucket"}),
        "",
        *warnings_of(named, "fit"),
        NOTE,
        "",
        f"![R² by scalar and bucket]({name}_r_squared.svg)",
        "",
        f"![actual against predicted]({name}_fit.svg)",
        "",
        f"## Contributions to the mean change, bucket `{first[0]['switch_bucket']}`",
        "",
        *markdown(
            ["route", *(f"`{fit['scalar']}`" for fit in first)],
            [
                [f"`{label}`", *(number(_contribution(fit, label)) for fit in first)]
                for label in labels
            ],
        ),
        "",
        f"![contributions of the routes]({name}_contributions.svg)",
    ]


def _contribution(fit: dict[str, Any], label: str) -> float | None:
    values = fit["mean_contributions"]
    return None if values is None else float(values[label])
