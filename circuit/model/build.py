"""The only module that constructs a HookedTransformer.

Learned absolute positions and causal attention; pre-LN or no normalization, an MLP in every block
or in none, exact GELU or ReLU. What a config leaves out is no parameter, and still answers as
TransformerLens code expects: of an unembedding that is tied to the embedding `named_parameters()`
holds `embed.W_E` once, and without biases every `b_*` (of a LayerNorm `b`) is a buffer of zeros.

Initial weights are those of circuit/model/initial.py. TransformerLens 4 has no HookedTransformer:
there this module refuses to be imported.
"""

from __future__ import annotations

import warnings
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from circuit.environment import require_device
from circuit.lazy import uncollected
from circuit.model.initial import draw_weights, is_bias
from circuit.model.kinds import require_kind
from circuit.model.layout import NORMALIZATIONS
from circuit.train_config import Kernels, ModelConfig

require_kind("hooked_transformer")  # before what another TransformerLens does not have

with uncollected():  # half a million objects
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.components.embed import Embed
    from transformer_lens.components.unembed import Unembed
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
    from transformer_lens.pretrained.weight_conversions.neox import convert_neox_weights

from circuit.model.kernels import use_fast_kernels  # noqa: E402


class TiedUnembed(Unembed):
    """TransformerLens's unembedding, reading its weight from the embedding.

    `W_U` is `embed.W_E.T` `[d_model, d_vocab]`; `b_U` is a zero buffer `[d_vocab]`.
    """

    def __init__(self, cfg: HookedTransformerConfig, embed: Embed) -> None:
        nn.Module.__init__(self)
        self.cfg = cfg
        self._embed = (embed,)  # in a tuple, so that it is not registered a second time
        self.register_buffer("b_U", torch.zeros(cfg.d_vocab_out, dtype=cfg.dtype), persistent=False)
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    @property
    def W_U(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """`[d_model, d_vocab]`, a view of the embedding."""
        return self._embed[0].W_E.T


def build_model(
    config: ModelConfig,
    *,
    vocabulary_size: int,
    seed: int,
    kernels: Kernels = "fast",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HookedTransformer:
    """A freshly initialized model.

    Args:
        vocabulary_size: number of tokens, input and output.
        seed: seeds the generator of the initial weights.
        kernels: `fast` (circuit/model/kernels.py) or `plain`, as TransformerLens wrote it; equal
            to rounding.
        device: where the model lives; the weights are drawn on the CPU, so that they are the same
            on every device.

    Raises:
        CircuitError: as `circuit.environment.require_device`.
    """
    require_device(device)
    cfg = HookedTransformerConfig(
        n_layers=config.layers,
        n_heads=config.heads,
        d_model=config.d_model,
        d_head=config.d_model // config.heads,
        d_mlp=config.d_ff or None,
        n_ctx=config.max_sequence_length,
        d_vocab=vocabulary_size,
        act_fn=config.activation,
        normalization_type=NORMALIZATIONS[config.normalization],
        attn_only=config.attention_only,
        attention_dir="causal",
        init_weights=False,
        device=device,
        dtype=dtype,
    )
    model = _construct(cfg)
    if config.tied_unembedding:
        model.unembed = TiedUnembed(model.cfg, model.embed)
    if not config.biases:
        _without_biases(model)
    if kernels == "fast":
        use_fast_kernels(model)
    model.to(device, print_details=False)
    model.setup()
    initialize(model, config, seed)
    return model


def _without_biases(model: HookedTransformer) -> None:
    """Every bias becomes a buffer of zeros, where TransformerLens code finds it."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_bias(name):
                delattr(module, name)
                module.register_buffer(name, torch.zeros_like(parameter))


def build_standard(cfg: HookedTransformerConfig) -> HookedTransformer:
    """A HookedTransformer of TransformerLens's own classes throughout; weights are not set.

    Args:
        cfg: its shape, device and dtype; left as it is.
    """
    model = _construct(copy(cfg))
    model.to(cfg.device or "cpu", print_details=False)
    return model


def build_converted(shape: dict[str, Any], source: Any, *, neox: bool) -> HookedTransformer:
    """A plain HookedTransformer with the weights of a Hugging Face model, unfolded.

    Args:
        shape: fields of its config.
        source: a `GPT2LMHeadModel`, or where `neox` a `GPTNeoXForCausalLM`.
    """
    convert = convert_neox_weights if neox else convert_gpt2_weights
    cfg = HookedTransformerConfig(**shape, init_weights=False, device="cpu", dtype=torch.float32)
    model = _construct(cfg)
    converted = {name: t.detach().contiguous() for name, t in convert(source, model.cfg).items()}
    # what the conversions leave out (masks, rotary tables) the model has made itself; the rest
    # takes the place of its own weights, which nobody has written to: no third copy
    model.load_state_dict({**model.state_dict(), **converted}, assign=True)
    return model.eval()


def _construct(cfg: HookedTransformerConfig) -> HookedTransformer:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated.*", category=DeprecationWarning)
        return HookedTransformer(cfg, move_to_device=False)


def initialize(model: HookedTransformer, config: ModelConfig, seed: int) -> None:
    """Draw every parameter, in the order of `named_parameters()` (circuit/model/initial.py)."""
    parameters = dict(model.named_parameters())
    shapes = ((name, parameter.shape) for name, parameter in parameters.items())
    with torch.no_grad():
        for name, drawn in draw_weights(shapes, config, seed):
            parameters[name].copy_(drawn)
