"""answer-scalar-residual-diagnosis: what became of the answers from one checkpoint to the next.

For every interval between consecutive checkpoints, pair and side: every answer scalar at both ends,
and its change as first order + curvature + switch of competitor (definitions.md section 5). The
pair rows are what the closures and the functional subspace read; the rows are their means.

    actual = first order + curvature + switch      up to the gap of the line integral

First order and curvature come from the line integral of the fixed scalars, not from the difference
of the ends, so that the gap is a measurement. The moving margin has the parts of the fixed source
margin, and the switch, which is exact; the other scalars have no switch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from circuit import options
from circuit.artifacts import Row
from circuit.attribution.line import MOST_INTERVALS, TOLERANCE, Line
from circuit.core.intervals import RecordDraws
from circuit.errors import CircuitError
from circuit.figures.charts import (
    Chart,
    chart,
    chosen,
    colour,
    equals,
    exact,
    named,
    thinned,
)
from circuit.lazy import alt, pd, torch
from circuit.model.weights import named_tensors
from circuit.options import Option
from circuit.reports.answer_changes import Change
from circuit.reports.inputs import Checkpointed
from circuit.reports.intervals import behind_numbers, cells_between, ends, how_drawn, note
from circuit.reports.report import Findings, OfCheckpoints, Results
from circuit.reports.tables import Table
from circuit.scalars.answers import ANSWER_SCALARS, MOVING, ScalarNames
from circuit.schemas import SIDES, SWITCH_BUCKETS, ScalarPairRow, Side, run_relative
from circuit.tasks.pairs import record_of

if TYPE_CHECKING:
    from torch import Tensor

PAIR_ROWS = "answer_scalar_residual_diagnosis_pair_rows.jsonl"
POOLED = "all"
"""`margin_side` or `pair_type` of a row over all of them."""

_PARTS = ("first_order", "curvature", "switch")
_COLUMNS = ("source", "target", "delta", *_PARTS)


class DiagnosisOptions(options.ProbeOptions, options.CheckpointOptions, options.PairOptions):
    """Which pairs and scalars are followed; the pair rows hold every bucket."""

    margin_sides: options.MarginSides = SIDES
    scalars: ScalarNames = ANSWER_SCALARS
    switch_buckets: options.SwitchBuckets = SWITCH_BUCKETS
    top_k_wrong: Annotated[int, Option("Best wrong values in every pair row.", least=1)] = 5


class AnswerScalarDiagnosis(OfCheckpoints[DiagnosisOptions]):
    """Answer scalars between consecutive checkpoints: first order, curvature, switch."""

    command = "answer-scalar-residual-diagnosis"
    Options = DiagnosisOptions
    least = 2
    title = "Changes of the answers"
    question = "Did the answers change as the gradient says, by curvature, or by a new competitor?"

    def prepare(self) -> None:
        super().prepare()
        most, asked = len(self.inputs.task.choices) - 1, self.options
        if asked.top_k_wrong > most:
            raise CircuitError(
                f"{asked.top_k_wrong}",
                where="`top_k_wrong`",
                expected=f"1 to {most}, the wrong values",
            )
        self.pairs = self.inputs.pairs(asked)
        self.sides = {side: self.inputs.side(self.pairs, side) for side in asked.margin_sides}
        self.source: Checkpointed | None = None
        self.before: dict[str, Tensor] = {}  # weights of the source, whose model is loaded anew
        self.reached: dict[str, Tensor] = {}  # logits there, where the next line starts
        self.lines: list[dict[str, Any]] = []
        self.split_error = 0.0

    def measure(self, point: Checkpointed) -> Iterator[Row]:
        """The pair rows of the interval that ends here; none at the first checkpoint."""
        source, before = self.source, self.before
        weights = {name: tensor.clone() for name, tensor in named_tensors(point.model).items()}
        self.source, self.before = point, weights
        if source is None:
            return
        for side, batch in self.sides.items():
            line = Line(
                point.model,
                before,
                weights,
                batch.tokens,
                (batch.row, batch.at),
                source_logits=self.reached.get(side),
            )
            where = f"{source.step} -> {point.step}, {side}"

            def taken(node: int, nodes: int, where: str = where) -> None:
                self.tell(f"{where}, node {node} of {nodes}")

            change = Change.along(
                line,
                batch.answer,
                self.inputs.task.choices,
                scalars=self.options.scalars,
                top_k_wrong=self.options.top_k_wrong,
                progress=taken,
            )
            self.reached[side] = line.ends[1]
            yield from self._rows(change, source, point, side)

    def _rows(
        self, change: Change, source: Checkpointed, target: Checkpointed, side: str
    ) -> Iterator[Row]:
        gaps = {name: gap or 0.0 for name, gap in change.line.gap.items()}
        worst = max(gaps, key=gaps.__getitem__)
        steps: dict[str, Any] = {"source_step": source.step, "target_step": target.step}
        self.lines.append(
            {
                **steps,
                "margin_side": side,
                "nodes": change.line.nodes,
                "scalar": worst,
                "gap": gaps[worst],
                "closed": change.line.closed,
            }
        )
        self.split_error = max(self.split_error, change.split_error)
        run = Path(self.config.output_dir)
        for i, pair in enumerate(self.pairs):
            yield ScalarPairRow.measured(
                **steps,
                source_checkpoint=run_relative(source.path, run),
                target_checkpoint=run_relative(target.path, run),
                source_digest=source.digest,
                target_digest=target.digest,
                pair_id=pair.pair_id,
                pair_type=pair.type,
                split=pair.clean.split,
                margin_side=cast(Side, side),
                **{name: values[i] for name, values in change.columns.items()},
            ).model_dump()

    def conclude(self, rows: list[Row]) -> Findings:
        table = _long_table(rows)
        nodes: dict[tuple[int, int], int] = {}
        for line in self.lines:
            interval = line["source_step"], line["target_step"]
            nodes[interval] = max(nodes.get(interval, 0), line["nodes"])
        kinds = [pair.type for pair in self.pairs]
        summary = {
            "pairs": {kind: kinds.count(kind) for kind in self.options.pair_types},
            "steps": sorted({step for interval in nodes for step in interval}),
            "switched": [
                {
                    "source_step": source,
                    "target_step": target,
                    "share": float(_interval(table, source, target)["switched"].mean()),
                }
                for source, target in nodes
            ],
            "line_integral": self.lines,
            "largest_split_error": self.split_error,
            "over_all_intervals": [
                {**place, **_means(part), **_drawn(part)}
                for place, part in _buckets(table, self.options)
            ],
            "bootstrap": how_drawn(table["record"].nunique()),
        }
        means = _mean_rows(table, self.options, nodes)
        return Findings(means, summary, _law(summary), further={PAIR_ROWS: rows})

    @classmethod
    def size(cls, results: Results[DiagnosisOptions]) -> tuple[float, ...]:
        return len(results.summary["steps"]), sum(results.summary["pairs"].values())

    @classmethod
    def notes(cls, results: Results[DiagnosisOptions]) -> list[str]:
        counts = ", ".join(f"{count} {kind}" for kind, count in results.summary["pairs"].items())
        steps = results.summary["steps"]
        return [
            f"Means over pairs ({counts}) and sides; {len(steps)} checkpoints, {steps[0]} to"
            f" {steps[-1]}. First order is the derivative along the straight line between the"
            " checkpoints at the source, curvature the rest of the line integral, switch what a"
            " change of competitor takes from the moving margin; R² is that of first order alone,"
            " pair by pair.",
            *note(results),
        ]

    @classmethod
    def tables(cls, results: Results[DiagnosisOptions]) -> list[Table]:
        numbers = {
            "mean_delta": ("change", ".3f"),
            "mean_first_order": ("first order", ".3f"),
            "mean_curvature": ("curvature", ".3f"),
            "mean_switch": ("switch", ".3f"),
            "first_order_r2": ("R²", ".3f"),
        }
        over_all = [
            row | cells_between(row, dict.fromkeys(_BETWEEN, ".3f"))
            for row in results.summary["over_all_intervals"]
        ]
        buckets = {"scalar": "scalar", "switch_bucket": "bucket", "pairs": "changes"}
        states = {"mean_source": ("source", ".3f"), "mean_target": ("target", ".3f")}
        intervals: dict[str, str | tuple[str, str]] = {
            **{"scalar": "scalar", "interval": "interval", **states, **numbers},
            **{"switched": ("switched", ".0%"), "nodes": "nodes", "gap": ("gap", ".2%")},
        }
        shares = {s["target_step"]: s["share"] for s in results.summary["switched"]}
        rows = [
            {
                **row,
                "step": row["target_step"],
                "interval": f"{row['source_step']} -> {row['target_step']}",
                "switched": shares[row["target_step"]],
            }
            for row in _pooled(results)
        ]
        title = "Over all intervals, pairs and sides, by bucket"
        return [
            Table(
                title,
                {**buckets, **behind_numbers(numbers, _BETWEEN)},
                over_all,
                console=len(over_all),
            ),
            Table("By interval", intervals, rows),
        ]

    @classmethod
    def charts(cls, results: Results[DiagnosisOptions]) -> list[Chart]:
        scalars = results.options.scalars
        shown = MOVING if MOVING in scalars else scalars[0]
        data = [
            {"step": row["target_step"], **{name: row[name] for name in _SHOWN}}
            for row in _pooled(results)
            if row["pairs"]
        ]
        pairs = thinned(
            [
                {
                    "step": row["target_step"],
                    **{name: row[name] for name in ("source_step", "margin_side", "pair_id")},
                    "competitor": "switched" if row["switched"] else "the same",
                    "first_order": row["first_order"][shown],
                    "delta": row["deltas"][shown],
                }
                for row in results.rows(PAIR_ROWS)
            ]
        )
        at = alt.X("step:O").title("interval, by its target step").axis(labelAngle=0)
        at = at.scale(paddingInner=0.3)
        band = named("answer_course").transform_filter(chosen())
        return [
            chart(
                f"{cls.stem()}_course",
                f"{shown}: mean change and its parts",
                {"answer_course": [row for row in data if row["scalar"] == shown]},
                band.mark_rect(color="var(--line)", opacity=0.6, aria=False).encode(x=at),
                *_bars("answer_course", at, alt.Y("value:Q").title("mean change").stack("zero")),
            ),
            chart(
                f"{cls.stem()}_parts",
                "Every scalar over the interval: mean change and its parts",
                {"answer_parts": data},
                *_bars(
                    "answer_parts",
                    alt.X("value:Q").title("mean change").stack("zero"),
                    alt.Y("scalar:N").title(None).sort(list(scalars)).axis(labelLimit=240),
                    where=chosen(),
                ),
                height=26 * len(scalars),
            ),
            chart(
                f"{cls.stem()}_first_order",
                f"{shown} over the interval: every pair and side",
                {"answer_pairs": pairs},
                *equals(
                    "answer_pairs",
                    ("first_order", "first order"),
                    ("delta", "actual change"),
                    colour("competitor", ("the same", "switched"), title="competitor"),
                    pairs,
                    where=chosen(),
                ),
                height=260,
            ),
        ]


_BETWEEN = ("mean_delta", "mean_first_order", "first_order_r2")
"""Columns whose intervals the table shows."""
_SHOWN = ("source_step", "scalar", "pairs", *(f"mean_{name}" for name in _COLUMNS))
_LABELS = {
    "mean_first_order": "first order",
    "mean_curvature": "curvature",
    "mean_switch": "switch of competitor",
}


def _bars(data: str, x: alt.X, y: alt.Y, *, where: str = "true") -> list[alt.Chart]:
    """The parts of changes stacked, and a mark at the change itself.

    Args:
        x, y: one of them is of the stacked `value`.
    """
    rows = named(data).transform_filter(where)
    parts = rows.transform_fold(list(_LABELS), as_=["part", "value"])
    actual = rows.transform_calculate(value="datum.mean_delta")
    shade = colour("part", list(_LABELS), labels=_LABELS)
    mark: dict[str, Any] = {
        "shape": "diamond",
        "size": 60,
        "filled": True,
        "color": "var(--ink)",
        "opacity": 1,
    }
    return [
        parts.mark_bar().encode(x=x, y=y, color=shade, tooltip=exact("step", *_SHOWN)),
        actual.mark_point(**mark).encode(x=x, y=y, tooltip=exact("step", *_SHOWN)),
    ]


def _long_table(pair_rows: Sequence[Row]) -> pd.DataFrame:
    """One line for every pair row and scalar."""
    same = ("source_step", "target_step", "margin_side", "pair_type", "switched")
    parts = {"source": "source_values", "target": "target_values", "delta": "deltas"}
    return pd.DataFrame(
        {
            **{name: row[name] for name in same},
            "record": record_of(row["pair_id"]),
            "scalar": scalar,
            **{name: row[parts.get(name, name)][scalar] for name in _COLUMNS},
        }
        for row in pair_rows
        for scalar in row["deltas"]
    )


def _mean_rows(
    table: pd.DataFrame, asked: DiagnosisOptions, nodes: dict[tuple[int, int], int]
) -> Iterator[Row]:
    """Means by interval, side, type, scalar and bucket; sides and types also pooled.

    Args:
        nodes: the most that the line integrals of an interval took.
    """
    sides = list(asked.margin_sides) + [POOLED] * (len(asked.margin_sides) > 1)
    types = list(asked.pair_types) + [POOLED] * (len(asked.pair_types) > 1)
    for (source, target), most in nodes.items():
        of_interval = _interval(table, source, target)
        for side in sides:
            of_side = _where(of_interval, "margin_side", side)
            for pair_type in types:
                place = {
                    "source_step": source,
                    "target_step": target,
                    "margin_side": side,
                    "pair_type": pair_type,
                    "nodes": most,
                }
                of_type = _where(of_side, "pair_type", pair_type)
                for bucket, part in _buckets(of_type, asked):
                    yield {**place, **bucket, **_means(part)}


def _interval(table: pd.DataFrame, source: int, target: int) -> pd.DataFrame:
    return table[(table["source_step"] == source) & (table["target_step"] == target)]


def _where(table: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    return table if value == POOLED else table[table[column] == value]


def _buckets(
    table: pd.DataFrame, asked: DiagnosisOptions
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Every scalar's lines in every bucket, behind what says which they are."""
    for name in asked.scalars:
        of_scalar = table[table["scalar"] == name]
        for bucket in asked.switch_buckets:
            switched = of_scalar["switched"] == (bucket == "competitor_switch")
            part = of_scalar if bucket == "all" else of_scalar[switched]
            yield {"scalar": name, "switch_bucket": bucket}, part


