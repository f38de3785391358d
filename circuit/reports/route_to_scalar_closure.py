"""route-to-scalar-closure: which answer scalar do changes of route scores explain, and when?

Joins the rows of route-to-margin-closure with the pair rows of answer-scalar-residual-diagnosis on
interval and pair (routes know no side), and fits the changes of every scalar in every bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from circuit import options
from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.figures.charts import Chart, chart, colour, equals, exact, named, thinned
from circuit.lazy import alt
from circuit.options import Option
from circuit.reading import file_digest
from circuit.reports.closure import (
    NOTE,
    contributions,
    empty_fit,
    fit_deltas,
    fits_table,
    undetermined,
)
from circuit.reports.closure_nulls import (
    Nulls,
    RouteChanges,
    nulls_chart,
    nulls_notes,
    nulls_table,
    told,
)
from circuit.reports.intervals import ends_of, shown, without_ends
from circuit.reports.report import Findings, Report, Results
from circuit.reports.tables import Table
from circuit.scalars.answers import ScalarNames
from circuit.schemas import (
    SWITCH_BUCKETS,
    IntervalRow,
    RouteRow,
    ScalarPairRow,
    names_of,
    read_typed_rows,
)
from circuit.tasks.pairs import record_of

PAIR_ROWS = "route_to_scalar_closure_pair_rows.jsonl"


class ScalarClosureOptions(options.Options):
    """What is taken of the rows; sides are pooled."""

    route_closure_rows: Annotated[
        Path, Option("Rows of route-to-margin-closure.", kind="route_closure_rows")
    ]
    scalar_pair_rows: options.ScalarPairRows
    scalars: ScalarNames = ()
    switch_buckets: options.SwitchBuckets = SWITCH_BUCKETS
    route_labels: Annotated[
        tuple[str, ...], Option("Route, by its label.", flag="--route-label", unset="all")
    ] = ()
    pair_types: Annotated[
        tuple[str, ...],
        Option("Pair type of the rows.", flag="--pair-type", kind="pair_type", unset="all"),
    ] = ()
    margin_sides: options.MarginSides = ()
    fit_intercept: options.FitIntercept = False
    nulls: Nulls = 0


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


class ScalarClosure(Report[ScalarClosureOptions]):
    """Which answer scalar do changes of route scores explain, and when?"""

    command = "route-to-scalar-closure"
    Options = ScalarClosureOptions
    reads_run = False
    title = "Routes to the answer scalars"
    question = "Which answer scalar do changes of route scores explain?"

    def prepare(self) -> None:
        """Read both files, and join them."""
        asked = self.options
        route_file, scalar_file = asked.route_closure_rows, asked.scalar_pair_rows
        routes = read_typed_rows(route_file, RouteRow)
        scalars = read_typed_rows(scalar_file, ScalarPairRow)
        self.basis, *others = {row.basis: None for row in routes}
        if others:
            raise CircuitError(
                f"holds route scores of bases {self.basis} and {others[0]}",
                where=route_file,
                expected="one basis in all rows",
            )
        held = names_of((row.route_score_deltas for row in routes), "routes", route_file)
        self.labels = _chosen("route", asked.route_labels, held, route_file)
        held = names_of((row.deltas for row in scalars), "scalars", scalar_file)
        self.scalars = _chosen("scalar", asked.scalars, held, scalar_file)
        self.joined = join_rows(
            routes,
            scalars,
            route_file,
            scalar_file,
            pair_types=asked.pair_types,
            margin_sides=asked.margin_sides,
        )
        if not any(j.scalars.in_bucket(b) for b in asked.switch_buckets for j in self.joined):
            raise CircuitError(
                f"no row is in bucket {', '.join(asked.switch_buckets)}",
                where=scalar_file,
                fix="choose another with `switch_buckets`",
            )

    def conclude(self, rows: list[Row]) -> Findings:
        fits, pair_rows = self._fits()
        scalars = [j.scalars for j in self.joined]
        intervals = sorted({(row.source_step, row.target_step) for row in scalars})
        long = ("coefficients", "mean_contributions")
        summary = {
            "intervals": [list(interval) for interval in intervals],
            "pairs": len({row.pair_id for row in scalars}),
            "sides": list(dict.fromkeys(row.margin_side for row in scalars)),
            "rows": len(scalars),
            "switched": sum(row.switched for row in scalars),
            "routes": self.labels,
            "basis": self.basis,
            **told(self.options.nulls),
            "fits": [{k: v for k, v in fit.items() if k not in long} for fit in fits],
        }
        law = (
            f"every one of {len(scalars)} scalar rows has the route row of its interval and pair,"
            " of the same weights, and no route row is left over"
        )
        return Findings(without_ends(fits), summary, law, further={PAIR_ROWS: pair_rows})

    def provenance(self) -> dict[str, Any]:
        return {
            f"{name}_sha256": file_digest(getattr(self.options, name))
            for name in ("route_closure_rows", "scalar_pair_rows")
        }

    def _fits(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A fit for each scalar and bucket, and a row for each joined row."""
        rows: list[dict[str, Any]] = [
            {
                **{key: getattr(j.scalars, key) for key in _ROW_KEYS},
                "actual": {name: j.scalars.deltas[name] for name in self.scalars},
                "predicted": {},
                "residual": {},
            }
            for j in self.joined
        ]
        keys = [_PairKey.of(j.route) for j in self.joined]
        kinds = [j.route.pair_type for j in self.joined]
        scores = [j.route.route_score_deltas for j in self.joined]
        asked, fits = self.options, []
        changes = RouteChanges(keys, kinds, scores, self.labels) if asked.nulls else None
        for name in self.scalars:
            for bucket in self.options.switch_buckets:
                place = {"scalar": name, "switch_bucket": bucket}
                entering = [i for i, j in enumerate(self.joined) if j.scalars.in_bucket(bucket)]
                if not entering:
                    fits.append({**place, **empty_fit(self.labels)})
                    continue
                joined = [self.joined[i] for i in entering]
                fit, predicted = fit_deltas(
                    [{k: j.route.route_score_deltas[k] for k in self.labels} for j in joined],
                    [j.scalars.deltas[name] for j in joined],
                    [record_of(j.scalars.pair_id) for j in joined],
                    fit_intercept=self.options.fit_intercept,
                )
                if changes is not None:
                    fit["nulls"] = changes.nulls(
                        [keys[i] for i in entering],
                        [j.scalars.deltas[name] for j in joined],
                        fit,
                        fit_intercept=asked.fit_intercept,
                        draws=asked.nulls,
                    )
                fits.append({**place, **fit})
                for i, value in zip(entering, predicted, strict=True):
                    rows[i]["predicted"].setdefault(bucket, {})[name] = value
                    residual = rows[i]["actual"][name] - value
                    rows[i]["residual"].setdefault(bucket, {})[name] = residual
        return fits, rows

    @classmethod
    def size(cls, results: Results[ScalarClosureOptions]) -> tuple[float, ...]:
        return len(results.summary["fits"]), results.summary["rows"]

    @classmethod
    def notes(cls, results: Results[ScalarClosureOptions]) -> list[str]:
        summary, intercept = results.summary, results.options.fit_intercept
        steps = summary["intervals"]
        return [
            f"Changes of answer scalars over {len(steps)} intervals of steps {steps[0][0]} to"
            f" {steps[-1][1]}, {summary['pairs']} pairs, {' and '.join(summary['sides'])} side"
            f" pooled, by changes of {len(summary['routes'])} route scores (basis:"
            f" {summary.get('basis', 'refit')}), {'with' if intercept else 'without'} intercept."
            f" The competitor switched in {summary['switched']} of {summary['rows']} rows.",
            *undetermined(summary["fits"], "scalar", "switch_bucket"),
            NOTE,
            *nulls_notes(summary["fits"]),
        ]

    @classmethod
    def tables(cls, results: Results[ScalarClosureOptions]) -> list[Table]:
        fits = _shown(results)
        columns = {fit["scalar"]: (fit["scalar"], ".3f") for fit in fits}
        rows = [
            {"route": label} | {fit["scalar"]: fit["mean_contributions"][label] for fit in fits}
            for label in results.summary["routes"]
        ]
        title = f"Contributions to the mean change, bucket {fits[0]['switch_bucket']}"
        names = {"scalar": "scalar", "switch_bucket": "bucket"}
        return [
            fits_table("Fits", names, results.summary["fits"]),
            *nulls_table(names, results.summary["fits"]),
            Table(title, {"route": "route", **columns}, rows),
        ]

    @classmethod
    def charts(cls, results: Results[ScalarClosureOptions]) -> list[Chart]:
        """R² of every fit; contributions, and every row, in the first bucket that has rows."""
        fits = _shown(results)
        bucket = fits[0]["switch_bucket"]
        points: dict[str, list[Row]] = {fit["scalar"]: [] for fit in fits}
        for row in results.rows(PAIR_ROWS):
            for scalar, predicted in row["predicted"].get(bucket, {}).items():
                points[scalar].append(
                    {
                        **{key: row[key] for key in ("source_step", "target_step", "pair_id")},
                        "competitor": "switched" if row["switched"] else "the same",
                        "predicted": predicted,
                        "actual": row["actual"][scalar],
                    }
                )
        shade = colour("competitor", ("the same", "switched"), title="competitor")
        name = cls.stem()
        drawn = [
            _r_squared(f"{name}_r_squared", results.summary["fits"]),
            contributions(
                f"{name}_contributions",
                f"Coefficient × mean change of the score, by scalar, bucket {bucket}",
                fits,
                "scalar",
            ),
        ]
        drawn += nulls_chart(f"{name}_nulls", results.summary["fits"], ["scalar", "switch_bucket"])
        for scalar, every in points.items():
            rows = thinned(every)
            ends = ("predicted", "predicted change"), ("actual", "actual change")
            data = f"{name}_fit_{scalar}"
            title = f"Changes of {scalar}, actual and predicted, bucket {bucket}"
            drawn.append(
                chart(data, title, {data: rows}, *equals(data, *ends, shade, rows), height=220)
            )
        return drawn


