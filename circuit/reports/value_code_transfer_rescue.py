"""value-code-transfer-rescue: can source and context replace a removed value code.

At each checkpoint:

1. split the reads by hash; identity bases of source, target and context from the fitting part;
2. fit ridge maps from source, context and both coordinates to the target's;
3. on the evaluation reads, remove the target's code at its stage and position, one row a read;
4. write back the true code (`oracle`), the maps' codes, or a control's; read the answer.

Rescue fraction of a scalar = (patched - removed) / (clean - removed), from means over the reads
(definitions.md section 6); null where removal changes nothing. Its interval is the 2.5 to 97.5
percentile of 1000 seeded bootstrap draws of whole records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from circuit import options
from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.figures.charts import (
    CATEGORY,
    INK,
    TICKS,
    Chart,
    at_step,
    chart,
    chosen,
    colour,
    exact,
    lines,
    named,
)
from circuit.lazy import alt, no_grad, torch
from circuit.model.codes import logits_with_code, mean_at
from circuit.model.readout import Answers, read_answers
from circuit.model.rescue import (
    CONTROLS,
    condition_codes,
    explained,
    next_other,
    removed_share,
    rescue_fractions,
)
from circuit.model.stages import read_stages
from circuit.model.subspaces import check_rank
from circuit.reports.inputs import Checkpointed
from circuit.reports.report import Findings, OfCheckpoints, Place, Results
from circuit.reports.tables import Table, by_step
from circuit.tasks.base import Task
from circuit.tasks.groups import (
    group_tokens,
    is_for_fitting,
    nonempty_mask,
)
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

READ_ROWS = "value_code_transfer_rescue_read_rows.jsonl"
SCALARS = (
    "correct_value_logit",
    "value_margin",
    "clean_competitor_margin",
    "removed_competitor_margin",
    "negative_answer_loss",
    "value_accuracy",
)
SHOWN = ("negative_answer_loss", "removed_competitor_margin", "value_margin", "value_accuracy")
"""Those of the tables."""
DRAWN = SHOWN[:2]
"""Those whose rescue fraction is drawn."""
MAIN = ("oracle", "true_transfer", "context_only", "source_plus_context")
"""Conditions that are drawn over steps, beside the controls."""


CONTROL_ROLES = {"wrong_support_value": "value_distractors", "key_identity": "support_key"}
"""Roles that controls take their vectors from."""


class RescueOptions(options.ProbeOptions, options.CheckpointOptions):
    """What is removed, and from what it is put back."""

    source_stage: Annotated[str, options.Option("Stage of the source.", kind="stage")]
    target_stage: Annotated[
        str, options.Option("Stage at which the code is removed.", kind="stage")
    ]
    source_position_role: Annotated[str, options.Option("Role of the source.", kind="role")] = (
        "support_value"
    )
    target_position_role: Annotated[
        str,
        options.Option("Role at which the code is removed; one position.", kind="single_role"),
    ] = "prediction"
    context_stage: Annotated[
        str | None, options.Option("Stage of the context.", kind="stage", unset="the source's")
    ] = None
    context_position_role: Annotated[str, options.Option("Role of the context.", kind="role")] = (
        "prediction"
    )
    context_rank: Annotated[
        int | None,
        options.Option("Rank of the context's basis.", least=1, unset="the other bases' rank"),
    ] = None
    group_by: Annotated[
        str, options.Option("Token by which identity bases are taken.", kind="group_by")
    ] = "answer_value"
    basis_rank: Annotated[
        int, options.Option("Rank of the source's and the target's basis.", least=1)
    ] = 16
    controls: Annotated[
        tuple[str, ...], options.Option("Control.", flag="--control", choices=CONTROLS)
    ] = CONTROLS
    fit_fraction: Annotated[
        float,
        options.Option("Share of the reads that bases and maps are fitted on.", above=0, below=1),
    ] = 0.75
    ridge_lambda: Annotated[float, options.Option("Penalty of the maps.", above=0)] = 1e-3
    slice: options.Slice = None
    max_records: options.MaxRecords = None
    batch_size: Annotated[int, options.Option("Reads of one forward pass, one a row.", least=1)] = (
        32
    )
    seed: Annotated[int, options.Option("Seed of the random subspace and the intervals.")] = 17

    @property
    def ranks(self) -> dict[str, int]:
        """Of the basis and of the context."""
        return {"basis": self.basis_rank, "context": self.context_rank or self.basis_rank}

    @property
    def sites(self) -> dict[str, tuple[str, str]]:
        """Stage and role of everything whose vectors are needed."""
        sites = {
            "source": (self.source_stage, self.source_position_role),
            "target": (self.target_stage, self.target_position_role),
            "context": (self.context_stage or self.source_stage, self.context_position_role),
            **{name: (self.source_stage, role) for name, role in CONTROL_ROLES.items()},
        }
        return {n: site for n, site in sites.items() if n not in CONTROLS or n in self.controls}

    def check_model(self, shape: ModelConfig) -> None:
        """Also refuses a rank that the residual stream does not have."""
        super().check_model(shape)
        for name, rank in self.ranks.items():
            check_rank(f"the {name}", rank, shape.d_model)

    def check_task(self, task: Task) -> None:
        """Also refuses controls whose role the task does not have."""
        super().check_task(task)
        task.check_roles(*(role for _, role in self.sites.values()))


class ValueCodeTransferRescue(OfCheckpoints[RescueOptions]):
    """Remove a value code, and put it back from its source, its context, or a control."""

    command = "value-code-transfer-rescue"
    Options = RescueOptions
    title = "Rescue"
    question = "Which code, put back where the value code was removed, gives the answer back?"
    place = 8
    asked_of = "symbolic_kv_stream"

    @classmethod
    def usual(cls, place: Place) -> RescueOptions:
        source, target = ["embedding", *place.after_mlps][-2:]
        needed = {name: CONTROL_ROLES.get(name, "prediction") for name in CONTROLS}
        return RescueOptions(
            **place.read,
            source_stage=source,
            target_stage=target,
            basis_rank=place.rank,
            controls=tuple(name for name, role in needed.items() if place.has_role(role)),
        )

    def prepare(self) -> None:
        """Read the reads, split them, and say who stands in for whom; `_hold_out` refuses."""
        super().prepare()
        self.batch = batch = self.inputs.reads(self.options.max_records)
        role = self.options.target_position_role
        self.groups = group_tokens(batch, self.options.group_by, role).cpu()
        fitting = is_for_fitting(batch, self.options.fit_fraction).cpu()
        self.fit, self.held_out = fitting.nonzero()[:, 0], (~fitting).nonzero()[:, 0]
        self._refuse_too_few()
        self.position = batch.position(role)
        self.answer = batch.answer.cpu()[self.held_out]
        # for each read held out, the next one with another answer
        self.shuffled = self.held_out[next_other(self.answer)]
        self.masks = {name: nonempty_mask(batch, r) for name, (_, r) in self.options.sites.items()}
        self.shares: dict[str, dict[str, float | None]] = {}
        self.read_rows: list[Row] = []
        self.gap = 0.0

    def _refuse_too_few(self) -> None:
        """Refuse ranks that the fitting part, or too few reads that the evaluation part has."""
        asked, most = self.options, max(self.options.ranks.values())
        tokens = len(set(self.groups[self.fit].tolist()))
        for name, rank in asked.ranks.items():
            check_rank(
                f"the {name} by {asked.group_by}"
                f" ({tokens} tokens in {len(self.fit)} fitting reads)",
                rank,
                tokens - 1,
            )
        if len(self.held_out) < most:
            raise CircuitError(
                f"{len(self.held_out)} evaluation reads",
                where=f"{len(self.groups)} reads, `fit_fraction` {asked.fit_fraction}",
                expected=f"at least {most}, as many as ranks",
                fix="take more reads, lower `fit_fraction` or lower the ranks",
            )

    @no_grad
    def measure(self, point: Checkpointed) -> Iterator[Row]:
        """One row a condition: means of the scalars and rescues (1 for clean, 0 for removed)."""
        asked, reads = self.options, self.batch
        stages = dict.fromkeys(stage for stage, _ in asked.sites.values())
        _, states = read_stages(point.model, self.batch.tokens, *stages)
        vectors = {
            name: mean_at(states[stage], reads.row, self.masks[name])
            for name, (stage, _) in asked.sites.items()
        }
        basis, codes = condition_codes(
            vectors,
            groups=self.groups,
            fit=self.fit,
            held_out=self.held_out,
            shuffled=self.shuffled,
            controls=asked.controls,
            rank=asked.ranks["basis"],
            context_rank=asked.ranks["context"],
            ridge=asked.ridge_lambda,
            seed=asked.seed,
        )
        clean = states[asked.target_stage]
        logits: dict[str, list[Tensor]] = {name: [] for name in codes}
        for chunk in torch.split(torch.arange(len(self.held_out)), asked.batch_size):
            at = self.held_out[chunk].to(clean.device)
            width = int(reads.at[at].max()) + 1  # what comes later has no effect
            place = (clean[reads.row[at], :width], self.position[at], reads.at[at], basis)
            for name, code in codes.items():
                written = None if code is None else code[chunk]
                there = logits_with_code(point.model, asked.target_stage, *place, written)
                logits[name].append(there.cpu())
        whole = {name: torch.cat(parts) for name, parts in logits.items()}
        values_of = self.inputs.task.choices
        answers = {name: read_answers(x, self.answer, values_of) for name, x in whole.items()}
        rivals = [answers[name].competitor[:, None] for name in ("clean", "removed")]
        values = {name: _scalars(whole[name], answers[name], rivals) for name in codes}
        gap = answers["oracle"].margin - answers["clean"].margin
        self.gap = max(self.gap, float(gap.abs().max()))
        share, key = removed_share(vectors["target"], basis, reads.asked().cpu())
        self.shares[str(point.step)] = {"norm_share": share, "query_key_share": key}
        self.read_rows += self._of_reads(point.step, values)
        records = reads.row.cpu()[self.held_out]
        for name, of_reads in values.items():
            row: dict[str, Any] = {
                "step": point.step,
                "condition": name,
                "reads": len(of_reads),
                "code_r2": explained(codes[name], codes["oracle"]),
                **dict(zip(SCALARS, of_reads.mean(0).tolist(), strict=True)),
            }
            fractions = rescue_fractions(values, records, name, asked.seed)
            for scalar, ends in zip(SCALARS, fractions, strict=True):
                names = (f"rescue_{scalar}{end}" for end in ("", "_low", "_high"))
                row |= dict(zip(names, ends, strict=True))
            yield row

    def _of_reads(self, step: int, values: Mapping[str, Tensor]) -> Iterator[Row]:
        """One row a condition and evaluation read."""
        reads = self.batch.select(self.held_out.to(self.batch.tokens.device))
        slices = reads.slice_values(self.slice)
        columns = {
            "sample_id": [self.batch.sample_ids[row] for row in reads.row.tolist()],
            "read_index": reads.index.tolist(),
            **({} if slices is None else {self.slice: slices.tolist()}),
            "answer": reads.answer.tolist(),
        }
        rows = zip(*columns.values(), strict=True)
        places = [dict(zip(columns, of_read, strict=True)) for of_read in rows]
        for name, of_reads in values.items():
            for place, scalars in zip(places, of_reads.tolist(), strict=True):
                named_scalars = dict(zip(SCALARS, scalars, strict=True))
                yield {"step": step, "condition": name, **place, **named_scalars}

    def conclude(self, rows: list[Row]) -> Findings:
        seen = torch.isin(self.groups[self.held_out], self.groups[self.fit])
        of = {(row["step"], row["condition"]): row for row in rows}
        steps = sorted({row["step"] for row in rows})
        summary = {
            "fitting_reads": len(self.fit),
            "evaluation_reads": len(self.held_out),
            "evaluation_tokens_seen_in_fitting": float(seen.double().mean()),
            "steps": steps,
            "removed_from_target": self.shares,
            # clean minus removed: the denominator of the rescue fractions
            "lost_by_removal": {
                scalar: {
                    str(step): of[step, "clean"][scalar] - of[step, "removed"][scalar]
                    for step in steps
                }
                for scalar in SHOWN
            },
            "rescue": {scalar: _by_condition(rows, f"rescue_{scalar}") for scalar in SHOWN},
            "value_accuracy": _by_condition(rows, "value_accuracy"),
            "code_r2": _by_condition(rows, "code_r2"),
        }
        law = (
            "the oracle, the read's own code put back, rescues everything: every read's answer"
            f" margin is the clean one to within {self.gap:.1e} logits"
        )
        return Findings(rows, summary, law, {READ_ROWS: self.read_rows})

    @classmethod
    def size(cls, results: Results[RescueOptions]) -> tuple[float, ...]:
        return results.summary["evaluation_reads"], len(results.summary["steps"])

    @classmethod
    def notes(cls, results: Results[RescueOptions]) -> list[str]:
        summary = results.summary
        return [
            f"{summary['fitting_reads']} reads for fitting, {summary['evaluation_reads']} for"
            f" evaluation; {100 * summary['evaluation_tokens_seen_in_fitting']:.0f} % of the latter"
            " have a token that the fitting part holds. Fractions are of means over the evaluation"
            " reads; -: there is none. Where removal loses nothing (lost by removal not above 0) a"
            " fraction means nothing, and is not drawn. Whiskers, `_low` and `_high`: bootstrap"
            " over whole records. In charts, ctx: context; dashed: controls."
        ]

    @classmethod
    def tables(cls, results: Results[RescueOptions]) -> list[Table]:
        summary, steps = results.summary, results.summary["steps"]
        titles = {
            "norm_share": "share of the target's squared norm",
            "query_key_share": "share of the directions that tell query keys apart",
        }
        removed = {
            title: {step: shares[name] for step, shares in summary["removed_from_target"].items()}
            for name, title in titles.items()
        }
        tables = {
            f"Rescue fraction of {scalar}": {
                "(lost by removal)": summary["lost_by_removal"][scalar],
                **summary["rescue"][scalar],
            }
            for scalar in SHOWN
        }
        first = next(iter(tables))
        tables |= {
            "Value accuracy": summary["value_accuracy"],
            "R² of the code that is written, over the evaluation reads": summary["code_r2"],
            "What is removed": removed,
        }
        return [
            Table(
                title,
                **by_step(values, steps, ".3f", "condition"),
                console=len(values) if title == first else 0,
            )
            for title, values in tables.items()
        ]

    @classmethod
    def charts(cls, results: Results[RescueOptions]) -> list[Chart]:
        """Accuracies and fractions at the step, and the fractions over steps."""
        lost = results.summary["lost_by_removal"]
        names = [f"rescue_{scalar}{end}" for scalar in DRAWN for end in ("", "_low", "_high")]
        rows = [
            {name: row[name] for name in ("step", "condition", "reads", "value_accuracy", *names)}
            | {f"lost_{scalar}": lost[scalar][str(row["step"])] for scalar in DRAWN}
            for row in results.rows()
        ]
        conditions = list(dict.fromkeys(row["condition"] for row in rows))
        charts = [_accuracies(rows, conditions)]
        for scalar in DRAWN:
            charts += [_fractions(rows, conditions[2:], scalar), _courses(rows, conditions, scalar)]
        return charts


def _scalars(logits: Tensor, answers: Answers, rivals: Sequence[Tensor]) -> Tensor:
    """`[read, scalar]` in the order of `SCALARS`."""
    columns = [
        answers.correct,
        answers.margin,
        *(answers.correct - logits.gather(1, rival)[:, 0] for rival in rivals),
        answers.log_probability,
        answers.is_value,
    ]
    return torch.stack([column.double() for column in columns], dim=1)


def _by_condition(rows: Sequence[Row], column: str) -> dict[str, dict[str, float | None]]:
    """A column by condition and step."""
    values: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if not (column.startswith("rescue") and row["condition"] in ("clean", "removed")):
            values.setdefault(row["condition"], {})[str(row["step"])] = row[column]
    return values


# --- charts --------------------------------------------------------------------------------------


def _conditions(names: Sequence[str]) -> alt.Y:
    text = "replace(replace(datum.label, '_plus_context', ' +ctx'), /_/g, ' ')"
    axis = alt.Axis(labelExpr=text, labelLimit=alt.ExprRef("width < 300 ? 170 : 240"), title=None)
    return alt.Y("condition:N").axis(axis).sort(list(names))


def _accuracies(rows: Sequence[Row], names: Sequence[str]) -> Chart:
    accuracy = alt.X("value_accuracy:Q").title("value accuracy").axis(tickCount=TICKS)
    bars = (
        named("rescue")
        .transform_filter(chosen())
        .mark_bar(color=CATEGORY[0])
        .encode(
            y=_conditions(names),
            x=accuracy.scale(domain=[0, 1]),
            tooltip=exact("step", "condition", "reads", "value_accuracy"),
        )
    )
    title, height = "Value accuracy at the step", 20 * len(names)
    return chart("rescue_accuracy", title, {"rescue": rows}, bars, height=height)


def _there(scalar: str) -> str:
    """The filter that leaves fractions that mean something."""
    return f"isValid(datum.rescue_{scalar}) && datum.lost_{scalar} > 0"


def _fractions(rows: Sequence[Row], names: Sequence[str], scalar: str) -> Chart:
    """Fractions with their whiskers at the step."""
    column = f"rescue_{scalar}"
    place = (
        named("rescue")
        .transform_filter(chosen())
        .transform_filter("indexof(['clean', 'removed'], datum.condition) < 0")
        .transform_filter(_there(scalar))
        .encode(y=_conditions(names))
    )
    scale = alt.Scale(domain=[-1, 1.5], clamp=True)
    tooltip = exact("step", "condition", "reads", column, f"{column}_low", f"{column}_high")
    whiskers = place.mark_rule(color=CATEGORY[0], strokeWidth=2).encode(
        x=alt.X(f"{column}_low:Q").title("rescue fraction").axis(tickCount=TICKS).scale(scale),
        x2=f"{column}_high:Q",
        tooltip=tooltip,
    )
    points = place.mark_point(color=CATEGORY[0], filled=True, size=60, opacity=1).encode(
        x=alt.X(f"{column}:Q").scale(scale), tooltip=tooltip
    )
    ends = alt.Chart(alt.InlineData(values=[{"at": 0}, {"at": 1}]))
    edge = ends.mark_rule(color=INK, strokeDash=[3, 3], opacity=0.6).encode(x="at:Q")
    title = f"Rescue of the {scalar.replace('_', ' ')} at the step"
    layers, height = (whiskers, points, edge), 20 * len(names)
    return chart(column, title, {"rescue": rows}, *layers, height=height)


def _courses(rows: Sequence[Row], names: Sequence[str], scalar: str) -> Chart:
    """Fractions over steps; the controls, each by itself, are dashed."""
    column = f"rescue_{scalar}"
    shown = [name for name in names if name in (*MAIN, *CONTROLS)]
    words = {name: name.replace("_", " ") for name in shown}
    shade = colour("condition", shown, labels=words, palette=[INK, *CATEGORY])
    dashes = [[4, 4] if name in CONTROLS else [1, 0] for name in shown]
    curve = lines(
        *("rescue", column, "rescue fraction", shade),
        ("step", "condition", "reads", column),
        where=f"indexof({shown}, datum.condition) >= 0 && {_there(scalar)}",
        dashed=alt.StrokeDash("condition:N")
        .scale(domain=shown, range=dashes)
        .legend(shade["legend"]),
    )
    axis = alt.Y(f"{column}:Q").title("rescue fraction").scale(domain=[-1, 1.5], clamp=True)
    title = f"Rescue of the {scalar.replace('_', ' ')} over steps"
    layers = (curve.encode(y=axis), at_step())
    return chart(f"{column}_over_steps", title, {"rescue": rows}, *layers)
