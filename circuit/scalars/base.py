"""The Scalar protocol: a differentiable number of the weights, averaged over fixed examples.

A scalar says what it *needs* (token sequences, hook points, ablations), is *bound* once per step to
the model before the step (bases and other constants), and then maps weights and activations to one
*value* per example. It runs no forward pass of its own: whoever evaluates scalars merges their
needs and runs each distinct sequence once, and once more for every ablated component.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, cast

from circuit.errors import CircuitError, several
from circuit.lazy import torch
from circuit.model.components import Hook, parse_component
from circuit.model.readout import LOGITS, logits_of, readable

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor, nn
    from transformer_lens import HookedTransformer
    from transformer_lens.hook_points import HookPoint

Sequences = tuple[tuple[int, ...], ...]
Activations: TypeAlias = "dict[str, Tensor]"
"""Hook point -> activations `[sequence, pos, ...]`."""

_BLOCK = re.compile(r"blocks\.(\d+)\..*")


@dataclass(frozen=True)
class Needs:
    """What a scalar wants to see of a model.

    Attributes:
        sequences: distinct token sequences.
        hooks: names of hook points.
        ablations: components; the hook points are also read with each of them ablated.
    """

    sequences: Sequences
    hooks: tuple[str, ...]
    ablations: tuple[str, ...] = ()


class Cache(Mapping[str, "Tensor"]):
    """Activations of a scalar's own sequences: `cache[hook]` is `[sequence, pos, ...]`.

    `cache.without("L1H3")[hook]` is the same with that component ablated.
    """

    def __init__(
        self,
        runs: Mapping[str | None, Activations],
        rows: Int[Tensor, " scalar_sequence"] | None = None,
        ablated: str | None = None,
    ) -> None:
        """Look at some rows (all by default) of runs, which stand under the component ablated."""
        self._runs, self._rows, self._ablated = runs, rows, ablated

    def __getitem__(self, hook: str) -> Tensor:
        """The activations at a hook point that the scalar's needs name."""
        activations = self._runs[self._ablated][hook]
        return activations if self._rows is None else activations[self._rows]

    def __iter__(self) -> Iterator[str]:
        """The hook points."""
        return iter(self._runs[self._ablated])

    def __len__(self) -> int:
        """Number of hook points."""
        return len(self._runs[self._ablated])

    def without(self, component: str) -> Cache:
        """The same activations with a component ablated that the scalar's needs name."""
        return Cache(self._runs, self._rows, component)


class BoundScalar(Protocol):
    """A scalar whose constants are set."""

    @property
    def constant(self) -> bool:
        """Whether every step binds it to the same constants, so that its changes telescope."""

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """One differentiable number per example; the scalar is their mean."""


class Scalar(Protocol):
    """A number of the weights that can be followed through training."""

    @property
    def name(self) -> str:
        """What rows and figures call it."""

    @property
    def needs(self) -> Needs:
        """What it has to see of a model."""

    def bind(self, model: HookedTransformer) -> BoundScalar:
        """Set the constants from the model before a step."""


Measure: TypeAlias = "Callable[[nn.Module], Tensor]"
"""A scalar as a plain function: a module -> one differentiable number, or several to average."""


@dataclass(frozen=True)
class Measured:
    """A plain function of the module as a scalar: it sees no shared activations."""

    function: Measure
    name: str
    needs: ClassVar[Needs] = Needs((), ())
    constant: ClassVar[bool] = True

    def bind(self, model: nn.Module) -> Measured:
        """Nothing depends on the step."""
        return self

    def values(self, model: nn.Module, cache: Cache) -> Float[Tensor, " example"]:
        """What the function gives, as a vector.

        Raises:
            CircuitError: it gives no tensor, or one without numbers.
        """
        numbers = self.function(model)
        if not isinstance(numbers, torch.Tensor) or not numbers.numel():
            empty = isinstance(numbers, torch.Tensor)
            raise CircuitError(
                f"scalar {self.name} gives {'no number' if empty else type(numbers).__name__}",
                expected="a tensor that was computed from the module's parameters",
                fix=None if empty else "leave out no_grad, detach and item",
            )
        return numbers.reshape(-1)


def measured(scalar: Scalar | Measure) -> Scalar:
    """A scalar, which a plain function becomes under its own name.

    Raises:
        CircuitError: it is neither.
    """
    if hasattr(scalar, "bind") and hasattr(scalar, "needs"):
        return cast("Scalar", scalar)
    if not callable(scalar):
        raise CircuitError(
            f"{scalar!r} is no scalar",
            expected="a function of the module that gives a tensor, or a circuit Scalar",
        )
    name = getattr(scalar, "__name__", type(scalar).__name__)
    return cast("Scalar", Measured(scalar, name.strip("<>")))


