"""The queue of trainings: nobody else's file is cut, and what a row says is held against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from circuit.artifacts import dump_row
from circuit.attribution.replays import NAME, Replay, Replays, key
from circuit.core.edit import Edit
from circuit.errors import CircuitError

IDENTITY = {"of": ["loss", "size"], "run": "tiny"}
EDIT = Edit(0, 2, terms={"weight_decay": 0.0})
DONE = Replay(EDIT, (1.0, 2.0), {"parameters": "ab"})


def test_a_torn_row_is_dropped_and_done_again(tmp_path: Path) -> None:
    Replays(tmp_path, IDENTITY).add(DONE)
    whole = (tmp_path / NAME).read_bytes()
    for end in range(0, len(whole), 5):
        (tmp_path / NAME).write_bytes(whole[:end])
        queue = Replays(tmp_path, IDENTITY)
        assert queue.read() in ({}, {key(EDIT): DONE})
        if not queue.read():
            queue.add(DONE)
        assert (tmp_path / NAME).read_bytes() == whole


@pytest.mark.parametrize("text", ["notes", "notes\n", '{"identity": "x', "\n", "{}\n{}"])
def test_a_file_of_somebody_else_stays_as_it_is(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(CircuitError):
        Replays(tmp_path, IDENTITY)
    assert (tmp_path / NAME).read_text() == text


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    (tmp_path / NAME).symlink_to("notes")
    with pytest.raises(CircuitError, match="could not be written"):
        Replays(tmp_path, IDENTITY)
    assert (tmp_path / "notes").read_text() == ""


@pytest.mark.parametrize(
    "change",
    [
        {"values": [1.0]},
        {"values": ["x", 2.0]},
        {"values": None},
        {"state": {}},
        {"state": {"parameters": 3}},
        {"edit": {"start": 2, "end": 0}},
        {"edit": {"start": "x", "end": 2}},
        {"edit": []},
    ],
)
def test_a_forged_row_is_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    queue = Replays(tmp_path, IDENTITY)
    row = {"edit": EDIT.to_json(), "values": [1.0, 2.0], "state": {"parameters": "ab"}}
    with (tmp_path / NAME).open("a") as file:
        file.write(dump_row({**row, **change}) + "\n")
    with pytest.raises(CircuitError, match=NAME):
        queue.read()
