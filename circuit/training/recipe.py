"""What the exact trainer executes: a module, the batch and the losses of a step, an optimizer.

A step is a function of the state before it and of its number alone, so that it can be taken again
at any time: a recipe keeps nothing between steps, and draws nothing but from (seed, step).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from circuit.lazy import torch
from circuit.tasks.examples import UNPREDICTED, Examples, Split, Stream
from circuit.training.data_order import Indices, batch_indices
from circuit.training.optimizers import (
    build_optimizer,
    learning_rate,
    read_memory,
    read_moments,
    write_memory,
    write_moments,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from circuit.core.edit import Edit
    from circuit.core.flat import Flat
    from circuit.core.state import Moments
    from circuit.training.setup import Setup

    Losses: TypeAlias = Float[Tensor, "example *where"]


@dataclass(frozen=True)
class Batch:
    """What a step reads, on the module's device.

    Attributes:
        inputs: of the module; the first axis counts the examples.
        targets: what the losses compare the outputs with.
        examples: the number of each example, Int64 `[example]`: who a loss is of.
        whole: the batch of which these are some examples, where they are: their losses are shares
            in its loss.
        weights: factors of the losses, where they are not all 1, of examples or by position, the
            last for all positions behind; float64, on the CPU.
    """

    inputs: Tensor
    targets: Tensor
    examples: Indices
    whole: Batch | None = None
    weights: Float[Tensor, " example"] | Float[Tensor, "example pos"] | None = None

    @property
    def size(self) -> int:
        """Examples of the whole batch: what a mean over them divides by."""
        return len((self.whole or self).inputs)


@dataclass(frozen=True)
class NamedExamples:
    """A batch of which no task says anything.

    Attributes:
        sample_ids: names of the examples: their numbers.
    """

    sample_ids: tuple[str, ...]


class Recipe(ABC):
    """What decides the weights of every step.

    Attributes:
        seed: of all that is drawn.
        clip: largest norm of the gradient, which is scaled down to it; None: as it is.
        decoupled_decay: whether the weight decay of an optimizer that is not torch's is decoupled.
        steps, checkpoint_every, log_every: of a run that is not told otherwise.
        edit: what some steps of a counterfactual training do otherwise (`Otherwise`).
    """

    clip: float | None = None
    decoupled_decay: bool = False
    steps: int = 1000
    checkpoint_every: int = 250
    log_every: int = 50
    edit: Edit | None = None

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def at(self, step: int) -> Recipe:
        """What step `step` executes."""
        return self

    @abstractmethod
    def module(self) -> nn.Module:
        """The module with its initial weights, on its device; equal bits at every call."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """What step `step` reads, counted from 1."""

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        """What the losses are computed from; a trace records its digest."""
        outputs: Tensor = module(batch.inputs)
        return outputs

    @abstractmethod
    def losses(self, outputs: Tensor, batch: Batch) -> Losses:
        """The share of each example (and position) in the loss: they sum to it, up to rounding."""

    def loss(self, outputs: Tensor, batch: Batch) -> Float[Tensor, ""]:
        """What is differentiated."""
        return self.losses(outputs, batch).sum()

    @abstractmethod
    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """A fresh one over the module's parameters."""

    def rates(self, step: int) -> Sequence[float] | None:
        """The learning rates of a step, of each of the optimizer's groups; None: as they are."""
        return None

    def decays(self, step: int) -> Sequence[float] | None:
        """The weight decays of a step, like `rates`."""
        return None

    def update(self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Flat | None:
        """Take the optimizer's step.

        Returns:
            Where that alone would have led, if the weights are taken elsewhere.
        """
        optimizer.step()
        return None

    def accuracy(self, outputs: Tensor, batch: Batch) -> float | None:
        """Share of the targets that the outputs hit, where that means something."""
        return None

    def examples(self, step: int) -> NamedExamples | Examples:
        """Those of a step, by name, with what a task says of them."""
        return NamedExamples(tuple(map(str, self.batch(step).examples.tolist())))

    def sample_ids(self, step: int) -> Sequence[str]:
        """Names of a step's examples."""
        return self.examples(step).sample_ids

    def prove(self) -> None:  # noqa: B027  a task's are functions of the step
        """Refuse weights and batches that are others when they are asked for again."""

    # --- what a checkpoint holds, and what a step may not change ---

    def memory(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
        """What the optimizer remembers."""
        return read_memory(module, optimizer)

    def restore(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        memory: Mapping[str, Mapping[str, Tensor]],
        step: int,
    ) -> None:
        """Put what was remembered after a step into a fresh optimizer.

        Raises:
            CircuitError: it is not this module's and this optimizer's.
        """
        write_memory(module, optimizer, memory)

    def watched(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> AbstractContextManager[None]:
        """What goes around a step."""
        return nullcontext()


class TaskRecipe(Recipe):
    """A `HookedTransformer` on a task, as a training config says it."""

    def __init__(self, setup: Setup) -> None:
        """Read the training split.

        Raises:
            CircuitError: there is none, or its records are too long for the model.
        """
        self.setup, self.config = setup, setup.config
        super().__init__(self.config.seed)
        self.clip = self.config.gradient_clip
        self.split: Split | Stream = setup.training_split()

    def module(self) -> nn.Module:
        """See `Recipe.module`."""
        return self.setup.initial_model()

    def examples(self, step: int) -> Examples:
        """The records of a step, with what they ask."""
        return self.split.batch(self.indices(step))

    def sample_ids(self, step: int) -> Sequence[str]:
        """Of the records of a step; of a split with an end no record need be looked at."""
        if isinstance(self.split, Split):
            return [self.split.sample_ids[index] for index in self.indices(step).tolist()]
        return self.examples(step).sample_ids

    def indices(self, step: int) -> Indices:
        """Their numbers in the training split, Int64 `[batch]`."""
        size = len(self.split) if isinstance(self.split, Split) else None
        return batch_indices(self.config.seed, step, size=size, batch_size=self.config.batch_size)

    def batch(self, step: int) -> Batch:
        """Tokens `[batch, pos]`; what is predicted behind each but the last (`UNPREDICTED`: no)."""
        return self.read(self.indices(step))

    def read(self, indices: Indices) -> Batch:
        """The batch of some records, as `batch`."""
        device, examples = self.config.device, self.split.batch(indices)
        return Batch(examples.tokens.to(device), examples.targets().to(device), indices)

    def outputs(self, module: nn.Module, batch: Batch) -> Float[Tensor, "batch pos-1 vocab"]:
        """Logits; position i predicts token i + 1, so that the last token is not read."""
        logits: Tensor = module(batch.inputs[:, :-1])
        return logits

    def losses(self, outputs: Tensor, batch: Batch) -> Float[Tensor, "batch pos-1"]:
        """Cross-entropy in nats of each target over the number of targets; 0 where there is none.

        definitions.md section 7: the share `l_{i,e}` of each example and position in the mean.
        """
        rows = torch.nn.functional.cross_entropy(
            self._exact(outputs).flatten(0, 1),
            batch.targets.flatten(),
            ignore_index=UNPREDICTED,
            reduction="none",
        )
        counted = (batch.whole or batch).targets
        return rows.view_as(batch.targets) / (counted != UNPREDICTED).sum()

    def loss(self, outputs: Tensor, batch: Batch) -> Float[Tensor, ""]:
        """Their mean as torch sums it up, whose bits every trace records."""
        from circuit.training.step import next_token_loss  # which imports torch

        return next_token_loss(self._exact(outputs), batch.targets)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """See `Recipe.optimizer`."""
        return build_optimizer(module, self.config.optimizer)

    def rates(self, step: int) -> Sequence[float]:
        """The schedule's, of the one group."""
        return [learning_rate(self.config, step)]

    def decays(self, step: int) -> Sequence[float]:
        """The config's, of the one group."""
        return [self.config.optimizer.weight_decay]

    def accuracy(self, outputs: Tensor, batch: Batch) -> float:
        """Share of the targets that the logits' argmax hits."""
        hits = outputs.argmax(-1) == batch.targets
        return float(hits[batch.targets != UNPREDICTED].cpu().double().mean())

    def _exact(self, logits: Tensor) -> Tensor:
        """A small loss would round to 0, and its gradient with it: some tasks ask for float64."""
        return logits.double() if self._float64 else logits

    def memory(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
        """Moments of every parameter, also before the first step: the names of all checkpoints."""
        return read_moments(module, optimizer, self.config.optimizer)

    def restore(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        memory: Mapping[str, Mapping[str, Tensor]],
        step: int,
    ) -> None:
        """See `Recipe.restore`."""
        write_moments(module, optimizer, self.config.optimizer, memory, step)

    @cached_property
    def _float64(self) -> bool:
        return self.setup.benchmark.task.loss_dtype == "float64"
