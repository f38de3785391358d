"""The model against a plain re-implementation, its tied unembedding, its initialization."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from new_shapes import NEW_SHAPES
from scipy.stats import ks_2samp
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.model.weights import load_tensors, named_tensors
from circuit.train_config import ModelConfig

VOCABULARY = 19


def shape(layers: int = 2, heads: int = 2, width: int = 8, **others: object) -> ModelConfig:
    fields = {"layers": layers, "heads": heads, "d_model": heads * width, "d_ff": 24}
    return ModelConfig.model_validate({**fields, "max_sequence_length": 12, **others})


def random_model(config: ModelConfig, seed: int = 0) -> HookedTransformer:
    """Float64, every parameter random, so that no bias or LayerNorm weight is at rest."""
    model = build_model(config, vocabulary_size=VOCABULARY, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return model


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plain_forward(
    p: Mapping[str, Tensor], config: ModelConfig, tokens: Tensor, W_U: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits and the unembedding's input: learned positions, causal, and what the config says."""
    length = tokens.shape[1]

    def bias(name: str) -> Tensor:
        return p[name] if config.biases else torch.zeros((), dtype=torch.float64)

    def norm(x: Tensor, name: str) -> Tensor:
        if config.normalization == "none":
            return x
        return layer_norm(x, p[f"{name}.w"], bias(f"{name}.b"))

    activation = gelu if config.activation == "gelu" else partial(torch.clamp, min=0)
    x = p["embed.W_E"][tokens] + p["pos_embed.W_pos"][:length]
    future = torch.ones(length, length).triu(1).bool()
    for layer in range(config.layers):
        at = f"blocks.{layer}."
        normed = norm(x, f"{at}ln1")
        written = bias(f"{at}attn.b_O")
        for head in range(config.heads):
            q, k, v = (
                normed @ p[f"{at}attn.W_{part}"][head] + of_head(bias(f"{at}attn.b_{part}"), head)
                for part in "QKV"
            )
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            written = written + weights @ v @ p[f"{at}attn.W_O"][head]
        x = x + written
        if config.d_ff:
            normed = norm(x, f"{at}ln2")
            hidden = activation(normed @ p[f"{at}mlp.W_in"] + bias(f"{at}mlp.b_in"))
            x = x + hidden @ p[f"{at}mlp.W_out"] + bias(f"{at}mlp.b_out")
    final = norm(x, "ln_final")
    b_U = torch.zeros((), dtype=torch.float64) if config.tied_unembedding else bias("unembed.b_U")
    return final @ W_U + b_U, final


def of_head(bias: Tensor, head: int) -> Tensor:
    return bias[head] if bias.ndim else bias


def some_tokens(length: int, rows: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@settings(max_examples=12)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.integers(1, 6),
    length=st.integers(1, 12),
    seed=st.integers(0, 99),
    fields=st.sampled_from([{}, *NEW_SHAPES.values()]),
)
def test_the_model_is_the_plain_transformer(
    layers: int, heads: int, width: int, length: int, seed: int, fields: dict[str, Any]
) -> None:
    config = shape(layers, heads, width, **fields)
    model = random_model(config, seed)
    tokens = some_tokens(length)
    parameters = named_tensors(model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    W_U = parameters.get("unembed.W_U", parameters["embed.W_E"].T)
    expected, final = plain_forward(parameters, config, tokens, W_U)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(cache["unembed.hook_in"], final, rtol=0, atol=1e-10)


def test_the_final_hook_is_behind_the_weight_and_bias_of_the_last_norm() -> None:
    model = random_model(shape())
    with torch.no_grad():
        _, cache = model.run_with_cache(some_tokens(6))
    normalized, final = cache["ln_final.hook_normalized"], cache["unembed.hook_in"]
    rebuilt = normalized * model.ln_final.w + model.ln_final.b
    torch.testing.assert_close(final, rebuilt, rtol=0, atol=1e-12)
    assert not torch.allclose(final, normalized, atol=0.1)


def test_the_tied_gradient_is_the_sum_of_both_uses() -> None:
    config = shape()
    model = random_model(config)
    tokens = some_tokens(9)
    weights = torch.randn(3, 9, VOCABULARY, dtype=torch.float64, generator=torch.Generator())
    (model(tokens) * weights).sum().backward()
    leaves = {n: t.clone().requires_grad_() for n, t in named_tensors(model).items()}
    W_U = leaves["embed.W_E"].detach().T.clone().requires_grad_()
    (plain_forward(leaves, config, tokens, W_U)[0] * weights).sum().backward()
    for name, parameter in model.named_parameters():
        expected = leaves[name].grad
        assert expected is not None
        if name == "embed.W_E":
            assert W_U.grad is not None
            assert W_U.grad.abs().max() > 1
            assert expected.abs().max() > 0.01
            expected = expected + W_U.grad.T
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10)


