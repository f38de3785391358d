"""One traced step: the training step with everything that went in and came out of it.

`Tracer` moves a `TrainingSession` and yields `TracedStep`s; record and replay both use it, so what
is recorded and what is replayed is one piece of code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

from circuit.core.digests import tensor_digest
from circuit.core.flat import Flat, ParameterLayout
from circuit.core.optimizers import (
    Group,
    Past,
    TakenStep,
    counts_of,
    groups_of,
    kind_of,
    names_by_id,
    shared_rule,
    term_names,
)
from circuit.core.state import FlatState
from circuit.core.update import (
    AnyRule,
    DifferentiableRule,
    Hyper,
    MomentumForm,
    OptimizerStep,
    SGDRule,
    UpdateRule,
    UpdateTerms,
)
from circuit.errors import CircuitError
from circuit.model.weights import named_tensors
from circuit.tasks.examples import Examples
from circuit.training.checkpoints import TrainState
from circuit.training.recipe import NamedExamples
from circuit.training.session import TrainingSession

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from circuit.training.data_order import Indices
    from circuit.training.recipe import Batch, Recipe
    from circuit.training.step import StepOutcome

STAGES = ("batch", "logits", "loss", "gradient", "grad_norm", "parameters", "m", "v", "memory")
"""What is compared between two executions of a step, in the order in which it is computed."""


@dataclass(frozen=True)
class Moved:
    """What an optimizer did beside the vectors of a step.

    Attributes:
        kind: its class.
        decoupled: see `Recipe.decoupled_decay`.
        groups: with the settings of the step.
        names: of the parameters that had a gradient and that the optimizer holds.
        graded: of all that had a gradient.
        edited: whether the training has an edit that takes weights elsewhere.
        before, after: steps that were counted for each parameter of which something was remembered.
    """

    kind: str
    decoupled: bool
    groups: tuple[Group, ...]
    names: tuple[str, ...]
    graded: tuple[str, ...]
    edited: bool
    before: Mapping[str, int]
    after: Mapping[str, int]


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one batch (a `circuit.core.step.Objective`)."""

    recipe: Recipe
    batch: Batch
    examples: Callable[[], Examples | NamedExamples]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Names of the examples."""
        return self.examples().sample_ids

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Inputs of the module, and targets; and weights of the losses, where there are some."""
        weights = self.batch.weights
        return self.batch.inputs, self.batch.targets, *([] if weights is None else [weights])

    def losses(self, model: Any, *inputs: Tensor) -> Float[Tensor, example * where]:
        """Shares of some examples in the batch's loss; see `Recipe.losses`."""
        from circuit.training.step import weighted_losses  # which imports torch

        read, targets, *weights = inputs
        part = replace(
            self.batch,
            inputs=read,
            targets=targets,
            weights=weights[0] if weights else None,
            whole=self.batch,
        )
        return weighted_losses(self.recipe, self.recipe.outputs(model, part), part)


