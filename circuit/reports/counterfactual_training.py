"""counterfactual-training: what scalars become when a training leaves the run with an edit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from circuit.artifacts import Row
from circuit.attribution.replays import Replay, Replays, key, share
from circuit.attribution.window import attributor_of
from circuit.core.edit import Edit
from circuit.core.state import FlatState
from circuit.errors import CircuitError
from circuit.figures.charts import LABELS, TICKS, Chart, chart, exact, named
from circuit.lazy import alt, np, torch
from circuit.options import Option
from circuit.quoting import markdown_text
from circuit.reports.edits import WORDS, parse_edit, read_edits
from circuit.reports.report import Findings, Results
from circuit.reports.tables import Table
from circuit.reports.traced import Scalars, TracedReport, WordOptions, parse_words
from circuit.trace.counterfactual import record_counterfactual
from circuit.trace.replay import ReplayedRun
from circuit.train_config import MAX_STEPS
from circuit.training.checkpoints import DivergedError

NULL = "nothing"
"""Label of the training that changes nothing."""
_ONE = "one, or more in `edits_file`"
_FOLDER = re.compile(r"[\w][\w .+-]*")


class CounterfactualOptions(WordOptions):
    """A window, scalars at its end, and what is otherwise in it."""

    edits: Annotated[
        tuple[str, ...],
        Option(f"{WORDS}; the steps of the window by default.", flag="--edit", kind="edit"),
    ] = ()
    edits_file: Annotated[
        Path | None,
        Option(
            'JSON Lines of further edits, {"label": ..., "edit": {...}}.',
            flag="--edits",
            kind="edits",
        ),
    ] = None
    replays: Annotated[
        Path | None,
        Option(
            "Folder that keeps the trainings that are done; a start does what is missing.",
            folder=True,
        ),
    ] = None
    part: Annotated[str, Option("Every n-th edit from the i-th on, i/n, for one of n workers.")] = (
        "1/1"
    )
    runs_dir: Annotated[
        Path | None,
        Option("Also leave each training there as a run, in a folder of its label.", folder=True),
    ] = None

    def check(self) -> None:
        """Also refuses a word that says nothing, and as `check_labels`."""
        super().check()
        self.check_labels(())
        if not self.edits and self.edits_file is None:
            raise CircuitError("no edit", where="`edits`", expected=_ONE)
        if self.runs_dir is not None and self.replays is not None:
            raise CircuitError(
                "`replays` and `runs_dir`",
                expected="one of them: what is kept as a run is not trained again either",
            )
        share((), self.part)

    def check_labels(self, filed: Iterable[str]) -> None:
        """Refuse a label twice, or one that is no folder's name where it is to be one.

        Args:
            filed: labels of the file's edits.
        """
        labelled = [("`edits`", parse_edit(word, 0, MAX_STEPS)[0]) for word in self.edits]
        labelled += [("`edits_file`", label) for label in filed]
        labels = [NULL, *(label for _, label in labelled)]
        for where, label in reversed(labelled):
            if labels.count(label) > 1:
                expected = f"another label for each, and none is '{NULL}'"
                raise CircuitError(f"label '{label}'", where=where, expected=expected)
            if self.runs_dir is not None and not _FOLDER.fullmatch(label):
                expected = "letters, digits, spaces and .+-_, for a folder has its name"
                raise CircuitError(f"label '{label}'", where=where, expected=expected)


class CounterfactualTraining(TracedReport[CounterfactualOptions]):
    """What scalars become when examples or terms of the update are left out or scaled."""

    command = "counterfactual-training"
    names = ("trace counterfactual",)
    Options = CounterfactualOptions
    of_recipes = True
    reads_batches = True
    panel = "Attribution"
    title = "Trainings in which something was otherwise"
    question = "What would the numbers have become without some examples, or some of the update?"

    def families(self) -> tuple[Scalars, ...]:
        return parse_words(self.options.scalars)

    def check(self) -> None:
        """Also reads the file: not as an option, for it may have gone when the report is drawn."""
        super().check()
        file = self.options.edits_file
        self.filed = {} if file is None else read_edits(file)
        self.options.check_labels(self.filed)
        if not self.options.edits and not self.filed:
            raise CircuitError("no edit", where="`edits_file`", expected=_ONE)

    def prepare(self) -> None:
        super().prepare()
        start, end = self.steps
        typed = dict(parse_edit(word, start, end) for word in self.options.edits)
        edits = typed | self.filed
        for label, edit in edits.items():
            if not start <= edit.start < edit.end <= end:
                raise CircuitError(
                    f"'{label}' is of steps {edit.start}:{edit.end}",
                    where="`edits`" if label in typed else "`edits_file`",
                    expected=f"steps within {start}:{end}",
                )
        # in the order of their starts, so that they share the replay up to them
        self.queue = sorted(edits.items(), key=lambda item: item[1].start)
        self.edits = {NULL: Edit(start, end), **dict(share(self.queue, self.options.part))}
        self.order = [NULL, *(label for label in edits if label in self.edits)]
        self._refuse_edits()

    def _refuse_edits(self) -> None:
        """Before the first is trained: what an edit names and there is not."""
        if not isinstance(self.run, ReplayedRun):
            return  # a recording, which refuses the first
        for label, edit in self.edits.items():
            try:
                self.run.check_edit(edit, self.steps[1])
            except CircuitError as error:
                raise CircuitError(
                    f"'{label}': {error.what}",
                    where=error.where or "`edits`",
                    expected=error.expected,
                    fix=error.fix,
                ) from error

    def trainings(self, part: str | None) -> list[int]:
        (start, end), edits = self.steps, [] if part is None else share(self.queue, part)
        return [end - start, *(end - edit.start for _, edit in edits)]

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
        folder = self.options.replays
        identity = self.identity(self.attributor.scalars, end)
        self.kept = None if folder is None else Replays(folder, identity)
        self.done = {} if self.kept is None else self.kept.read()
        yield from self.edits.items()

    def measure(self, point: tuple[str, Edit]) -> list[Row]:
        label, edit = point
        replay = None if label == NULL else self.done.get(key(edit))
        if replay is None:
            replay = self._train(label, edit)
        return [
            {
                "edit": label,
                "start_step": edit.start,
                "end_step": edit.end,
                "parts": {k: v for k, v in edit.to_json().items() if k not in ("start", "end")},
                "scalar": scalar.name,
                "actual": float(self.actual[at]),
                "value": replay.values[at],
                "change": replay.values[at] - float(self.actual[at]),
                "parameters_sha256": replay.state["parameters"],
            }
            for at, scalar in enumerate(self.attributor.scalars)
        ]

    def _train(self, label: str, edit: Edit) -> Replay:
        end, folder, run = self.steps[1], self.options.runs_dir, self.run
        try:
            if folder is None or label == NULL or not isinstance(run, ReplayedRun):
                state = run.counterfactual(edit, end)
            else:
                state = record_counterfactual(run, edit, end, folder / label)
            values = self.attributor.values(state.parameters, self.bound).tolist()
            replay = Replay(edit, tuple(values), state.stages())
        except DivergedError as error:
            raise CircuitError(
                f"'{label}': {error.what}",
                fix="leave the edit out, or take a factor that is less far from 1",
            ) from error
        if label == NULL:
            self.differ = _differing_bits(state, self.actual_end)
        if self.kept is not None and label != NULL:
            self.kept.add(replay)
        return replay

    def conclude(self, rows: list[Row]) -> Findings:
        (start, end), edits = self.steps, len(self.edits) - 1
        rows = sorted(rows, key=lambda row: self.order.index(row["edit"]))
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
            y=alt.Y("edit:N").title(None).sort(labels).axis(labelLimit=LABELS),
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
