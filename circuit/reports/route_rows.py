"""Routes scored at checkpoints, and the changes of scores and of a target scalar between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from circuit.artifacts import Row
from circuit.lazy import torch
from circuit.model.readout import read_answers
from circuit.reports.inputs import Checkpointed
from circuit.scalars.answers import ANSWER_SCALARS, Competitors, answer_scalars
from circuit.scalars.routes import Route
from circuit.scalars.transfer import (
    PairRuns,
    PairSides,
    contrast_margin,
    route_bases,
    route_scores,
)
from circuit.schemas import SIDES, RouteBasis, RouteRow, Side
from circuit.tasks.pairs import Pair

if TYPE_CHECKING:
    from torch import Tensor

    from circuit.model.subspaces import Basis

CONTRAST = "contrast_margin"
TARGET_SCALARS = (*ANSWER_SCALARS, CONTRAST)
"""What routes may be held against: an answer scalar, or `logit(a) - logit(b)` of the side."""

WHOLE = (
    Route("whole input", "embedding", "causal_prefix"),
    Route("whole output", "final_norm", "prediction"),
)
"""Routes through which the contrast margin transfers completely, whatever the weights."""


@dataclass(frozen=True)
class Scored:
    """Everything of one checkpoint.

    Attributes:
        bases: of each route, from the weights here; None for the whole residual.
        scores: of each route and pair with these bases.
        frozen_scores: the same with the bases of the checkpoint before; None at the first.
        gap: clean minus corrupted contrast margin of each pair.
        incompleteness: largest |score - gap| over pairs and `WHOLE`.
        logits: at the prediction positions, by side.
    """

    step: int
    digest: str
    bases: Sequence[Basis | None]
    scores: Tensor
    frozen_scores: Tensor | None
    gap: Tensor
    incompleteness: float
    logits: dict[str, Tensor]


def score_checkpoint(
    point: Checkpointed,
    sides: PairSides,
    routes: Sequence[Route],
    token_sets: Mapping[str, range],
    before: Scored | None,
) -> Scored:
    """Run both sides once and each route once, and each that has a basis once with that of before.

    Raises:
        CircuitError: a role has unequal counts on the two sides of a pair.
    """
    model, tested = point.model, [*routes, *WHOLE]
    runs = PairRuns.of(model, sides, tested)
    bases = route_bases(model, tested, token_sets)
    scores = route_scores(model, sides, runs, tested, bases).cpu()
    clean, corrupted = (
        contrast_margin(logits, sides.transfer).cpu()
        for logits in (runs.clean_logits, runs.corrupted_logits)
    )
    refitted, whole = scores[: len(routes)], scores[len(routes) :]
    frozen = None if before is None else refitted.clone()
    turned = [index for index, route in enumerate(routes) if route.rank is not None]
    if before is not None and frozen is not None and turned:
        chosen, old = [routes[i] for i in turned], [before.bases[i] for i in turned]
        frozen[turned] = route_scores(model, sides, runs, chosen, old).cpu()
    return Scored(
        point.step,
        point.digest,
        bases[: len(routes)],
        refitted,
        frozen,
        clean - corrupted,
        float((whole - (clean - corrupted)).abs().max()),
        {"clean": runs.clean_logits.cpu(), "corrupted": runs.corrupted_logits.cpu()},
    )


def interval_rows(
    source: Scored,
    target: Scored,
    pairs: Sequence[Pair],
    sides: PairSides,
    routes: Sequence[Route],
    values: range,
    *,
    margin_sides: Sequence[str],
    target_scalar: str,
    basis: RouteBasis,
) -> Iterator[Row]:
    """One `RouteRow` a pair and side, in this order, not yet predicted.

    Args:
        values: the value tokens, a contiguous range of ids.
        target_scalar: one of `TARGET_SCALARS`.
        basis: that the target's scores are taken with: its own, or the source's.
    """
    labels = [route.label for route in routes]
    ends = {s: _target(source, target, sides, s, target_scalar, values) for s in SIDES}
    at_target = target.scores if basis == "refit" else target.frozen_scores
    assert at_target is not None, "every checkpoint but the first knows the bases of the one before"
    before, after = source.scores.double(), at_target.double()
    scores = {
        "source_route_scores": before,
        "target_route_scores": after,
        "route_score_deltas": after - before,
    }
    columns: dict[str, Any] = {name: table.T.tolist() for name, table in scores.items()}

    def by_label(values: list[float]) -> Any:
        return dict(zip(labels, values, strict=True))

    for index, pair in enumerate(pairs):
        for side in margin_sides:
            first, last = (end[index] for end in ends[side])
            yield RouteRow.measured(
                source_step=source.step,
                target_step=target.step,
                source_digest=source.digest,
                target_digest=target.digest,
                pair_id=pair.pair_id,
                pair_type=pair.type,
                margin_side=cast(Side, side),
                basis=basis,
                target_scalar=target_scalar,
                source_value=first,
                target_value=last,
                delta=last - first,
                **{n: by_label(of[index]) for n, of in columns.items()},
            ).model_dump()


def _target(
    source: Scored,
    target: Scored,
    sides: PairSides,
    side: str,
    target_scalar: str,
    values: range,
) -> list[list[float]]:
    """The target scalar of one side at both ends of an interval, one value a pair."""
    ends = [end.logits[side] for end in (source, target)]
    if target_scalar == CONTRAST:
        transfer = sides.transfer.cpu()
        return [contrast_margin(logits, transfer).double().tolist() for logits in ends]
    batch = sides.clean if side == "clean" else sides.corrupted
    answer = batch.answer.cpu()
    competitors = Competitors(*(read_answers(x, answer, values).competitor for x in ends))
    both = [answer_scalars(logits, answer, competitors, values) for logits in ends]
    return [of[target_scalar].double().tolist() for of in both]


def mean_scores(
    scored: Sequence[Scored], pairs: Sequence[Pair], routes: Sequence[Route]
) -> list[dict[str, Any]]:
    """Mean score of each route by checkpoint and pair type, and its share of the mean gap."""
    rows = []
    for kind in dict.fromkeys(pair.type for pair in pairs):
        of_kind = torch.tensor([pair.type == kind for pair in pairs])
        for point in scored:
            gap = float(point.gap[of_kind].double().mean())
            for route, score in zip(routes, point.scores, strict=True):
                mean = float(score[of_kind].double().mean())
                rows.append(
                    {
                        "step": point.step,
                        "pair_type": kind,
                        "route": route.label,
                        "pairs": int(of_kind.sum()),
                        "mean_score": mean,
                        "mean_gap": gap,
                        "share": mean / gap if gap else None,
                    }
                )
    return rows
