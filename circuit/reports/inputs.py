"""What most reports read: a config, a probe set of its benchmark, checkpoints, pairs.

inputs = open_inputs(config, probe_set, splits=["validation_iid"])
for point in inputs.models([folder / "step_000250.pt", ...]):
    point.step, point.model, point.digest
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from circuit.errors import CircuitError
from circuit.folders import look_for_probe_set
from circuit.options import Half
from circuit.train_config import RecipeConfig

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from circuit.options import PairOptions
    from circuit.runs.base import Replayable
    from circuit.tasks.base import Record, Task, Vocabulary
    from circuit.tasks.benchmark import Benchmark
    from circuit.tasks.examples import Examples
    from circuit.tasks.pairs import Pair
    from circuit.tasks.probes import ProbeSet
    from circuit.trace.states import States
    from circuit.train_config import TrainConfig
    from circuit.training.checkpoints import TrainState
    from circuit.training.setup import Setup


@dataclass(frozen=True)
class Checkpointed:
    """A model at one checkpoint."""

    step: int
    path: Path
    digest: str
    """sha256 of the weights."""
    model: HookedTransformer


@dataclass(frozen=True)
class Inputs:
    """Probe records of a run's benchmark, and the way to the run's models.

    Attributes:
        setup: the run's config, with its benchmark.
        states: by the names of checkpoints.
        records: the probe records of the chosen splits, in file order.
        probe: None of a recording without a task, whose `task` is refused.
        run: the trace that is attributed, if one is.
    """

    setup: Setup
    states: States
    probe: ProbeSet | None
    records: list[Record]
    splits: tuple[str, ...] | None
    run: Replayable | None = None
    _pairs: dict[tuple[tuple[str, ...], int | None, int], list[Pair]] = field(
        default_factory=dict, repr=False
    )

    @property
    def config(self) -> TrainConfig:
        """Of the run."""
        return self.setup.config

    @property
    def benchmark(self) -> Benchmark:
        """Of the run."""
        return self.setup.benchmark

    @property
    def task(self) -> Task:
        """Of the benchmark."""
        return self.benchmark.task

    @property
    def vocabulary(self) -> Vocabulary:
        """Tokens of the benchmark."""
        return self.task.vocabulary

    @cached_property
    def batch(self) -> Examples:
        """Every read of the records, on the config's device."""
        return self.reads()

    def reads(self, max_records: int | None = None) -> Examples:
        """The first `max_records` reads (all by default) in file order, and the rows they need."""
        self.setup.prepare()
        encoded = self.task.split(self.records)
        batch = encoded.batch()
        if max_records is not None and max_records < len(batch):
            rows = int(batch.row[max_records - 1]) + 1
            batch = encoded.batch(range(rows))
            batch = batch.select(batch.index.new_ones(len(batch)).cumsum(0) <= max_records)
        return batch.to(self.config.device)

    def pairs(self, options: PairOptions) -> list[Pair]:
        """Pairs of the records (definitions.md section 2), built once.

        Raises:
            CircuitError: too few of a type, with the reasons.
        """
        from circuit.tasks.pairs import build_pairs

        types = options.pair_types
        most, least = options.most_pairs_per_type, options.min_pairs_per_type
        if (types, most, least) not in self._pairs:
            built = build_pairs(
                self.task,
                self.records,
                types=types,
                max_per_type=most,
                min_per_type=least,
            )
            self._pairs[types, most, least] = list(built.pairs)
        return self._pairs[types, most, least]

    def side(self, pairs: Sequence[Pair], side: str) -> Examples:
        """One side of pairs: read `i` of the batch is that of pair `i`."""
        from circuit.tasks.pairs import pair_batch

        self.setup.prepare()
        batch = pair_batch(self.task, pairs, side)
        return batch.to(self.config.device)

    def models(self, checkpoints: Sequence[Path], *, finite: bool = True) -> Iterator[Checkpointed]:
        """The model at each checkpoint, ascending by step.

        One model is loaded again and again: use it before asking for the next.

        Args:
            finite: refuse weights that are not finite, of which most numbers cannot be taken.

        Raises:
            CircuitError: a checkpoint is missing, damaged, of another config or benchmark, or of
                the step of another; or it holds weights that are not finite.
        """
        return models_at(self.setup, self.states, checkpoints, finite=finite)

    def point(self, step: int) -> Checkpointed:
        """A step of the trace that is attributed, with a model of its own.

        Raises:
            CircuitError: the step does not replay.
        """
        from circuit.core.digests import tensors_digest
        from circuit.training.checkpoints import checkpoint_name

        assert self.run is not None, "only a report on a trace asks for its steps"
        digest = tensors_digest(self.run.state(step).parameters)
        path = self.run.path / "checkpoints" / checkpoint_name(step)
        model = cast("HookedTransformer", self.run.model(step))
        return Checkpointed(step, path, digest, model)

    def provenance(self) -> dict[str, Any]:
        """Digests of what was read, and the config's overrides."""
        if self.probe is None:
            return self.config.provenance(None)
        return {
            **self.config.provenance(self.benchmark.digest),
            "probe_set_sha256": self.probe.metadata.sha256,
            "slice": self.task.slice_name,
        }


