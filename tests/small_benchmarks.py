"""A small benchmark of every task, for the laws that run over all of them."""

from __future__ import annotations

from typing import Any

LOOKUP_SPLIT = {
    "samples": 20,
    "active_keys": {"min": 2, "max": 3},
    "overwrite_count": {"min": 8, "max": 8},
    "num_queries": {"min": 3, "max": 6},
    "query_lag": {"min": 1, "max": 2},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "symbolic_kv_stream": {
        "num_keys": 4,
        "num_values": 64,
        "holdout_answer_pair_fraction": 0.3,
        "heuristic_max_accuracy": 1.0,
        "splits": {
            "train": LOOKUP_SPLIT,
            "heldout_pairs": {**LOOKUP_SPLIT, "answer_pairs": "heldout"},
            "counterfactual": {"samples": 10, "counterfactual_of": "train"},
        },
    },
    "modular_addition": {"modulus": 7, "train_fraction": 0.5},
    "induction": {"vocabulary_size": 8, "length": 5, "validation_records": 12},
}
"""Without what all configs hold; a new task needs one here."""

HELD = {
    "symbolic_kv_stream": "heldout_pairs",
    "modular_addition": "test",
    "induction": "validation",
}
"""The split of each that is looked at."""
