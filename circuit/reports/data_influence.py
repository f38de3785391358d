"""data-influence: what a small change of each training example's weight would do at the end.

data_influence_rows.jsonl       a row a step, scalar and example
data_influence_steps.jsonl      a row a step and scalar: growth of the adjoint, sums by fact
data_influence_examples.jsonl   a row a scalar and example: its sum over all steps
data_influence_checks.jsonl     a row a check and scalar: predicted and actual change
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Annotated, Any

from circuit.artifacts import Row, dump_row, in_row
from circuit.attribution.influence import ROUGH, InfluencePass, StepInfluence
from circuit.attribution.losses import By
from circuit.attribution.window import attributor_of
from circuit.core.edit import Edit
from circuit.errors import CircuitError
from circuit.figures.charts import Chart
from circuit.figures.data import checks_chart, facts_chart, growth_chart, top_chart
from circuit.lazy import np
from circuit.options import Option
from circuit.quoting import markdown_text
from circuit.reports.data_facts import SHOWN, Sums, example_lines, lead_of, numbers, with_tokens
from circuit.reports.report import Findings, Results
from circuit.reports.tables import Columns, Table
from circuit.reports.traced import Scalars, TracedReport, WordOptions, parse_words

ROWS, STEPS, EXAMPLES, CHECKS = (
    f"data_influence_{what}.jsonl" for what in ("rows", "steps", "examples", "checks")
)


class DataInfluenceOptions(WordOptions):
    """A window, scalars at its end, and trainings by which the derivative is checked."""

    by: Annotated[
        By,
        Option("example, or position: also each predicted token apart, at the same cost."),
    ] = "example"
    check_trainings: Annotated[
        int,
        Option(
            "Trainings without random examples, against which the derivative is held.",
            flag="--check",
            least=0,
        ),
    ] = 0
    check_share: Annotated[
        float,
        Option("Share of the examples that each of them leaves out.", above=0, below=1),
    ] = 0.01
    check_seed: Annotated[int, Option("Of the random examples.", least=0)] = 17


class DataInfluence(TracedReport[DataInfluenceOptions]):
    """What a small change of a training example's weight would do: exact, with gauges."""

    command = "data-influence"
    names = ("trace influence",)
    Options = DataInfluenceOptions
    of_recipes = True
    reads_batches = True
    panel = "Attribution"
    title = "Influence of the training examples"
    question = (
        "What would a small change of a training example's weight do to a number of the weights at"
        " the end of the window?"
    )

    def check(self) -> None:
        super().check()
        if self.options.check_trainings and self.config.edit is not None:
            raise CircuitError(
                "no training leaves one that has an edit itself",
                where="`check_trainings`",
                expected="0, or the run that it left",
            )

    def families(self) -> tuple[Scalars, ...]:
        return parse_words(self.options.scalars)

    @property
    def total(self) -> int:
        return super().total + self.options.check_trainings

    def points(self) -> Iterator[StepInfluence | Edit]:
        start, end = self.steps
        self.tell("building the scalars")
        scalars = self.source.scalars(self.inputs)
        self.attributor = attributor_of(self.run, scalars)
        self.passed = InfluencePass(self.run, self.attributor, start, end)
        self.sums = Sums(tuple(scalar.name for scalar in scalars))
        self.lines: dict[str, list[str]] = {ROWS: [], STEPS: []}  # from the last step to the first
        self.checks: list[Row] = []
        self.growth: list[list[float]] = []
        yield from self.passed
        names = sorted(self.sums.examples)
        count = max(1, round(self.options.check_share * len(names)))
        random = np.random.default_rng(self.options.check_seed)
        trainings = self.options.check_trainings
        for number in range(1, trainings + 1):
            self.tell(f"training {number} of {trainings} without {count} of {len(names)} examples")
            out = random.choice(len(names), count, replace=False)
            yield Edit(start, end, examples=dict.fromkeys([names[at] for at in out], 0.0))

    def measure(self, point: StepInfluence | Edit) -> list[Row]:
        if isinstance(point, Edit):
            self._check(point)
            return []
        batch = point.objective.examples()
        shares = point.influence
        if self.options.by == "example":
            shares = shares.sum(2, keepdim=True)
        facts = self.sums.add(shares, batch)
        self.growth.append(point.growth.tolist())
        for at, name in reversed(list(enumerate(self.sums.names))):
            lines = example_lines(point.step, name, "influence", shares[at], batch)
            self.lines[ROWS] += reversed(lines)
            line = {
                "step": point.step,
                "scalar": name,
                "growth": float(point.growth[at]),
                "rough": point.step <= ROUGH,
                "facts": {fact: numbers(values, at) for fact, values in facts.items()},
            }
            self.lines[STEPS].append(dump_row(line))
        return []

    def _check(self, edit: Edit) -> None:
        """Train without some examples; each loses its weight, so the derivative says `- sum`."""
        end = self.run.counterfactual(edit, self.steps[1])
        actual = self.attributor.values(end.parameters, self.passed.bound) - self.passed.value
        for at, name in enumerate(self.sums.names):
            lost = [float(self.sums.examples[one][1][at]) for one in edit.examples]
            self.checks.append(
                {
                    "scalar": name,
                    "examples": len(lost),
                    "predicted": -math.fsum(lost),
                    "actual": float(actual[at]),
                }
            )

    def conclude(self, rows: list[Row]) -> Findings:
        start, end = self.steps
        ranked = [self.sums.ranked(at) for at in range(len(self.sums.names))]
        scalars: list[dict[str, Any]] = [
            {
                "scalar": name,
                "value": float(self.passed.value[at]),
                "slope": float(self.passed.slope[at]),
                "growth": max(growth[at] for growth in self.growth),
                **_agreement([row for row in self.checks if row["scalar"] == name]),
                "examples": len(ranked[at]),
                **self.sums.ends(ranked[at], SHOWN),
                "facts": self.sums.of_scalar(at),
            }
            for at, name in enumerate(self.sums.names)
        ]
        lead = self.sums.names[0]
        summary = {"lead": lead, "start_step": start, "end_step": end, "scalars": scalars}
        texts = {name: "\n".join([*lines[::-1], ""]) for name, lines in self.lines.items()}
        examples = [row for one in ranked for row in one]
        further: dict[str, Any] = {STEPS: texts[STEPS], EXAMPLES: examples, CHECKS: self.checks}
        return Findings(texts[ROWS], summary, self._law(scalars), further)

    def _law(self, scalars: list[dict[str, Any]]) -> str:
        start, end = self.steps
        grown = max(scalars, key=lambda one: one["growth"])
        law = (
            f"derivatives of {len(scalars)} scalar{'s' * (len(scalars) > 1)} at step {end} by the"
            f" weights of {scalars[0]['examples']} examples over steps {start}:{end}; the adjoint's"
            f" norm grows to {grown['growth']:.3g} times that at the end"
        )
        if start < ROUGH:
            law += f"; the steps up to {ROUGH} are rough: their slope may tell nothing"
        if not self.options.check_trainings:
            return f"{law}; not held against trainings (`check_trainings`)"
        told = [
            f"{_shown(one['spread'])} ({one['scalar']}, correlation {_shown(one['correlation'])})"
            for one in scalars
        ]
        return (
            f"{law}; predicted over actual spread, in {self.options.check_trainings} trainings"
            f" without {self.options.check_share:.2g} of the examples: {', '.join(told)}"
        )

    # --- what is shown ---

    @classmethod
    def size(cls, results: Results[DataInfluenceOptions]) -> tuple[float, ...]:
        return (results.summary["end_step"] - results.summary["start_step"],)

    @classmethod
    def notes(cls, results: Results[DataInfluenceOptions]) -> list[str]:
        lead = lead_of(results)
        return [
            "Influence is the derivative with respect to the weight of an example's loss wherever"
            " it occurs in the window, through gradients, clipping, moments and decay. It is exact"
            " for infinitesimal changes and says nothing of who moved the scalar.",
            f"Charts and rankings are of {markdown_text(lead['scalar'])}. Trust it for finite"
            " changes where predicted and actual spread over trainings are about equal and their"
            " means are not far apart (offset, in actual spreads); a norm of the adjoint that grows"
            " backwards in time warns that they are not.",
        ]

    @classmethod
    def tables(cls, results: Results[DataInfluenceOptions]) -> list[Table]:
        lead = lead_of(results)
        columns: Columns = {
            "scalar": "scalar",
            "value": ("value at the end", "+.4g"),
            "slope": ("norm of its gradient", ".3g"),
            "growth": ("growth", ".3g"),
            "spread": ("predicted / actual spread", ".3g"),
            "correlation": ("correlation", "+.2f"),
            "offset": ("offset", "+.2f"),
        }
        ranking: Columns = {"share": ("influence", "+.4g"), "example": "example", "times": "times"}
        ranking = with_tokens(ranking, lead["top"])
        # earlier reports know no offset
        scalars = [{"offset": None, **one} for one in results.summary["scalars"]]
        return [
            Table("Derivatives and their gauges", columns, scalars, console=32),
            Table("Examples that would raise it", ranking, lead["top"], console=4),
            Table("Examples that would lower it", ranking, lead["bottom"], console=4),
        ]

    @classmethod
    def charts(cls, results: Results[DataInfluenceOptions]) -> list[Chart]:
        lead = lead_of(results)
        name = lead["scalar"]

        def rows(file: str) -> list[Row]:
            held = results.rows(file, holding=in_row("scalar", name))
            return [row for row in held if row["scalar"] == name]

        checks = rows(CHECKS)
        return [
            growth_chart(name, rows(STEPS)),
            *([checks_chart(name, checks)] if checks else []),
            *facts_chart(name, lead["facts"], "influence"),
            top_chart(name, [*lead["top"], *lead["bottom"][::-1]], "influence"),
        ]


def _agreement(checks: list[Row]) -> dict[str, float | None]:
    """Predicted over actual standard deviation, their correlation, and how far their means are
    apart, in actual standard deviations; null without any."""
    predicted, actual = ([row[key] for row in checks] for key in ("predicted", "actual"))
    if len(checks) < 2 or not stdev(predicted) or not stdev(actual):
        return dict.fromkeys(("spread", "correlation", "offset"))
    correlation = float(np.corrcoef(predicted, actual)[0, 1])
    offset = (fmean(predicted) - fmean(actual)) / stdev(actual)
    spread = stdev(predicted) / stdev(actual)
    return {"spread": spread, "correlation": correlation, "offset": offset}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
