"""data-credit: which training examples wrote what happened to a scalar.

data_credit_rows.jsonl       a row a step, scalar and example
data_credit_steps.jsonl      a row a step and scalar: sums of the batch, by fact
data_credit_examples.jsonl   a row a scalar and example: its sum over all steps
data_credit_carried.jsonl    with `shard`: one row, what the steps before go on from
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from circuit.artifacts import Row, dump_row, in_row
from circuit.attribution.credit import CreditPass, StepCredit
from circuit.attribution.losses import By
from circuit.attribution.window import attributor_of
from circuit.figures.charts import Chart
from circuit.figures.data import facts_chart, shares_chart, top_chart
from circuit.options import Option
from circuit.quoting import markdown_text
from circuit.reports.attribution_law import percent
from circuit.reports.credit_shards import CARRIED, ROWS, STEPS, Behind, carried_row
from circuit.reports.data_facts import SHOWN, Sums, example_lines, lead_of, numbers, with_tokens
from circuit.reports.report import Findings, Results
from circuit.reports.tables import Columns, Table
from circuit.reports.traced import PathOptions, Scalars, TracedReport, WordOptions, parse_words
from circuit.sizes import shown

RANKED = 3
"""Scalars whose examples are ranked in tables; the row file has all."""
FACTS = {"fact": "fact", "value": "value", "credit": ("credit", "+.4g")}
EXAMPLES = "data_credit_examples.jsonl"


class DataCreditOptions(WordOptions, PathOptions):
    """A window, scalars, and how finely an example's credit is divided."""

    by: Annotated[
        By,
        Option(
            "example (costs the same for any number of scalars), or position: also each predicted"
            " token apart, so that facts are those of single answers."
        ),
    ] = "example"
    shard: Annotated[
        bool, Option("Also leave what the credit of the steps before goes on from (`behind`).")
    ] = False
    behind: Annotated[
        Path | None,
        Option(
            "Folder of the credit of the window behind this one, made with `shard`: the report is"
            " of both.",
            kind="report",
        ),
    ] = None


