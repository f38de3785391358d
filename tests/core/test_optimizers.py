"""Steps of torch's optimizers, read off the optimizer, are split into terms that sum to them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from torch import Tensor, nn

from circuit.core.edit import Edit
from circuit.core.flat import ParameterLayout
from circuit.core.optimizers import (
    TakenStep,
    groups_of,
    kind_of,
    moments_of,
    names_by_id,
    past_of,
    rule_of,
)
from circuit.core.update import OUTSIDE
from circuit.errors import CircuitError

WORST_ULPS = 8.0
"""See tests/trace/test_terms.py."""

rates = st.floats(1e-5, 0.1)
decays = st.one_of(st.just(0.0), st.floats(1e-4, 0.5))
betas = st.tuples(st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.sampled_from([0.9, 0.95, 0.999]))
implementations = st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
adam_group = st.fixed_dictionaries(
    {"lr": rates, "weight_decay": decays, "betas": betas, "eps": st.sampled_from([1e-8, 1e-5])}
)
sgd_group = st.fixed_dictionaries({"lr": rates, "weight_decay": decays}).flatmap(
    lambda group: st.one_of(
        st.just({**group, "momentum": 0.9, "nesterov": True}),
        st.builds(
            lambda momentum, dampening: {**group, "momentum": momentum, "dampening": dampening},
            st.sampled_from([0.0, 0.5, 0.95]),
            st.sampled_from([0.0, 0.3]),
        ),
    )
)
flags = st.fixed_dictionaries({"maximize": st.booleans()})
drawn = st.one_of(
    st.tuples(
        st.sampled_from([torch.optim.AdamW, torch.optim.Adam]),
        st.tuples(adam_group, adam_group),
        st.builds(dict, amsgrad=st.booleans(), maximize=st.booleans()),
    ),
    st.tuples(st.just(torch.optim.SGD), st.tuples(sgd_group, sgd_group), flags),
)


def small(seed: int) -> tuple[nn.Module, list[nn.Parameter], torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module, list(module.parameters()), generator


def taken(
    module: nn.Module, optimizer: torch.optim.Optimizer, decoupled: bool = False
) -> TakenStep:
    """One step, read off the optimizer."""
    names = names_by_id(module)

    def weights() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in module.named_parameters()}

    before, past = weights(), past_of(optimizer, names)
    gradient = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    groups = groups_of(optimizer, names)
    optimizer.step()
    memory, kind = past_of(optimizer, names), kind_of(optimizer)
    return TakenStep(kind, decoupled, groups, before, weights(), gradient, past, memory, {})


@laws(max_examples=60)
@given(drawn, implementations, st.integers(0, 2**31), st.floats(-4, 1))
def test_terms_sum_to_the_update_for_all_groups_and_flags(
    drawn: tuple[Any, ...], implementation: dict[str, Any], seed: int, scale: float
) -> None:
    """Two groups, a parameter in neither, and one that has a gradient at some steps only."""
    kind, groups, flags = drawn
    module, parameters, generator = small(seed)
    members = ([parameters[0], parameters[1]], [parameters[2]])
    optimizer = kind(
        [{"params": own, **group} for own, group in zip(members, groups, strict=True)],
        **flags,
        **implementation,
    )
    layout = ParameterLayout.of_model(module)
    for t in range(4):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise * 10**scale
        if t % 2:
            parameters[0].grad = None
        step = taken(module, optimizer)
        update = step.terms(layout)
        exact = layout.flatten(step.after).double() - layout.flatten(step.before).double()
        assert torch.equal(update.total, exact)
        assert update.rounding_ulps() <= WORST_ULPS
        still = slice(*layout.range("2.bias"))
        assert all(not vector[still].any() for vector in update.named().values())


@pytest.mark.parametrize("maximize", [False, True])
def test_plain_sgd_is_its_own_reference_and_direction(maximize: bool) -> None:
    """With either sign by which a gradient is read."""
    module, parameters, generator = small(5)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    step = taken(module, torch.optim.SGD(parameters, lr=0.1, maximize=maximize))
    layout = ParameterLayout.of_model(module)
    update = step.terms(layout)
    assert torch.equal(update.references()["clipped_sgd"], update.terms["current_gradient"])
    moved = Edit(0, 1, direction={"gradient": 1.0}).moved(step, layout)
    torch.testing.assert_close(moved, layout.flatten(step.after))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_terms_stand_in_the_order_of_the_layout(order: tuple[int, ...]) -> None:
    """An optimizer's one group may hold the module's parameters in an order of its own."""
    module, parameters, generator = small(4)
    optimizer = torch.optim.AdamW([parameters[place] for place in order])
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    step = taken(module, optimizer)
    layout = ParameterLayout.of_model(module)
    exact = layout.flatten(step.after).double() - layout.flatten(step.before).double()
    assert torch.equal(step.terms(layout).total, exact)


def test_the_first_term_of_coupled_decay_goes_through_the_denominator() -> None:
    """Adam with L2, against its formula: decay is a gradient of `weight_decay * theta`."""
    module, parameters, generator = small(3)
    optimizer = torch.optim.Adam(parameters, lr=0.1, weight_decay=0.3)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    step = taken(module, optimizer)
    layout = ParameterLayout.of_model(module)
    theta = layout.flatten(step.before).double()
    read = layout.flatten(step.gradient).double() + 0.3 * theta
    found = step.terms(layout).terms["weight_decay"]
    # at the first step m_hat / sqrt(v_hat) is the sign of what was read
    torch.testing.assert_close(found, -0.1 * 0.3 * theta / (read.abs() + 1e-8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_with_which_an_update_is_not_split_are_named(flag: str) -> None:
    module, parameters, _ = small(0)
    optimizer = torch.optim.AdamW(parameters, **{flag: True})
    (group,) = groups_of(optimizer, names_by_id(module))
    with pytest.raises(CircuitError, match=f"AdamW has {flag}=True"):
        rule_of(kind_of(optimizer), group.settings)


class Lion(torch.optim.Optimizer):
    """Of Chen et al. 2023: nobody's here."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((0.9 * mean + 0.1 * p.grad).sign(), alpha=-group["lr"])
                mean.lerp_(p.grad, 0.01)


