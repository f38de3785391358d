"""bilinear-qk-match-separation: which head matches queries to the support's key, and since when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from circuit import options
from circuit.artifacts import Row
from circuit.core.intervals import RecordDraws
from circuit.figures.charts import Chart, at_step, band, chart, heat, lines, of_slices
from circuit.lazy import no_grad, np, torch
from circuit.model.components import all_heads
from circuit.model.readout import read_answers
from circuit.model.subspaces import check_rank, head_factors, svd_of_product
from circuit.reports.inputs import Checkpointed
from circuit.reports.intervals import (
    ENDS,
    apart,
    between,
    ends,
    ends_of,
    how_drawn,
    note,
    said_between,
    shown,
    with_intervals,
)
from circuit.reports.report import Findings, OfCheckpoints, Place, Results
from circuit.reports.tables import Table
from circuit.scalars.base import Cache, SharedBatch, forward_activations
from circuit.scalars.qk_match import QKMatch, ReadMasks, masked_mean, qk_matches
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformer_lens import HookedTransformer


class SeparationOptions(options.ProbeOptions, options.CheckpointOptions):
    """Whose match is measured, and between which positions (definitions.md section 6)."""

    heads: options.Heads = ()
    ranks: Annotated[
        tuple[int, ...], options.Option("Rank beside the whole matrix.", flag="--rank", least=1)
    ] = (8,)
    context_stage: options.ContextStage = None
    layernorm_mode: options.LayernormMode = "head_ln1"
    score_query_role: options.ScoreQueryRole = "prediction"
    support_key_role: options.SupportKeyRole = "support_value"
    distractor_key_role: options.DistractorKeyRole = "value_distractors"
    slice: options.Slice = None
    max_records: options.MaxRecords = None

    def check_model(self, shape: ModelConfig) -> None:
        """Also refuses a rank that heads do not have."""
        super().check_model(shape)
        for rank in self.ranks:
            check_rank(next(iter(self.heads), "L0H0"), rank, shape.d_model // shape.heads)


class MatchSeparation(OfCheckpoints[SeparationOptions]):
    """Which head matches queries to the support, at every checkpoint: finds whom to attribute."""

    command = "bilinear-qk-match-separation"
    Options = SeparationOptions
    title = "Who matches"
    place = 1
    question = "Which head comes to match the query to its support, and when?"

    @classmethod
    def usual(cls, place: Place) -> SeparationOptions:
        rank = min(8, place.model.d_model // place.model.heads)
        return SeparationOptions(**place.read, ranks=(rank,))

    def prepare(self) -> None:
        super().prepare()
        self.batch = self.inputs.reads(self.options.max_records)
        self.reads = ReadMasks.of(
            self.batch,
            query_role=self.options.score_query_role,
            support_role=self.options.support_key_role,
            distractor_role=self.options.distractor_key_role,
        )
        self.scored = self.batch.select(self.reads.chosen)
        self.groups = self.scored.by_slice(self.slice)
        self.draws = {n: RecordDraws(self.scored.row[of]) for n, of in self.groups.items()}
        self.gap, self.largest = 0.0, 0.0

    @no_grad
    def measure(self, point: Checkpointed) -> Iterator[Row]:
        model, reads, options = point.model, self.reads, self.options
        addresses = options.heads or tuple(str(head) for head in all_heads(model))
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
        at = runs["unembed.hook_out"][self.scored.row, self.scored.at]
        margin = read_answers(at, self.scored.answer, self.inputs.task.choices).margin
        cache = Cache({None: runs})
        for scalar in scalars:
            match = _measure(scalar.bind(model).scores(model, cache), reads)
            left, right = head_factors(model, scalar.component, "qk")
            top = float(svd_of_product(left, right)[1][0])
            of_reads = torch.stack([match[name].double() for name in BETWEEN], 1)
            for name, chosen in self.groups.items():
                drawn = self.draws[name].means(of_reads[chosen])
                yield {
                    "step": point.step,
                    "head": str(scalar.component),
                    "score": scalar.name.rsplit(".", 1)[-1],
                    self.slice: name,
                    "reads": int(chosen.sum()),
                    **{key: float(values[chosen].double().mean()) for key, values in match.items()},
                    "answer_margin": float(margin[chosen].double().mean()),
                    "top_singular_value": top,
                    "weights_sha256": point.digest,
                    **ends(dict(zip(BETWEEN, drawn, strict=True))),
                }
        gap, largest = gap_to_attention(model, addresses, reads)
        self.gap, self.largest = max(self.gap, gap), max(self.largest, largest)

    def conclude(self, rows: list[Row]) -> Findings:
        summary = summarize(rows, self.slice) | {
            "reads": len(self.reads),
            "bootstrap": how_drawn(self.draws["all"].records),
        }
        rows, further = apart(self, rows, "step", "head", "score", self.slice)
        law = (
            "the full match with biases is the score of the model's own attention, to"
            f" {self.gap:.1g} of scores up to {self.largest:.3g}, for every head and checkpoint"
        )
        return Findings(rows, summary, law, further)

    @classmethod
    def size(cls, results: Results[SeparationOptions]) -> tuple[float, ...]:
        return len({h["head"] for h in results.summary["heads"]}), len(results.options.checkpoints)

    @classmethod
    def notes(cls, results: Results[SeparationOptions]) -> list[str]:
        winner, grown = results.summary["winner"], results.summary["ranked_by"] == "growth"
        most = f"grew most: by {winner['growth']:+.4g} to" if grown else "is the largest:"
        return [
            f"The separation of **{winner['head']}** ({winner['score']}) {most}"
            f" {winner['separation_at_last']:.4g}"
            f"{said_between(winner, 'separation_at_last', '.4g')}; there the support beats every"
            f" distractor in {100 * winner['support_wins_at_last']:.1f} % of the reads.",
            *note(results),
        ]

    @classmethod
    def tables(cls, results: Results[SeparationOptions]) -> list[Table]:
        summary = results.summary
        heads = [
            {**h, "interval": between(h, "separation_at_last", ".4g")} for h in summary["heads"]
        ]
        ranked = sorted(heads, key=lambda h: (h["score"], -h[summary["ranked_by"]]))
        first = sum(h["score"] == ranked[0]["score"] for h in ranked)
        columns = {
            "head": "head",
            "score": "score",
            "separation_at_first": (f"at {summary['first_step']}", ".4g"),
            "separation_at_last": (f"at {summary['last_step']}", ".4g"),
            "interval": "95 %",
            "growth": ("growth", "+.4g"),
            "support_wins_at_last": ("support wins", ".1%"),
            "correlation_with_margin": ("r with margin", ".2f"),
            "correlation_with_singular_value": ("r with σ1", ".2f"),
        }
        winner = [h for h in ranked if h["score"] == summary["winner"]["score"]]
        others = [h for h in ranked if h["score"] != summary["winner"]["score"]]
        return [Table("QK separation", columns, [*winner, *others], console=first)]

    @classmethod
    def charts(cls, results: Results[SeparationOptions]) -> list[Chart]:
        winner, score = results.summary["winner"]["head"], results.summary["winner"]["score"]
        by, source = results.slice, f"separation_by_{results.slice}"
        columns = (*SHOWN[:3], by, *SHOWN[3:])
        every = [row for row in with_intervals(cls, results) if row["score"] == score]
        rows = shown(every, (*columns, *ends_of(*BETWEEN)))
        data = [row for row in rows if row[by] == "all"]
        apart = [row for row in rows if row["head"] == winner and row[by] != "all"]
        shade = of_slices(by, apart)
        heads = len({row["head"] for row in data})
        return [
            chart(
                "separation",
                f"QK separation ({score}): support minus distractors",
                {"separation": data},
                *heat("separation", "separation", columns, data),
                height=22 * heads,
            ),
            *(
                chart(
                    f"separation_{column}",
                    f"{winner}, by {by}: {words}",
                    {source: apart},
                    band(source, column, words, shade),
                    lines(
                        *(source, column, words, shade, (*columns, *ends_of(column))), domain=domain
                    ),
                    at_step(),
                )
                for column, words, domain in (
                    ("separation", "separation", None),
                    ("support_wins", "support beats every distractor", (0, 1)),
                )
                if apart
            ),
        ]


SHOWN = (
    *("step", "head", "score", "reads", "separation", "support_wins", "support_mean"),
    *("distractor_mean", "answer_margin", "top_singular_value"),
)
"""Columns that charts have, beside that of the slices."""
BETWEEN = ("separation", "support_wins")
"""Columns that have intervals."""


def gap_to_attention(
    model: HookedTransformer, heads: Sequence[str], reads: ReadMasks
) -> tuple[float, float]:
    """Largest |full match with biases - score of the model's attention|, and the largest score.

    Over every read's query and every position that it may look at.
    """
    scalars = [QKMatch(head, reads, layers=model.cfg.n_layers, biases=True) for head in heads]
    shared = SharedBatch.merge(scalars, device=str(model.W_E.device))
    attention = {f"blocks.{s.component.layer}.attn.hook_attn_scores" for s in scalars}
    runs = forward_activations(model, shared.tokens, shared.hooks[None] | attention)
    cache, gaps, sizes = Cache({None: runs}), [], []
    for scalar in scalars:
        attention_scores = runs[f"blocks.{scalar.component.layer}.attn.hook_attn_scores"]
        real = attention_scores[reads.row, scalar.component.head, reads.query]
        seen = torch.arange(real.shape[1], device=real.device) <= reads.query[:, None]
        scores = scalar.bind(model).scores(model, cache)
        gaps.append((scores - real)[seen].abs().max().detach())
        sizes.append(real[seen].abs().max().detach())
    return float(torch.stack(gaps).max()), float(torch.stack(sizes).max())


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


def summarize(rows: Sequence[Row], by: str = "lag") -> dict[str, Any]:
    """Growth of every head's separation over the checkpoints, and the head with the largest.

    The winner is taken on the smallest rank that was asked for, on the whole matrix without one.
    At a single checkpoint nothing has grown: growth is null, and the separation itself decides.
    """
    steps = sorted({row["step"] for row in rows})
    table: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if row[by] == "all":
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
                **{f"separation_at_last{end}": course[-1][f"separation{end}"] for end in ENDS},
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


def _correlation(course: Sequence[Row], one: str, other: str) -> float | None:
    """Pearson correlation over checkpoints; null with fewer than two or without variance."""
    a, b = (np.array([row[name] for row in course]) for name in (one, other))
    if len(course) < 2 or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])
