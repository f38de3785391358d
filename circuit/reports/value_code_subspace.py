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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.figures.value_code import readability
from circuit.lazy import torch
from circuit.model.codes import Vectors, mean_at, nearest_centroid, nearest_centroid_without
from circuit.model.readout import Answers, lens, read_answers
from circuit.model.stages import read_stages, stage_hook
from circuit.model.subspaces import Basis, check_rank, identity_basis, vector_basis
from circuit.reports.base import ReportResult, open_report
from circuit.reports.inputs import Inputs, open_inputs
from circuit.tasks.groups import check_group, group_tokens, nonempty_mask
from circuit.tasks.positions import Batch
from circuit.train_config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer

COMMAND = "value-code-subspace-report"
READABLE = 0.5
"""Leave-one-out accuracy from which the summary calls a code readable."""


@dataclass(frozen=True)
class SubspaceOptions:
    """Where and how the code is read.

    Attributes:
        splits: of the probe records; None takes all.
        max_records: that many reads, in file order; None takes all.
    """

    stages: tuple[str, ...]
    position_roles: tuple[str, ...] = ("prediction",)
    group_by: tuple[str, ...] = ("answer_value",)
    splits: tuple[str, ...] | None = None
    max_records: int | None = None
    pca_rank: int = 4


def value_code_subspace(
    config: TrainConfig,
    probe_set: str | Path,
    checkpoints: Sequence[Path],
    options: SubspaceOptions,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReportResult:
    """Write the report.

    Args:
        checkpoints: ascending by step.
        progress: called with the checkpoints done and their number.

    Raises:
        CircuitError: an option names what does not exist, a rank is too large, a checkpoint or
            probe set is of another run, or the output folder is not free.
    """
    _check_names(options, config.model.layers)
    rows: list[Row] = []
    digests, worst = {}, 0.0
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        inputs = open_inputs(config, probe_set, splits=options.splits, checkpoints=checkpoints)
        batch = inputs.reads(options.max_records)
        sites = _sites(batch, options, config.model.d_model)
        for done, point in enumerate(inputs.models(checkpoints), start=1):
            with torch.no_grad():
                logits, activations = read_stages(point.model, batch.tokens, *options.stages)
            final = _answers(logits[batch.reads.row, batch.reads.key_pos], batch, inputs)
            for stage in options.stages:
                for site in sites:
                    vectors = mean_at(activations[stage], batch.reads.row, site.mask)
                    seen = _lens_answers(point.model, stage, vectors, batch, inputs)
                    if (stage, site.role) == ("final_norm", "prediction"):
                        gap = (seen.margin - final.margin).abs().max()
                        worst = max(worst, float(gap))
                    place = {"step": point.step, "stage": stage, "position_role": site.role}
                    rows += _rows(place, vectors, site, seen, final, batch, options.pca_rank)
            digests[str(point.step)] = point.digest
            if progress is not None:
                progress(done, len(checkpoints))
        summary = _summary(rows, len(batch.reads), options)
        law = ""
        if "final_norm" in options.stages and "prediction" in options.position_roles:
            law = (
                "the lens at final_norm gives the model's own value margins; they differ by at most"
                f" {worst:.1e}"
            )
        figures = {
            f"value_code_subspace_{group}": readability(rows, group) for group in options.group_by
        }
        return writer.write(
            parameters={
                **asdict(options),
                "probe_set": str(probe_set),
                "checkpoints": [str(path) for path in checkpoints],
            },
            summary=summary,
            rows=rows,
            page=_page(rows, summary, options),
            figures=figures,
            provenance={**inputs.provenance(), "parameters_sha256": digests},
            law=law,
            device=config.device,
        )


@dataclass(frozen=True)
class _Site:
    """One role: its positions, and the reads' groups by each grouping."""

    role: str
    mask: Tensor
    groups: dict[str, Tensor]


def _check_names(options: SubspaceOptions, layers: int) -> None:
    for stage in options.stages:
        stage_hook(stage, layers)
    for option, names in (
        ("--stage", options.stages),
        ("--position-role", options.position_roles),
        ("--group-by", options.group_by),
    ):
        if not names or len(set(names)) < len(names):
            raise CircuitError(
                ", ".join(names) or "nothing", where=option, expected="at least one, each once"
            )
    for role in options.position_roles:
        for group in options.group_by:
            check_group(group, role)


def _sites(batch: Batch, options: SubspaceOptions, width: int) -> list[_Site]:
    """The roles with their groups; refuses a rank that their bases do not have."""
    sites = []
    for role in options.position_roles:
        mask = nonempty_mask(batch, role)
        groups = {name: group_tokens(batch, name, role).cpu() for name in options.group_by}
        for name, tokens in groups.items():
            found = len(set(tokens.tolist()))
            check_rank(
                f"the identity basis by {name} ({found} tokens in {len(tokens)} reads)",
                options.pca_rank,
                min(found - 1, width),
            )
        sites.append(_Site(role, mask, groups))
    return sites


def _answers(logits: Tensor, batch: Batch, inputs: Inputs) -> Answers:
    return read_answers(logits.cpu(), batch.reads.answer.cpu(), inputs.vocabulary.value_ids)


def _lens_answers(
    model: HookedTransformer, stage: str, vectors: Vectors, batch: Batch, inputs: Inputs
) -> Answers:
    with torch.no_grad():
        return _answers(lens(model, stage, vectors.to(model.W_E)), batch, inputs)


def _rows(
    place: dict[str, Any],
    vectors: Vectors,
    site: _Site,
    seen: Answers,
    final: Answers,
    batch: Batch,
    rank: int,
) -> Iterator[Row]:
    """One row for each grouping at one stage and role of one checkpoint."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    mean = vectors.mean(0)
    record, lag, key = (x.cpu() for x in (batch.reads.row, batch.reads.lag, batch.reads.key))
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
        yield {
            **place,
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
            "by_lag": {
                str(value): {
                    "reads": int((lag == value).sum()),
                    "centroid_accuracy": _mean(right[scored & (lag == value)]),
                    "lens_value_accuracy": _mean(seen.is_value[lag == value]),
                    "final_value_accuracy": _mean(final.is_value[lag == value]),
                }
                for value in sorted(set(lag.tolist()))
            },
        }


def _share(unit: Vectors, basis: Basis) -> float:
    """Mean norm of the projections of unit vectors."""
    return float((unit @ basis).norm(dim=1).mean())


def _mean(values: Tensor) -> float | None:
    """The mean; None of nothing."""
    return float(values.double().mean()) if len(values) else None


def _summary(rows: Sequence[Row], reads: int, options: SubspaceOptions) -> dict[str, Any]:
    """Per grouping, role and stage: the first readable step, and the last step's accuracies."""
    readout = []
    for group in options.group_by:
        for role in options.position_roles:
            for stage in options.stages:
                key = (group, role, stage)
                own = [r for r in rows if (r["group_by"], r["position_role"], r["stage"]) == key]
                readout.append(
                    {
                        "group_by": group,
                        "position_role": role,
                        "stage": stage,
                        "readable_from_step": first_to_stay(own, "centroid_accuracy"),
                        "lens_readable_from_step": first_to_stay(own, "lens_value_accuracy"),
                        "last_centroid_accuracy": own[-1]["centroid_accuracy"],
                        "last_centroid_accuracy_key_removed": own[-1][
                            "centroid_accuracy_key_removed"
                        ],
                        "last_lens_value_accuracy": own[-1]["lens_value_accuracy"],
                        "last_identity_projection": own[-1]["identity_projection"],
                    }
                )
    steps = sorted({row["step"] for row in rows})
    return {"reads": reads, "steps": steps, "readable_at_accuracy": READABLE, "readout": readout}


def first_to_stay(rows: Sequence[Row], column: str) -> int | None:
    """The first step from which an accuracy stays at `READABLE` or more."""
    step = None
    for row in reversed(rows):
        if row[column] is None or row[column] < READABLE:
            break
        step = int(row["step"])
    return step


def _page(rows: Sequence[Row], summary: dict[str, Any], options: SubspaceOptions) -> list[str]:
    lines = [
        f"{summary['reads']} reads at {len(summary['steps'])} checkpoints. A code is called"
        f" readable from the first step at which accuracy is {READABLE} and stays so; -: it is not."
        " `centroid`: nearest centroid (cosine) of the other reads; `other records`: without the"
        " read's whole record; `key removed`: after the mean of the reads with the same query key"
        " is subtracted; `lens`: the answer is the stage lens's best value.",
        "",
    ]
    for group in options.group_by:
        lines += [
            f"## By {group}",
            "",
            f"![accuracy over steps](value_code_subspace_{group}.svg)",
            "",
            "| role | stage | centroid readable from | lens readable from |",
            "|---|---|---:|---:|",
        ]
        for entry in summary["readout"]:
            if entry["group_by"] == group:
                steps = (entry["readable_from_step"], entry["lens_readable_from_step"])
                shown = " | ".join("-" if step is None else str(step) for step in steps)
                lines.append(f"| {entry['position_role']} | {entry['stage']} | {shown} |")
        lines += [
            "",
            "| step | role | stage | centroid | other records | key removed | lens | lens margin"
            " | identity basis | all-vector basis | cosine to mean | final accuracy |",
            "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_page_row(row) for row in rows if row["group_by"] == group]
        lines.append("")
    return lines


def _page_row(row: Row) -> str:
    columns = (
        "centroid_accuracy",
        "centroid_accuracy_other_records",
        "centroid_accuracy_key_removed",
        "lens_value_accuracy",
        "lens_value_margin",
        "identity_projection",
        "vector_projection",
        "mean_cosine",
        "final_value_accuracy",
    )
    shown = ["-" if row[name] is None else f"{row[name]:.3f}" for name in columns]
    return f"| {row['step']} | {row['position_role']} | {row['stage']} | {' | '.join(shown)} |"
