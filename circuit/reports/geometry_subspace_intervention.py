"""geometry-subspace-intervention: remove or keep a subspace of the residual stream, and read on.

At one stage and role the residual vectors are replaced by `x - B B^T x` (remove) or `B B^T x`
(keep), and the rest of the network runs on (definitions.md sections 3 and 6); `interventions.py`
says how the reads are laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.figures.interventions import margin_and_accuracy
from circuit.lazy import no_grad, pd
from circuit.model.components import Component, parse_component
from circuit.model.readout import Answers, read_answers
from circuit.model.stages import read_stages, stage_hook
from circuit.model.subspaces import (
    EMBEDDING_SUBSPACES,
    HEAD_SUBSPACES,
    Basis,
    check_subspace,
    keep,
    remove,
    subspace_basis,
)
from circuit.reports.base import ReportResult, open_report
from circuit.reports.inputs import Checkpointed, Inputs, open_inputs
from circuit.reports.interventions import QueryMode, intervene
from circuit.tasks.positions import Batch, check_roles, role_mask
from circuit.train_config import TrainConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

COMMAND = "geometry-subspace-intervention"
Operation = Literal["remove", "keep"]
_OPERATIONS: dict[Operation, Callable[..., Tensor]] = {
    "remove": remove,
    "keep": keep,
}


@dataclass(frozen=True)
class InterventionOptions:
    """What is done where.

    Attributes:
        stage, position_role: where the residual stream is changed.
        subspace: one of `circuit.model.subspaces.SUBSPACES`.
        ranks: each is one intervention; none for `full_residual`.
        operation: `remove` or `keep`.
        query_mode: `single_query` or `batch_union`.
        head: whose subspace, for those of heads.
        splits: of the probe records; None takes all.
        max_records: that many reads, in file order; None takes all.
    """

    stage: str
    subspace: str
    operation: Operation
    position_role: str = "prediction"
    ranks: tuple[int, ...] = ()
    query_mode: QueryMode = "single_query"
    head: str | None = None
    splits: tuple[str, ...] | None = None
    max_records: int | None = None

    @property
    def each_rank(self) -> tuple[int | None, ...]:
        """The ranks, or one None where the subspace takes none."""
        return self.ranks or (None,)


def geometry_subspace_intervention(
    config: TrainConfig,
    probe_set: str | Path,
    checkpoints: Sequence[Path],
    options: InterventionOptions,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReportResult:
    """Write margins and accuracies with and without the intervention, per checkpoint, rank, read.

    `subspace_share` of a row is `|B^T x|² / |x|²`, averaged over the changed positions of the read:
    how much of the vectors lies in the subspace.

    Args:
        checkpoints: ascending by step.
        progress: called with the checkpoints done and their number.

    Raises:
        CircuitError: an option has no meaning for this model or vocabulary; the probe set is of
            another benchmark; a checkpoint is missing, damaged, or of another config or benchmark.
    """
    rows: list[Row] = []
    digests, unchanged = {}, 0.0
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        inputs = open_inputs(config, probe_set, splits=options.splits, checkpoints=checkpoints)
        head = _check(options, inputs)
        batch = inputs.reads(options.max_records)
        for done, point in enumerate(inputs.models(checkpoints), 1):
            clean = _clean(point, inputs, batch, options.stage)
            rows += _point_rows(point, clean, inputs, batch, options, head)
            unchanged = max(unchanged, _unchanged(point, clean, inputs, batch, options))
            digests[str(point.step)] = point.digest
            if progress:
                progress(done, len(checkpoints))
        means = _means(rows)
        return writer.write(
            parameters={
                **asdict(options),
                "probe_set": str(probe_set),
                "checkpoints": [str(path) for path in checkpoints],
            },
            summary={"reads": len(batch.reads), "means": means},
            rows=rows,
            page=_page(options, means),
            figures={"geometry_subspace_intervention": margin_and_accuracy(means, _title(options))},
            provenance={**inputs.provenance(), "parameters_sha256": digests},
            law=f"running on from {options.stage} with nothing changed gives the baseline margins"
            f" to within {unchanged:.1g} logits",
            device=config.device,
        )


def _check(options: InterventionOptions, inputs: Inputs) -> Component | None:
    """Everything that can be wrong before a checkpoint is read; the head."""
    shape, vocabulary = inputs.config.model, inputs.vocabulary
    stage_hook(options.stage, shape.layers)
    check_roles(options.position_role)
    for name, value, valid in (
        ("operation", options.operation, get_args(Operation)),
        ("query mode", options.query_mode, get_args(QueryMode)),
    ):
        if value not in valid:
            raise CircuitError(f"unknown {name} '{value}'", expected=f"one of {', '.join(valid)}")
    head = None
    if options.head is not None:
        head = parse_component(options.head, shape=(shape.layers, shape.heads))
    if len(set(options.ranks)) < len(options.ranks):
        raise CircuitError("a rank is named twice", where="--rank", fix="name each once")
    tokens = (len(vocabulary.key_ids), len(vocabulary.value_ids))
    for rank in options.each_rank:
        check_subspace(
            options.subspace,
            rank,
            head,
            d_model=shape.d_model,
            d_head=shape.d_model // shape.heads,
            tokens=dict(zip(EMBEDDING_SUBSPACES, tokens, strict=True)),
        )
    return head


@dataclass(frozen=True)
class _Clean:
    """One checkpoint without an intervention."""

    states: Float[Tensor, "batch pos d_model"]
    answers: Answers


@no_grad
def _clean(point: Checkpointed, inputs: Inputs, batch: Batch, stage: str) -> _Clean:
    logits, states = read_stages(point.model, batch.tokens, stage)
    at = logits[batch.reads.row, batch.reads.key_pos]
    values = inputs.vocabulary.value_ids
    return _Clean(states[stage], read_answers(at, batch.reads.answer, values))


@no_grad
def _unchanged(
    point: Checkpointed, clean: _Clean, inputs: Inputs, batch: Batch, options: InterventionOptions
) -> float:
    """Largest difference of margins between the clean run and running on with nothing changed.

    Batches of other shapes give other last bits.
    """
    logits = intervene(
        point.model,
        options.stage,
        clean.states,
        batch,
        options.position_role,
        lambda x: x,
        "batch_union",
    )
    found = read_answers(logits, batch.reads.answer, inputs.vocabulary.value_ids)
    return float((found.margin - clean.answers.margin).abs().max())


@no_grad
def _point_rows(
    point: Checkpointed,
    clean: _Clean,
    inputs: Inputs,
    batch: Batch,
    options: InterventionOptions,
    head: Component | None,
) -> Iterator[Row]:
    """The rows of one checkpoint, rank by rank, read by read."""
    reads, vocabulary = batch.reads, inputs.vocabulary
    role, operation = options.position_role, _OPERATIONS[options.operation]
    facts = _read_facts(inputs, batch)
    for rank in options.each_rank:
        basis = subspace_basis(
            point.model,
            options.subspace,
            rank,
            head=head,
            key_tokens=vocabulary.key_ids,
            value_tokens=vocabulary.value_ids,
        )
        logits = intervene(
            point.model,
            options.stage,
            clean.states,
            batch,
            role,
            partial(operation, basis=basis),
            options.query_mode,
        )
        intervened = read_answers(logits, reads.answer, vocabulary.value_ids)
        columns = {
            "positions": role_mask(batch, role).sum(1).tolist(),
            "subspace_share": _share(clean.states, batch, role, basis).tolist(),
            **_columns("baseline", clean.answers, inputs),
            **_columns("intervened", intervened, inputs),
        }
        for i, fact in enumerate(facts):
            own = {name: column[i] for name, column in columns.items()}
            yield {"step": point.step, "rank": rank, **fact, **own}


def _read_facts(inputs: Inputs, batch: Batch) -> list[dict[str, Any]]:
    """What names each read."""
    reads, records, names = batch.reads, inputs.records, inputs.vocabulary.tokens
    columns = zip(
        reads.row.tolist(),
        reads.index.tolist(),
        reads.lag.tolist(),
        reads.is_heldout.tolist(),
        reads.answer.tolist(),
        strict=True,
    )
    return [
        {
            "split": records[row].split,
            "sample_id": batch.sample_ids[row],
            "read_index": index,
            "lag": lag,
            "is_heldout": heldout,
            "answer": names[answer],
        }
        for row, index, lag, heldout, answer in columns
    ]


def _columns(prefix: str, found: Answers, inputs: Inputs) -> dict[str, list[Any]]:
    names = inputs.vocabulary.tokens
    return {
        f"{prefix}_margin": found.margin.tolist(),
        f"{prefix}_answer_correct": found.is_answer.tolist(),
        f"{prefix}_value_correct": found.is_value.tolist(),
        f"{prefix}_competitor": [names[token] for token in found.competitor.tolist()],
    }


def _share(
    clean: Float[Tensor, "batch pos d_model"], batch: Batch, role: str, basis: Basis | None
) -> Float[Tensor, " read"]:
    """Squared norm of the projection over that of the vector, averaged over a read's positions."""
    inside = clean if basis is None else clean @ basis
    share = ((inside**2).sum(-1) / (clean**2).sum(-1))[batch.reads.row]
    mask = role_mask(batch, role)
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


