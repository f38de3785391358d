"""Functional write against loops over pairs and positions, and finite differences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from circuit.attribution.attribute import Attributor
from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.model.components import ablate
from circuit.model.stages import run_from
from circuit.scalars.base import Cache, SharedBatch, evaluate_scalar
from circuit.scalars.functional_write import (
    TARGETS,
    FunctionalWrite,
    Target,
    WritePath,
    WriteReads,
    deltas,
    readout_gradient,
)
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import Examples
from circuit.trace.step import Tracer
from circuit.train_config import TrainConfig
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

SHAPE = {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32, "max_sequence_length": 40}
PATHS = [("L0H1", "L0MLP"), ("L0H0", "L1MLP"), ("L1H1", "L1MLP"), ("L0MLP", "L1MLP")]
INPUT = {"L0MLP": "blocks.0.hook_resid_mid", "L1MLP": "blocks.1.hook_resid_mid"}
OUTPUT = {"L0MLP": "blocks.0.hook_resid_post", "L1MLP": "blocks.1.hook_resid_post"}


@pytest.fixture(scope="module")
def config(make_config: Callable[..., TrainConfig]) -> TrainConfig:
    return make_config(model=SHAPE)


def scaled(config: TrainConfig, tiny: Benchmark, dtype: torch.dtype) -> HookedTransformer:
    built = build_model(config.model, vocabulary_size=tiny.vocabulary.size, seed=8, dtype=dtype)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return built


@pytest.fixture(scope="module")
def model(config: TrainConfig, tiny: Benchmark) -> HookedTransformer:
    return scaled(config, tiny, torch.float64)


@pytest.fixture
def changeable(model: HookedTransformer) -> Iterator[HookedTransformer]:
    """The model; its weights are put back afterwards."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    yield model
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])


@pytest.fixture(scope="module")
def batch(tiny: Benchmark) -> Examples:
    """Several reads of one record among them."""
    found = tiny.task.examples(tiny.records("validation_iid")[:6])
    assert len(found) > len(found.tokens)
    return found


def logit(logits: Tensor, *, answer: Tensor) -> Tensor:
    """Log-probability of the answer."""
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def reference_of(
    model: HookedTransformer, batch: Examples, path: WritePath, stage: str, role: str
) -> Tensor:
    reads = WriteReads.of(batch, role)
    return readout_gradient(model, reads, path, stage, partial(logit, answer=batch.answer))


def stages(model: HookedTransformer, tokens: Tensor, path: WritePath) -> tuple[Tensor, Tensor]:
    _, cache = model.run_with_cache(tokens)
    return cache[INPUT[str(path.mlp)]].detach(), cache[OUTPUT[str(path.mlp)]].detach()


@pytest.mark.parametrize("addresses", PATHS, ids="-".join)
@pytest.mark.parametrize("role", ["prediction", "support_write", "value_distractors"])
def test_the_write_is_the_loops(
    model: HookedTransformer, batch: Examples, addresses: tuple[str, str], role: str
) -> None:
    """One pair at a time, one position at a time, from plain runs of the model."""
    path = WritePath.parse(*addresses, model)
    reads, mask = WriteReads.of(batch, role), batch.role(role)
    reference = reference_of(model, batch, path, path.output_stage, role)
    expected: dict[Target, list[float]] = {target: [] for target in TARGETS}
    for pair in range(len(batch)):
        tokens = batch.tokens[batch.row[pair]][None]
        into, out = stages(model, tokens, path)
        with ablate(model, addresses[0]):
            into_without, out_without = stages(model, tokens, path)
        parts = dict.fromkeys(TARGETS, 0.0)
        for slot, position in enumerate(mask[pair].nonzero()[:, 0].tolist()):
            g = reference[pair, slot]
            total = (out - out_without)[0, position]
            given = (into - into_without)[0, position]
            parts["post_mlp_total_delta"] += float(g @ total)
            parts["input_delta"] += float(g @ given)
            parts["mlp_output_delta"] += float(g @ (total - given))
        for target, value in parts.items():
            expected[target].append(value)
    for target in TARGETS:
        scalar = FunctionalWrite(path, reads, reference, layers=2, target=target)
        found = evaluate_scalar(scalar, model).tolist()
        assert found == pytest.approx(expected[target], rel=1e-9, abs=1e-12)
        # behind the last layer nothing but the prediction is read
        read_on = role == "prediction" or addresses[1] == "L0MLP"
        assert (max(map(abs, found)) > 1e-6) == read_on


