"""The stand-in for a GPU refuses what a GPU refuses, and computes what a CPU computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_in import NAME, stand_in_gpu
from torch import Tensor
from torch.nn import functional

from circuit.core.digests import tensor_digest
from circuit.environment import CUBLAS_WORKSPACE, environment_facts, prepare_process
from circuit.errors import CircuitError
from circuit.training.session import TrainingSession


@pytest.mark.parametrize(
    "mixed",
    [
        lambda here, there: here + there,
        lambda here, there: there.add_(here),
        lambda here, there: here[None] @ there[:, None],
        lambda here, there: here[there.long()],
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.where(there > 0, there, here),
        lambda here, there: there.index_select(0, here.long()),
        lambda here, there: there.numpy(),
        lambda here, there: there.cumsum(0),
        lambda here, there: there.median(0),
        lambda here, there: functional.cross_entropy(there.expand(1, 3, 3), there[None].long()),
    ],
)
def test_it_refuses(mixed: Callable[[Tensor, Tensor], Any]) -> None:
    with stand_in_gpu():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError):
            mixed(here, there)


def test_it_computes_what_a_cpu_computes_and_its_digest_is_that_of_the_numbers() -> None:
    numbers = torch.linspace(-1, 1, 12).view(3, 4)
    with stand_in_gpu():
        moved = numbers.to("cuda")
        assert (moved.device.type, moved.cpu().device.type) == ("cuda", "cpu")
        assert tensor_digest(moved) == tensor_digest(numbers)
        assert tensor_digest(moved @ moved.T) == tensor_digest(numbers @ numbers.T)
        assert moved[torch.tensor([0, 2])].tolist() == numbers[[0, 2]].tolist()
        assert torch.equal(moved[[2, 0], :][:, [3]].cpu(), numbers[[2, 0]][:, [3]])
        assert torch.arange(3, device=moved.device).is_cuda
        leaf = numbers.clone().requires_grad_()
        (leaf.to("cuda") * moved).sum().backward()
        assert torch.equal(leaf.grad, numbers)  # type: ignore[arg-type]


def test_a_session_keeps_weights_moments_and_batches_on_its_device(
    session_after: Callable[..., TrainingSession],
) -> None:
    with stand_in_gpu():
        session = session_after(2, device="cuda")
        outcome = session.advance()
        tensors = [*session.model.parameters(), *session.model.buffers()]
        tensors += [outcome.batch.inputs, outcome.batch.targets]
        for parameter, state in session.optimizer.state.items():
            tensors += [parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
            assert state["step"].device.type == "cpu"  # as torch keeps it
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        state = session.state()
        saved = [*state.parameters.values(), *state.moments["exp_avg"].values()]
        assert {tensor.device.type for tensor in saved} == {"cpu"}


def test_cublas_is_made_deterministic_before_a_model_is_and_recorded(
    session_after: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in_gpu():
        session_after(0, device="cuda")
        facts = environment_facts("cuda")
        assert facts["variables"][CUBLAS_WORKSPACE] == ":4096:8"
        assert (facts["deterministic"], facts["device_name"]) == (True, NAME)
        with monkeypatch.context() as patch:
            patch.setenv(CUBLAS_WORKSPACE, ":0:0")
            with pytest.raises(CircuitError, match="is ':0:0', with which products"):
                prepare_process(device="cuda")