def all_measured(scalars: Iterable[Scalar | Measure]) -> list[Scalar]:
    """Several scalars, each as `measured` gives it.

    Raises:
        CircuitError: it is one without a list around it, two share a name, or as `measured`.
    """
    every = [measured(scalar) for scalar in several(scalars, "scalars")]
    names = [scalar.name for scalar in every]
    if len(set(names)) < len(names):
        raise CircuitError(f"scalars {', '.join(names)}", expected="each once")
    return every


@dataclass(frozen=True)
class SharedBatch:
    """The merged needs of several scalars.

    Attributes:
        tokens: their distinct sequences, padded on the right.
        hooks: for no ablation (None) and for each ablated component, the hook points to read.
        rows: for each scalar, the rows of its own sequences in `tokens`; None if it is all of them
            in their order.
    """

    tokens: Int[Tensor, "sequence pos"]
    hooks: Mapping[str | None, frozenset[str]]
    rows: tuple[Int[Tensor, " scalar_sequence"] | None, ...]

    @classmethod
    def merge(cls, scalars: Sequence[Scalar], device: str = "cpu") -> SharedBatch:
        """Each distinct sequence, hook point and ablation once."""
        places: dict[tuple[int, ...], int] = {}
        owned = [
            [places.setdefault(s, len(places)) for s in scalar.needs.sequences]
            for scalar in scalars
        ]
        longest = max(map(len, places), default=0)
        # what stands behind a sequence is never read: any token fills the rows up
        tokens = torch.zeros((len(places), longest), dtype=torch.int64, device=device)
        for sequence, row in places.items():
            tokens[row, : len(sequence)] = torch.tensor(sequence, device=device)
        hooks: dict[str | None, frozenset[str]] = {None: frozenset()}
        for scalar in scalars:
            for condition in (None, *scalar.needs.ablations):
                hooks[condition] = hooks.get(condition, frozenset()) | set(scalar.needs.hooks)
        everything = list(range(len(places)))
        rows = [
            None if indices == everything else torch.tensor(indices, device=device)
            for indices in owned
        ]
        return cls(tokens, hooks, tuple(rows))

    def run(self, model: HookedTransformer) -> dict[str | None, Activations]:
        """One forward pass for no ablation and one for each ablated component."""
        return {
            condition: forward_activations(model, self.tokens, hooks, ablated=condition)
            for condition, hooks in self.hooks.items()
        }

    def values(
        self, model: HookedTransformer, bound: Sequence[BoundScalar]
    ) -> list[Float[Tensor, " example"]]:
        """The scalars' values of their examples, from shared forward passes."""
        runs = self.run(model)
        return [
            scalar.values(model, Cache(runs, rows))
            for scalar, rows in zip(bound, self.rows, strict=True)
        ]

    def means(
        self, model: HookedTransformer, bound: Sequence[BoundScalar]
    ) -> list[Float[Tensor, ""]]:
        """Their means over the examples."""
        return [values.mean() for values in self.values(model, bound)]


def forward_activations(
    model: HookedTransformer,
    tokens: Int[Tensor, "sequence pos"],
    hooks: frozenset[str],
    *,
    ablated: str | None = None,
) -> Activations:
    """Differentiable activations at some hook points; layers after the last of them do not run."""
    activations: Activations = {}
    if not hooks:  # a scalar of the weights alone
        return activations

    def keep(name: str) -> Hook:  # run_with_cache would detach; a point may have other names, too
        def look(value: Tensor, hook: HookPoint) -> None:
            activations[name] = value

        return name, look

    if not hasattr(model, "hook_dict"):
        return {LOGITS: _logits_alone(model, tokens, hooks, ablated)}
    missing = sorted(hooks - model.hook_dict.keys())
    if missing:
        raise CircuitError(
            f"the model has no hook point {missing[0]}",
            expected="one of its own: without MLPs or normalization there are fewer",
        )
    layers = [_BLOCK.fullmatch(hook) for hook in hooks]
    last = None if None in layers else max(int(m[1]) for m in layers if m)
    fwd_hooks: list[Hook] = [keep(hook) for hook in sorted(hooks)]
    if ablated is not None:
        fwd_hooks = [parse_component(ablated, model).ablation(), *fwd_hooks]
    model.run_with_hooks(
        readable(model, tokens),
        return_type="logits" if last is None else None,
        stop_at_layer=None if last is None else last + 1,
        fwd_hooks=fwd_hooks,
    )
    return activations


def _logits_alone(
    module: nn.Module, tokens: Tensor, hooks: frozenset[str], ablated: str | None
) -> Tensor:
    """What any module tells: its logits."""
    if hooks != {LOGITS} or ablated is not None:
        raise CircuitError(
            f"{type(module).__name__} has no activations by name",
            expected="a HookedTransformer, or a scalar of logits alone",
        )
    return logits_of(module, tokens)


def evaluate_scalar(scalar: Scalar, model: HookedTransformer) -> Float[Tensor, " example"]:
    """A scalar's values on one model, bound to it; for notebooks and checks."""
    shared = SharedBatch.merge([scalar], device=str(next(model.parameters()).device))
    return scalar.bind(model).values(model, Cache(shared.run(model), shared.rows[0]))
