"""Names and shapes of a HookedTransformer's parameters, from a config alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuit.train_config import ModelConfig

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def expected_shapes(config: ModelConfig, vocabulary_size: int) -> dict[str, list[int]]:
    """Names and shapes of its parameters, in the order of `named_parameters()`."""
    d, heads = config.d_model, config.heads
    width = d // heads
    block = {"ln1.w": [d], "ln1.b": [d], "ln2.w": [d], "ln2.b": [d]}
    block |= {"attn.W_Q": [heads, d, width], "attn.W_O": [heads, width, d]}
    block |= {"attn.b_Q": [heads, width], "attn.b_O": [d]}
    block |= {"attn.W_K": [heads, d, width], "attn.W_V": [heads, d, width]}
    block |= {"attn.b_K": [heads, width], "attn.b_V": [heads, width]}
    block |= {"mlp.W_in": [d, config.d_ff], "mlp.b_in": [config.d_ff]}
    block |= {"mlp.W_out": [config.d_ff, d], "mlp.b_out": [d]}
    shapes = {"embed.W_E": [vocabulary_size, d], "pos_embed.W_pos": [config.max_sequence_length, d]}
    for layer in range(config.layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_final.w": [d], "ln_final.b": [d]}
    shapes |= {"unembed.W_U": [d, vocabulary_size], "unembed.b_U": [vocabulary_size]}
    return {name: shape for name, shape in shapes.items() if _is_parameter(name, config)}


def _is_parameter(name: str, config: ModelConfig) -> bool:
    """Whether a model of this shape has what the largest one has."""
    block = BLOCK.fullmatch(name)
    part, leaf = (block[2] if block else name).split(".")
    lacks = {
        "unembed": config.tied_unembedding,
        "mlp": config.attention_only,
        "ln2": config.attention_only,
    }
    normless = part.startswith("ln") and config.normalization == "none"
    biasless = leaf.startswith("b") and not config.biases
    return not (lacks.get(part, False) or normless or biasless)
