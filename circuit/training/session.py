"""A run in memory: model, optimizer and data order, moving one step at a time.

Train, trace and replay differ in what they do between steps; the session is what they share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from circuit.config import ImportedConfig, ModelConfig, TrainConfig
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.weights import load_tensors, named_tensors
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.positions import Batch, EncodedSplit
from circuit.tasks.symbolic_kv import PAD
from circuit.training.checkpoints import StateHeader, TrainState
from circuit.training.data_order import Indices, batch_indices
from circuit.training.optimizers import build_optimizer, read_moments, write_moments

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer

    from circuit.training.step import StepOutcome


class DivergedError(CircuitError):
    """Loss, gradient or logits of a run are not finite any more: its rate is too high."""


class TrainingSession:
    """The state after `step` optimizer steps, and the way to the next.

    `start` begins at the initial weights, `restore` at a saved state.
    """

    def __init__(
        self,
        config: TrainConfig,
        benchmark: Benchmark,
        *,
        state: TrainState | None = None,
        data: EncodedSplit | None = None,
    ) -> None:
        self.config = config
        self.benchmark = benchmark
        self.data = data or encode_split(benchmark, config.train_split, config.model)
        self.model: HookedTransformer = _model_for(config, benchmark)
        self.step = 0
        if state is not None:
            check_state(state, config, benchmark.digest)
            moments = state.past_moments()
            load_tensors(self.model, state.parameters)
            self.step = state.step
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.model, config.optimizer)
        if state is not None:
            write_moments(self.model, self.optimizer, config.optimizer, moments, state.step)

    @classmethod
    def start(cls, config: TrainConfig, benchmark: Benchmark) -> Self:
        """Begin at the initial weights (step 0)."""
        return cls(config, benchmark)

    @classmethod
    def restore(cls, state: TrainState, config: TrainConfig, benchmark: Benchmark) -> Self:
        """Continue from a saved state.

        Raises:
            CircuitError: the state belongs to another recipe or benchmark, or is unsound.
        """
        return cls(config, benchmark, state=state)

    def indices(self, step: int) -> Indices:
        """Examples of a step, Int64 `[batch]`."""
        return batch_indices(
            self.config.seed, step, size=len(self.data), batch_size=self.config.batch_size
        )

    def tokens(self, step: int) -> Tensor:
        """Token batch of a step, Int64 `[batch, pos]`, on the model's device."""
        return self.batch(step).tokens.to(self.config.device)

    def batch(self, step: int) -> Batch:
        """Batch of a step with its read indices."""
        return self.data.batch(self.indices(step))

    def advance(self, *, on_gradient: Callable[[], None] | None = None) -> StepOutcome:
        """Take the next step.

        Raises:
            DivergedError: the training has diverged: loss or gradient are not finite any more.
        """
        from circuit.training.step import training_step

        outcome = training_step(
            self.model,
            self.optimizer,
            self.tokens(self.step + 1),
            self.config,
            self.step + 1,
            pad=PAD,
            on_gradient=on_gradient,
        )
        self.step += 1
        if not (torch.isfinite(outcome.loss) and torch.isfinite(outcome.grad_norm)):
            raise DivergedError(
                f"training diverged at step {self.step}: loss {float(outcome.loss)}, gradient norm"
                f" {float(outcome.grad_norm)}",
                where=f"config {self.config.name}",
                fix="lower the learning rate or clip the gradient",
            )
        return outcome

    def state(self, notes: dict[str, Any] | None = None) -> TrainState:
        """The present state, copied to the CPU."""
        moments = read_moments(self.model, self.optimizer, self.config.optimizer)
        return TrainState(
            step=self.step,
            config=self.config,
            benchmark_digest=self.benchmark.digest,
            parameters={n: t.cpu().clone() for n, t in named_tensors(self.model).items()},
            moments={
                moment: {name: tensor.cpu().clone() for name, tensor in values.items()}
                for moment, values in moments.items()
            },
            notes=dict(notes or {}),
        )


def encode_split(
    benchmark: Benchmark, split: str, model: ModelConfig | None = None
) -> EncodedSplit:
    """A split of a benchmark as index tensors.

    Args:
        model: the model that is to read it.

    Raises:
        CircuitError: there is no such split, it was not loaded, or a record is longer than the
            model's `max_sequence_length`.
    """
    records = benchmark.records(split)
    longest = max(len(record.tokens) for record in records)
    if model is not None and longest > model.max_sequence_length:
        raise CircuitError(
            f"a record of split {split!r} has {longest} tokens, more than the model's"
            f" max_sequence_length {model.max_sequence_length}",
            fix=f"set model.max_sequence_length to at least {longest}",
        )
    return EncodedSplit(records, benchmark.vocabulary, benchmark.heldout_pairs)


def model_from_state(
    state: TrainState, config: TrainConfig, benchmark: Benchmark
) -> HookedTransformer:
    """The model of a saved state, ready for analysis, on the config's device.

    Raises:
        CircuitError: the state belongs to another recipe or benchmark.
    """
    check_state(state, config, benchmark.digest)
    model = _model_for(config, benchmark)
    load_tensors(model, state.parameters)
    return model


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
    if state.benchmark_digest != benchmark_digest:
        raise CircuitError(
            f"the checkpoint of step {state.step} was trained on another benchmark: digest"
            f" {state.benchmark_digest[:12]} there and {benchmark_digest[:12]} in"
            f" {config.benchmark_dir}",
            fix="regenerate the benchmark from the config that the run used",
        )


def _model_for(config: TrainConfig, benchmark: Benchmark) -> HookedTransformer:
    from circuit.model.build import build_model

    return build_model(
        config.model,
        vocabulary_size=benchmark.vocabulary.size,
        seed=0 if isinstance(config, ImportedConfig) else config.seed,
        kernels=config.kernels,
        device=config.device,
    )