def _means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over reads per step, rank and split, and over `all` where there are several splits."""
    table = pd.DataFrame(rows).rename(columns=_MEANS)
    table["rank"] = table["rank"].fillna(0)
    if table["split"].nunique() > 1:
        table = pd.concat([table, table.assign(split="all")])
    groups = table.groupby(["step", "rank", "split"], sort=False)
    means = groups[list(_MEANS.values())].mean()
    means.insert(0, "reads", groups.size())
    means["margin_drop"] = means["baseline_margin"] - means["intervened_margin"]
    means["answer_accuracy_drop"] = (
        means["baseline_answer_accuracy"] - means["intervened_answer_accuracy"]
    )
    found = means.reset_index().to_dict("records")
    return [
        {str(name): value for name, value in row.items()} | {"rank": int(row["rank"]) or None}
        for row in found
    ]


def _title(options: InterventionOptions) -> str:
    of = f" of {options.head}" if options.head else ""
    return (
        f"{options.operation} {options.subspace}{of} at {options.stage} / {options.position_role}"
    )


def _page(options: InterventionOptions, means: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"{_title(options)}, {options.query_mode}. Margin: logit of the right value minus the best"
        " other value's. Accuracy: the argmax over the whole vocabulary is the answer. Share:"
        " squared norm of the vectors inside the subspace.",
    ]
    if options.subspace in HEAD_SUBSPACES:
        lines.append(
            "The head's singular vectors are used on the raw residual; ln1 is not folded in."
        )
    lines += [
        "",
        "![Margin and accuracy](geometry_subspace_intervention.svg)",
        "",
        "| step | rank | split | reads | margin | after | drop | accuracy | after | share |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    return lines + [
        f"| {m['step']} | {'-' if m['rank'] is None else m['rank']} | {m['split']} | {m['reads']} |"
        f" {m['baseline_margin']:.3f} | {m['intervened_margin']:.3f} | {m['margin_drop']:.3f} |"
        f" {100 * m['baseline_answer_accuracy']:.1f} % |"
        f" {100 * m['intervened_answer_accuracy']:.1f} % | {100 * m['subspace_share']:.1f} % |"
        for m in means
    ]
