"""Fast kernels inside a HookedTransformer: the same function in fewer passes over memory.

TransformerLens computes every quantity that a hook may want to see. Where nobody looks, the same
numbers (equal to rounding) come from fewer operations: LayerNorm as torch's one kernel, queries,
keys and values as one product, scores with scale and mask in one, and a block's first LayerNorm
once instead of once each for queries, keys and values. The module tree, the parameters and all hook
points stay. A component with a hook at a point that its fast form skips runs as TransformerLens
wrote it, and so does one whose source in the installed TransformerLens is not the source that the
fast form was written against (a warning says so).

A change here that moves bits gets a name of its own in `circuit.train_config.Kernels`: `fast` means
what runs were recorded with.

Attention is written out rather than left to `scaled_dot_product_attention`, whose CPU kernel has
neither forward-mode nor second derivatives (docs/performance.md has both times).
"""

from __future__ import annotations

import hashlib
import inspect
import math
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens import HookedTransformer
from transformer_lens.components.abstract_attention import AbstractAttention
from transformer_lens.components.attention import Attention
from transformer_lens.components.layer_norm import LayerNorm
from transformer_lens.components.transformer_block import TransformerBlock


class FastLayerNorm(LayerNorm):
    """LayerNorm through torch's fused kernel; skips `hook_scale` and `hook_normalized`."""

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """`(x - mean) / sqrt(var + eps) * w + b` over the last axis."""
        if _hooked(self.hook_scale, self.hook_normalized):
            return super().forward(x)
        return functional.layer_norm(x, (self.length,), self.w, self.b, self.eps)


class FastAttention(Attention):
    """Causal attention in five products; honours `hook_z`, skips the hook points before it."""

    def forward(  # type: ignore[override]  # TransformerLens's further arguments, by keyword
        self, query_input: Tensor, key_input: Tensor, value_input: Tensor, **more: Any
    ) -> Tensor:
        """The heads' sum plus `b_O`, `[batch, pos, d_model]`.

        Fast where queries, keys and values are read from one tensor, as in an unhooked block.
        """
        skipped = (self.hook_q, self.hook_k, self.hook_v, self.hook_attn_scores, self.hook_pattern)
        one_input = query_input is key_input is value_input
        further = any(value is not None for value in more.values())
        if not one_input or further or self.cfg.use_attn_result or _hooked(*skipped):
            return super().forward(query_input, key_input, value_input, **more)
        rows, length, d_model = query_input.shape
        heads, _, width = self.W_Q.shape
        # [3 heads, d_model, width] -> [d_model, 3 heads width]: one product makes q, k and v
        weight = torch.cat([self.W_Q, self.W_K, self.W_V]).permute(1, 0, 2).reshape(d_model, -1)
        bias = torch.cat([self.b_Q, self.b_K, self.b_V]).reshape(-1)
        qkv = torch.addmm(bias, query_input.reshape(-1, d_model), weight)
        # [batch pos, (q k v) heads width] -> three of [batch heads, pos, width], contiguous for bmm
        by_head = qkv.view(rows, length, 3, heads, width).permute(2, 0, 3, 1, 4)
        q, k, v = by_head.reshape(3, rows * heads, length, width).unbind(0)
        future = q.new_full((length, length), -math.inf).triu(1)
        scores = torch.baddbmm(future, q, k.mT, alpha=1 / self.attn_scale)
        z = torch.bmm(scores.softmax(-1), v).view(rows, heads, length, width).transpose(1, 2)
        z = self.hook_z(z)
        # heads and width side by side on both sides: their product sums over heads
        summed = torch.addmm(self.b_O, z.reshape(-1, heads * width), self.W_O.flatten(0, 1))
        return summed.view(rows, length, d_model)


class FastBlock(TransformerBlock):
    """A pre-LN block that normalizes its input once for queries, keys and values."""

    def forward(  # type: ignore[override]
        self, resid_pre: Float[Tensor, "batch pos d_model"], **more: Any
    ) -> Tensor:
        """The residual stream after the block, `[batch, pos, d_model]`."""
        cfg = self.cfg
        further = any(value is not None for value in more.values())
        split = cfg.use_attn_in or cfg.use_split_qkv_input or cfg.use_hook_mlp_in
        # TransformerLens calls ln1 three times: whoever counts or changes its calls gets all three
        if further or split or _hooked(self.ln1, *self.ln1.children()):
            return super().forward(resid_pre, **more)
        resid_pre = self.hook_resid_pre(resid_pre)
        normalized = self.ln1(resid_pre)
        resid_mid = resid_pre + self.hook_attn_out(self.attn(normalized, normalized, normalized))
        if cfg.attn_only:
            return cast(Tensor, self.hook_resid_post(resid_mid))
        resid_mid = self.hook_resid_mid(resid_mid)
        return cast(Tensor, self.hook_resid_post(resid_mid + self.apply_mlp(self.ln2(resid_mid))))


_Methods = tuple[Callable[..., Any], ...]
_FAST: dict[type[nn.Module], tuple[type[nn.Module], _Methods, str]] = {
    LayerNorm: (FastLayerNorm, (LayerNorm.forward,), "e799623e0132adad"),
    Attention: (
        FastAttention,
        (
            AbstractAttention.forward,
            AbstractAttention.calculate_qkv_matrices,
            AbstractAttention.calculate_attention_scores,
            AbstractAttention.calculate_z_scores,
            AbstractAttention.apply_causal_mask,
        ),
        "ab95a55227294fcc",
    ),
    TransformerBlock: (
        FastBlock,
        (TransformerBlock.forward, TransformerBlock.apply_mlp),
        "c0fa5a1e6f497169",
    ),
}
"""Component -> its fast form, the methods that this replaces, and the sha256 of their source."""


def use_fast_kernels(model: HookedTransformer) -> None:
    """Run the model's components in their fast form from now on, wherever no hook forbids it.

    Args:
        model: of `circuit.model.build`: learned positions, causal attention of one kind, pre-LN or
            no normalization; changed in place. Copies of it are fast, too.
    """
    for module in model.modules():
        kind: Any = type(module)
        if kind in _FAST and _is_known(kind):
            module.__class__ = _FAST[kind][0]


@cache
def _is_known(kind: type) -> bool:
    """Whether the installed TransformerLens computes what the fast form was written against."""
    _, methods, digest = _FAST[kind]
    try:
        source = "".join(map(inspect.getsource, methods))
    except OSError:  # installed without sources
        source = ""
    if hashlib.sha256(source.encode()).hexdigest().startswith(digest):
        return True
    warnings.warn(
        f"TransformerLens {version('transformer_lens')} changed {kind.__name__}, or hides it: it"
        " runs as written there, not as a fast kernel",
        stacklevel=2,
    )
    return False


def _hooked(*modules: nn.Module) -> bool:
    """Whether any of the modules has a hook, TransformerLens's or torch's."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )
