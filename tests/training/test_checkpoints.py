"""Checkpoints: nothing but the state that was saved comes back, and nothing is ever run."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from unsound import save_unsound

from circuit.core.digests import tensor_digest, tensors_digest
from circuit.errors import CircuitError
from circuit.tasks.benchmark import Benchmark
from circuit.train_config import TrainConfig
from circuit.training import checkpoints
from circuit.training.checkpoints import (
    DivergedError,
    TrainState,
    checkpoint_name,
    checkpoint_step,
    encode_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_description,
    save_checkpoint,
)
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

MakeConfig = Callable[..., TrainConfig]
SessionAfter = Callable[..., TrainingSession]

ADAMW = {"name": "adamw", "learning_rate": 0.01}
BEST = {"step": 2, "split": "validation_iid", "metric": "token_accuracy", "value": 0.25}
OPTIMIZERS: list[dict[str, Any]] = [
    ADAMW,
    {"name": "sgd", "learning_rate": 0.1},
    {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
]


def assert_equal_states(first: TrainState, second: TrainState) -> None:
    assert replace(first, parameters={}, moments={}) == replace(second, parameters={}, moments={})
    groups = [{"parameters": s.parameters, **s.moments} for s in (first, second)]
    assert list(groups[0]) == list(groups[1])
    for group, tensors in groups[0].items():
        assert list(tensors) == list(groups[1][group])
        for name, tensor in tensors.items():
            assert torch.equal(tensor, groups[1][group][name])
            assert tensor.dtype == groups[1][group][name].dtype


@pytest.fixture
def small_state(make_config: MakeConfig) -> TrainState:
    """A few bytes of tensors, so that a thousand damaged copies are quickly read."""
    generator = torch.Generator().manual_seed(0)

    def tensors() -> dict[str, Tensor]:
        return {
            "W": torch.randn(40, 9, generator=generator),
            "b": torch.randn(70, generator=generator),
        }

    moments = {"exp_avg": tensors(), "exp_avg_sq": tensors()}
    return TrainState(3, make_config(), "0" * 64, tensors(), moments, {"best": BEST})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_what_is_saved_comes_back(
    session_after: SessionAfter, tmp_path: Path, optimizer: dict[str, Any], steps: int
) -> None:
    state = session_after(steps, optimizer=optimizer).state({"best": BEST})
    path = tmp_path / checkpoint_name(steps)
    save_checkpoint(path, state)
    assert_equal_states(load_checkpoint(path), state)
    described = read_description(path)
    assert described.step == steps
    assert described.tensors["parameters"]["embed.W_E"].sha256 == tensor_digest(
        state.parameters["embed.W_E"]
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_run_goes_on_as_if_it_had_not_stopped(
    session_after: SessionAfter, tiny: Benchmark, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    straight = session_after(7, optimizer=optimizer)
    for stop in (0, 1, 4):
        save_checkpoint(tmp_path / "x.pt", session_after(stop, optimizer=optimizer).state())
        state = load_checkpoint(tmp_path / "x.pt")
        session = TrainingSession(Setup(straight.config, benchmark=tiny), state=state)
        while session.step < 7:
            session.advance()
        assert_equal_states(session.state(), straight.state())


def test_equal_states_give_equal_bytes_wherever_they_are_saved(
    session_after: SessionAfter, tmp_path: Path
) -> None:
    first, second = (session_after(2).state({"a": 1}) for _ in range(2))
    save_checkpoint(tmp_path / "one.pt", first)
    save_checkpoint(tmp_path / "another_name.pt", second)
    written = {path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {encode_checkpoint(first)}
    assert encode_checkpoint(session_after(3).state({"a": 1})) not in written


def test_the_file_can_be_read_by_plain_torch(session_after: SessionAfter, tmp_path: Path) -> None:
    state = session_after(2).state()
    path = tmp_path / "x.pt"
    save_checkpoint(path, state)
    groups = torch.load(path, weights_only=True)
    assert list(groups) == ["parameters", "exp_avg", "exp_avg_sq"]
    for name, tensor in state.parameters.items():
        assert torch.equal(groups["parameters"][name], tensor)


def refused(path: Path, data: bytes) -> str | None:
    """The refusal of a file with these bytes, or None where it was read."""
    path.unlink(missing_ok=True)  # rewriting in place would wait for the disk
    path.write_bytes(data)
    return refusal(path)


def refusal(path: Path) -> str | None:
    try:
        load_checkpoint(path)
    except CircuitError as error:
        return str(error)
    return None


def test_no_flipped_bit_is_read_silently(small_state: TrainState, tmp_path: Path) -> None:
    data = encode_checkpoint(small_state)
    path = tmp_path / "step_000003.pt"
    assert refused(path, data) is None
    rng, flips, wrong, unnamed = random.Random(0), 1000, 0, 0
    for bit in rng.sample(range(8 * len(data)), flips):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        message = refused(path, bytes(flipped))
        wrong += message is None
        unnamed += message is not None and "step_000003.pt" not in message
    print(f"checkpoint: silently wrong {wrong} of {flips}")
    assert wrong == 0
    assert unnamed == 0


def test_a_flipped_bit_of_a_tensor_is_refused_by_the_tensors_name(
    small_state: TrainState, tmp_path: Path
) -> None:
    data = encode_checkpoint(small_state)
    rng = random.Random(0)
    groups = {"parameters": small_state.parameters, **small_state.moments}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            raw = tensor.numpy().tobytes()
            assert data.count(raw) == 1
            for _ in range(10):
                flipped = bytearray(data)
                flipped[data.index(raw) + rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
                message = refused(tmp_path / "x.pt", bytes(flipped))
                assert message is not None
                assert f"digest mismatch in {group} {name};" in message


def test_every_truncation_and_every_appendix_is_refused(
    small_state: TrainState, tmp_path: Path
) -> None:
    data = encode_checkpoint(small_state)
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    accepted = 0
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        accepted += refusal(path) is None
    print(f"checkpoint: truncations read {accepted} of {len(data)}")
    assert accepted == 0
    for extra in (b"\0", b"x" * 100, data):
        assert refused(path, data + extra) is not None


class RunsCode:
    """An object whose unpickling makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def with_footer(payload: bytes, description: dict[str, Any]) -> bytes:
    """A file whose every digest is right, around any payload."""
    described = {
        **description,
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
    }
    text = json.dumps(described).encode()
    footer = checkpoints._FOOTER.pack(len(text), hashlib.sha256(text).digest(), checkpoints._MAGIC)
    return payload + text + footer


