"""The same weights as a HookedTransformer holds them, and as a bridge does.

A HookedTransformer multiplies rows: `W_Q` is `[head, d_model, d_head]`, `W_in` `[d_model, d_mlp]`.
A bridge holds torch's linear maps: `q.weight` is `[head d_head, d_model]`, `in.weight`
`[d_mlp, d_model]`. Nothing is computed: both directions only move numbers, so that there and back
is every bit. Names are those of circuit/core/parameter_names.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from circuit.core.parameter_names import bridge_name_of, hooked_name
from circuit.lazy import torch
from circuit.model.shapes import expected_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from circuit.train_config import ModelConfig


def bridge_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A HookedTransformer's tensors as a bridge holds them, in a bridge's order; copies.

    Args:
        tensors: by name; an unembedding `W_U` and its bias may be among them.
    """
    linear = {bridge_name_of(name): _linear(name, tensor) for name, tensor in tensors.items()}
    return dict(sorted(linear.items(), key=lambda item: _place(item[0])))


def hooked_tensors(tensors: Mapping[str, Tensor], shape: ModelConfig) -> Mapping[str, Tensor]:
    """Parameters or moments of a run as a HookedTransformer holds them; its own as they are.

    Args:
        tensors: by name, of a model of `shape.kind`.
        shape: gives the number of heads.
    """
    if shape.kind == "hooked_transformer":
        return tensors
    return {
        (hooked := hooked_name(name)): _by_head(hooked, tensor, shape.heads)
        for name, tensor in tensors.items()
    }


NORMALIZATIONS = {"layer_norm": "LN", "none": None}
"""`model.normalization` -> TransformerLens's `normalization_type`."""


def bridge_config(shape: ModelConfig, vocabulary_size: int) -> dict[str, Any]:
    """What `TransformerBridge.boot_native` takes to build a model of this shape; JSON."""
    return {
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "d_model": shape.d_model,
        "d_head": shape.d_model // shape.heads,
        "d_mlp": shape.d_ff or None,
        "n_ctx": shape.max_sequence_length,
        "d_vocab": vocabulary_size,
        "act_fn": shape.activation,
        "normalization_type": NORMALIZATIONS[shape.normalization],
        "attn_only": shape.attention_only,
        "attention_dir": "causal",
    }


def standard_bridge_tensors(tensors: Mapping[str, Tensor], shape: ModelConfig) -> dict[str, Tensor]:
    """The `state_dict` that `boot_native` loads: an unembedding of its own, and every bias.

    Args:
        tensors: parameters of a model of either kind, by name.
        shape: says which of the two.
    """
    hooked = dict(hooked_tensors(tensors, shape))
    embedding = hooked["embed.W_E"]
    whole = shape.model_copy(update={"tied_unembedding": False, "biases": True})
    for name, size in expected_shapes(whole, len(embedding)).items():
        if name not in hooked:
            tied = name == "unembed.W_U"
            hooked[name] = embedding.T if tied else embedding.new_zeros(size)
    return bridge_tensors(hooked)


_MODULES = ("embed", "pos_embed", "blocks", "ln_final", "unembed")
_PARTS = ("ln1", "attn.q", "attn.k", "attn.v", "attn.o", "ln2", "mlp.in", "mlp.out")
"""Of a block, in the order in which a bridge computes them."""


def _place(name: str) -> tuple[int, int, int, bool]:
    """Where a bridge's parameter stands among the others."""
    module, leaf = name.rsplit(".", 1)
    first, _, inside = module.partition(".")
    layer, _, part = inside.partition(".")
    block = (int(layer), _PARTS.index(part)) if inside else (0, 0)
    return _MODULES.index(first), *block, leaf == "bias"


def _linear(name: str, tensor: Tensor) -> Tensor:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("W_Q", "W_K", "W_V"):  # [head, d_model, d_head] -> [head d_head, d_model]
        tensor = tensor.mT.flatten(0, 1)
    elif leaf == "W_O":  # [head, d_head, d_model] -> [d_model, head d_head]
        tensor = tensor.flatten(0, 1).T
    elif leaf in ("b_Q", "b_K", "b_V"):  # [head, d_head] -> [head d_head]
        tensor = tensor.flatten()
    elif leaf in ("W_in", "W_out", "W_U"):
        tensor = tensor.T
    return tensor.clone(memory_format=torch.contiguous_format)


def _by_head(name: str, tensor: Tensor, heads: int) -> Tensor:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("W_Q", "W_K", "W_V"):
        tensor = tensor.unflatten(0, (heads, -1)).mT
    elif leaf == "W_O":
        tensor = tensor.T.unflatten(0, (heads, -1))
    elif leaf in ("b_Q", "b_K", "b_V"):
        tensor = tensor.unflatten(0, (heads, -1))
    elif leaf in ("W_in", "W_out", "W_U"):
        tensor = tensor.T
    return tensor.clone(memory_format=torch.contiguous_format)
