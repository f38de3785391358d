"""The estimates of memory and disk, held against what a step of two real configs takes."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import type_and_read
from hypothesis import given
from hypothesis import strategies as st

from circuit import sizes
from circuit.config import load_config, parse_config
from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.sizes import DISK, MEMORY
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import TrainState, encode_checkpoint
from circuit.training.evaluate import logits_and_attention
from circuit.training.optimizers import build_optimizer, read_moments
from circuit.training.recipe import Batch, Recipe
from circuit.training.step import next_token_loss, training_step

REAL = {"quickstart": (57, 60), "symbolic_kv_formation": (141, 96)}
"""Configs of the package, with tokens and the length of a record."""


def real(name: str) -> TrainConfig:
    return load_config(Path("configs/train", f"{name}.json"), TrainConfig)


class Drawn(Recipe):
    """Next-token prediction on given tokens; model and optimizer come from elsewhere."""

    module = optimizer = None  # type: ignore[assignment]

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def batch(self, step: int) -> Batch:
        return Batch(self.tokens[:, :-1], self.tokens[:, 1:], np.arange(len(self.tokens)))

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return next_token_loss(outputs, batch.targets)


@pytest.mark.parametrize("kernels", ["fast", "plain"])
@pytest.mark.parametrize("name", REAL)
def test_memory_of_a_step_is_estimated_within_a_factor_of_two(name: str, kernels: str) -> None:
    """Counted: weights, gradients, moments, and every tensor that the backward pass keeps."""
    vocabulary, length = REAL[name]
    config = real(name).replace(kernels=kernels, batch_size=16)
    model = build_model(config.model, vocabulary_size=vocabulary, seed=0, kernels=kernels)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, config.optimizer)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    recipe = Drawn(torch.randint(5, vocabulary, (16, length)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outcome = training_step(recipe, model, optimizer, 1)
    counted = sum(kept.values()) + 2 * outcome.outputs.nbytes  # and what flows back into it
    estimated = sizes.activation_bytes(config, vocabulary, length - 1)
    print(f"{name}, {kernels}: activations {counted:,} bytes, estimated {estimated:,}")
    assert 0.5 < estimated / counted < 2

    parameters = dict(model.named_parameters())
    assert sizes.count_parameters(config.model, vocabulary) == sum(
        p.numel() for p in parameters.values()
    )
    moments = read_moments(model, optimizer, config.optimizer)
    state = TrainState(1, config, "0" * 64, {n: p.detach() for n, p in parameters.items()}, moments)
    held = sum(p.nbytes for p in parameters.values())
    held += sum(m.nbytes for of in moments.values() for m in of.values())
    assert sizes.state_bytes(config, vocabulary) == held
    saved = len(encode_checkpoint(state))
    alone = sizes.training_disk(
        config.replace(checkpoint_every=config.steps), sizes.saved_bytes(config, vocabulary)
    )
    estimated = alone["checkpoints (steps, checkpoint_every)"] // 3
    print(f"{name}: a checkpoint has {saved:,} bytes, estimated {estimated:,}")
    assert 0.5 < estimated / saved < 2


@pytest.mark.parametrize("name", REAL)
def test_memory_of_an_evaluation_is_estimated_within_a_factor_of_two(name: str) -> None:
    """Counted: weights, their copy, and the most that tensors of a batch take at once."""
    vocabulary, length = REAL[name]
    config, rows = real(name), 64
    model = build_model(config.model, vocabulary_size=vocabulary, seed=0)
    tokens = torch.randint(5, vocabulary, (rows, length + 1))
    with torch.profiler.profile(profile_memory=True) as taken, torch.no_grad():
        read = logits_and_attention(model, tokens)
        torch.nn.functional.cross_entropy(read[0].double().flatten(0, 1), tokens[:, 1:].flatten())
    allocated = [e for e in taken.profiler.kineto_results.events() if e.name() == "[memory]"]
    here, most = 0, 0
    for event in sorted(allocated, key=lambda event: event.start_ns()):
        here += event.nbytes()
        most = max(most, here)
    counted = most + 2 * sum(p.nbytes for p in model.parameters())
    kept = config.model.layers
    need = sizes.reading_memory(config.model, vocabulary, length, rows, kept=kept)
    estimated = sum(need.values())
    print(f"{name}: an evaluation takes {counted:,} bytes, estimated {estimated:,}")
    assert 0.5 < estimated / counted < 2


@pytest.mark.parametrize("untied", [True, False])
def test_parameters_are_counted_to_the_last(
    untied: bool, make_config: Callable[..., TrainConfig]
) -> None:
    shape = make_config().model.model_copy(update={"tied_unembedding": not untied})
    model = build_model(shape, vocabulary_size=41, seed=0)
    assert sizes.count_parameters(shape, 41) == sum(p.numel() for p in model.parameters())


def test_files_of_a_run_and_its_trace_are_estimated_within_a_factor_of_two(
    workplace: Path,
    make_config: Callable[..., TrainConfig],
    capsys: pytest.CaptureFixture[str],
    train_payload: Callable[..., dict[str, Any]],
) -> None:
    Path("run.json").write_text(json.dumps(train_payload(checkpoint_every=1)))
    assert type_and_read(["train", "--config", "run.json", "--trace", "traced"], capsys).code == 0
    config, tokens = make_config(checkpoint_every=1), 5 + 4 + 32

    def on_disk(folder: str, pattern: str) -> int:
        return sum(path.stat().st_size for path in Path(folder).glob(pattern))

    one = sizes.saved_bytes(config, tokens)
    run = sizes.training_disk(config, one)
    trace = sizes.trace_disk(one, config.batch_size, steps=12, stored=2, listed=10)
    counted = {
        "checkpoints": on_disk("runs/tiny/checkpoints", "*.pt"),
        "metrics": on_disk("runs/tiny", "metrics.jsonl"),
        "anchors": on_disk("traced/checkpoints", "*.pt"),
        "rows": on_disk("traced", "*_rows.jsonl"),
    }
    estimated = {name.partition(" ")[0]: size for name, size in {**run, **trace}.items()}
    print(counted, estimated)
    assert counted.keys() == estimated.keys()
    assert all(0.5 < estimated[name] / counted[name] < 2 for name in counted), estimated


def test_files_of_a_benchmark_are_estimated_within_a_factor_of_two(
    tiny_folder: Path, benchmark_payload: Callable[[], dict[str, Any]]
) -> None:
    config = parse_config(benchmark_payload(), BenchmarkConfig, where="test")
    counted = sum(path.stat().st_size for path in tiny_folder.glob("*.jsonl"))
    estimated = sum(config.disk().values())
    print(f"benchmark: {counted:,} bytes, estimated {estimated:,}")
    assert 0.5 < estimated / counted < 2


TOO_LARGE = (
    "model.d_model=100000000",
    "model.d_ff=1000000000000",
    "model.layers=1000000000",
    "model.max_sequence_length=1000000000000",
    "batch_size=1000000000000",
    "steps=1000000000000",
    "steps=1000000000",
)


@pytest.mark.parametrize("field", TOO_LARGE)
@pytest.mark.parametrize("command", ["train", "trace record"])
def test_what_cannot_be_is_refused_before_it_is_begun(
    field: str,
    command: str,
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    train_payload: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(MEMORY, "16GB")
    monkeypatch.setenv(DISK, "64GB")
    Path("run.json").write_text(json.dumps(train_payload(checkpoint_every=1)))
    words = [*command.split(), "--config", "run.json", "--set", field]
    if command != "train":
        words += ["--from-initialization", "--end-step", "12", "--output-dir", "traced"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = type_and_read(words, capsys)
    assert done.code == 2
    assert done.err.count("\n") == 1
    name = field.partition("=")[0].rpartition(".")[2]
    assert name in done.err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "fields",
    [
        ["splits.train.samples=1000000000"],
        ["num_values=1000000000"],
        ["num_keys=1000000000"],
        ['splits.train.overwrite_count={"min":1,"max":1000000000}'],
        ['splits.train.num_queries={"min":1,"max":1000000000}'],
    ],
)
def test_a_benchmark_that_cannot_be_is_refused_before_it_is_drawn(
    fields: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    benchmark_payload: Callable[[], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(MEMORY, "16GB")
    monkeypatch.setenv(DISK, "64GB")
    Path("data.json").write_text(json.dumps(benchmark_payload()))
    sets = [word for field in fields for word in ("--set", field)]
    done = type_and_read(["generate-benchmark", "--config", "data.json", *sets], capsys)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "would need" in done.err
    assert not Path("data").exists()


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 10**20), min_size=1))
def test_what_fits_is_never_refused_and_what_does_not_always_is(need: dict[str, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MEMORY, "5GB")
        if sum(need.values()) <= 5 * 10**9:
            sizes.require_memory(need)
            return
        with pytest.raises(CircuitError, match=r"at most 5 GB, which there is.*CIRCUIT_MEMORY"):
            sizes.require_memory(need)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64GB", 64 * 10**9), ("1.5t", 15 * 10**11), ("100", 100), ("7 MB", 7 * 10**6)],
)
def test_a_limit_can_be_told(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (MEMORY, DISK):
        monkeypatch.setenv(name, text)
    assert sizes.memory_limit() == sizes.disk_limit(Path("nowhere/at/all")) == size


@pytest.mark.parametrize("text", ["much", "-1", "1e9", "1" * 5000, "GB", "nan"])
def test_a_limit_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEMORY, text)
    with pytest.raises(
        CircuitError, match=r"CIRCUIT_MEMORY: .* no size; expected one such as 64GB"
    ):
        sizes.memory_limit()


def test_the_machine_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MEMORY, raising=False)
    monkeypatch.delenv(DISK, raising=False)
    assert 10**8 < sizes.memory_limit() < 10**14
    assert sizes.disk_limit(Path("nowhere/at/all")) > 0
