"""Components: what is named is what is ablated."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from circuit.errors import CircuitError
from circuit.model.components import ablate, all_heads, parse_component
from circuit.model.kinds import build
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


def test_ablating_a_head_equals_a_model_without_its_output_weights(
    model: HookedTransformer, tokens: torch.Tensor
) -> None:
    for component in all_heads(model):
        without = copy.deepcopy(model)
        with torch.no_grad():
            without.blocks[component.layer].attn.W_O[component.head].zero_()
        with ablate(model, str(component)):
            ablated = model(tokens)
        assert torch.allclose(ablated, without(tokens), atol=1e-6)
        assert not torch.allclose(ablated, model(tokens), atol=1e-3)


def test_ablating_an_mlp_takes_its_output_away(
    model: HookedTransformer, tokens: torch.Tensor
) -> None:
    with ablate(model, "L0MLP"):
        _, cache = model.run_with_cache(tokens)
    assert torch.equal(cache["blocks.0.hook_resid_post"], cache["blocks.0.hook_resid_mid"])
    _, cache = model.run_with_cache(tokens)  # the hooks are gone
    assert not torch.equal(cache["blocks.0.hook_resid_post"], cache["blocks.0.hook_resid_mid"])


def test_without_mlps_there_is_none_to_name(shape: ModelConfig) -> None:
    shape = ModelConfig.model_validate({**shape.model_dump(), "d_ff": 0})
    for given in ({"shape": shape}, {"model": build(shape, vocabulary_size=20, seed=1)}):
        assert str(parse_component("L1H0", **given)) == "L1H0"
        with pytest.raises(CircuitError, match=r"no component 'L1MLP', for it has no MLPs"):
            parse_component("L1MLP", **given)


def test_names_that_do_not_exist_are_refused(model: HookedTransformer, shape: ModelConfig) -> None:
    for address in ("H1L2", "L00H0", "L0H00", "L00MLP", "L0H\u0661"):
        with pytest.raises(CircuitError, match=f"component '{address}'; expected one such as L2H1"):
            parse_component(address)
    with pytest.raises(CircuitError, match=r"no component 'L2H0'; expected layers 0-1, heads 0-1"):
        parse_component("L2H0", model)
    with pytest.raises(CircuitError, match=r"no component 'L0H2'; expected layers 0-1, heads 0-1"):
        parse_component("L0H2", shape=shape)
