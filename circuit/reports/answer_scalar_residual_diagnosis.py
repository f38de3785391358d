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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from circuit.artifacts import Row, dump_rows
from circuit.attribution.line import MOST_INTERVALS, TOLERANCE
from circuit.errors import CircuitError
from circuit.figures.answer_scalars import first_order_against_actual, parts_of_change
from circuit.lazy import pd
from circuit.reports.answer_changes import (
    Change,
    DiagnosisOptions,
    DiagnosisProgress,
    interval_changes,
)
from circuit.reports.base import ReportResult, open_report
from circuit.reports.inputs import choose_checkpoints, open_inputs
from circuit.scalars.answers import ANSWER_SCALARS, MOVING, check_scalar_names
from circuit.schemas import SWITCH_BUCKETS, ScalarPairRow
from circuit.tasks.pairs import SIDES, Pair
from circuit.train_config import TrainConfig

COMMAND = "answer-scalar-residual-diagnosis"
PAIR_ROWS = "answer_scalar_residual_diagnosis_pair_rows.jsonl"
PARTS = "answer_scalar_residual_diagnosis_parts"
FIRST_ORDER = "answer_scalar_residual_diagnosis_first_order"
POOLED = "all"
"""`margin_side` or `pair_type` of a row over all of them."""


def answer_scalar_residual_diagnosis(
    config: TrainConfig,
    probe_set: str | Path,
    output_dir: str | Path,
    options: DiagnosisOptions | None = None,
    *,
    checkpoints: Sequence[Path] | None = None,
    checkpoint_dir: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[DiagnosisProgress], None] | None = None,
) -> ReportResult:
    """Write the report.

    Raises:
        CircuitError: an option names what does not exist, there are fewer than two checkpoints or
            too few pairs, a checkpoint or probe set is of another run, or the output folder is not
            free.
    """
    options = options or DiagnosisOptions()
    _check_options(options)
    chosen = choose_checkpoints(checkpoints, checkpoint_dir, least=2)
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        inputs = open_inputs(config, probe_set, splits=options.splits, checkpoints=chosen)
        others = len(inputs.vocabulary.value_ids) - 1
        if not 1 <= options.top_k_wrong <= others:
            raise CircuitError(
                f"--top-k-wrong {options.top_k_wrong}", expected=f"1 to {others}, the wrong values"
            )
        pairs = inputs.pairs(options.pairs)
        run = Path(config.output_dir)
        changes = list(interval_changes(inputs, chosen, pairs, options, progress))
        pair_rows = [row for change in changes for row in change.rows(pairs, run, options)]
        table = _long_table(pair_rows)
        rows = _mean_rows(table, options, _nodes(changes))
        summary = _summary(table, changes, pairs, options)
        shown = MOVING if MOVING in options.scalars else options.scalars[0]
        figures = {
            PARTS: parts_of_change(_pooled(rows)),
            FIRST_ORDER: first_order_against_actual([r.model_dump() for r in pair_rows], shown),
        }
        return writer.write(
            parameters={
                "probe_set": str(probe_set),
                "checkpoint_dir": None if checkpoint_dir is None else str(checkpoint_dir),
                "checkpoints": [str(path) for path in chosen],
                "config": config.model_dump(mode="json"),
                "tolerance": TOLERANCE,
                "most_nodes": MOST_INTERVALS + 1,
                **asdict(options),
            },
            summary=summary,
            rows=rows,
            page=_page(rows, summary),
            figures=figures,
            further={PAIR_ROWS: dump_rows(row.model_dump() for row in pair_rows)},
            provenance={
                **inputs.provenance(),
                "checkpoint_digests": {
                    str(point.step): point.digest
                    for change in changes
                    for point in (change.source, change.target)
                },
            },
            law=_law(summary),
            device=config.device,
        )


def _check_options(options: DiagnosisOptions) -> None:
    check_scalar_names(options.scalars)
    for option, names, known in (
        ("--scalar", options.scalars, ANSWER_SCALARS),
        ("--margin-side", options.sides, SIDES),
        ("--switch-bucket", options.switch_buckets, SWITCH_BUCKETS),
    ):
        unknown = [name for name in names if name not in known]
        if unknown or not names or len(set(names)) < len(names):
            raise CircuitError(
                ", ".join(unknown or names) or "nothing",
                where=option,
                expected=f"some of {', '.join(known)}, each once",
            )


_PARTS = ("first_order", "curvature", "switch")
_COLUMNS = ("source", "target", "delta", *_PARTS)


def _long_table(pair_rows: Sequence[ScalarPairRow]) -> pd.DataFrame:
    """One line for every pair row and scalar."""
    return pd.DataFrame(
        {
            "source_step": row.source_step,
            "target_step": row.target_step,
            "margin_side": row.margin_side,
            "pair_type": row.pair_type,
            "switched": row.switched,
            "scalar": name,
            "source": row.source_values[name],
            "target": row.target_values[name],
            "delta": delta,
            "first_order": row.first_order[name],
            "curvature": row.curvature[name],
            "switch": row.switch[name],
        }
        for row in pair_rows
        for name, delta in row.deltas.items()
    )


def _nodes(changes: Sequence[Change]) -> dict[tuple[int, int], int]:
    """The most nodes that an interval took."""
    nodes: dict[tuple[int, int], int] = {}
    for change in changes:
        key = (change.source.step, change.target.step)
        nodes[key] = max(nodes.get(key, 0), change.line.nodes)
    return nodes


