"""Gradients that are taken with their graphs stand in `.grad` as `backward` leaves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuit.core.graphs import Graphs


class Odd(nn.Module):
    """A tied matrix, one that is laid out by columns, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.turned = nn.Parameter(torch.randn(3, 5).T)
        self.back = nn.Linear(3, 5)
        self.unread = nn.Parameter(torch.ones(2))
        self.unembed = nn.Linear(5, 7, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Any:
        return self.unembed(self.back(torch.tanh(self.embed(tokens) @ self.turned)))


@pytest.mark.parametrize("frozen", ["", "embed.weight", "back.bias"])
def test_a_held_gradient_is_that_of_backward(frozen: str) -> None:
    """None included: an optimizer decays what has a gradient of zeros."""
    torch.manual_seed(0)
    module, tokens = Odd(), torch.arange(12).reshape(2, 6) % 7
    parameters = dict(module.named_parameters())
    if frozen:
        parameters[frozen].requires_grad_(False)

    def taken(model: Any) -> tuple[Tensor, Tensor]:
        outputs = model(tokens)
        return outputs, outputs.logsumexp(-1) / tokens.numel()

    outputs, losses = taken(module)
    losses.sum().backward()
    plain = {name: parameter.grad for name, parameter in parameters.items()}
    module.zero_grad(set_to_none=True)
    graphs = Graphs(range(1, 2), torch.float32, 2**30)
    held = graphs.outputs(1, module, taken)
    assert held is not None
    assert torch.equal(held, outputs)
    for name, parameter in parameters.items():
        found, expected = parameter.grad, plain[name]
        assert (found is None) == (expected is None) == (name in ("unread", frozen))
        if found is not None and expected is not None:
            assert found.stride() == parameter.stride()
            torch.testing.assert_close(found, expected)
    assert graphs.pop(1) is not None
