"""QK match: how much better a head's query matches the support's key than the distractors'.

With `M = U_r U_r^T W_QK V_r V_r^T`, `s(q, p) = x_q M x_p^T / sqrt(d_h)` and `x` the context stage
through the head's own ln1 (or raw), the scalar is, averaged over reads,
`mean_{p in support} s - mean_{p in distractors} s` (definitions.md section 5). Weights only: biases
are left out, so that it speaks of the matching alone; `biases=True` gives the head's real scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import model_validator

from circuit import options
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.components import Component, parse_component
from circuit.model.stages import stage_before, stage_hook
from circuit.model.subspaces import check_rank, head_factors, svd_of_product
from circuit.numerals import WHOLE, whole_number
from circuit.scalars.base import Cache, Needs
from circuit.scalars.compared import compared_positions
from circuit.scalars.family import ScalarFamily
from circuit.tasks.examples import Examples
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

    from circuit.reports.inputs import Inputs
    from circuit.runs.base import Replayable

LayerNormMode = Literal["head_ln1", "none"]
LAYERNORM_MODES: tuple[LayerNormMode, ...] = get_args(LayerNormMode)


@dataclass(frozen=True)
class ReadMasks:
    """Reads of some sequences: where the query stands, and which positions are compared.

    Attributes:
        sequences: distinct token sequences.
        row: sequence of each read.
        query: its query position.
        support, distractors: masks over positions.
        chosen: which reads of the batch these are; those without a distractor are left out.
    """

    sequences: tuple[tuple[int, ...], ...]
    row: Int[Tensor, " read"]
    query: Int[Tensor, " read"]
    support: Bool[Tensor, "read pos"]
    distractors: Bool[Tensor, "read pos"]
    chosen: Bool[Tensor, " all"]

    @classmethod
    def of(
        cls,
        batch: Examples,
        *,
        query_role: str = "prediction",
        support_role: str = "support_value",
        distractor_role: str = "value_distractors",
    ) -> ReadMasks:
        """The reads of a batch that have at least one distractor.

        Raises:
            CircuitError: as `compared_positions`, or no read has a distractor.
        """
        query, support, distractors = compared_positions(
            batch, query_role, support_role, distractor_role
        )
        chosen = distractors.any(1) & support.any(1)
        if not chosen.any():
            raise CircuitError(f"no read has positions of role '{distractor_role}'")
        return cls(
            batch.sequences(),
            batch.row[chosen],
            query[chosen],
            support[chosen],
            distractors[chosen],
            chosen,
        )

    def __len__(self) -> int:
        """Number of reads."""
        return len(self.row)

    def where(self, mask: Bool[Tensor, " read"]) -> ReadMasks:
        """The reads that a mask chooses, on the same sequences."""
        chosen = self.chosen.clone()
        chosen[self.chosen] = mask
        return ReadMasks(
            self.sequences,
            self.row[mask],
            self.query[mask],
            self.support[mask],
            self.distractors[mask],
            chosen,
        )

    def difference(self, scores: Float[Tensor, "read pos"]) -> Float[Tensor, " read"]:
        """Mean over the support minus mean over the distractors."""
        # padding beyond these reads' own sequences depends on who shares the forward pass
        width = min(scores.shape[1], self.support.shape[1])
        scores = scores[:, :width]
        return masked_mean(scores, self.support[:, :width]) - masked_mean(
            scores, self.distractors[:, :width]
        )


def check_layernorm_mode(mode: str) -> None:
    """Refuse a mode that does not exist.

    Raises:
        CircuitError: lists those that do.
    """
    if mode not in LAYERNORM_MODES:
        modes = " or ".join(LAYERNORM_MODES)
        raise CircuitError(f"unknown layernorm mode '{mode}'", expected=modes)


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
        biases: bool = False,
        suffix: str = "",
    ) -> None:
        """Describe the scalar.

        Args:
            head: such as `L2H1`.
            layers: of the model.
            rank: of the basis; None takes the whole matrix (`--basis full`).
            basis: a model whose head gives the basis once and for all (`--basis step:N`); None
                takes the basis anew from the model before each step (`--basis source`).
            context_stage: where `x` is read; None is the stage that the head reads.
            biases: add `b_Q` and `b_K`, which gives the head's real scores (whole matrix only).
            suffix: of the name, such as `.lag2` for reads of that lag.

        Raises:
            CircuitError: the component is no head, or biases are asked for with a rank.
        """
        self.component: Component = parse_component(head)
        if self.component.head is None:
            raise CircuitError(f"'{head}' has no QK circuit", expected="a head, such as L2H1")
        check_layernorm_mode(layernorm_mode)
        if biases and rank is not None:
            raise CircuitError("biases belong to the whole matrix", fix="leave out the rank")
        stage = context_stage or stage_before(self.component.layer)
        self.hook = stage_hook(stage, layers)
        kind = "full" if rank is None else f"rank{rank}"
        self.name = f"qk_match.{head}.{kind}" + ("_with_biases" if biases else "") + suffix
        self.needs = Needs(reads.sequences, (self.hook,))
        self.reads = reads
        self.rank = rank
        self.layernorm_mode = layernorm_mode
        self.biases = biases
        self._fixed = None if basis is None or rank is None else self._basis(basis)

    def bind(self, model: HookedTransformer) -> BoundQKMatch:
        """Take the basis from the model, unless it is fixed or the whole matrix."""
        if self.rank is None:
            return BoundQKMatch(self, None, constant=True)
        if self._fixed is not None:
            return BoundQKMatch(self, self._fixed, constant=True)
        return BoundQKMatch(self, self._basis(model), constant=False)

    def _basis(self, model: HookedTransformer) -> tuple[Tensor, Tensor]:
        """Top left and right singular vectors of `W_QK`, `[d_model, rank]` (float64 SVD)."""
        assert self.rank is not None
        left, right = head_factors(model, self.component, "qk")
        check_rank(str(self.component), self.rank, left.shape[1])
        u, _, v = svd_of_product(left, right)
        return u[:, : self.rank].to(left.dtype), v[:, : self.rank].to(left.dtype)


@dataclass(frozen=True)
class BoundQKMatch:
    """A QK match whose basis is set."""

    scalar: QKMatch
    basis: tuple[Float[Tensor, "d_model rank"], Float[Tensor, "d_model rank"]] | None
    constant: bool

    def scores(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, "read pos"]:
        """`s(q, p)` of every read's query with every position."""
        scalar, reads, layer = self.scalar, self.scalar.reads, self.scalar.component.layer
        x = cache[scalar.hook]
        if scalar.layernorm_mode == "head_ln1":
            x = model.blocks[layer].ln1(x)
        w_q, w_k_t = head_factors(model, scalar.component, "qk")
        w_k = w_k_t.T
        if self.basis is not None:
            left, right = self.basis
            # projecting the factors [d_model, d_head] is projecting their product, and cheaper
            w_q, w_k = left @ (left.T @ w_q), right @ (right.T @ w_k)
        # [read, d_head], and [sequence, pos, d_head]: sequences are shared by their reads
        query, keys = x[reads.row, reads.query] @ w_q, x @ w_k
        if scalar.biases:
            attention = model.blocks[layer].attn
            query = query + attention.b_Q[scalar.component.head]
            keys = keys + attention.b_K[scalar.component.head]
        return torch.einsum("rh,rph->rp", query, keys[reads.row]) / math.sqrt(w_q.shape[1])

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """Support mean minus distractor mean of the scores, one per read."""
        return self.scalar.reads.difference(self.scores(model, cache))


