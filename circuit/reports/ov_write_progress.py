"""ov-write-progress-report: when does each head match, when does it write, and what follows it.

1. `head_progress` measures every head on every pair at each checkpoint, in one forward pass.
2. Means over pairs by checkpoint, and their deltas by interval between neighbouring checkpoints.
3. Pearson correlation, over the intervals, of each head's every delta with that of every answer
   scalar. Among so many some are large by chance: the report says how large.

Further row files: `ov_write_progress_means.jsonl`, `..._deltas.jsonl`, `..._correlations.jsonl`.
Columns are those of `circuit.scalars.head_progress`. A number that is not finite, as in a run that
diverged, is null.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.artifacts import Row, dump_rows
from circuit.errors import CircuitError
from circuit.figures.progress import heads_over_steps
from circuit.lazy import np, torch
from circuit.model.components import Component, parse_component
from circuit.model.readout import read_answers
from circuit.reports.base import ReportResult, open_report
from circuit.reports.correlation import CHANCE, chance_level, pearson
from circuit.reports.inputs import Checkpointed, Inputs, PairOptions, open_inputs
from circuit.scalars.answers import ANSWER_SCALARS, Competitors, answer_scalars
from circuit.scalars.head_progress import COLUMNS, REDUNDANT, ScoredReads, head_progress
from circuit.tasks.groups import check_single
from circuit.tasks.pairs import Pair, check_side
from circuit.tasks.positions import check_roles
from circuit.train_config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

COMMAND = "ov-write-progress-report"
NAME = "ov_write_progress"
OUTPUTS = ANSWER_SCALARS[:5]
"""Answer scalars whose deltas are correlated with: margins, the answer's logit, the loss."""
AT_STEP = OUTPUTS[:3]
"""Those that one checkpoint alone defines."""
SHOWN = (
    "qk_separation",
    "attention_support",
    "attention_distractors",
    "ov_map_value_margin",
    "head_value_margin_dla",
    "head_answer_logit_dla",
    "head_margin_dla",
    "swapped_value.head_margin_dla",
)
"""Columns of the page's table."""


@dataclass(frozen=True)
class ProgressOptions:
    """What is measured.

    Attributes:
        heads: addresses; none means all.
        score_query_role: whose scores are separated; attention and outputs are always those of the
            prediction position.
        support_key_role, distractor_key_role: the positions that are compared.
        record_side: side of the pairs.
        splits: of the probe records; None takes all.
        top_k_correlations: listed in the summary, by |r|.
    """

    heads: tuple[str, ...] = ()
    score_query_role: str = "prediction"
    support_key_role: str = "support_value"
    distractor_key_role: str = "value_distractors"
    record_side: str = "clean"
    pairs: PairOptions = field(default_factory=PairOptions)
    splits: tuple[str, ...] | None = None
    top_k_correlations: int = 32

    def __post_init__(self) -> None:
        check_single(self.score_query_role)
        check_roles(self.support_key_role, self.distractor_key_role)
        check_side(self.record_side)


@dataclass(frozen=True)
class Measured:
    """All figures; checkpoints ascend by step.

    Attributes:
        columns: of `COLUMNS`.
        logits: at the prediction positions.
        dla_residual: the largest of `head_progress`.
    """

    steps: list[int]
    heads: list[str]
    columns: NDArray[np.float64]  # [checkpoint, column, head, read]
    logits: Float[Tensor, "checkpoint read vocab"]
    answers: NDArray[np.float64]  # [checkpoint, AT_STEP, read]
    outputs: NDArray[np.float64]  # deltas [interval, OUTPUTS, read]
    dla_residual: float
    digests: list[str]

    @property
    def means(self) -> NDArray[np.float64]:
        """Means over pairs, `[checkpoint, column, head]`."""
        return np.asarray(self.columns.mean(-1))


