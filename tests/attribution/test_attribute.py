"""Attribution adds up: over terms, groups, windows, and to what happened."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from jaxtyping import Float
from new_shapes import NEW_SHAPES
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit.attribution.attribute import Attributor, StepAttribution, attribute
from circuit.attribution.series import Closure, Series
from circuit.core.flat import ParameterLayout
from circuit.core.groups import PARTITIONS, atoms, check_partition
from circuit.core.state import FlatState
from circuit.core.update import UpdateTerms
from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.scalars.base import Cache, Needs, SharedBatch, evaluate_scalar
from circuit.scalars.qk_match import QKMatch, ReadMasks, qk_matches
from circuit.tasks.benchmark import Benchmark
from circuit.trace.step import TracedStep, Tracer
from circuit.train_config import ModelConfig, TrainConfig
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

SHAPE = {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32, "max_sequence_length": 40}


@dataclass(frozen=True)
class SquaredNorm:
    """A quadratic scalar: the squared norm of the first head's query weights."""

    needs: Needs
    name: str = "squared_norm"
    constant: bool = True

    def bind(self, model: HookedTransformer) -> SquaredNorm:
        return self

    def values(
        self,
        model: HookedTransformer,
        cache: Cache,
    ) -> Float[Tensor, " example"]:
        return model.blocks[0].attn.W_Q[0].pow(2).sum()[None]


@pytest.fixture(scope="module")
def config(make_config: Callable[..., TrainConfig]) -> TrainConfig:
    return make_config(model=SHAPE, gradient_clip=0.5)


@pytest.fixture(scope="module")
def steps(config: TrainConfig, tiny: Benchmark) -> list[TracedStep]:
    tracer = Tracer(TrainingSession(Setup(config, benchmark=tiny)))
    return [tracer.advance() for _ in range(8)]


@pytest.fixture(scope="module")
def reads(tiny: Benchmark) -> ReadMasks:
    records = tiny.records("validation_iid")[:10]
    return ReadMasks.of(tiny.task.examples(records))


def model_of(config: TrainConfig, tiny: Benchmark, dtype: torch.dtype) -> HookedTransformer:
    size = tiny.vocabulary.size
    return build_model(config.model, vocabulary_size=size, seed=3, dtype=dtype)


@pytest.fixture
def model(config: TrainConfig, tiny: Benchmark) -> HookedTransformer:
    return model_of(config, tiny, torch.float32)


def results(
    model: HookedTransformer, steps: list[TracedStep], scalars: list[QKMatch], rule: str
) -> list[StepAttribution]:
    return list(attribute(steps, Attributor(model, scalars, rule=rule)))


def closures(found: list[StepAttribution]) -> list[Closure]:
    series = Series.collect(row for result in found for row in result.rows())
    return [one.closure() for one in series.values()]


def test_contributions_close_where_first_order_does_not(
    config: TrainConfig, tiny: Benchmark, steps: list[TracedStep], reads: ReadMasks
) -> None:
    model = model_of(config, tiny, torch.float64)
    scalars = qk_matches(["L0H1", "L1H0"], reads, layers=2, ranks=[4, None])
    errors = {
        rule: closures(results(model, steps, scalars, rule))
        for rule in ("midpoint", "simpson", "gauss:3")
    }
    for index, scalar in enumerate(scalars):
        first = errors["simpson"][index].first_order_absolute
        found = {rule: e[index].path_absolute for rule, e in errors.items()}
        print(scalar.name, f"first order {first:.2g}", {r: f"{e:.2g}" for r, e in found.items()})
        assert found["midpoint"] < 0.1 * first
        assert found["simpson"] < 0.1 * found["midpoint"]
        assert found["gauss:3"] < 1e-6


@dataclass(frozen=True)
class PlainStep:
    """A step of nobody's run: what `circuit.core.step.Step` asks for."""

    step: int
    lr: float
    clip: float
    before: FlatState
    after: FlatState
    update: UpdateTerms
    tokens: Tensor
    answers: Tensor


def test_a_step_need_not_come_from_a_trace(
    model: HookedTransformer, steps: list[TracedStep], reads: ReadMasks
) -> None:
    scalars = qk_matches(["L1H0"], reads, layers=2, ranks=[4, None])
    names = [field.name for field in fields(PlainStep)]
    plain = [PlainStep(**{name: getattr(step, name) for name in names}) for step in steps[:2]]
    rows = [
        [row for result in attribute(taken, attributor) for row in result.rows(PARTITIONS)]
        for taken in (steps[:2], plain)
        for attributor in [Attributor(model, scalars, loss_scope="answer")]
    ]
    assert rows[0] == rows[1]
    assert "answer_raw_sgd" in rows[0][0]["references"]


