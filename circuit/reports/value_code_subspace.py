"""value-code-subspace-report: when, and at which stage, a position tells which token it holds.

Per checkpoint, stage, role and grouping, over all reads: how much of a unit vector lies in the
identity basis and in the all-vector basis, what the stage lens reads, and how often the nearest
centroid of the other reads is that of the read's own token (definitions.md sections 3 and 6).
A role with several positions enters by its mean.

The query's key is much of the variance at the prediction position, where it hides the value from
raw cosines; so each row also has the accuracy after the mean over the reads of the same query key
is subtracted (`centroid_accuracy_key_removed`; null where that key is the group itself).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from circuit import options
from circuit.artifacts import Row
from circuit.core.intervals import Interval, RecordDraws
from circuit.figures.charts import (
    INK,
    Chart,
    at_step,
    band,
    chart,
    colour,
    exact,
    last_dashed,
    lines,
    named,
    steps,
)
from circuit.lazy import alt, no_grad, torch
from circuit.model.codes import Vectors, mean_at, nearest_centroid, nearest_centroid_without
from circuit.model.readout import Answers, lens, read_answers
from circuit.model.stages import read_stages
from circuit.model.subspaces import Basis, check_rank, identity_basis, vector_basis
from circuit.reports.inputs import Checkpointed
from circuit.reports.intervals import (
    ENDS,
    apart,
    between,
    ends,
    ends_of,
    how_drawn,
    note,
    shown,
    with_intervals,
)
from circuit.reports.report import Findings, OfCheckpoints, Place, Results
from circuit.reports.tables import Columns, Table
from circuit.tasks.base import Task
from circuit.tasks.groups import check_group, group_tokens, nonempty_mask

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer

READABLE = 0.5
"""Leave-one-out accuracy from which the summary calls a code readable."""
READOUTS = {
    "centroid_accuracy": "nearest centroid",
    "centroid_accuracy_key_removed": "nearest centroid, query key removed",
    "lens_value_accuracy": "stage lens",
}
"""What is drawn over steps."""
DRAWN = (
    *("step", "stage", "position_role", "group_by", "reads", *READOUTS),
    *("final_value_accuracy", "identity_projection"),
)
"""Columns that charts have."""
ALIKE = {"support_value": "answer_value", "support_key": "query_key"}
"""Groupings that are the same in valid records: one of them is drawn."""


class SubspaceOptions(options.ProbeOptions, options.CheckpointOptions):
    """Where and how the code is read."""

    stages: Annotated[tuple[str, ...], options.Option("Stage.", flag="--stage", kind="stage")]
    position_roles: options.Roles = ("prediction",)
    group_by: Annotated[
        tuple[str, ...], options.Option("Token by which reads are grouped.", kind="group_by")
    ] = ("answer_value",)
    slice: options.Slice = None
    max_records: options.MaxRecords = None
    pca_rank: Annotated[int, options.Option("Rank of both bases.", least=1)] = 4

    def check_task(self, task: Task) -> None:
        """Also refuses the token at a role that has several."""
        super().check_task(task)
        for role in self.position_roles:
            for group in self.group_by:
                check_group(task, group, role)


@dataclass(frozen=True)
class Site:
    """One role: its positions, and the reads' groups by each grouping."""

    role: str
    mask: Tensor
    groups: dict[str, Tensor]


