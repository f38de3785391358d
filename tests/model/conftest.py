"""A small model of the installed kind, which tests leave as it is, and what it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from circuit.model.kinds import build, installed_kind
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


@pytest.fixture(scope="session")
def shape() -> ModelConfig:
    return ModelConfig(
        layers=2, heads=2, d_model=16, d_ff=32, max_sequence_length=12, kind=installed_kind()
    )


@pytest.fixture(scope="module")
def model(shape: ModelConfig) -> HookedTransformer:
    return build(shape, vocabulary_size=20, seed=1)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 20, (3, 10), generator=torch.Generator().manual_seed(2))