def masked_mean(
    scores: Float[Tensor, "read pos"], mask: Bool[Tensor, "read pos"]
) -> Float[Tensor, " read"]:
    """Mean of the scores where the mask is set, one per read."""
    return (scores * mask).sum(1) / mask.sum(1)


def qk_matches(
    heads: Sequence[str],
    reads: ReadMasks,
    *,
    layers: int,
    ranks: Sequence[int | None],
    basis: HookedTransformer | None = None,
    layernorm_mode: LayerNormMode = "head_ln1",
    context_stage: str | None = None,
    suffix: str = "",
) -> list[QKMatch]:
    """One scalar a head and rank; None among the ranks gives the whole matrix, and its real scores.

    See `QKMatch` for the arguments.
    """
    return [
        QKMatch(
            head,
            reads,
            layers=layers,
            rank=rank,
            basis=basis,
            layernorm_mode=layernorm_mode,
            context_stage=context_stage,
            biases=biases,
            suffix=suffix,
        )
        for head in heads
        for rank in ranks
        for biases in ((False, True) if rank is None else (False,))
    ]


# --- the family -----------------------------------------------------------------------------------

_STEP_BASIS = re.compile(f"step:({WHOLE})")


class QKMatches(ScalarFamily, options.PairOptions):
    """Whose match is followed, and on which reads of which pairs (definitions.md section 5)."""

    pair_types: Annotated[
        tuple[str, ...],
        options.Option(
            "Pair type that is built; with route_pair_type that one alone.",
            flag="--route-pair-source-type",
            kind="pair_type",
        ),
    ] = ("support_value",)
    max_pairs_per_type: Annotated[
        int,
        options.Option(
            "Pairs built of each type, at most.", flag="--max-route-pairs-per-type", least=1
        ),
    ] = 64
    min_pairs_per_type: Annotated[
        int,
        options.Option(
            "Fewer pairs of a type are an error.", flag="--min-route-pairs-per-type", least=0
        ),
    ] = 16
    route_pair_type: Annotated[
        str | None,
        options.Option(
            "Pair type that is scored.", kind="pair_type", unset="all", earlier="scored_type"
        ),
    ] = None
    head_layer: Annotated[
        int | None, options.Option("Layer of the heads that are given by number.", least=0)
    ] = None
    heads: options.Heads = ()
    ranks: options.Ranks = (8,)
    bases: Annotated[
        tuple[str, ...],
        options.Option(
            "source (anew before each step), step:N, or full (the whole matrix).",
            flag="--basis",
            kind="basis",
        ),
    ] = ("source",)
    by_lag: Annotated[
        bool, options.Option("Also follow the reads of each lag (the task's first slice) apart.")
    ] = False
    slices: options.Slices = ()
    context_stage: options.ContextStage = None
    layernorm_mode: options.LayernormMode = "head_ln1"
    score_query_role: options.ScoreQueryRole = "prediction"
    support_key_role: options.SupportKeyRole = "support_value"
    distractor_key_role: options.DistractorKeyRole = "value_distractors"
    record_side: options.RecordSide = "clean"

    @model_validator(mode="before")
    @classmethod
    def _resolved(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Heads by number become addresses, and the scored type is the one that is built."""
        values = dict(values)
        if values.get("route_pair_type") and "pair_types" not in values:
            values["pair_types"] = (values["route_pair_type"],)
        layer = values.pop("head_layer", None)
        if layer is None:
            return values
        numbers = [str(head) for head in values.get("heads") or ()]
        for number in numbers or ["none"]:
            if whole_number(number) is None:
                raise CircuitError(
                    f"{number} with `head_layer` {layer}",
                    where="`heads`",
                    expected="a number, or an address such as L2H1 without `head_layer`",
                )
        return {**values, "heads": tuple(f"L{layer}H{number}" for number in numbers)}

    def check(self) -> None:
        """Bases have a form, and what is scored is built."""
        super().check()
        for basis in self.bases:
            if basis not in ("source", "full") and not _STEP_BASIS.fullmatch(basis):
                raise CircuitError(
                    f"unknown basis '{basis}'",
                    where="`bases`",
                    expected="source, full, or step:N such as step:3000",
                )
        if self.route_pair_type is not None and self.route_pair_type not in self.pair_types:
            raise CircuitError(
                f"pairs of type {self.route_pair_type} are scored but not built",
                where="`route_pair_type`",
                expected=f"one of `pair_types`: {', '.join(self.pair_types)}",
            )

    def check_model(self, shape: ModelConfig) -> None:
        """Also refuses a rank that heads do not have."""
        super().check_model(shape)
        for rank in self.ranks if set(self.bases) != {"full"} else ():
            check_rank("a head", rank, shape.d_model // shape.heads)

    def check_run(self, run: Replayable) -> None:
        """The steps of the bases have to be addressable."""
        for step in filter(None, map(_STEP_BASIS.fullmatch, self.bases)):
            run.check_addressable(int(step[1]))

    def reads(self, inputs: Inputs) -> dict[str, ReadMasks]:
        """The scored reads by suffix of their scalars' names: all, and those of each slice."""
        pairs = [p for p in inputs.pairs(self) if self.route_pair_type in (None, p.type)]
        batch = inputs.side(pairs, self.record_side)
        reads = ReadMasks.of(
            batch,
            query_role=self.score_query_role,
            support_role=self.support_key_role,
            distractor_role=self.distractor_key_role,
        )
        scored, by_suffix = batch.select(reads.chosen), {"": reads}
        first = (inputs.task.slice_name,) if self.by_lag else ()
        for by in dict.fromkeys((*first, *self.slices)):
            for value, chosen in scored.by_slice(by).items():
                if value != "all":
                    by_suffix[f".{by}{value}"] = reads.where(chosen)
        return by_suffix

    def build(self, inputs: Inputs) -> list[QKMatch]:
        """One scalar a head, rank, basis and group of reads."""
        shape = inputs.config.model
        scalars: list[QKMatch] = []
        reads_by_suffix = self.reads(inputs)
        for basis in self.bases:
            step = _STEP_BASIS.fullmatch(basis)
            model = inputs.point(int(step[1])).model if step else None
            for suffix, reads in reads_by_suffix.items():
                scalars += qk_matches(
                    self.heads or shape.head_addresses,
                    reads,
                    layers=shape.layers,
                    ranks=[None] if basis == "full" else self.ranks,
                    basis=model,
                    layernorm_mode=self.layernorm_mode,
                    context_stage=self.context_stage,
                    suffix=(f"_of_step{step[1]}" if step else "") + suffix,
                )
        return scalars

    def provenance(self, inputs: Inputs) -> dict[str, Any]:
        """How many reads are scored."""
        return {"scored_reads": len(self.reads(inputs)[""])}
