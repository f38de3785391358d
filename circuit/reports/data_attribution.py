"""data-attribution: methods that score training examples, held against trainings without some.

data_attribution_rows.jsonl       a row a window, share, scalar and method: its score
data_attribution_trainings.jsonl  a row a training and scalar: what was removed, what came of it

The folder of `replays` keeps what was done, window by window: the trainings (`replays.jsonl`) and
the scores of each method (`<method>.npz`, circuit/attribution/scores.py) with their `costs.json`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from circuit.artifacts import Row
from circuit.attribution.replays import Replay, Replays, key, share
from circuit.attribution.scores import Scores, lds, read_scores, write_scores
from circuit.attribution.series import check_windows
from circuit.attribution.window import attributor_of
from circuit.core.edit import Edit
from circuit.core.state import FlatState
from circuit.errors import CircuitError
from circuit.figures.charts import Chart
from circuit.figures.data import lds_chart
from circuit.lazy import np
from circuit.options import Option, parse_window
from circuit.quoting import markdown_text
from circuit.reports.data_scores import METHODS, TRAINING, Seen, Studied, Window
from circuit.reports.report import Findings, Results
from circuit.reports.tables import Table
from circuit.reports.traced import Scalars, TracedReport, WordOptions, parse_words
from circuit.sizes import require_memory
from circuit.trace.replay import ReplayedRun
from circuit.training.recipe import TaskRecipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from circuit.scalars.base import BoundScalar, Scalar

TRAININGS = "data_attribution_trainings.jsonl"
LEAVE_ONE_OUT, RANDOM = "leave_one_out", "random"
ALL = (*METHODS, LEAVE_ONE_OUT, RANDOM)
UNITLESS = ("tracin", "gradient_dot", "trak", RANDOM)
"""Methods whose scores are no changes of the scalar: their size depends on who else is scored."""


class AttributionOptions(WordOptions):
    """Windows of a trace, sets of their examples, and the methods that are judged."""

    replays: Annotated[
        Path,
        Option(
            "Folder that keeps trainings and scores; another start does what is missing.",
            folder=True,
        ),
    ]
    windows: Annotated[
        tuple[str, ...],
        Option(
            "States A:B; examples are removed from A on, and scalars are of state B.",
            flag="--window",
            unset="all of the trace",
        ),
    ] = ()
    subsets: Annotated[int, Option("Random sets, of each window and share.", least=3)] = 100
    shares: Annotated[
        tuple[float, ...],
        Option("Share of the scored examples that a set takes away.", flag="--share"),
    ] = (0.01, 0.05, 0.2)
    examples: Annotated[
        int | None,
        Option("How many random examples of a window are scored.", least=3, unset="all"),
    ] = None
    methods: Annotated[tuple[str, ...], Option("What is judged.", flag="--method", choices=ALL)] = (
        ALL
    )
    scores: Annotated[
        tuple[Path, ...], Option("Files of scores by other methods, judged, too.", kind="scores")
    ] = ()
    random_vectors: Annotated[int, Option("Random scores, as the null.", least=1)] = 10
    seed: Annotated[int, Option("Of examples, sets and random scores.", least=0)] = 17
    part: Annotated[
        str, Option("Only every n-th training from the i-th on, i/n, for one of n workers.")
    ] = "1/1"

    def check(self) -> None:
        """Also refuses windows, shares and parts that are none."""
        super().check()
        for one in self.windows:
            parse_window(one, "`windows`")
        for part in self.shares:
            if not 0 < part < 1:
                raise CircuitError(
                    f"{part:g}", where="`shares`", expected="more than 0, less than 1"
                )
        share([], self.part)


class DataAttribution(TracedReport[AttributionOptions]):
    """Which scores of training examples tell what happens without them: LDS, with intervals."""

    command = "data-attribution"
    names = ("study data-attribution",)
    Options = AttributionOptions
    reads_batches = True
    panel = "Attribution"
    title = "Scores of training examples, held against trainings"
    question = "Which method tells what would have happened without some of the examples?"

    def families(self) -> tuple[Scalars, ...]:
        return parse_words(self.options.scalars)

    def prepare(self) -> None:
        super().prepare()
        start, end = self.steps
        words = self.options.windows or (f"{start}:{end}",)
        self.pairs = [parse_window(word, "`windows`") for word in words]
        check_windows(self.pairs, start, end)
        self.theirs = [read_scores(path) for path in self.options.scores]
        for scores in self.theirs:
            if scores.window not in self.pairs:
                there, *told = (f"{a}:{b}" for a, b in (scores.window, *self.pairs))
                raise CircuitError(
                    f"scores of {scores.method} are of window {there}",
                    where="`scores`",
                    expected=f"one of {', '.join(told)}",
                )
        self._refuse_twice()
        self.work = 0
        self.studied: list[Studied] = []
        self.bound: dict[int, list[BoundScalar]] = {}

    def _refuse_twice(self) -> None:
        """Refuse two scores of one name, which would count as one method's draws."""
        for pair in self.pairs:
            names = [*self.options.methods, *(s.method for s in self.theirs if s.window == pair)]
            for name in names:
                if names.count(name) > 1:
                    raise CircuitError(
                        f"'{name} of {pair[0]}:{pair[1]}' twice",
                        where="`scores`",
                        expected="another method of each file, and none that `methods` has",
                    )

    @property
    def total(self) -> int:
        return self.work

    def points(self) -> Iterator[tuple[Studied, Edit | str]]:
        self.tell("building the scalars")
        scalars = self.source.scalars(self.inputs)
        self.attributor = attributor_of(self.run, scalars)
        self.studied = [self._study(scalars, *pair) for pair in self.pairs]
        work = [(one, edit) for one in self.studied for edit in self._missing(one)]
        alone = self.options.part == "1/1"
        methods = [name for name in METHODS if alone and name in self.options.methods]
        scored: list[tuple[Studied, Edit | str]] = [
            (one, method) for one in self.studied for method in methods
        ]
        self.work = len(work) + len(scored)
        yield from scored
        yield from work

    def _study(self, scalars: list[Scalar], start: int, end: int) -> Studied:
        asked = self.options
        run = self.run
        recipe = run.setup.recipe() if isinstance(run, ReplayedRun) else None
        if not (isinstance(run, ReplayedRun) and isinstance(recipe, TaskRecipe)):
            raise CircuitError(
                "the examples of a recipe, or of a training with an edit, are scored by no method",
                where=run.path,
                expected="the trace of a run of a task",
            )
        seen = Seen.within(recipe, start, end)
        random = np.random.default_rng([asked.seed, start, end])
        names = np.array(sorted(seen.numbers))
        if asked.examples is not None and asked.examples < len(names):
            names = np.sort(random.choice(names, asked.examples, replace=False))
        for what, number in (("subsets", asked.subsets), ("random_vectors", asked.random_vectors)):
            drawn = number * len(names) * 8 * max(len(asked.shares), len(scalars))
            require_memory({f"what is drawn ({what}, examples)": drawn})
        sets = {}
        for part in asked.shares:
            count = max(1, round(part * len(names)))
            there_are = math.comb(len(names), count)
            if there_are < asked.subsets:
                raise CircuitError(
                    f"{asked.subsets} sets of {count} of {len(names)} examples, of which there are"
                    f" {there_are}",
                    where="`subsets`",
                    fix="score more examples, or give a larger share",
                )
            sets[part] = np.zeros((asked.subsets, len(names)), dtype=bool)
            for removed in sets[part]:
                removed[random.choice(len(names), count, replace=False)] = True
        window = Window(run, scalars, start, end, seen, names.tolist())
        state = FlatState.of(self.run.state(end)).parameters
        self.bound[end] = self.attributor.bind(state)
        values = self.attributor.values(state, self.bound[end]).tolist()
        folder = asked.replays / f"{start}_{end}"
        # which examples are left out is told by each row; so more of them may be added later
        kept = Replays(folder, self.identity(scalars, end))
        studied = Studied(window, folder, {}, sets, kept, tuple(values))
        if LEAVE_ONE_OUT in asked.methods:
            studied.loo = {name: studied.edit([name]) for name in window.names}
        return studied

    def _missing(self, one: Studied) -> list[Edit]:
        """The trainings of this worker that are to be done, in the order of their starts."""
        ordered = sorted(one.every().items(), key=lambda item: item[1].start)
        done = one.kept.read()
        return [edit for name, edit in share(ordered, self.options.part) if name not in done]

    def measure(self, point: tuple[Studied, Edit | str]) -> list[Row]:
        one, what = point
        began = time.process_time()
        if isinstance(what, str):
            path, window = one.folder / f"{what}.npz", one.window
            if not path.exists() or set(read_scores(path).examples) != set(window.names):
                scores = METHODS[what](window)
                names = tuple(window.names)
                one.spent(what, time.process_time() - began)  # what is kept has a cost
                write_scores(path, Scores(what, window.scalar_names, names, window.pair, scores))
            return []
        state = self.run.counterfactual(what, one.window.end)
        values = self.attributor.values(state.parameters, self.bound[one.window.end])
        steps = one.window.end - what.start
        whole = (one.window.end - one.window.start) / steps
        one.spent(TRAINING, (time.process_time() - began) * whole)
        one.kept.add(Replay(what, tuple(values.tolist()), state.stages()))
        return []

    # --- what it says ---

    def conclude(self, rows: list[Row]) -> Findings:
        trainings: list[Row] = []
        count = missing = 0
        for one in self.studied:
            done = one.kept.read()
            asked = one.every()
            count += len(asked)
            missing += sum(name not in done for name in asked)
            if not missing and self.options.part == "1/1":
                every = {part: one.edits(part) for part in one.sets}
                changes = {
                    part: np.array([done[key(edit)].values for edit in edits]) - one.actual
                    for part, edits in every.items()
                }
                rows += self._judged(one, self._scores(one, done), changes)
                trainings += self._trainings(one, every, changes)
        summary = {
            "trainings": count,
            "missing": missing,
            "windows": [one.label for one in self.studied],
            "scalars": [scalar.name for scalar in self.attributor.scalars],
            "lead": self.attributor.scalars[0].name,
        }
        return Findings(rows, summary, self._law(rows, count, missing), {TRAININGS: trainings})

    def _law(self, rows: list[Row], count: int, missing: int) -> str:
        if not rows:
            return (
                f"{count - missing} of {count} trainings are done; a start without `part` does"
                " those that are missing, and judges"
            )
        null = [abs(row["lds"]) for row in rows if row["method"] == RANDOM and row["lds"]]
        told = f"; random scores reach {max(null):.2f}" if null else ""
        fewest = min(
            len(np.unique(removed, axis=0)) for one in self.studied for removed in one.sets.values()
        )
        drawn = self.options.subsets
        different = f" (at least {fewest} different)" if fewest < drawn else ""
        return (
            f"{count} trainings without some examples, {drawn} sets{different} of each window and"
            f" share{told}"
        )

    def _scores(self, one: Studied, done: dict[str, Replay]) -> list[Scores]:
        """By every method, of the scored examples."""
        names, asked = tuple(one.window.names), self.options
        scalars, pair = one.window.scalar_names, one.window.pair
        scores = [read_scores(one.folder / f"{m}.npz") for m in METHODS if m in asked.methods]
        if one.loo:
            values = np.array([done[key(one.loo[name])].values for name in names])
            alone = Scores(LEAVE_ONE_OUT, scalars, names, pair, (one.actual - values).T)
            write_scores(one.folder / f"{LEAVE_ONE_OUT}.npz", alone)
            scores.append(alone)
        scores += [theirs for theirs in self.theirs if theirs.window == pair]
        if RANDOM in asked.methods:
            random = np.random.default_rng([asked.seed, *pair, 1])
            shape = (len(scalars), len(names))
            for _ in range(asked.random_vectors):
                drawn = random.standard_normal(shape)
                scores.append(Scores(RANDOM, scalars, names, pair, drawn))
        of = [theirs.of(scalars, names) for theirs in scores]
        return [
            replace(theirs, scalars=scalars, examples=names, scores=values)
            for theirs, values in zip(scores, of, strict=True)
        ]

    def _judged(
        self, one: Studied, scores: list[Scores], changes: dict[float, NDArray[np.float64]]
    ) -> Iterator[Row]:
        for part, removed in one.sets.items():
            for at, scalar in enumerate(self.attributor.scalars):
                actual = changes[part][:, at]
                for theirs in scores:
                    judged = lds(theirs.scores[at], removed, actual, seed=self.options.seed)
                    yield {
                        "window": one.label,
                        "share": part,
                        "removed": int(removed[0].sum()),
                        "sets": len(removed),
                        "scalar": scalar.name,
                        "actual_spread": float(actual.std()),
                        "method": theirs.method,
                        "lds": judged.value,
                        "low": judged.low,
                        "high": judged.high,
                        "spread": None if theirs.method in UNITLESS else judged.spread,
                    }

    def _trainings(
        self,
        one: Studied,
        edits: dict[float, list[Edit]],
        changes: dict[float, NDArray[np.float64]],
    ) -> Iterator[Row]:
        for part, of in edits.items():
            for edit, change in zip(of, changes[part].tolist(), strict=True):
                yield {
                    "window": one.label,
                    "share": part,
                    "start_step": edit.start,
                    "examples": list(edit.examples),
                    "changes": change,
                }

    def provenance(self) -> dict[str, Any]:
        """With the cost of the methods, in trainings over the window."""
        costs = {one.label: one.costs() for one in self.studied}
        return {**super().provenance(), "costs": costs}

    # --- what is shown ---

    @classmethod
    def about(cls, results: Results[AttributionOptions]) -> str:
        return f"steps {', '.join(results.summary['windows'])}"

    @classmethod
    def notes(cls, results: Results[AttributionOptions]) -> list[str]:
        lead = markdown_text(results.summary["lead"])
        others = len({row["scalar"] for row in results.rows()}) > 1
        return [
            *([f"Table and charts are of {lead}; the rows have every scalar."] * others),
            "The linear datamodeling score (LDS) is the Spearman correlation, over random sets of"
            " examples, between minus the sum of their scores and the change of the scalar in a"
            " training without them; its interval, of 95 %, is over resampled sets. Random scores"
            " are the null.",
            "Credit says who has moved the scalar, influence what a small change of a weight would"
            " do, leave-one-out what does happen without one example: three questions. `spread` is"
            " the standard deviation that a method predicts over that of the trainings; the other"
            " methods order examples, in no unit.",
        ]

    @classmethod
    def tables(cls, results: Results[AttributionOptions]) -> list[Table]:
        columns: dict[str, Any] = {"window": "window", "share": ("share", ".3g")}
        columns |= {"removed": "removed", "method": "method"}
        columns |= {name: (name, "+.2f") for name in ("lds", "low", "high")}
        columns["spread"] = ("spread", ".2g")
        title = f"LDS of the scores of {results.summary['lead']}"
        rows = _of_lead(results)
        return [Table(title, columns, rows, console=len(rows))]

    @classmethod
    def charts(cls, results: Results[AttributionOptions]) -> list[Chart]:
        lead = markdown_text(results.summary["lead"])
        charts, rows = [], _of_lead(results)
        for window in dict.fromkeys(row["window"] for row in rows):
            name = f"lds_{window.replace(':', '_')}"
            title = f"LDS of the scores of {lead}, examples removed in steps {window}"
            charts.append(lds_chart(name, title, [row for row in rows if row["window"] == window]))
        return charts


def _of_lead(results: Results[AttributionOptions]) -> list[Row]:
    """The scores of the first scalar; of the random ones the median, and what they reach."""
    of: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows():
        if row["scalar"] == results.summary["lead"] and row["lds"] is not None:
            place = (row["window"], row["share"], row["removed"], row["method"])
            of.setdefault(place, []).append(row)
    rows: list[Row] = []
    for (window, part, removed, method), judged in of.items():
        values = sorted(row["lds"] for row in judged)
        one = {"window": window, "share": part, "removed": removed, "method": method}
        if len(judged) == 1:
            one |= {name: judged[0][name] for name in ("lds", "low", "high", "spread")}
        else:
            one["method"] = f"{method}, {len(judged)} vectors"
            one |= {"lds": median(values), "low": values[0], "high": values[-1]}
            one["spread"] = None
        rows.append(one)
    return rows
