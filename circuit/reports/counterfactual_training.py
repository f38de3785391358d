"""counterfactual-training: what scalars become when a training leaves the run with an edit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from circuit.artifacts import Row
from circuit.attribution.window import attributor_of
from circuit.core.digests import tensor_digest
from circuit.core.edit import Edit
from circuit.core.state import FlatState
from circuit.errors import CircuitError
from circuit.figures.charts import TICKS, Chart, chart, exact, named
from circuit.lazy import alt, np, torch
from circuit.options import Option
from circuit.quoting import markdown_text
from circuit.reports.report import Findings, Results
from circuit.reports.tables import Table
from circuit.reports.traced import Scalars, TracedReport, WordOptions, parse_words
from circuit.scalars.family import split_word

_SCALED = re.compile(r"(.+)\*([-+.\deE]+)")
_STEPS = re.compile(r"(\d+):(\d+)")
WORDS = "label[,drop=EXAMPLE...][,weight=EXAMPLE*FACTOR...][,scale=TERM*FACTOR...][,steps=A:B]"
NULL = "nothing"
"""Label of the training that changes nothing."""


class CounterfactualOptions(WordOptions):
    """A window, scalars at its end, and what is otherwise in it."""

    edits: Annotated[
        tuple[str, ...],
        Option(f"{WORDS}; the steps of the window by default.", flag="--edit", kind="edit"),
    ]

    def check(self) -> None:
        """Also refuses a word that says nothing, or a label twice."""
        super().check()
        labels = [NULL, *(parse_edit(word, 0, 1)[0] for word in self.edits)]
        for label in labels:
            if labels.count(label) > 1:
                expected = f"another label for each, and none is '{NULL}'"
                raise CircuitError(f"label '{label}'", where="`edits`", expected=expected)


def parse_edit(word: str, start: int, end: int) -> tuple[str, Edit]:
    """Label and edit of a word.

    Args:
        start, end: its steps, unless it says which.

    Raises:
        CircuitError: it says nothing, or something else.
    """
    label, values = split_word(word)
    dropped = [f"{name}*0" for name in values.pop("drop", ())]
    examples = _scaled([*dropped, *values.pop("weight", ())])
    terms = _scaled(values.pop("scale", ()))
    steps = values.pop("steps", ())
    if steps:
        match = _STEPS.fullmatch(steps[0])
        if match is None or len(steps) > 1:
            told = ",".join(f"steps={one}" for one in steps)
            raise CircuitError(told, where="`edits`", expected="steps=A:B, once")
        start, end = int(match[1]), int(match[2])
    if values or not (examples or terms):
        raise CircuitError(f"'{word}'", where="`edits`", expected=WORDS)
    return label, Edit(start, end, examples, terms)


def _scaled(texts: Sequence[str]) -> dict[str, float]:
    """Factors by name, of `name*factor`."""
    factors: dict[str, float] = {}
    for text in texts:
        match = _SCALED.fullmatch(text)
        name = match[1] if match else ""
        try:
            factor = float(match[2] if match else "")
        except ValueError:
            raise CircuitError(f"'{text}'", where="`edits`", expected="NAME*FACTOR") from None
        if name in factors:
            raise CircuitError(f"'{name}' twice", where="`edits`", expected="one factor for each")
        factors[name] = factor
    return factors


class CounterfactualTraining(TracedReport[CounterfactualOptions]):
    """What scalars become when examples or terms of the update are left out or scaled."""

    command = "counterfactual-training"
    names = ("trace counterfactual",)
    Options = CounterfactualOptions
    of_recipes = True
    panel = "Attribution"
    title = "Trainings in which something was otherwise"
    question = "What would the numbers have become without some examples, or some of the update?"

    def families(self) -> tuple[Scalars, ...]:
        return parse_words(self.options.scalars)

    def prepare(self) -> None:
        super().prepare()
        start, end = self.steps
        self.edits = {NULL: Edit(start, end)}
        self.edits |= dict(parse_edit(word, start, end) for word in self.options.edits)
        for label, edit in self.edits.items():
            if not start <= edit.start < edit.end <= end:
                raise CircuitError(
                    f"'{label}' is of steps {edit.start}:{edit.end}",
                    where="`edits`",
                    expected=f"steps within {start}:{end}",
                )

    @property
    def total(self) -> int:
        return len(self.edits)

    def points(self) -> Iterator[tuple[str, Edit]]:
        end = self.steps[1]
        self.tell("building the scalars")
        self.attributor = attributor_of(self.run, self.source.scalars(self.inputs))
        self.actual_end = FlatState.of(self.run.state(end))
        self.bound = self.attributor.bind(self.actual_end.parameters)
        self.actual = self.attributor.values(self.actual_end.parameters, self.bound)
        yield from self.edits.items()

    def measure(self, point: tuple[str, Edit]) -> list[Row]:
        label, edit = point
        end = self.run.counterfactual(edit, self.steps[1])
        values = self.attributor.values(end.parameters, self.bound)
        if label == NULL:
            self.differ = _differing_bits(end, self.actual_end)
        return [
            {
                "edit": label,
                "start_step": edit.start,
                "end_step": edit.end,
                "examples": len(edit.examples),
                "terms": dict(edit.terms),
                "scalar": scalar.name,
                "actual": float(self.actual[at]),
                "value": float(values[at]),
                "change": float(values[at] - self.actual[at]),
                "parameters_sha256": tensor_digest(end.parameters),
            }
            for at, scalar in enumerate(self.attributor.scalars)
        ]

    def conclude(self, rows: list[Row]) -> Findings:
        (start, end), edits = self.steps, len(self.options.edits)
        summary = {
            "start_step": start,
            "end_step": end,
            "differing_bits": self.differ,
            "scalars": [scalar.name for scalar in self.attributor.scalars],
        }
        law = (
            f"{edits} training{'s' * (edits > 1)} with an edit over steps {start}:{end}; the one"
            f" that changes nothing is the run, {self.differ} bits differ"
        )
        return Findings(rows, summary, law)

    # --- what is shown ---

    @classmethod
    def notes(cls, results: Results[CounterfactualOptions]) -> list[str]:
        return [
            "Each training leaves the run where its edit starts and goes on to the last step;"
            " scalars have the constants that they have at the last step of the run."
        ]

    @classmethod
    def tables(cls, results: Results[CounterfactualOptions]) -> list[Table]:
        columns = {"edit": "edit", "steps": "steps", "scalar": "scalar"}
        numbers = {name: (name, "+.4g") for name in ("actual", "value", "change")}
        rows = [
            {**row, "steps": f"{row['start_step']}:{row['end_step']}"} for row in results.rows()
        ]
        return [Table("What the scalars become", {**columns, **numbers}, rows, console=32)]

    @classmethod
    def charts(cls, results: Results[CounterfactualOptions]) -> list[Chart]:
        rows: dict[str, list[Any]] = {}
        for row in results.rows():
            record = {key: row[key] for key in ("edit", "scalar", "actual", "value", "change")}
            rows.setdefault(row["scalar"], []).append(record)
        return [_chart(at, scalar, records) for at, (scalar, records) in enumerate(rows.items())]


def _chart(at: int, scalar: str, records: list[Any]) -> Chart:
    name = f"changes_{at}"
    labels = [record["edit"] for record in records]
    bars = (
        named(name)
        .mark_bar()
        .encode(
            y=alt.Y("edit:N").title(None).sort(labels).axis(labelLimit=300),
            x=alt.X("change:Q").title("change at the end").axis(tickCount=TICKS),
            color=alt.value("var(--c1)"),
            tooltip=exact(*records[0]),
        )
    )
    title = f"What each training changed of {markdown_text(scalar)}"
    return chart(name, title, {name: records}, bars, height=22 * len(records))


def _differing_bits(one: FlatState, other: FlatState) -> int:
    """Bits of weights and moments in which two states are not the same."""
    pairs = [(one.parameters, other.parameters)]
    pairs += [(one.moments[name], other.moments[name]) for name in other.moments]
    apart = [(a.view(torch.int32) ^ b.view(torch.int32)).numpy() for a, b in pairs]
    return sum(int(np.unpackbits(bits.view(np.uint8)).sum()) for bits in apart)