@torch.no_grad()
def test_the_total_is_the_input_and_the_mlps_own(model: HookedTransformer, batch: Examples) -> None:
    path = WritePath.parse("L0H1", "L1MLP", model)
    reads = WriteReads.of(batch, "causal_prefix")
    scalar = FunctionalWrite(path, reads, torch.ones(1), layers=2)
    shared = SharedBatch.merge([scalar])
    found = deltas(Cache(shared.run(model), shared.rows[0]), path, 2)
    torch.testing.assert_close(
        found["post_mlp_total_delta"], found["input_delta"] + found["mlp_output_delta"]
    )
    # the MLP's own part is what its own output hook says
    _, plain = model.run_with_cache(shared.tokens)
    with ablate(model, "L0H1"):
        _, without = model.run_with_cache(shared.tokens)
    own = plain["blocks.1.hook_mlp_out"] - without["blocks.1.hook_mlp_out"]
    torch.testing.assert_close(found["mlp_output_delta"], own)


@pytest.mark.parametrize("end", ["input_stage", "output_stage"])
@pytest.mark.parametrize("addresses", PATHS[:2], ids="-".join)
def test_the_readout_gradient_is_the_difference_quotient(
    model: HookedTransformer, batch: Examples, addresses: tuple[str, str], end: str
) -> None:
    """Of the network that runs on from the stage, held at its value with the source ablated."""
    path = WritePath.parse(*addresses, model)
    stage = getattr(path, end)
    reads = WriteReads.of(batch, "support_write")
    found = reference_of(model, batch, path, stage, "support_write")
    generator = torch.Generator().manual_seed(0)
    with ablate(model, addresses[0]), torch.no_grad():
        held = stages(model, batch.tokens, path)[end == "output_stage"]
    for pair in range(0, len(batch), 2):
        alone = held[batch.row[pair]][None]

        def value(residual: Tensor, pair: int = pair) -> float:
            logits = run_from(model, stage, residual)[:, batch.at[pair]]
            return float(logit(logits, answer=batch.answer[pair : pair + 1]))

        for slot, position in enumerate(reads.positions[pair].tolist()):
            way = torch.randn(16, generator=generator, dtype=torch.float64)
            bump = torch.zeros_like(alone)
            bump[0, position] = 1e-5 * way
            with torch.no_grad():
                slope = (value(alone + bump) - value(alone - bump)) / 2e-5
            assert float(found[pair, slot] @ way) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_reads_of_one_record_do_not_mix(model: HookedTransformer, batch: Examples) -> None:
    path = WritePath.parse("L0H0", "L0MLP", model)
    together = reference_of(model, batch, path, path.output_stage, "prediction")
    for pair in range(len(batch)):
        one = batch.select(torch.tensor([pair]))
        alone = reference_of(model, one, path, path.output_stage, "prediction")
        torch.testing.assert_close(alone[0], together[pair])


def test_slots_that_are_not_real_count_nothing(model: HookedTransformer, batch: Examples) -> None:
    reads = WriteReads.of(batch, "value_distractors")
    counts = reads.real.sum(1)
    assert counts.min() < counts.max()
    path = WritePath.parse("L0H0", "L0MLP", model)
    reference = reference_of(model, batch, path, path.output_stage, "value_distractors")
    assert not reference[~reads.real].any()
    noisy = torch.where(reads.real[..., None], reference, torch.ones_like(reference))
    with torch.no_grad():
        one, other = (
            evaluate_scalar(FunctionalWrite(path, reads, g, layers=2), model)
            for g in (reference, noisy)
        )
    assert torch.equal(one, other)


def silence(model: HookedTransformer, address: str, tensor: str) -> None:
    with torch.no_grad():
        if address == "L0MLP":
            model.blocks[0].mlp.W_out.zero_()
            model.blocks[0].mlp.b_out.zero_()
        else:
            attention = model.blocks[int(address[1])].attn
            getattr(attention, tensor)[int(address[3])] = 0
            if tensor == "W_V":
                attention.b_V[int(address[3])] = 0


