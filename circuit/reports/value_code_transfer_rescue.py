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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.artifacts import Row, dump_rows
from circuit.errors import CircuitError
from circuit.figures.value_code import rescue
from circuit.lazy import no_grad, torch
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
from circuit.model.stages import read_stages, stage_hook
from circuit.model.subspaces import check_rank
from circuit.reports.base import ReportResult, open_report
from circuit.reports.inputs import Inputs, open_inputs
from circuit.tasks.groups import (
    check_group,
    check_single,
    group_tokens,
    is_for_fitting,
    nonempty_mask,
    single_position,
)
from circuit.tasks.positions import Batch, check_roles
from circuit.train_config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer

COMMAND = "value-code-transfer-rescue"
SCALARS = (
    "correct_value_logit",
    "value_margin",
    "clean_competitor_margin",
    "removed_competitor_margin",
    "negative_answer_loss",
    "value_accuracy",
)
SHOWN = ("negative_answer_loss", "removed_competitor_margin", "value_margin", "value_accuracy")
"""Those that the page and the figure show."""


@dataclass(frozen=True)
class RescueOptions:
    """What is removed, and from what it is put back.

    Attributes:
        splits: of the probe records; None takes all.
        max_records: that many reads, in file order; None takes all.
        batch_size: reads of one forward pass, one a row.
        seed: of the random subspace and the bootstrap.
    """

    source_stage: str
    target_stage: str
    context_stage: str
    source_position_role: str = "support_value"
    target_position_role: str = "prediction"
    context_position_role: str = "prediction"
    context_rank: int = 16
    group_by: str = "answer_value"
    splits: tuple[str, ...] | None = None
    max_records: int | None = None
    batch_size: int = 32
    basis_rank: int = 16
    controls: tuple[str, ...] = CONTROLS
    fit_fraction: float = 0.75
    ridge_lambda: float = 1e-3
    seed: int = 17


@dataclass(frozen=True)
class Reads:
    """The reads, their fixed split, and who stands in for whom.

    Attributes:
        batch: with its rows; `position` and `groups` are of its reads.
        fit, held_out: indices of the fitting and the evaluation reads.
        shuffled: for each evaluation read, the index of the next one with another answer.
    """

    batch: Batch
    position: Tensor
    groups: Tensor
    fit: Tensor
    held_out: Tensor
    shuffled: Tensor

    @classmethod
    def of(cls, batch: Batch, options: RescueOptions) -> Reads:
        """Split the reads of a batch.

        Raises:
            CircuitError: a name does not exist, the target has several positions, a rank is too
                large, or a part has too few reads.
        """
        groups = group_tokens(batch, options.group_by, options.target_position_role).cpu()
        fitting = is_for_fitting(batch, options.fit_fraction).cpu()
        fit, held_out = fitting.nonzero()[:, 0], (~fitting).nonzero()[:, 0]
        most_rank = max(options.basis_rank, options.context_rank)
        tokens = len(set(groups[fit].tolist()))
        for name, rank in (("basis", options.basis_rank), ("context", options.context_rank)):
            check_rank(
                f"the {name} by {options.group_by} ({tokens} tokens in {len(fit)} fitting reads)",
                rank,
                tokens - 1,
            )
        if len(held_out) < most_rank:
            raise CircuitError(
                f"{len(held_out)} evaluation reads",
                where=f"{len(batch.reads)} reads, --fit-fraction {options.fit_fraction}",
                expected=f"at least {most_rank}, as many as ranks",
                fix="take more reads, lower --fit-fraction or lower the ranks",
            )
        position = single_position(batch, options.target_position_role)
        answers = batch.reads.answer.cpu()[held_out]
        return cls(batch, position, groups, fit, held_out, held_out[next_other(answers)])


