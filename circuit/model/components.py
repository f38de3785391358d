"""Components by address: `L2H1` is head 1 of layer 2, `L0MLP` the MLP of layer 0.

Ablation goes through TransformerLens's hook points: a head's `hook_z` is zeroed (`b_O` stays), an
MLP's `hook_mlp_out` is zeroed (definitions.md section 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.numerals import WHOLE

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer
    from transformer_lens.hook_points import HookPoint

    from circuit.train_config import ModelConfig

_NUMBER = f"(0|(?!0){WHOLE})"  # one spelling each, so that no component stands twice
_ADDRESS = re.compile(f"L{_NUMBER}(?:H{_NUMBER}|(MLP))")

Hook = tuple[str | Callable[..., Any], Callable[..., Any]]
"""A hook point's name and what replaces its value, as `run_with_hooks` takes them."""


@dataclass(frozen=True)
class Component:
    """A head (`head` is its number) or an MLP (`head` is None) of a layer."""

    layer: int
    head: int | None

    def __str__(self) -> str:
        return f"L{self.layer}MLP" if self.head is None else f"L{self.layer}H{self.head}"

    @property
    def hook_name(self) -> str:
        """The hook point whose value is the component's output."""
        if self.head is None:
            return f"blocks.{self.layer}.hook_mlp_out"
        return f"blocks.{self.layer}.attn.hook_z"

    def ablation(self) -> Hook:
        """The hook that sets the component's output to zero."""

        def zero(value: Tensor, hook: HookPoint) -> Tensor:
            if self.head is None:
                return torch.zeros_like(value)
            mask = torch.ones(value.shape[-2], 1, dtype=value.dtype, device=value.device)
            mask[self.head] = 0
            return value * mask

        return self.hook_name, zero


def parse_component(
    address: str,
    model: HookedTransformer | None = None,
    *,
    shape: ModelConfig | None = None,
    kind: Literal["head", "MLP"] | None = None,
) -> Component:
    """A component from its address.

    Args:
        model: if given, the component must exist in it.
        shape: the same where no model is at hand.
        kind: what it has to be; None takes either.

    Raises:
        CircuitError: the address is malformed, of the other kind, or there is no such layer, head
            or MLP.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise CircuitError(f"unknown component '{address}'", expected="one such as L2H1 or L0MLP")
    layer, head = int(match[1]), None if match[3] else int(match[2])
    if kind is not None and (head is None) != (kind == "MLP"):
        such = "L2H1" if kind == "head" else "L0MLP"
        raise CircuitError(f"'{address}' is no {kind}", expected=f"a {kind}, such as {such}")
    if model is not None:
        cfg = model.cfg
        _check_exists(address, layer, head, cfg.n_layers, cfg.n_heads, cfg.attn_only)
    if shape is not None:
        _check_exists(address, layer, head, shape.layers, shape.heads, shape.attention_only)
    return Component(layer, head)


def _check_exists(
    address: str, layer: int, head: int | None, layers: int, heads: int, attention_only: bool
) -> None:
    if layer >= layers or (head is not None and head >= heads):
        raise CircuitError(
            f"the model has no component '{address}'",
            expected=f"layers 0-{layers - 1}, heads 0-{heads - 1}",
        )
    if head is None and attention_only:
        raise CircuitError(f"the model has no component '{address}', for it has no MLPs (d_ff 0)")


def all_heads(model: HookedTransformer) -> list[Component]:
    """Every head, layer by layer."""
    cfg = model.cfg
    return [Component(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]


@contextmanager
def ablate(model: HookedTransformer, *addresses: str) -> Iterator[HookedTransformer]:
    """Within the block, the model runs without these components.

    Raises:
        CircuitError: an address is malformed or not in the model.
    """
    hooks = [parse_component(address, model).ablation() for address in addresses]
    with model.hooks(fwd_hooks=hooks):
        yield model
