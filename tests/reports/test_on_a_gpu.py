"""Every report runs on a stand-in for a GPU, which refuses what a GPU refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import type_in
from stand_in import stand_in_gpu
from test_opened_once import lines_of
from tiny_run import RUN

from circuit.runs.opening import open_run
from circuit.trace.record import RecordOptions, record_trace


@pytest.fixture(scope="module")
def desk(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the tiny run on a machine with a GPU, and a trace that was recorded there."""
    folder = tmp_path_factory.mktemp("gpu")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CIRCUIT_DEVICE", "cuda")
        with stand_in_gpu():
            config = open_run(RUN).config.replace(device="cuda")
            record_trace(config, "trace", RecordOptions(end_step=6, anchor_every=4))
            yield folder


# no states of a trace, which are executed again for each report: three further lines ask for such
LINES = lines_of([f"{RUN}/checkpoints/step_{step:06d}.pt" for step in (3, 12)])


@pytest.mark.parametrize("command", list(LINES))  # later ones read what earlier ones wrote
def test_it_runs(desk: Path, command: str) -> None:
    assert type_in(LINES[command]) == 0
