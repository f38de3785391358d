"""One traced step: the training step with everything that went in and came out of it.

`Tracer` moves a `TrainingSession` and yields `TracedStep`s; record and replay both use it, so what
is recorded and what is replayed is one piece of code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from circuit.core.digests import tensor_digest
from circuit.core.flat import Flat, ParameterLayout
from circuit.core.state import FlatState
from circuit.core.update import Hyper, UpdateTerms
from circuit.lazy import torch
from circuit.tasks.examples import Examples
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import TrainState
from circuit.training.optimizers import read_moments, update_rule
from circuit.training.session import TrainingSession

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

    from circuit.training.data_order import Indices
    from circuit.training.step import StepOutcome

STAGES = ("batch", "logits", "loss", "gradient", "grad_norm", "parameters", "m", "v")
"""What is compared between two executions of a step, in the order in which it is computed."""


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

    @cached_property
    def update(self) -> UpdateTerms:
        """The update and its terms; computed when first asked for."""
        optimizer = self.config.optimizer
        return update_rule(optimizer).terms(
            before=self.before.parameters,
            after=self.after.parameters,
            gradient=self.gradient,
            clipped=self.clipped,
            moments_before=self.before.moments,
            moments_after=self.after.moments,
            step=self.step,
            hyper=Hyper(self.lr, optimizer.weight_decay),
        )

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

    def advance(self) -> TracedStep:
        """Take the next step and say everything about it."""
        session, before = self.session, self._state
        gradient: dict[str, Flat] = {}

        def keep_gradient() -> None:
            gradient["raw"] = self._flatten_gradient()

        step = session.step + 1
        outcome = session.advance(on_gradient=keep_gradient)
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
