"""Direct logit attribution: what each component writes into the logits, past all later layers.

1. The last residual stage is a sum: embedding, positions, and of every layer its heads, the
   attention's bias `b_O` and the MLP, if there is one (`residual_parts`).
2. `ln_final` centres, divides by a scale, multiplies by its weight and adds its bias. With the
   scale *frozen* at its value in the run, all but the last is linear, so that every part has its
   own logits (`frozen_logits`).
3. With `ln_final`'s bias through `W_U`, and `b_U`, these sum to the logits: the law, and
   `LogitAttribution.residual` measures it.

Without normalization there is nothing to freeze: parts go through `W_U` as they are.

The freezing is a choice. `margin_gradient` keeps the scale alive instead: a part's dot product with
it is the first-order change of the margin if a little of that part is added.

_, cache = model.run_with_cache(tokens)
found = attribute_logits(model, cache, (rows, positions))
found.of("L2H1")                             # [place, vocab]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from circuit.errors import CircuitError
from circuit.lazy import no_grad, torch
from circuit.model.readout import read_answers, unembedded
from circuit.model.stages import stage_hook

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

Places: TypeAlias = "tuple[Int[Tensor, ' place'], Int[Tensor, ' place']]"
"""Rows and token positions, of equal length."""


@dataclass(frozen=True)
class LogitAttribution:
    """The logits at some places, split by what wrote them.

    Attributes:
        parts: `embed`, `pos_embed`, then of each layer `L0H0` ..., `L0.b_O`, `L0MLP`; then
            `ln_final.b` and `b_U`, which are the same everywhere. What a model does not have is
            left out.
        logits: of each part, with `ln_final`'s scale frozen.
        total: the model's own logits.
    """

    parts: tuple[str, ...]
    logits: Float[Tensor, "place part vocab"]
    total: Float[Tensor, "place vocab"]

    def of(self, part: str) -> Float[Tensor, "place vocab"]:
        """The logits of one part.

        Raises:
            CircuitError: there is no such part.
        """
        if part not in self.parts:
            raise CircuitError(f"unknown part '{part}'", expected=", ".join(self.parts))
        return self.logits[:, self.parts.index(part)]

    @property
    def residual(self) -> float:
        """Largest |sum of the parts - logit| over the largest |logit|: the size of rounding."""
        gap = self.logits.double().sum(1) - self.total.double()
        return float(gap.abs().max() / self.total.double().abs().max())


def dla_hooks(model: HookedTransformer) -> tuple[str, ...]:
    """The hook points that an attribution reads."""
    points = ("attn.hook_z",) if model.cfg.attn_only else ("attn.hook_z", "hook_mlp_out")
    layers = range(model.cfg.n_layers)
    blocks = [f"blocks.{layer}.{point}" for layer in layers for point in points]
    scale = ["ln_final.hook_scale"] if _is_normalized(model) else []
    return ("hook_embed", "hook_pos_embed", *blocks, *scale, "unembed.hook_out")


def last_residual_hook(layers: int) -> str:
    """The hook point of the last stage before `ln_final`."""
    return stage_hook(f"layer_{layers - 1}_post_mlp", layers)


def head_outputs(
    z: Float[Tensor, "*place head d_head"], W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "*place head d_model"]:
    """What each head writes into the residual stream; `b_O` belongs to no head."""
    return torch.einsum("...he,hed->...hd", z, W_O)


def residual_parts(
    model: HookedTransformer, cache: Mapping[str, Tensor], places: Places
) -> tuple[tuple[str, ...], Float[Tensor, "place part d_model"]]:
    """Names and vectors that sum to the last residual stage.

    Args:
        cache: activations at `dla_hooks`.
    """
    embed = cache["hook_embed"][places]  # [place, d_model]
    # [1 or batch, pos, d_model] of the hook: the same for every row
    positions = cache["hook_pos_embed"].expand(cache["hook_embed"].shape)[places]
    names, vectors = ["embed", "pos_embed"], [torch.stack([embed, positions], 1)]
    for layer, block in enumerate(model.blocks):
        heads = head_outputs(cache[f"blocks.{layer}.attn.hook_z"][places], block.attn.W_O)
        vectors += [heads, block.attn.b_O.expand(embed.shape)[:, None]]
        names += [*(f"L{layer}H{head}" for head in range(heads.shape[1])), f"L{layer}.b_O"]
        if not model.cfg.attn_only:
            vectors.append(cache[f"blocks.{layer}.hook_mlp_out"][places][:, None])
            names.append(f"L{layer}MLP")
    return tuple(names), torch.cat(vectors, 1)


def frozen_logits(
    model: HookedTransformer,
    vectors: Float[Tensor, "*place part d_model"],
    scale: Float[Tensor, "*place 1"] | None,
) -> Float[Tensor, "*place part vocab"]:
    """Centred, over the frozen scale, times `ln_final`'s weight, through `W_U`: linear, no biases.

    Args:
        scale: of `ln_final` at each place (`ln_final.hook_scale`); None without normalization.
    """
    if scale is None:
        return vectors @ model.W_U
    centred = vectors - vectors.mean(-1, keepdim=True)
    norm: Any = model.ln_final
    logits: Tensor = (centred / scale[..., None] * norm.w) @ model.W_U
    return logits


@no_grad
def attribute_logits(
    model: HookedTransformer, cache: Mapping[str, Tensor], places: Places
) -> LogitAttribution:
    """Split the logits at some places by what wrote them.

    Args:
        cache: activations at `dla_hooks`, such as `run_with_cache` returns.
    """
    names, vectors = residual_parts(model, cache, places)
    scale, constants = None, {"b_U": model.b_U}
    if _is_normalized(model):
        norm: Any = model.ln_final
        scale = cache["ln_final.hook_scale"][places]
        constants = {"ln_final.b": norm.b @ model.W_U, **constants}
    written = frozen_logits(model, vectors, scale)
    constant = torch.stack(list(constants.values()))  # [1 or 2, vocab], the same at every place
    logits = torch.cat([written, constant.expand(len(written), *constant.shape)], 1)
    total = cache["unembed.hook_out"][places]
    return LogitAttribution((*names, *constants), logits, total)


def margin_gradient(
    model: HookedTransformer,
    residual: Float[Tensor, "place d_model"],
    answer: Int[Tensor, " place"],
    values: range,
) -> Float[Tensor, "place d_model"]:
    """Gradient of each place's value margin with respect to its last residual stage.

    Through `ln_final` with its scale alive, and `W_U`; the competitor is the model's.

    Args:
        residual: at `last_residual_hook`.
        answer: token ids of the right values.
        values: the value tokens, a contiguous range of ids.
    """
    with torch.enable_grad():
        x = residual.detach().requires_grad_()
        margin = read_answers(unembedded(model, x), answer, values).margin
        (gradient,) = torch.autograd.grad(margin.sum(), x)
    return gradient


def _is_normalized(model: HookedTransformer) -> bool:
    """Whether `ln_final` is more than the identity."""
    return model.cfg.normalization_type is not None
