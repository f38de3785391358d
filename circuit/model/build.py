"""The only module that constructs a HookedTransformer.

Pre-LN, learned absolute positions, exact GELU, biases everywhere, and an unembedding tied to the
embedding: `named_parameters()` holds `embed.W_E` once, while `W_U` and `b_U` answer as
TransformerLens code expects.

Initialization draws every parameter from one generator, seeded by the run's seed, on the CPU, in
the order of `named_parameters()`:

- `pytorch_default`: embeddings N(0, 1) as `torch.nn.Embedding`; weights and biases of linear maps
  U(-1/sqrt(fan_in), 1/sqrt(fan_in)) as `torch.nn.Linear`; LayerNorm weight 1, bias 0.
- `gpt2`: embeddings and weights N(0, 0.02); biases 0; LayerNorm as above.

`embedding_std` replaces the standard deviation of the embeddings in either.
"""

from __future__ import annotations

import math
import warnings
from copy import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.components.embed import Embed
from transformer_lens.components.unembed import Unembed
from transformer_lens.hook_points import HookPoint

from circuit.environment import require_device
from circuit.model.kernels import use_fast_kernels
from circuit.train_config import Kernels, ModelConfig


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
        d_mlp=config.d_ff,
        n_ctx=config.max_sequence_length,
        d_vocab=vocabulary_size,
        act_fn="gelu",
        normalization_type="LN",
        attention_dir="causal",
        init_weights=False,
        device=device,
        dtype=dtype,
    )
    model = _construct(cfg)
    if config.tied_unembedding:
        model.unembed = TiedUnembed(model.cfg, model.embed)
    if kernels == "fast":
        use_fast_kernels(model)
    model.to(device, print_details=False)
    model.setup()
    initialize(model, config, seed)
    return model


def build_standard(cfg: HookedTransformerConfig) -> HookedTransformer:
    """A HookedTransformer of TransformerLens's own classes throughout; weights are not set.

    Args:
        cfg: its shape, device and dtype; left as it is.
    """
    model = _construct(copy(cfg))
    model.to(cfg.device or "cpu", print_details=False)
    return model


def _construct(cfg: HookedTransformerConfig) -> HookedTransformer:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated.*", category=DeprecationWarning)
        return HookedTransformer(cfg, move_to_device=False)


def initialize(model: HookedTransformer, config: ModelConfig, seed: int) -> None:
    """Draw every parameter, in the order of `named_parameters()` (see the module's docstring)."""
    generator = torch.Generator().manual_seed(seed)
    cfg, scheme = model.cfg, config.initialization
    std = config.embedding_std or (1.0 if scheme == "pytorch_default" else 0.02)
    fan_in = {"W_out": cfg.d_mlp, "b_out": cfg.d_mlp, "W_O": cfg.d_model, "b_O": cfg.d_model}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            if leaf in ("W_E", "W_pos"):
                drawn.normal_(0.0, std, generator=generator)
            elif leaf == "w":
                drawn.fill_(1.0)
            elif leaf == "b" or (scheme == "gpt2" and leaf.startswith("b_")):
                drawn.zero_()
            elif scheme == "gpt2":
                drawn.normal_(0.0, 0.02, generator=generator)
            else:
                bound = 1.0 / math.sqrt(cast(int, fan_in.get(leaf, cfg.d_model)))
                drawn.uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)
