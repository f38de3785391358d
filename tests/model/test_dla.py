"""Direct logit attribution adds up, and each part is what taking it away costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from new_shapes import NEW_SHAPES
from torch import Tensor

from circuit.errors import CircuitError
from circuit.model.dla import (
    attribute_logits,
    dla_hooks,
    head_outputs,
    last_residual_hook,
    margin_gradient,
    residual_parts,
)
from circuit.model.kinds import build, installed_kind
from circuit.model.readout import lens, read_answers
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.hook_points import HookPoint

VALUES = range(7, 17)
PARTS = (
    *("embed", "pos_embed", "L0H0", "L0H1", "L0.b_O", "L0MLP", "L1H0", "L1H1", "L1.b_O", "L1MLP"),
    *("ln_final.b", "b_U"),
)


def random_model(dtype: torch.dtype = torch.float64, **fields: Any) -> HookedTransformer:
    """A model in which every tensor matters: no bias is 0, no LayerNorm weight 1."""
    shape = {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32, "max_sequence_length": 12}
    config = ModelConfig.model_validate(shape | fields | {"kind": installed_kind()})
    model = build(config, vocabulary_size=17, seed=3, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith(("b_Q", "b_K", "b_V")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        model.unembed.b_U.copy_(torch.randn(17, generator=generator, dtype=dtype))
    return model


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return random_model()


TOKENS = torch.randint(0, 17, (3, 9), generator=torch.Generator().manual_seed(5))
PLACES = (torch.tensor([0, 0, 1, 2]), torch.tensor([2, 8, 0, 5]))


def run(model: HookedTransformer) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.run_with_cache(TOKENS, return_cache_object=False)[1]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_parts_sum_to_the_logits(dtype: torch.dtype, bound: float) -> None:
    model = random_model(dtype)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS, return_cache_object=False)
    logits, found = logits[PLACES], attribute_logits(model, cache, PLACES)
    assert found.parts == PARTS
    assert torch.equal(found.total, logits)
    assert found.residual < bound
    torch.testing.assert_close(found.logits.sum(1), logits, rtol=0, atol=1e2 * bound)


@pytest.mark.parametrize("fields", NEW_SHAPES.values(), ids=list(NEW_SHAPES))
def test_the_parts_of_every_shape_sum_to_the_logits(fields: dict[str, Any]) -> None:
    model = random_model(**fields)
    cache = run(model)
    few = {name: cache[name] for name in dla_hooks(model)}
    found = attribute_logits(model, few, PLACES)
    lacks = (["MLP"] if fields.get("d_ff") == 0 else []) + (
        ["ln_final"] if fields.get("normalization") == "none" else []
    )
    assert found.parts == tuple(p for p in PARTS if not any(word in p for word in lacks))
    assert found.residual < 1e-12
    residual, answer = cache[last_residual_hook(2)][PLACES], torch.tensor([7, 9, 11, 16])
    gradient = margin_gradient(model, residual, answer, VALUES)
    nudge = 1e-6 * torch.randn(residual.shape, generator=torch.Generator().manual_seed(1)).double()
    margins = [
        read_answers(lens(model, "layer_1_post_mlp", x), answer, VALUES).margin.detach()
        for x in (residual - nudge, residual + nudge)
    ]
    expected = 2 * (gradient * nudge).sum(-1)
    torch.testing.assert_close(margins[1] - margins[0], expected, rtol=1e-6, atol=1e-12)


def test_the_residual_says_how_far_the_parts_miss_the_logits(model: HookedTransformer) -> None:
    found = attribute_logits(model, run(model), PLACES)
    found.total[1, 3] += 0.5
    assert found.residual == pytest.approx(0.5 / float(found.total.abs().max()))


def test_an_attribution_needs_no_more_than_its_hook_points(model: HookedTransformer) -> None:
    everything = run(model)
    few = {name: everything[name] for name in dla_hooks(model)}
    assert torch.equal(
        attribute_logits(model, few, PLACES).logits,
        attribute_logits(model, everything, PLACES).logits,
    )


@pytest.mark.parametrize("part", PARTS[:-2])
def test_a_part_is_what_taking_it_away_costs_with_the_scale_frozen(
    model: HookedTransformer, part: str
) -> None:
    cache = run(model)
    names, vectors = residual_parts(model, cache, PLACES)
    scale = cache["ln_final.hook_scale"]

    def without(value: Tensor, hook: HookPoint) -> Tensor:
        changed = value.clone()
        changed[PLACES] -= vectors[:, names.index(part)]
        return changed

    def frozen(value: Tensor, hook: HookPoint) -> Tensor:
        return scale

    with torch.no_grad():
        left = model.run_with_hooks(
            TOKENS,
            fwd_hooks=[(last_residual_hook(2), without), ("ln_final.hook_scale", frozen)],
        )[PLACES]
    found = attribute_logits(model, cache, PLACES)
    torch.testing.assert_close(found.of(part), found.total - left)
    assert found.of(part).abs().max() > 1e-3  # a part of nothing would pass


def test_parts_are_components_as_transformer_lens_names_them(model: HookedTransformer) -> None:
    cache = run(model)
    names, vectors = residual_parts(model, cache, PLACES)
    part = dict(zip(names, vectors.unbind(1), strict=True))
    torch.testing.assert_close(vectors.sum(1), cache[last_residual_hook(2)][PLACES])
    assert torch.equal(part["embed"], model.W_E[TOKENS[PLACES]])
    assert torch.equal(part["pos_embed"], model.W_pos[PLACES[1]])
    for layer in range(2):
        attention = model.blocks[layer].attn
        written = torch.zeros(len(PLACES[0]), 16, dtype=torch.float64)
        for head in range(2):
            for place, (row, pos) in enumerate(zip(*PLACES, strict=True)):
                z = cache[f"blocks.{layer}.attn.hook_z"][row, pos, head]
                own = z @ attention.W_O[head]
                torch.testing.assert_close(part[f"L{layer}H{head}"][place], own)
                written[place] += own
        out = cache[f"blocks.{layer}.hook_attn_out"][PLACES]
        torch.testing.assert_close(written + part[f"L{layer}.b_O"], out)
        assert torch.equal(part[f"L{layer}MLP"], cache[f"blocks.{layer}.hook_mlp_out"][PLACES])


def test_head_outputs_of_any_places_are_head_by_head_products() -> None:
    generator = torch.Generator().manual_seed(6)
    z, W_O = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(4, 5, 6, generator=generator)
    found = head_outputs(z, W_O)
    for a in range(2):
        for b in range(3):
            for head in range(4):
                torch.testing.assert_close(found[a, b, head], z[a, b, head] @ W_O[head])


def test_an_unknown_part_is_refused_with_the_list(model: HookedTransformer) -> None:
    with pytest.raises(CircuitError, match=r"unknown part 'L2H0'; expected embed, .*L1MLP"):
        attribute_logits(model, run(model), PLACES).of("L2H0")


def test_the_margins_gradient_predicts_what_a_small_write_does(model: HookedTransformer) -> None:
    cache = run(model)
    answer = torch.tensor([7, 9, 16, 11])
    residual = cache[last_residual_hook(2)][PLACES]
    gradient = margin_gradient(model, residual, answer, VALUES)
    write = torch.randn(4, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def margin(size: float) -> Tensor:
        def add(value: Tensor, hook: HookPoint) -> Tensor:
            changed = value.clone()
            changed[PLACES] += size * write
            return changed

        with torch.no_grad():
            logits = model.run_with_hooks(TOKENS, fwd_hooks=[(last_residual_hook(2), add)])
        return read_answers(logits[PLACES], answer, VALUES).margin

    measured = (margin(1e-6) - margin(-1e-6)) / 2e-6
    torch.testing.assert_close((gradient * write).sum(1), measured, rtol=1e-6, atol=1e-8)
    assert model.W_E.grad is None


def test_a_margins_gradient_belongs_to_its_own_place(model: HookedTransformer) -> None:
    residual = run(model)[last_residual_hook(2)][PLACES]
    answer = torch.tensor([7, 9, 16, 11])
    together = margin_gradient(model, residual, answer, VALUES)
    for place in range(4):
        one = slice(place, place + 1)
        alone = margin_gradient(model, residual[one], answer[one], VALUES)
        torch.testing.assert_close(together[one], alone)
