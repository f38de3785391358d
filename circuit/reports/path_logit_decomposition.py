"""path-logit-decomposition: what every component writes into the answer's margin, over training.

At each read's prediction position the margin is `logit(answer) - logit(competitor)`, the competitor
being the model's own best wrong value there; or, against the mean, `logit(answer)` minus the mean
over all values, which does not jump when the competitor changes. The direct path of every component
(embeddings, heads, attention biases, MLPs) ends in the last residual stage; with the scale of
`ln_final` held at its value in the run, the rest is linear, so that each component has its share of
the margin, and with the two constants the shares sum to it (circuit/model/dla.py; definitions.md
section 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from circuit import options
from circuit.artifacts import Row
from circuit.core.intervals import RecordDraws
from circuit.figures.charts import Chart, at_step, band, chart, colour, heat, lines, of_slices
from circuit.lazy import no_grad, torch
from circuit.model.dla import attribute_logits, dla_hooks
from circuit.model.readout import read_answers
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
from circuit.reports.report import Findings, OfCheckpoints, Results
from circuit.reports.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

DRAWN = 8
"""Components that have a line of their own."""


class DecompositionOptions(options.ProbeOptions, options.CheckpointOptions):
    """Whose reads are taken, and what the answer's logit is held against."""

    against: Annotated[
        Literal["competitor", "mean"],
        options.Option("The best wrong value, or the mean of all values' logits."),
    ] = "competitor"
    slice: options.Slice = None
    max_records: options.MaxRecords = None


