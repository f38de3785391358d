"""Every column of head progress against a loop over reads and heads that reads like its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.model.components import Component, all_heads
from circuit.model.dla import last_residual_hook
from circuit.model.readout import read_answers
from circuit.scalars.head_progress import (
    COLUMNS,
    REDUNDANT,
    ScoredReads,
    head_progress,
)
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import Examples
from circuit.tasks.pairs import build_pairs, pair_batch

SHAPE = {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32, "max_sequence_length": 40}
ROLES = [
    ("prediction", "support_value", "value_distractors"),
    ("prediction", "support_write", "key_distractors"),
    ("prediction", "key_distractors", "support_key"),  # supports of several sizes
    ("support_value", "support_key", "support_op"),
]


@pytest.fixture(scope="module")
def model(make_config: Callable[..., object], tiny: Benchmark) -> HookedTransformer:
    """Random, in float64; weights are scaled up so that attention is far from uniform."""
    config = make_config(model=SHAPE)
    built = build_model(
        config.model, vocabulary_size=len(tiny.vocabulary.tokens), seed=8, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.4 * noise
    return built


@pytest.fixture(scope="module")
def batch(tiny: Benchmark) -> Examples:
    pairs = build_pairs(
        tiny.task, tiny.splits["validation_iid"], types=["support_value"], max_per_type=7
    )
    return pair_batch(tiny.task, pairs.pairs, "clean")


def one_read(
    model: HookedTransformer,
    batch: Examples,
    read: int,
    head: Component,
    roles: tuple[str, str, str],
    cache: dict[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """The matches of a read, and its value vector at the support (mean over positions)."""
    query, support, distractors = (batch.role(role)[read].nonzero()[:, 0] for role in roles)
    row, attention = int(batch.row[read]), model.blocks[head.layer].attn
    stage = f"blocks.{head.layer}.hook_resid_pre"
    x = model.blocks[head.layer].ln1(cache[stage][row : row + 1])[0]
    q = x @ attention.W_Q[head.head] + attention.b_Q[head.head]
    k = x @ attention.W_K[head.head] + attention.b_K[head.head]
    v = x @ attention.W_V[head.head] + attention.b_V[head.head]

    def score(one: Tensor, other: Tensor) -> Tensor:
        return q[one] @ k[other] / 8**0.5

    at = int(batch.at[read])
    weights = torch.stack([score(torch.tensor(at), p) for p in torch.arange(at + 1)]).softmax(0)
    place = query[0]
    found = {
        "qk_separation": torch.stack([score(place, p) for p in support]).mean()
        - torch.stack([score(place, p) for p in distractors]).mean(),
        "attention_support": sum(weights[p] for p in support if p <= at),
        "attention_distractors": sum(weights[p] for p in distractors if p <= at),
    }
    return found | {"weights": weights, "v": v, "support": support}, v[support].mean(0)


def margin_of(logits: Tensor, answer: int, values: range) -> Tensor:
    return logits[answer] - max(logits[value] for value in values if value != answer)


@pytest.mark.parametrize("roles", ROLES)
def test_every_column_is_what_a_loop_over_reads_and_heads_computes(
    model: HookedTransformer, batch: Examples, tiny: Benchmark, roles: tuple[str, str, str]
) -> None:
    values = tiny.vocabulary.value_ids
    query_role, support_role, distractor_role = roles
    reads = ScoredReads.of(
        batch, query_role=query_role, support_role=support_role, distractor_role=distractor_role
    )
    found = head_progress(model, reads, all_heads(model), values)
    assert tuple(found.columns) == COLUMNS
    with torch.no_grad():
        logits, cache = model.run_with_cache(batch.tokens, return_cache_object=False)
    at = (batch.row, batch.at)
    torch.testing.assert_close(found.logits, logits[at], rtol=0, atol=1e-12)
    last = cache[last_residual_hook(2)][at]
    for number, head in enumerate(all_heads(model)):
        W_O = model.blocks[head.layer].attn.W_O[head.head]
        own = [one_read(model, batch, read, head, roles, cache) for read in range(len(batch))]
        for read, (match, v) in enumerate(own):
            answer, previous = int(batch.answer[read]), own[read - 1][1]
            exchanged = match["v"].clone()
            exchanged[match["support"]] = previous
            weights = match["weights"]
            outputs = {
                "": weights @ match["v"][: len(weights)] @ W_O,
                "swapped_value.": weights @ exchanged[: len(weights)] @ W_O,
                "support_attention.": v @ W_O,
                "support_attention_swapped_value.": previous @ W_O,
            }
            expected = {name: match[name] for name in COLUMNS[:3]}
            for prefix, output in outputs.items():
                own_logits = output @ model.W_U
                x = last[read].clone().requires_grad_()
                margin = margin_of(model.ln_final(x) @ model.W_U + model.b_U, answer, values)
                (gradient,) = torch.autograd.grad(margin, x)
                expected[f"{prefix}head_value_margin_dla"] = margin_of(own_logits, answer, values)
                expected[f"{prefix}head_answer_logit_dla"] = own_logits[answer]
                expected[f"{prefix}head_margin_dla"] = output @ gradient
            for prefix, vector in {"": v, "swapped_value.": previous}.items():
                ov_map = margin_of(vector @ W_O @ model.W_U, answer, values)
                expected[f"{prefix}ov_map_value_margin"] = ov_map
                expected[f"{prefix}attention_x_ov"] = ov_map * match["attention_support"]
                expected[f"{prefix}qk_x_ov"] = ov_map * match["qk_separation"]
            assert set(expected) == set(COLUMNS)
            for name, value in expected.items():
                got = found.columns[name][read, number]
                torch.testing.assert_close(got, value.detach(), msg=f"{name} {head} {read}")


def test_exchanged_values_are_what_an_intervention_on_the_value_vectors_gives(
    model: HookedTransformer, batch: Examples, tiny: Benchmark
) -> None:
    head, reads, values = Component(1, 1), ScoredReads.of(batch), tiny.vocabulary.value_ids
    found = head_progress(model, reads, [head], values)
    with torch.no_grad():
        _, cache = model.run_with_cache(batch.tokens, return_cache_object=False)
    v = cache["blocks.1.attn.hook_v"][batch.row, batch.facts["support_value_pos"], 1]
    for read in range(len(batch)):
        row, at = int(batch.row[read]), int(batch.at[read])
        place = int(batch.facts["support_value_pos"][read])

        def exchange(
            value: Tensor, hook: HookPoint, row: int = row, place: int = place, read: int = read
        ) -> Tensor:
            changed = value.clone()
            changed[row, place, 1] = v[read - 1]
            return changed

        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_v", exchange)]), torch.no_grad():
            _, after = model.run_with_cache(batch.tokens, return_cache_object=False)
        written = after["blocks.1.attn.hook_z"][row, at, 1] @ model.W_O[1, 1]
        own = read_answers(written @ model.W_U, batch.answer[read], values)
        column = found.columns["swapped_value.head_answer_logit_dla"]
        torch.testing.assert_close(column[read, 0], own.correct)


def test_weight_one_on_the_support_leaves_the_ov_map_alone(
    model: HookedTransformer, batch: Examples, tiny: Benchmark
) -> None:
    found = head_progress(
        model, ScoredReads.of(batch), all_heads(model), tiny.vocabulary.value_ids
    ).columns
    for redundant, column in zip(
        REDUNDANT, ("ov_map_value_margin", "swapped_value.ov_map_value_margin"), strict=True
    ):
        assert torch.equal(found[redundant], found[column])
    assert not torch.allclose(found["head_value_margin_dla"], found["ov_map_value_margin"])


def test_some_heads_in_any_order_are_columns_of_all(
    model: HookedTransformer, batch: Examples, tiny: Benchmark
) -> None:
    reads, values = ScoredReads.of(batch), tiny.vocabulary.value_ids
    everyone = head_progress(model, reads, all_heads(model), values)
    some = head_progress(model, reads, [Component(1, 0), Component(0, 1)], values)
    for name in COLUMNS:
        torch.testing.assert_close(some.columns[name], everyone.columns[name][:, [2, 1]])
    assert some.dla_residual < 1e-12


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"query_role": "support_write"}, "role 'support_write' has several positions"),
        ({"support_role": "nowhere"}, "unknown role 'nowhere'"),
        ({"query_role": "support_key"}, "'support_value' has positions behind the query"),
        ({"support_role": "causal_prefix"}, "'causal_prefix' and 'value_distractors' share"),
    ],
)
def test_roles_that_give_no_score_are_refused(
    batch: Examples, roles: dict[str, str], message: str
) -> None:
    with pytest.raises(CircuitError, match=message):
        ScoredReads.of(batch, **roles)


def test_a_read_without_a_distractor_and_a_single_read_are_refused(
    tiny: Benchmark, batch: Examples
) -> None:
    records = tiny.splits["validation_iid"][:2]
    whole = tiny.task.examples(records)
    with pytest.raises(CircuitError, match="at least 2, whose values can be exchanged"):
        ScoredReads.of(whole.select(torch.tensor([0])))
    first = whole.writes.index == -1  # a batch whose writes are gone has no distractors
    lonely = type(whole)(
        whole.tokens,
        whole.lengths,
        whole.reads,
        type(whole.writes)(**{n: t[first] for n, t in vars(whole.writes).items()}),
        whole.sample_ids,
    )
    with pytest.raises(CircuitError, match="a read has no position of role 'value_distractors'"):
        ScoredReads.of(lonely)
