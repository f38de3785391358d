"""geometry-subspace-intervention: remove or keep a subspace of the residual stream, and read on.

At one stage and role the residual vectors are replaced by `x - B B^T x` (remove) or `B B^T x`
(keep), and the rest of the network runs on (definitions.md sections 3 and 6).

In `single_query` each read has its own row, in which only its own positions are changed; in
`batch_union` all reads of a record share one row, in which the positions of all of them are. Only
what lies downstream of the stage is run, from clean states that are computed once; a row ends at
its last prediction position, since what comes later cannot matter.

`subspace_share` of a row is `|B^T x|² / |x|²`, averaged over the changed positions of the read:
how much of the vectors lies in the subspace.

In place of what is taken away stands nothing, its mean over the changed positions, or that of a
position of another record (`replacement`). With `random_bases` the same is done in random subspaces
(`random_bases.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from circuit import options
from circuit.artifacts import Row
from circuit.core.intervals import RecordDraws
from circuit.errors import CircuitError
from circuit.figures.charts import (
    CATEGORY,
    INK,
    Chart,
    at_step,
    band,
    chart,
    chosen,
    colour,
    exact,
    lines,
    named,
    steps,
)
from circuit.lazy import alt, no_grad, pd, torch
from circuit.model.ablation import LEFT, Operation, Replacement, other_records, replaced
from circuit.model.components import parse_component
from circuit.model.readout import Answers, read_answers
from circuit.model.stages import read_stages
from circuit.model.subspaces import (
    FULL_RESIDUAL,
    HEAD_SUBSPACES,
    Basis,
    check_subspace,
    subspace_basis,
)
from circuit.reports.changed_places import ChangedPlaces, QueryMode, intervene, run_changed
from circuit.reports.inputs import Checkpointed
from circuit.reports.intervals import cells_between, ends, ends_of, how_drawn, note, shown
from circuit.reports.random_bases import ROWS, RandomBases, how_random, random_table, whiskers
from circuit.reports.report import Findings, OfCheckpoints, Place, Results
from circuit.reports.tables import Columns, Table
from circuit.tasks.examples import Examples

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Vectors = Float[Tensor, "place d_model"]


class InterventionOptions(options.ProbeOptions, options.CheckpointOptions):
    """What is done where."""

    stage: Annotated[str, options.Option("Stage that is changed.", kind="stage")]
    subspace: Annotated[str, options.Option("Subspace that is removed or kept.", kind="subspace")]
    operation: Annotated[Operation, options.Option("remove or keep.")]
    ranks: Annotated[
        tuple[int, ...],
        options.Option(
            "Rank of the subspace, each one intervention; none for full_residual.",
            flag="--rank",
            least=1,
        ),
    ] = ()
    head: Annotated[
        str | None, options.Option("Head whose subspace it is, such as L2H1.", kind="head")
    ] = None
    position_role: Annotated[str, options.Option("Role of the changed positions.", kind="role")] = (
        "prediction"
    )
    query_mode: Annotated[
        QueryMode,
        options.Option(
            "single_query: each read by itself; batch_union: all reads of a record at once."
        ),
    ] = "single_query"
    replacement: Annotated[
        Replacement,
        options.Option(
            "In place of what is taken away: zero, its mean over the changed positions, or that of"
            " a random position of another record (resample)."
        ),
    ] = "zero"
    random_bases: Annotated[
        int,
        options.Option(
            "Random subspaces to compare with: of equal rank, and taking away as much.", least=0
        ),
    ] = 0
    seed: Annotated[int, options.Option("Seed of random_bases and of resample.", least=0)] = 17
    slice: options.Slice = None
    max_records: options.MaxRecords = None

    def check(self) -> None:
        """There is one subspace of everything, and it has no random one beside it."""
        super().check()
        if self.random_bases and self.subspace == FULL_RESIDUAL:
            raise CircuitError(
                f"{FULL_RESIDUAL} has no rank that a random basis could have",
                where="`random_bases`",
                fix="leave it out",
            )

    def __str__(self) -> str:
        of_head = f" of {self.head}" if self.head else ""
        mode = "" if self.query_mode == "single_query" else f", {self.query_mode}"
        place = f"{self.stage} / {self.position_role}{mode}"
        instead = "" if self.replacement == "zero" else f" ({self.replacement})"
        return f"{self.operation} {self.subspace}{of_head}{instead} at {place}"


class GeometrySubspaceIntervention(OfCheckpoints[InterventionOptions]):
    """Remove or keep a subspace at a stage and role: what margin and accuracy are left."""

    command = "geometry-subspace-intervention"
    Options = InterventionOptions
    title = "Interventions on subspaces"
    question = "Does the answer need the subspace, and does the subspace suffice for it?"
    place = 7
    every = True

    @classmethod
    def usual(cls, place: Place) -> InterventionOptions:
        return InterventionOptions(
            **place.read,
            stage=place.after_mlps[-1],
            subspace=place.embeddings,
            operation="remove",
            ranks=(place.rank,),
        )

    def prepare(self) -> None:
        super().prepare()
        options, shape = self.options, self.config.model
        self.head = None if options.head is None else parse_component(options.head)
        self.ranks = options.ranks or (None,)
        for rank in self.ranks:
            check_subspace(
                options.subspace,
                rank,
                self.head,
                d_model=shape.d_model,
                d_head=shape.d_model // shape.heads,
                token_sets=self.inputs.task.token_sets,
            )
        self.batch = self.inputs.reads(options.max_records)
        self.changed = ChangedPlaces.of(self.batch, options.position_role, options.query_mode)
        resampled = options.replacement == "resample"
        self.donors = other_records(self.changed.of_places, options.seed) if resampled else None
        self.random = RandomBases(options.random_bases, options.seed, options.operation)
        self.unchanged = 0.0

    @no_grad
    def measure(self, point: Checkpointed) -> Iterator[Row]:
        """The rows of one checkpoint, rank by rank, read by read."""
        options, batch = self.options, self.batch
        logits, stages = read_stages(point.model, batch.tokens, options.stage)
        states = stages[options.stage]
        clean = self._answers(logits[batch.row, batch.at])
        place = (point.model, options.stage, states, batch)
        # batches of other shapes give other last bits
        same = intervene(*place, options.position_role, lambda x: x, "batch_union")
        again = self._answers(same)
        self.unchanged = max(self.unchanged, float((again.margin - clean.margin).abs().max()))
        vectors = self.changed.vectors(states)

        def run_on(changed: Tensor) -> Answers:
            return self._answers(run_changed(*place, self.changed, changed))

        for rank in self.ranks:
            basis = subspace_basis(
                point.model,
                options.subspace,
                rank,
                head=self.head,
                token_sets=self.inputs.task.token_sets,
            )
            after = run_on(self._change(vectors, basis))
            if options.random_bases:
                assert basis is not None, "full_residual was refused"
                here = {"step": point.step, "rank": rank}
                self.random.measure(here, vectors, basis, self._change, clean, after, run_on)
            columns = {
                **self._names(),
                "positions": batch.role(options.position_role).sum(1).tolist(),
                "subspace_share": _share(states, batch, options.position_role, basis).tolist(),
                **self._columns("baseline", clean),
                **self._columns("intervened", after),
            }
            for values in zip(*columns.values(), strict=True):
                of_read = dict(zip(columns, values, strict=True))
                yield {"step": point.step, "rank": rank, **of_read}

    def _change(self, vectors: Vectors, basis: Basis | None) -> Vectors:
        """The vectors of the changed places, replaced."""
        left = self.changed.each(partial(LEFT[self.options.operation], basis=basis), vectors)
        return replaced(left, vectors - left, self.options.replacement, self.donors)

    def _answers(self, logits: Float[Tensor, "read vocab"]) -> Answers:
        return read_answers(logits, self.batch.answer, self.inputs.task.choices)

    def _names(self) -> dict[str, list[Any]]:
        """What names each read."""
        reads, names, task = self.batch, self.inputs.vocabulary.tokens, self.inputs.task
        slices = reads.slice_values(self.slice)
        flags = [name for name, holds in task.facts.items() if holds]
        rows = reads.row.tolist()
        return {
            "split": [self.inputs.records[row].split for row in rows],
            "sample_id": [self.batch.sample_ids[row] for row in rows],
            "read_index": reads.index.tolist(),
            **({} if slices is None else {self.slice: slices.tolist()}),
            **{name: reads.facts[name].tolist() for name in flags},
            "answer": [names[token] for token in reads.answer.tolist()],
        }

    def _columns(self, prefix: str, answers: Answers) -> dict[str, list[Any]]:
        names = self.inputs.vocabulary.tokens
        return {
            f"{prefix}_margin": answers.margin.tolist(),
            f"{prefix}_answer_correct": answers.is_answer.tolist(),
            f"{prefix}_value_correct": answers.is_value.tolist(),
            f"{prefix}_competitor": [names[token] for token in answers.competitor.tolist()],
        }

    def conclude(self, rows: list[Row]) -> Findings:
        law = (
            f"running on from {self.options.stage} with nothing changed gives the baseline margins"
            f" to within {self.unchanged:.1g} logits"
        )
        summary = {
            "reads": len(self.batch),
            "means": _means(rows),
            "bootstrap": how_drawn(len(set(self.batch.row.tolist()))),
        }
        if not self.options.random_bases:
            return Findings(rows, summary, law)
        summary["random_bases"] = self.random.means
        return Findings(rows, summary, f"{law}; {self.random.law()}", {ROWS: self.random.rows})

    @classmethod
    def size(cls, results: Results[InterventionOptions]) -> tuple[float, ...]:
        return results.summary["reads"], len(results.summary["means"])

    @classmethod
    def notes(cls, results: Results[InterventionOptions]) -> list[str]:
        notes = [
            f"`{results.options}`. Margin: logit of the right value minus the best"
            " other value's. Accuracy: the argmax over the whole vocabulary is the answer. Share:"
            " squared norm of the vectors inside the subspace. Dashed in the charts: nothing"
            " changed.",
            *note(results),
        ]
        if results.options.subspace in HEAD_SUBSPACES:
            notes.append(
                "The head's singular vectors are used on the raw residual; ln1 is not folded in."
            )
        if results.options.random_bases:
            notes.append(how_random(results.options.random_bases, results.options.operation))
        return notes

    @classmethod
    def tables(cls, results: Results[InterventionOptions]) -> list[Table]:
        columns: Columns = {
            "step": "step",
            "rank": "rank",
            "split": "split",
            "reads": "reads",
            "baseline_margin": ("margin", ".3f"),
            "intervened_margin": ("after", ".3f"),
            "margin_drop": ("drop", ".3f"),
            "margin_drop_between": "95 %",
            "baseline_answer_accuracy": ("accuracy", ".1%"),
            "intervened_answer_accuracy": ("after", ".1%"),
            "answer_accuracy_drop_between": "drop, 95 %",
            "subspace_share": ("share", ".1%"),
        }
        formats = {"margin_drop": ".3f", "answer_accuracy_drop": ".1%"}
        means = [row | cells_between(row, formats) for row in results.summary["means"]]
        table = Table(str(results.options), columns, means, console=len(means))
        random = results.summary.get("random_bases", [])
        return [table, *([random_table(random)] if random else [])]

    @classmethod
    def charts(cls, results: Results[InterventionOptions]) -> list[Chart]:
        """Accuracy and margin over steps, and where there are several ranks by rank at the step."""
        means = results.summary["means"]
        rows = [row for row in means if row["split"] == "all"] or means
        rows = shown(rows, tuple(dict.fromkeys([*means[0], *ends_of(*_BETWEEN)])))
        ranks = list(dict.fromkeys(row["rank"] for row in rows))
        random = results.summary.get("random_bases", [])
        data = {"interventions": rows, **({"random_bases": random} if random else {})}
        charts = []
        for column, words in _WORDS.items():
            title = f"{results.options}: {words}"
            if len(ranks) > 1:
                charts.append(_by_rank(data, column, f"{title} at the step, by rank"))
            charts.append(_over_steps(data, ranks, column, f"{title} over steps"))
        return charts


_BEFORE = {"shape": "stroke", "filled": False, "size": 150, "color": INK, "strokeWidth": 2}
"""Marks of the baseline, which a line alone would not show at a single checkpoint."""
_WORDS = {"answer_accuracy": "answer accuracy", "margin": "value margin"}
"""Columns that are drawn."""


def _before_and_after(column: str) -> tuple[str, ...]:
    intervened = f"intervened_{column}"
    return "step", "rank", "split", "reads", f"baseline_{column}", intervened, *ends_of(intervened)


def _domain(column: str) -> list[int] | None:
    return [0, 1] if column == "answer_accuracy" else None


def _by_rank(data: Mapping[str, Sequence[Row]], column: str, title: str) -> Chart:
    x = alt.X("rank:O").title("rank").axis(labelAngle=0)
    place = named("interventions").transform_filter(chosen()).encode(x=x)
    point = alt.OverlayMarkDef(size=50, filled=True, color=CATEGORY[0])
    after = place.mark_line(color=CATEGORY[0], point=point).encode(
        y=alt.Y(f"intervened_{column}:Q")
        .title(_WORDS[column])
        .scale(domain=_domain(column) or alt.Undefined),
        tooltip=exact(*_before_and_after(column)),
    )
    before = place.mark_line(color=INK, strokeDash=[5, 4], point=_BEFORE).encode(
        y=f"baseline_{column}:Q", tooltip=exact("step", "reads", f"baseline_{column}")
    )
    low, high = ends_of(f"intervened_{column}")
    ends_drawn = place.mark_rule(color=CATEGORY[0], strokeWidth=2).encode(
        y=f"{low}:Q", y2=f"{high}:Q"
    )
    layers = whiskers(data.get("random_bases", ()), column, x=x, where=chosen())
    return chart(f"{column}_by_rank", title, data, *layers, after, ends_drawn, before)


def _over_steps(
    data: Mapping[str, Sequence[Row]], ranks: Sequence[int | None], column: str, title: str
) -> Chart:
    names = ["changed" if rank is None else f"rank {rank}" for rank in ranks]
    columns, shade = _before_and_after(column), colour("rank", names)
    named_rank = "datum.rank === null ? 'changed' : 'rank ' + datum.rank"
    random = data.get("random_bases", ())
    if random:  # or the legend has the bars' paleness
        shade["legend"]["symbolOpacity"] = 1
    drawn = ("interventions", f"intervened_{column}", _WORDS[column], shade)
    after = lines(*drawn, columns, domain=_domain(column)).transform_calculate(rank=named_rank)
    between_ends = band(*drawn).transform_calculate(rank=named_rank)
    before = (
        named("interventions")
        .mark_line(color=INK, strokeDash=[5, 4], point=_BEFORE)
        .encode(x=steps(), y=f"baseline_{column}:Q", tooltip=exact("step", f"baseline_{column}"))
    )
    layers = whiskers(random, column, x=steps(), shade=shade)
    layers = [*layers, between_ends, after, before, at_step()]
    return chart(f"{column}_over_steps", title, data, *layers)


def _share(
    clean: Float[Tensor, "batch pos d_model"], batch: Examples, role: str, basis: Basis | None
) -> Float[Tensor, " read"]:
    """Squared norm of the projection over that of the vector, averaged over a read's positions."""
    inside = clean if basis is None else clean @ basis
    share = ((inside**2).sum(-1) / (clean**2).sum(-1))[batch.row]
    mask = batch.role(role)
    return (share * mask).sum(1) / mask.sum(1)