def test_the_embedding_is_one_parameter_and_the_unembedding_answers() -> None:
    model = build_model(shape(), vocabulary_size=VOCABULARY, seed=0)
    names = [name for name, _ in model.named_parameters()]
    assert names.count("embed.W_E") == 1
    assert not [name for name in names if "unembed" in name]
    assert len({p.data_ptr() for p in model.parameters()}) == len(names)
    assert model.W_U.data_ptr() == model.embed.W_E.data_ptr()
    assert torch.equal(model.W_U, model.embed.W_E.T)
    assert model.b_U.shape == (VOCABULARY,)
    assert not model.b_U.any()
    assert not model.b_U.requires_grad
    with torch.no_grad():
        model.embed.W_E[3] = 5.0
    assert (model.unembed.W_U[:, 3] == 5.0).all()


def test_a_copy_is_tied_to_its_own_embedding() -> None:
    model = random_model(shape())
    clone = copy.deepcopy(model)
    assert clone.W_U.data_ptr() == clone.embed.W_E.data_ptr() != model.embed.W_E.data_ptr()
    before = model(some_tokens(5))
    with torch.no_grad():
        clone.embed.W_E.mul_(2)
    assert torch.equal(model(some_tokens(5)), before)
    assert torch.equal(clone.W_U, 2 * model.W_U)


def state_sizes(config: ModelConfig) -> int:
    d, hidden = config.d_model, config.d_ff
    layer = 4 * (d * d + d) + 2 * d * hidden + hidden + d + 4 * d
    return VOCABULARY * d + config.max_sequence_length * d + config.layers * layer + 2 * d


def test_the_number_of_parameters_is_that_of_the_architecture() -> None:
    for config in (shape(1, 1, 3), shape(3, 2, 5)):
        model = build_model(config, vocabulary_size=VOCABULARY, seed=0)
        assert sum(p.numel() for p in model.parameters()) == state_sizes(config)


@pytest.mark.parametrize("fields", NEW_SHAPES.values(), ids=list(NEW_SHAPES))
def test_what_a_config_leaves_out_is_no_parameter_and_still_answers(fields: dict[str, Any]) -> None:
    config = shape(**fields)
    model = build_model(config, vocabulary_size=VOCABULARY, seed=0)
    clone = copy.deepcopy(model)
    for one in (model, clone):
        names = [name for name, _ in one.named_parameters()]
        leaves = {name.rsplit(".", 1)[-1] for name in names}
        assert any(leaf[0] == "b" for leaf in leaves) == config.biases
        assert any(".mlp." in name or ".ln2." in name for name in names) == (config.d_ff > 0)
        assert any(".ln1." in name for name in names) == (config.normalization != "none")
        answers = {"b_Q": (2, 2, 8), "b_O": (2, 16), "b_U": (VOCABULARY,)}
        answers |= {"b_in": (2, 24), "b_out": (2, 16)} if config.d_ff else {}
        for name, size in answers.items():
            assert tuple(getattr(one, name).shape) == size
            assert config.biases or not getattr(one, name).any()
    total = (model(some_tokens(9)) ** 2).sum()
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_field_at_its_default_is_written_nowhere() -> None:
    usual = shape()
    for fields in NEW_SHAPES.values():
        unusual = shape(**fields)
        dumped = unusual.model_dump(mode="json")
        assert ModelConfig.model_validate(dumped) == unusual
        for name in ModelConfig.unless_usual:
            differs = getattr(unusual, name) != getattr(usual, name)
            assert (name in dumped) == differs
    assert set(ModelConfig.unless_usual).isdisjoint(usual.model_dump(mode="json"))


def test_an_activation_without_an_mlp_is_refused() -> None:
    with pytest.raises(ValueError, match="activation 'relu' has no MLP to stand in: d_ff is 0"):
        shape(d_ff=0, activation="relu")


def same_distribution(ours: Tensor, theirs: Tensor) -> bool:
    return bool(ks_2samp(ours.flatten().numpy(), theirs.flatten().numpy()).pvalue > 1e-3)


