"""Stages: what is named is what is read, patched, and run on from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from new_shapes import NEW_SHAPES

from circuit.errors import CircuitError
from circuit.model.components import ablate
from circuit.model.kinds import build
from circuit.model.readout import lens
from circuit.model.stages import (
    patch,
    read_stages,
    run_from,
    stage_before,
    stage_hook,
    stage_names,
)
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


def test_stages_are_the_running_sum_of_the_stream(
    model: HookedTransformer, tokens: torch.Tensor
) -> None:
    # between components only, where no hook changes the kernels and so the last bits
    between = [f"blocks.{layer}.hook_{part}_out" for layer in range(2) for part in ("attn", "mlp")]
    _, cache = model.run_with_cache(tokens, names_filter=["hook_embed", "hook_pos_embed", *between])
    logits, found = read_stages(model, tokens, *stage_names(2))
    assert list(found) == stage_names(2)
    total = cache["hook_embed"] + cache["hook_pos_embed"]
    assert torch.equal(found["embedding"], total)
    for layer in range(2):
        for part in ("attn", "mlp"):
            total = total + cache[f"blocks.{layer}.hook_{part}_out"]
            assert torch.equal(found[f"layer_{layer}_post_{part}"], total)
    assert torch.equal(found["final_norm"], model.ln_final(total))
    assert torch.equal(logits, model(tokens))
    assert torch.allclose(lens(model, "final_norm", found["final_norm"]), logits, atol=1e-5)


def test_every_stage_is_what_the_stage_before_a_layer_names(model: HookedTransformer) -> None:
    hooks = [stage_hook(stage_before(layer), 2) for layer in (0, 1)]
    assert hooks == ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]


@pytest.mark.parametrize("stage", stage_names(2))
def test_patching_the_clean_activation_reproduces_the_clean_logits(
    model: HookedTransformer, tokens: torch.Tensor, stage: str
) -> None:
    clean, cache = read_stages(model, tokens, stage)
    rows = torch.arange(3).repeat_interleave(10)
    places = torch.arange(10).repeat(3)
    own = cache[stage][rows, places]
    with patch(model, stage, (rows, places), lambda _: own):
        assert torch.equal(model(tokens), clean)
        assert torch.equal(model(tokens.flip(0)), clean)  # whatever came in
    with patch(model, stage, (rows, places), torch.zeros_like):
        assert not torch.allclose(model(tokens), clean, atol=1e-3)
    assert torch.equal(model(tokens), clean)  # the hook is gone


@pytest.mark.parametrize("stage", stage_names(2))
def test_running_on_from_a_stage_is_patching_it(
    model: HookedTransformer, tokens: torch.Tensor, stage: str
) -> None:
    clean, cache = read_stages(model, tokens, stage)
    assert torch.equal(run_from(model, stage, cache[stage]), clean)
    changed = cache[stage].clone()
    changed[1, 4] = changed[0, 2]
    with patch(model, stage, (torch.tensor([1]), torch.tensor([4])), lambda _: changed[1, 4][None]):
        patched = model(tokens)
    assert torch.equal(run_from(model, stage, changed), patched)
    assert torch.equal(patched[1, :4], clean[1, :4])  # causality
    assert not torch.allclose(patched[1, 4:], clean[1, 4:], atol=1e-3)
    assert torch.equal(model(tokens), clean)


def test_running_on_sees_what_is_ablated_downstream(
    model: HookedTransformer, tokens: torch.Tensor
) -> None:
    _, cache = read_stages(model, tokens, "layer_0_post_mlp")
    with ablate(model, "L1H0"):
        assert torch.equal(
            run_from(model, "layer_0_post_mlp", cache["layer_0_post_mlp"]), model(tokens)
        )


@pytest.mark.parametrize("fields", NEW_SHAPES.values(), ids=list(NEW_SHAPES))
def test_stages_of_every_shape_are_read_patched_and_run_on_from(
    tokens: torch.Tensor, shape: ModelConfig, fields: dict[str, Any]
) -> None:
    shape = ModelConfig.model_validate({**shape.model_dump(), **fields})
    model = build(shape, vocabulary_size=20, seed=1)
    names = stage_names(2, attention_only=shape.attention_only)
    logits, found = read_stages(model, tokens, *names)
    assert torch.equal(logits, model(tokens))
    last = found["layer_1_post_mlp"]
    assert torch.equal(found["final_norm"], model.ln_final(last) if shape_has_norm(shape) else last)
    for stage in names:
        assert torch.equal(run_from(model, stage, found[stage]), logits)
        changed = run_from(model, stage, found[stage] * 1.5)
        with patch(model, stage, at(tokens), lambda x: x * 1.5):
            assert torch.equal(model(tokens), changed)
        if stage in ("layer_1_post_mlp", "final_norm"):
            torch.testing.assert_close(lens(model, stage, found[stage]), logits)
    if shape.attention_only:
        assert names == ["embedding", "layer_0_post_mlp", "layer_1_post_mlp", "final_norm"]
        with pytest.raises(CircuitError, match="no MLPs, so no stage 'layer_0_post_attn'"):
            read_stages(model, tokens, "layer_0_post_attn")


def shape_has_norm(shape: ModelConfig) -> bool:
    return shape.normalization != "none"


def at(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every place."""
    rows, positions = torch.ones_like(tokens).nonzero(as_tuple=True)
    return rows, positions


def test_a_stage_that_does_not_exist_is_refused_with_the_list(model: HookedTransformer) -> None:
    with pytest.raises(CircuitError, match="unknown stage 'layer_2_post_mlp'; expected one of emb"):
        stage_hook("layer_2_post_mlp", 2)
    with pytest.raises(CircuitError, match="layer_1_post_mlp, final_norm"):
        run_from(model, "final", torch.zeros(1, 1, 16))