class DataCredit(TracedReport[DataCreditOptions]):
    """Which training examples moved a number of the weights: credit that adds up."""

    command = "data-credit"
    names = ("trace data",)
    Options = DataCreditOptions
    of_recipes = True
    reads_batches = True
    panel = "Attribution"
    title = "Credit of the training examples"
    question = (
        "Which training examples wrote what happened to a number of the weights, through momentum"
        " and all?"
    )

    def families(self) -> tuple[Scalars, ...]:
        return parse_words(self.options.scalars)

    def prepare(self) -> None:
        super().prepare()
        behind = self.options.behind
        self.behind = None if behind is None else Behind.read(behind, self)

    @property
    def whole(self) -> tuple[int, int]:
        """The window, with that behind it."""
        start, end = self.steps
        return start, end if self.behind is None else self.behind.end

    def points(self) -> Iterator[StepCredit]:
        start, end = self.steps
        self.tell("building the scalars")
        scalars = self.source.scalars(self.inputs)
        names = tuple(scalar.name for scalar in scalars)
        attributor = attributor_of(self.run, scalars, rule=self.options.path, averages=True)
        self.sums, carried = Sums(names), None
        self.lines: dict[str, list[str]] = {ROWS: [], STEPS: []}  # from the last step to the first
        if self.behind is not None:
            carried = self.behind.carried(names, attributor.layout.size)
            self.sums, self.lines = self.behind.sums(names), self.behind.lines()
        by = self.options.by
        self.passed = CreditPass(self.run, attributor, start, end, by, behind=carried)
        yield from self.passed

    def measure(self, point: StepCredit) -> list[Row]:
        batch = point.objective.examples()
        facts = self.sums.add(point.credit, batch)
        for at, name in reversed(list(enumerate(self.sums.names))):
            credit = point.credit[at]
            shares = credit.sum(1).tolist()
            lines = example_lines(point.step, name, "credit", credit, batch)
            self.lines[ROWS] += reversed(lines)
            line = {"step": point.step, "scalar": name, "batch": float(point.batch[at])}
            line["positive"] = math.fsum(share for share in shares if share > 0)
            line["negative"] = math.fsum(share for share in shares if share < 0)
            line["facts"] = {fact: numbers(values, at) for fact, values in facts.items()}
            self.lines[STEPS].append(dump_row(line))
        return []

    def conclude(self, rows: list[Row]) -> Findings:
        totals, (start, end) = self.passed.totals, self.whole
        ranked = [self.sums.ranked(at) for at in range(len(self.sums.names))]
        scalars: list[dict[str, Any]] = [
            {
                "scalar": name,
                **totals.of(at),
                "examples": len(ranked[at]),
                **self.sums.ends(ranked[at], SHOWN),
                "facts": self.sums.of_scalar(at),
            }
            for at, name in enumerate(self.sums.names)
        ]
        lead = max(scalars, key=lambda one: abs(one["actual"]))
        summary = {"lead": lead["scalar"], "start_step": start, "end_step": end, "scalars": scalars}
        texts = {name: "\n".join([*lines[::-1], ""]) for name, lines in self.lines.items()}
        examples = [row for one in ranked for row in one]
        further: dict[str, Iterable[Row] | str] = {STEPS: texts[STEPS], EXAMPLES: examples}
        if self.options.shard:
            further[CARRIED] = [carried_row(end, self.sums, self.passed.carried)]
        return Findings(texts[ROWS], summary, self._law(scalars, lead), further)

    def _law(self, scalars: list[dict[str, Any]], lead: dict[str, Any]) -> str:
        start, end = self.whole

        def worst(key: str) -> str:
            known = [one[key] for one in scalars if one[key] is not None]
            return f"{percent(max(known)):.2g}" if known else "-"

        closure = percent(lead["closure"])
        law = (
            f"over steps {start}:{end} the credit of {lead['examples']} examples"
            f" {lead['credit']:+.4g}, momentum inherited from before {lead['inherited']:+.4g},"
            f" decay {lead['decay']:+.4g} and rounding {lead['rounding']:+.1g} close to"
            f" {'-' if closure is None else f'{closure:.2g}'} % of the actual change"
            f" {lead['actual']:+.4g} of {lead['scalar']}"
        )
        if len(scalars) > 1:
            law += f" (the worst of {len(scalars)} scalars to {worst('closure')} %)"
        return (
            f"{law}; examples sum to the gradients that were taken to {worst('examples_error')} %;"
            f" path rule {self.options.path}; temporary files of"
            f" {shown(self.passed.bytes_a_step)} a step"
        )

    # --- what is shown ---

    @classmethod
    def size(cls, results: Results[DataCreditOptions]) -> tuple[float, ...]:
        return (results.summary["end_step"] - results.summary["start_step"],)

    @classmethod
    def notes(cls, results: Results[DataCreditOptions]) -> list[str]:
        lead = lead_of(results)
        notes = [
            "Credit divides what happened among the examples that were there, with learning rates,"
            " clip factors and denominators as they were; what momentum carried on counts where its"
            " gradient was taken. It does not say what would have happened without an example.",
            f"Charts and sums by fact are of {markdown_text(lead['scalar'])}"
            + (", the scalar that changed most. " if len(results.summary["scalars"]) > 1 else ". ")
            + (
                "Facts are those of single answers; `predicted` is the kind of every token that was"
                " predicted."
                if results.options.by == "position"
                else "A record counts under a fact that all of its questions share, else under"
                " `several`."
            ),
        ]
        return notes if lead["facts"] else notes[:1]  # a recipe's examples have none

    @classmethod
    def tables(cls, results: Results[DataCreditOptions]) -> list[Table]:
        lead = lead_of(results)
        parts = ("actual", "credit", "inherited", "decay")
        columns = {
            "scalar": "scalar",
            **{part: (part, "+.4g") for part in parts},
            "rounding": ("rounding", "+.1g"),
            "closure": ("closure %", ".2g"),
            "examples_error": ("examples %", ".1g"),
        }
        shares = ("closure", "examples_error")
        rows = [
            {**one, **{name: percent(one[name]) for name in shares}}
            for one in results.summary["scalars"]
        ]
        facts = _facts(lead)
        asked = [lead, *(one for one in results.summary["scalars"] if one is not lead)]
        return [
            Table("What adds up", columns, rows, console=32),
            *(table for one in asked[:RANKED] for table in _ranking(one)),
            *([Table(f"By fact: {markdown_text(lead['scalar'])}", FACTS, facts)] if facts else []),
        ]

    @classmethod
    def charts(cls, results: Results[DataCreditOptions]) -> list[Chart]:
        lead = lead_of(results)
        rows = results.rows(STEPS, holding=in_row("scalar", lead["scalar"]))
        steps = [row for row in rows if row["scalar"] == lead["scalar"]]
        return [
            shares_chart(lead["scalar"], steps),
            *facts_chart(lead["scalar"], lead["facts"]),
            top_chart(lead["scalar"], [*lead["top"], *lead["bottom"][::-1]]),
        ]


def _ranking(scalar: Mapping[str, Any]) -> list[Table]:
    """The examples that moved a scalar most, one way and the other."""
    columns: Columns = {"share": ("credit", "+.4g"), "example": "example", "times": "times"}
    columns = with_tokens(columns, scalar["top"])
    name = markdown_text(scalar["scalar"])
    raised = [row for row in scalar["top"] if row["share"] > 0]
    lowered = [row for row in scalar["bottom"] if row["share"] < 0]
    ends = {"raised": raised, "lowered": lowered}
    return [
        Table(f"Examples that {moved} {name} most", columns, rows, console=4)
        for moved, rows in ends.items()
        if rows
    ]


def _facts(scalar: Mapping[str, Any]) -> list[Row]:
    """The values of each fact with the largest sums, of either sign."""
    rows: list[Row] = []
    for fact, sums in scalar["facts"].items():
        largest = sorted(sums, key=lambda value: -abs(sums[value]))[:SHOWN]
        rows += [{"fact": fact, "value": value, "credit": sums[value]} for value in largest]
    return rows
