"""A run in memory: model, optimizer and data order, moving one step at a time.

Train, trace and replay differ in what they do between steps; the session is what they share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from circuit.lazy import torch
from circuit.model.weights import load_tensors, named_tensors
from circuit.training.checkpoints import DivergedError, TrainState
from circuit.training.otherwise import Otherwise
from circuit.training.recipe import Recipe
from circuit.training.setup import Setup

if TYPE_CHECKING:
    from torch import nn

    from circuit.core.graphs import Graphs
    from circuit.training.step import StepOutcome


class TrainingSession:
    """The state after `step` optimizer steps, and the way to the next."""

    def __init__(
        self,
        setup: Setup,
        *,
        state: TrainState | None = None,
        recipe: Recipe | None = None,
        origin: Callable[[], TrainState] | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        """Put the session together.

        Args:
            setup: of the run.
            state: to go on from; the initial weights by default.
            recipe: what the steps execute; the config's by default.
            origin: the state at which the config's edit starts; asked where `state` is beyond it
                and the edit holds on to what was computed there.
            graphs: hold those of the gradients.

        Raises:
            CircuitError: the state belongs to another recipe or benchmark, or is unsound; or the
                config's edit names something that there is not.
        """
        self.setup, self.config = setup, setup.config
        config = setup.config
        self.benchmark_digest = setup.digest
        self.graphs = graphs
        self.recipe: Recipe = recipe or setup.recipe()
        if state is None:
            self.recipe.prove()
        self.model: nn.Module = self.recipe.module()
        self.step = 0
        if state is not None:
            setup.check(state)
            moments = state.past_moments()
            if state.not_finite is not None:
                raise DivergedError(
                    f"{state.not_finite} are not finite at step {state.step}: the run diverged",
                    where=f"config {config.name}",
                    fix="go on from a checkpoint before it did",
                )
            load_tensors(self.model, state.parameters)
            self.step = state.step
        self.optimizer: torch.optim.Optimizer = self.recipe.optimizer(self.model)
        if state is not None:
            self.recipe.restore(self.model, self.optimizer, moments, state.step)
        if isinstance(self.recipe, Otherwise):
            self.recipe.begin(self.model, self.optimizer, self.step, origin)

    def advance(self, *, on_gradient: Callable[[], None] | None = None) -> StepOutcome:
        """Take the next step.

        Args:
            on_gradient: as of `training_step`.

        Raises:
            DivergedError: the training has diverged: loss or gradient are not finite any more.
        """
        from circuit.training.step import training_step

        step = self.step + 1
        with self.recipe.watched(self.model, self.optimizer, step):
            outcome = training_step(
                self.recipe,
                self.model,
                self.optimizer,
                step,
                on_gradient=on_gradient,
                graphs=self.graphs,
            )
        self.step = step
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
        moments = self.recipe.memory(self.model, self.optimizer)
        return TrainState(
            step=self.step,
            config=self.config,
            benchmark_digest=self.benchmark_digest,
            parameters={n: t.cpu().clone() for n, t in named_tensors(self.model).items()},
            moments={
                moment: {name: tensor.cpu().clone() for name, tensor in values.items()}
                for moment, values in moments.items()
            },
            notes=dict(notes or {}),
        )
