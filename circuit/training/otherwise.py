"""The recipe of a counterfactual training: another's, of which some steps are otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from circuit.core.edit import Edit
from circuit.core.flat import Flat, ParameterLayout
from circuit.core.optimizers import TakenStep, groups_of, kind_of, names_by_id, past_of
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.components import parse_component
from circuit.model.weights import load_tensors
from circuit.tasks.examples import UNPREDICTED, Examples, Split
from circuit.training.checkpoints import TrainState
from circuit.training.data_order import Indices
from circuit.training.recipe import Batch, NamedExamples, Recipe, TaskRecipe

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor, nn

    from circuit.core.state import Moments
    from circuit.training.recipe import Losses


ROUNDING = 1e-4
"""Of a loss, relatively, beside the sum of its examples'."""


class Otherwise(Recipe):
    """A run's recipe with an edit: outside of its window the recipe itself (`at`).

    Attributes:
        run: the recipe of the run that is left.
        edit: what is otherwise.
        heads: hook point, head and share of the attention patterns that are held.
        origin: the module with the weights of state `edit.start`, where patterns are held.
    """

    edit: Edit

    def __init__(self, run: Recipe, edit: Edit, steps: int) -> None:
        """Describe the training.

        Args:
            steps: of the run.

        Raises:
            CircuitError: the edit goes beyond them, or names an example or a setting that there is
                not.
        """
        super().__init__(run.seed)
        self.run, self.edit = run, edit
        self.decoupled_decay = run.decoupled_decay
        self.heads: list[tuple[str, int, float]] = []
        self.origin: nn.Module | None = None
        if edit.end > steps:
            raise CircuitError(
                f"an edit of steps {edit.start}:{edit.end}",
                expected=f"steps up to {steps}, the run's last",
            )
        self.clip = self._threshold()
        self._replaced = self._replacements()

    def at(self, step: int) -> Recipe:
        """See `Recipe.at`."""
        return self if self.edit.holds(step) else self.run

    def __getattr__(self, name: str) -> Any:
        """What only the run's own kind of recipe has, such as its split."""
        return getattr(self.__dict__["run"], name)

    # --- before the first step ---

    def begin(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        origin: Callable[[], TrainState] | None,
    ) -> None:
        """Refuse what the steps of the window do not have, before one of them is taken.

        Args:
            step: of the state that the training goes on from.
            origin: gives the state at which the edit starts.

        Raises:
            CircuitError: there is no such term, setting, head or parameter; an example occurs in no
                step of the window; or patterns of a state that nobody can give are to be held.
        """
        edit, groups = self.edit, groups_of(optimizer, names_by_id(module))
        edit.check(kind_of(optimizer), groups, self.decoupled_decay, module)
        for name, values in (("rate", self.run.rates(1)), ("decay", self.run.decays(1))):
            if edit.settings.get(name, 1.0) != 1 and values is None:
                raise CircuitError(
                    f"the recipe does not say its {name} step by step, so none can be otherwise",
                    fix="give it `rates`",
                )
        for name, share in edit.patterns.items():
            if share and not hasattr(module, "cfg"):
                raise CircuitError(
                    f"'{name}': the module is no HookedTransformer", expected="no heads"
                )
            if share:
                head: Any = parse_component(name, module, kind="head")  # type: ignore[arg-type]
                self.heads.append((f"blocks.{head.layer}.attn.hook_pattern", head.head, share))
        self._check_examples(module)
        if edit.examples:
            self._check_losses(module)
        if self.heads and edit.start < step < edit.end:
            if origin is None:
                raise CircuitError(
                    f"attention patterns are held as they are at step {edit.start}, and the"
                    f" training goes on at step {step}",
                    fix="start it anew",
                )
            self.origin = self.module()
            load_tensors(self.origin, origin().parameters)

    def _check_examples(self, module: nn.Module) -> None:
        edit = self.edit
        missing, replaced = set(edit.weighed), set(self._replaced)
        for step in range(edit.start + 1, edit.end + 1):
            if not (missing or replaced):
                return
            if replaced:
                replaced.difference_update(self._task.indices(edit.batch_of(step)).tolist())
            if missing:
                rows = {name: row for row, name in enumerate(self.sample_ids(step))}
                seen = missing & set(rows)
                missing -= seen
                self._check_positions(module, step, {name: rows[name] for name in seen})
        if missing or replaced:
            name = min(missing) if missing else self._names[min(replaced)]
            there = ", ".join(list(self.sample_ids(edit.start + 1))[:3])
            raise CircuitError(
                f"example '{name}' occurs in no step of {edit.start}:{edit.end}",
                expected=f"examples of the batches of these steps, such as {there}",
                fix="the position of a token, behind the @, is a number" if "@" in name else None,
            )

    def _check_positions(self, module: nn.Module, step: int, rows: Mapping[str, int]) -> None:
        """Refuse positions of a step's examples that predict nothing: no loss would be otherwise.

        Args:
            rows: in the batch, by name.
        """
        named = {
            name: positions
            for name in rows
            if (positions := [at for at in self.edit.weighed[name] if at is not None])
        }
        if not named:
            return
        batch = self.batch(step)
        if isinstance(self.run, TaskRecipe):
            predicts = batch.targets != UNPREDICTED
        else:
            asked = [(rows[name], at) for name, positions in named.items() for at in positions]
            predicts = self._predicting(module, batch, asked)
        for name, positions in named.items():
            there = predicts[rows[name]].nonzero().flatten().tolist()
            missing = next((at for at in positions if at not in there), None)
            if missing is not None:
                raise CircuitError(
                    f"example '{name}' predicts nothing at position {missing}",
                    expected=f"a position that does, such as {', '.join(map(str, there[:8]))}"
                    if there
                    else "losses() by example and position",
                )

    def _predicting(
        self, module: nn.Module, batch: Batch, asked: Sequence[tuple[int, int]]
    ) -> Bool[Tensor, "example pos"]:
        """Where a loss may hang on the outputs; of what is asked, whether it does.

        Args:
            asked: rows and positions.
        """
        with torch.enable_grad():
            outputs = self.run.outputs(module, batch).detach().requires_grad_()
            losses = self.run.losses(outputs, batch)
        predicts = losses != 0 if losses.ndim == 2 else losses.new_zeros(len(losses), 0)
        for row, at in asked:
            if at < predicts.shape[1]:  # a masked loss is a constant, whatever its value
                slope = torch.autograd.grad(losses[row, at], outputs, retain_graph=True)[0]
                predicts[row, at] = slope.any()
        return predicts.bool()

    def _check_losses(self, module: nn.Module) -> None:
        """Refuse a loss that is not made of its examples': the rest would go with one of them."""
        batch = self.run.batch(self.edit.start + 1)
        with torch.no_grad():
            outputs = self.run.outputs(module, batch)
            loss = float(self.run.loss(outputs, batch))
            losses = self.run.losses(outputs, batch).double()
        if abs(loss - float(losses.sum())) > ROUNDING * float(losses.abs().sum()):
            raise CircuitError(
                f"the losses of the examples sum to {float(losses.sum()):.6g}, and the loss is"
                f" {loss:.6g}, so that no example's share can be otherwise",
                expected="losses() that sum to loss()",
                fix="give each example its share of what loss() adds",
            )

    def _threshold(self) -> float | None:
        factor = self.edit.settings.get("clip", 1.0)
        if factor == 1:
            return self.run.clip
        if self.run.clip is None:
            raise CircuitError(
                "the training does not clip gradients", expected="an edit without 'clip'"
            )
        if factor == 0:
            raise CircuitError("clip*0 leaves no gradient", expected="a factor above 0")
        return self.run.clip * factor

    # --- what a step reads ---

    @property
    def _task(self) -> TaskRecipe:
        """The run's recipe, whose records stand in a split with an end.

        Raises:
            CircuitError: it is another.
        """
        if not (isinstance(self.run, TaskRecipe) and isinstance(self.run.split, Split)):
            raise CircuitError(
                "the training's records are drawn at need, so none can stand for another",
                expected="a split with an end, where examples are replaced",
            )
        return self.run

    @property
    def _names(self) -> Sequence[str]:
        split = self._task.split
        assert isinstance(split, Split)
        return split.sample_ids

    def _replacements(self) -> dict[int, int]:
        if not self.edit.replaced:
            return {}
        number = {name: index for index, name in enumerate(self._names)}
        for name in (name for pair in self.edit.replaced.items() for name in pair):
            if name not in number:
                raise CircuitError(
                    f"no example '{name}' in '{self._task.config.train_split}'",
                    expected=f"one such as {self._names[0]}",
                )
        return {number[old]: number[new] for old, new in self.edit.replaced.items()}

    def _indices(self, step: int) -> Indices:
        """Of a step's records, with those that are replaced."""
        indices = self._task.indices(self.edit.batch_of(step)).copy()
        indices[:] = [self._replaced.get(index, index) for index in indices.tolist()]
        return indices

    def examples(self, step: int) -> NamedExamples | Examples:
        """See `Recipe.examples`; with the batches swapped and the examples replaced."""
        if self._replaced:
            return self._task.split.batch(self._indices(step))
        return self.run.at(step).examples(self.edit.batch_of(step))

    def sample_ids(self, step: int) -> Sequence[str]:
        """See `Recipe.sample_ids`."""
        if self._replaced:
            return [self._names[index] for index in self._indices(step).tolist()]
        return self.run.sample_ids(self.edit.batch_of(step))

    def batch(self, step: int) -> Batch:
        """See `Recipe.batch`; with the weights of its examples."""
        if self._replaced:
            batch = self._task.read(self._indices(step))
        else:
            batch = self.run.batch(self.edit.batch_of(step))
        weights = self.edit.weights(self.sample_ids(step)) if self.edit.examples else None
        return batch if weights is None else replace(batch, weights=weights)

    # --- what it computes ---

    def module(self) -> nn.Module:
        """See `Recipe.module`."""
        return self.run.module()

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        """See `Recipe.outputs`; with the patterns of some heads as they were."""
        with self._patterns(module, batch):
            return self.run.outputs(module, batch)

    def losses(self, outputs: Tensor, batch: Batch) -> Losses:
        """See `Recipe.losses`."""
        return self.run.losses(outputs, batch)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """See `Recipe.loss`."""
        return self.run.loss(outputs, batch)

    def accuracy(self, outputs: Tensor, batch: Batch) -> float | None:
        """See `Recipe.accuracy`."""
        return self.run.accuracy(outputs, batch)

    @contextmanager
    def _patterns(self, module: Any, batch: Batch) -> Iterator[None]:
        if not self.heads:
            yield
            return
        if not hasattr(module, "hooks"):
            raise CircuitError(
                "the losses of a step whose attention patterns are held are no function of the"
                " weights alone",
                expected="a window without such steps",
            )
        assert self.origin is not None, "the session has entered the window"
        origin: Any = self.origin
        points, cache = {point for point, _, _ in self.heads}, {}

        def keep(value: Tensor, hook: Any) -> None:
            cache[hook.name] = value

        with torch.no_grad(), origin.hooks(fwd_hooks=[(point, keep) for point in points]):
            self.run.outputs(origin, batch)
        held = [
            (point, partial(_held, then=cache[point], at=head, share=share))
            for point, head, share in self.heads
        ]
        with module.hooks(fwd_hooks=held):
            yield

    # --- how the optimizer is set, and where the weights go ---

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """See `Recipe.optimizer`."""
        return self.run.optimizer(module)

    def rates(self, step: int) -> Sequence[float] | None:
        """See `Recipe.rates`."""
        return _scaled(self.run.rates(step), self.edit.settings.get("rate", 1.0))

    def decays(self, step: int) -> Sequence[float] | None:
        """See `Recipe.decays`."""
        return _scaled(self.run.decays(step), self.edit.settings.get("decay", 1.0))

    def update(self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Flat | None:
        """See `Recipe.update`; the optimizer remembers what it would have remembered."""
        if not self.edit.moves:
            return self.run.update(module, optimizer, step)
        names, parameters = names_by_id(module), dict(module.named_parameters())
        layout = ParameterLayout.of_model(module)
        before = {n: p.detach().clone() for n, p in parameters.items()}
        past = past_of(optimizer, names)
        self.run.update(module, optimizer, step)
        groups = groups_of(optimizer, names)
        held = {name for group in groups for name in group.names}
        taken = TakenStep(
            kind=kind_of(optimizer),
            decoupled=self.decoupled_decay,
            groups=groups,
            before=before,
            after={n: p.detach().clone() for n, p in parameters.items()},
            gradient={n: p.grad for n, p in parameters.items() if n in held and p.grad is not None},
            past=past,
            memory=past_of(optimizer, names),
            outside={},
        )
        moved = self.edit.moved(taken, layout)
        with torch.no_grad():
            for name, part in layout.unflatten(moved).items():
                parameters[name].copy_(part)
        return layout.flatten(taken.after)

    # --- what goes on as it did ---

    def prove(self) -> None:
        """See `Recipe.prove`."""
        self.run.prove()

    def memory(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
        """See `Recipe.memory`."""
        return self.run.memory(module, optimizer)

    def restore(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        memory: Mapping[str, Mapping[str, Tensor]],
        step: int,
    ) -> None:
        """See `Recipe.restore`."""
        self.run.restore(module, optimizer, memory, step)

    def watched(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> AbstractContextManager[None]:
        """See `Recipe.watched`; the weights with which patterns are held are remembered."""
        if self.heads and step == self.edit.start + 1:
            self.origin = copy.deepcopy(module)
        return self.run.watched(module, optimizer, step)


def _scaled(values: Sequence[float] | None, factor: float) -> Sequence[float] | None:
    return None if values is None else [value * factor for value in values]


def _held(pattern: Tensor, hook: Any, *, then: Tensor, at: int, share: float) -> Tensor:
    """`[batch, head, query, key]`, with a share of one head's as it was then."""
    mixed = (1 - share) * pattern[:, at] + share * then[:, at]
    return torch.cat([pattern[:, :at], mixed[:, None], pattern[:, at + 1 :]], 1)
