"""Route scores: how far a clean activation, let in at one stage and role, moves the answer.

The corrupted run of a pair is patched with the clean activation, whole or projected on a subspace
basis, `x_corr - B B^T x_corr + B B^T x_clean`; the score is the change of the contrast margin
`logit(a) - logit(b)` at the prediction position, patched minus corrupted, where (a, b) are the
pair's transfer tokens (definitions.md section 5). At each checkpoint every run is made once for all
pairs, and each route restarts the corrupted run at its own stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.stages import read_stages, run_from
from circuit.model.subspaces import Basis, keep, remove, subspace_basis
from circuit.scalars.routes import Route
from circuit.tasks.examples import Examples
from circuit.tasks.pairs import Pair

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

Places: TypeAlias = "tuple[Int[Tensor, ' place'], Int[Tensor, ' place'], Int[Tensor, ' place']]"
"""Pair, position on the clean side, position on the corrupted side."""
Residual: TypeAlias = "Float[Tensor, 'row pos d_model']"


@dataclass(frozen=True)
class PairSides:
    """Both sides of some pairs; read `i` of each side is that of pair `i`.

    Attributes:
        clean, corrupted: a distinct record is one row.
        transfer: token ids (a, b).
        pair_ids: for messages.
    """

    clean: Examples
    corrupted: Examples
    transfer: Int[Tensor, "pair 2"]
    pair_ids: tuple[str, ...]

    @classmethod
    def of(cls, pairs: Sequence[Pair], clean: Examples, corrupted: Examples) -> PairSides:
        """The pairs, and their sides as `Study.side` makes them."""
        transfer = torch.tensor([p.transfer_tokens for p in pairs], device=clean.tokens.device)
        return cls(clean, corrupted, transfer, tuple(p.pair_id for p in pairs))

    def places(self, role: str) -> Places:
        """The positions of a role on both sides, matched in order.

        Raises:
            CircuitError: there is no such role, or a pair has unequal counts (it is named).
        """
        clean, corrupted = self.clean.role(role), self.corrupted.role(role)
        differing = (clean.sum(1) != corrupted.sum(1)).nonzero()
        if len(differing):
            first = int(differing[0])
            raise CircuitError(
                f"{int(clean[first].sum())} clean and {int(corrupted[first].sum())} corrupted"
                f" positions of role '{role}'",
                where=f"pair {self.pair_ids[first]}",
                expected="as many on both sides, to be matched in order",
            )
        pair, clean_pos = clean.nonzero().unbind(1)
        return pair, clean_pos, corrupted.nonzero()[:, 1]


@dataclass(frozen=True)
class PairRuns:
    """What the two runs of every pair gave at one checkpoint.

    Attributes:
        clean: residual at the stages asked for, one row a distinct clean record.
        corrupted: the same of the corrupted runs, one row a pair.
        clean_logits, corrupted_logits: at the prediction positions.
    """

    clean: dict[str, Residual]
    corrupted: dict[str, Residual]
    clean_logits: Float[Tensor, "pair vocab"]
    corrupted_logits: Float[Tensor, "pair vocab"]

    @classmethod
    def of(cls, model: HookedTransformer, sides: PairSides, routes: Sequence[Route]) -> PairRuns:
        """Run each side once; no gradients."""
        stages = list(dict.fromkeys(route.stage for route in routes))

        def run(batch: Examples) -> tuple[dict[str, Residual], Tensor]:
            logits, residuals = read_stages(model, batch.tokens, *stages)
            return residuals, logits[batch.row, batch.at]

        with torch.no_grad():
            (clean, clean_logits), (corrupted, corrupted_logits) = map(
                run, (sides.clean, sides.corrupted)
            )
        by_pair = {stage: x[sides.corrupted.row] for stage, x in corrupted.items()}
        return cls(clean, by_pair, clean_logits, corrupted_logits)


def route_bases(
    model: HookedTransformer, routes: Sequence[Route], token_sets: Mapping[str, range]
) -> list[Basis | None]:
    """The basis of each route, from the weights of this checkpoint; None for the whole residual.

    Raises:
        CircuitError: as `subspace_basis`.
    """
    return [
        subspace_basis(
            model,
            route.subspace,
            route.rank,
            head=route.head,
            token_sets=token_sets,
        )
        for route in routes
    ]


def contrast_margin(
    logits: Float[Tensor, "pair vocab"], transfer: Int[Tensor, "pair 2"]
) -> Float[Tensor, " pair"]:
    """`logit(a) - logit(b)` of the transfer tokens."""
    first, second = logits.gather(1, transfer).unbind(1)
    return first - second


def route_scores(
    model: HookedTransformer,
    sides: PairSides,
    runs: PairRuns,
    routes: Sequence[Route],
    bases: Sequence[Basis | None],
) -> Float[Tensor, "route pair"]:
    """The score of each route for each pair: one patched run of all pairs a route.

    Args:
        runs: of the same model, with the stages of these routes.
        bases: of the routes, in order (`route_bases`).

    Raises:
        CircuitError: a role has unequal counts on the two sides of a pair.
    """
    unpatched = contrast_margin(runs.corrupted_logits, sides.transfer)
    scores = []
    for route, basis in zip(routes, bases, strict=True):
        logits = _patched_logits(model, sides, runs, route, basis)
        scores.append(contrast_margin(logits, sides.transfer) - unpatched)
    return torch.stack(scores)


def _patched_logits(
    model: HookedTransformer, sides: PairSides, runs: PairRuns, route: Route, basis: Basis | None
) -> Tensor:
    pair, clean_pos, corrupted_pos = sides.places(route.position_role)
    residual = runs.corrupted[route.stage].clone()  # [pair, pos, d_model]
    # [place, d_model]: clean rows are shared by their pairs, corrupted ones are each pair's own
    clean = runs.clean[route.stage][sides.clean.row[pair], clean_pos]
    if basis is not None:
        clean = remove(residual[pair, corrupted_pos], basis) + keep(clean, basis)
    residual[pair, corrupted_pos] = clean
    every = torch.arange(len(residual), device=pair.device)
    with torch.no_grad():
        return run_from(model, route.stage, residual)[every, sides.corrupted.at]
