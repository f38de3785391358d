"""Route scores: what is patched is what is named, and the whole transfers completely."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformer_lens import HookedTransformer

from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.model.components import Component
from circuit.model.stages import patch, stage_hook, stage_names
from circuit.model.subspaces import Basis
from circuit.scalars.routes import Route, check_labels, check_routes, parse_route, read_route
from circuit.scalars.transfer import (
    PairRuns,
    PairSides,
    contrast_margin,
    route_bases,
    route_scores,
)
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.pairs import Pair, build_pairs, pair_batch
from circuit.train_config import ModelConfig

SHAPE = ModelConfig(layers=2, heads=2, d_model=16, d_ff=32, max_sequence_length=40)
ROUTES = (
    Route("all", "final_norm", "prediction"),
    Route("value", "embedding", "support_value", "embedding_value_identity", 5),
    Route("query", "layer_0_post_mlp", "query_key", "head_qk_query", 3, Component(1, 1)),
    Route("key", "layer_0_post_mlp", "support_key", "head_qk_key", 2, Component(1, 0)),
    Route("read", "layer_0_post_attn", "support_write", "head_ov_input", 4, Component(1, 1)),
    Route("write", "layer_1_post_attn", "prediction", "head_ov_output", 8, Component(1, 0)),
    Route("others", "layer_0_post_mlp", "value_distractors"),
)


@pytest.fixture(scope="module")
def model(tiny: Benchmark) -> HookedTransformer:
    return build_model(SHAPE, vocabulary_size=len(tiny.vocabulary.tokens), seed=3)


@pytest.fixture(scope="module")
def pairs(tiny: Benchmark) -> list[Pair]:
    records = tiny.records("validation_iid")
    found = build_pairs(tiny.task, records, max_per_type=6)
    assert {pair.type for pair in found.pairs} == tiny.task.pair_types.keys()
    return list(found.pairs)


def both_sides(tiny: Benchmark, pairs: Sequence[Pair]) -> PairSides:
    clean, corrupted = (pair_batch(tiny.task, pairs, side) for side in ("clean", "corrupted"))
    return PairSides.of(pairs, clean, corrupted)


def scores_of(
    model: HookedTransformer, tiny: Benchmark, sides: PairSides, routes: Sequence[Route]
) -> torch.Tensor:
    bases = route_bases(model, routes, tiny.task.token_sets)
    return route_scores(model, sides, PairRuns.of(model, sides, routes), routes, bases)


def gaps(model: HookedTransformer, sides: PairSides) -> torch.Tensor:
    runs = PairRuns.of(model, sides, [])
    return contrast_margin(runs.clean_logits, sides.transfer) - contrast_margin(
        runs.corrupted_logits, sides.transfer
    )


@pytest.mark.parametrize("stage", stage_names(2))
def test_the_whole_of_any_stage_transfers_the_contrast_margin_completely(
    model: HookedTransformer, tiny: Benchmark, pairs: list[Pair], stage: str
) -> None:
    sides = both_sides(tiny, pairs)
    routes = [Route("prefix", stage, "causal_prefix"), Route("op", stage, "support_op")]
    whole, part = scores_of(model, tiny, sides, routes)
    gap = gaps(model, sides)
    assert gap.abs().max() > 1
    assert torch.allclose(whole, gap, atol=1e-4)
    assert not torch.allclose(part, gap, atol=1e-1)


def test_the_prediction_alone_is_everything_at_the_last_stages_only(
    model: HookedTransformer, tiny: Benchmark, pairs: list[Pair]
) -> None:
    sides = both_sides(tiny, pairs)
    stages = ("final_norm", "layer_1_post_mlp", "layer_1_post_attn", "layer_0_post_mlp")
    routes = [Route(stage, stage, "prediction") for stage in stages]
    *last, before = scores_of(model, tiny, sides, routes)
    for whole in last:
        assert torch.allclose(whole, gaps(model, sides), atol=1e-4)
    assert not torch.allclose(before, gaps(model, sides), atol=1e-1)


def one_by_one(
    model: HookedTransformer, tiny: Benchmark, pair: Pair, route: Route, basis: Basis | None
) -> float:
    """The score of one pair by the definition: whole forward passes of single records."""
    alone = {side: pair_batch(tiny.task, [pair], side) for side in ("clean", "corrupted")}
    at = {
        side: batch.role(route.position_role)[0].nonzero()[:, 0].tolist()
        for side, batch in alone.items()
    }
    a, b = pair.transfer_tokens
    corrupted = torch.tensor([list(pair.corrupted.tokens)])
    _, cache = model.run_with_cache(torch.tensor([list(pair.clean.tokens)]))
    clean = cache[stage_hook(route.stage, 2)][0]
    key = int(alone["corrupted"].at[0])
    before = model(corrupted)[0, key]

    def change(vectors: torch.Tensor) -> torch.Tensor:
        rows = []
        for own, position in zip(vectors, at["clean"], strict=True):
            if basis is None:
                rows.append(clean[position])
            else:
                projection = basis @ basis.T
                rows.append(own - projection @ own + projection @ clean[position])
        return torch.stack(rows)

    places = torch.zeros(len(at["corrupted"]), dtype=torch.long), torch.tensor(at["corrupted"])
    with patch(model, route.stage, places, change):
        after = model(corrupted)[0, key]
    return float((after[a] - after[b]) - (before[a] - before[b]))


def test_scores_of_all_pairs_at_once_are_those_of_each_pair_alone(
    model: HookedTransformer, tiny: Benchmark, pairs: list[Pair]
) -> None:
    scores = scores_of(model, tiny, both_sides(tiny, pairs), ROUTES)
    bases = route_bases(model, ROUTES, tiny.vocabulary)
    with torch.no_grad():
        naive = torch.tensor(
            [
                [one_by_one(model, tiny, pair, route, basis) for pair in pairs]
                for route, basis in zip(ROUTES, bases, strict=True)
            ]
        )
    assert (naive.abs().amax(1) > 1e-3).all()
    assert torch.allclose(scores, naive, atol=1e-4)


def test_a_basis_of_every_direction_is_the_whole_residual(
    model: HookedTransformer, tiny: Benchmark, pairs: list[Pair]
) -> None:
    stage, role = "layer_0_post_mlp", "support_write"
    routes = [
        Route("basis", stage, role, "embedding_value_identity", 16),
        Route("whole", stage, role),
        Route("fewer", stage, role, "embedding_value_identity", 15),
    ]
    basis, whole, fewer = scores_of(model, tiny, both_sides(tiny, pairs), routes)
    assert torch.allclose(basis, whole, atol=1e-4)
    assert not torch.allclose(fewer, whole, atol=1e-4)


def test_a_route_through_tokens_that_are_equal_carries_nothing(
    model: HookedTransformer, tiny: Benchmark, pairs: list[Pair]
) -> None:
    own = [pair for pair in pairs if pair.type == "support_value"]
    routes = [
        Route("key", "embedding", "support_key"),
        Route("value", "embedding", "support_value"),
    ]
    key, value = scores_of(model, tiny, both_sides(tiny, own), routes)
    assert key.abs().max() < 1e-5
    assert torch.allclose(value, gaps(model, both_sides(tiny, own)), atol=1e-4)


def test_unequal_counts_are_refused_and_the_pair_is_named(
    tiny: Benchmark, pairs: list[Pair]
) -> None:
    records = tiny.records("validation_iid")
    clean = tiny.task.examples(records[:4])
    count = clean.role("causal_prefix").sum(1)
    order = count.argsort(stable=True)
    assert count[order[0]] < count[order[-1]]
    clean, corrupted = (clean.select(order[[0, index]]) for index in (0, -1))
    sides = PairSides(clean, corrupted, torch.zeros(2, 2, dtype=torch.long), ("first", "second"))
    with pytest.raises(CircuitError, match=r"pair second: \d+ clean and \d+ corrupted positions"):
        sides.places("causal_prefix")
    assert len(sides.places("prediction")[0]) == 2


def test_a_route_is_read_from_its_word() -> None:
    route = parse_route(
        "label=a,stage=embedding,subspace=head_qk_query,rank=4,head_layer=1,head=0,"
        "position_role=query_key"
    )
    assert route == Route("a", "embedding", "query_key", "head_qk_query", 4, Component(1, 0))
    assert parse_route("position_role=prediction, label=b, stage=final_norm").rank is None
    assert parse_route(str(route)) == read_route(route.to_row()) == route
    with pytest.raises(CircuitError, match="two routes have the label 'a'"):
        check_labels([route, route], "everything")
    with pytest.raises(CircuitError, match="a route has the label 'a'; expected another label"):
        check_labels([route], "a")


BASE = "label=a,stage=embedding,position_role=query_key"
HEAD = ",head_layer=0,head=1"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stage=embedding,position_role=query_key", "no label in"),
        ("label=a,position_role=query_key", "no stage in"),
        (BASE + ",layer=1", "unknown key 'layer' in"),
        (BASE + ",rank", "'rank' has no value"),
        (BASE + ",label=b", "'label' stands twice"),
        (BASE + ",rank=two", "rank=two in"),
        (BASE + ",rank=4", "full_residual is everything and takes no rank; leave it out"),
        (BASE + ",subspace=embedding_key_identity", "'embedding_key_identity' needs a rank"),
        (BASE + ",subspace=embedding_key_identity,rank=4", "rank 4 .*; expected 1 to 3"),
        (BASE + ",subspace=head_qk_key,rank=2", "needs a head"),
        (BASE + ",subspace=head_qk_key,rank=2,head=1", "names half a head"),
        (BASE + ",subspace=head_qk_key,rank=9" + HEAD, "rank 9 .*; expected 1 to 8"),
        (BASE + ",subspace=head_qk_key,rank=2,head_layer=2,head=1", "has no component 'L2H1'"),
        (BASE + HEAD, "'full_residual' is of no head"),
        (BASE + ",subspace=odd,rank=1", "unknown subspace 'odd'; expected one of embedding_key_"),
        ("label=a,stage=embedding,position_role=odd", "unknown role 'odd'; expected one of pred"),
        ("label=a,stage=layer_2_post_mlp,position_role=prediction", "unknown stage 'layer_2_post"),
    ],
)
def test_a_route_that_cannot_be_is_refused(tiny: Benchmark, spec: str, message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        check_routes([parse_route(spec)], SHAPE, tiny.task)
