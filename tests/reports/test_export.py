"""An exported model is the run's, as either TransformerLens loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import RUN

from circuit.errors import CircuitError
from circuit.model.kinds import installed_kind
from circuit.reports.export import export_checkpoint
from circuit.runs.opening import open_run

CHECKPOINT = RUN / "checkpoints" / "step_000012.pt"


def test_a_run_of_either_kind_becomes_a_bridge_with_its_logits(trained: Path) -> None:
    result = export_checkpoint(open_run(RUN).config, CHECKPOINT, "bridge", kind="bridge")
    assert [path.name for path in result.paths] == ["model.safetensors", "config.json"]
    assert result.gap <= 2e-6 * result.largest
    assert "boot_native" in "".join(result.load)


def test_the_untied_model_has_the_runs_logits(trained: Path) -> None:
    from circuit.model.standard import logit_gap

    run = open_run(RUN)
    untied = run.model(12, untied=True)
    gap, largest = logit_gap(run.model(12), untied)
    assert gap <= 2e-6 * largest
    assert untied.W_U.data_ptr() != untied.W_E.data_ptr()


def test_a_kind_is_the_runs_where_nothing_is_said(trained: Path) -> None:
    config = open_run(RUN).config
    told = export_checkpoint(config, CHECKPOINT, "told", kind=installed_kind())
    silent = export_checkpoint(config, CHECKPOINT, "silent")
    assert [p.read_bytes() for p in told.paths] == [p.read_bytes() for p in silent.paths]
    with pytest.raises(CircuitError):
        export_checkpoint(config, CHECKPOINT, "told")
