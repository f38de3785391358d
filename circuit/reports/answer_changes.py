"""Pairs over the intervals between consecutive checkpoints: their answer scalars and their parts.

First order and curvature come from the line integral of the smooth scalars (definitions.md section
5). The moving margin has those of the fixed source margin, and the switch of competitor, which is
exact; the other scalars have no switch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from circuit.attribution.line import Line, LineIntegral, Values
from circuit.lazy import torch
from circuit.model.readout import read_answers
from circuit.model.weights import named_tensors
from circuit.reports.inputs import Checkpointed, Inputs, PairOptions
from circuit.scalars.answers import (
    ANSWER_SCALARS,
    FIXED_SOURCE,
    MOVING,
    Competitors,
    answer_scalars,
    fixed_scalars,
    switch_part,
    top_wrong,
)
from circuit.schemas import SWITCH_BUCKETS, ScalarPairRow, Side, TokenLogit, run_relative
from circuit.tasks.pairs import SIDES, Pair
from circuit.tasks.positions import Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DiagnosisOptions:
    """Which pairs and scalars are followed.

    Attributes:
        sides: whose logits are read, some of `SIDES`.
        scalars: some of `ANSWER_SCALARS`.
        switch_buckets: of the rows and the summary; the pair rows hold every pair.
        splits: of the probe records; None takes all.
        top_k_wrong: that many of the best wrong values stand in every pair row.
    """

    pairs: PairOptions = field(default_factory=PairOptions)
    sides: tuple[str, ...] = SIDES
    scalars: tuple[str, ...] = ANSWER_SCALARS
    switch_buckets: tuple[str, ...] = SWITCH_BUCKETS
    splits: tuple[str, ...] | None = None
    top_k_wrong: int = 5


@dataclass(frozen=True)
class DiagnosisProgress:
    """How far a diagnosis is: whole checkpoints, and nodes of the line integral in between.

    Attributes:
        where: interval and side that are integrated.
        node, nodes: derivatives taken, and those that the present rule takes; a rule that does not
            close the integral is followed by one with about twice as many.
    """

    done: int
    total: int
    where: str = ""
    node: int = 0
    nodes: int = 0


@dataclass(frozen=True)
class Change:
    """One side of every pair over one interval."""

    source: Checkpointed
    target: Checkpointed
    side: Side
    answer: Tensor
    competitors: Competitors
    source_values: Values
    target_values: Values
    switch: Tensor
    line: LineIntegral
    source_top: tuple[Tensor, Tensor]
    target_top: tuple[Tensor, Tensor]

    @property
    def split_error(self) -> float:
        """Largest |change of moving margin - change of fixed source margin - switch|."""
        moving, fixed = (
            self.target_values[name] - self.source_values[name] for name in (MOVING, FIXED_SOURCE)
        )
        return float((moving - fixed - self.switch).abs().max())

    def rows(
        self, pairs: Sequence[Pair], run: Path, options: DiagnosisOptions
    ) -> Iterator[ScalarPairRow]:
        """One row a pair."""
        zero = torch.zeros_like(self.switch)
        columns: dict[str, Values] = {
            "source_values": self.source_values,
            "target_values": self.target_values,
            "deltas": {n: self.target_values[n] - self.source_values[n] for n in options.scalars},
            "first_order": {n: self.line.first_order[_smooth(n)] for n in options.scalars},
            "curvature": {n: self.line.curvature[_smooth(n)] for n in options.scalars},
            "switch": {n: self.switch if n == MOVING else zero for n in options.scalars},
        }
        lists = {
            column: {name: values[name].tolist() for name in options.scalars}
            for column, values in columns.items()
        }
        answer, switched = self.answer.tolist(), self.competitors.switched.tolist()
        source, target = self.competitors.source.tolist(), self.competitors.target.tolist()
        source_top, target_top = _token_logits(*self.source_top), _token_logits(*self.target_top)
        for i, pair in enumerate(pairs):
            yield ScalarPairRow(
                source_step=self.source.step,
                target_step=self.target.step,
                source_checkpoint=run_relative(self.source.path, run),
                target_checkpoint=run_relative(self.target.path, run),
                source_digest=self.source.digest,
                target_digest=self.target.digest,
                pair_id=pair.pair_id,
                pair_type=pair.type,
                split=pair.clean.split,
                margin_side=self.side,
                answer=answer[i],
                source_competitor=source[i],
                target_competitor=target[i],
                switched=switched[i],
                source_top_wrong=source_top[i],
                target_top_wrong=target_top[i],
                **{
                    column: {name: values[i] for name, values in by_name.items()}
                    for column, by_name in lists.items()
                },
            )


def _smooth(name: str) -> str:
    """The smooth scalar whose integral gives a scalar's first order and curvature."""
    return FIXED_SOURCE if name == MOVING else name


