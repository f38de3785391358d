"""A model of ours as plain TransformerLens has it: for its own tools, and for other programs.

Our models tie the unembedding to the embedding and run fast kernels, which TransformerLens's tools
that read `state_dict()["unembed.W_U"]` (`process_weights_`, `SVDInterpreter`) do not know. A
standard model holds a `W_U` and a `b_U` of its own, in TransformerLens's classes throughout. Its
weights are copies: training it would no longer tie them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from circuit.lazy import no_grad, torch
from circuit.model.layout import standard_bridge_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    from circuit.train_config import ModelConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""Files of an exported model."""

IMPORTS = "import json, pathlib, safetensors.torch, transformer_lens as tl"
LOAD = (
    "cfg = tl.HookedTransformerConfig.from_dict(json.loads(pathlib.Path({config!r}).read_text()))",
    "model = tl.HookedTransformer(cfg)",
    "model.load_state_dict(safetensors.torch.load_file({weights!r}))",
)
"""How plain TransformerLens loads one, behind the imports."""
LOAD_BRIDGE = (
    "cfg = json.loads(pathlib.Path({config!r}).read_text())",
    "model = tl.TransformerBridge.boot_native(cfg)",
    "model.load_state_dict(safetensors.torch.load_file({weights!r}))",
)
"""How TransformerLens 4 does."""


def standard_model(model: HookedTransformer) -> HookedTransformer:
    """The same function as a standard `HookedTransformer`: untied, without fast kernels.

    Returns:
        A model whose logits are those of `model`: with plain kernels the same operations on the
        same numbers, with fast ones equal to rounding.
    """
    from circuit.model.build import build_standard

    standard = build_standard(model.cfg)
    standard.load_state_dict(standard_tensors(model))
    return standard.train(model.training)


def standard_tensors(model: HookedTransformer) -> dict[str, Tensor]:
    """The `state_dict` of the standard model: contiguous, none of its tensors shares memory.

    `unembed.W_U` is `[d_model, d_vocab]`, `unembed.b_U` `[d_vocab]`.
    """
    tensors = {
        **model.state_dict(),
        "unembed.W_U": model.unembed.W_U,
        "unembed.b_U": model.unembed.b_U,
    }
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def standard_weights(model: HookedTransformer) -> bytes:
    """These tensors as a safetensors file."""
    from safetensors.torch import save

    return save(standard_tensors(model))


def standard_config(model: HookedTransformer) -> dict[str, Any]:
    """The model's HookedTransformerConfig as JSON; device and dtype are the loader's choice."""
    settings = model.cfg.to_dict()
    return {
        name: float(value) if isinstance(value, float) else value  # NumPy's among them
        for name, value in settings.items()
        if name not in ("device", "dtype")
    }


def bridge_weights(tensors: Mapping[str, Tensor], shape: ModelConfig) -> bytes:
    """The `state_dict` that TransformerLens 4 loads, as a safetensors file.

    Args:
        tensors: parameters of a model of either kind, by name.
        shape: of the model.
    """
    from safetensors.torch import save

    return save(standard_bridge_tensors(tensors, shape))


def load_bridge(config: Mapping[str, Any], weights: bytes) -> TransformerBridge:
    """What plain TransformerLens, from 3.9 on, makes of such files, on the CPU.

    Args:
        config: content of `config.json`, of `circuit.model.layout.bridge_config`.
        weights: content of `model.safetensors`.
    """
    from safetensors.torch import load

    from circuit.model.bridge import plain_bridge

    return plain_bridge(config, load(weights))


def load_standard(config: Mapping[str, Any], weights: bytes) -> HookedTransformer:
    """What plain TransformerLens makes of an exported model, on the CPU.

    Args:
        config: content of `config.json`.
        weights: content of `model.safetensors`.
    """
    from safetensors.torch import load
    from transformer_lens import HookedTransformerConfig

    from circuit.model.build import build_standard

    standard = build_standard(HookedTransformerConfig.from_dict({**config, "device": "cpu"}))
    standard.load_state_dict(load(weights))
    return standard


@no_grad
def logit_gap(
    model: HookedTransformer, other: HookedTransformer | TransformerBridge
) -> tuple[float, float]:
    """Their logits over 8 rows of random tokens of full length (seed 0).

    Returns:
        The largest absolute difference, and the largest absolute logit of `model`.
    """
    cfg = model.cfg
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.d_vocab, (8, cfg.n_ctx), generator=generator)
    ours = model(tokens.to(cfg.device)).cpu()
    theirs = other(tokens.to(other.cfg.device)).cpu()
    return float((ours - theirs).abs().max()), float(ours.abs().max())
