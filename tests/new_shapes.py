"""Shapes of models beside pre-LN with MLPs of exact GELU, biases and a tied unembedding.

For laws that hold for all of them; a new field of `ModelConfig` needs a line here.
"""

from __future__ import annotations

from typing import Any

GROKKING: dict[str, Any] = {
    "activation": "relu",
    "normalization": "none",
    "biases": False,
    "tied_unembedding": False,
    "initialization": "transformer_lens",
}
"""Of Nanda et al. 2023."""

NEW_SHAPES: dict[str, dict[str, Any]] = {
    "grokking": GROKKING,
    "attention alone": {"d_ff": 0},
    "attention alone, nothing else": {"d_ff": 0, "normalization": "none", "biases": False},
    "relu": {"activation": "relu"},
    "no normalization": {"normalization": "none"},
    "no biases": {"biases": False},
}
"""Fields that differ from their defaults, by name of the shape."""
