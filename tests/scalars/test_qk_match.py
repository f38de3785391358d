"""QK match against a loop that reads like its definition, and the batch that scalars share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.model.components import ablate, parse_component
from circuit.model.stages import stage_before
from circuit.model.subspaces import svd_of_product
from circuit.scalars.base import Cache, Needs, SharedBatch, evaluate_scalar
from circuit.scalars.qk_match import QKMatch, ReadMasks, qk_matches
from circuit.tasks.base import Record
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import Examples
from circuit.tasks.symbolic_kv.stream import program_of
from circuit.train_config import TrainConfig

SHAPE = {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32, "max_sequence_length": 40}


@pytest.fixture(scope="module")
def model(make_config: Callable[..., TrainConfig], tiny: Benchmark) -> HookedTransformer:
    """Random, in float64, far from its initialization, biases and all."""
    config = make_config(model=SHAPE)
    built = build_model(
        config.model, vocabulary_size=tiny.vocabulary.size, seed=8, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).double()
    return built


@pytest.fixture(scope="module")
def records(tiny: Benchmark) -> list[Record]:
    return tiny.records("validation_iid")[:9]


@pytest.fixture(scope="module")
def batch(tiny: Benchmark, records: list[Record]) -> Examples:
    return tiny.task.examples(records)


@pytest.fixture(scope="module")
def reads(batch: Examples) -> ReadMasks:
    return ReadMasks.of(batch)


def loop(
    model: HookedTransformer,
    tiny: Benchmark,
    records: list[Record],
    head: str,
    rank: int | None,
    *,
    raw: bool = False,
    stage: str | None = None,
) -> list[float]:
    """One record, one read, one position at a time; positions are the program's own."""
    at = parse_component(head)
    layer = model.blocks[at.layer]
    product = layer.attn.W_Q[at.head] @ layer.attn.W_K[at.head].T
    if rank is not None:
        u, _, vh = torch.linalg.svd(product)
        left, right = u[:, :rank], vh[:rank].T
        product = left @ left.T @ product @ right @ right.T
    hooks = {"layer_0_post_attn": "blocks.0.hook_resid_mid"}
    hooks |= {
        "embedding": "blocks.0.hook_resid_pre",
        "layer_0_post_mlp": "blocks.0.hook_resid_post",
    }
    found = []
    for record in records:
        _, cache = model.run_with_cache(torch.tensor([record.tokens]))
        x = cache[hooks[stage or stage_before(at.layer)]][0]
        x = x if raw else layer.ln1(x[None])[0]
        program = program_of(record, tiny.vocabulary)
        for read in program.reads:

            def score(position: int, query: Tensor = x[read.key_pos], keys: Tensor = x) -> float:
                return float(query @ product @ keys[position]) / math.sqrt(model.cfg.d_head)

            others = [w for w in program.writes[: read.writes_before] if w != read.support]
            far = fmean(score(write.value_pos) for write in others)
            found.append(score(read.support.value_pos) - far)
    return found


@torch.no_grad()
@pytest.mark.parametrize("head", ["L0H1", "L1H0"])
@pytest.mark.parametrize("rank", [1, 3, 8, None])
def test_the_match_is_the_loops(
    model: HookedTransformer,
    tiny: Benchmark,
    records: list[Record],
    reads: ReadMasks,
    head: str,
    rank: int | None,
) -> None:
    expected = torch.tensor(loop(model, tiny, records, head, rank))
    assert expected.std() > 0.1
    found = evaluate_scalar(QKMatch(head, reads, layers=2, rank=rank), model)
    torch.testing.assert_close(found, expected.double(), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_stage_may_be_raw_or_another(
    model: HookedTransformer, tiny: Benchmark, records: list[Record], reads: ReadMasks
) -> None:
    for raw, stage in ((True, None), (False, "layer_0_post_attn"), (True, "embedding")):
        expected = loop(model, tiny, records, "L1H1", 4, raw=raw, stage=stage)
        scalar = QKMatch(
            "L1H1",
            reads,
            layers=2,
            rank=4,
            layernorm_mode="none" if raw else "head_ln1",
            context_stage=stage,
        )
        assert evaluate_scalar(scalar, model).tolist() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("head", ["L0H0", "L1H1"])
def test_with_biases_it_is_the_difference_of_the_heads_real_scores(
    model: HookedTransformer, tiny: Benchmark, records: list[Record], reads: ReadMasks, head: str
) -> None:
    at = parse_component(head)
    expected = []
    for record in records:
        _, cache = model.run_with_cache(torch.tensor([record.tokens]))
        scores = cache[f"blocks.{at.layer}.attn.hook_attn_scores"][0, at.head]
        program = program_of(record, tiny.vocabulary)
        for read in program.reads:
            others = [w for w in program.writes[: read.writes_before] if w != read.support]
            far = fmean(float(scores[read.key_pos, w.value_pos]) for w in others)
            expected.append(float(scores[read.key_pos, read.support.value_pos]) - far)
    plain, real = qk_matches([head], reads, layers=2, ranks=[None])
    assert evaluate_scalar(real, model).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert evaluate_scalar(plain, model).tolist() != pytest.approx(expected, rel=1e-3)
    assert real.name == f"qk_match.{head}.full_with_biases"


@torch.no_grad()
def test_the_full_rank_is_the_whole_matrix(model: HookedTransformer, reads: ReadMasks) -> None:
    ranked, whole, _ = qk_matches(["L1H0"], reads, layers=2, ranks=[8, None])
    torch.testing.assert_close(evaluate_scalar(ranked, model), evaluate_scalar(whole, model))


def test_svd_by_qr_spans_what_the_dense_svd_spans() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 12, 4), torch.randn(3, 4, 9)
    u, s, v = svd_of_product(left, right)
    dense = torch.linalg.svd(left.double() @ right.double(), full_matrices=False)
    torch.testing.assert_close(s, dense.S[:, :4])
    for rank in range(1, 5):
        for found, expected in ((u, dense.U), (v, dense.Vh.mT)):
            ours, theirs = found[..., :rank], expected[..., :rank]
            torch.testing.assert_close(ours @ ours.mT, theirs @ theirs.mT)


