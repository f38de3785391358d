"""Fast kernels compute what TransformerLens wrote, and step aside for whoever looks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from new_shapes import NEW_SHAPES
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.components import LayerNorm
from transformer_lens.hook_points import HookPoint

from circuit.model import kernels
from circuit.model.build import build_model
from circuit.model.components import all_heads
from circuit.model.kernels import use_fast_kernels
from circuit.scalars.answer_scalar import AnswerScalar
from circuit.scalars.answers import ANSWER_SCALARS, MOVING
from circuit.scalars.base import Scalar, evaluate_scalar
from circuit.scalars.functional_write import TARGETS, FunctionalWrite, WritePath, WriteReads
from circuit.scalars.head_progress import ScoredReads, head_progress
from circuit.scalars.qk_match import LAYERNORM_MODES, QKMatch, ReadMasks
from circuit.scalars.routes import Route
from circuit.scalars.transfer import PairRuns, PairSides, route_bases, route_scores
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.pairs import build_pairs, pair_batch
from circuit.train_config import ModelConfig

VOCABULARY, CONTEXT = 19, 12
FAST = {kind.__name__ for kind, *_ in kernels._FAST.values()}


def scattered(model: HookedTransformer) -> HookedTransformer:
    """Every parameter random, so that no bias or LayerNorm weight is at rest."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.4 * noise + (parameter == 1))
    return model


def both_of(
    dtype: torch.dtype = torch.float64, **shape: Any
) -> tuple[HookedTransformer, HookedTransformer]:
    """The same weights with plain and with fast kernels; any of TransformerLens's shapes."""
    cfg = HookedTransformerConfig(
        **{"n_layers": 2, "n_heads": 2, "d_head": 4, "d_model": 8, "d_mlp": 24}
        | {"act_fn": "gelu", **shape},
        n_ctx=CONTEXT,
        d_vocab=VOCABULARY,
        device="cpu",
        dtype=dtype,
    )
    plain = scattered(HookedTransformer(cfg))
    fast = copy.deepcopy(plain)
    use_fast_kernels(fast)
    return plain, fast


def tokens_of(length: int = 9, rows: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(
    model: HookedTransformer, tokens: Tensor, hooks: Sequence[Any] = ()
) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks))
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        size = float(tensor.abs().max()) or 1.0
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-12 * max(size, 1.0))


@settings(max_examples=15)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.integers(1, 6),
    length=st.integers(1, CONTEXT),
    norm=st.sampled_from(["LN", None]),
    attention_only=st.booleans(),
    act_fn=st.sampled_from(["gelu", "relu"]),
)
def test_fast_equals_plain_in_float64(
    layers: int,
    heads: int,
    width: int,
    length: int,
    norm: str | None,
    attention_only: bool,
    act_fn: str,
) -> None:
    shape: dict[str, Any] = {"n_layers": layers, "n_heads": heads, "d_head": width}
    shape |= {"d_model": heads * width, "normalization_type": norm, "attn_only": attention_only}
    shape |= {"act_fn": act_fn}
    plain, fast = both_of(**shape)
    tokens = tokens_of(length)
    assert_close(logits_and_gradients(fast, tokens), logits_and_gradients(plain, tokens))