def test_a_quadratic_scalar_closes_with_one_node(
    model: HookedTransformer, steps: list[TracedStep], reads: ReadMasks
) -> None:
    scalar = SquaredNorm(Needs(reads.sequences[:1], ("blocks.0.hook_resid_pre",)))
    for traced in steps:
        found = Attributor(model, [scalar], rule="midpoint").step(traced)
        start, stop = ParameterLayout.of_model(model).range("blocks.0.attn.W_Q")
        stop = start + (stop - start) // 2
        theta = traced.before.parameters[start:stop].double()
        delta = traced.update.total[start:stop]
        assert float(found.path.sum()) == pytest.approx(
            float((2 * theta + delta) @ delta), rel=1e-5
        )
        assert float(found.first_order.sum()) == pytest.approx(float(2 * theta @ delta), rel=1e-5)
        # the share of a term is its Aumann-Shapley value, by intervention (definitions section 5)
        for place, vector in enumerate(traced.update.named().values()):
            u = vector[start:stop]

            def value(at: Tensor) -> Tensor:
                return at.pow(2).sum()

            alone = value(theta + u) - value(theta)
            but_one = value(theta + delta) - value(theta + delta - u)
            expected = float((alone + but_one) / 2)
            assert float(found.path[0, place].sum()) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_gradient_is_the_difference_quotient(
    config: TrainConfig, tiny: Benchmark, reads: ReadMasks
) -> None:
    model = model_of(config, tiny, torch.float64)
    for scalar in qk_matches(["L1H1"], reads, layers=2, ranks=[3, None]):
        attributor = Attributor(model, [scalar])
        layout = ParameterLayout.of_model(model)
        theta = layout.flatten(dict(model.named_parameters()))
        bound = [scalar.bind(model)]
        _, gradients = attributor.evaluate(theta, bound)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            way = torch.randn(len(theta), generator=generator, dtype=torch.float64)
            step = 1e-6
            ahead = attributor.values(theta + step * way, bound)
            behind = attributor.values(theta - step * way, bound)
            slope = float((ahead - behind) / (2 * step))
            assert float(gradients[0] @ way) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_partition_adds_up(
    model: HookedTransformer, steps: list[TracedStep], reads: ReadMasks, partition: str
) -> None:
    scalars = qk_matches(["L1H0"], reads, layers=2, ranks=[4])
    for found in results(model, steps[:3], scalars, "simpson"):
        (row,) = found.rows([check_partition(partition)])
        groups = row["groups"][partition]
        for kind in ("first_order", "path"):
            for term, share in row[kind].items():
                total = sum(group[kind][term] for group in groups.values())
                assert total == pytest.approx(share, rel=1e-9, abs=1e-13)
        assert sum(row["path"].values()) == pytest.approx(float(found.path.sum()), abs=1e-13)
        # later layers and the head's own OV circuit cannot move its match
        if partition == "circuit":
            assert groups["L1H0.v"]["path"] == dict.fromkeys(row["path"], 0.0)
            assert groups["L1.mlp"]["path"] == dict.fromkeys(row["path"], 0.0)


def test_atoms_cover_the_vector_once(model: HookedTransformer) -> None:
    layout = ParameterLayout.of_model(model)
    found = atoms(layout)
    assert [atom.start for atom in found] == [0, *(atom.stop for atom in found[:-1])]
    assert found[-1].stop == layout.size
    groups = {partition: {atom.group(partition) for atom in found} for partition in PARTITIONS}
    assert groups["layer"] == {"embed", "pos_embed", "L0", "L1", "norms"}
    parts = {f"L{layer}H{head}" for layer in range(2) for head in range(2)}
    rest = {"embed", "pos_embed", "norms", "L0.b_O", "L1.b_O", "L0.mlp", "L1.mlp"}
    assert groups["component"] == parts | rest
    assert groups["parameter"] == set(layout.names)
    assert groups["circuit"] == {f"{part}.{kind}" for part in parts for kind in "qkvo"} | rest