def torch_saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("variable", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(
    small_state: TrainState,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    marker = tmp_path / "marker"
    path = tmp_path / "step_000003.pt"
    save_checkpoint(path, small_state)
    description = read_description(path).model_dump(exclude_unset=True)
    payloads = [
        torch_saved({"parameters": {"W": RunsCode(marker)}}),
        torch_saved(RunsCode(marker)),
        pickle.dumps(RunsCode(marker), protocol=4),  # of which torch warns
        pickle.dumps(RunsCode(marker), protocol=2),
    ]
    for payload in payloads:
        message = refused(path, with_footer(payload, description))
        assert message is not None
        assert "it holds more than tensors" in message
        assert "weights_only" not in message
        assert refused(path, payload) is not None
    executions = marker.exists()
    print(f"executions {int(executions)} of {2 * len(payloads)}")
    assert not executions
    pickle.loads(payloads[-1])
    assert marker.exists()  # it does run elsewhere


def test_a_payload_that_would_unfold_is_refused_before_it_does(
    small_state: TrainState, tmp_path: Path
) -> None:
    """torch reads compressed records, of which 1 MB may hold 1 GB; it writes none."""
    path = tmp_path / "x.pt"
    save_checkpoint(path, small_state)
    description = read_description(path).model_dump(exclude_unset=True)
    payload = torch_saved({"parameters": {"W": torch.zeros(10**6)}})
    compressed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(payload)) as whole,
        zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert len(compressed.getvalue()) < 10**5
    message = refused(path, with_footer(compressed.getvalue(), description))
    assert message is not None
    assert "its records are compressed" in message


@given(
    at=st.integers(0, 10**6),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    of_moment=st.booleans(),
)
def test_no_state_with_a_number_that_is_not_finite_is_written(
    make_config: MakeConfig, at: int, value: float, of_moment: bool
) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    moments = {"exp_avg": {name: tensor.clone() for name, tensor in tensors.items()}}
    state = TrainState(3, make_config(), "0" * 64, tensors, moments)
    assert encode_checkpoint(state)
    chosen = (moments["exp_avg"] if of_moment else tensors)["b" if at % 2 else "a"]
    chosen.view(-1)[at % chosen.numel()] = value
    with pytest.raises(DivergedError, match=r"(weights|exp_avg) of [ab] are not finite at step 3"):
        encode_checkpoint(state)


def test_payloads_that_are_no_state_are_refused_behind_a_valid_footer(
    small_state: TrainState, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, small_state)
    description = read_description(path).model_dump(exclude_unset=True)
    good = {"parameters": small_state.parameters, **small_state.moments}
    huge = torch.zeros(1).expand(10**6, 10**6)  # 4 bytes in the file
    swapped = dict(reversed(small_state.parameters.items()))
    for content, said in (
        ({}, "parameters"),
        ({**good, "parameters": swapped}, "parameters"),
        ([small_state.parameters], "parameters"),
        ({**good, "exp_avg": torch.zeros(2)}, "exp_avg"),
        ({**good, "exp_avg": small_state.parameters}, "digest mismatch in exp_avg W"),
        ({**good, "exp_avg": {**small_state.parameters, "W": 1}}, "exp_avg W is not the tensor"),
        ({**good, "exp_avg": {**small_state.parameters, "W": huge}}, "exp_avg W is not the tensor"),
        ({**good, "parameters": {**small_state.parameters, "c": torch.zeros(1)}}, "parameters"),
    ):
        message = refused(path, with_footer(torch_saved(content), description))
        assert message is not None
        assert said in message
    # a description that claims the same shape does not help
    listed = json.loads(json.dumps(description))
    listed["tensors"]["exp_avg"]["W"]["shape"] = [10**6, 10**6]
    claimed = {**good, "exp_avg": {**small_state.moments["exp_avg"], "W": huge}}
    message = refused(path, with_footer(torch_saved(claimed), listed))
    assert message is not None
    assert "exp_avg W is not the tensor" in message


def broken(state: TrainState, how: str) -> TrainState:
    """A state whose moments are unsound in one way."""
    moments = {group: dict(tensors) for group, tensors in state.moments.items()}
    name = "blocks.0.attn.W_Q"
    first = moments["exp_avg"]
    if how == "shape":
        first[name] = first[name][:, :-1]
    elif how == "transposed":
        first["blocks.0.mlp.W_in"] = first["blocks.0.mlp.W_in"].T.contiguous()
    elif how == "dtype":
        first[name] = first[name].double()
    elif how == "order":
        moments["exp_avg"] = dict(reversed(first.items()))
    elif how == "missing tensor":
        del first[name]
    elif how == "another tensor":
        first["blocks.9.attn.W_Q"] = first[name]
    elif how in ("nan", "infinite"):
        first[name] = first[name].clone()
        first[name][0, 0, 0] = float("nan" if how == "nan" else "inf")
    elif how == "negative second moment":
        second = moments["exp_avg_sq"]
        second[name] = -second[name].abs() - 1e-20
    elif how == "missing moment":
        del moments["exp_avg_sq"]
    elif how == "order of moments":
        moments = dict(reversed(moments.items()))
    elif how == "momentum of SGD":
        moments = {"momentum_buffer": first}
    else:
        assert how == "none"
        moments = {}
    return replace(state, moments=moments)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("shape", r"exp_avg of blocks\.0\.attn\.W_Q is torch\.float32 \[2, 15, 8\]; expected"),
        ("transposed", r"exp_avg of blocks\.0\.mlp\.W_in is torch\.float32 \[32, 16\]; expected"),
        ("dtype", r"exp_avg of blocks\.0\.attn\.W_Q is torch\.float64"),
        ("order", "exp_avg: .*their order"),
        ("missing tensor", r"exp_avg: .*blocks\.0\.attn\.W_Q"),
        ("another tensor", r"exp_avg: .*blocks\.9\.attn\.W_Q"),
        ("nan", r"exp_avg of blocks\.0\.attn\.W_Q are not finite"),
        ("infinite", r"exp_avg of blocks\.0\.attn\.W_Q are not finite"),
        ("negative second moment", r"exp_avg_sq of blocks\.0\.attn\.W_Q holds negative values"),
        ("missing moment", r"optimizer state holds \['exp_avg'\]; expected"),
        ("order of moments", r"optimizer state holds \['exp_avg_sq', 'exp_avg'\]; expected"),
        ("momentum of SGD", r"optimizer state holds \['momentum_buffer'\]; expected .*adamw"),
        ("none", r"optimizer state holds \[\]; expected"),
    ],
)
def test_unsound_moments_are_refused_by_name(
    session_after: SessionAfter, tiny: Benchmark, tmp_path: Path, how: str, said: str
) -> None:
    session = session_after(2)
    save_unsound(tmp_path / "x.pt", broken(session.state(), how))
    state = load_checkpoint(tmp_path / "x.pt")  # the file is what was saved; its content is wrong
    with pytest.raises(CircuitError, match=said):
        TrainingSession(Setup(session.config, benchmark=tiny), state=state)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 12),
        ("batch_size", 9),
        ("train_split", "validation_iid"),
        ("gradient_clip", 2.0),
        ("optimizer", {**ADAMW, "beta2": 0.99}),
        ("optimizer", OPTIMIZERS[1]),
        ("schedule", {"name": "linear"}),
        ("kernels", "plain"),
        (
            "model",
            {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32, "max_sequence_length": 40},
        ),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_by_the_field(
    session_after: SessionAfter, make_config: MakeConfig, tiny: Benchmark, field: str, value: Any
) -> None:
    state = session_after(1).state()
    other = make_config(**{field: value})
    setup = Setup(other, benchmark=tiny)
    for use in (setup.model, partial(TrainingSession, setup)):
        with pytest.raises(CircuitError, match=f"belongs to another config: {field}"):
            use(state=state)