def test_every_replaceable_component_of_a_built_model_is_fast() -> None:
    fields = {"layers": 2, "heads": 2, "d_model": 8, "d_ff": 24, "max_sequence_length": CONTEXT}
    config = ModelConfig.model_validate(fields)
    fast = build_model(config, vocabulary_size=VOCABULARY, seed=1)
    plain = build_model(config, vocabulary_size=VOCABULARY, seed=1, kernels="plain")
    assert {type(m).__name__ for m in fast.modules()} >= FAST
    assert not {type(m).__name__ for m in plain.modules()} & FAST
    assert {type(m).__name__ for m in copy.deepcopy(fast).modules()} >= FAST
    assert list(fast.hook_dict) == list(plain.hook_dict)
    for (name, ours), (other, theirs) in zip(
        fast.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fields", NEW_SHAPES.values(), ids=list(NEW_SHAPES))
def test_every_shape_that_is_built_is_fast_and_equal(fields: dict[str, Any]) -> None:
    """Forward, backward, and, for integrals along lines, in forward mode."""
    shape = {"layers": 2, "heads": 2, "d_model": 8, "d_ff": 24, "max_sequence_length": CONTEXT}
    plain, fast = (
        scattered(
            build_model(
                ModelConfig.model_validate(shape | fields),
                vocabulary_size=VOCABULARY,
                seed=1,
                dtype=torch.float64,
                kernels=kind,
            )
        )
        for kind in ("plain", "fast")
    )
    assert {type(m).__name__ for m in fast.modules()} & FAST >= {"FastAttention", "FastBlock"}
    tokens = tokens_of()
    assert_close(logits_and_gradients(fast, tokens), logits_and_gradients(plain, tokens))
    assert torch.equal(fast.run_with_cache(tokens)[0], plain.run_with_cache(tokens)[0])


def test_with_everything_hooked_it_is_the_plain_model_bit_for_bit() -> None:
    plain, fast = both_of(torch.float32)
    seen: list[dict[str, Tensor]] = []
    for model in (plain, fast):
        _, cache = model.run_with_cache(tokens_of(), return_cache_object=False)
        seen.append({name: value.detach() for name, value in cache.items()})
    assert list(seen[0]) == list(seen[1])
    assert all(torch.equal(seen[1][name], value) for name, value in seen[0].items())


def test_every_hook_point_is_called_as_often_and_sees_the_same() -> None:
    plain, fast = both_of()
    for name in plain.hook_dict:
        seen: list[list[Tensor]] = [[], []]

        def keep(value: Tensor, hook: HookPoint, into: list[Tensor]) -> None:
            into.append(value.detach())

        for model, into in zip((plain, fast), seen, strict=True):
            model.run_with_hooks(
                tokens_of(), fwd_hooks=[(name, lambda v, hook, into=into: keep(v, hook, into))]
            )
        assert len(seen[0]) == len(seen[1])
        for ours, theirs in zip(*seen, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


SKIPPED = {
    "attn": ("hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern"),
    "ln1": ("hook_scale", "hook_normalized"),
}


@pytest.mark.parametrize(("component", "point"), [(c, p) for c in SKIPPED for p in SKIPPED[c]])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_hook_at_a_skipped_point_brings_back_the_plain_component(
    component: str, point: str, direction: Any
) -> None:
    x = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(2))
    results = []
    for model in both_of(torch.float32):
        part = getattr(model.blocks[1], component)
        getattr(part, point).add_hook(lambda value, hook: None, dir=direction)
        leaf = x.clone().requires_grad_()
        made = part(leaf, leaf, leaf) if component == "attn" else part(leaf)
        made.backward(torch.ones_like(made))
        results.append((made.detach(), leaf.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_hook_may_change_what_it_sees() -> None:
    plain, fast = both_of()
    for point in ("attn.hook_pattern", "attn.hook_z", "ln2.hook_normalized", "hook_mlp_out"):
        hooks = [(f"blocks.0.{point}", lambda value, hook: value * 0.5)]
        changed = logits_and_gradients(fast, tokens_of(), hooks)
        assert_close(changed, logits_and_gradients(plain, tokens_of(), hooks))
        assert not torch.equal(changed["logits"], fast(tokens_of()))


@pytest.mark.parametrize(
    "switch",
    ["set_use_attn_result", "set_use_split_qkv_input", "set_use_attn_in", "set_use_hook_mlp_in"],
)
def test_switches_of_transformer_lens_are_obeyed(switch: str) -> None:
    plain, fast = both_of()
    seen = []
    for model in (plain, fast):
        getattr(model, switch)(True)
        seen.append(model.run_with_cache(tokens_of(), return_cache_object=False)[1])
    assert list(seen[0]) == list(seen[1])
    for name, theirs in seen[0].items():
        torch.testing.assert_close(seen[1][name], theirs, rtol=0, atol=1e-12)


def test_a_cache_of_keys_and_values_is_used_as_written() -> None:
    tokens, made = tokens_of(), []
    for model in both_of(torch.float32):
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
        made.append(
            [
                model(part, past_kv_cache=cache, attention_mask=torch.ones_like(part))
                for part in (tokens[:, :4], tokens[:, 4:7])
            ]
        )
    for plain, fast in zip(*made, strict=True):
        torch.testing.assert_close(fast, plain)
    whole = model(tokens[:, :7])
    torch.testing.assert_close(torch.cat(made[1], 1), whole)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_and_second_derivatives_exist_and_agree_with_the_plain_ones() -> None:
    plain, fast = both_of()
    tokens = tokens_of()
    generator = torch.Generator().manual_seed(5)
    directions = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in plain.named_parameters()
    }
    tangents, products = [], []
    for model in (plain, fast):
        with forward_ad.dual_level():
            dual = {
                name: forward_ad.make_dual(p.detach(), directions[name])
                for name, p in model.named_parameters()
            }
            out = functional_call(model, dual, (tokens,))
            tangents.append(forward_ad.unpack_dual(out).tangent.clone())
        parameters = list(model.parameters())
        loss = model(tokens).pow(2).mean()
        first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        along = sum((g * d).sum() for g, d in zip(first, directions.values(), strict=True))
        second = torch.autograd.grad(along, parameters, materialize_grads=True)
        products.append({str(i): tensor for i, tensor in enumerate(second)})
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-10)
    for name, theirs in products[0].items():
        torch.testing.assert_close(products[1][name], theirs, rtol=1e-9, atol=1e-10)


def test_a_component_that_transformer_lens_changes_runs_as_it_is_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, _ = both_of()
    changed = {**kernels._FAST, LayerNorm: (*kernels._FAST[LayerNorm][:2], "another source")}
    monkeypatch.setattr(kernels, "_FAST", changed)
    kernels._is_known.cache_clear()
    with pytest.warns(UserWarning, match="changed LayerNorm, or hides it: it runs as written"):
        use_fast_kernels(plain)
    assert type(plain.ln_final) is LayerNorm
    assert type(plain.blocks[0]).__name__ == "FastBlock"
    kernels._is_known.cache_clear()


SHAPE = ModelConfig(layers=2, heads=2, d_model=16, d_ff=32, max_sequence_length=40)


def families(tiny: Benchmark, shape: ModelConfig = SHAPE) -> list[Scalar]:
    """Members of every family of scalars that attribution can follow."""
    batch = tiny.task.examples(tiny.records("validation_iid")[:6])
    reads, values = ReadMasks.of(batch), tiny.vocabulary.value_ids
    found: list[Scalar] = [
        QKMatch("L1H0", reads, layers=2, rank=rank, layernorm_mode=mode, biases=biases)
        for rank, biases in ((4, False), (None, False), (None, True))
        for mode in LAYERNORM_MODES
    ]
    competitors = torch.full_like(batch.answer, values[0])
    found += [
        AnswerScalar(name, batch, competitors, values=values)
        for name in ANSWER_SCALARS
        if name != MOVING
    ]
    if shape.attention_only:
        return found
    writes = WriteReads.of(batch, "prediction")
    size = (*writes.positions.shape, SHAPE.d_model)
    reference = torch.randn(size, generator=torch.Generator().manual_seed(4))
    path = WritePath.parse("L0H1", "L1MLP")
    return found + [
        FunctionalWrite(path, writes, reference, layers=2, target=target) for target in TARGETS
    ]


def built(
    tiny: Benchmark, shape: ModelConfig = SHAPE
) -> tuple[HookedTransformer, HookedTransformer]:
    """The study's model with plain and with fast kernels, in float64."""
    plain, fast = (
        scattered(
            build_model(
                shape,
                vocabulary_size=tiny.vocabulary.size,
                seed=8,
                dtype=torch.float64,
                kernels=kind,
            )
        )
        for kind in ("plain", "fast")
    )
    return plain, fast


@pytest.mark.parametrize("name", [None, "grokking", "attention alone"])
def test_every_scalar_family_has_equal_values_and_gradients(
    tiny: Benchmark, name: str | None
) -> None:
    fields = NEW_SHAPES[name] if name else {}
    shape = ModelConfig.model_validate(SHAPE.model_dump() | fields)
    plain, fast = built(tiny, shape)
    for scalar in families(tiny, shape):
        made = []
        for model in (plain, fast):
            values = evaluate_scalar(scalar, model)
            gradients = torch.autograd.grad(
                values.mean(), list(model.parameters()), materialize_grads=True
            )
            names = [name for name, _ in model.named_parameters()]
            made.append({"values": values.detach(), **dict(zip(names, gradients, strict=True))})
        assert_close(made[1], made[0])


def test_routes_and_head_progress_are_equal(tiny: Benchmark) -> None:
    records = tiny.records("validation_iid")
    pairs = build_pairs(tiny.task, records, max_per_type=4).pairs
    clean, corrupted = (pair_batch(tiny.task, pairs, side) for side in ("clean", "corrupted"))
    sides = PairSides.of(pairs, clean, corrupted)
    routes = (
        Route("all", "final_norm", "prediction"),
        Route("value", "layer_0_post_attn", "support_value", "embedding_value_identity", 5),
    )
    values = tiny.vocabulary.value_ids
    made = []
    for model in built(tiny):
        runs, bases = PairRuns.of(model, sides, routes), route_bases(model, routes, tiny.vocabulary)
        scores = route_scores(model, sides, runs, routes, bases)
        progress = head_progress(model, ScoredReads.of(clean), all_heads(model), values)
        made.append({"scores": scores.detach(), "logits": progress.logits, **progress.columns})
    assert_close(made[1], made[0])