def _mean_rows(
    table: pd.DataFrame, options: DiagnosisOptions, nodes: dict[tuple[int, int], int]
) -> list[Row]:
    """Means by interval, side, type, scalar and bucket; sides and types also pooled."""
    rows: list[Row] = []
    sides = list(options.sides) + [POOLED] * (len(options.sides) > 1)
    types = list(options.pairs.types) + [POOLED] * (len(options.pairs.types) > 1)
    for (source, target), most in nodes.items():
        of_interval = _interval(table, source, target)
        for side in sides:
            of_side = _where(of_interval, "margin_side", side)
            for pair_type in types:
                of_type = _where(of_side, "pair_type", pair_type)
                place = {
                    "source_step": source,
                    "target_step": target,
                    "margin_side": side,
                    "pair_type": pair_type,
                    "nodes": most,
                }
                rows += [place | row for row in _scalar_rows(of_type, options)]
    return rows


def _interval(table: pd.DataFrame, source: int, target: int) -> pd.DataFrame:
    return table[(table["source_step"] == source) & (table["target_step"] == target)]


def _where(table: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    return table if value == POOLED else table[table[column] == value]


def _scalar_rows(table: pd.DataFrame, options: DiagnosisOptions) -> Iterator[dict[str, Any]]:
    """Means of every scalar in every bucket."""
    for name in options.scalars:
        own = table[table["scalar"] == name]
        for bucket in options.switch_buckets:
            chosen = own if bucket == "all" else own[own["switched"] == (bucket != _SAME)]
            yield {"scalar": name, "switch_bucket": bucket, **_means(chosen)}


_SAME = "same_competitor"


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


def _pooled(rows: Sequence[Row]) -> list[Row]:
    """The rows over all sides and types."""
    sides = {row["margin_side"] for row in rows}
    types = {row["pair_type"] for row in rows}
    side = POOLED if len(sides) > 1 else min(sides)
    pair_type = POOLED if len(types) > 1 else min(types)
    return [r for r in rows if (r["margin_side"], r["pair_type"]) == (side, pair_type)]


def _summary(
    table: pd.DataFrame,
    changes: Sequence[Change],
    pairs: Sequence[Pair],
    options: DiagnosisOptions,
) -> dict[str, Any]:
    gaps = [
        {
            "source_step": change.source.step,
            "target_step": change.target.step,
            "margin_side": change.side,
            "nodes": change.line.nodes,
            "scalar": max(change.line.gap, key=lambda name: change.line.gap[name] or 0.0),
            "gap": max(gap or 0.0 for gap in change.line.gap.values()),
            "closed": change.line.closed,
        }
        for change in changes
    ]
    shares = [
        {
            "source_step": source,
            "target_step": target,
            "share": float(_interval(table, source, target)["switched"].mean()),
        }
        for source, target in _nodes(changes)
    ]
    return {
        "pairs": {kind: sum(p.type == kind for p in pairs) for kind in options.pairs.types},
        "steps": sorted({c.source.step for c in changes} | {c.target.step for c in changes}),
        "switched": shares,
        "line_integral": gaps,
        "largest_split_error": max(change.split_error for change in changes),
        "over_all_intervals": list(_scalar_rows(table, options)),
    }


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


def _page(rows: Sequence[Row], summary: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{count} {kind}" for kind, count in summary["pairs"].items())
    steps = summary["steps"]
    shares = {(s["source_step"], s["target_step"]): s["share"] for s in summary["switched"]}
    lines = [
        f"Pairs: {counts}; {len(steps)} checkpoints, {steps[0]} to {steps[-1]}. Means over pairs"
        " and sides. First order is the derivative along the straight line between the checkpoints"
        " at the source, curvature the rest of the line integral, switch what a change of"
        " competitor takes from the moving margin; R²: of first order alone, pair by pair.",
        "",
        f"![parts of the changes]({PARTS}.svg)",
        "",
        f"![first order against actual]({FIRST_ORDER}.svg)",
        "",
        "## By interval",
        "",
        "| scalar | interval | source | target | change | first order | curvature | switch | R² |"
        " switched | nodes | gap |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ordered = sorted(
        (row for row in _pooled(rows) if row["switch_bucket"] == rows[0]["switch_bucket"]),
        key=lambda row: (ANSWER_SCALARS.index(row["scalar"]), row["source_step"]),
    )
    for row in ordered:
        share = shares[row["source_step"], row["target_step"]]
        gap = "-" if row["gap"] is None else f"{100 * row['gap']:.2g} %"
        lines.append(
            f"| `{row['scalar']}` | {row['source_step']} -> {row['target_step']} |"
            f" {_shown(row['mean_source'])} | {_shown(row['mean_target'])} | {_cells(row)} |"
            f" {100 * share:.0f} % | {row['nodes']} | {gap} |"
        )
    lines += [
        "",
        "## Over all intervals, by bucket",
        "",
        "| scalar | bucket | changes | change | first order | curvature | switch | R² |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in summary["over_all_intervals"]:
        bucket = f"| `{row['scalar']}` | {row['switch_bucket']} | {row['pairs']} |"
        lines.append(f"{bucket} {_cells(row)} |")
    return lines


def _cells(row: Row) -> str:
    names = ("mean_delta", *(f"mean_{part}" for part in _PARTS), "first_order_r2")
    return " | ".join(_shown(row[name]) for name in names)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