def value_code_transfer_rescue(
    config: TrainConfig,
    probe_set: str | Path,
    checkpoints: Sequence[Path],
    options: RescueOptions,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReportResult:
    """Write the report; further rows, one a read and condition, in `..._read_rows.jsonl`.

    Args:
        checkpoints: ascending by step.
        progress: called with the checkpoints done and their number.

    Raises:
        CircuitError: an option names what does not exist, a rank is too large, there are too few
            reads, a checkpoint or probe set is of another run, or the folder is not free.
    """
    _check(options, config)
    rows: list[Row] = []
    read_rows: list[Row] = []
    digests, shares = {}, {}
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        inputs = open_inputs(config, probe_set, splits=options.splits, checkpoints=checkpoints)
        reads = Reads.of(inputs.reads(options.max_records), options)
        masks = {role: nonempty_mask(reads.batch, role) for _, role in _sites(options).values()}
        for done, point in enumerate(inputs.models(checkpoints), start=1):
            found = _measure(point.model, reads, masks, options, inputs)
            rows += _rows(point.step, found, reads, options.seed)
            read_rows += _read_rows(point.step, found.values, reads)
            shares[str(point.step)] = found.shares
            digests[str(point.step)] = point.digest
            if progress is not None:
                progress(done, len(checkpoints))
        summary = _summary(rows, reads, shares)
        return writer.write(
            parameters={
                **asdict(options),
                "probe_set": str(probe_set),
                "checkpoints": [str(path) for path in checkpoints],
            },
            summary=summary,
            rows=rows,
            page=_page(summary),
            figures={"value_code_transfer_rescue": rescue(rows, SHOWN, options.controls)},
            further={"value_code_transfer_rescue_read_rows.jsonl": dump_rows(read_rows)},
            provenance={**inputs.provenance(), "parameters_sha256": digests},
            law=_law(rows),
            device=config.device,
        )


def _check(options: RescueOptions, config: TrainConfig) -> None:
    layers, width = config.model.layers, config.model.d_model
    for stage in (options.source_stage, options.target_stage, options.context_stage):
        stage_hook(stage, layers)
    check_single(options.target_position_role)
    check_group(options.group_by, options.target_position_role)
    check_roles(*(role for _, role in _sites(options).values()))
    for name, rank in (("basis", options.basis_rank), ("context", options.context_rank)):
        check_rank(f"the {name}", rank, width)
    for control in options.controls:
        if control not in CONTROLS:
            expected = f"one of {', '.join(CONTROLS)}"
            raise CircuitError(f"unknown control '{control}'", expected=expected)
    if len(set(options.controls)) < len(options.controls):
        raise CircuitError(
            ", ".join(options.controls), where="--control", expected="each control once"
        )
    if not 0 < options.fit_fraction < 1:
        raise CircuitError(
            f"{options.fit_fraction}", where="--fit-fraction", expected="more than 0, less than 1"
        )
    if not options.ridge_lambda > 0:
        raise CircuitError(
            f"{options.ridge_lambda}", where="--ridge-lambda", expected="more than 0"
        )


def _sites(options: RescueOptions) -> dict[str, tuple[str, str]]:
    """Stage and role of everything whose vectors are needed."""
    sites = {
        "source": (options.source_stage, options.source_position_role),
        "target": (options.target_stage, options.target_position_role),
        "context": (options.context_stage, options.context_position_role),
        "wrong_support_value": (options.source_stage, "value_distractors"),
        "key_identity": (options.source_stage, "support_key"),
    }
    return {n: site for n, site in sites.items() if n not in CONTROLS or n in options.controls}


@dataclass(frozen=True)
class _Found:
    """One checkpoint: scalars `[evaluation read, scalar]` and codes written, by condition."""

    values: dict[str, Tensor]
    codes: dict[str, Tensor | None]
    shares: dict[str, float | None]


@no_grad
def _measure(
    model: HookedTransformer,
    reads: Reads,
    masks: Mapping[str, Tensor],
    options: RescueOptions,
    inputs: Inputs,
) -> _Found:
    """Run every condition at one checkpoint."""
    sites, batch = _sites(options), reads.batch
    stages = dict.fromkeys(stage for stage, _ in sites.values())
    _, activations = read_stages(model, batch.tokens, *stages)
    vectors = {
        name: mean_at(activations[stage], batch.reads.row, masks[role])
        for name, (stage, role) in sites.items()
    }
    basis, codes = condition_codes(
        vectors,
        groups=reads.groups,
        fit=reads.fit,
        held_out=reads.held_out,
        shuffled=reads.shuffled,
        controls=options.controls,
        rank=options.basis_rank,
        context_rank=options.context_rank,
        ridge=options.ridge_lambda,
        seed=options.seed,
    )
    clean, at = activations[options.target_stage], batch.reads
    logits: dict[str, list[Tensor]] = {name: [] for name in codes}
    for chunk in torch.split(torch.arange(len(reads.held_out)), options.batch_size):
        chosen = reads.held_out[chunk].to(clean.device)
        states = clean[at.row[chosen], : int(at.key_pos[chosen].max()) + 1]  # later: no effect
        place = (options.target_stage, states, reads.position[chosen], at.key_pos[chosen], basis)
        for name, code in codes.items():
            written = None if code is None else code[chunk]
            logits[name].append(logits_with_code(model, *place, written).cpu())
    answer = batch.reads.answer.cpu()[reads.held_out]
    whole = {name: torch.cat(parts) for name, parts in logits.items()}
    answers = {n: read_answers(x, answer, inputs.vocabulary.value_ids) for n, x in whole.items()}
    rivals = [answers[name].competitor[:, None] for name in ("clean", "removed")]
    values = {name: _scalars(whole[name], answers[name], rivals) for name in codes}
    share, key = removed_share(vectors["target"], basis, batch.reads.key.cpu())
    return _Found(values, codes, {"norm_share": share, "query_key_share": key})


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


def _rows(
    step: int,
    found: _Found,
    reads: Reads,
    seed: int,
) -> list[Row]:
    """One row a condition: means of the scalars and rescues (1 for clean, 0 for removed)."""
    records = reads.batch.reads.row.cpu()[reads.held_out]
    rows: list[Row] = []
    for name, values in found.values.items():
        row: dict[str, Any] = {
            "step": step,
            "condition": name,
            "reads": len(values),
            "code_r2": explained(found.codes[name], found.codes["oracle"]),
            **dict(zip(SCALARS, values.mean(0).tolist(), strict=True)),
        }
        fractions = rescue_fractions(found.values, records, name, seed)
        for scalar, (value, low, high) in zip(SCALARS, fractions, strict=True):
            row |= {f"rescue_{scalar}": value}
            row |= {f"rescue_{scalar}_low": low, f"rescue_{scalar}_high": high}
        rows.append(row)
    return rows


def _read_rows(step: int, values: Mapping[str, Tensor], reads: Reads) -> list[Row]:
    """One row a condition and evaluation read."""
    batch = reads.batch
    index = batch.reads.select(reads.held_out.to(batch.tokens.device))
    places = [
        {
            "sample_id": batch.sample_ids[row],
            "read_index": number,
            "lag": lag,
            "answer": answer,
        }
        for row, number, lag, answer in zip(
            *(part.tolist() for part in (index.row, index.index, index.lag, index.answer)),
            strict=True,
        )
    ]
    return [
        {"step": step, "condition": name, **place, **dict(zip(SCALARS, scalars, strict=True))}
        for name, found in values.items()
        for place, scalars in zip(places, found.tolist(), strict=True)
    ]


def _summary(rows: Sequence[Row], reads: Reads, shares: Mapping[str, Any]) -> dict[str, Any]:
    known = torch.isin(reads.groups[reads.held_out], reads.groups[reads.fit])
    return {
        "fitting_reads": len(reads.fit),
        "evaluation_reads": len(reads.held_out),
        "evaluation_tokens_seen_in_fitting": float(known.double().mean()),
        "steps": sorted({row["step"] for row in rows}),
        "removed_from_target": dict(shares),
        "lost_by_removal": {scalar: _lost(rows, scalar) for scalar in SHOWN},
        "rescue": {scalar: _by_condition(rows, f"rescue_{scalar}") for scalar in SHOWN},
        "value_accuracy": _by_condition(rows, "value_accuracy"),
        "code_r2": _by_condition(rows, "code_r2"),
    }


def _lost(rows: Sequence[Row], scalar: str) -> dict[str, float]:
    """Clean minus removed by step: the denominator of the rescue fractions."""
    of = {(row["step"], row["condition"]): row[scalar] for row in rows}
    steps = dict.fromkeys(step for step, _ in of)
    return {str(step): of[step, "clean"] - of[step, "removed"] for step in steps}


def _by_condition(rows: Sequence[Row], column: str) -> dict[str, dict[str, float | None]]:
    """A column by condition and step."""
    found: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if not (column.startswith("rescue") and row["condition"] in ("clean", "removed")):
            found.setdefault(row["condition"], {})[str(row["step"])] = row[column]
    return found


def _law(rows: Sequence[Row]) -> str:
    columns = [f"rescue_{scalar}" for scalar in SCALARS]
    oracle = [row[name] for row in rows if row["condition"] == "oracle" for name in columns]
    known = [value for value in oracle if value is not None]
    if not known:
        return "removal changes nothing at any checkpoint, so that there is nothing to rescue"
    worst = max(abs(value - 1) for value in known)
    return (
        "the oracle, the read's own code put back, rescues everything: its fraction differs from 1"
        f" by at most {worst:.1e}"
    )


def _page(summary: Mapping[str, Any]) -> list[str]:
    steps = [str(step) for step in summary["steps"]]
    lines = [
        f"{summary['fitting_reads']} reads for fitting, {summary['evaluation_reads']} for"
        f" evaluation; {100 * summary['evaluation_tokens_seen_in_fitting']:.0f} % of the latter"
        " have a token that the fitting part holds. Fractions are of means over the evaluation"
        " reads; -: there is none. Where removal loses nothing (first line not above 0) a fraction"
        " means nothing. Whiskers, `_low` and `_high`: bootstrap over whole records.",
        "",
        "![rescue fractions by step](value_code_transfer_rescue.svg)",
    ]
    removed = summary["removed_from_target"]
    titles = {
        "norm_share": "share of the target's squared norm",
        "query_key_share": "share of the directions that tell query keys apart",
    }
    of = {title: {s: removed[s][name] for s in steps} for name, title in titles.items()}
    lines += _table("What is removed", of, steps)
    for scalar in SHOWN:
        lines += _table(
            f"Rescue fraction of {scalar}",
            {"*lost by removal*": summary["lost_by_removal"][scalar], **summary["rescue"][scalar]},
            steps,
        )
    lines += _table("Value accuracy", summary["value_accuracy"], steps)
    title = "R² of the code that is written, over the evaluation reads"
    return lines + _table(title, summary["code_r2"], steps)


def _table(
    title: str, values: Mapping[str, Mapping[str, float | None]], steps: Sequence[str]
) -> list[str]:
    lines = ["", f"## {title}", "", f"| condition | {' | '.join(steps)} |"]
    lines.append(f"|---|{'---:|' * len(steps)}")
    for name, of in values.items():
        cells = ["-" if of[step] is None else f"{of[step]:.3f}" for step in steps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
