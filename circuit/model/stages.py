"""Stages of the residual stream, by name: read, patch, run on from one (definitions.md section 3).

In order: `embedding`, then for each layer `layer_l_post_attn` and `layer_l_post_mlp`, then
`final_norm`, the unembedding's input. A model of attention alone has no `layer_l_post_attn`: it
would be a second name of `layer_l_post_mlp`, the end of the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from circuit.errors import CircuitError
from circuit.model.components import Hook

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer
    from transformer_lens.hook_points import HookPoint

_LAYER_STAGE = re.compile(r"layer_(\d+)_post_(attn|mlp)")


def stage_names(layers: int, *, attention_only: bool = False) -> list[str]:
    """All stages of a model with that many layers, in order."""
    parts = ("mlp",) if attention_only else ("attn", "mlp")
    between = [f"layer_{layer}_post_{part}" for layer in range(layers) for part in parts]
    return ["embedding", *between, "final_norm"]


def stage_hook(stage: str, layers: int, *, attention_only: bool = False) -> str:
    """The hook point of a stage.

    Raises:
        CircuitError: there is no such stage (all are listed).
    """
    names = stage_names(layers, attention_only=attention_only)
    if stage not in names:
        missing = stage in stage_names(layers)
        raise CircuitError(
            f"the model has no MLPs, so no stage '{stage}' of its own"
            if missing
            else f"unknown stage '{stage}'",
            expected=f"one of {', '.join(names)}",
        )
    if stage == "embedding":
        return "blocks.0.hook_resid_pre"
    if stage == "final_norm":
        return "unembed.hook_in"
    match = _LAYER_STAGE.fullmatch(stage)
    assert match is not None
    return f"blocks.{match[1]}.hook_resid_{'mid' if match[2] == 'attn' else 'post'}"


def _hook(stage: str, model: HookedTransformer) -> str:
    return stage_hook(stage, model.cfg.n_layers, attention_only=model.cfg.attn_only)


def stage_before(layer: int) -> str:
    """The stage that a layer's heads read."""
    return "embedding" if layer == 0 else f"layer_{layer - 1}_post_mlp"


def read_stages(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"], *stages: str
) -> tuple[Float[Tensor, "batch pos vocab"], dict[str, Float[Tensor, "batch pos d_model"]]]:
    """The logits, and the residual stream at each stage.

    Raises:
        CircuitError: there is no such stage.
    """
    hooks = {stage: _hook(stage, model) for stage in stages}
    logits, cache = model.run_with_cache(
        tokens, names_filter=list(hooks.values()), return_cache_object=False
    )
    return cast("Tensor", logits), {stage: cache[hook] for stage, hook in hooks.items()}


def run_from(
    model: HookedTransformer, stage: str, residual: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos vocab"]:
    """The logits of the network downstream of a stage, given the residual stream there.

    Only the layers from that stage on are run (at `layer_l_post_attn` all of layer `l`, whose
    attention is thrown away).

    Raises:
        CircuitError: there is no such stage.
    """
    hook_name = _hook(stage, model)
    match = _LAYER_STAGE.fullmatch(stage)
    if stage == "embedding":
        layer = 0
    elif match is None:
        layer = model.cfg.n_layers
    else:
        layer = int(match[1]) + (match[2] == "mlp")
    inside = stage == "final_norm" or (match is not None and match[2] == "attn")

    def replace(value: Tensor, hook: HookPoint) -> Tensor:
        return residual

    hooks: list[Hook] = [(hook_name, replace)] if inside else []
    return cast("Tensor", model.run_with_hooks(residual, start_at_layer=layer, fwd_hooks=hooks))


@contextmanager
def patch(
    model: HookedTransformer,
    stage: str,
    positions: tuple[Int[Tensor, " place"], Int[Tensor, " place"]],
    change: Callable[[Float[Tensor, "place d_model"]], Float[Tensor, "place d_model"]],
) -> Iterator[HookedTransformer]:
    """Within the block, the residual stream at a stage is replaced at some positions.

    Args:
        positions: rows and token positions, of equal length.
        change: takes the vectors there to their replacement.

    Raises:
        CircuitError: there is no such stage.
    """

    def replace(value: Tensor, hook: HookPoint) -> Tensor:
        changed = value.clone()
        changed[positions] = change(value[positions])
        return changed

    with model.hooks(fwd_hooks=[(_hook(stage, model), replace)]):
        yield model
