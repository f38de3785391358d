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

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from circuit import options
from circuit.artifacts import Row
from circuit.core.intervals import RecordDraws
from circuit.figures.charts import Chart, at_step, band, chart, colour, lines
from circuit.lazy import pd, torch
from circuit.model.subspaces import check_rank
from circuit.options import Option
from circuit.reading import file_digest
from circuit.reports.inputs import Checkpointed, open_inputs
from circuit.reports.intervals import ENDS, between, ends, ends_of, how_drawn, note
from circuit.reports.report import Findings, Report, Results
from circuit.reports.tables import Table
from circuit.scalars.answers import FIXED_SOURCE, ScalarNames
from circuit.scalars.functional_write import WritePath
from circuit.scalars.interval_ends import ENDPOINTS, read_intervals
from circuit.scalars.write_products import SIZES, SUMMED, Measured, measure
from circuit.tasks.base import Task
from circuit.tasks.groups import check_group, group_tokens
from circuit.tasks.pairs import record_of

EVERYTHING = "all"
"""`group_by` of the rows over all pairs of a type."""

_END = ("source_step", "target_step", "endpoint_role", "step", "position_role", "scalar")


class SubspaceOptions(options.Options):
    """Which write is followed, where, and through which readouts."""

    probe_set: options.ProbeSet
    scalar_pair_rows: options.ScalarPairRows
    source_component: Annotated[
        str, Option("Component that writes, such as L1H1.", kind="component", earlier="source")
    ]
    component: Annotated[
        str, Option("MLP that reads it, such as L1MLP.", kind="mlp", earlier="mlp")
    ]
    pair_types: Annotated[
        tuple[str, ...], Option("Pair type of the rows.", flag="--pair-type", kind="pair_type")
    ] = ("support_value",)
    position_roles: Annotated[
        tuple[str, ...],
        Option("Role of the positions.", flag="--position-role", kind="role", earlier="roles"),
    ] = ("prediction",)
    group_by: Annotated[
        tuple[str, ...],
        Option("Token by which pairs are summed.", flag="--group-by", kind="group_by"),
    ] = ("answer_value",)
    scalars: ScalarNames = (FIXED_SOURCE,)
    endpoint_roles: Annotated[
        tuple[str, ...],
        Option(
            "End of each interval.",
            flag="--endpoint-role",
            choices=ENDPOINTS,
            earlier="endpoints",
        ),
    ] = ENDPOINTS
    subspace_rank: Annotated[int, Option("Rank of the PCA bases.", least=1, earlier="rank")] = 4
    record_side: options.RecordSide = "clean"
    start_step: Annotated[
        int | None, Option("Only intervals that start at this step or later.", least=0)
    ] = None
    end_step: Annotated[
        int | None, Option("Only intervals that end at this step or earlier.", least=0)
    ] = None

    def check(self) -> None:
        """The component writes before the MLP; a role allows each grouping."""
        super().check()
        WritePath.parse(self.source_component, self.component)

    def check_task(self, task: Task) -> None:
        """Also refuses a grouping that a role does not allow."""
        super().check_task(task)
        for group in self.group_by:
            for role in self.position_roles:
                check_group(task, group, role)


class FunctionalSubspace(Report[SubspaceOptions]):
    """Whether the readout uses what a component writes to an MLP: past it, and through it."""

    command = "mlp-input-functional-subspace-report"
    Options = SubspaceOptions
    title = "What is read of a write"
    question = "Does the answer use what the component writes: past the MLP, or through it?"

    def prepare(self) -> None:
        asked = self.options
        self.intervals = read_intervals(
            asked.scalar_pair_rows,
            pair_types=asked.pair_types,
            side=asked.record_side,
            start_step=asked.start_step,
            end_step=asked.end_step,
        )
        self.weights = self.intervals.weights(asked.endpoint_roles)
        most = min(len(self.intervals.first) - 1, self.config.model.d_model)
        check_rank("`subspace_rank`", asked.subspace_rank, most)
        run = Path(self.config.output_dir)
        self.checkpoints = self.intervals.checkpoints(self.weights, run)
        self.inputs = open_inputs(self.config, asked.probe_set, checkpoints=self.checkpoints)
        asked.check_task(self.inputs.task)
        pairs = self.intervals.pairs(self.inputs)
        self.batch = self.inputs.side(pairs, asked.record_side)
        self.intervals.check_tokens(self.batch, self.inputs.task.choices)
        self.ends = self.intervals.ends(asked.endpoint_roles)
        self.measured: dict[int, Measured] = {}

    def points(self) -> Iterator[Checkpointed]:
        return self.inputs.models(self.checkpoints)

    @property
    def total(self) -> int:
        return len(self.checkpoints)

    def measure(self, point: Checkpointed) -> list[Row]:
        """Readouts of the ends at this step; rows go by intervals, and come with the last."""
        asked = self.options
        self.weights[point.step].check(point, asked.scalar_pair_rows)
        ends = [end for end in self.ends if end.step == point.step]
        readouts = {end.readout(scalar) for end in ends for scalar in asked.scalars}
        path = WritePath.parse(asked.source_component, asked.component, point.model)
        self.measured[point.step] = measure(
            point.model,
            self.batch,
            path,
            asked.position_roles,
            sorted(readouts),
            asked.subspace_rank,
        )
        return []

    def conclude(self, rows: list[Row]) -> Findings:
        rows = list(self._pair_rows())
        group_rows = self._group_rows(rows)
        largest = max(at.largest for at in self.measured.values())
        gap = max(at.gap for at in self.measured.values())
        error = gap / largest if largest else 0.0
        asked = self.options
        summary = {
            "path": f"{asked.source_component}_to_{asked.component}",
            "intervals": [list(steps) for steps in self.intervals.by_steps],
            "steps": list(self.measured),
            "pairs": len(self.intervals.first),
            "closure_error": error,
            "chance_overlap": math.sqrt(asked.subspace_rank / self.config.model.d_model),
            "means": self._means(rows, group_rows),
            "bootstrap": how_drawn(len({record_of(pair.pair_id) for pair in self.intervals.first})),
        }
        law = (
            "skip and MLP sum to the whole, g_out.δ_total = g_out.δ_in + g_out.δ_mlp with δ_mlp"
            f" read at the MLP's own output, within {error:.1g} of the largest product"
        )
        return Findings(rows, summary, law, further={f"{self.stem()}_group_rows.jsonl": group_rows})

    def provenance(self) -> dict[str, Any]:
        return {
            **self.inputs.provenance(),
            "scalar_pair_rows_sha256": file_digest(self.options.scalar_pair_rows),
            "parameters_sha256": {str(step): w.digest for step, w in self.weights.items()},
        }

    def _pair_rows(self) -> Iterator[Row]:
        """One row an end, role, scalar and pair, in this order."""
        places = [
            (end, role, scalar)
            for end in self.ends
            for role in self.options.position_roles
            for scalar in self.options.scalars
        ]
        for end, role, scalar in places:
            at, readout, values = self.measured[end.step], end.readout(scalar), end.values(scalar)
            columns = at.columns[readout, role]
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

    def _group_rows(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Sums of the products and means of the rest by end, pair type and group.

        Means leave nulls out, and are null without any other.
        """
        table = pd.DataFrame(rows).astype(dict.fromkeys((*SUMMED, *SIZES), float))
        texts, pairs = self.inputs.vocabulary.tokens, len(self.batch)
        summed: list[dict[str, Any]] = []
        for group in (EVERYTHING, *self.options.group_by):
            of_role = {
                role: [EVERYTHING] * pairs
                if group == EVERYTHING
                else [texts[t] for t in group_tokens(self.batch, group, role).tolist()]
                for role in self.options.position_roles
            }
            tokens = [of_role[row["position_role"]][i % pairs] for i, row in enumerate(rows)]
            keys = [*_END, "pair_type", "group_by", "group_token"]
            grouped = table.assign(group_by=group, group_token=tokens).groupby(keys, sort=False)
            columns: list[Any] = [
                grouped.size().rename("pairs"),
                grouped[list(SUMMED)].sum().add_prefix("sum_"),
                grouped[list(SIZES)].mean().add_prefix("mean_"),
            ]
            for row in pd.concat(columns, axis=1).reset_index().to_dict("records"):
                shown = {str(key): None if _is_nan(value) else value for key, value in row.items()}
                token = None if group == EVERYTHING else shown["group_token"]
                summed.append(shown | {"group_token": token})
        return summed

    def _means(self, rows: Sequence[Row], group_rows: Sequence[Row]) -> list[Row]:
        """Means over the pairs of each end and pair type, with the ends of their intervals."""
        of_end: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            of_end.setdefault(tuple(row[name] for name in (*_END, "pair_type")), []).append(row)
        drawn: dict[str, RecordDraws] = {}  # the pairs of a type are the same at every end
        means: list[Row] = []
        for of_all in (row for row in group_rows if row["group_by"] == EVERYTHING):
            pairs = of_end[tuple(of_all[name] for name in (*_END, "pair_type"))]
            kind = of_all["pair_type"]
            if kind not in drawn:
                drawn[kind] = RecordDraws([record_of(pair["pair_id"]) for pair in pairs])
            products = torch.tensor([[pair[name] for name in SUMMED] for pair in pairs]).double()
            found = dict(
                zip(map("mean_{}".format, SUMMED), drawn[kind].means(products), strict=True)
            )
            total = products[:, [SUMMED.index("g_out_delta_total")]]
            through = products[:, [SUMMED.index("g_out_delta_mlp")]]
            (found["through_mlp"],) = drawn[kind].ratios(through, total)
            means.append({**_mean(of_all), **ends(found)})
        return means

    @classmethod
    def size(cls, results: Results[SubspaceOptions]) -> tuple[float, ...]:
        return len(results.summary["steps"]), results.summary["pairs"]

    @classmethod
    def notes(cls, results: Results[SubspaceOptions]) -> list[str]:
        asked, summary = results.options, results.summary
        return [
            f"What {asked.source_component} adds to the stream before and behind {asked.component};"
            f" means over {summary['pairs']} pairs ({asked.record_side} side) in units of the"
            " scalar. `ablation`: what ablating the component really takes, through all positions."
            " Overlaps: norm of the unit projection on the other's PCA basis of rank"
            f" {asked.subspace_rank}, {summary['chance_overlap']:.2f} for a random direction.",
            *note(results),
        ]

    @classmethod
    def tables(cls, results: Results[SubspaceOptions]) -> list[Table]:
        several = len(results.options.pair_types) > 1
        rows = [
            {
                **row,
                "place": f"{row['position_role']}, {row['pair_type']}"
                if several
                else row["position_role"],
                "end": f"{row['endpoint_role']} of {row['source_step']} -> {row['target_step']}",
                "total": between(row, "mean_g_out_delta_total", ".3f"),
                "through": between(row, "through_mlp", ".1%"),
            }
            for row in results.summary["means"]
        ]
        places = {"place": "role", "end": "end", "pairs": "n"}
        drawn = []
        for scalar in results.options.scalars:
            of_scalar = [row for row in rows if row["scalar"] == scalar]
            drawn += [
                Table(scalar, {**places, **_PRODUCTS}, of_scalar, console=len(of_scalar)),
                Table(f"{scalar}: directions", {**places, **_DIRECTIONS}, of_scalar),
            ]
        return drawn

    @classmethod
    def charts(cls, results: Results[SubspaceOptions]) -> list[Chart]:
        """Mean products over steps: a chart a scalar, role, pair type and end."""
        several = len(results.options.pair_types) > 1
        panels: dict[tuple[str, ...], list[Row]] = {}
        for row in results.summary["means"]:
            panels.setdefault(tuple(row[name] for name in _PANEL), []).append(row)
        shade = colour("part", list(_PARTS), labels=_PARTS)
        shown, title = ("step", "part", "value", *ends_of("value")), "mean over pairs"
        drawn = []
        for (scalar, role, kind, end), rows in panels.items():
            name = "_".join((scalar, role, *([kind] if several else []), end))
            data = [
                {"step": row["step"], "part": part, "value": row[part]}
                | {f"value{end}": row.get(f"{part}{end}") for end in ENDS}
                for row in rows
                for part in _PARTS
            ]
            drawn.append(
                chart(
                    f"{cls.stem()}_{name}",
                    f"{scalar} at {role}{f', {kind} pairs' if several else ''}, at the {end} of"
                    " each interval",
                    {f"written_{name}": data},
                    band(f"written_{name}", "value", title, shade),
                    lines(f"written_{name}", "value", title, shade, shown),
                    at_step(),
                )
            )
        return drawn


_PANEL = ("scalar", "position_role", "pair_type", "endpoint_role")
_PARTS = {
    "mean_g_out_delta_in": "g_out·δ_in (past the MLP)",
    "mean_g_out_delta_mlp": "g_out·δ_mlp (through it)",
    "mean_g_out_delta_total": "g_out·δ_total (both)",
    "mean_g_in_delta_in": "g_in·δ_in",
    "mean_ablation_effect": "effect of ablation",
}
"""What charts draw."""
_PRODUCTS = {
    "mean_g_in_delta_in": ("g_in.δ_in", ".3f"),
    "mean_g_out_delta_in": ("g_out.δ_in", ".3f"),
    "mean_g_out_delta_mlp": ("g_out.δ_mlp", ".3f"),
    "mean_g_out_delta_total": ("g_out.δ_total", ".3f"),
    "total": "95 %",
    "mean_ablation_effect": ("ablation", ".3f"),
    "through_mlp": ("through MLP", ".1%"),
    "through": "95 %",
}
_DIRECTIONS = {
    "mean_cosine_g_in_delta_in": ("cos(g_in, δ_in)", ".3f"),
    "mean_cosine_g_out_delta_total": ("cos(g_out, δ_total)", ".3f"),
    "mean_overlap_delta_in_on_g_in": ("δ_in on g_in", ".3f"),
    "mean_overlap_g_in_on_delta_in": ("g_in on δ_in", ".3f"),
}


def _mean(row: Row) -> Row:
    """Means over the pairs of a row of sums; `through_mlp` is null where the total is zero."""
    total, through = row["sum_g_out_delta_total"], row["sum_g_out_delta_mlp"]
    return {
        **{name: row[name] for name in (*_END, "pair_type", "pairs")},
        **{f"mean_{name}": row[f"sum_{name}"] / row["pairs"] for name in SUMMED},
        "through_mlp": through / total if total else None,
        **{f"mean_{name}": row[f"mean_{name}"] for name in SIZES},
    }


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