@dataclass(frozen=True)
class TracedStep:
    """Step `t`, which took `before` (`theta_{t-1}`) to `after` (`theta_t`)."""

    step: int
    layout: ParameterLayout
    examples: Callable[[], Examples | NamedExamples]
    """Those of the batch again, with what they ask."""
    before: FlatState
    after: FlatState
    gradient: Flat
    """`g`, before clipping."""
    clipped: Flat
    """`c g`, what the optimizer used."""
    outcome: StepOutcome
    moved: Moved

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
        examples = self.examples()
        if not isinstance(examples, Examples):
            raise CircuitError(
                "the batches of a recipe have no answers", expected="the loss scope full_lm"
            )
        return examples.is_answer()

    @cached_property
    def _shared(self) -> tuple[UpdateRule, Hyper] | None:
        """The rule of all parameters, where they share one."""
        moved = {name: self.moved.after.get(name, 1) for name in self.moved.names}
        of = self.moved
        return shared_rule(of.kind, of.groups, moved, self.step, self.layout, of.decoupled)

    @property
    def rule(self) -> DifferentiableRule:
        """Of the optimizer.

        Raises:
            CircuitError: its update is not split, or not all parameters follow one rule; momentum
                rests; or an edit has taken the weights elsewhere.
        """
        if self.outcome.led is not None:
            raise CircuitError(
                f"an edit has taken the weights of step {self.step} elsewhere than the optimizer,"
                " so what the step did is no sum over gradients",
                expected="a window without such steps, where examples are asked about",
            )
        shared = self._shared
        if shared is None or isinstance(shared[0], AnyRule):
            name = self.moved.kind.rpartition(".")[2]
            raise CircuitError(
                f"data cannot be credited through {name} "
                + ("whose parameters follow several rules" if shared is None else "as a whole"),
                where=f"step {self.step}",
                expected="AdamW, Adam or SGD, of whose settings groups differ in rate and decay",
                fix="trace attribute and trace counterfactual work",
            )
        resting = [name for name in self.moved.before if name not in self.moved.names]
        if isinstance(shared[0], SGDRule) and shared[0].momentum and resting:
            raise CircuitError(  # its share of the gradients before it is not that of the others
                f"data cannot be credited through momentum that rests: {resting[0]} has no gradient"
                f" at step {self.step}",
                expected="a gradient of every parameter that has momentum",
                fix="trace attribute and trace counterfactual work",
            )
        return cast("DifferentiableRule", shared[0])

    @property
    def hyper(self) -> Hyper:
        """Rate and decay of the step, of each parameter where they differ."""
        return Hyper(self.lr, 0.0) if self._shared is None else self._shared[1]

    @property
    def _led(self) -> Flat:
        """Where the optimizer has led."""
        return self.after.parameters if self.outcome.led is None else self.outcome.led

    def _taken(self, hyper: Hyper) -> OptimizerStep:
        """What the optimizer read and wrote."""
        return OptimizerStep(
            before=self.before.parameters,
            after=self._led,
            gradient=self.gradient,
            clipped=self.clipped,
            moments_before=self.before.moments,
            moments_after=self.after.moments,
            step=self.step,
            hyper=hyper,
        )

    @cached_property
    def update(self) -> UpdateTerms:
        """The update and its terms; computed when first asked for.

        In a training with an edit that takes weights elsewhere, that is a term of every step.
        """
        terms = self._optimizer_terms()
        if not self.moved.edited:
            return terms
        return terms.with_outside(self.after.parameters.double() - self._led.double())

    def _optimizer_terms(self) -> UpdateTerms:
        if self._shared is not None:
            rule, hyper = self._shared
            return rule.terms(self._taken(hyper))
        of, flat = self.moved, self.layout.unflatten
        clipped, raw = flat(self.clipped), flat(self.gradient)
        step = TakenStep(
            kind=of.kind,
            decoupled=of.decoupled,
            groups=of.groups,
            before=flat(self.before.parameters),
            after=flat(self._led),
            gradient={name: clipped[name] for name in of.names},
            past=self._past(self.before, of.before),
            memory=self._past(self.after, of.after),
            outside={},
            raw=raw,
        )
        return step.terms(self.layout, term_names(of.kind, of.groups, of.decoupled))

    def _past(self, state: FlatState, counts: Mapping[str, int]) -> Past:
        """What the optimizer remembered, by name: views of a state's vectors."""
        named = {key: self.layout.unflatten(vector) for key, vector in state.moments.items()}
        held = {name: {key: parts[name] for key, parts in named.items()} for name in counts}
        return {
            name: {**held[name], "step": counts[name]} if name in held else {}
            for name in self.layout.names
        }

    @property
    def momentum(self) -> MomentumForm:
        """The update as a sum over the gradients so far; raises as `rule`."""
        return self.rule.momentum_form(self._taken(self.hyper))

    @property
    def graded(self) -> tuple[str, ...]:
        """Parameters that had a gradient."""
        return self.moved.graded

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
        self._names = names_by_id(session.model)
        self._kind = kind_of(session.optimizer)
        self._state, self._counts = self._read(), counts_of(session.optimizer, self._names)

    @property
    def state(self) -> FlatState:
        """The present weights and moments."""
        return self._state

    def advance(self) -> TracedStep:
        """Take the next step and say everything about it."""
        session, before, counts = self.session, self._state, self._counts
        gradient: dict[str, Flat] = {}

        def keep_gradient() -> None:
            gradient["raw"] = self._flatten_gradient()

        step = session.step + 1
        outcome = session.advance(on_gradient=keep_gradient)
        self._state, self._counts = self._read(), counts_of(session.optimizer, self._names)
        clipped = gradient["raw"]
        if outcome.clip_factor != 1.0:
            clipped = self._flatten_gradient()
        return TracedStep(
            step=step,
            layout=self.layout,
            examples=partial(session.recipe.at(step).examples, step),
            before=before,
            after=self._state,
            gradient=gradient["raw"],
            clipped=clipped,
            outcome=outcome,
            moved=Moved(
                self._kind,
                session.recipe.decoupled_decay,
                groups_of(session.optimizer, self._names),
                *self._with_gradient(),
                session.recipe.edit is not None and session.recipe.edit.moves,
                counts,
                self._counts,
            ),
        )

    def _with_gradient(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The parameters that the optimizer has moved, and all that had a gradient."""
        groups = self.session.optimizer.param_groups
        held = {id(parameter) for group in groups for parameter in group["params"]}
        graded = {name: p for name, p in self._parameters.items() if p.grad is not None}
        return tuple(name for name, p in graded.items() if id(p) in held), tuple(graded)

    def train_state(self, notes: dict[str, Any] | None = None) -> TrainState:
        """The present state by name, for a checkpoint."""
        return self.session.state(notes)

    def _read(self) -> FlatState:
        session = self.session
        moments = session.recipe.memory(session.model, session.optimizer)
        return FlatState.of_tensors(session.step, named_tensors(session.model), moments)

    def _flatten_gradient(self) -> Flat:
        return self.layout.flatten_gradient(self._parameters)