def test_a_checkpoint_of_another_benchmark_is_refused(
    session_after: SessionAfter, tiny: Benchmark
) -> None:
    state = session_after(1).state()
    other = replace(tiny, digest="f" * 64)
    setup = Setup(state.config, benchmark=other)
    for use in (setup.model, partial(TrainingSession, setup)):
        with pytest.raises(CircuitError, match="trained on another benchmark: digest") as caught:
            use(state=state)
        assert tiny.digest[:12] in str(caught.value)
        assert "f" * 12 in str(caught.value)


def test_a_restored_model_has_the_saved_weights_and_no_more(
    session_after: SessionAfter, tiny: Benchmark
) -> None:
    session = session_after(3)
    state = session.state()
    kept = tensors_digest(state.parameters)
    model = Setup(session.config, benchmark=tiny).model(state)
    assert tensors_digest(dict(model.named_parameters())) == kept
    session.advance()  # a state is a copy
    assert tensors_digest(state.parameters) == kept
    assert tensors_digest(session.state().parameters) != kept


def test_checkpoints_are_listed_by_step_and_a_missing_one_says_which_there_are(
    small_state: TrainState, tmp_path: Path
) -> None:
    with pytest.raises(CircuitError, match="no such checkpoint; no checkpoints in"):
        load_checkpoint(tmp_path / checkpoint_name(1))
    for name in ("best.pt", "step_12.pt", ".step_000009.pt.circuit-tmp", "step_000005.pt.old"):
        (tmp_path / name).write_bytes(b"")
    for step in (1_234_567, 20, 3):
        save_checkpoint(tmp_path / checkpoint_name(step), replace(small_state, step=step))
    assert list(list_checkpoints(tmp_path)) == [3, 20, 1_234_567]
    for step, path in list_checkpoints(tmp_path).items():
        assert load_checkpoint(path).step == step == checkpoint_step(path)
    assert checkpoint_step(tmp_path / "best.pt") is None
    with pytest.raises(CircuitError, match="there are 3 from step 3 to 1234567"):
        load_checkpoint(tmp_path / checkpoint_name(4))
