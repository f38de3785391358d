"""How far each head has come at one checkpoint: does it match, does it look, does it write.

For every read and head (definitions.md section 6, ov-write-progress), with `v` the value vector at
the support, `a` the attention from the prediction position, all biases included but `b_O`, which
belongs to no head:

    qk_separation          real score, mean over the support minus mean over the distractors
    attention_support      sum of `a` over the support
    attention_distractors  sum of `a` over the distractors
    ov_map_value_margin    value margin of `v W_O W_U`
    head_value_margin_dla  value margin of the head's output through `W_U` alone
    head_answer_logit_dla  its logit of the answer
    head_margin_dla        its dot product with the gradient of the model's value margin at the last
                           residual stage, hence through ln_final
    attention_x_ov         attention_support * ov_map_value_margin
    qk_x_ov                qk_separation * ov_map_value_margin

under four conditions: the head's real attention, or weight 1 on the support; the real values, or
at the support the previous read's `v` (`torch.roll` by one). The answer stays the read's own. The
competitor of a head's value margin is the best wrong value among that head's own logits. Where the
support has several positions, `v` is their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuit.errors import CircuitError
from circuit.lazy import no_grad, torch
from circuit.model.components import Component
from circuit.model.dla import (
    attribute_logits,
    dla_hooks,
    head_outputs,
    last_residual_hook,
    margin_gradient,
)
from circuit.model.readout import read_answers
from circuit.scalars.compared import compared_positions
from circuit.tasks.examples import Examples

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

MATCHES = ("qk_separation", "attention_support", "attention_distractors")
DLA = ("head_value_margin_dla", "head_answer_logit_dla", "head_margin_dla")
WRITES = ("ov_map_value_margin", *DLA, "attention_x_ov", "qk_x_ov")
CONDITIONS = {
    "": WRITES,
    "swapped_value": WRITES,
    "support_attention": DLA,
    "support_attention_swapped_value": DLA,
}
"""Columns of each condition; the others of `WRITES` do not depend on the attention."""
_ALONE = {"": "support_attention", "swapped_value": "support_attention_swapped_value"}
"""The condition with the same values under which a head's output is `v W_O`."""
REDUNDANT = tuple(f"{condition}.head_value_margin_dla" for condition in _ALONE.values())
"""Columns that equal the `ov_map_value_margin` of the same values."""
COLUMNS = (
    *MATCHES,
    *(f"{name}.{column}".lstrip(".") for name, columns in CONDITIONS.items() for column in columns),
)
"""Every column, condition before the dot."""


@dataclass(frozen=True)
class ScoredReads:
    """Reads of a batch, and which positions are compared.

    Attributes:
        query: position of the query whose scores are compared.
        support_pos: the support's positions, padded with 0; `support_real` says which are real.
        support, distractors: masks over positions.
    """

    batch: Examples
    query: Int[Tensor, " read"]
    support_pos: Int[Tensor, "read slot"]
    support_real: Bool[Tensor, "read slot"]
    support: Bool[Tensor, "read pos"]
    distractors: Bool[Tensor, "read pos"]

    @classmethod
    def of(
        cls,
        batch: Examples,
        *,
        query_role: str = "prediction",
        support_role: str = "support_value",
        distractor_role: str = "value_distractors",
    ) -> ScoredReads:
        """The reads of a batch by role.

        Raises:
            CircuitError: as `compared_positions`, a read has no position of a role, or there is
                one read only.
        """
        if len(batch) < 2:
            raise CircuitError(
                f"{len(batch)} pairs", expected="at least 2, whose values can be exchanged"
            )
        query, *compared = compared_positions(batch, query_role, support_role, distractor_role)
        for role, mask in zip((support_role, distractor_role), compared, strict=True):
            wrong = ~mask.any(1)
            if wrong.any():
                row = int(batch.row[wrong][0])
                raise CircuitError(
                    f"a read has no position of role '{role}'", where=batch.sample_ids[row]
                )
        return cls(batch, query, *batch.positions(support_role), *compared)


@dataclass(frozen=True)
class HeadProgress:
    """One checkpoint's figures.

    Attributes:
        columns: each of `COLUMNS`, `[read, head]`.
        logits: the model's, at the prediction positions.
        dla_residual: how far the direct contributions of all components miss the logits, relative.
    """

    columns: dict[str, Float[Tensor, "read head"]]
    logits: Float[Tensor, "read vocab"]
    dla_residual: float