@pytest.mark.parametrize(
    ("build", "decoupled", "columns"),
    [
        (lambda p: Lion(p), True, ["decoupled_decay", "rest"]),
        (lambda p: Lion(p), False, ["rest"]),
        (lambda p: torch.optim.RMSprop(p, weight_decay=0.1), False, ["rest"]),
        (lambda p: torch.optim.RMSprop(p, weight_decay=0.1), True, ["rest"]),  # torch's is coupled
        (
            lambda p: torch.optim.NAdam(p, weight_decay=0.1, decoupled_weight_decay=True),
            False,
            ["decoupled_decay", "rest"],
        ),
        (
            lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], weight_decay=0.1),
            False,
            ["decoupled_decay", "rest"],
        ),
    ],
    ids=["Lion", "Lion, not told", "RMSprop", "RMSprop, told wrongly", "NAdam", "Muon"],
)
def test_any_other_optimizer_is_its_decoupled_decay_and_the_rest(
    build: Any, decoupled: bool, columns: list[str]
) -> None:
    module, parameters, generator = small(1)
    optimizer = build(parameters)
    layout = ParameterLayout.of_model(module)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        step = taken(module, optimizer, decoupled)
        update = step.terms(layout)
        assert list(update.terms) == columns
        terms = torch.stack(list(update.named().values()))
        torch.testing.assert_close(terms.sum(0), update.total, rtol=0, atol=1e-15)
        if "decoupled_decay" in columns:
            weight = slice(*layout.range("0.weight"))
            rate, decay = optimizer.param_groups[0]["lr"], 0.1
            theta = layout.flatten(step.before).double()[weight]
            assert torch.equal(update.terms["decoupled_decay"][weight], theta * (-rate * decay))


def test_a_change_between_steps_is_a_term_of_its_own() -> None:
    module, parameters, generator = small(2)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    left = parameters[1].detach().clone()
    with torch.no_grad():
        parameters[1].clamp_(-0.1, 0.1)
    step = taken(module, optimizer)
    outside = TakenStep(**{**vars(step), "outside": {"0.bias": left}})
    layout = ParameterLayout.of_model(module)
    update = outside.terms(layout)
    whole = layout.flatten({**step.before, "0.bias": left}).double()
    assert torch.equal(update.total, layout.flatten(step.after).double() - whole)
    found = layout.unflatten(update.terms[OUTSIDE])
    assert torch.equal(found["0.bias"], step.before["0.bias"].double() - left.double())
    assert not found["0.weight"].any()


def test_a_parameter_of_another_module_is_refused() -> None:
    module, _, _ = small(0)
    _, others, _ = small(1)
    optimizer = torch.optim.SGD(others, lr=0.1)
    with pytest.raises(CircuitError, match=r"parameter 0 \[7, 5\] of group 0 of SGD is none of"):
        groups_of(optimizer, names_by_id(module))


def test_moments_of_a_parameter_without_any_are_zero() -> None:
    layout = ParameterLayout.of_shapes({"a": (2,), "b": ()})
    past = {"a": {"mean": torch.ones(2), "step": torch.tensor(3.0)}, "b": {}}
    found = moments_of(past, layout)
    assert list(found) == ["mean"]
    assert found["mean"].tolist() == [1.0, 1.0, 0.0]
    assert math.isfinite(float(found["mean"].sum()))


def test_moments_of_a_parameter_without_axes_are_its_own_and_factored_ones_are_none() -> None:
    number = ParameterLayout.of_shapes({"b": ()})
    past = {"b": {"step": torch.tensor(3.0), "mean": torch.tensor(2.0)}}
    assert {key: v.tolist() for key, v in moments_of(past, number).items()} == {"mean": [2.0]}
    layout = ParameterLayout.of_shapes({"a": (3, 2), "b": (1, 2)})
    rows = {"a": {"column": torch.ones(1, 2)}, "b": {"column": torch.ones(1, 2)}}
    assert moments_of(rows, layout) == {}
