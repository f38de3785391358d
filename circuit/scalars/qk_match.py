"""QK match: how much better a head's query matches the support's key than the distractors'.

With `M = U_r U_r^T W_QK V_r V_r^T`, `s(q, p) = x_q M x_p^T / sqrt(d_h)` and `x` the context stage
through the head's own ln1 (or raw), the scalar is, averaged over reads,
`mean_{p in support} s - mean_{p in distractors} s` (definitions.md section 5). Weights only: biases
are left out, so that it speaks of the matching alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit.errors import CircuitError
from circuit.model.components import Component, parse_component
from circuit.model.stages import stage_before, stage_hook
from circuit.scalars.base import Cache, Needs
from circuit.tasks.positions import Batch, role_mask

LayerNormMode = Literal["head_ln1", "none"]


@dataclass(frozen=True)
class ReadMasks:
    """Reads of some sequences: where the query stands, and which positions are compared.

    Attributes:
        sequences: distinct token sequences.
        row: sequence of each read.
        query: its query position.
        support, distractors: masks over positions.
    """

    sequences: tuple[tuple[int, ...], ...]
    row: Int[Tensor, " read"]
    query: Int[Tensor, " read"]
    support: Bool[Tensor, "read pos"]
    distractors: Bool[Tensor, "read pos"]

    @classmethod
    def of(
        cls,
        batch: Batch,
        *,
        support_role: str = "support_value",
        distractor_role: str = "value_distractors",
    ) -> ReadMasks:
        """The reads of a batch that have at least one distractor.

        Raises:
            CircuitError: there is no such role, or no read has a distractor.
        """
        support = role_mask(batch, support_role)
        distractors = role_mask(batch, distractor_role)
        chosen = distractors.any(1) & support.any(1)
        if not chosen.any():
            raise CircuitError(f"no read has positions of role '{distractor_role}'")
        return cls(
            tuple(
                tuple(row[:length].tolist())
                for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)
            ),
            batch.reads.row[chosen],
            batch.reads.key_pos[chosen],
            support[chosen],
            distractors[chosen],
        )


class QKMatch:
    """The QK match of one head at one rank over fixed reads."""

    def __init__(
        self,
        head: str,
        reads: ReadMasks,
        *,
        layers: int,
        rank: int | None = None,
        basis: HookedTransformer | None = None,
        layernorm_mode: LayerNormMode = "head_ln1",
        context_stage: str | None = None,
    ) -> None:
        """Describe the scalar.

        Args:
            head: such as `L2H1`.
            layers: of the model.
            rank: of the basis; None takes the whole matrix (`--basis full`).
            basis: a model whose head gives the basis once and for all (`--basis step:N`); None
                takes the basis anew from the model before each step (`--basis source`).
            context_stage: where `x` is read; None is the stage that the head reads.

        Raises:
            CircuitError: the component is no head.
        """
        self.component: Component = parse_component(head)
        if self.component.head is None:
            raise CircuitError(f"'{head}' has no QK circuit", expected="a head, such as L2H1")
        stage = context_stage or stage_before(self.component.layer)
        self.hook = stage_hook(stage, layers)
        self.name = f"qk_match.{head}." + ("full" if rank is None else f"rank{rank}")
        self.needs = Needs(reads.sequences, (self.hook,))
        self.reads = reads
        self.rank = rank
        self.layernorm_mode = layernorm_mode
        self._fixed = None if basis is None or rank is None else self._basis(basis)

    def bind(self, model: HookedTransformer) -> BoundQKMatch:
        """Take the basis from the model, unless it is fixed or the whole matrix."""
        if self.rank is None:
            return BoundQKMatch(self, None, constant=True)
        if self._fixed is not None:
            return BoundQKMatch(self, self._fixed, constant=True)
        return BoundQKMatch(self, self._basis(model), constant=False)

    def weights(self, model: HookedTransformer) -> tuple[Tensor, Tensor]:
        """The head's `W_Q` and `W_K`, `[d_model, d_head]`."""
        attention = model.blocks[self.component.layer].attn
        return attention.W_Q[self.component.head], attention.W_K[self.component.head]

    def _basis(self, model: HookedTransformer) -> tuple[Tensor, Tensor]:
        """Top left and right singular vectors of `W_QK`, `[d_model, rank]` (float64 SVD)."""
        assert self.rank is not None
        w_q, w_k = (weight.detach().double() for weight in self.weights(model))
        if self.rank > w_q.shape[1]:
            raise CircuitError(
                f"rank {self.rank} of {self.component}", expected=f"at most {w_q.shape[1]} (d_head)"
            )
        left, _, right = torch.linalg.svd(w_q @ w_k.T, full_matrices=False)
        dtype = model.W_E.dtype
        return left[:, : self.rank].to(dtype), right[: self.rank].T.to(dtype)


@dataclass(frozen=True)
class BoundQKMatch:
    """A QK match whose basis is set."""

    scalar: QKMatch
    basis: tuple[Float[Tensor, "d_model rank"], Float[Tensor, "d_model rank"]] | None
    constant: bool

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """Support mean minus distractor mean of the scores, one per read."""
        scalar, reads = self.scalar, self.scalar.reads
        x = cache[scalar.hook]
        if scalar.layernorm_mode == "head_ln1":
            x = model.blocks[scalar.component.layer].ln1(x)
        w_q, w_k = scalar.weights(model)
        if self.basis is not None:
            left, right = self.basis
            w_q, w_k = left @ (left.T @ w_q), right @ (right.T @ w_k)
        query = x[reads.row, reads.query] @ w_q
        keys = (x @ w_k)[reads.row]
        scores = torch.einsum("rh,rph->rp", query, keys) / math.sqrt(w_q.shape[1])
        width = scores.shape[1]
        return _masked_mean(scores, reads.support[:, :width]) - _masked_mean(
            scores, reads.distractors[:, :width]
        )


def _masked_mean(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores * mask).sum(1) / mask.sum(1)


def qk_matches(
    heads: Sequence[str], reads: ReadMasks, *, layers: int, ranks: Sequence[int | None]
) -> list[QKMatch]:
    """One scalar a head and rank, with the basis of each step's source."""
    return [QKMatch(head, reads, layers=layers, rank=rank) for head in heads for rank in ranks]
