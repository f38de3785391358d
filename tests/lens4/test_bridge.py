"""A bridge computes the transformer of the definitions, and its hook points see what they name."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from new_shapes import NEW_SHAPES
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

import circuit
from circuit.core.functional import function_of
from circuit.errors import CircuitError
from circuit.model.bridge import build_bridge
from circuit.model.layout import bridge_config, hooked_tensors, standard_bridge_tensors
from circuit.model.weights import named_tensors
from circuit.train_config import ModelConfig

VOCABULARY, LAYERS, HEADS = 11, 2, 3
SHAPES: dict[str, dict[str, Any]] = {"usual": {}, "untied": {"tied_unembedding": False}}
SHAPES |= NEW_SHAPES
every_shape = pytest.mark.parametrize("name", SHAPES)


def shape_of(name: str) -> ModelConfig:
    usual = {"layers": LAYERS, "heads": HEADS, "d_model": 12, "d_ff": 10, "max_sequence_length": 7}
    return ModelConfig(**{**usual, **SHAPES[name], "kind": "bridge"})


def model_of(name: str) -> TransformerBridge:
    model = build_bridge(shape_of(name), vocabulary_size=VOCABULARY, seed=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases and LayerNorms that do something
        for parameter in model.parameters():
            parameter += 0.1 * torch.rand(parameter.shape, generator=generator)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(2))


def by_the_book(
    weights: Mapping[str, Tensor], shape: ModelConfig, tokens: Tensor
) -> dict[str, Tensor]:
    """The transformer in row vectors, from a HookedTransformer's weights: hook point -> value."""
    zero = torch.zeros(())

    def norm(x: Tensor, at: str) -> Tensor:
        if shape.normalization == "none":
            return x
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{at}.w"] + weights.get(f"{at}.b", zero)

    seen = {}
    future = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    x = weights["embed.W_E"][tokens] + weights["pos_embed.W_pos"][: tokens.shape[1]]
    for block in (f"blocks.{layer}" for layer in range(LAYERS)):
        at, seen[f"{block}.hook_resid_pre"] = f"{block}.attn", x
        read = norm(x, f"{block}.ln1")
        q, k, v = (
            torch.einsum("bpd,hde->bhpe", read, weights[f"{at}.W_{one}"])
            + weights.get(f"{at}.b_{one}", zero.expand(HEADS, 1))[:, None]
            for one in "QKV"
        )
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        z = scores.softmax(-1) @ v
        seen |= {f"{at}.hook_attn_scores": scores, f"{at}.hook_pattern": scores.softmax(-1)}
        seen[f"{at}.hook_z"] = z.transpose(1, 2)
        written = torch.einsum("bhpe,hed->bpd", z, weights[f"{at}.W_O"])
        x = x + written + weights.get(f"{at}.b_O", zero)
        if not shape.attention_only:
            seen[f"{block}.hook_resid_mid"] = x
            act = functional.relu if shape.activation == "relu" else functional.gelu
            into = norm(x, f"{block}.ln2") @ weights[f"{block}.mlp.W_in"]
            post = act(into + weights.get(f"{block}.mlp.b_in", zero))
            x = x + post @ weights[f"{block}.mlp.W_out"] + weights.get(f"{block}.mlp.b_out", zero)
        seen[f"{block}.hook_resid_post"] = x
    last = norm(x, "ln_final")
    unembed = weights.get("unembed.W_U", weights["embed.W_E"].T)
    logits = last @ unembed + weights.get("unembed.b_U", zero)
    return seen | {"unembed.hook_in": last, "unembed.hook_out": logits}


@every_shape
def test_every_hook_point_sees_what_it_names(name: str, tokens: Tensor) -> None:
    model, shape = model_of(name), shape_of(name)
    logits, cache = model.run_with_cache(tokens)
    expected = by_the_book(hooked_tensors(named_tensors(model), shape), shape, tokens)
    assert torch.equal(logits, cache["unembed.hook_out"])
    for hook, value in expected.items():
        torch.testing.assert_close(cache[hook], value, rtol=1e-12, atol=1e-12, msg=hook)


