"""Models that `save_pretrained` has written, as HookedTransformers: GPT-2 and GPT-NeoX (Pythia).

The weights go through TransformerLens's own conversions, unfolded; the shape is read off the
folder's config. Nothing is downloaded and nothing in a folder is executed: weights have to be
safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.reading import read_json
from circuit.sizes import require_memory

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ARCHITECTURES = ("GPT2LMHeadModel", "GPTNeoXForCausalLM")


def is_pretrained(folder: Path) -> bool:
    """Whether a folder is one that `save_pretrained` writes."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def load_pretrained(folder: Path) -> HookedTransformer:
    """The model in a folder, in float32, plain TransformerLens.

    Raises:
        CircuitError: its architecture is none of `ARCHITECTURES`, or has what a HookedTransformer
            has not; a weight is missing; or it cannot be read.
    """
    config = read_json(folder / CONFIG)
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or names[:1] not in [[name] for name in ARCHITECTURES]:
        raise CircuitError(
            f"architectures is {names}",
            where=folder / CONFIG,
            expected=" or ".join(ARCHITECTURES),
        )
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return _converted(folder, neox=names[0] == ARCHITECTURES[1])
    except CircuitError:
        raise
    except Exception as error:  # of a config that is not as its kind's anything may follow
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CircuitError(f"cannot be read ({first})", where=folder) from error
    finally:
        if drawn:
            logging.enable_progress_bar()


def _converted(folder: Path, *, neox: bool) -> HookedTransformer:
    from transformers import AutoConfig, AutoModelForCausalLM

    from circuit.model.build import build_converted

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    shape = _neox(config) if neox else _gpt2(config)
    _refuse_others(shape, config, folder / CONFIG)
    require_memory(_memory(shape), where=folder / CONFIG)
    model, loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
    )
    if loaded["missing_keys"]:  # which are random then
        raise CircuitError(f"holds no {min(loaded['missing_keys'])}", where=folder)
    odd = next((n for n, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if odd is not None:
        raise CircuitError(f"{odd} is not finite", where=folder, expected="finite weights")
    return build_converted(shape, model, neox=neox)


def _memory(shape: dict[str, Any]) -> dict[str, int]:
    """Bytes of the weights, in both of the models, and of the masks, one of each layer."""
    d, layers, positions = shape["d_model"], shape["n_layers"], shape["n_ctx"]
    weights = layers * (4 * d * d + 2 * d * shape["d_mlp"]) + (2 * shape["d_vocab"] + positions) * d
    return {
        "weights (its sizes and number of layers)": 8 * weights,
        "masks (its positions and number of layers)": layers * positions**2,
    }


def _refuse_others(shape: dict[str, Any], config: Any, where: Path) -> None:
    """Refuse what a HookedTransformer of these fields would compute otherwise, or not at all."""
    from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

    rope = getattr(config, "rope_parameters", None) or {}
    supported = {
        "activation": (shape["act_fn"], tuple(SUPPORTED_ACTIVATIONS)),
        "rope_type": (rope.get("rope_type", "default"), ("default",)),
        "attention_bias": (getattr(config, "attention_bias", True), (True,)),
    }
    for name, (value, choices) in supported.items():
        if value not in choices:
            expected = " or ".join(map(str, choices))
            raise CircuitError(f"{name} is {value}", where=where, expected=expected)


def _gpt2(config: Any) -> dict[str, Any]:
    """A HookedTransformerConfig's fields of a GPT2Config."""
    return {
        "d_model": config.n_embd,
        "n_heads": config.n_head,
        "d_head": config.n_embd // config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_layers": config.n_layer,
        "n_ctx": config.n_positions,
        "eps": config.layer_norm_epsilon,
        "d_vocab": config.vocab_size,
        "act_fn": config.activation_function,
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "normalization_type": "LN",
    }


def _neox(config: Any) -> dict[str, Any]:
    """The same of a GPTNeoXConfig."""
    d_head = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters or {}
    return {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "d_head": d_head,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.layer_norm_eps,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_act,
        "parallel_attn_mlp": config.use_parallel_residual,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rotary_dim": round(rope.get("partial_rotary_factor", 0.25) * d_head),
        "normalization_type": "LN",
    }
