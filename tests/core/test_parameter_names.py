"""A HookedTransformer's names and a bridge's: each tells the other, and nothing else is renamed."""

from __future__ import annotations

import pytest
from new_shapes import NEW_SHAPES

from circuit.core.parameter_names import bridge_name, bridge_name_of, hooked_name
from circuit.model.shapes import expected_shapes
from circuit.train_config import ModelConfig

SHAPE = {"layers": 11, "heads": 2, "d_model": 4, "d_ff": 8, "max_sequence_length": 3}
ALL = [
    name
    for changes in ({}, *NEW_SHAPES.values())
    for tied in (True, False)
    for name in expected_shapes(ModelConfig(**{**SHAPE, **changes, "tied_unembedding": tied}), 5)
]


@pytest.mark.parametrize("name", sorted(set(ALL)))
def test_there_and_back(name: str) -> None:
    theirs = bridge_name_of(name)
    assert theirs.endswith((".weight", ".bias"))
    assert hooked_name(theirs) == name
    assert bridge_name(theirs) == theirs
    assert hooked_name(name) == name


def test_a_path_inside_a_bridge_has_the_name_of_its_state_dict() -> None:
    inner = "._original_component"
    path = f"layers.3{inner}.mlp{inner}.fc_in{inner}.weight"
    assert bridge_name(path) == "blocks.3.mlp.in.weight"
    assert hooked_name(path) == "blocks.3.mlp.W_in"
    assert hooked_name(f"tok_embed{inner}.weight") == "embed.W_E"


@pytest.mark.parametrize("name", ["encoder.0.weight", "lm_head.bias", "blocks.0.attn.qkv.weight"])
def test_names_of_other_modules_stay(name: str) -> None:
    assert hooked_name(name) == bridge_name_of(name) == name