@every_shape
def test_a_patch_reaches_all_that_reads_the_point(name: str, tokens: Tensor) -> None:
    model = model_of(name)
    drawn = torch.Generator().manual_seed(4)
    for layer in range(LAYERS):
        between = [] if shape_of(name).attention_only else [f"blocks.{layer}.hook_resid_mid"]
        for hook in (f"blocks.{layer}.hook_resid_pre", *between):
            value = torch.rand((3, 6, 12), generator=drawn, dtype=torch.float64)
            with model.hooks(fwd_hooks=[(hook, lambda _, hook, value=value: value)]):
                _, cache = model.run_with_cache(tokens)
            last = "mlp_out" if hook in between else "attn_out"
            total = value + cache[f"blocks.{layer}.hook_{last}"]
            if hook not in between and between:
                total = total + cache[f"blocks.{layer}.hook_mlp_out"]
            assert torch.equal(cache[f"blocks.{layer}.hook_resid_post"], total)
        scores = f"blocks.{layer}.attn.hook_attn_scores"
        with model.hooks(fwd_hooks=[(scores, lambda value, hook: torch.zeros_like(value))]):
            _, cache = model.run_with_cache(tokens)
        assert (cache[f"blocks.{layer}.attn.hook_pattern"] == 1 / 6).all()


@every_shape
def test_a_copy_and_a_call_with_other_weights_are_that_function(name: str, tokens: Tensor) -> None:
    model = model_of(name)
    before = model(tokens).detach()
    other = copy.deepcopy(model)
    moved = {key: tensor + 0.1 for key, tensor in named_tensors(model).items()}
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            parameter.copy_(moved[key])
    assert torch.equal(function_of(model)(moved, tokens), other(tokens))
    assert not torch.equal(other(tokens), before)
    assert torch.equal(model(tokens), before)


@every_shape
def test_short_names_are_the_parameters_themselves(name: str) -> None:
    model = copy.deepcopy(model_of(name)).to(torch.float32, print_details=False)
    hooked = hooked_tensors(named_tensors(model), shape_of(name))
    for key, tensor in hooked.items():
        *path, leaf = key.split(".")
        module: Any = model
        for part in path:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        assert torch.equal(getattr(model if path == ["embed"] else module, leaf), tensor)
    assert model.ln_final is not None
    if shape_of(name).normalization != "none":
        assert model.ln_final.b.dtype == torch.float32


def test_padding_on_the_left_is_masked_as_in_plain_transformer_lens(tokens: Tensor) -> None:
    model, shape = model_of("usual"), shape_of("usual")
    tensors = standard_bridge_tensors(named_tensors(model), shape)
    plain = TransformerBridge.boot_native(bridge_config(shape, VOCABULARY), dtype=torch.float64)
    plain.load_state_dict(tensors)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    ours, theirs = (one(tokens, attention_mask=mask) for one in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.equal(ours[0], model(tokens)[0])


def test_a_tied_gradient_is_the_sum_of_both_uses(tokens: Tensor) -> None:
    tied, untied = (
        model_of("usual"),
        build_bridge(shape_of("untied"), vocabulary_size=VOCABULARY, seed=3, dtype=torch.float64),
    )
    weights = dict(tied.named_parameters())
    with torch.no_grad():
        for key, parameter in untied.named_parameters():
            zero = torch.zeros_like(parameter)
            tied_too = weights["embed.weight"] if key == "unembed.weight" else zero
            parameter.copy_(weights.get(key, tied_too))
    for model in (tied, untied):
        model(tokens).square().sum().backward()
    both = dict(untied.named_parameters())
    total = both["embed.weight"].grad + both["unembed.weight"].grad
    torch.testing.assert_close(weights["embed.weight"].grad, total)


def test_a_bridge_of_ones_own_is_watched_head_by_head(tmp_path: Path, tokens: Tensor) -> None:
    model = TransformerBridge.boot_native(bridge_config(shape_of("usual"), VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    with circuit.watch(model, optimizer, tmp_path / "recording"):
        for _ in range(3):
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
            optimizer.step()
    run = circuit.open_run(tmp_path / "recording", module=model)

    def size(module: torch.nn.Module) -> Tensor:
        return module(tokens).square().mean()

    series = circuit.attribute(run, [size], 0, 3, dtype=torch.float64)["size"]
    assert {"L0H0.q", "L1H2.o", "L1.b_O", "L0.mlp", "norms"} <= series.groups["circuit"].keys()
    assert series.closure().path_absolute < 1e-3


def test_a_run_of_the_other_kind_is_refused_in_one_line(
    tmp_path: Path, tiny_folder: Path, train_payload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from circuit.config import parse_config
    from circuit.train_config import TrainConfig
    from circuit.training.loop import train

    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "data/tiny")
    payload = train_payload()
    del payload["model"]["kind"]
    with pytest.raises(CircuitError, match=r"HookedTransformer cannot be built.*pip install"):
        train(parse_config(payload, TrainConfig, where="old"))
