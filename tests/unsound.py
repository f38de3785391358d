"""States that this program does not write, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from circuit.training.checkpoints import TrainState, save_checkpoint


def save_unsound(path: Path, state: TrainState) -> None:
    """A checkpoint with numbers that may not be finite, rightly digested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainState, "not_finite", None)
        save_checkpoint(path, state)
