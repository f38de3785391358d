"""Digests tell apart whatever differs, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from circuit.core.digests import tensor_digest, tensors_digest


def test_digests_tell_names_order_shape_type_and_bits_apart() -> None:
    x = torch.arange(6.0)
    variants = [x, x.view(2, 3), x.double(), x.to(torch.float16), -x, x.flip(0), x[:5]]
    variants.append(torch.tensor([-0.0, *x[1:].tolist()]))
    assert len({tensor_digest(variant) for variant in variants}) == len(variants)
    assert tensor_digest(x.view(2, 3).T) == tensor_digest(x.view(2, 3).T.contiguous())
    named: list[dict[str, Tensor]] = [
        {"a": x, "b": -x},
        {"b": -x, "a": x},
        {"a": -x, "b": x},
        {"a": x},
        {"c": x, "b": -x},
    ]
    assert len({tensors_digest(tensors) for tensors in named}) == len(named)