class LogitDecomposition(OfCheckpoints[DecompositionOptions]):
    """What every component writes directly into the answer's margin, at every checkpoint."""

    command = "path-logit-decomposition"
    Options = DecompositionOptions
    title = "Who writes the answer"
    place = 4
    question = "Which component writes the answer's margin by its direct path, and since when?"

    def prepare(self) -> None:
        super().prepare()
        self.batch = self.inputs.reads(self.options.max_records)
        self.groups = self.batch.by_slice(self.slice)
        self.draws = {n: RecordDraws(self.batch.row[of]) for n, of in self.groups.items()}
        self.gap, self.largest = 0.0, 0.0

    @no_grad
    def measure(self, point: Checkpointed) -> Iterator[Row]:
        reads, hooks = self.batch, dla_hooks(point.model)
        _, cache = point.model.run_with_cache(
            self.batch.tokens, names_filter=lambda name: name in hooks, return_cache_object=False
        )
        written = attribute_logits(point.model, cache, (reads.row, reads.at))
        values = self.inputs.task.choices
        rival = read_answers(written.total, reads.answer, values).competitor

        def over_rival(logits: Tensor) -> Tensor:
            """The answer's logit minus what it is held against; `[read, ..., vocab]`, one less."""
            read = torch.arange(len(logits), device=logits.device)
            own = logits[read, ..., reads.answer]
            if self.options.against == "mean":
                return own - logits[..., values.start : values.stop].mean(-1)
            return own - logits[read, ..., rival]

        shares = over_rival(written.logits.double())  # [read, part]
        margin = over_rival(written.total.double())  # [read]
        self.gap = max(self.gap, float((shares.sum(1) - margin).abs().max()))
        self.largest = max(self.largest, float(margin.abs().max()))
        for value, chosen in self.groups.items():
            drawn = self.draws[value].means(torch.cat([shares[chosen], margin[chosen, None]], 1))
            of_parts = zip(written.parts, shares[chosen].T, drawn[:-1], strict=True)
            for part, share, interval in of_parts:
                yield {
                    "step": point.step,
                    "part": part,
                    self.slice: value,
                    "reads": len(share),
                    "contribution": float(share.mean()),
                    "positive_in": float((share > 0).double().mean()),
                    "margin": float(margin[chosen].mean()),
                    "weights_sha256": point.digest,
                    **ends({"contribution": interval, "margin": drawn[-1]}),
                }

    def conclude(self, rows: list[Row]) -> Findings:
        whole = [row for row in rows if row[self.slice] == "all"]
        steps = list(dict.fromkeys(row["step"] for row in whole))
        of = {(row["part"], row["step"]): row for row in whole}
        parts = []
        for part in dict.fromkeys(row["part"] for row in whole):
            first, last = of[part, steps[0]], of[part, steps[-1]]
            change = last["contribution"] - first["contribution"] if len(steps) > 1 else None
            parts.append(
                {
                    "part": part,
                    "first": first["contribution"],
                    "last": last["contribution"],
                    **{f"last{end}": last[f"contribution{end}"] for end in ENDS},
                    "change": change,
                    "positive_in": last["positive_in"],
                }
            )
        summary = {
            "steps": steps,
            "reads": whole[0]["reads"],
            "margin": {
                "first": whole[0]["margin"],
                "last": whole[-1]["margin"],
                **{f"last{end}": whole[-1][f"margin{end}"] for end in ENDS},
            },
            "parts": sorted(parts, key=lambda part: -part["last"]),
            "bootstrap": how_drawn(self.draws["all"].records),
        }
        rows, further = apart(self, rows, "step", "part", self.slice)
        law = (
            "the components' shares sum to the model's own margin of every read, to"
            f" {self.gap:.1g} of margins up to {self.largest:.3g}"
        )
        return Findings(rows, summary, law, further)

    @classmethod
    def size(cls, results: Results[DecompositionOptions]) -> tuple[float, ...]:
        return results.summary["reads"], len(results.summary["steps"])

    @classmethod
    def notes(cls, results: Results[DecompositionOptions]) -> list[str]:
        summary, top = results.summary, results.summary["parts"][0]
        return [
            f"{summary['reads']} reads, steps {summary['steps'][0]} to {summary['steps'][-1]}: the"
            f" mean margin goes from {summary['margin']['first']:.3g} to"
            f" {summary['margin']['last']:.3g}{said_between(summary['margin'], 'last', '.3g')}"
            f" logits. **{top['part']}** writes most of it at the end,"
            f" {top['last']:+.3g}{said_between(top, 'last', '+.3g')}. Direct paths alone: what a"
            " component does through later ones is theirs here.",
            *note(results),
        ]

    @classmethod
    def tables(cls, results: Results[DecompositionOptions]) -> list[Table]:
        first, last = results.summary["steps"][0], results.summary["steps"][-1]
        columns = {
            "part": "component",
            "first": (f"at {first}", "+.3f"),
            "last": (f"at {last}", "+.3f"),
            "interval": "95 %",
            "change": ("change", "+.3f"),
            "positive_in": ("positive in", ".1%"),
        }
        parts = results.summary["parts"]
        rows = [{**part, "interval": between(part, "last", "+.3f")} for part in parts]
        return [Table("Shares of the mean margin", columns, rows, console=8)]

    @classmethod
    def charts(cls, results: Results[DecompositionOptions]) -> list[Chart]:
        by = results.slice
        columns = ("step", "part", by, "reads", "contribution", "positive_in", "margin")
        digits = (*columns, *ends_of("contribution"))
        rows = shown(with_intervals(cls, results), digits)
        whole = [row for row in rows if row[by] == "all"]
        ranked = sorted(results.summary["parts"], key=lambda part: -abs(part["last"]))
        names = [part["part"] for part in ranked[:DRAWN]]
        largest = [row for row in whole if row["part"] in names]
        sliced = [row for row in rows if row[by] != "all" and row["part"] == names[0]]
        by_slice = chart(
            f"contribution_by_{by}",
            f"{names[0]}, by {by}",
            {f"by_{by}": sliced},
            band(f"by_{by}", "contribution", "logits", of_slices(by, sliced)),
            lines(f"by_{by}", "contribution", "logits", of_slices(by, sliced), digits),
            at_step(),
        )
        return [
            chart(
                "contributions",
                "Share of every component in the mean margin",
                {"shares": whole},
                *heat("shares", "contribution", columns, whole, of="part"),
                height=20 * len(results.summary["parts"]),
            ),
            chart(
                "largest_contributions",
                f"The {len(names)} components that end largest",
                {"largest": largest},
                band("largest", "contribution", "logits", colour("part", names)),
                lines("largest", "contribution", "logits", colour("part", names), digits),
                at_step(),
            ),
            *([by_slice] if sliced else []),
        ]