@pytest.mark.parametrize("fields", NEW_SHAPES.values(), ids=list(NEW_SHAPES))
def test_groups_are_of_what_a_shape_has(fields: dict[str, Any]) -> None:
    shape = ModelConfig.model_validate(SHAPE | fields)
    layout = ParameterLayout.of_model(build_model(shape, vocabulary_size=7, seed=0))
    found = atoms(layout)
    assert sum(atom.stop - atom.start for atom in found) == layout.size
    groups = {atom.group("component") for atom in found}
    assert {"embed", "pos_embed", "L0H0", "L1H1"} <= groups
    for group, there in {
        "unembed": not shape.tied_unembedding,
        "norms": shape.normalization != "none",
        "L0.mlp": not shape.attention_only,
        "L0.b_O": shape.biases,
    }.items():
        assert (group in groups) == there


def test_head_ln1_without_normalization_is_the_raw_stream(
    tiny: Benchmark, reads: ReadMasks
) -> None:
    shape = ModelConfig.model_validate(SHAPE | {"normalization": "none"})
    model = build_model(shape, vocabulary_size=tiny.vocabulary.size, seed=3)
    values = [
        evaluate_scalar(QKMatch("L1H0", reads, layers=2, layernorm_mode=mode), model)
        for mode in ("head_ln1", "none")
    ]
    assert torch.equal(*values)


def test_a_hook_point_that_a_shape_lacks_is_named(tiny: Benchmark, reads: ReadMasks) -> None:
    model = build_model(
        ModelConfig.model_validate(SHAPE | {"d_ff": 0}),
        vocabulary_size=tiny.vocabulary.size,
        seed=3,
    )
    scalar = QKMatch("L1H0", reads, layers=2, context_stage="layer_0_post_attn")
    with pytest.raises(CircuitError, match=r"has no hook point blocks\.0\.hook_resid_mid"):
        evaluate_scalar(scalar, model)


def test_a_fixed_basis_telescopes_and_a_moving_one_does_not(
    config: TrainConfig, tiny: Benchmark, steps: list[TracedStep], reads: ReadMasks
) -> None:
    model = model_of(config, tiny, torch.float32)
    basis = model_of(config, tiny, torch.float32)
    scalars = [
        QKMatch("L1H0", reads, layers=2, rank=4, basis=basis),
        QKMatch("L1H0", reads, layers=2, rank=4),
    ]
    found = results(model, steps, scalars, "midpoint")
    assert found[0].constant == (True, False)
    for earlier, later in itertools.pairwise(found):
        assert float(earlier.after[0]) == float(later.before[0])
    total = sum(float(r.actual[0]) for r in found)
    assert total == pytest.approx(float(found[-1].after[0] - found[0].before[0]), abs=1e-6)
    assert any(float(a.after[1]) != float(b.before[1]) for a, b in itertools.pairwise(found))


def test_reused_ends_change_nothing(
    model: HookedTransformer, steps: list[TracedStep], reads: ReadMasks
) -> None:
    scalars = qk_matches(["L0H0"], reads, layers=2, ranks=[None])
    together = results(model, steps[:4], scalars, "simpson")
    for traced, found in zip(steps[:4], together, strict=True):
        alone = Attributor(model, scalars).step(traced)
        assert torch.equal(alone.path, found.path)
        assert torch.equal(alone.first_order, found.first_order)
        assert torch.equal(alone.before, found.before)


def test_the_full_match_is_the_heads_own_score(
    config: TrainConfig, tiny: Benchmark, reads: ReadMasks
) -> None:
    model = model_of(config, tiny, torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.b_Q.zero_()
            block.attn.b_K.zero_()
    scalar = QKMatch("L1H1", reads, layers=2)
    batch = SharedBatch.merge([scalar])
    _, cache = model.run_with_cache(batch.tokens)
    scores = cache["blocks.1.attn.hook_attn_scores"][:, 1]
    expected = []
    for row, query, near, far in zip(
        reads.row.tolist(), reads.query.tolist(), reads.support, reads.distractors, strict=True
    ):
        line = scores[row, query].detach()
        expected.append(float(line[near.nonzero()[:, 0]].mean() - line[far.nonzero()[:, 0]].mean()))
    (mean,) = batch.means(model, [scalar.bind(model)])
    assert float(mean.detach()) == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_bad_requests_are_named(reads: ReadMasks, model: HookedTransformer) -> None:
    with pytest.raises(CircuitError, match="'L0MLP' has no QK circuit"):
        QKMatch("L0MLP", reads, layers=2)
    with pytest.raises(CircuitError, match=r"rank 9 of L1H0; expected 1 to 8"):
        QKMatch("L1H0", reads, layers=2, rank=9).bind(model)
    with pytest.raises(CircuitError, match="unknown partition 'heads'"):
        check_partition("heads")
