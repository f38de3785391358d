"""Path rules where gradients jump along a step: they converge, and `auto` keeps its word."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit.attribution.attribute import Attributor, Way
from circuit.core.flat import Flat, ParameterLayout
from circuit.model.build import build_model
from circuit.scalars.base import Cache, Needs
from circuit.train_config import ModelConfig

SHAPE = ModelConfig(layers=1, heads=1, d_model=4, d_ff=8, max_sequence_length=4)
MOST = 65


@dataclass(frozen=True)
class Kinks:
    """`sum of relu(w - c)` over some weights, and an offset; its gradient jumps where `w = c`."""

    at: Float[Tensor, " kink"]
    offset: float = 0.0
    name: str = "kinks"
    needs: Needs = field(default_factory=lambda: Needs((), ()))
    constant: bool = True

    def bind(self, model: HookedTransformer) -> Kinks:
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        weights = model.blocks[0].mlp.W_in.flatten()[: len(self.at)]
        return (weights - self.at).relu().sum()[None] + self.offset


@dataclass(frozen=True)
class Cubic:
    """The sum of cubes of some weights: Simpson's rule is exact."""

    name: str = "cubic"
    needs: Needs = field(default_factory=lambda: Needs((), ()))
    constant: bool = True

    def bind(self, model: HookedTransformer) -> Cubic:
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        return model.blocks[0].mlp.W_in.pow(3).sum()[None]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build_model(SHAPE, vocabulary_size=5, seed=0, dtype=torch.float64)


@dataclass(frozen=True)
class Line:
    """A step of two terms from zero, and kinks that some weights pass on it.

    Attributes:
        shares: of each term, exactly.
    """

    theta: Flat
    terms: Float[Tensor, "term parameter"]
    scalar: Kinks
    shares: Float[Tensor, " term"]

    @classmethod
    def drawn(cls, model: HookedTransformer, kinks: int, seed: int) -> Line:
        layout, draw = ParameterLayout.of_model(model), torch.Generator().manual_seed(seed)
        terms = torch.randn(2, layout.size, generator=draw, dtype=torch.float64)
        start, _ = layout.range("blocks.0.mlp.W_in")
        own = terms[:, start : start + kinks]
        passed = torch.rand(kinks, generator=draw, dtype=torch.float64)  # where on the way
        step = own.sum(0)
        # above its kink a weight is behind it if it rises, and before it if it falls
        above = torch.where(step > 0, 1 - passed, passed)
        theta = torch.zeros(layout.size, dtype=torch.float64)
        return cls(theta, terms, Kinks(passed * step), own @ above)

    def along(self, model: HookedTransformer, rule: str, offset: float = 0.0) -> Way:
        dtype = next(model.parameters()).dtype
        scalar = Kinks(self.scalar.at.to(dtype), offset)
        attributor = Attributor(model, [scalar], rule=rule)
        end = self.theta + self.terms.sum(0)
        return attributor.along(self.theta, end, [scalar], self.terms)


@settings(max_examples=12)
@given(kinks=st.integers(1, 32), seed=st.integers(0, 10**6), power=st.integers(1, 3))
def test_where_auto_says_so_it_closes_to_its_tolerance(
    model: HookedTransformer, kinks: int, seed: int, power: int
) -> None:
    tolerance = 10.0**-power
    line = Line.drawn(model, kinks, seed)
    way = line.along(model, f"auto:{tolerance}")
    actual = float(way.after - way.before)
    assert actual == pytest.approx(float(line.shares.sum()), rel=1e-9, abs=1e-12)
    assert way.agrees is not None
    if way.agrees[0]:
        assert abs(float(way.path.sum()) - actual) <= tolerance * abs(actual)
    else:
        assert way.nodes == (MOST,)


def test_its_terms_are_those_of_a_fine_rule(model: HookedTransformer) -> None:
    """Of many kinks, as a network has them, no term is off by more than a few tolerances."""
    agreed = 0
    for seed in range(12):
        line = Line.drawn(model, 32, seed)
        way = line.along(model, "auto:0.05")
        assert way.agrees is not None
        if way.agrees[0]:
            agreed += 1
            off = (way.path[0].sum(1) - line.shares).abs().max()
            assert float(off) <= 3 * 0.05 * abs(float(way.after - way.before))
    assert agreed >= 6


def test_composite_midpoints_converge_at_kinks_where_simpson_stays(
    model: HookedTransformer,
) -> None:
    errors: dict[str, float] = {}
    for rule in ("simpson", "midpoint:10", "midpoint:90"):
        found = [(line, line.along(model, rule)) for line in drawn_lines(model)]
        off = [(way.path[0].sum(1) - line.shares).abs().sum() for line, way in found]
        errors[rule] = float(sum(off))
    assert errors["midpoint:10"] < errors["simpson"] / 3
    assert errors["midpoint:90"] < errors["midpoint:10"] / 4