_ROW_KEYS = ("source_step", "target_step", "pair_id", "pair_type", "margin_side", "switched")


def _shown(results: Results[ScalarClosureOptions]) -> list[Row]:
    """The fits in the first bucket that has rows."""
    fits = list(results.rows())
    bucket = next(fit["switch_bucket"] for fit in fits if fit["rows"])
    return [fit for fit in fits if fit["switch_bucket"] == bucket]


def _r_squared(name: str, fits: Sequence[Row]) -> Chart:
    """Bars of R² by scalar and bucket with their intervals, a stroke where records are held out."""
    columns = ("scalar", "switch_bucket", "rows", "r_squared", *ends_of("r_squared"))
    columns = (*columns, "r_squared_held_out")
    data = shown(fits, columns)
    buckets = list(dict.fromkeys(row["switch_bucket"] for row in data))
    scalars = list(dict.fromkeys(row["scalar"] for row in data))
    least = min((row["r_squared"] for row in data if row["r_squared"] is not None), default=0.0)
    domain = [max(min(0.0, 1.05 * least), -1.0), 1.0]
    place = named(name).encode(
        y=alt.Y("scalar:N").title(None).sort(scalars).axis(labelLimit=240),
        yOffset=alt.YOffset("switch_bucket:N").sort(buckets),
        tooltip=exact(*columns),
    )
    title = "R² (line: interval; stroke: held out)"
    x = alt.X("r_squared:Q").title(title).scale(domain=domain)
    held_out = alt.X("r_squared_held_out:Q").title(title).scale(domain=domain)
    low, high = ends_of("r_squared")
    interval = alt.X(f"{low}:Q").title(title).scale(domain=domain)
    return chart(
        name,
        "Share of each scalar's changes that changes of route scores explain",
        {name: data},
        place.mark_bar(clip=True).encode(x=x, color=colour("switch_bucket", buckets)),
        place.mark_rule(color="var(--ink)", clip=True).encode(x=interval, x2=f"{high}:Q"),
        place.mark_tick(color="var(--ink)", thickness=2, clip=True).encode(x=held_out),
        height=(14 * len(buckets) + 8) * len(scalars),
    )