def ov_write_progress(
    config: TrainConfig,
    probe_set: str | Path,
    checkpoints: Sequence[Path],
    output_dir: str | Path,
    options: ProgressOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReportResult:
    """Measure heads at each checkpoint and write the report.

    Args:
        checkpoints: files, each of another step, in any order.
        progress: called with the number of checkpoints done and of all.

    Raises:
        CircuitError: a head, role, side, type or split does not exist, there are too few pairs, or
            a checkpoint is damaged, of another config or benchmark, or of a step named before.
    """
    options = options or ProgressOptions()
    heads = _heads(options.heads, config.model)
    with open_report(COMMAND, output_dir, overwrite=overwrite) as report:
        inputs = open_inputs(config, probe_set, splits=options.splits, checkpoints=checkpoints)
        pairs = inputs.pairs(options.pairs)
        reads = ScoredReads.of(
            inputs.side(pairs, options.record_side),
            query_role=options.score_query_role,
            support_role=options.support_key_role,
            distractor_role=options.distractor_key_role,
        )
        measured = _measure(inputs, checkpoints, reads, heads, progress)
        correlations = list(_correlation_rows(measured))
        lags = Counter(reads.batch.reads.lag.tolist())
        summary = {
            "pairs": len(pairs),
            "pairs_by_lag": {str(lag): lags[lag] for lag in sorted(lags)},
            **_summary(measured, correlations, options.top_k_correlations),
        }
        means = list(_mean_rows(measured))
        law = (
            "the direct contributions of all components sum to the logits to"
            f" {measured.dla_residual:.1e} of the largest logit, at {len(checkpoints)} checkpoints"
        )
        return report.write(
            parameters={
                **asdict(options),
                "heads": measured.heads,
                "probe_set": str(probe_set),
                "checkpoints": [str(path) for path in checkpoints],
                "config": config.model_dump(mode="json"),
            },
            summary=summary,
            rows=_pair_rows(measured, pairs, reads),
            further={
                f"{NAME}_means.jsonl": dump_rows(means),
                f"{NAME}_deltas.jsonl": dump_rows(_delta_rows(measured)),
                f"{NAME}_correlations.jsonl": dump_rows(correlations),
            },
            page=_page(summary),
            figures={NAME: heads_over_steps(means)},
            provenance={
                **inputs.provenance(),
                "parameters_sha256": dict(
                    zip(map(str, measured.steps), measured.digests, strict=True)
                ),
            },
            law=law,
            device=config.device,
        )


def _heads(names: Sequence[str], shape: ModelConfig) -> list[Component]:
    """The heads that were asked for, or all; refuses what the model does not have."""
    if not names:
        return [Component(layer, h) for layer in range(shape.layers) for h in range(shape.heads)]
    heads = [parse_component(name) for name in names]
    for head in heads:
        if head.head is None or head.layer >= shape.layers or head.head >= shape.heads:
            raise CircuitError(
                f"the model has no head '{head}'",
                expected=f"layers 0-{shape.layers - 1}, heads 0-{shape.heads - 1}, such as L0H0",
            )
    if len(set(heads)) < len(heads):
        raise CircuitError("a head is named twice", fix="name each once")
    return heads


def _measure(
    inputs: Inputs,
    checkpoints: Sequence[Path],
    reads: ScoredReads,
    heads: list[Component],
    progress: Callable[[int, int], None] | None,
) -> Measured:
    values, answer = inputs.vocabulary.value_ids, reads.batch.reads.answer.cpu()
    points: list[Checkpointed] = []
    columns, logits, residuals = [], [], []
    for point in inputs.models(checkpoints, finite=False):
        found = head_progress(point.model, reads, heads, values)
        points.append(point)
        columns.append(torch.stack([found.columns[name].T for name in COLUMNS]).cpu().double())
        logits.append(found.logits.cpu().double())
        residuals.append(found.dla_residual)
        if progress is not None:
            progress(len(points), len(checkpoints))
    ordered = torch.stack(logits)
    found_answers = [read_answers(at, answer, values) for at in ordered]
    at_step, outputs = [], []
    for at, own in zip(ordered, found_answers, strict=True):
        scalars = answer_scalars(at, answer, Competitors(own.competitor, own.competitor), values)
        at_step.append(torch.stack([scalars[name] for name in AT_STEP]))
    for i, (one, two) in enumerate(pairwise(found_answers)):
        ends = Competitors(one.competitor, two.competitor)
        before, after = (answer_scalars(ordered[j], answer, ends, values) for j in (i, i + 1))
        outputs.append(torch.stack([after[name] - before[name] for name in OUTPUTS]))
    return Measured(
        steps=[point.step for point in points],
        heads=[str(head) for head in heads],
        columns=torch.stack(columns).numpy(),
        logits=ordered,
        answers=torch.stack(at_step).numpy(),
        outputs=np.array([each.numpy() for each in outputs]).reshape(-1, len(OUTPUTS), len(answer)),
        dla_residual=max(residuals),
        digests=[point.digest for point in points],
    )


def _pair_rows(measured: Measured, pairs: Sequence[Pair], reads: ScoredReads) -> Iterator[Row]:
    lags = reads.batch.reads.lag.tolist()
    for i, step in enumerate(measured.steps):
        answers = measured.answers[i].T.tolist()  # [read][scalar]
        for h, head in enumerate(measured.heads):
            found = measured.columns[i, :, h].T.tolist()  # [read][column]
            for r, pair in enumerate(pairs):
                yield {
                    "step": step,
                    "head": head,
                    "pair_id": pair.pair_id,
                    "lag": lags[r],
                    **_nested(COLUMNS, found[r]),
                    **_nested(AT_STEP, answers[r]),
                }


def _mean_rows(measured: Measured) -> Iterator[Row]:
    answers = measured.answers.mean(-1).tolist()
    for i, step in enumerate(measured.steps):
        for head, values in zip(measured.heads, measured.means[i].T.tolist(), strict=True):
            own = _nested(COLUMNS, values) | _nested(AT_STEP, answers[i])
            yield {"step": step, "head": head, "pairs": measured.columns.shape[-1], **own}


def _delta_rows(measured: Measured) -> Iterator[Row]:
    deltas, outputs = np.diff(measured.means, axis=0), measured.outputs.mean(-1).tolist()
    for i, (source, target) in enumerate(pairwise(measured.steps)):
        for head, values in zip(measured.heads, deltas[i].T.tolist(), strict=True):
            own = _nested(COLUMNS, values) | _nested(OUTPUTS, outputs[i])
            yield {"source_step": source, "target_step": target, "head": head, **own}


def _correlation_rows(measured: Measured) -> Iterator[Row]:
    deltas = np.diff(measured.means, axis=0)
    found = pearson(deltas, measured.outputs.mean(-1))  # [column, head, output]
    for h, head in enumerate(measured.heads):
        for c, column in enumerate(COLUMNS):
            for o, output in enumerate(OUTPUTS):
                own = {"write": column, "output": output, "intervals": len(deltas)}
                yield {"head": head, **own, "pearson": _finite(float(found[c, h, o]))}


def _summary(measured: Measured, correlations: Sequence[Row], top_k: int) -> dict[str, Any]:
    real = [row for row in correlations if row["write"] not in REDUNDANT]
    real = [row for row in real if row["pearson"] is not None]
    ranked = sorted(real, key=lambda row: -abs(row["pearson"]))  # stable: then by head, write
    intervals = len(measured.steps) - 1
    return {
        "steps": measured.steps,
        "intervals": intervals,
        "match_winner": _winner(measured, "qk_separation"),
        "write_winner": _winner(measured, "head_value_margin_dla"),
        "last_step": {
            head: {
                name: _finite(float(measured.means[-1, COLUMNS.index(name), h])) for name in SHOWN
            }
            for h, head in enumerate(measured.heads)
        },
        "answers": {
            name: {"first_step": _finite(first), "last_step": _finite(last)}
            for name, first, last in zip(
                AT_STEP, *measured.answers[[0, -1]].mean(-1).tolist(), strict=True
            )
        },
        "correlations": len(real),
        "chance_level": chance_level(len(real), intervals),
        "top_correlations": ranked[:top_k],
        "largest_dla_residual": _finite(measured.dla_residual),
    }


def _winner(measured: Measured, column: str) -> dict[str, Any] | None:
    """The head with the largest mean at the last step, and where it was half way there."""
    course = measured.means[:, COLUMNS.index(column)]  # [checkpoint, head]
    if not np.isfinite(course).all():
        return None
    head = int(course[-1].argmax())
    first, last = course[0, head], course[-1, head]
    half = next(
        (
            step
            for step, now in zip(measured.steps, course[:, head], strict=True)
            if last > first and now >= (first + last) / 2
        ),
        None,
    )
    return {
        "head": measured.heads[head],
        "column": column,
        "first_step": float(first),
        "last_step": float(last),
        "half_way_step": half,
    }


def _page(summary: dict[str, Any]) -> list[str]:
    steps = summary["steps"]
    lags = ", ".join(f"{count} of lag {lag}" for lag, count in summary["pairs_by_lag"].items())
    lines = [
        f"{summary['pairs']} pairs ({lags}), {len(steps)} checkpoints from step {steps[0]} to"
        f" {steps[-1]}. Means over pairs of one lag cannot tell a lookup from a position.",
        "",
        f"![QK separation, attention and OV progress per head]({NAME}.svg)",
        "",
    ]
    for what, name in (("matches", "match_winner"), ("writes", "write_winner")):
        winner = summary[name]
        if winner is None:
            lines.append(f"- No head {what}: some means are not finite.")
            continue
        half = winner["half_way_step"]
        course = f"half way at step {half}" if half is not None else "it has not risen"
        lines.append(
            f"- **{winner['head']} {what} best** at step {steps[-1]}: `{winner['column']}`"
            f" {winner['first_step']:.2f} -> {winner['last_step']:.2f}, {course}."
        )
    lines += ["", f"Means over pairs at step {steps[-1]}:", ""]
    lines += ["| head | " + " | ".join(f"`{name}`" for name in SHOWN) + " |"]
    lines += ["|---|" + "---:|" * len(SHOWN)]
    for head, values in summary["last_step"].items():
        cells = " | ".join("-" if v is None else f"{v:.3f}" for v in values.values())
        lines.append(f"| {head} | {cells} |")
    chance = summary["chance_level"]
    lines += [
        "",
        f"Deltas over {summary['intervals']} intervals, {summary['correlations']} correlations."
        + (
            f" By chance alone one of them would exceed |r| = {chance:.2f} with probability"
            f" {CHANCE} at most, if the intervals were independent; both ends of a correlation"
            " are parts of one training run, so that even a large one is no cause."
            if chance is not None
            else ""
        ),
        "",
        "| head | write | answer scalar | r |",
        "|---|---|---|---:|",
    ]
    lines += [
        f"| {row['head']} | `{row['write']}` | `{row['output']}` | {row['pearson']:.3f} |"
        for row in summary["top_correlations"]
    ]
    return lines


def _nested(names: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """Columns with a dot become an object of their condition."""
    nested: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        condition, _, column = name.rpartition(".")
        place = nested.setdefault(condition, {}) if condition else nested
        place[column] = _finite(value)
    return nested


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
