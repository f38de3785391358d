"""One traced step: the training step with everything that went in and came out of it.

`Tracer` moves a `TrainingSession` and yields `TracedStep`s; record and replay both use it, so what
is recorded and what is replayed is one piece of code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from circuit.core.digests import tensor_digest
from circuit.core.flat import Flat, ParameterLayout
from circuit.core.state import FlatState
from circuit.core.update import DifferentiableRule, Hyper, MomentumForm, OptimizerStep, UpdateTerms
from circuit.lazy import torch
from circuit.tasks.examples import Examples
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import TrainState
from circuit.training.optimizers import read_moments, update_rule
from circuit.training.session import TrainingSession

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from circuit.training.data_order import Indices
    from circuit.training.recipe import Batch, Recipe
    from circuit.training.step import StepOutcome

STAGES = ("batch", "logits", "loss", "gradient", "grad_norm", "parameters", "m", "v")
"""What is compared between two executions of a step, in the order in which it is computed."""


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one batch (a `circuit.core.step.Objective`)."""

    recipe: Recipe
    batch: Batch
    examples: Callable[[], Examples]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Sample ids of the records."""
        return self.examples().sample_ids

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Inputs of the module, and targets."""
        return self.batch.inputs, self.batch.targets

    def losses(self, model: Any, *inputs: Tensor) -> Float[Tensor, example * where]:
        """Shares of some examples in the batch's loss; see `Recipe.losses`."""
        part = replace(self.batch, inputs=inputs[0], targets=inputs[1], whole=self.batch)
        return self.recipe.losses(self.recipe.outputs(model, part), part)


@dataclass(frozen=True)
class TracedStep:
    """Step `t`, which took `before` (`theta_{t-1}`) to `after` (`theta_t`)."""

    step: int
    config: TrainConfig
    layout: ParameterLayout
    examples: Callable[[], Examples]
    """Those of the batch again, with what they ask."""
    before: FlatState
    after: FlatState
    gradient: Flat
    """`g`, before clipping."""
    clipped: Flat
    """`c g`, what the optimizer used."""
    outcome: StepOutcome

    @property
    def lr(self) -> float:
        """`lr_t`."""
        return self.outcome.lr

    @property
    def clip(self) -> float:
        """The clip factor `c`."""
        return self.outcome.clip_factor

    @property
    def loss(self) -> float:
        """Mean next-token loss of the batch in nats, before the update."""
        return float(self.outcome.loss)

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient before clipping."""
        return float(self.outcome.grad_norm)

    @property
    def indices(self) -> Indices:
        """Examples of the batch, Int64 `[batch]`."""
        return self.outcome.batch.examples

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The batch."""
        return self.outcome.batch.inputs

    @property
    def token_accuracy(self) -> float | None:
        """Share of the batch's targets that the logits' argmax hits."""
        return self.outcome.accuracy

    @property
    def answers(self) -> Bool[Tensor, "batch pos"]:
        """Where the answers stand in the batch."""
        return self.examples().is_answer()

    @property
    def rule(self) -> DifferentiableRule:
        """Of the optimizer."""
        return update_rule(self.config.optimizer)

    @property
    def hyper(self) -> Hyper:
        """Rate and decay of the step."""
        return Hyper(self.lr, self.config.optimizer.weight_decay)

    @property
    def taken(self) -> OptimizerStep:
        """What the optimizer read and wrote."""
        return OptimizerStep(
            before=self.before.parameters,
            after=self.after.parameters,
            gradient=self.gradient,
            clipped=self.clipped,
            moments_before=self.before.moments,
            moments_after=self.after.moments,
            step=self.step,
            hyper=self.hyper,
        )

    @cached_property
    def update(self) -> UpdateTerms:
        """The update and its terms; computed when first asked for."""
        return self.rule.terms(self.taken)

    @property
    def momentum(self) -> MomentumForm:
        """The update as a sum over the gradients so far."""
        return self.rule.momentum_form(self.taken)

    @property
    def objective(self) -> BatchLoss:
        """The batch's loss, whose gradient was taken."""
        return BatchLoss(self.outcome.recipe, self.outcome.batch, self.examples)

    def stage(self, name: str) -> str | float | None:
        """The digest (or the exact number) of one of `STAGES`; None if there is none."""
        if name == "loss":
            return self.loss
        if name == "grad_norm":
            return self.grad_norm
        tensors = {
            "batch": self.tokens,
            "logits": self.outcome.outputs,
            "gradient": self.gradient,
        }
        if name in tensors:
            return tensor_digest(tensors[name])
        return self.final_stages.get(name)

    def digests(self) -> dict[str, str]:
        """The digests of all stages that are tensors, in the order of `STAGES`."""
        found = {stage: self.stage(stage) for stage in STAGES}
        return {stage: digest for stage, digest in found.items() if isinstance(digest, str)}

    @cached_property
    def final_stages(self) -> dict[str, str]:
        """Digests of the state after the step, by stage."""
        return self.after.stages()


class Tracer:
    """Moves a session step by step, keeping what each step did."""

    def __init__(self, session: TrainingSession) -> None:
        self.session = session
        self.layout = ParameterLayout.of_model(session.model)
        self._parameters = dict(session.model.named_parameters())
        self._state = self._read()

    @property
    def state(self) -> FlatState:
        """The present weights and moments."""
        return self._state

    def advance(self, *, weights: Float[Tensor, " batch"] | None = None) -> TracedStep:
        """Take the next step and say everything about it.

        Args:
            weights: of the records' losses, in a step that is not as it was.
        """
        session, before = self.session, self._state
        gradient: dict[str, Flat] = {}

        def keep_gradient() -> None:
            gradient["raw"] = self._flatten_gradient()

        step = session.step + 1
        outcome = session.advance(weights=weights, on_gradient=keep_gradient)
        self._state = self._read()
        clipped = gradient["raw"]
        if outcome.clip_factor != 1.0:
            clipped = self._flatten_gradient()
        return TracedStep(
            step=step,
            config=session.config,
            layout=self.layout,
            examples=partial(session.recipe.examples, step),
            before=before,
            after=self._state,
            gradient=gradient["raw"],
            clipped=clipped,
            outcome=outcome,
        )

    def put(self, parameters: Flat) -> None:
        """Go on from other weights, with the moments that there are."""
        with torch.no_grad():
            for name, part in self.layout.unflatten(parameters).items():
                self._parameters[name].copy_(part)
        self._state = self._read()

    def train_state(self, notes: dict[str, Any] | None = None) -> TrainState:
        """The present state by name, for a checkpoint."""
        return self.session.state(notes)

    def _read(self) -> FlatState:
        session = self.session
        moments = read_moments(session.model, session.optimizer, session.config.optimizer)
        return FlatState(
            session.step,
            self.layout.flatten(self._parameters),
            {name: self.layout.flatten(tensors) for name, tensors in moments.items()},
        )

    def _flatten_gradient(self) -> Flat:
        return self.layout.flatten(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in self._parameters.items()
            }
        )
