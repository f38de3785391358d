"""induction-progress-report: the parts of an induction circuit, and in which order they form.

At every checkpoint, for every head: prefix matching and previous-token attention; for every head
and head of a later layer: K-composition (circuit/scalars/induction.py); and the loss by position.
The *in-context score* is the mean loss of the predicted tokens at positions `T/2` (rounded down)
and behind minus that of those before, `T` being the length of the longest record: of induction the
second string, its first token included, against the first string. It is null where either half
predicts nothing.

A measure's *half step* is the first checkpoint from which on it stays past the middle between its
values at the first and the last checkpoint; null where it did not go the way it should (the loss
and the score down, all others up). Of heads and pairs it is that of the best at the last one.

`..._intervals.jsonl` has, line for line, the ends of both attentions by bootstrap of records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit import options
from circuit.artifacts import Row
from circuit.core.intervals import RecordDraws
from circuit.figures.charts import Chart, at_step, band, chart, colour, heat, lines
from circuit.lazy import no_grad, torch
from circuit.model.components import all_heads, parse_component
from circuit.model.readout import LOGITS
from circuit.model.subspaces import head_factors
from circuit.reports.inputs import Checkpointed
from circuit.reports.intervals import (
    apart,
    behind_numbers,
    cells_between,
    ends,
    ends_of,
    how_drawn,
    note,
    said_between,
    shown,
    with_intervals,
)
from circuit.reports.report import Findings, OfCheckpoints, Results
from circuit.reports.tables import Table
from circuit.scalars.base import Cache, SharedBatch, forward_activations
from circuit.scalars.induction import (
    COMPOSITION,
    PREFIX,
    PREVIOUS,
    KComposition,
    composed_pairs,
    prefix_matching,
    previous_token_attention,
)
from circuit.strict_json import refuse_not_finite
from circuit.tasks.examples import UNPREDICTED

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformer_lens import HookedTransformer

PAIR_ROWS = "induction_progress_pair_rows.jsonl"
POSITION_ROWS = "induction_progress_position_rows.jsonl"
ANSWER_LOSS, SCORE = "answer_loss", "in_context_score"
WORDS = {
    ANSWER_LOSS: "loss of the answers",
    SCORE: "in-context score",
    PREFIX: "prefix matching",
    PREVIOUS: "previous-token attention",
    COMPOSITION: "K-composition",
}
"""Every measure, and what readers are told of it."""
ATTENTIONS = (PREFIX, PREVIOUS)
"""Measures of a head."""
DRAWN = 8
"""Heads that have a line of their own."""


class InductionOptions(options.ProbeOptions, options.CheckpointOptions):
    """Whose attention is measured, and between which positions (definitions.md section 8)."""

    heads: options.Heads = ()
    score_query_role: options.ScoreQueryRole = "prediction"
    support_key_role: options.SupportKeyRole = "support_value"
    max_records: options.MaxRecords = None


class InductionProgress(OfCheckpoints[InductionOptions]):
    """How an induction circuit forms: who matches, who looks one back, who reads whom, and when."""

    command = "induction-progress-report"
    Options = InductionOptions
    title = "How induction forms"
    question = "Which heads become an induction circuit, in which order, and what does it gain?"
    place = 9
    asked_of = "induction"

    def prepare(self) -> None:
        super().prepare()
        self.batch = self.inputs.reads(self.options.max_records)
        self.draws = RecordDraws(self.batch.row)
        self.pairs: list[Row] = []
        self.positions: list[Row] = []
        self.steps: list[Row] = []
        self.gaps = dict.fromkeys(("attention", "loss", "composition"), 0.0)

    @no_grad
    def measure(self, point: Checkpointed) -> Iterator[Row]:
        model, batch = point.model, self.batch
        heads = self.options.heads or tuple(map(str, all_heads(model)))
        roles = {
            "query_role": self.options.score_query_role,
            "support_role": self.options.support_key_role,
        }
        matching = [prefix_matching(head, batch, **roles) for head in heads]
        previous = [previous_token_attention(head, batch) for head in heads]
        shared = SharedBatch.merge([*matching, *previous], device=str(model.W_E.device))
        runs = forward_activations(model, shared.tokens, shared.hooks[None] | {LOGITS})
        cache = Cache({None: runs}, shared.rows[0])  # all have the same sequences
        places = RecordDraws(previous[0].row)
        self._measure_loss(point.step, cache[LOGITS])
        self._measure_pairs(point.step, model, heads)
        for head, one, other in zip(heads, matching, previous, strict=True):
            sums = cache[one.hook][:, one.component.head].double().sum(-1)
            self._gap("attention", float((sums - 1).abs().max()))
            found, back = (scalar.values(model, cache).double() for scalar in (one, other))
            yield {
                "step": point.step,
                "head": head,
                "reads": len(found),
                PREFIX: float(found.mean()),
                PREVIOUS: float(back.mean()),
                "weights_sha256": point.digest,
                **ends({PREFIX: self.draws.means(found[:, None])[0]}),
                **ends({PREVIOUS: places.means(back[:, None])[0]}),
            }

    def _gap(self, name: str, gap: float) -> None:
        self.gaps[name] = max(self.gaps[name], gap)

    def _measure_loss(self, step: int, logits: Tensor) -> None:
        """Rows of the positions, and of the whole."""
        targets = self.batch.targets()
        exact = logits[:, :-1].double()
        rows = torch.nn.functional.cross_entropy(  # one a target: CUDA has no other that is exact
            exact.flatten(0, 1), targets.flatten(), ignore_index=UNPREDICTED, reduction="none"
        )
        every = rows.view_as(targets)
        real = targets != UNPREDICTED
        counts, sums = real.sum(0), every.sum(0)
        from circuit.training.step import next_token_loss  # which imports torch

        whole = float(next_token_loss(exact, targets))
        self._gap("loss", abs(float(sums.sum() / counts.sum()) - whole))
        self.positions += [
            {"step": step, "position": place + 1, "tokens": int(n), "loss": float(total / n)}
            for place, (n, total) in enumerate(zip(counts, sums, strict=True))
            if n
        ]
        answers = every[self.batch.row, self.batch.at]
        self.steps.append(
            {
                "step": step,
                "loss": whole,
                ANSWER_LOSS: float(answers.mean()),
                **ends({ANSWER_LOSS: self.draws.means(answers[:, None])[0]}),
                SCORE: in_context_score(sums, counts),
            }
        )
        refuse_not_finite(self.steps[-1])

    def _measure_pairs(self, step: int, model: HookedTransformer, heads: Sequence[str]) -> None:
        """K-composition of every pair, held against the same through QR of the factors."""
        for earlier, later in composed_pairs(heads):
            direct = float(KComposition(earlier, later).values(model, Cache({None: {}})))
            through = composition_by_qr(model, earlier, later)
            self._gap("composition", abs(direct - through))
            self.pairs.append(
                {"step": step, "earlier": earlier, "later": later, COMPOSITION: through}
            )

    def conclude(self, rows: list[Row]) -> Findings:
        summary = summarize(rows, self.pairs, self.steps) | {"reads": rows[0]["reads"]}
        law = (
            f"every row of attention sums to 1 to {self.gaps['attention']:.1g}, the loss by"
            f" position averages to the whole loss to {self.gaps['loss']:.1g}, and K-composition"
            f" as a product of the weights is that of their QR factors to"
            f" {self.gaps['composition']:.1g}, at every checkpoint"
        )
        rows, beside = apart(self, rows, "step", "head")
        summary["bootstrap"] = how_drawn(self.draws.records)
        further = {PAIR_ROWS: self.pairs, POSITION_ROWS: self.positions, **beside}
        return Findings(rows, summary, law, further)

    @classmethod
    def size(cls, results: Results[InductionOptions]) -> tuple[float, ...]:
        return results.summary["reads"], len(results.summary["steps"])

    @classmethod
    def notes(cls, results: Results[InductionOptions]) -> list[str]:
        summary = results.summary
        first, last = summary["steps"][0], summary["steps"][-1]
        notes = [
            f"{summary['reads']} reads, steps {first['step']} to {last['step']}: the loss of the"
            f" answers goes from {first[ANSWER_LOSS]:.3g}{said_between(first, ANSWER_LOSS, '.3g')}"
            f" to {last[ANSWER_LOSS]:.3g}{said_between(last, ANSWER_LOSS, '.3g')} nats."
        ]
        order = [one for one in summary["measures"] if one["half_step"] is not None]
        if order:
            order.sort(key=lambda one: one["half_step"])
            words = ", ".join(f"{_of(one)} at {one['half_step']}" for one in order)
            notes.append(f"In the order in which they pass half of their way: {words}.")
        still = [_of(one) for one in summary["measures"] if one["half_step"] is None]
        if still:
            notes.append(f"Not on their way: {', '.join(still)}.")
        return [*notes, *note(results)]

    @classmethod
    def tables(cls, results: Results[InductionOptions]) -> list[Table]:
        summary = results.summary
        first, last = (summary["steps"][end]["step"] for end in (0, -1))
        ends = {"first": (f"at {first}", ".3f"), "last": (f"at {last}", ".3f")}
        measures = [{**one, "measure": WORDS[one["measure"]]} for one in summary["measures"]]
        columns = {"measure": "measure", "of": "of", **ends, "half_step": "half at step"}
        of_heads = behind_numbers(
            {"head": "head", **{name: (WORDS[name], ".3f") for name in ATTENTIONS}}, ATTENTIONS
        )
        of_pairs = {
            "earlier": "earlier head",
            "later": "later head",
            COMPOSITION: (WORDS[COMPOSITION], ".3f"),
        }
        formats = dict.fromkeys(ATTENTIONS, ".3f")
        # without their step, which the titles say: the page would say it again
        heads, pairs = (
            [{name: row[name] for name in columns} for row in rows if row["step"] == last]
            for columns, rows in (
                (
                    of_heads,
                    (
                        {**row, **cells_between(row, formats)}
                        for row in with_intervals(cls, results)
                    ),
                ),
                (of_pairs, results.rows(PAIR_ROWS)),
            )
        )
        return [
            Table("Measures", columns, measures, console=len(measures)),
            Table(f"Heads at step {last}", of_heads, _ranked(heads, PREFIX)),
            *(
                [Table(f"Pairs at step {last}", of_pairs, _ranked(pairs, COMPOSITION))]
                * bool(pairs)
            ),
        ]

    @classmethod
    def charts(cls, results: Results[InductionOptions]) -> list[Chart]:
        columns = ("step", "head", "reads", *ATTENTIONS, *ends_of(*ATTENTIONS))
        rows = shown(with_intervals(cls, results), columns)
        last = rows[-1]["step"]
        drawn = [
            _of_heads(name, [row for row in rows if row["head"] in _best(rows, name, last)])
            for name in ATTENTIONS
        ]
        pairs = [
            {**row, "pair": f"{row['earlier']} > {row['later']}"} for row in results.rows(PAIR_ROWS)
        ]
        if pairs:
            layers = heat(COMPOSITION, COMPOSITION, tuple(pairs[0]), pairs, of="pair")
            title, count = "K-composition of an earlier and a later head", len(pairs)
            height = 22 * count / len({row["step"] for row in pairs})
            drawn.append(chart(COMPOSITION, title, {COMPOSITION: pairs}, *layers, height=height))
        return [*drawn, _by_position(list(results.rows(POSITION_ROWS)))]


def in_context_score(
    sums: Float[Tensor, " pos-1"], counts: Float[Tensor, " pos-1"]
) -> float | None:
    """Mean loss of the predicted tokens of the second half minus that of the first.

    Args:
        sums, counts: of the losses, and of the predicted tokens, at positions 1 and behind.
    """
    half = (len(sums) + 1) // 2 - 1
    means = [
        float(s.sum() / n.sum()) if n.sum() else None
        for s, n in ((sums[half:], counts[half:]), (sums[:half], counts[:half]))
    ]
    late, early = means
    return None if late is None or early is None else late - early


def composition_by_qr(model: HookedTransformer, earlier: str, later: str) -> float:
    """`circuit.scalars.induction.KComposition` of matrices as small as a head is wide, in float64.

    An orthonormal factor does not change a Frobenius norm: with `W_Q = Q R` the norm of `W_Q A` is
    that of `R A`.
    """
    w_q, w_k_t = (one.double() for one in head_factors(model, parse_component(later), "qk"))
    w_v, w_o = (one.double() for one in head_factors(model, parse_component(earlier), "ov"))
    r_q, r_k, r_v, r_o = (torch.linalg.qr(one).R for one in (w_q, w_k_t.mT, w_v, w_o.mT))
    product = r_q @ (w_o @ w_k_t.mT).mT @ r_v.mT
    return float(product.norm() / ((r_q @ r_k.mT).norm() * (r_v @ r_o.mT).norm()))


def half_step(course: Mapping[int, float | None], sign: int = 1) -> int | None:
    """The first step from which on a course stays past the middle between its ends.

    Args:
        course: values by step, ascending.
        sign: -1 of what should go down.
    """
    steps, values = list(course), [value for value in course.values() if value is not None]
    if len(values) < len(steps):
        return None
    way = [sign * (value - (values[0] + values[-1]) / 2) for value in values]
    if way[-1] <= 0:
        return None
    short = [place for place, left in enumerate(way) if left < 0]
    return steps[short[-1] + 1]


def summarize(rows: Sequence[Row], pairs: Sequence[Row], steps: Sequence[Row]) -> dict[str, Any]:
    """Of every measure the course of the best head or pair, and its half step."""
    measures = [
        _measure(name, None, {row["step"]: row[name] for row in steps}, -1)
        for name in (ANSWER_LOSS, SCORE)
    ]
    named = [{**row, "pair": f"{row['earlier']} > {row['later']}"} for row in pairs]
    for name, key, table in (
        (PREFIX, "head", rows),
        (PREVIOUS, "head", rows),
        (COMPOSITION, "pair", named),
    ):
        last = [row for row in table if row["step"] == steps[-1]["step"]]
        if last:
            best = max(last, key=lambda row: row[name])[key]
            course = {row["step"]: row[name] for row in table if row[key] == best}
            measures.append(_measure(name, best, course))
    return {"steps": list(steps), "measures": measures}


def _measure(
    name: str, of: str | None, course: Mapping[int, float | None], sign: int = 1
) -> dict[str, Any]:
    values = list(course.values())
    ends = {"first": values[0], "last": values[-1]}
    return {"measure": name, "of": of, **ends, "half_step": half_step(course, sign)}


def _of(measure: Mapping[str, Any]) -> str:
    """A measure in words, with its head."""
    words = WORDS[measure["measure"]]
    return words if measure["of"] is None else f"{words} (**{measure['of']}**)"


def _ranked(rows: Sequence[Row], name: str) -> list[Row]:
    return sorted(rows, key=lambda row: -row[name])


def _best(rows: Sequence[Row], name: str, step: int) -> list[str]:
    """The heads that have a line."""
    ranked = _ranked([row for row in rows if row["step"] == step], name)
    return [row["head"] for row in ranked[:DRAWN]]


def _of_heads(name: str, rows: Sequence[Row]) -> Chart:
    heads = list(dict.fromkeys(row["head"] for row in rows))
    shade = colour("head", heads)
    layers = lines(name, name, "attention", shade, tuple(rows[0]), domain=(0, 1))
    title = f"{WORDS[name][0].upper()}{WORDS[name][1:]} by head"
    return chart(name, title, {name: rows}, band(name, name, "attention", shade), layers, at_step())


def _by_position(rows: Sequence[Row]) -> Chart:
    named = [{**row, "at": str(row["position"])} for row in rows]
    count = len({row["position"] for row in rows})
    layers = heat("by_position", "loss", ("step", "position", "tokens", "loss"), named, of="at")
    title = "Loss by position of the predicted token, nats"
    return chart("loss_by_position", title, {"by_position": named}, *layers, height=16 * count)
