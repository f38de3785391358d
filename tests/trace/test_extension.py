"""A finished trace that is extended ends with the bytes of a straight recording."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuit.errors import CircuitError
from circuit.trace import record as record_module
from circuit.trace.record import RecordResult
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig

MakeConfig = Callable[..., TrainConfig]
Recording = Callable[..., RecordResult]
BytesOf = Callable[[Path | str], dict[str, bytes]]

KINDS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "off the grid": ((3, 7, 11), {}),
    "on the grid": ((8,), {}),
    "one anchor": ((6,), {"anchor_every": 50}),
    "dense": ((6, 7), {"storage": "dense", "checkpoint_every": 3, "checkpoint_start_step": 2}),
}


@pytest.mark.parametrize(("ends", "options"), KINDS.values(), ids=list(KINDS))
def test_an_extended_trace_has_the_bytes_of_a_straight_one(
    workplace: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
    ends: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    config = make_config()
    recording(config, "straight", **options)
    for number, end in enumerate(ends):
        recording(config, "pieces", end_step=end, resume=number > 0, **options)
        assert ReplayedRun.open("pieces").store.complete
    found = recording(config, "pieces", resume=True, **options)
    assert bytes_of("pieces") == bytes_of("straight")
    assert found.first_step <= ends[-1]
    assert ReplayedRun.open("pieces").verify().law == "replayed 12 steps, 0 bits differ"
    pieces, straight = (  # also what the folder's manifest claims
        {path.name for path in Path(name).rglob("*") if path.is_file()}
        for name in ("pieces", "straight")
    )
    assert pieces == straight


def test_only_what_is_new_is_recorded(
    workplace: Path, make_config: MakeConfig, recording: Recording
) -> None:
    recording(make_config(), end_step=8)
    found = recording(make_config(), resume=True)
    assert (found.first_step, found.steps) == (8, 4)
    recording(make_config(), "other", end_step=7)
    found = recording(make_config(), "other", resume=True)
    assert (found.first_step, found.steps) == (4, 8)  # the state of step 7 is on no grid


def test_a_trace_from_a_saved_state_is_extended(
    workplace: Path, make_config: MakeConfig, recording: Recording, bytes_of: BytesOf
) -> None:
    recording(make_config(), "whole", end_step=4)
    start = {"resume_checkpoint": Path("whole/checkpoints/step_000004.pt")}
    recording(make_config(), "straight", **start)
    recording(make_config(), "pieces", end_step=7, **start)
    recording(make_config(), "pieces", resume=True, **start)
    assert bytes_of("pieces") == bytes_of("straight")
    assert ReplayedRun.open("pieces").manifest.anchors() == [4, 8, 12]


def test_a_stopped_recording_is_extended(
    trace_folder: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
) -> None:
    """It never reached its old end, whose state is then not there to be removed."""
    expected = bytes_of(trace_folder)

    def stop(step: Any) -> None:
        if step.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_module.record_trace(
            make_config(),
            "pieces",
            record_module.RecordOptions(end_step=10, anchor_every=4),
            progress=stop,
        )
    recording(make_config(), "pieces", resume=True)
    assert bytes_of("pieces") == expected


@pytest.mark.parametrize("killed_in", ["_remove_old_end", "TraceManifest.to_json"])
def test_an_extension_killed_before_its_first_step_goes_on(
    trace_folder: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
    monkeypatch: pytest.MonkeyPatch,
    killed_in: str,
) -> None:
    """Killed between its two changes of the folder, in whichever order it makes them."""
    expected = bytes_of(trace_folder)
    recording(make_config(), "pieces", end_step=6)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"circuit.trace.record.{killed_in}", killed)
        with pytest.raises(KeyboardInterrupt):
            recording(make_config(), "pieces", resume=True)
    recording(make_config(), "pieces", resume=True)
    assert bytes_of("pieces") == expected


@pytest.mark.parametrize("end", [4, 7, 11])
def test_shrinking_is_refused(
    trace_folder: Path, make_config: MakeConfig, recording: Recording, bytes_of: BytesOf, end: int
) -> None:
    before = bytes_of(trace_folder)
    with pytest.raises(CircuitError, match=r"trace\.json: .* with other settings: end_step;"):
        recording(make_config(), resume=True, end_step=end)
    assert bytes_of(trace_folder) == before


def test_an_extension_changes_nothing_but_the_end(
    workplace: Path, make_config: MakeConfig, recording: Recording, bytes_of: BytesOf
) -> None:
    recording(make_config(), end_step=6)
    before = bytes_of("trace")
    for config, options, named in (
        ({}, {"anchor_every": 3}, "anchor_every"),
        ({"seed": 12}, {}, ".*the config.s seed"),
    ):
        with pytest.raises(CircuitError, match=rf"with other settings: {named}"):
            recording(make_config(**config), resume=True, **options)
        assert bytes_of("trace") == before
    with pytest.raises(CircuitError, match="at most the config's 12 steps"):
        recording(make_config(), resume=True, end_step=13)
    assert bytes_of("trace") == before