def models_at(
    setup: Setup, states: States, checkpoints: Sequence[Path], *, finite: bool = True
) -> Iterator[Checkpointed]:
    """The model at each checkpoint, ascending by step; see `Inputs.models`."""
    from circuit.core.digests import tensors_digest
    from circuit.model.weights import load_tensors

    model: HookedTransformer | None = None
    for path, state in states_at(setup, states, checkpoints, finite=finite):
        if model is None:
            model = setup.model(state)
        else:
            load_tensors(model, state.parameters)
        yield Checkpointed(state.step, path, tensors_digest(state.parameters), model)


def states_at(
    setup: Setup, states: States, checkpoints: Sequence[Path], *, finite: bool = True
) -> Iterator[tuple[Path, TrainState]]:
    """The state at each checkpoint, ascending by step: weights by name, without a model.

    Args, Raises:
        as `Inputs.models`.
    """
    check_headers(setup, states, checkpoints)
    for path in _by_step(checkpoints):
        state = states.state(path)
        if finite:
            check_finite(state, path)
        setup.prepare()  # a trace replays with threads of its own
        yield path, state


def check_headers(setup: Setup, states: States, checkpoints: Sequence[Path]) -> None:
    """Refuse checkpoints of another run by what they say of themselves, before any is read.

    Raises:
        CircuitError: one is missing, truncated, of another config or benchmark, or of the step of
            another.
    """
    for path in _by_step(checkpoints):
        setup.check(states.header(path))


def open_inputs(
    config: TrainConfig,
    probe_set: str | Path,
    *,
    splits: Sequence[str] | None = None,
    half: Half | None = None,
    checkpoints: Sequence[Path] = (),
) -> Inputs:
    """Read what a report needs besides the weights; nothing here needs torch.

    Args:
        splits: of the probe records; None takes all.
        half: of the probe set's records; None takes both.
        checkpoints: that the report will read, whose headers are checked.

    Raises:
        CircuitError: a file is missing or damaged, the probe set is of another benchmark, or holds
            no record of a split or half; or as `check_headers`.
    """
    look_for_probe_set(probe_set)
    from circuit.training.recipe_setup import setup_of

    inputs = _inputs(setup_of(config, probe_set), probe_set, splits, half)
    check_headers(inputs.setup, inputs.states, checkpoints)
    return inputs


def traced_inputs(
    config: TrainConfig,
    probe_set: Path | None,
    run: Replayable,
    splits: Sequence[str] | None = None,
    half: Half | None = None,
) -> Inputs:
    """The inputs of a report on a trace, with the trace's config and the recording's threads.

    Of the given config the overrides stay, for the record; what else it says beside the recipe
    decides nothing here, and no digest knows it, so that shards merge.

    Raises:
        CircuitError: config or probe set belong to another run than the trace.
    """
    from circuit.trace.states import States
    from circuit.training.recipe_setup import setup_of

    _refuse_another(config, run)
    if probe_set is None:
        return Inputs(run.setup, States(run.setup), None, [], None, run)
    setup = setup_of(config, probe_set)
    if setup.benchmark.digest != run.benchmark_digest:
        raise CircuitError(
            f"the benchmark in {config.benchmark_dir} is not the one that was traced",
            where=run.path,
        )
    run.share(setup)
    threads = run.environment["threads"]
    recorded = run.config.replace(threads=threads).remembering(config)
    return replace(_inputs(setup.with_config(recorded), probe_set, splits, half), run=run)


@dataclass(frozen=True)
class RecipeInputs:
    """What scalars of a recipe's run are made of: functions of its module, and no task.

    Attributes:
        config: of the run, which names the code.
        run: the trace.
    """

    config: RecipeConfig
    run: Replayable

    def provenance(self) -> dict[str, Any]:
        """Digests of what was read, and the config's overrides."""
        return self.config.provenance(self.config.recipe.sha256)


