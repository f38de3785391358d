"""A HookedTransformer's weights as a bridge holds them: the same numbers, heads and function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from new_shapes import NEW_SHAPES

from circuit.core.flat import ParameterLayout
from circuit.core.groups import PARTITIONS, atoms
from circuit.errors import CircuitError
from circuit.model.bridge import plain_bridge
from circuit.model.initial import draw_weights
from circuit.model.kinds import build, installed_kind
from circuit.model.layout import (
    bridge_config,
    bridge_tensors,
    hooked_tensors,
    standard_bridge_tensors,
)
from circuit.model.shapes import expected_shapes
from circuit.model.standard import logit_gap
from circuit.model.weights import named_tensors
from circuit.train_config import ModelConfig, ModelKind

VOCABULARY = 11
SHAPES: dict[str, dict[str, Any]] = {"usual": {}, "untied": {"tied_unembedding": False}}
SHAPES |= NEW_SHAPES
every_shape = pytest.mark.parametrize("name", SHAPES)


def shape_of(name: str, kind: ModelKind = "hooked_transformer") -> ModelConfig:
    usual = {"layers": 2, "heads": 3, "d_model": 12, "d_ff": 10, "max_sequence_length": 7}
    return ModelConfig(**{**usual, **SHAPES[name], "kind": kind})


def weights_of(shape: ModelConfig) -> dict[str, torch.Tensor]:
    drawn = dict(draw_weights(expected_shapes(shape, VOCABULARY).items(), shape, seed=5))
    generator = torch.Generator().manual_seed(1)  # no two weights are equal
    return {name: t + torch.rand(t.shape, generator=generator) / 9 for name, t in drawn.items()}


@every_shape
def test_there_and_back_is_every_bit_in_the_order_of_a_bridge(name: str) -> None:
    hooked = weights_of(shape_of(name))
    bridge = bridge_tensors(hooked)
    back = hooked_tensors(bridge, shape_of(name, "bridge"))
    assert set(back) == set(hooked)
    assert all(torch.equal(back[key], hooked[key]) for key in hooked)
    assert list(bridge_tensors(back)) == list(bridge)
    assert list(bridge)[:3] != sorted(bridge)[:3]


@every_shape
@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_group_of_either_layout_holds_the_same_numbers(name: str, partition: Any) -> None:
    hooked = weights_of(shape_of(name))
    grouped = []
    for tensors in (hooked, bridge_tensors(hooked)):
        layout = ParameterLayout.of_shapes({key: t.shape for key, t in tensors.items()}, heads=3)
        vector = torch.cat([t.reshape(-1) for t in tensors.values()])[None]
        groups: dict[str, list[torch.Tensor]] = {}
        for atom in atoms(layout):
            mask = torch.zeros(layout.size, dtype=torch.bool)
            atom.choose(mask)
            assert torch.equal(vector[0, mask], atom.of(vector)[0])
            groups.setdefault(atom.group(partition), []).append(atom.of(vector)[0])
        grouped.append({key: torch.cat(parts).sort().values for key, parts in groups.items()})
        assert sum(map(len, grouped[-1].values())) == vector.numel()
    ours, theirs = grouped
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@every_shape
def test_plain_transformer_lens_computes_the_same_logits_from_what_is_converted(name: str) -> None:
    shape = shape_of(name, installed_kind())
    model = build(shape, vocabulary_size=VOCABULARY, seed=3, kernels="plain")
    tensors = standard_bridge_tensors(named_tensors(model), shape)
    plain = plain_bridge(bridge_config(shape, VOCABULARY), tensors)
    gap, largest = logit_gap(model, plain)
    assert gap <= 2e-6 * largest


def test_the_kind_that_is_not_installed_is_refused_with_what_to_install() -> None:
    kinds: set[ModelKind] = {"hooked_transformer", "bridge"}
    (other,) = kinds - {installed_kind()}
    with pytest.raises(CircuitError) as refused:
        build(shape_of("usual", other), vocabulary_size=VOCABULARY, seed=0, kernels="plain")
    assert "pip install" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_config_that_says_nothing_is_of_a_hooked_transformer() -> None:
    assert shape_of("usual").kind == "hooked_transformer"
    assert "kind" not in shape_of("usual").model_dump()
    assert shape_of("usual", "bridge").model_dump()["kind"] == "bridge"
