"""The kinds of model that a config may ask for, and which TransformerLens builds each.

`hooked_transformer` is a `HookedTransformer`, which TransformerLens 4 no longer has; `bridge` is a
`TransformerBridge` around TransformerLens 4's native model. They compute the same function of
weights that correspond (circuit/model/layout.py) in other operations: equal to rounding, not in
bits, so that a run records which one it is of.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, cast

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.train_config import Kernels, ModelConfig, ModelKind

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

REQUIREMENTS: dict[ModelKind, str] = {
    "hooked_transformer": "transformer_lens>=3.9,<4",
    "bridge": "transformer_lens>=4",
}
"""What is to be installed for each kind."""


def installed_kind() -> ModelKind:
    """The kind that the installed TransformerLens builds.

    Raises:
        PackageNotFoundError: there is none.
    """
    return "hooked_transformer" if int(version("transformer_lens").split(".")[0]) < 4 else "bridge"


def require_kind(kind: ModelKind) -> None:
    """Refuse a kind of model that the installed TransformerLens does not build.

    Raises:
        CircuitError: says what to install.
    """
    if kind == installed_kind():
        return
    what = "HookedTransformer" if kind == "hooked_transformer" else "bridge model"
    raise CircuitError(
        f"a {what} cannot be built: TransformerLens {version('transformer_lens')} is installed",
        where="`model.kind`",
        expected=f"{REQUIREMENTS[kind]}, or a config whose `model.kind` is {installed_kind()!r}",
        fix=f'pip install "{REQUIREMENTS[kind]}"',
    )


def build(
    config: ModelConfig,
    *,
    vocabulary_size: int,
    seed: int,
    kernels: Kernels = "fast",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> HookedTransformer:
    """A freshly initialized model of the config's kind.

    Args:
        vocabulary_size: number of tokens, input and output.
        seed: seeds the generator of the initial weights.
        kernels: of a HookedTransformer; see `circuit.model.build.build_model`.
        device: where the model lives.
        dtype: of its weights; float32 by default.

    Returns:
        Either kind: a bridge has the hook points and weight accessors of a HookedTransformer.

    Raises:
        CircuitError: as `require_kind` and `circuit.environment.require_device`.
    """
    if config.kind == "bridge":
        from circuit.model.bridge import build_bridge

        bridge = build_bridge(
            config,
            vocabulary_size=vocabulary_size,
            seed=seed,
            device=device,
            dtype=dtype or torch.float32,
        )
        return cast("HookedTransformer", bridge)
    from circuit.model.build import build_model

    return build_model(
        config,
        vocabulary_size=vocabulary_size,
        seed=seed,
        kernels=kernels,
        device=device,
        dtype=dtype or torch.float32,
    )
