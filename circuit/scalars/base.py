"""The Scalar protocol: a differentiable number of the weights, averaged over fixed examples.

A scalar says what it *needs* (token sequences, hook points), is *bound* once per step to the model
before the step (bases and other constants), and then maps weights and activations to one *value*
per example. It runs no forward pass of its own: whoever evaluates scalars merges their needs and
runs each distinct sequence once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from circuit.tasks.symbolic_kv import PAD

Sequences = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Needs:
    """What a scalar wants to see of a model.

    Attributes:
        sequences: distinct token sequences.
        hooks: names of hook points.
    """

    sequences: Sequences
    hooks: tuple[str, ...]


Cache = Mapping[str, Tensor]
"""Hook point -> activations `[sequence, pos, ...]` of the scalar's own sequences, in order."""


class BoundScalar(Protocol):
    """A scalar whose constants are set."""

    constant: bool
    """Whether every step binds it to the same constants, so that its changes telescope."""

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """One differentiable number per example; the scalar is their mean."""


class Scalar(Protocol):
    """A number of the weights that can be followed through training."""

    name: str
    needs: Needs

    def bind(self, model: HookedTransformer) -> BoundScalar:
        """Set the constants from the model before a step."""


@dataclass(frozen=True)
class Batch:
    """The merged sequences of several scalars.

    Attributes:
        tokens: padded on the right.
        hooks: every hook point that any of them needs.
        rows: for each scalar, the rows of its own sequences in `tokens`.
    """

    tokens: Int[Tensor, "sequence pos"]
    hooks: frozenset[str]
    rows: tuple[Int[Tensor, " own"], ...]

    @classmethod
    def merge(cls, scalars: Sequence[Scalar], device: str = "cpu") -> Batch:
        """Each distinct sequence once."""
        places: dict[tuple[int, ...], int] = {}
        rows = []
        for scalar in scalars:
            own = [places.setdefault(s, len(places)) for s in scalar.needs.sequences]
            rows.append(torch.tensor(own, device=device))
        tokens = torch.full((len(places), max(map(len, places))), PAD, device=device)
        for sequence, row in places.items():
            tokens[row, : len(sequence)] = torch.tensor(sequence, device=device)
        hooks = frozenset(hook for scalar in scalars for hook in scalar.needs.hooks)
        return cls(tokens, hooks, tuple(rows))

    def means(
        self, model: HookedTransformer, bound: Sequence[BoundScalar]
    ) -> list[Float[Tensor, ""]]:
        """The scalars' means over their examples, from one shared forward pass."""
        cache: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint) -> None:  # run_with_cache would detach
            cache[str(hook.name)] = value

        needs_logits = any(hook.startswith("unembed.") for hook in self.hooks)
        model.run_with_hooks(
            self.tokens,
            return_type="logits" if needs_logits else None,
            fwd_hooks=[(hook, keep) for hook in sorted(self.hooks)],
        )
        means = []
        for scalar, rows in zip(bound, self.rows, strict=True):
            own = {name: activations[rows] for name, activations in cache.items()}
            means.append(scalar.values(model, own).mean())
        return means
