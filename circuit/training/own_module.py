"""A module of somebody's own: made where it is named, at a state, and its shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.core.module import load_buffers, made_module
from circuit.errors import CircuitError, code_of_somebody
from circuit.lazy import torch
from circuit.model.weights import load_tensors
from circuit.plugins import import_name, named_code, refuse_changed_code
from circuit.train_config import ModelConfig, Recorded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def named_module(name: str, near: Path | None = None) -> nn.Module:
    """What `FILE.py:NAME` names: a module, or what a function gives that is called with nothing.

    Raises:
        CircuitError: as `circuit.plugins.import_name`; or it fails, or gives no module.
    """
    named = import_name(name, near, what="the model")
    expected = "an nn.Module, or a function that makes one and takes no arguments"
    with code_of_somebody(lambda it: f"raised {it}", where=name, expected=expected):
        module = made_module(named)
    if not isinstance(module, torch.nn.Module):
        raise CircuitError(f"gives {type(module).__name__}", where=name, expected=expected)
    return module


def refuse_changed_files(recorded: Recorded, near: Path) -> None:
    """Refuse to execute files that are not those with which a recording was imported.

    Raises:
        CircuitError: names the first that has changed.
    """
    if recorded.code is not None:
        refuse_changed_code(
            named_code(recorded.names, near),
            recorded.code,
            where=Path(),
            since="the import of the recording",
            fix="bring it back as it was, or import it again: circuit import-recording, with"
            " `overwrite`",
        )


def load_state(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    where: object = None,
) -> None:
    """Give a module the weights and buffers of a state; raises as both loads."""
    load_tensors(module, parameters)
    load_buffers(module, buffers, where)


_USUAL: dict[str, tuple[Any, ...]] = {
    "attention_dir": ("causal",),
    "gated_mlp": (False,),
    "normalization_type": ("LN", None),
    "positional_embedding_type": ("standard",),
    "use_attn_scale": (True,),
}
"""Settings of a HookedTransformer that reports rest on."""


def shape_of(module: nn.Module) -> ModelConfig | None:
    """The shape of a HookedTransformer of which every report can be made; None of any other.

    Raises:
        CircuitError: it is a HookedTransformer with a setting that reports do not know.
    """
    cfg = getattr(module, "cfg", None)
    if cfg is None or not hasattr(module, "hook_dict") or not hasattr(module, "blocks"):
        return None
    for name, values in _USUAL.items():
        if getattr(cfg, name) not in values:
            raise CircuitError(
                f"{name} is {getattr(cfg, name)!r}",
                where=type(module).__name__,
                expected=" or ".join(map(repr, values)),
                fix="circuit.open_run(folder, module=...) and circuit.attribute take any module",
            )
    names = {name for name, _ in module.named_parameters()}
    attention_only = bool(cfg.attn_only)
    return ModelConfig(
        layers=cfg.n_layers,
        heads=cfg.n_heads,
        d_model=cfg.d_model,
        d_ff=0 if attention_only else cfg.d_mlp,
        max_sequence_length=cfg.n_ctx,
        activation="relu" if cfg.act_fn == "relu" and not attention_only else "gelu",
        normalization="none" if cfg.normalization_type is None else "layer_norm",
        biases=any(name.endswith("b_Q") for name in names),
        tied_unembedding="unembed.W_U" not in names,
    )
