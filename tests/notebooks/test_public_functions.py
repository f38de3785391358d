"""What notebooks call: a run finds its own data, scalars are attributed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import circuit
from circuit.attribution.attribute import Attributor
from circuit.attribution.series import Series
from circuit.scalars.qk_match import QKMatch, ReadMasks
from circuit.trace.record import RecordOptions, record_trace
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig
from circuit.training.loop import train

RUN = "runs/tiny"


@pytest.fixture
def traced(workplace: Path, make_config: Callable[..., TrainConfig]) -> ReplayedRun:
    """A traced tiny run of eight steps in the working directory."""
    config = make_config(steps=8, checkpoint_every=4, eval_every=4)
    train(config)
    record_trace(config, workplace / "trace", RecordOptions(end_step=8, anchor_every=4))
    return circuit.open_run(workplace / "trace")


def match_of(head: str) -> QKMatch:
    reads = ReadMasks.of(circuit.open_run(RUN).batch("validation_iid", range(6)))
    return QKMatch(head, reads, layers=1)


def test_a_run_finds_its_own_data_wherever_the_program_is_started(
    traced: ReplayedRun, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = circuit.open_run(RUN)
    own = here.batch("validation_iid").tokens
    below = workplace / "notebooks"
    other = below / here.config.benchmark_dir  # the same name, other data
    shutil.copytree(here.config.benchmark_dir, other)
    split = other / "validation_iid.jsonl"
    split.write_text("".join(reversed(split.read_text().splitlines(keepends=True))))
    monkeypatch.chdir(below)
    found = circuit.open_run(Path("..") / RUN)
    assert found.steps == [4, 8]
    assert torch.equal(found.batch("validation_iid").tokens, own)


def test_a_run_is_not_looked_for_elsewhere(
    traced: ReplayedRun, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = workplace / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    with pytest.raises(circuit.CircuitError, match="there is no such folder"):
        circuit.open_run(RUN)


def test_attribute_gives_the_series_of_the_attributed_steps(traced: ReplayedRun) -> None:
    scalars = [match_of("L0H0"), match_of("L0H1")]
    found = circuit.attribute(traced, scalars, 2, 6, partitions=["layer"])
    attributor = Attributor(circuit.open_run(RUN).model(8), scalars)
    rows = [row for step in traced.replay(2, 6) for row in attributor.step(step).rows(["layer"])]
    assert list(found) == [scalar.name for scalar in scalars]
    for name, series in Series.collect(rows).items():
        assert found[name].summary() == series.summary()
        assert list(found[name].groups) == ["layer"]
        assert np.array_equal(found[name].steps, [3, 4, 5, 6])


def test_in_float64_only_the_rules_error_is_left(traced: ReplayedRun) -> None:
    scalar = match_of("L0H1")
    rough, fine = (
        circuit.attribute(traced, [scalar], 4, 8, rule="gauss:6", dtype=dtype)[scalar.name]
        for dtype in (torch.float32, torch.float64)
    )
    assert np.allclose(rough.before, fine.before, rtol=1e-4, atol=1e-6)
    rest = fine.closure().path_absolute
    assert rest is not None
    assert rest < 1e-9 < (rough.closure().path_absolute or 0)


def test_attribute_refuses_what_it_cannot_name(traced: ReplayedRun) -> None:
    scalar = match_of("L0H0")
    refused = [([], "expected at least one"), ([scalar, scalar], "expected each once")]
    for scalars, message in refused:
        with pytest.raises(circuit.CircuitError, match=message):
            circuit.attribute(traced, scalars, 2, 6)
    with pytest.raises(circuit.CircuitError, match="`partitions`: 'layer' alone; expected several"):
        circuit.attribute(traced, [scalar], 2, 6, partitions="layer")  # type: ignore[arg-type]
    with pytest.raises(circuit.CircuitError, match="unknown partition 'heads'"):
        circuit.attribute(traced, [scalar], 2, 6, partitions=["heads"])  # type: ignore[list-item]
