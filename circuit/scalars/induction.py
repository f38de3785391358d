"""Induction heads: who attends to the support, who to the token before, and whether one reads the
other (definitions.md section 8; Olsson et al. 2022, Singh et al. 2024).

    prefix_matching           attention from the prediction position to the support's positions
    previous_token_attention  attention from a position to the one before it, over every position
                              but the first that predicts a token; the end of a record predicts
                              none and is no input of a training step
    k_composition             of an earlier and a later head: |W_QK W_OV^T| / (|W_QK| |W_OV|)

The first two are means of the model's own attention. The third is one of the weights alone, with
Frobenius norms, `W_QK = W_Q W_K^T` of the later and `W_OV = W_V W_O` of the earlier head. Vectors
being rows, the later head scores a key `x` for a query `q` by `q W_QK x^T`. What the earlier head
writes there is `y W_OV`, `y` being what it attended to, so that its share of the score is
`q W_QK (y W_OV)^T = q (W_QK W_OV^T) y^T`: the product is the bilinear form by which the later head
matches its query with what the earlier one looked at. The quotient is that of Elhage et al. 2021,
whose vectors are columns, before they subtract a baseline: 0 where the later head's keys read
nothing that the earlier one writes, 1 at most, and about `1/sqrt(d_model)` for random weights.
LayerNorm's weights, which stand between the two, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from circuit import options
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.components import Component, parse_component
from circuit.model.subspaces import head_factors
from circuit.scalars.base import Cache, Needs, Sequences
from circuit.scalars.family import ScalarFamily
from circuit.tasks.examples import Examples
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

    from circuit.reports.inputs import Inputs
    from circuit.scalars.base import Scalar

Measure = Literal["prefix_matching", "previous_token_attention", "k_composition"]
PREFIX, PREVIOUS, COMPOSITION = get_args(Measure)


class Attention:
    """A head's attention from some positions to others, a value for each of the former.

    It telescopes.
    """

    constant = True

    def __init__(
        self,
        name: str,
        head: str,
        sequences: Sequences,
        row: Int[Tensor, " place"],
        query: Int[Tensor, " place"],
        keys: Bool[Tensor, "place pos"],
    ) -> None:
        """Describe the scalar.

        Args:
            head: such as `L1H0`.
            row, query: sequence and position that are attended from.
            keys: the positions whose attention is summed, at `query` or before.

        Raises:
            CircuitError: the component is no head.
        """
        self.component: Component = parse_component(head, kind="head")
        self.hook = f"blocks.{self.component.layer}.attn.hook_pattern"
        self.name, self.needs = f"{name}.{head}", Needs(sequences, (self.hook,))
        self.row, self._query, self._keys = row, query, keys

    def bind(self, model: HookedTransformer) -> Attention:
        """Nothing depends on the step."""
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """The attention of each place."""
        # [sequence, head, query, key] -> [place, key]
        pattern = cache[self.hook][self.row, self.component.head, self._query]
        width = min(pattern.shape[1], self._keys.shape[1])  # a batch may be padded further
        return (pattern[:, :width] * self._keys[:, :width]).sum(1)


def prefix_matching(
    head: str,
    batch: Examples,
    *,
    query_role: str = "prediction",
    support_role: str = "support_value",
) -> Attention:
    """How much a head attends to the support when an answer is asked for.

    Raises:
        CircuitError: as `Attention`; there is no such role, the query's has several positions, or
            no example has a position of the support's.
    """
    query, support = batch.position(query_role), batch.role(support_role)
    chosen = support.any(1)
    if not chosen.any():
        raise CircuitError(f"no read has positions of role '{support_role}'")
    places = (batch.row[chosen], query[chosen], support[chosen])
    return Attention(PREFIX, head, batch.sequences(), *places)


def previous_token_attention(head: str, batch: Examples) -> Attention:
    """How much a head attends to the token before, over the places of all records.

    Raises:
        CircuitError: as `Attention`; no record has three tokens.
    """
    position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    inner = (position > 0) & (position < batch.lengths[:, None] - 1)
    row, query = inner.nonzero(as_tuple=True)
    if not len(row):
        raise CircuitError("no record has three tokens", expected="a token before one and behind")
    keys = position == query[:, None] - 1
    return Attention(PREVIOUS, head, batch.sequences(), row, query, keys)


class KComposition:
    """How much of a later head's keys is what an earlier head writes; one value, it telescopes."""

    constant = True
    needs = Needs((), ())

    def __init__(self, earlier: str, later: str) -> None:
        """Describe the scalar.

        Raises:
            CircuitError: one is no head, or the earlier one is not in an earlier layer.
        """
        self.earlier, self.later = (parse_component(one, kind="head") for one in (earlier, later))
        if self.earlier.layer >= self.later.layer:
            raise CircuitError(
                f"{later} does not read {earlier}", expected="a head of an earlier layer first"
            )
        self.name = f"{COMPOSITION}.{earlier}.{later}"

    def bind(self, model: HookedTransformer) -> KComposition:
        """Nothing depends on the step."""
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """The one value."""
        w_q, w_k_t = head_factors(model, self.later, "qk")
        w_v, w_o = head_factors(model, self.earlier, "ov")
        w_qk, w_ov = w_q @ w_k_t, w_v @ w_o
        # what the earlier head writes [d_model in, d_model out] meets the later one's key side
        quotient: Tensor = (w_qk @ w_ov.mT).norm() / (w_qk.norm() * w_ov.norm())
        return quotient[None]


def composed_pairs(heads: Sequence[str]) -> list[tuple[str, str]]:
    """Every earlier and later head among some, by layer."""
    layers = {head: parse_component(head, kind="head").layer for head in heads}
    return [(one, other) for one in heads for other in heads if layers[one] < layers[other]]


class Induction(ScalarFamily):
    """Which measures of which heads are followed (definitions.md section 8)."""

    measures: Annotated[
        tuple[Measure, ...],
        options.Option(
            "Measure; k_composition is of every two of the heads in different layers.",
            flag="--measure",
        ),
    ] = ("prefix_matching",)
    heads: options.Heads = ()
    score_query_role: options.ScoreQueryRole = "prediction"
    support_key_role: options.SupportKeyRole = "support_value"

    def check_model(self, shape: ModelConfig) -> None:
        """Also refuses K-composition where no head is in a later layer than another."""
        super().check_model(shape)
        if COMPOSITION in self.measures and not composed_pairs(self._heads(shape)):
            raise CircuitError(
                f"{COMPOSITION} of heads of one layer",
                where="`heads`",
                expected="heads of two layers",
            )

    def _heads(self, shape: ModelConfig) -> Sequence[str]:
        return self.heads or shape.head_addresses

    def build(self, inputs: Inputs) -> list[Scalar]:
        """One scalar a measure and head, or pair of heads."""
        heads, batch = self._heads(inputs.config.model), inputs.batch
        scalars: list[Scalar] = []
        if PREFIX in self.measures:
            roles = {
                "query_role": self.score_query_role,
                "support_role": self.support_key_role,
            }
            scalars += [prefix_matching(head, batch, **roles) for head in heads]
        if PREVIOUS in self.measures:
            scalars += [previous_token_attention(head, batch) for head in heads]
        if COMPOSITION in self.measures:
            scalars += [KComposition(*pair) for pair in composed_pairs(heads)]
        return scalars