def _drawn(table: pd.DataFrame) -> dict[str, Any]:
    """Ends of the intervals of means and of R²; nothing without pairs."""
    if table.empty:
        return {}
    draws = RecordDraws(table["record"].tolist())
    values = torch.tensor(table[list(_COLUMNS)].to_numpy())
    found = dict(zip((f"mean_{name}" for name in _COLUMNS), draws.means(values), strict=True))
    of = dict(zip(_COLUMNS, values.T, strict=True))
    found["first_order_r2"] = draws.r_squared_of(of["first_order"], of["delta"])
    return ends(found)


def _means(table: pd.DataFrame) -> dict[str, Any]:
    """Means over pairs; all null without pairs, a ratio also where its denominator is zero.

    `gap` is `mean |delta - parts| / mean |delta|`; `first_order_r2` is that of first order as a
    prediction of the delta, pair by pair.
    """
    source, target, delta, *parts = table[list(_COLUMNS)].to_numpy().T
    size = float(abs(delta).mean()) if len(delta) else 0.0
    spread = float(((delta - delta.mean()) ** 2).sum()) if len(delta) > 1 else 0.0
    missed = float(((delta - parts[0]) ** 2).sum())
    means = {
        f"mean_{name}": float(values.mean()) if len(values) else None
        for name, values in zip(_COLUMNS, (source, target, delta, *parts), strict=True)
    }
    return {
        "pairs": len(delta),
        **means,
        "mean_abs_delta": size if len(delta) else None,
        "gap": float(abs(delta - sum(parts)).mean()) / size if size else None,
        "first_order_r2": 1 - missed / spread if spread else None,
    }