@no_grad
def head_progress(
    model: HookedTransformer, reads: ScoredReads, heads: Sequence[Component], values: range
) -> HeadProgress:
    """Measure some heads on all reads, in one forward pass.

    Args:
        heads: in the order of the result's head axis.
        values: the value tokens, a contiguous range of ids.
    """
    index, shape = reads.batch, model.cfg
    hooks = _hooks(model)
    _, cache = model.run_with_cache(
        reads.batch.tokens, names_filter=lambda name: name in hooks, return_cache_object=False
    )
    places = (index.row, index.at)
    gathered = _Gathered.of(cache, reads, shape.n_layers, [_number(head, model) for head in heads])
    gradient = margin_gradient(
        model, cache[last_residual_hook(shape.n_layers)][places], index.answer, values
    )
    W_O = model.W_O.flatten(0, 1)[[_number(head, model) for head in heads]]
    answer = index.answer[:, None].expand(-1, len(heads))

    def written(z: Tensor) -> dict[str, Tensor]:
        output = head_outputs(z, W_O)  # [read, head, d_model]
        answers = read_answers(output @ model.W_U, answer, values)
        onto = torch.einsum("rhd,rd->rh", output, gradient)
        return dict(zip(DLA, (answers.margin, answers.correct, onto), strict=True))

    dla = {condition: written(z) for condition, z in gathered.conditions().items()}
    columns = dict(zip(MATCHES, gathered.matches(reads), strict=True))
    for condition, names in CONDITIONS.items():
        writes = dict(dla[condition])
        if names == WRITES:
            ov_map = dla[_ALONE[condition]]["head_value_margin_dla"]
            writes["ov_map_value_margin"] = ov_map
            writes["attention_x_ov"] = columns["attention_support"] * ov_map
            writes["qk_x_ov"] = columns["qk_separation"] * ov_map
        columns |= {f"{condition}.{name}".lstrip("."): writes[name] for name in names}
    attribution = attribute_logits(model, cache, places)
    return HeadProgress(columns, attribution.total, attribution.residual)


@dataclass(frozen=True)
class _Gathered:
    """What the forward pass left at the reads' places, for the chosen heads."""

    scores: Float[Tensor, "read head pos"]
    pattern: Float[Tensor, "read head pos"]
    z: Float[Tensor, "read head d_head"]
    v: Float[Tensor, "read slot head d_head"]  # value vectors at the support, 0 where padded
    weight: Float[Tensor, "read slot head"]  # attention there, 0 where padded
    slots: Int[Tensor, " read"]

    @classmethod
    def of(
        cls, cache: Mapping[str, Tensor], reads: ScoredReads, layers: int, heads: list[int]
    ) -> _Gathered:
        row, at = reads.batch.row, reads.batch.at
        support, real = reads.support_pos, reads.support_real[..., None]

        def gather(point: str, place: tuple[Tensor | slice, ...], head_axis: int) -> Tensor:
            parts = [cache[f"blocks.{layer}.attn.{point}"][place] for layer in range(layers)]
            everyone = torch.cat(parts, head_axis)
            return everyone.index_select(head_axis, torch.tensor(heads, device=row.device))

        pattern = gather("hook_pattern", (row, slice(None), at), 1)
        weight = pattern.mT.take_along_dim(support[..., None], 1)
        return cls(
            scores=gather("hook_attn_scores", (row, slice(None), reads.query), 1),
            pattern=pattern,
            z=gather("hook_z", (row, at), 1),
            v=gather("hook_v", (row[:, None], support), 2) * real[..., None],
            weight=weight * real,
            slots=reads.support_real.sum(1),
        )

    def matches(self, reads: ScoredReads) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of `MATCHES`."""
        support, distractors = reads.support[:, None], reads.distractors[:, None]

        def mean(mask: Tensor) -> Tensor:  # scores behind the query are -inf
            return torch.where(mask, self.scores, 0).sum(2) / mask.sum(2)

        separation = mean(support) - mean(distractors)
        return separation, (self.pattern * support).sum(2), (self.pattern * distractors).sum(2)

    def conditions(self) -> dict[str, Float[Tensor, "read head d_head"]]:
        """The heads' `z` under each condition."""
        support_mean = self.v.sum(1) / self.slots[:, None, None]
        swapped = support_mean.roll(1, 0)
        weight = self.weight[..., None]
        return {
            "": self.z,
            "swapped_value": self.z + (weight * (swapped[:, None] - self.v)).sum(1),
            "support_attention": support_mean,
            "support_attention_swapped_value": swapped,
        }


def _hooks(model: HookedTransformer) -> set[str]:
    points, layers = ("hook_attn_scores", "hook_pattern", "hook_v", "hook_z"), model.cfg.n_layers
    of_heads = {f"blocks.{layer}.attn.{point}" for layer in range(layers) for point in points}
    return of_heads | {last_residual_hook(layers), *dla_hooks(model)}


def _number(head: Component, model: HookedTransformer) -> int:
    assert head.head is not None
    return head.layer * model.cfg.n_heads + head.head