def recipe_inputs(config: RecipeConfig, run: Replayable) -> RecipeInputs:
    """The same of a recipe's run, whose code the config names; see `traced_inputs`.

    Raises:
        CircuitError: config or device are not those of the trace; or nobody has named the code.
    """
    from circuit.training.recipe_setup import setup_of

    _refuse_another(config, run)
    run.share(setup_of(run.config.executing(config.code), run.path))
    run.setup.recipe()
    threads = run.environment["threads"]
    recorded = run.config.replace(threads=threads).remembering(config)
    assert isinstance(recorded, RecipeConfig), "it has this recipe"
    return RecipeInputs(recorded, run)


def _refuse_another(config: TrainConfig, run: Replayable) -> None:
    """Refuse a config that is not the trace's, and another device."""
    difference = config.recipe_difference(run.config)
    if difference is not None:
        raise CircuitError(
            f"config {config.name} is not that of the trace: {difference}",
            where=run.path,
            fix="pass the run_config.json of the traced run",
        )
    if config.device != run.config.device:
        raise CircuitError(
            f"device '{config.device}', but the trace was recorded on '{run.config.device}'",
            where=run.path,
            fix="replay is exact on the recording's device only; leave `device` out",
        )


def _inputs(
    setup: Setup,
    probe_set: str | Path,
    splits: Sequence[str] | None = None,
    half: Half | None = None,
) -> Inputs:
    from circuit.tasks.probes import read_probe_set
    from circuit.trace.states import States

    probe = read_probe_set(probe_set, setup.benchmark)
    held = list(probe.metadata.counts)
    for split in splits or ():
        if split not in held:
            raise CircuitError(
                f"the probe set holds no record of split '{split}'",
                where=probe_set,
                expected=f"one of {', '.join(held)}",
            )
    records = [r for r in halved(probe.records, half) if splits is None or r.split in splits]
    if not records:
        raise CircuitError(f"no record is in the {half} half", where=probe_set)
    setup.require_reading_memory(records, where=probe_set)
    return Inputs(setup, States(setup), probe, records, None if splits is None else tuple(splits))


def halved(records: Sequence[Record], half: Half | None) -> Sequence[Record]:
    """One half of a probe set's records: every other one, by their order in the file.

    A copy goes with the record that it is a copy of, so that the halves share no stream; and the
    splits that are asked for do not matter.
    """
    if half is None:
        return records
    numbers: dict[str, int] = {}
    for record in records:
        numbers.setdefault(record.source_id or record.sample_id, len(numbers))
    kept = get_args(Half).index(half)
    return [r for r in records if numbers[r.source_id or r.sample_id] % 2 == kept]


def choose_checkpoints(
    checkpoints: Sequence[Path] | None, checkpoint_dir: Path | None, *, least: int = 1
) -> list[Path]:
    """The checkpoints that a command line names, or all of a folder; ascending by step.

    Raises:
        CircuitError: there are fewer than `least`, two are of one step, or one whose name does not
            tell its step is missing or damaged.
    """
    from circuit.training.checkpoints import list_checkpoints

    chosen = list(checkpoints or ())
    if not chosen and checkpoint_dir is not None:
        chosen = list(list_checkpoints(checkpoint_dir).values())
    if len(chosen) < least:
        raise CircuitError(
            f"{len(chosen)} checkpoints",
            where=checkpoint_dir,
            expected=f"at least {least}",
            fix="name some with `checkpoints`, or give a `checkpoint_dir` that holds some",
        )
    return _by_step(chosen)


def _by_step(checkpoints: Sequence[Path]) -> list[Path]:
    """Checkpoints ascending by the step that their name tells, or else the file."""
    from circuit.training.checkpoints import checkpoint_step, read_description

    found: dict[int, Path] = {}
    for path in checkpoints:
        step = checkpoint_step(path)
        if step is None:
            step = read_description(path).step
        if step in found:
            raise CircuitError(
                f"is of step {step}, as is {found[step]}",
                where=path,
                expected="one checkpoint a step, named once",
            )
        found[step] = path
    return [found[step] for step in sorted(found)]


def check_finite(state: TrainState, path: Path) -> None:
    """Refuse a state that is not finite.

    Raises:
        CircuitError: the checkpoint and the first such tensor are named.
    """
    if state.not_finite is not None:
        raise CircuitError(
            f"{state.not_finite} are not finite at step {state.step}: the run diverged",
            where=path,
            fix="choose checkpoints before it did",
        )