def test_initialization_is_torchs_own_for_embedding_and_linear() -> None:
    config = shape(2, 4, 16, d_ff=160)
    parameters = named_tensors(build_model(config, vocabulary_size=300, seed=3))
    torch.manual_seed(0)
    for name in ("embed.W_E", "pos_embed.W_pos"):
        assert same_distribution(parameters[name], nn.Embedding(300, 64).weight.detach())
    fan_ins = {"W_Q": 64, "W_K": 64, "W_V": 64, "W_O": 64, "W_in": 64, "W_out": 160}
    for leaf, fan_in in fan_ins.items():
        linear = nn.Linear(fan_in, 4000)
        bias_leaf = leaf.replace("W_", "b_")
        for wanted, theirs in ((leaf, linear.weight), (bias_leaf, linear.bias)):
            ours = torch.cat([t.flatten() for n, t in parameters.items() if n.endswith(wanted)])
            assert ours.abs().max() <= 1 / math.sqrt(fan_in)
            assert ours.abs().max() > 0.95 / math.sqrt(fan_in)
            assert same_distribution(ours, theirs.detach())
    for name, tensor in parameters.items():
        if ".ln" in name or name.startswith("ln"):
            assert (tensor == (1.0 if name.endswith(".w") else 0.0)).all()


def test_gpt2_initialization_is_narrow_with_biases_at_zero() -> None:
    config = shape(2, 4, 16, initialization="gpt2")
    for name, tensor in named_tensors(build_model(config, vocabulary_size=300, seed=3)).items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.startswith("W_"):
            assert abs(tensor.std() - 0.02) < 0.002
        else:
            assert (tensor == (1.0 if leaf == "w" else 0.0)).all()


def test_transformer_lens_initialization_is_what_a_hooked_transformer_draws_by_default() -> None:
    config = shape(2, 4, 16, d_ff=160, initialization="transformer_lens", tied_unembedding=False)
    ours = build_model(config, vocabulary_size=300, seed=3)
    torch.manual_seed(0)
    theirs = named_tensors(HookedTransformer(replace(ours.cfg, init_weights=True)))
    assert list(named_tensors(ours)) == list(theirs)
    for name, tensor in named_tensors(ours).items():
        if ".W_" in name:
            assert same_distribution(tensor, theirs[name])
            assert abs(tensor.std() * math.sqrt(64) / 0.8 - 1) < 0.05
        else:
            assert torch.equal(tensor, theirs[name])


@pytest.mark.parametrize("scheme", ["pytorch_default", "gpt2", "transformer_lens"])
def test_the_embeddings_scale_with_their_standard_deviation(scheme: str) -> None:
    own = {"pytorch_default": 1.0, "gpt2": 0.02, "transformer_lens": 0.8 / 4}[scheme]
    built = [
        named_tensors(
            build_model(
                shape(initialization=scheme, embedding_std=std), vocabulary_size=VOCABULARY, seed=4
            )
        )
        for std in (None, own, 2 * own)
    ]
    for name, tensor in built[0].items():
        assert torch.equal(tensor, built[1][name])
        factor = 2 if name in ("embed.W_E", "pos_embed.W_pos") else 1
        assert torch.equal(tensor * factor, built[2][name])


def test_initial_weights_are_a_function_of_the_seed() -> None:
    config = shape()
    torch.manual_seed(1)
    first = named_tensors(build_model(config, vocabulary_size=VOCABULARY, seed=4))
    torch.manual_seed(2)  # the global generator plays no part
    again = named_tensors(build_model(config, vocabulary_size=VOCABULARY, seed=4))
    other = named_tensors(build_model(config, vocabulary_size=VOCABULARY, seed=5))
    assert list(first) == list(again) == list(other)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        random = not name.startswith("ln") and ".ln" not in name
        assert torch.equal(tensor, other[name]) is not random


def test_building_a_model_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_model(shape(), vocabulary_size=VOCABULARY, seed=4)
    assert torch.equal(torch.rand(3), expected)


def test_weights_of_another_model_are_refused_by_name() -> None:
    model = build_model(shape(), vocabulary_size=VOCABULARY, seed=0)
    own = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    renamed = {name.replace("ln_final.w", "ln_last.w"): t for name, t in own.items()}
    wider = {**own, "embed.W_E": torch.zeros(VOCABULARY + 1, 16)}
    first, *rest = own
    reordered = {name: own[name] for name in (*rest, first)}
    for tensors, said in (
        (renamed, "ln_final.w"),
        ({n: t for n, t in own.items() if n != "embed.W_E"}, "embed.W_E"),
        (wider, r"embed\.W_E has shape \[20, 16\]; expected \[19, 16\]"),
        (reordered, "the order of the names"),
    ):
        with pytest.raises(CircuitError, match=said):
            load_tensors(model, tensors)
    other = build_model(shape(), vocabulary_size=VOCABULARY, seed=1)
    load_tensors(other, own)
    assert all(torch.equal(t, own[n]) for n, t in named_tensors(other).items())