def drawn_lines(model: HookedTransformer) -> list[Line]:
    return [Line.drawn(model, 32, seed) for seed in range(8)]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts forward and backward passes."""
    counted = {"forward": 0, "backward": 0}
    evaluate, values, grad = Attributor.evaluate, Attributor.values, torch.autograd.grad

    def counting(of: str, call: Callable[..., object]) -> Callable[..., object]:
        def counted_call(*args: object, **kwargs: object) -> object:
            counted[of] += 1
            return call(*args, **kwargs)

        return counted_call

    monkeypatch.setattr(Attributor, "evaluate", counting("forward", evaluate))
    monkeypatch.setattr(Attributor, "values", counting("forward", values))
    monkeypatch.setattr(torch.autograd, "grad", counting("backward", grad))
    return counted


COSTS = {
    "midpoint": [(3, 2), (3, 2)],  # start for first order, middle, and the end for its value
    "simpson": [(3, 3), (2, 2)],  # the end is the next step's start
    "midpoint:10": [(12, 11), (12, 11)],
    "auto:1e-3": [(5, 5), (4, 4)],
}


@pytest.mark.parametrize(("rule", "costs"), COSTS.items(), ids=list(COSTS))
def test_what_a_smooth_scalar_costs(
    model: HookedTransformer, passes: dict[str, int], rule: str, costs: list[tuple[int, int]]
) -> None:
    scalar, line = Cubic(), Line.drawn(model, 1, 3)
    attributor = Attributor(model, [scalar], rule=rule)
    for number, expected in enumerate(costs):
        passes.update(forward=0, backward=0)
        start = line.theta + number * line.terms.sum(0)
        way = attributor.along(start, start + line.terms.sum(0), [scalar], line.terms)
        assert (passes["forward"], passes["backward"]) == expected
        if rule.startswith("auto"):
            assert (way.nodes, way.agrees) == ((5,), (True,))


def test_each_scalar_has_its_own_nodes_and_forward_passes_are_shared(
    model: HookedTransformer, passes: dict[str, int]
) -> None:
    line = Line.drawn(model, 7, 1)
    scalars = [Cubic(), line.scalar]
    end = line.theta + line.terms.sum(0)
    together = Attributor(model, scalars, rule="auto:1e-6")
    both = together.along(line.theta, end, scalars, line.terms)
    assert both.nodes == (5, MOST)
    assert both.agrees == (True, False)
    assert passes == {"forward": MOST, "backward": 5 + MOST}
    for place, scalar in enumerate(scalars):
        attributor = Attributor(model, [scalar], rule="auto:1e-6")
        alone = attributor.along(line.theta, end, [scalar], line.terms)
        assert alone.nodes[0] == both.nodes[place]
        torch.testing.assert_close(alone.path[0], both.path[place], rtol=1e-12, atol=1e-14)


def test_a_step_that_changes_nothing_agrees_at_once(model: HookedTransformer) -> None:
    line = Line.drawn(model, 3, 0)
    scalar = Cubic()
    attributor = Attributor(model, [scalar], rule="auto:1e-3")
    still = torch.zeros_like(line.terms)
    way = attributor.along(line.theta, line.theta, [scalar], still)
    assert (way.nodes, way.agrees) == ((5,), (True,))
    assert not way.path.any()


def test_nodes_end_where_a_scalar_cannot_tell_them_apart(model: HookedTransformer) -> None:
    """An offset takes digits of float32, and with them nodes; float64 has digits to spare."""
    offset = 1e4
    last_place = offset * torch.finfo(torch.float32).eps
    single = build_model(SHAPE, vocabulary_size=5, seed=0)
    lines = drawn_lines(model)[:3]
    for line in lines:
        plain, far = (line.along(single, "auto:1e-6", at) for at in (0.0, offset))
        assert (plain.nodes, plain.agrees, plain.rounded) == ((MOST,), (False,), (False,))
        assert far.agrees is not None
        assert far.rounded is not None
        if far.rounded[0]:
            assert abs(float(far.path.sum() - (far.after - far.before))) <= 1.001 * last_place
            assert not far.agrees[0]
        else:
            assert far.nodes == (MOST,)
        exact = [line.along(model, "auto:1e-3", at) for at in (0.0, offset)]
        assert exact[0].nodes == exact[1].nodes
        assert exact[0].agrees == exact[1].agrees
        assert [way.rounded for way in exact] == [(False,), (False,)]
    ended = [line.along(single, "auto:1e-6", 1e4 * offset) for line in lines]
    assert {(way.nodes, way.rounded) for way in ended} == {((5,), (True,))}


def test_levels_stop_where_two_agree(model: HookedTransformer) -> None:
    """A wider tolerance never takes more nodes."""
    for line in drawn_lines(model)[:4]:
        nodes = [line.along(model, f"auto:{t}").nodes[0] for t in (0.3, 0.1, 0.03, 0.001)]
        assert all(wide <= narrow for wide, narrow in itertools.pairwise(nodes))