@pytest.mark.parametrize(
    ("addresses", "tensor"), [(PATHS[0], "W_O"), (PATHS[1], "W_V"), (PATHS[3], "W_out")], ids=str
)
def test_a_source_that_writes_nothing_has_no_write(
    changeable: HookedTransformer, batch: Examples, addresses: tuple[str, str], tensor: str
) -> None:
    silence(changeable, addresses[0], tensor)
    path = WritePath.parse(*addresses, changeable)
    reads = WriteReads.of(batch, "prediction")
    reference = torch.randn(len(reads.row), 1, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for target in TARGETS:
            scalar = FunctionalWrite(path, reads, reference, layers=2, target=target)
            assert not evaluate_scalar(scalar, changeable).any()


def test_the_attribution_of_a_write_that_stays_zero_is_zero(
    config: TrainConfig, tiny: Benchmark, batch: Examples
) -> None:
    """Both matrices of the OV circuit at zero: the training step cannot leave that point."""
    session = TrainingSession(Setup(config, benchmark=tiny))
    model = scaled(config, tiny, torch.float64)
    path = WritePath.parse("L0H1", "L0MLP", model)
    reads = WriteReads.of(batch, "prediction")
    reference = reference_of(model, batch, path, path.output_stage, "prediction")
    scalars = [
        FunctionalWrite(path, reads, reference, layers=2, target=target, name=target)
        for target in TARGETS
    ]
    with torch.no_grad():
        attention = session.model.blocks[0].attn
        for tensor in (attention.W_V, attention.b_V, attention.W_O):
            tensor[1] = 0
    tracer = Tracer(session)
    attributor = Attributor(model, scalars)
    for _ in range(3):
        found = attributor.step(tracer.advance())
        assert not found.before.any()
        assert not found.after.any()
        for shares in (found.path, found.first_order, found.references):
            assert float(shares.abs().max()) < 1e-12  # two equal runs, subtracted


def test_a_frozen_reference_telescopes_and_closes(
    config: TrainConfig, tiny: Benchmark, batch: Examples
) -> None:
    model = scaled(config, tiny, torch.float64)
    path = WritePath.parse("L0H1", "L1MLP", model)
    reads = WriteReads.of(batch, "prediction")
    reference = reference_of(model, batch, path, path.output_stage, "prediction")
    attributor = Attributor(model, [FunctionalWrite(path, reads, reference, layers=2)])
    tracer = Tracer(TrainingSession(Setup(config, benchmark=tiny)))
    found = [attributor.step(tracer.advance()) for _ in range(4)]
    assert found[0].constant == (True,)
    for earlier, later in itertools.pairwise(found):
        assert torch.equal(earlier.after, later.before)
    off = sum(abs(float(f.path.sum() - f.actual)) for f in found)
    first = sum(abs(float(f.first_order.sum() - f.actual)) for f in found)
    assert off < 1e-2 * first


def test_the_stage_is_held_at_all_positions(model: HookedTransformer, batch: Examples) -> None:
    """The gradient at the output stage does not know what the source would have written."""
    path = WritePath.parse("L1H0", "L1MLP", model)
    seen: list[Tensor] = []

    def spy(value: Tensor, hook: HookPoint) -> None:
        seen.append(value.detach().clone())

    with model.hooks(fwd_hooks=[("ln_final.hook_scale", spy)]):
        reference_of(model, batch, path, path.output_stage, "prediction")
        held = seen[-1]
        with ablate(model, "L1H0"), torch.no_grad():
            model(batch.tokens[batch.row])
    torch.testing.assert_close(held, seen[-1])


WRONG = {
    "later layer": ("L1H0", "L0MLP", "'L1H0' does not write before 'L0MLP'"),
    "itself": ("L0MLP", "L0MLP", "'L0MLP' does not write before 'L0MLP'"),
    "later MLP": ("L1MLP", "L0MLP", "'L1MLP' does not write before 'L0MLP'"),
    "no MLP": ("L0H0", "L0H1", "component 'L0H1' is a head; expected an MLP"),
    "no head": ("L0H7", "L1MLP", "no component 'L0H7'; expected layers 0-1, heads 0-1"),
    "no layer": ("L0H0", "L4MLP", "no component 'L4MLP'"),
    "no address": ("H0", "L1MLP", "unknown component 'H0'"),
}


@pytest.mark.parametrize(("source", "mlp", "message"), WRONG.values(), ids=list(WRONG))
def test_a_path_that_is_none_is_refused(
    model: HookedTransformer, source: str, mlp: str, message: str
) -> None:
    with pytest.raises(CircuitError, match=message):
        WritePath.parse(source, mlp, model)


def test_an_unknown_target_or_role_is_refused(model: HookedTransformer, batch: Examples) -> None:
    path = WritePath.parse("L0H0", "L0MLP", model)
    reads = WriteReads.of(batch, "prediction")
    with pytest.raises(CircuitError, match="unknown target vector 'delta'; expected post_mlp"):
        FunctionalWrite(path, reads, torch.ones(1), layers=2, target="delta")  # type: ignore[arg-type]
    with pytest.raises(CircuitError, match="unknown role 'nowhere'"):
        WriteReads.of(batch, "nowhere")
