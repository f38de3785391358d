"""What every report on the steps of a trace is: scalars of families, over a window of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from circuit.core.paths import RULES, path_rule
from circuit.errors import CircuitError
from circuit.options import Half, Option, ProbeOptions
from circuit.reports.report import Report, Results
from circuit.scalars.family import OwnScalars, ScalarFamily, parse_scalars
from circuit.train_config import RecipeConfig, RecordedConfig, TrainConfig

if TYPE_CHECKING:
    from circuit.reports.inputs import Inputs, RecipeInputs
    from circuit.runs.base import Replayable
    from circuit.scalars.base import Scalar

Scalars = ScalarFamily | OwnScalars
ScalarWords = Annotated[
    tuple[str, ...],
    Option(
        "name[,key=value...]: qk_match, functional_write, answer_scalar, loss, induction,"
        " modular_addition, or FILE.py:NAME of your own.",
        flag="--scalar",
        kind="scalar",
    ),
]
"""Scalars by their words (circuit/scalars/family.py)."""


class TracedOptions(ProbeOptions):
    """Which steps of which trace.

    Attributes:
        start_step, end_step: states that the steps take one to the other; the trace's ends.
    """

    optimizer_trace_dir: Annotated[
        Path, Option("Folder of a trace, or of an imported recording.", kind="trace")
    ]
    start_step: Annotated[
        int | None, Option("First state.", least=0, unset="the trace's first")
    ] = None
    end_step: Annotated[int | None, Option("Last state.", least=1, unset="the trace's last")] = None

    def within(self, trace: Replayable) -> tuple[int, int]:
        """The steps in a trace; all of it by default.

        Raises:
            CircuitError: they are not recorded.
        """
        start = trace.first_step if self.start_step is None else self.start_step
        end = trace.last_step if self.end_step is None else self.end_step
        trace.check_window(start, end)
        return start, end


class PathOptions(TracedOptions):
    """How gradients are averaged along the steps."""

    path: Annotated[
        str,
        Option(
            f"How gradients are averaged along a step: {RULES}.",
            kind="path_rule",
        ),
    ] = "simpson"

    def check(self) -> None:
        """The path rule has a form."""
        super().check()
        path_rule(self.path)


@dataclass(frozen=True)
class TracedScalars:
    """The scalars of some families on a trace (a `ScalarSource`)."""

    config: TrainConfig
    probe_set: Path | None
    families: tuple[Scalars, ...]
    splits: tuple[str, ...] = ()
    half: Half | None = None

    def inputs(self, run: Replayable) -> Inputs | RecipeInputs:
        """What they are made of, after what the trace does not have is refused.

        Raises:
            CircuitError: names the step; or config or probe set are of another run, or there is
                none.
        """
        from circuit.reports.inputs import recipe_inputs, traced_inputs

        if isinstance(self.config, RecipeConfig):
            return recipe_inputs(self.config, run)
        if self.probe_set is None and self.config.benchmark_dir is not None:
            raise CircuitError("is missing", where="`probe_set`")
        for family in self.families:
            family.check_run(run)
        splits = self.splits or None
        inputs = traced_inputs(self.config, self.probe_set, run, splits=splits, half=self.half)
        for family in self.families if inputs.probe is not None else ():
            family.check_task(inputs.task)
        return inputs

    def scalars(self, inputs: Inputs | RecipeInputs) -> list[Scalar]:
        """All of them, family by family."""
        from circuit.reports.inputs import RecipeInputs

        if isinstance(inputs, RecipeInputs):
            return [family.measure() for family in self.families]
        return [scalar for family in self.families for scalar in family.build(inputs)]


T = TypeVar("T", bound=TracedOptions)


class TracedReport(Report[T]):
    """Follows scalars over a window of a trace.

    Attributes:
        reads_batches: whether it takes steps again, with what they read; a recording has no batch.
        run: the trace.
        source: of the scalars, which are made of `inputs`.
        origin: provenance.
    """

    reads_batches: ClassVar[bool] = False
    every = True
    run: Replayable
    source: TracedScalars
    inputs: Inputs | RecipeInputs
    origin: Mapping[str, Any]

    def families(self) -> Sequence[Scalars]:
        """What is followed."""
        raise NotImplementedError

    def trainings(self, part: str | None) -> Sequence[int]:
        """After `prepare`, of a worker with this part of them: the steps of each of its trainings.

        Args:
            part: None where workers have done all parts, and one gathers.

        Returns:
            Nothing where this is known later.
        """
        return ()

    def scalar_facts(self, inputs: Any) -> dict[str, Any]:
        """What the families say of what they read."""
        return {"scalars": [family.provenance(inputs) for family in self.followed]}

    def check(self) -> None:
        if self.reads_batches and isinstance(self.config, RecordedConfig):
            from circuit.runs.recorded_step import refused_without

            raise refused_without("batch", f"run {self.config.name}")
        super().check()
        if self.recipe:
            from circuit.training.recipe_setup import setup_of

            setup_of(self.config).recipe()  # before scalars, which may import its file
        self.followed = tuple(self.families())
        for family in self.followed:
            if self.recipe:
                family.measure()
            elif self.config.shape is not None or not family.any_module:
                family.check_model(self.config.model)

    def prepare(self) -> None:
        from circuit.runs.opening import open_steps

        asked = self.options
        self.run = trace = open_steps(asked.optimizer_trace_dir)
        start, end = asked.within(trace)
        self.options = asked.model_copy(update={"start_step": start, "end_step": end})
        self.source = TracedScalars(
            self.config, asked.probe_set, self.followed, asked.splits, asked.half
        )
        self.inputs = self.source.inputs(trace)
        of_task = {"benchmark_digest": trace.benchmark_digest} if trace.benchmark_digest else {}
        self.origin = {
            **self.inputs.provenance(),
            **self.scalar_facts(self.inputs),
            "trace": {
                "config_digest": trace.config.digest(),
                **of_task,
                "state_at_start": trace.state_digests(start),
                "state_at_end": trace.state_digests(end),
                "environment": dict(trace.environment),
            },
        }

    @property
    def steps(self) -> tuple[int, int]:
        """The states at the ends of the window, as `prepare` has set them."""
        start, end = self.options.start_step, self.options.end_step
        assert start is not None, "prepare() has set it"
        assert end is not None, "prepare() has set it"
        return start, end

    @property
    def total(self) -> int:
        start, end = self.steps
        return end - start

    def provenance(self) -> dict[str, Any]:
        return dict(self.origin)

    @classmethod
    def about(cls, results: Results[T]) -> str:
        """The window."""
        return "steps {start_step}:{end_step}".format_map(results.summary)

    def identity(self, scalars: Sequence[Scalar], end: int) -> dict[str, Any]:
        """Of which scalars, in which run, values of trainings to state `end` are."""
        aside = ("overrides", "config_digest", "trace")  # what it is called, which window is asked
        told = {name: fact for name, fact in self.origin.items() if name not in aside}
        of = {"of": [scalar.name for scalar in scalars], "state": self.run.state_digests(end)}
        # a name does not tell all that a word does, nor which records are read
        asked = self.options.model_dump(
            mode="json", include={"scalars", "splits", "half"}, exclude_none=True
        )
        return {**told, **of, **asked}

    @property
    def device(self) -> str:
        return str(self.origin["trace"]["environment"]["device"])


class WordOptions(TracedOptions):
    """A window of a trace, and scalars by their words.

    Attributes:
        probe_set: None of a run of a recipe or a recording without a task, whose scalars are
            functions of its module.
    """

    probe_set: Annotated[
        Path | None,
        Option(
            "Probe set (JSONL).",
            kind="probe_set",
            unset="none, for a run of a recipe or a recording without a task,",
        ),
    ] = None  # type: ignore[assignment]
    scalars: ScalarWords

    def check(self) -> None:
        """Also refuses a word that says nothing."""
        super().check()
        parse_words(self.scalars)


def parse_words(words: Sequence[str]) -> tuple[Scalars, ...]:
    """What the words of `--scalar` say.

    Raises:
        CircuitError: one says nothing.
    """
    return tuple(map(parse_scalars, words))
