"""The only module that constructs a TransformerBridge: TransformerLens 4's native model.

`TransformerBridge.boot_native`, with what a HookedTransformer has and the native model lacks:

- an unembedding that is tied to the embedding is one parameter of both (`tie_word_embeddings` is
  ignored there), and an untied one has a bias, if the model has biases;
- without biases, every bias is a buffer of zeros;
- `hook_resid_mid` stands on the residual stream itself (there it is the input of the second
  LayerNorm, so that a patch would reach the MLP alone), and `hook_attn_scores` sees the scores
  before the softmax (there it sees the pattern);
- parameters go by the names of `state_dict()`, such as `blocks.0.attn.q.weight`, rather than by the
  paths inside the bridge.

Initial weights are those of circuit/model/initial.py, which a HookedTransformer of the same seed
starts from: TransformerLens 4's own scheme scales the weights that write into the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from circuit.core.parameter_names import bridge_name
from circuit.environment import require_device
from circuit.lazy import uncollected
from circuit.model.initial import draw_weights
from circuit.model.kinds import require_kind
from circuit.model.layout import bridge_config, bridge_tensors
from circuit.model.shapes import expected_shapes
from circuit.model.weights import load_tensors
from circuit.train_config import ModelConfig

with uncollected():  # half a million objects
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.native import NativeAttention, NativeBlock


class ScoredAttention(NativeAttention):  # type: ignore[misc]  # which mypy takes for Any
    """The native attention, whose scores pass through the bridge's `hook_attn_scores`."""

    hook_attn_scores: HookPoint

    def forward(  # the output alone: the bridge takes a pair's second for scores
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        pattern_fn: Any = None,
        **more: Any,
    ) -> Tensor:
        """The heads' sum plus the output's bias, `[batch, pos, d_model]`."""
        rows, length, _ = hidden_states.shape
        # [batch, pos, head d_head] -> [batch, head, pos, d_head]
        q, k, v = (
            part(hidden_states).view(rows, length, self.n_heads, self.d_head).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        scores = q @ k.mT / math.sqrt(self.d_head)
        unseen = self.causal_mask[:length, :length]
        if attention_mask is not None:
            unseen = self._combine_attention_mask(unseen, attention_mask, batch=rows)
        scores = self.hook_attn_scores(scores.masked_fill(unseen, -math.inf))
        pattern = scores.softmax(-1)
        if attention_mask is not None:  # a query that sees nothing attends to nothing
            pattern = pattern.masked_fill(unseen, 0.0)
        if pattern_fn is not None:  # the bridge's hook_pattern
            pattern = pattern_fn(pattern)
        z = (pattern @ v).transpose(1, 2).reshape(rows, length, -1)
        return cast(Tensor, self.o(z))


class StagedBlock(NativeBlock):  # type: ignore[misc]
    """The native block, with a hook point on the residual stream between attention and MLP."""

    hook_resid_mid: HookPoint

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **more: Any
    ) -> tuple[Tensor]:
        """The residual stream behind the block, `[batch, pos, d_model]`, as a tuple of one."""
        written = self.attn(self.ln1(hidden_states), attention_mask=attention_mask)
        hidden_states = hidden_states + written
        if not self.cfg.attn_only:
            hidden_states = self.hook_resid_mid(hidden_states)
            hidden_states = hidden_states + self.mlp(self.ln2(hidden_states))
        return (hidden_states,)


class NamedBridge(TransformerBridge):  # type: ignore[misc]
    """A bridge whose parameters go by the names of its `state_dict()`."""

    def forward(
        self, input: Any, *more: Any, start_at_layer: int | None = None, **options: Any
    ) -> Any:
        """See `TransformerBridge`; behind the last layer, too, a run may start."""
        if start_at_layer == self.cfg.n_layers:
            return self.unembed(self.ln_final(input))
        return super().forward(input, *more, start_at_layer=start_at_layer, **options)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """See `torch.nn.Module`; a tied parameter is the embedding's."""
        start = f"{prefix}." if prefix else ""
        for path, parameter in super().named_parameters("", recurse, remove_duplicate):
            yield start + bridge_name(path), parameter

    def to(self, *where: Any, **options: Any) -> NamedBridge:
        """See `TransformerBridge`; short names such as `ln_final.b` follow what has moved."""
        super().to(*where, **options)
        for component in self.modules():
            for alias, path in getattr(component, "property_aliases", {}).items():
                if alias in component.__dict__:
                    target = reduce(getattr, path.split("."), component)
                    object.__setattr__(component, alias, target)
        return self


def build_bridge(
    config: ModelConfig,
    *,
    vocabulary_size: int,
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TransformerBridge:
    """A freshly initialized model; see `circuit.model.build.build_model`.

    Raises:
        CircuitError: as `circuit.environment.require_device`; or TransformerLens is an older one.
    """
    require_kind("bridge")
    require_device(device)
    settings = bridge_config(config, vocabulary_size)
    model = TransformerBridge.boot_native(TransformerBridgeConfig(**settings, init_weights=False))
    _hook_what_is_computed(model)
    native = model.original_model
    embed, unembed = _inner(native.tok_embed), _inner(native.head)
    if config.tied_unembedding:
        unembed.weight = embed.weight
        _without_biases(unembed)  # up to TransformerLens 4.2 one was added, to be trained
    elif config.biases:
        unembed.bias = nn.Parameter(torch.zeros(vocabulary_size))
    if not config.biases:
        _without_biases(native)
    model.__class__ = NamedBridge
    shapes = expected_shapes(config, vocabulary_size).items()
    load_tensors(model, bridge_tensors(dict(draw_weights(shapes, config, seed))))
    return model.to(device=device, dtype=dtype, print_details=False)


def plain_bridge(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransformerBridge:
    """What plain TransformerLens makes of exported weights, on the CPU; its version 3.9 can, too.

    Args:
        settings: of `circuit.model.layout.bridge_config`.
        tensors: of `circuit.model.layout.standard_bridge_tensors`.
    """
    model = TransformerBridge.boot_native(dict(settings))
    model.load_state_dict(dict(tensors))
    return model


def _hook_what_is_computed(model: TransformerBridge) -> None:
    """Hook points on scores and on the residual stream, where a HookedTransformer has them."""
    templates = model.adapter.component_mapping["blocks"]
    for number, block in enumerate(model.blocks):
        native, attention = _inner(block), _inner(block.attn)
        attention.__class__, native.__class__ = ScoredAttention, StagedBlock
        attention.hook_attn_scores = block.attn.hook_attn_scores
        if model.cfg.attn_only:
            continue
        point = native.hook_resid_mid = HookPoint()
        point.name = f"blocks.{number}.hook_resid_mid"
        for aliased in (block, templates):  # no longer another name of ln2.hook_in
            aliased.hook_aliases = {
                alias: to for alias, to in aliased.hook_aliases.items() if alias != "hook_resid_mid"
            }
        object.__setattr__(block, "hook_resid_mid", point)
        model._hook_registry[point.name] = point
    model._block_alias_cache = None


def _inner(component: Any) -> Any:
    """What a component of the bridge stands for."""
    return component.original_component


def _without_biases(native: nn.Module) -> None:
    """Every bias becomes a buffer of zeros, where TransformerLens looks for it."""
    for module in native.modules():
        bias = module._parameters.get("bias")
        if bias is not None:
            del module.bias
            module.register_buffer("bias", torch.zeros_like(bias), persistent=False)