@torch.no_grad()
def test_a_basis_is_taken_anew_or_once(model: HookedTransformer, reads: ReadMasks) -> None:
    fixed = QKMatch("L0H0", reads, layers=2, rank=2, basis=model)
    anew = QKMatch("L0H0", reads, layers=2, rank=2)
    weights = model.blocks[0].attn.W_Q
    before = weights.clone()
    assert torch.equal(evaluate_scalar(fixed, model), evaluate_scalar(anew, model))
    assert (fixed.bind(model).constant, anew.bind(model).constant) == (True, False)
    bound = anew.bind(model)
    try:
        weights[0] += torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).double()
        shared = SharedBatch.merge([anew])
        cache = Cache(shared.run(model))
        moved = fixed.bind(model).values(model, cache)
        assert torch.equal(bound.values(model, cache), moved)  # bound before, so the same basis
        assert not torch.allclose(anew.bind(model).values(model, cache), moved)
    finally:
        weights.copy_(before)


def test_the_reads_of_each_lag_are_all_reads(
    model: HookedTransformer, batch: Examples, reads: ReadMasks
) -> None:
    lags = batch.facts["lag"][reads.chosen]
    assert set(lags.tolist()) == {1, 2}
    with torch.no_grad():
        whole = evaluate_scalar(QKMatch("L1H0", reads, layers=2), model)
        for lag in (1, 2):
            some = reads.where(lags == lag)
            assert len(some) == int((lags == lag).sum())
            assert torch.equal(batch.facts["lag"][some.chosen], lags[lags == lag])
            scalar = QKMatch("L1H0", some, layers=2, suffix=f".lag{lag}")
            found = evaluate_scalar(scalar, model)
            torch.testing.assert_close(found, whole[lags == lag], rtol=0, atol=1e-12)
            assert scalar.name == f"qk_match.L1H0.full.lag{lag}"


def test_reads_without_a_distractor_are_left_out(tiny: Benchmark, records: list[Record]) -> None:
    vocab = tiny.vocabulary
    write = (vocab.write, vocab.key_id(0), vocab.value_id(3))
    alone = (vocab.bos, *write, vocab.read, *write[1:], vocab.eos)
    short = Record("alone", "validation_iid", alone)
    mixed = tiny.task.examples([short, *records[:2]])
    found = ReadMasks.of(mixed)
    assert found.chosen.tolist() == [False] + [True] * (len(mixed) - 1)
    assert len(found) == len(mixed) - 1
    assert 0 not in found.row.tolist()
    again = found.where(torch.arange(len(found)) > 0)
    assert again.chosen.tolist() == [False, False] + [True] * (len(found) - 1)
    with pytest.raises(CircuitError, match="no read has positions of role 'value_distractors'"):
        ReadMasks.of(tiny.task.examples([short]))


def test_a_query_is_one_position(batch: Examples) -> None:
    with pytest.raises(CircuitError, match="role 'support_write' has several positions"):
        ReadMasks.of(batch, query_role="support_write")
    with pytest.raises(CircuitError, match="unknown role 'nowhere'"):
        ReadMasks.of(batch, support_role="nowhere")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"query_role": "support_key"}, "'support_value' has positions behind the query"),
        (
            {"query_role": "support_op", "support_role": "support_op"},
            "'value_distractors' has positions behind the query 'support_op'",
        ),
        (
            {"distractor_role": "causal_prefix"},
            "roles 'support_value' and 'causal_prefix' share positions",
        ),
    ],
)
def test_a_query_is_compared_with_what_it_sees_and_nothing_twice(
    batch: Examples, roles: dict[str, str], message: str
) -> None:
    with pytest.raises(CircuitError, match=message):
        ReadMasks.of(batch, **roles)


