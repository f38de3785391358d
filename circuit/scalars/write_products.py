"""What a readout uses of a write: gradients times deltas, by position and part (definitions.md 6).

    g_in.δ_in       the write where the MLP reads it, by the readout behind skip and MLP
    g_out.δ_in      the part that goes past the MLP (skip)
    g_out.δ_mlp     what the MLP makes of it
    g_out.δ_total   both

Products are float64 on the CPU. What does not exist is NaN in a tensor and None in a list: a cosine
or overlap of a zero vector, or with a basis of vectors that span fewer dimensions than its rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from circuit.lazy import torch
from circuit.model.readout import LOGITS
from circuit.model.stages import stage_hook
from circuit.model.subspaces import Basis, vector_basis
from circuit.scalars.answers import Competitors, fixed_scalars
from circuit.scalars.base import Activations, Cache, forward_activations
from circuit.scalars.functional_write import (
    ReadScalar,
    WritePath,
    WriteReads,
    deltas,
    readout_gradients,
)
from circuit.tasks.examples import Examples

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor
    from transformer_lens import HookedTransformer

PRODUCTS = {
    "g_in_delta_in": ("g_in", "delta_in"),
    "g_out_delta_in": ("g_out", "delta_in"),
    "g_out_delta_mlp": ("g_out", "delta_mlp"),
    "g_out_delta_total": ("g_out", "delta_total"),
}
"""Column -> the gradient and the delta that it multiplies."""

SUMMED = (*PRODUCTS, "ablation_effect")
"""Columns that add over pairs."""

NORMS = ("delta_in", "delta_mlp", "delta_total", "g_in", "g_out")
SIZES = (
    *(f"cosine_{product}" for product in PRODUCTS),
    *(f"norm_{name}" for name in NORMS),
    *(
        name
        for g, delta in PRODUCTS.values()
        for name in (f"overlap_{delta}_on_{g}", f"overlap_{g}_on_{delta}")
    ),
)
"""The other columns."""

_LEAST_SPREAD = 1e-6
"""Singular values below this share of the largest are rounding of float32 activations."""


class Readout(NamedTuple):
    """An answer scalar and the token that it compares each read's answer with.

    Attributes:
        scalar: one of `fixed_scalars`, of the source competitor if of any.
        competitors: token ids, one a read; empty where the scalar has none.
    """

    scalar: str
    competitors: tuple[int, ...]

    def of(self, answer: Tensor) -> ReadScalar:
        """The scalar as a function of logits, for the reads with these answers."""
        fixed = torch.tensor(self.competitors, device=answer.device) if self.competitors else answer
        return partial(_fixed, answer=answer, competitors=fixed, name=self.scalar)


def _fixed(logits: Tensor, *, answer: Tensor, competitors: Tensor, name: str) -> Tensor:
    return fixed_scalars(logits, answer, Competitors(competitors, competitors))[name]


@dataclass(frozen=True)
class Measured:
    """What the reads of one model show.

    Attributes:
        columns: by readout and role: every column of `SUMMED` and `SIZES`, a value a read.
        positions: by role, their number, one a read.
        gap: largest |g_out.δ_total - g_out.δ_in - g_out.δ_mlp| with `δ_mlp` from the MLP's output.
        largest: largest |product|.
    """

    columns: dict[tuple[Readout, str], dict[str, list[float | None]]]
    positions: dict[str, list[int]]
    gap: float
    largest: float


def measure(
    model: HookedTransformer,
    batch: Examples,
    path: WritePath,
    roles: Sequence[str],
    readouts: Sequence[Readout],
    rank: int,
) -> Measured:
    """All reads at once: one run of their sequences, one ablated, and one from the MLP on.

    `ablation_effect` is the scalar minus the same with the source ablated.

    Raises:
        CircuitError: there is no such role, or the rank is too large.
    """
    layers, source, of_mlp = model.cfg.n_layers, str(path.source), path.mlp.hook_name
    in_hook, out_hook = (
        stage_hook(stage, layers) for stage in (path.input_stage, path.output_stage)
    )
    hooks = frozenset([in_hook, out_hook, of_mlp, LOGITS])
    with torch.no_grad():
        clean = forward_activations(model, batch.tokens, hooks)
        without = forward_activations(model, batch.tokens, hooks, ablated=source)
    by_role = {role: WriteReads.of(batch, role) for role in roles}
    scalars = [readout.of(batch.answer) for readout in readouts]
    gradients = readout_gradients(model, by_role[roles[0]], path, without[in_hook], scalars)
    exact_clean, exact_without = _exact(clean), _exact(without)
    delta = deltas(Cache({None: exact_clean, source: exact_without}), path, layers)
    parts = {
        "delta_in": delta["input_delta"],
        "delta_mlp": delta["mlp_output_delta"],
        "delta_total": delta["post_mlp_total_delta"],
        "written": exact_clean[of_mlp] - exact_without[of_mlp],  # what the MLP says of itself
    }
    logits = clean[LOGITS][batch.row, batch.at]
    effects = [
        (scalar(logits).double() - gradient.value.double()).cpu()
        for scalar, gradient in zip(scalars, gradients, strict=True)
    ]
    columns, gap, largest = {}, 0.0, 0.0
    for role in roles:
        reads = by_role[role].to("cpu")
        at_role = {name: reads.gather(vectors) for name, vectors in parts.items()}
        for readout, gradient, effect in zip(readouts, gradients, effects, strict=True):
            g_in = reads.gather_own(gradient.into.cpu().double())
            g_out = reads.gather_own(gradient.out.cpu().double())
            products = write_products(at_role | {"g_in": g_in, "g_out": g_out}, reads.real, rank)
            through = (g_out * at_role["written"]).sum((1, 2))
            residual = products["g_out_delta_total"] - products["g_out_delta_in"] - through
            gap = max(gap, float(residual.abs().max()))
            largest = max(largest, *(float(products[name].abs().max()) for name in PRODUCTS))
            products["ablation_effect"] = effect
            columns[readout, role] = {name: _nulls(values) for name, values in products.items()}
    positions = {role: reads.real.sum(1).tolist() for role, reads in by_role.items()}
    return Measured(columns, positions, gap, largest)


def _exact(activations: Activations) -> Activations:
    return {hook: value.cpu().double() for hook, value in activations.items()}


def _nulls(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def write_products(
    vectors: Mapping[str, Float[Tensor, "read slot d_model"]],
    real: Bool[Tensor, "read slot"],
    rank: int,
) -> dict[str, Float[Tensor, " read"]]:
    """Every column of `PRODUCTS` and `SIZES`, one number a read.

    Cosines and norms are those of the role's positions laid end to end. `overlap_a_on_b` is the
    norm of the unit projection of a read's `a`, averaged over its positions, on the PCA basis of
    all reads' `b`, averaged likewise.

    Args:
        vectors: the five of `NORMS`, zero where a slot is not real.
        rank: of the PCA bases, below the number of reads.

    Raises:
        CircuitError: the rank is too large.
    """
    norms = {name: vectors[name].flatten(1).norm(dim=1) for name in NORMS}
    counts = real.sum(1, keepdim=True).clamp(min=1)
    means = {name: vectors[name].sum(1) / counts for name in NORMS}  # [read, d_model]
    bases = {name: _basis(mean, rank) for name, mean in means.items()}
    columns = {f"norm_{name}": norm for name, norm in norms.items()}
    for product, (g, delta) in PRODUCTS.items():
        columns[product] = (vectors[g] * vectors[delta]).sum((1, 2))
        columns[f"cosine_{product}"] = columns[product] / (norms[g] * norms[delta])
        columns[f"overlap_{delta}_on_{g}"] = _overlap(means[delta], bases[g])
        columns[f"overlap_{g}_on_{delta}"] = _overlap(means[g], bases[delta])
    return {name: columns[name] for name in (*PRODUCTS, *SIZES)}


def _basis(vectors: Float[Tensor, "read d_model"], rank: int) -> Basis | None:
    basis = vector_basis(vectors, rank)
    spread = torch.linalg.matrix_rank(vectors - vectors.mean(0), rtol=_LEAST_SPREAD)
    return basis if int(spread) >= rank else None


def _overlap(vectors: Float[Tensor, "read d_model"], basis: Basis | None) -> Float[Tensor, " read"]:
    if basis is None:
        return torch.full((len(vectors),), torch.nan, dtype=vectors.dtype)
    inside: Tensor = (vectors @ basis).norm(dim=1)
    whole: Tensor = vectors.norm(dim=1)
    return inside / whole
