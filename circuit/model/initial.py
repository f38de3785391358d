"""Initial weights: drawn from one generator, seeded by the run's seed, on the CPU.

Every parameter of a HookedTransformer in its order (`parameter_shapes`), whichever kind of model
they are for: runs of both kinds with one seed start from the same function.

- `pytorch_default`: embeddings N(0, 1) as `torch.nn.Embedding`; weights and biases of linear maps
  U(-1/sqrt(fan_in), 1/sqrt(fan_in)) as `torch.nn.Linear`; LayerNorm weight 1, bias 0.
- `gpt2`: embeddings and weights N(0, 0.02); biases 0; LayerNorm as above.
- `transformer_lens`: embeddings and weights N(0, 0.8/sqrt(d_model)); biases 0; LayerNorm as above.
  It is what a HookedTransformer draws by default (`init_mode` "gpt2", `initializer_range` -1), and
  so what TransformerLens's demonstration of grokking (Nanda et al. 2023) starts from.

`embedding_std` replaces the standard deviation of the embeddings in any of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from circuit.lazy import torch
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


def is_bias(leaf: str) -> bool:
    """Of a linear map (`b_Q`), or of a LayerNorm (`b`)."""
    return leaf == "b" or leaf.startswith("b_")


def draw_weights(
    shapes: Iterable[tuple[str, Iterable[int]]], config: ModelConfig, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and initial value, float32, one after the other.

    Args:
        shapes: of a HookedTransformer's parameters, by name, in its order.
        config: gives scheme and widths.
    """
    generator = torch.Generator().manual_seed(seed)
    scheme = config.initialization
    # of linear maps' weights; torch's own draws them uniformly
    std = {"gpt2": 0.02, "transformer_lens": 0.8 / math.sqrt(config.d_model)}.get(scheme)
    embedding_std = config.embedding_std or std or 1.0
    fan_in = dict.fromkeys(("W_out", "b_out"), config.d_ff)  # of all others d_model
    for name, shape in shapes:
        leaf = name.rsplit(".", 1)[-1]
        drawn = torch.empty(tuple(shape), dtype=torch.float32)
        if leaf in ("W_E", "W_pos"):
            drawn.normal_(0.0, embedding_std, generator=generator)
        elif leaf == "w":
            drawn.fill_(1.0)
        elif leaf == "b" or (std is not None and is_bias(leaf)):
            drawn.zero_()
        elif std is not None:
            drawn.normal_(0.0, std, generator=generator)
        else:
            bound = 1.0 / math.sqrt(fan_in.get(leaf, config.d_model))
            drawn.uniform_(-bound, bound, generator=generator)
        yield name, drawn
