"""What a config names, read and built once: the benchmark, encoded splits, the model.

A run, its trace and every report on them share one `Setup`; a model of a state is a copy of the
one that was built.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from circuit.core.module import evaluated
from circuit.environment import prepare_process
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.lazy import torch
from circuit.model.kinds import build
from circuit.model.layout import bridge_config, standard_bridge_tensors
from circuit.model.weights import load_tensors
from circuit.sizes import (
    reading_memory,
    require_memory,
    saved_bytes,
    training_memory,
    weights_memory,
)
from circuit.tasks.base import Record
from circuit.tasks.benchmark import Benchmark, find_benchmark, load_benchmark
from circuit.tasks.examples import Split, Stream
from circuit.train_config import ImportedConfig, ModelConfig, RecordedConfig, TrainConfig
from circuit.training.checkpoints import StateHeader, TrainState
from circuit.training.evaluate import BATCH
from circuit.training.own_module import named_module, refuse_changed_files

if TYPE_CHECKING:
    from torch import nn
    from transformer_lens import HookedTransformer

    from circuit.training.recipe import Recipe


NO_BENCHMARK = "none"
"""In place of a benchmark's digest, of a recording without a task."""


class Setup:
    """A config with what it names.

    Attributes:
        config: of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        near: str | Path | None = None,
        *,
        benchmark: Benchmark | None = None,
        benchmark_digest: str | None = None,
        module: nn.Module | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            config: of the run.
            near: the benchmark is looked for above this place, then above the working directory; by
                default above the run, or, of one that does not stand there yet, where the config
                is used.
            benchmark: where it has been read already.
            benchmark_digest: that it has to have, where a run or trace has recorded it.
            module: of a recording, where it is there already.
        """
        self.config = config
        stands = (Path(config.output_dir) / RUN_CONFIG).exists()
        self.near = Path(near or (config.output_dir if stands else RUN_CONFIG))
        self._digest = benchmark_digest or config.expected_benchmark
        # in containers, so that a copy with another config shares also what is built later
        self._splits: dict[str, Split] = {}
        self._streams: dict[tuple[str, int], Stream] = {}
        self._benchmark = [] if benchmark is None else [benchmark]
        self._model: list[HookedTransformer] = []
        if module is not None:
            self._model.append(cast("HookedTransformer", evaluated(module)))

    def with_config(self, config: TrainConfig) -> Setup:
        """The same with another config of the same recipe; what is built is shared."""
        copied = copy.copy(self)
        copied.config = config
        if config.device != self.config.device:
            copied._model = []
        return copied

    def is_of(self, config: TrainConfig, benchmark_digest: str) -> bool:
        """Whether a run with this recipe on this benchmark is the same run."""
        same = self.config.recipe_difference(config) is None
        return same and self.digest == benchmark_digest

    @property
    def digest(self) -> str:
        """Of what the examples are made of: the benchmark."""
        if isinstance(self.config, RecordedConfig):
            return self.benchmark_digest or NO_BENCHMARK
        return self.benchmark.digest

    @property
    def benchmark_digest(self) -> str | None:
        """Of the benchmark; None of a recording without a task. Raises as `benchmark`."""
        return None if self.config.benchmark_dir is None else self.benchmark.digest

    def recipe(self) -> Recipe:
        """What the steps execute.

        Raises:
            CircuitError: as `training_split`.
        """
        if self.config.edit is None:
            return self._run_recipe()
        from circuit.training.otherwise import Otherwise

        return Otherwise(self._run_recipe(), self.config.edit, self.config.steps)

    def _run_recipe(self) -> Recipe:
        """Without the edit of a counterfactual training."""
        from circuit.training.recipe import TaskRecipe

        return TaskRecipe(self)

    @property
    def benchmark(self) -> Benchmark:
        """The run's benchmark; its splits are read when they are asked for.

        Raises:
            CircuitError: it is missing, damaged, or not the recorded one.
        """
        if self._benchmark:
            return self._benchmark[0]
        if self.config.benchmark_dir is None:
            raise CircuitError(
                "the recording has no task, which says what its inputs mean",
                where=f"config {self.config.name}",
                fix="import it again with `circuit import-recording FOLDER --module FILE.py:NAME"
                " --task TASK --overwrite`, or ask for numbers of the module alone",
            )
        benchmark = load_benchmark(find_benchmark(self.config.benchmark_dir, self.near), splits=[])
        if self._digest not in (None, benchmark.digest):
            raise CircuitError(
                f"the benchmark is not the recorded one: digest {benchmark.digest[:12]}, recorded"
                f" {str(self._digest)[:12]}",
                where=self.config.benchmark_dir,
                fix="regenerate it from the config that the run used",
            )
        self._benchmark.append(benchmark)
        return benchmark

    def split(self, name: str) -> Split:
        """A split of the benchmark as index tensors.

        Raises:
            CircuitError: there is no such split, or its records are too long for the model.
        """
        if name not in self._splits:
            self._splits[name] = encode_split(self.benchmark, name, self.config.shape)
        return self._splits[name]

    def check_steps(self) -> None:
        """Refuse what the steps cannot read, before anything heavy is imported.

        Raises:
            CircuitError: as `check_split` of the training split.
        """
        self.check_split(self.config.train_split)

    def require_task(self) -> None:
        """Refuse a run that has no task."""

    def check_split(self, name: str) -> None:
        """Read a split's records, unless they are drawn at need; nothing here needs torch.

        Raises:
            CircuitError: there is no such split, or its file is damaged.
        """
        if name not in self.benchmark.task.streams:
            self.benchmark.records(name)

    def training_split(self) -> Split | Stream:
        """What the steps draw from: a split, or one whose records are drawn at need.

        Raises:
            CircuitError: as `split`; or records are too long for the model.
        """
        task, config = self.benchmark.task, self.config
        if config.train_split not in task.streams:
            return self.split(config.train_split)
        check_length(config.train_split, task.streams[config.train_split], config.model)
        named = (config.train_split, config.seed)
        if named not in self._streams:
            self._streams[named] = Stream(task, *named)
        return self._streams[named]

    def prepare(self, threads: int | None = None) -> None:
        """Give this process the config's threads (or those given), device and determinism."""
        prepare_process(threads=threads or self.config.threads, device=self.config.device)

    def check(self, header: StateHeader) -> None:
        """Refuse a state of another recipe or another benchmark; see `check_state`."""
        check_state(header, self.config, self.digest)

    def initial_model(self) -> HookedTransformer:
        """A model with the initial weights, on the config's device."""
        if not self._model:
            self._model.append(self._build())
        return copy.deepcopy(self._model[0])

    def module(self, dtype: torch.dtype | None = None) -> HookedTransformer:
        """A model whose weights may be overwritten, on the config's device."""
        model = self.initial_model()
        # a HookedTransformer's own `to` prints
        return model if dtype is None else torch.nn.Module.to(model, dtype)

    def model(self, state: TrainState, *, untied: bool = False) -> HookedTransformer:
        """The model of a state, on the config's device.

        Args:
            state: its weights.
            untied: a standard model with a `W_U` of its own (circuit/model/standard.py).

        Raises:
            CircuitError: the state belongs to another recipe or benchmark.
        """
        self.check(state)
        model = self.initial_model()
        load_tensors(model, state.parameters)
        if untied and self.config.model.kind == "bridge":
            return self._plain_bridge(state)
        if untied:
            from circuit.model.standard import standard_model

            return standard_model(model)
        return model

    def _plain_bridge(self, state: TrainState) -> HookedTransformer:
        from circuit.model.bridge import plain_bridge

        shape, size = self.config.model, self.benchmark.vocabulary.size
        tensors = standard_bridge_tensors(state.parameters, shape)
        bridge = plain_bridge(bridge_config(shape, size), tensors)
        return cast("HookedTransformer", bridge.to(self.config.device, print_details=False))

    def require_training_memory(self, *, traced: bool = False) -> None:
        """Refuse a run whose steps the memory cannot hold, before anything of it is allocated.

        Raises:
            CircuitError: says what it would need, and what there is.
        """
        config, longest = self.config, self.benchmark.task.streams.get(self.config.train_split)
        if longest is None:
            longest = longest_of(self.benchmark.records(config.train_split))
        need = training_memory(config, self.benchmark.vocabulary.size, longest, traced=traced)
        require_memory(need, where=f"config {config.name}")

    def saved_bytes(self) -> int:
        """A checkpoint, about."""
        return saved_bytes(self.config, self.benchmark.vocabulary.size)

    def require_reading_memory(
        self, records: Sequence[Record], *, where: object, rows: int | None = None, kept: int = 0
    ) -> None:
        """Refuse records that the memory cannot hold while the model reads them.

        Args:
            where: they stand.
            rows: that are read at once; all by default.
            kept: layers whose attention patterns are kept.

        Raises:
            CircuitError: as `require_training_memory`.
        """
        if self.config.shape is None:
            return  # what a module of one's own takes is not known
        size, length = self.benchmark.vocabulary.size, longest_of(records)
        rows = min(rows or len(records), len(records))
        need = reading_memory(self.config.model, size, length, rows, kept=kept)
        require_memory(need, where=where)

    def require_evaluation_memory(self, split: str) -> None:
        """Refuse a split that cannot be evaluated in the memory.

        Raises:
            CircuitError: as `require_training_memory`; or there is no such split.
        """
        records, where = self.benchmark.records(split), f"split {split} of {self.config.name}"
        kept = 0 if self.config.shape is None else self.config.shape.layers
        self.require_reading_memory(records, where=where, rows=BATCH, kept=kept)

    def _build(self) -> HookedTransformer:
        config = self.config
        if isinstance(config, RecordedConfig):
            refuse_changed_files(config.recorded, self.near)
            module = evaluated(named_module(config.recorded.module, self.near))
            return cast("HookedTransformer", torch.nn.Module.to(module, config.device))
        require_memory(
            weights_memory(config.model, self.benchmark.vocabulary.size),
            where=f"config {config.name}",
        )
        return build(
            config.model,
            vocabulary_size=self.benchmark.vocabulary.size,
            seed=0 if isinstance(config, ImportedConfig) else config.seed,
            kernels=config.kernels,
            device=config.device,
        )