@dataclass(frozen=True)
class Weights:
    """A scalar of the weights alone."""

    needs: Needs
    name: str = "weights"
    constant: bool = True

    def bind(self, model: HookedTransformer) -> Weights:
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        return model.W_E.pow(2).sum()[None]


@torch.no_grad()
def test_sharing_changes_no_value(
    model: HookedTransformer, tiny: Benchmark, records: list[Record]
) -> None:
    """Whoever shares the pass: longer and shorter records, some twice, none."""
    by_length = sorted(records, key=lambda record: len(record.tokens))
    assert len(by_length[0].tokens) < len(by_length[-1].tokens)
    scalars = []
    for some in (by_length[:2], by_length[-2:], by_length[1:3] + by_length[-2:-1]):
        masks = ReadMasks.of(tiny.task.examples(some))
        scalars += qk_matches(["L0H1", "L1H1"], masks, layers=2, ranks=[2, None])
    needless = Weights(Needs((), ()))
    together = SharedBatch.merge([*scalars, needless])
    assert together.tokens.shape[0] == 5  # each distinct sequence once
    lengths = (together.tokens != tiny.vocabulary.pad).sum(1).tolist()
    assert sorted(lengths) == sorted(len(r.tokens) for r in {*by_length[:3], *by_length[-2:]})
    *means, weights = together.means(model, [s.bind(model) for s in [*scalars, needless]])
    for scalar, mean in zip(scalars, means, strict=True):
        alone = evaluate_scalar(scalar, model).mean()
        torch.testing.assert_close(mean, alone, atol=1e-12, rtol=1e-12)
    assert float(weights) == float(model.W_E.pow(2).sum())
    assert float(evaluate_scalar(needless, model)) == float(weights)


@torch.no_grad()
def test_each_needed_layer_runs_once(model: HookedTransformer, reads: ReadMasks) -> None:
    ran: Counter[str] = Counter()

    def count(value: Tensor, hook: HookPoint) -> None:
        ran[str(hook.name)] += len(value)

    watched = [f"blocks.{layer}.hook_resid_post" for layer in range(2)] + ["unembed.hook_out"]
    rows = len(reads.sequences)
    for heads, expected in (
        (["L0H0", "L0H1", "L1H0", "L1H1"], {watched[0]: rows}),  # the last read is layer 0's end
        (["L0H0"], {watched[0]: rows}),
    ):
        ran.clear()
        scalars = qk_matches(heads, reads, layers=2, ranks=[1, 2, None])
        with model.hooks(fwd_hooks=[(name, count) for name in watched]):
            SharedBatch.merge(scalars).means(model, [s.bind(model) for s in scalars])
        assert ran == expected
    ran.clear()
    late = QKMatch("L1H0", reads, layers=2, context_stage="final_norm")
    with model.hooks(fwd_hooks=[(name, count) for name in watched]):
        evaluate_scalar(late, model)
    assert ran == dict.fromkeys(watched, rows)


@torch.no_grad()
@pytest.mark.parametrize("component", ["L0H1", "L1H0", "L0MLP", "L1MLP"])
def test_an_ablated_run_is_the_ablated_models(
    model: HookedTransformer, reads: ReadMasks, component: str
) -> None:
    hooks = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post")

    shared = SharedBatch.merge([Weights(Needs(reads.sequences, hooks, (component,)))])
    found = Cache(shared.run(model))
    _, plain = model.run_with_cache(shared.tokens, names_filter=list(hooks))
    with ablate(model, component):
        _, ablated = model.run_with_cache(shared.tokens, names_filter=list(hooks))
    for hook in hooks:
        assert torch.equal(found[hook], plain[hook])
        assert torch.equal(found.without(component)[hook], ablated[hook])
    assert not torch.equal(plain[hooks[-1]], ablated[hooks[-1]])
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_what_is_no_match_is_refused(reads: ReadMasks, model: HookedTransformer) -> None:
    with pytest.raises(CircuitError, match="biases belong to the whole matrix"):
        QKMatch("L0H0", reads, layers=2, rank=2, biases=True)
    with pytest.raises(CircuitError, match="unknown layernorm mode 'ln2'"):
        QKMatch("L0H0", reads, layers=2, layernorm_mode="ln2")  # type: ignore[arg-type]
    with pytest.raises(CircuitError, match="unknown stage 'layer_2_post_mlp'"):
        QKMatch("L0H0", reads, layers=2, context_stage="layer_2_post_mlp")
    with pytest.raises(CircuitError, match="rank 9 of L0H0; expected 1 to 8"):
        QKMatch("L0H0", reads, layers=2, rank=9, basis=model)
