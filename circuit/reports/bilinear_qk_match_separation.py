"""bilinear-qk-match-separation: which head matches queries to the support's key, and since when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.errors import CircuitError
from circuit.figures.separation import separation_over_steps
from circuit.lazy import no_grad, np, torch
from circuit.model.components import all_heads, parse_component
from circuit.model.readout import read_answers
from circuit.model.stages import stage_hook
from circuit.model.subspaces import check_rank, head_factors, svd_of_product
from circuit.reports.base import ReportResult, open_report
from circuit.reports.inputs import Checkpointed, Inputs, choose_checkpoints, open_inputs
from circuit.scalars.base import Cache, SharedBatch, forward_activations
from circuit.scalars.qk_match import (
    LayerNormMode,
    ReadMasks,
    check_layernorm_mode,
    masked_mean,
    qk_matches,
)
from circuit.tasks.groups import check_single
from circuit.tasks.positions import check_roles
from circuit.train_config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

COMMAND = "bilinear-qk-match-separation"


@dataclass(frozen=True)
class SeparationOptions:
    """Whose match is measured, and between which positions (definitions.md section 6).

    Attributes:
        heads: addresses; empty takes every head of the model.
        ranks: of the basis, beside the whole matrix.
        context_stage: where `x` is read; None is the stage that each head reads.
        layernorm_mode: `head_ln1` or `none`.
        query_role, support_role, distractor_role: positions that are scored and compared.
        splits: of the probe records; None takes all.
        max_records: that many reads, in file order.
    """

    heads: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (8,)
    context_stage: str | None = None
    layernorm_mode: LayerNormMode = "head_ln1"
    query_role: str = "prediction"
    support_role: str = "support_value"
    distractor_role: str = "value_distractors"
    splits: tuple[str, ...] | None = None
    max_records: int | None = None

    def __post_init__(self) -> None:
        for name, given in (("heads", self.heads), ("ranks", self.ranks)):
            if len(set(given)) < len(given):
                raise CircuitError(f"{name} {', '.join(map(str, given))}", expected="each once")
        check_layernorm_mode(self.layernorm_mode)
        check_single(self.query_role)
        check_roles(self.support_role, self.distractor_role)

    def check(self, model: ModelConfig) -> None:
        """Refuse what a model of this shape does not have.

        Raises:
            CircuitError: names the head, stage or rank.
        """
        for head in self.heads:
            parse_component(head, shape=(model.layers, model.heads), kind="head")
        for rank in self.ranks:
            check_rank(next(iter(self.heads), "L0H0"), rank, model.d_model // model.heads)
        if self.context_stage is not None:
            stage_hook(self.context_stage, model.layers)


def bilinear_qk_match_separation(
    config: TrainConfig,
    probe_set: Path,
    output_dir: str | Path,
    options: SeparationOptions,
    *,
    checkpoints: Sequence[Path] | None = None,
    checkpoint_dir: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReportResult:
    """Measure the QK match of heads at checkpoints over all reads of a probe set.

    Args:
        progress: called with the checkpoints done and their number.

    Raises:
        CircuitError: bad options, or a checkpoint or probe set that does not belong to the config.
    """
    options.check(config.model)
    chosen = choose_checkpoints(checkpoints, checkpoint_dir)
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        inputs = open_inputs(config, probe_set, splits=options.splits, checkpoints=chosen)
        batch = inputs.reads(options.max_records)
        reads = ReadMasks.of(
            batch,
            query_role=options.query_role,
            support_role=options.support_role,
            distractor_role=options.distractor_role,
        )
        rows: list[dict[str, Any]] = []
        for done, point in enumerate(inputs.models(chosen), start=1):
            rows += _rows(point, inputs, options, reads)
            if progress is not None:
                progress(done, len(chosen))
        summary = summarize(rows)
        return writer.write(
            parameters={
                "probe_set": str(probe_set),
                "checkpoints": [str(path) for path in chosen],
                **asdict(options),
            },
            summary=summary,
            rows=rows,
            page=_page(summary, len(reads)),
            figures={"separation": separation_over_steps(rows, summary["winner"]["score"])},
            provenance=inputs.provenance(),
        )


@no_grad
def _rows(
    point: Checkpointed, inputs: Inputs, options: SeparationOptions, reads: ReadMasks
) -> Iterator[dict[str, Any]]:
    model = point.model
    addresses = options.heads or tuple(str(head) for head in all_heads(model))
    for address in addresses:
        parse_component(address, model)
    scalars = qk_matches(
        addresses,
        reads,
        layers=model.cfg.n_layers,
        ranks=[None, *options.ranks],
        layernorm_mode=options.layernorm_mode,
        context_stage=options.context_stage,
    )
    shared = SharedBatch.merge(scalars, device=str(model.W_E.device))
    hooks = shared.hooks[None] | {"unembed.hook_out"}
    runs = forward_activations(model, shared.tokens, hooks)
    batch = inputs.reads(options.max_records)
    at = runs["unembed.hook_out"][batch.reads.row, batch.reads.key_pos][reads.chosen]
    lag = batch.reads.lag[reads.chosen]
    margin = read_answers(at, batch.reads.answer[reads.chosen], inputs.vocabulary.value_ids).margin
    groups = {"all": torch.ones_like(lag, dtype=torch.bool)}
    groups |= {str(n): lag == n for n in torch.unique(lag).tolist()}
    cache = Cache({None: runs})
    for scalar in scalars:
        found = _measure(scalar.bind(model).scores(model, cache), reads)
        left, right = head_factors(model, scalar.component, "qk")
        top = float(svd_of_product(left, right)[1][0])
        for name, chosen in groups.items():
            yield {
                "step": point.step,
                "head": str(scalar.component),
                "score": scalar.name.rsplit(".", 1)[-1],
                "lag": name,
                "reads": int(chosen.sum()),
                **{key: float(values[chosen].double().mean()) for key, values in found.items()},
                "answer_margin": float(margin[chosen].double().mean()),
                "top_singular_value": top,
                "weights_sha256": point.digest,
            }


def _measure(scores: Float[Tensor, "read pos"], reads: ReadMasks) -> dict[str, Tensor]:
    """Means over support and distractors, and whether the support beats every distractor."""
    width = scores.shape[1]
    support, distractors = reads.support[:, :width], reads.distractors[:, :width]
    worst = scores.masked_fill(~distractors, -torch.inf).amax(1)
    best = scores.masked_fill(~support, -torch.inf).amax(1)
    near, far = masked_mean(scores, support), masked_mean(scores, distractors)
    return {
        "support_mean": near,
        "distractor_mean": far,
        "separation": near - far,
        "support_wins": best > worst,
    }


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Growth of every head's separation over the checkpoints, and the head with the largest.

    The winner is taken on the smallest rank that was asked for, on the whole matrix without one.
    At a single checkpoint nothing has grown: growth is null, and the separation itself decides.
    """
    steps = sorted({row["step"] for row in rows})
    table: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["lag"] == "all":
            table.setdefault((row["head"], row["score"]), {})[row["step"]] = row
    heads = []
    for (head, score), by_step in table.items():
        course = [by_step[step] for step in steps]
        heads.append(
            {
                "head": head,
                "score": score,
                "separation_at_first": course[0]["separation"],
                "separation_at_last": course[-1]["separation"],
                "growth": (
                    course[-1]["separation"] - course[0]["separation"] if len(steps) > 1 else None
                ),
                "support_wins_at_last": course[-1]["support_wins"],
                "correlation_with_margin": _correlation(course, "separation", "answer_margin"),
                "correlation_with_singular_value": _correlation(
                    course, "separation", "top_singular_value"
                ),
            }
        )
    ranks = sorted((s["score"] for s in heads if s["score"].startswith("rank")), key=_rank)
    score = ranks[0] if ranks else "full"
    by = "growth" if len(steps) > 1 else "separation_at_last"
    winner = max((h for h in heads if h["score"] == score), key=lambda h: h[by])
    return {
        "first_step": steps[0],
        "last_step": steps[-1],
        "ranked_by": by,
        "winner": winner,
        "heads": heads,
    }