def _pooled(results: Results[DiagnosisOptions]) -> list[Row]:
    """The rows over all sides and types in the first bucket, by scalar."""
    asked = results.options
    side = POOLED if len(asked.margin_sides) > 1 else asked.margin_sides[0]
    kind = POOLED if len(asked.pair_types) > 1 else asked.pair_types[0]
    place = (side, kind, asked.switch_buckets[0])
    columns = ("margin_side", "pair_type", "switch_bucket")
    rows = [row for row in results.rows() if tuple(row[name] for name in columns) == place]
    return sorted(rows, key=lambda row: ANSWER_SCALARS.index(row["scalar"]))


def _law(summary: dict[str, Any]) -> str:
    """What the line integrals came to."""
    lines = summary["line_integral"]
    worst = max(lines, key=lambda line: line["gap"])
    where = f"({worst['scalar']}, {worst['source_step']} -> {worst['target_step']})"
    nodes = max(line["nodes"] for line in lines)
    still = sum(not line["closed"] for line in lines)
    gap = f"{100 * worst['gap']:.2g} % of the mean absolute change {where}"
    if still:
        return (
            f"{still} of {len(lines)} line integrals do NOT close to {100 * TOLERANCE:g} % with"
            f" {MOST_INTERVALS + 1} nodes; the worst gap is {gap}"
        )
    return (
        f"first order, curvature and switch sum to the change within {gap}, with {nodes} nodes at"
        f" most; the moving margin's split is off by at most {summary['largest_split_error']:.1g}"
    )