def encode_split(benchmark: Benchmark, split: str, model: ModelConfig | None = None) -> Split:
    """A split of a benchmark as index tensors.

    Args:
        model: the model that is to read it.

    Raises:
        CircuitError: there is no such split, it was not loaded, or a record is longer than the
            model's `max_sequence_length`.
    """
    records = benchmark.records(split)
    if model is not None:
        check_length(split, longest_of(records), model)
    return benchmark.task.split(records)


def longest_of(records: Sequence[Record]) -> int:
    """Tokens of the longest record."""
    return max(len(record.tokens) for record in records)


def check_length(split: str, longest: int, model: ModelConfig) -> None:
    """Refuse records that are longer than the model reads; the last token is only predicted.

    Raises:
        CircuitError: names the split and both lengths.
    """
    if longest > model.max_sequence_length:
        raise CircuitError(
            f"a record of split {split!r} has {longest} tokens, more than the model's"
            f" max_sequence_length {model.max_sequence_length}",
            fix=f"set model.max_sequence_length to at least {longest}",
        )


def check_state(state: StateHeader, config: TrainConfig, benchmark_digest: str) -> None:
    """Refuse a state of another recipe or another benchmark.

    Raises:
        CircuitError: the first recipe field that differs is named.
    """
    difference = config.recipe_difference(state.config)
    if difference is not None:
        raise CircuitError(
            f"the checkpoint of step {state.step} belongs to another config: {difference}",
            fix="pass the run_config.json that stands beside the checkpoint's folder",
        )
    if state.benchmark_digest != benchmark_digest:  # of a recipe's file it is one of the fields
        raise CircuitError(
            f"the checkpoint of step {state.step} was trained on another benchmark: digest"
            f" {state.benchmark_digest[:12]} there and {benchmark_digest[:12]} in"
            f" {config.benchmark_dir}",
            fix="regenerate the benchmark from the config that the run used",
        )