def join_rows(
    routes: Sequence[RouteRow],
    scalars: Sequence[ScalarPairRow],
    route_file: Path,
    scalar_file: Path,
    *,
    pair_types: Sequence[str] = (),
    margin_sides: Sequence[str] = (),
) -> list[Joined]:
    """Each chosen scalar row with the route row of its interval and pair, in the scalars' order.

    Args:
        pair_types, margin_sides: that are chosen; all without any.

    Raises:
        CircuitError: one of them is missing, they are of different weights, two sides of a pair
            have different route scores, or a type or side is in neither file; the row is named.
    """
    types = _chosen(
        "pair type", pair_types, [r.pair_type for r in (*routes, *scalars)], scalar_file
    )
    sides = _chosen("side", margin_sides, [r.margin_side for r in (*routes, *scalars)], scalar_file)
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
                    " choose with `pair_types` and `margin_sides`",
                )
    return joined


def _by_pair(routes: Sequence[RouteRow], where: Path) -> dict[_PairKey, RouteRow]:
    """The route row of each interval and pair, whose sides must agree."""
    by_pair: dict[_PairKey, RouteRow] = {}
    same = ("route_score_deltas", "source_digest", "target_digest")
    for row in routes:
        first = by_pair.setdefault(_PairKey.of(row), row)
        if any(getattr(first, name) != getattr(row, name) for name in same):
            raise CircuitError(
                f"the route row of {row.key} differs from that of side {first.margin_side}",
                where=where,
                expected="the same weights and route scores on both sides of a pair",
            )
    return by_pair


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


def _chosen(what: str, asked: Sequence[str], held: Sequence[str], where: Path) -> list[str]:
    """The names asked for, all that there are without any.

    Raises:
        CircuitError: a name is not in the rows.
    """
    known = list(dict.fromkeys(held))
    for name in asked:
        if name not in known:
            raise CircuitError(
                f"the rows hold no {what} '{name}'",
                where=where,
                expected=f"one of {', '.join(known)}",
            )
    return list(asked or known)