_MEANS = {
    "baseline_margin": "baseline_margin",
    "intervened_margin": "intervened_margin",
    "baseline_answer_correct": "baseline_answer_accuracy",
    "intervened_answer_correct": "intervened_answer_accuracy",
    "baseline_value_correct": "baseline_value_accuracy",
    "intervened_value_correct": "intervened_value_accuracy",
    "subspace_share": "subspace_share",
}
"""Columns of the rows, and the names of their means."""


_DROPS = {
    f"{name}_drop": (f"baseline_{name}", f"intervened_{name}")
    for name in ("margin", "answer_accuracy")
}
_BETWEEN = (*_DROPS, "subspace_share", "intervened_margin", "intervened_answer_accuracy")
"""Means that have intervals."""


def _means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over reads per step, rank and split, and over `all` where there are several splits."""
    table = pd.DataFrame(rows).rename(columns=_MEANS)
    table["rank"] = table["rank"].fillna(0)
    if table["split"].nunique() > 1:
        table = pd.concat([table, table.assign(split="all")])
    for name, (before, after) in _DROPS.items():
        table[name] = table[before].astype(float) - table[after].astype(float)
    groups = table.groupby(["step", "rank", "split"], sort=False)
    means = groups[list(_MEANS.values())].mean()
    means.insert(0, "reads", groups.size())
    for name, (before, after) in _DROPS.items():
        means[name] = means[before] - means[after]
    records = means.reset_index().to_dict("records")
    return [
        {str(name): value for name, value in row.items()}
        | {"rank": int(row["rank"]) or None}
        | _intervals(reads)
        for row, (_, reads) in zip(records, groups, strict=True)
    ]


def _intervals(reads: pd.DataFrame) -> dict[str, float | None]:
    """Of the means over some reads, by record."""
    values = torch.tensor(reads[list(_BETWEEN)].to_numpy(dtype=float))
    found = RecordDraws(reads["sample_id"].tolist()).means(values)
    return ends(dict(zip(_BETWEEN, found, strict=True)))