class ValueCodeSubspace(OfCheckpoints[SubspaceOptions]):
    """When, and at which stage, a position tells which token it holds."""

    command = "value-code-subspace-report"
    Options = SubspaceOptions
    title = "Value readability by stage"
    question = "From which stage, and from which step on, can the value be read at a position?"
    place = 6
    asked_of = "symbolic_kv_stream"

    @classmethod
    def usual(cls, place: Place) -> SubspaceOptions:
        rank = min(4, place.rank)
        return SubspaceOptions(
            **place.read, stages=(*place.after_mlps, "final_norm"), pca_rank=rank
        )

    def prepare(self) -> None:
        super().prepare()
        self.batch = self.inputs.reads(self.options.max_records)
        self.sites = [self._site(role) for role in self.options.position_roles]
        self.gap = 0.0

    def _site(self, role: str) -> Site:
        """A role with its groups; refuses a rank that their bases do not have."""
        groups = {
            name: group_tokens(self.batch, name, role).cpu() for name in self.options.group_by
        }
        for name, tokens in groups.items():
            count = len(set(tokens.tolist()))
            check_rank(
                f"the identity basis by {name} ({count} tokens in {len(tokens)} reads)",
                self.options.pca_rank,
                min(count - 1, self.config.model.d_model),
            )
        return Site(role, nonempty_mask(self.batch, role), groups)

    @no_grad
    def measure(self, point: Checkpointed) -> Iterator[Row]:
        reads, asked = self.batch, self.options.stages
        last = "final_norm"  # whose lens is the model's own readout
        logits, states = read_stages(point.model, self.batch.tokens, *dict.fromkeys((*asked, last)))
        final = self._answers(logits[reads.row, reads.at])
        at_prediction = mean_at(states[last], reads.row, nonempty_mask(self.batch, "prediction"))
        margin = self._lens(point.model, last, at_prediction).margin
        self.gap = max(self.gap, float((margin - final.margin).abs().max()))
        for stage in asked:
            for site in self.sites:
                vectors = mean_at(states[stage], reads.row, site.mask)
                seen = self._lens(point.model, stage, vectors)
                place = {"step": point.step, "stage": stage, "position_role": site.role}
                for row in self._rows(vectors, site, seen, final):
                    yield {**place, **row}

    def _answers(self, logits: Tensor) -> Answers:
        answer = self.batch.answer.cpu()
        return read_answers(logits.cpu(), answer, self.inputs.task.choices)

    def _lens(self, model: HookedTransformer, stage: str, vectors: Vectors) -> Answers:
        return self._answers(lens(model, stage, vectors.to(model.W_E)))

    def _rows(self, vectors: Vectors, site: Site, seen: Answers, final: Answers) -> Iterator[Row]:
        """One row for each grouping at one stage and role of one checkpoint."""
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        mean = vectors.mean(0)
        reads, rank = self.batch, self.options.pca_rank
        record, key = reads.row.cpu(), reads.asked().cpu()
        masks = reads.by_slice(self.slice).items()
        slices = {value: mask.cpu() for value, mask in masks if value != "all"}
        of_all = {
            "vector_projection": _share(unit, vector_basis(vectors, rank)),
            "mean_cosine": _mean((unit @ mean / mean.norm()).abs()),
            "lens_value_margin": _mean(seen.margin),
            "lens_value_accuracy": _mean(seen.is_value),
            "final_value_margin": _mean(final.margin),
            "final_value_accuracy": _mean(final.is_value),
            "final_answer_accuracy": _mean(final.is_answer),
        }
        for name, groups in site.groups.items():
            alone = torch.arange(len(groups))
            found, scored = nearest_centroid(vectors, groups, alone)
            other, scored_other = nearest_centroid(vectors, groups, record)
            without, scored_without = nearest_centroid_without(vectors, groups, key)
            right, right_other, right_without = (x == groups for x in (found, other, without))
            is_key = torch.equal(groups, key)
            accuracy_without = None if is_key else _mean(right_without[scored_without])
            of_readouts = (
                _interval(right, record, scored),
                (None, None) if is_key else _interval(right_without, record, scored_without),
                _interval(seen.is_value, record, torch.ones_like(scored)),
            )
            yield {
                "group_by": name,
                "reads": len(groups),
                "tokens": len(set(groups.tolist())),
                "identity_projection": _share(unit, identity_basis(vectors, groups, rank)),
                **of_all,
                "centroid_accuracy": _mean(right[scored]),
                "centroid_reads": int(scored.sum()),
                "centroid_accuracy_other_records": _mean(right_other[scored_other]),
                "centroid_reads_other_records": int(scored_other.sum()),
                "centroid_accuracy_key_removed": accuracy_without,
                "centroid_reads_key_removed": None if is_key else int(scored_without.sum()),
                f"by_{self.slice}": {
                    value: {
                        "reads": int(chosen.sum()),
                        "centroid_accuracy": _mean(right[scored & chosen]),
                        "lens_value_accuracy": _mean(seen.is_value[chosen]),
                        "final_value_accuracy": _mean(final.is_value[chosen]),
                    }
                    for value, chosen in slices.items()
                },
                **ends(dict(zip(READOUTS, of_readouts, strict=True))),
            }

    def conclude(self, rows: list[Row]) -> Findings:
        courses: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            place = row["group_by"], row["position_role"], row["stage"]
            courses.setdefault(place, []).append(row)
        asked = self.options
        readout = [
            {
                "group_by": group,
                "position_role": role,
                "stage": stage,
                "readable_from_step": first_to_stay(course, "centroid_accuracy"),
                "lens_readable_from_step": first_to_stay(course, "lens_value_accuracy"),
                **{f"last_{name}": course[-1][name] for name in (*READOUTS, "identity_projection")},
                **{
                    f"last_{name}{end}": course[-1][f"{name}{end}"]
                    for name in READOUTS
                    for end in ENDS
                },
            }
            for group in asked.group_by
            for role in asked.position_roles
            for stage in asked.stages
            for course in [courses[group, role, stage]]
        ]
        summary = {
            "reads": len(self.batch),
            "steps": sorted({row["step"] for row in rows}),
            "readable_at_accuracy": READABLE,
            "readout": readout,
            "bootstrap": how_drawn(len(set(self.batch.row.tolist()))),
        }
        rows, further = apart(self, rows, "step", "stage", "position_role", "group_by")
        law = (
            "the lens at final_norm gives the model's own value margins; they differ by at most"
            f" {self.gap:.1e}"
        )
        return Findings(rows, summary, law, further)

    @classmethod
    def size(cls, results: Results[SubspaceOptions]) -> tuple[float, ...]:
        return results.summary["reads"], len(results.summary["steps"])

    @classmethod
    def notes(cls, results: Results[SubspaceOptions]) -> list[str]:
        return [
            f"{results.summary['reads']} reads at {len(results.summary['steps'])} checkpoints. A"
            " code is called readable from the first step at which accuracy is"
            f" {READABLE} and stays so; -: it is not. Centroid: nearest centroid (cosine) of the"
            " other reads; other records: without the read's whole record; key removed: after the"
            " mean of the reads with the same query key is subtracted; lens: the answer is the"
            " stage lens's best value. Dotted in the charts: the model's own answer.",
            *note(results),
        ]

    @classmethod
    def tables(cls, results: Results[SubspaceOptions]) -> list[Table]:
        place = {"group_by": "by", "position_role": "role", "stage": "stage"}
        readable: dict[str, Sequence[str]] = {
            **place,
            "readable_from_step": "centroid from",
            "lens_readable_from_step": "lens from",
        }
        for name, words in zip(READOUTS, ("centroid", "key removed", "lens"), strict=True):
            readable |= {f"last_{name}": (words, ".1%"), f"{name}_between": "95 %"}
        accuracies = {
            "centroid_accuracy": "centroid",
            "centroid_accuracy_other_records": "other records",
            "centroid_accuracy_key_removed": "key removed",
            "lens_value_accuracy": "lens",
            "lens_value_margin": "lens margin",
            "identity_projection": "identity basis",
            "vector_projection": "all-vector basis",
            "mean_cosine": "cosine to mean",
            "final_value_accuracy": "final accuracy",
        }
        by_step: Columns = {
            "step": "step",
            **place,
            **{n: (t, ".3f") for n, t in accuracies.items()},
        }
        last = results.summary["steps"][-1]
        readout = [
            {**of, **{f"{name}_between": between(of, f"last_{name}", ".1%") for name in READOUTS}}
            for of in results.summary["readout"]
        ]
        title = f"Readable: accuracy at least {READABLE} from that step to {last}"
        rows = [{name: row[name] for name in by_step} for row in results.rows()]
        return [
            Table(title, readable, readout, console=len(readout)),
            Table("Readouts", by_step, rows),
        ]

    @classmethod
    def charts(cls, results: Results[SubspaceOptions]) -> list[Chart]:
        """Accuracy of three readouts over steps, one line a stage, for every role and grouping."""
        rows = shown(with_intervals(cls, results), (*DRAWN, *ends_of(*READOUTS)))
        views: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            views.setdefault((row["position_role"], row["group_by"]), []).append(row)
        stages = list(results.options.stages)
        drawn = []
        for (role, group), data in views.items():
            if (role, ALIKE.get(group)) in views:
                continue
            name = f"readability_{role}_{group}"
            model = (
                named(name)
                .transform_filter(f"datum.stage === '{stages[-1]}'")
                .mark_line(color=INK, strokeDash=[1, 4], strokeWidth=1.8)
                .encode(
                    x=steps(),
                    y=alt.Y("final_value_accuracy:Q"),
                    tooltip=exact("step", "reads", "final_value_accuracy"),
                )
            )
            for column, words in READOUTS.items():
                if all(row[column] is None for row in data):
                    continue
                shade = colour("stage", stages)
                curve = lines(
                    *(name, column, "accuracy", shade, (*DRAWN, *ends_of(column))),
                    domain=[0, 1],
                    dashed=last_dashed("stage", stages),
                )
                title = f"{group} at {role}: {words}"
                layers = (band(name, column, "accuracy", shade), curve, model, at_step())
                drawn.append(chart(f"{name}_{column}", title, {name: data}, *layers, height=180))
        return drawn


def first_to_stay(rows: Sequence[Row], column: str) -> int | None:
    """The first step from which an accuracy stays at `READABLE` or more."""
    step = None
    for row in reversed(rows):
        if row[column] is None or row[column] < READABLE:
            break
        step = int(row["step"])
    return step


def _share(unit: Vectors, basis: Basis) -> float:
    """Mean norm of the projections of unit vectors."""
    return float((unit @ basis).norm(dim=1).mean())


def _mean(values: Tensor) -> float | None:
    """The mean; None of nothing."""
    return float(values.double().mean()) if len(values) else None


def _interval(right: Tensor, record: Tensor, scored: Tensor) -> Interval:
    """Of the share of some reads that are read right."""
    if not scored.any():
        return None, None
    return RecordDraws(record[scored]).means(right[scored, None])[0]
