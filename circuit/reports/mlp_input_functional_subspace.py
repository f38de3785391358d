"""mlp-input-functional-subspace-report: does the readout use what a component writes to an MLP?

At both ends of every interval of the scalar rows, for every pair, role and answer scalar: what the
source component adds to the stream before and behind the MLP, read out by the gradients of the
scalar there (definitions.md sections 5 and 6).

    g_out.δ_total = g_out.δ_in (past the MLP) + g_out.δ_mlp (through it)

Competitors are those of the rows: frozen at the interval's source or target as the scalar says; the
moving margin is read with the competitor of the end itself. `ablation_effect` is what ablation
really takes from the scalar, through every position: the products are its first-order share at one
role, from the ablated side. PCA bases are those of all chosen pairs at one end, role and scalar;
null stands for a cosine or overlap of a zero vector, or with a basis that is not there because the
vectors span fewer dimensions than its rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from circuit.artifacts import Row, dump_rows
from circuit.errors import CircuitError
from circuit.figures.functional_subspace import written_deltas
from circuit.lazy import pd
from circuit.model.subspaces import check_rank
from circuit.reports.base import ReportResult, open_report
from circuit.reports.inputs import open_inputs
from circuit.scalars.answers import FIXED_SOURCE, check_scalar_names
from circuit.scalars.functional_write import WritePath
from circuit.scalars.interval_ends import ENDPOINTS, End, Intervals, read_intervals
from circuit.scalars.write_products import SIZES, SUMMED, Measured, measure
from circuit.tasks.groups import GROUPS, group_tokens
from circuit.tasks.pairs import PAIR_TYPES, SIDES
from circuit.tasks.positions import ROLES, Batch
from circuit.tasks.symbolic_kv import Vocabulary
from circuit.train_config import TrainConfig

COMMAND = "mlp-input-functional-subspace-report"
EVERYTHING = "all"
"""`group_by` of the rows over all pairs of a type."""

_END = ("source_step", "target_step", "endpoint_role", "step", "position_role", "scalar")


@dataclass(frozen=True)
class FunctionalSubspace:
    """Which write is followed, where, and through which readouts.

    Attributes:
        source, mlp: the write path, such as `L1H3` and `L1MLP`.
        roles: positions, some of `ROLES`.
        scalars: answer scalars that are read out.
        endpoints: ends of the rows' intervals, some of `ENDPOINTS`.
        group_by: tokens by which pairs are summed, some of `GROUPS`.
        pair_types: of the rows.
        side: of the pairs and of the rows.
        rank: of the PCA bases.
        start_step, end_step: intervals within these steps; None takes all.
    """

    source: str
    mlp: str
    roles: tuple[str, ...] = ("prediction",)
    scalars: tuple[str, ...] = (FIXED_SOURCE,)
    endpoints: tuple[str, ...] = ENDPOINTS
    group_by: tuple[str, ...] = ("answer_value",)
    pair_types: tuple[str, ...] = ("support_value",)
    side: str = "clean"
    rank: int = 4
    start_step: int | None = None
    end_step: int | None = None

    def __post_init__(self) -> None:
        WritePath.parse(self.source, self.mlp)
        check_scalar_names(self.scalars)
        for option, names, known in (
            ("--position-role", self.roles, ROLES),
            ("--scalar", self.scalars, self.scalars),
            ("--endpoint-role", self.endpoints, ENDPOINTS),
            ("--group-by", self.group_by, GROUPS),
            ("--pair-type", self.pair_types, PAIR_TYPES),
            ("--record-side", (self.side,), SIDES),
        ):
            unknown = [name for name in names if name not in known]
            if unknown or not names or len(set(names)) < len(names):
                raise CircuitError(
                    ", ".join(unknown or names) or "nothing",
                    where=option,
                    expected=f"some of {', '.join(known)}, each once",
                )


def mlp_input_functional_subspace(
    config: TrainConfig,
    probe_set: str | Path,
    scalar_pair_rows: Path,
    wanted: FunctionalSubspace,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReportResult:
    """Write the report.

    Args:
        scalar_pair_rows: rows of `answer-scalar-residual-diagnosis` on this probe set and run.
        progress: called with the checkpoints done and their number.

    Raises:
        CircuitError: the rows are no such rows, lack a pair, or are of other pairs or weights (the
            row is named); an option names what does not exist, the rank is too large, or the
            output folder is not free.
    """
    WritePath.parse(wanted.source, wanted.mlp, shape=(config.model.layers, config.model.heads))
    intervals = read_intervals(
        scalar_pair_rows,
        pair_types=wanted.pair_types,
        side=wanted.side,
        start_step=wanted.start_step,
        end_step=wanted.end_step,
    )
    weights = intervals.weights(wanted.endpoints)
    check_rank("--subspace-rank", wanted.rank, min(len(intervals.first) - 1, config.model.d_model))
    run = Path(config.output_dir)
    checkpoints = intervals.checkpoints(weights, run)
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        inputs = open_inputs(config, probe_set, checkpoints=checkpoints)
        batch = inputs.side(intervals.pairs(inputs), wanted.side)
        intervals.check_tokens(batch, inputs.vocabulary.value_ids)
        groups = _groups(batch, wanted, inputs.vocabulary)
        ends = intervals.ends(wanted.endpoints)
        found: dict[int, Measured] = {}
        for done, point in enumerate(inputs.models(checkpoints), start=1):
            step = list(weights)[done - 1]
            weights[step].check(point, scalar_pair_rows)
            readouts = {end.readout(s) for end in ends if end.step == step for s in wanted.scalars}
            path = WritePath.parse(wanted.source, wanted.mlp, point.model)
            found[step] = measure(
                point.model, batch, path, wanted.roles, sorted(readouts), wanted.rank
            )
            if progress is not None:
                progress(done, len(checkpoints))
        rows = list(_pair_rows(ends, found, wanted, intervals))
        group_rows = _group_rows(rows, groups, wanted, len(batch.reads))
        summary = _summary(group_rows, intervals, wanted, config.model.d_model, found)
        return writer.write(
            parameters={
                "probe_set": str(probe_set),
                "scalar_pair_rows": str(scalar_pair_rows),
                **asdict(wanted),
            },
            summary=summary,
            rows=rows,
            page=_page(summary, wanted),
            figures={
                f"{writer.name}_{scalar}": written_deltas(
                    summary["means"], scalar, f"{wanted.source} -> {wanted.mlp}"
                )
                for scalar in wanted.scalars
            },
            further={f"{writer.name}_group_rows.jsonl": dump_rows(group_rows)},
            provenance={
                **inputs.provenance(),
                "scalar_pair_rows_sha256": hashlib.sha256(
                    scalar_pair_rows.read_bytes()
                ).hexdigest(),
                "checkpoint_digests": {str(step): w.digest for step, w in weights.items()},
            },
            law="skip and MLP sum to the whole, g_out.δ_total = g_out.δ_in + g_out.δ_mlp with δ_mlp"
            " read at the MLP's own output,"
            f" within {summary['closure_error']:.1g} of the largest product",
            device=config.device,
        )


def _groups(
    batch: Batch, wanted: FunctionalSubspace, vocabulary: Vocabulary
) -> dict[tuple[str, str], list[str]]:
    """The token by which each pair is summed, for every grouping and role."""
    return {
        (group, role): [vocabulary.tokens[t] for t in group_tokens(batch, group, role).tolist()]
        for group in wanted.group_by
        for role in wanted.roles
    }


def _pair_rows(
    ends: Sequence[End],
    found: dict[int, Measured],
    wanted: FunctionalSubspace,
    intervals: Intervals,
) -> Iterator[dict[str, Any]]:
    """One row an end, role, scalar and pair, in this order."""
    for end in ends:
        at = found[end.step]
        for role in wanted.roles:
            for scalar in wanted.scalars:
                readout = end.readout(scalar)
                columns, values = at.columns[readout, role], end.values(scalar)
                for i, pair in enumerate(end.rows):
                    yield {
                        "source_step": pair.source_step,
                        "target_step": pair.target_step,
                        "endpoint_role": end.endpoint,
                        "step": end.step,
                        "position_role": role,
                        "scalar": scalar,
                        "pair_id": pair.pair_id,
                        "pair_type": pair.pair_type,
                        "record_side": pair.margin_side,
                        "competitor": readout.competitors[i] if readout.competitors else None,
                        "switched": pair.switched,
                        "positions": at.positions[role][i],
                        "scalar_value": values[i],
                        **{name: columns[name][i] for name in (*SUMMED, *SIZES)},
                    }


def _group_rows(
    rows: Sequence[Row],
    groups: dict[tuple[str, str], list[str]],
    wanted: FunctionalSubspace,
    pairs: int,
) -> list[dict[str, Any]]:
    """Sums of the products and means of the rest by end, pair type and group.

    Means leave nulls out, and are null without any other.
    """
    table = pd.DataFrame(rows).astype(dict.fromkeys((*SUMMED, *SIZES), float))
    made: list[dict[str, Any]] = []
    for group in (EVERYTHING, *wanted.group_by):
        tokens = [
            EVERYTHING if group == EVERYTHING else groups[group, row["position_role"]][i % pairs]
            for i, row in enumerate(rows)
        ]
        keys = [*_END, "pair_type", "group_by", "group_token"]
        grouped = table.assign(group_by=group, group_token=tokens).groupby(keys, sort=False)
        joined = pd.concat(
            [
                grouped.size().rename("pairs"),
                grouped[list(SUMMED)].sum().add_prefix("sum_"),
                grouped[list(SIZES)].mean().add_prefix("mean_"),
            ],
            axis=1,
        ).reset_index()
        for row in joined.to_dict("records"):
            shown = {str(k): None if _is_nan(v) else v for k, v in row.items()}
            token = None if group == EVERYTHING else shown["group_token"]
            made.append(shown | {"group_token": token})
    return made


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _summary(
    group_rows: Sequence[Row],
    intervals: Intervals,
    wanted: FunctionalSubspace,
    d_model: int,
    found: dict[int, Measured],
) -> dict[str, Any]:
    """Means over all pairs of a type at every end; `through_mlp` null where the total is zero."""
    means = []
    for row in group_rows:
        if row["group_by"] == EVERYTHING:
            total, through = row["sum_g_out_delta_total"], row["sum_g_out_delta_mlp"]
            means.append(
                {
                    **{name: row[name] for name in (*_END, "pair_type", "pairs")},
                    **{f"mean_{name}": row[f"sum_{name}"] / row["pairs"] for name in SUMMED},
                    "through_mlp": through / total if total else None,
                    **{f"mean_{name}": row[f"mean_{name}"] for name in SIZES},
                }
            )
    largest = max(at.largest for at in found.values())
    return {
        "path": f"{wanted.source}_to_{wanted.mlp}",
        "intervals": [list(steps) for steps in intervals.by_steps],
        "steps": list(found),
        "pairs": len(intervals.first),
        "closure_error": max(at.gap for at in found.values()) / largest if largest else 0.0,
        "chance_overlap": math.sqrt(wanted.rank / d_model),
        "means": means,
    }


_SHOWN = (*(f"mean_{name}" for name in SUMMED), "through_mlp", "mean_cosine_g_in_delta_in")
_SHOWN_SIZES = (
    "mean_cosine_g_out_delta_total",
    "mean_overlap_delta_in_on_g_in",
    "mean_overlap_g_in_on_delta_in",
)


def _page(summary: dict[str, Any], wanted: FunctionalSubspace) -> list[str]:
    lines = [
        f"{summary['pairs']} pairs ({wanted.side} side), what {wanted.source} adds to the stream"
        f" before and behind {wanted.mlp}. Means over pairs in units of the scalar; `through MLP`:"
        " share of g_out.δ_mlp in g_out.δ_total; `ablation`: what ablating the component really"
        " takes, through all positions; overlaps: norm of the unit projection on the other's PCA"
        f" basis of rank {wanted.rank}, {summary['chance_overlap']:.2f} for a random direction.",
        "",
    ]
    for scalar in wanted.scalars:
        lines += [
            f"## {scalar}",
            "",
            f"![written deltas](mlp_input_functional_subspace_{scalar}.svg)",
            "",
            "| role | end | step | pair type | g_in.δ_in | g_out.δ_in | g_out.δ_mlp | g_out.δ_total"
            " | ablation | through MLP | cos(g_in, δ_in) | cos(g_out, δ_total) | δ_in on g_in"
            " | g_in on δ_in |",
            "|---|---|---:|---|" + "---:|" * 10,
        ]
        for role in wanted.roles:
            lines += [
                f"| {role} | {row['endpoint_role']} of {row['source_step']} ->"
                f" {row['target_step']} | {row['step']} | {row['pair_type']} |"
                + "".join(f" {_shown(row[name])} |" for name in (*_SHOWN, *_SHOWN_SIZES))
                for row in summary["means"]
                if (row["scalar"], row["position_role"]) == (scalar, role)
            ]
        lines.append("")
    return lines


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