def _rank(score: str) -> int:
    return int(score.removeprefix("rank"))


def _correlation(course: Sequence[dict[str, Any]], one: str, other: str) -> float | None:
    """Pearson correlation over checkpoints; null with fewer than two or without variance."""
    a, b = (np.array([row[name] for row in course]) for name in (one, other))
    if len(course) < 2 or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _page(summary: dict[str, Any], reads: int) -> list[str]:
    winner, by = summary["winner"], summary["ranked_by"]
    grown = by == "growth"
    steps = f"steps {summary['first_step']} to" if grown else "step"
    most = f"grew most: by {winner['growth']:+.4g} to" if grown else "is the largest:"
    lines = [
        f"{reads} reads, {steps} {summary['last_step']}. The separation of"
        f" **{winner['head']}** ({winner['score']}) {most}"
        f" {winner['separation_at_last']:.4g}; there the support beats every distractor in"
        f" {100 * winner['support_wins_at_last']:.1f} % of the reads.",
        "",
        "![separation](separation.svg)",
        "",
        "| head | score | first | last | growth | support wins at last | corr. with margin |"
        " corr. with top singular value |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for h in sorted(summary["heads"], key=lambda h: (h["score"], -h[by])):
        correlations = " | ".join(
            "-" if h[name] is None else f"{h[name]:.2f}"
            for name in ("correlation_with_margin", "correlation_with_singular_value")
        )
        growth = f"{h['growth']:+.4g}" if grown else "-"
        lines.append(
            f"| {h['head']} | {h['score']} | {h['separation_at_first']:.4g}"
            f" | {h['separation_at_last']:.4g} | {growth}"
            f" | {100 * h['support_wins_at_last']:.1f} % | {correlations} |"
        )
    return lines
