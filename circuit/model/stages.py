"""Stages of the residual stream, by name: read one, patch one (definitions.md section 3).

In order: `embedding`, then for each layer `layer_l_post_attn` and `layer_l_post_mlp`, then
`final_norm`, the unembedding's input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from circuit.errors import CircuitError

_LAYER_STAGE = re.compile(r"layer_(\d+)_post_(attn|mlp)")


def stage_names(layers: int) -> list[str]:
    """All stages of a model with that many layers, in order."""
    between = [f"layer_{layer}_post_{part}" for layer in range(layers) for part in ("attn", "mlp")]
    return ["embedding", *between, "final_norm"]


def stage_hook(stage: str, layers: int) -> str:
    """The hook point of a stage.

    Raises:
        CircuitError: there is no such stage (all are listed).
    """
    if stage not in stage_names(layers):
        raise CircuitError(
            f"unknown stage '{stage}'", expected=f"one of {', '.join(stage_names(layers))}"
        )
    if stage == "embedding":
        return "blocks.0.hook_resid_pre"
    if stage == "final_norm":
        return "unembed.hook_in"
    match = _LAYER_STAGE.fullmatch(stage)
    assert match is not None
    return f"blocks.{match[1]}.hook_resid_{'mid' if match[2] == 'attn' else 'post'}"


def stage_before(layer: int) -> str:
    """The stage that a layer's heads read."""
    return "embedding" if layer == 0 else f"layer_{layer - 1}_post_mlp"


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

    with model.hooks(fwd_hooks=[(stage_hook(stage, model.cfg.n_layers), replace)]):
        yield model