def _token_logits(tokens: Tensor, logits: Tensor) -> list[list[TokenLogit]]:
    return [
        [TokenLogit(token=token, logit=logit) for token, logit in zip(*both, strict=True)]
        for both in zip(tokens.tolist(), logits.tolist(), strict=True)
    ]


def interval_changes(
    inputs: Inputs,
    checkpoints: Sequence[Path],
    pairs: Sequence[Pair],
    options: DiagnosisOptions,
    progress: Callable[[DiagnosisProgress], None] | None,
) -> Iterator[Change]:
    """Every interval, and in it every side."""
    sides = {side: inputs.side(pairs, side) for side in options.sides}
    source, before = None, {}
    reached: dict[str, Tensor] = {}  # logits at the last checkpoint, where the next line starts
    tell = progress or (lambda _: None)
    for done, point in enumerate(inputs.models(checkpoints), start=1):
        weights = {name: tensor.clone() for name, tensor in named_tensors(point.model).items()}
        if source is not None:
            for side, batch in sides.items():
                line = Line(
                    point.model,
                    before,
                    weights,
                    batch.tokens,
                    _places(batch),
                    source_logits=reached.get(side),
                )
                where = f"{source.step} -> {point.step}, {side}"
                at = DiagnosisProgress(done - 1, len(checkpoints), where)

                def taken(node: int, nodes: int, at: DiagnosisProgress = at) -> None:
                    tell(replace(at, node=node, nodes=nodes))

                yield _change(
                    line,
                    batch,
                    inputs,
                    options,
                    source,
                    point,
                    side,
                    taken,
                )
                reached[side] = line.ends[1]
        source, before = point, weights
        tell(DiagnosisProgress(done, len(checkpoints)))


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.reads.row, batch.reads.key_pos


def _change(
    line: Line,
    batch: Batch,
    inputs: Inputs,
    options: DiagnosisOptions,
    source: Checkpointed,
    target: Checkpointed,
    side: str,
    progress: Callable[[int, int], None],
) -> Change:
    answer, values = batch.reads.answer, inputs.vocabulary.value_ids
    ends = [read_answers(logits, answer, values) for logits in line.ends]
    competitors = Competitors(ends[0].competitor, ends[1].competitor)
    wanted = {_smooth(name) for name in options.scalars}

    def smooth(logits: Tensor) -> Values:
        found = fixed_scalars(logits, answer, competitors)
        return {name: value for name, value in found.items() if name in wanted}

    source_logits, target_logits = line.ends
    return Change(
        source=source,
        target=target,
        side=cast(Side, side),
        answer=answer,
        competitors=competitors,
        source_values=answer_scalars(source_logits, answer, competitors, values),
        target_values=answer_scalars(target_logits, answer, competitors, values),
        switch=switch_part(target_logits, answer, competitors, values),
        line=line.integrate(smooth, progress),
        source_top=top_wrong(source_logits, answer, values, options.top_k_wrong),
        target_top=top_wrong(target_logits, answer, values, options.top_k_wrong),
    )
