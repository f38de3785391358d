"""Descriptions with a digest that is right and content that is not: refused by field."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import Done, type_and_read
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import traced, traced_once, trained, trained_once

from circuit.artifacts import dump_row, read_jsonl
from circuit.config import digest_of
from circuit.environment import recorded_facts
from circuit.errors import CircuitError
from circuit.tasks.benchmark import load_benchmark
from circuit.trace.store import MANIFEST, ROWS, TraceStore
from circuit.training.checkpoints import load_checkpoint, read_header

__all__ = ["traced", "traced_once", "trained", "trained_once"]

Payload = dict[str, Any]


def forge_trace(folder: Path, payload: Payload) -> None:
    """A trace's description with a digest of its own."""
    body = {key: value for key, value in payload.items() if key != "digest"}
    (folder / MANIFEST).write_text(json.dumps(body | {"digest": digest_of(body)}))


def forge_checkpoint(path: Path, change: Callable[[Payload], None]) -> None:
    """Another description behind a checkpoint's payload, rightly digested."""
    footer = struct.Struct(">Q32s16s")
    content = path.read_bytes()
    length, _, magic = footer.unpack(content[-footer.size :])
    begins = len(content) - footer.size - length
    description = json.loads(content[begins : -footer.size])
    change(description)
    text = json.dumps(description).encode()
    tail = footer.pack(len(text), hashlib.sha256(text).digest(), magic)
    path.write_bytes(content[:begins] + text + tail)


MISTYPED: tuple[tuple[str, Any], ...] = (
    *((name, 10**12) for name in ("start_step", "end_step")),
    *((name, -1) for name in ("start_step", "end_step", "checkpoint_start_step")),
    *((name, 0) for name in ("anchor_every", "checkpoint_every", "top_k_parameters", "end_step")),
    *((name, 1.0) for name in ("start_step", "end_step", "anchor_every")),
    *((name, "4") for name in ("start_step", "end_step", "anchor_every", "checkpoint_every")),
    *((name, None) for name in ("start_step", "anchor_every", "parameters", "environment")),
    ("storage", "some"),
    ("parameters", {}),
    ("parameters", {"embed.W_E": [-1, 2]}),
    ("parameters", {"embed.W_E": [2.5]}),
    ("start_digests", {}),
    ("start_digests", {"parameters": "short"}),
    ("environment", {}),
    ("environment", {"threads": "lots"}),
    ("environment", {"threads": 0}),
    ("environment", {"threads": 10**6}),
    ("environment", {"threads": 1, "variables": {"OMP_NUM_THREADS": 3}}),
    ("config", {}),
)


@pytest.mark.parametrize(("field", "value"), MISTYPED)
def test_a_forged_trace_is_refused_by_field(field: str, value: Any, traced: Path) -> None:
    payload = json.loads((traced / MANIFEST).read_text())
    forge_trace(traced, payload)
    TraceStore(traced)  # the forger's digest is right
    forge_trace(traced, payload | {field: value})
    with pytest.raises(CircuitError) as refusal:
        TraceStore(traced)
    assert "\n" not in str(refusal.value)
    assert field.partition("_")[0] in str(refusal.value)


def test_a_trace_without_a_field_or_with_another_is_refused(traced: Path) -> None:
    payload = json.loads((traced / MANIFEST).read_text())
    for name in payload.keys() - {"digest", "schema_version"}:
        forge_trace(traced, {key: value for key, value in payload.items() if key != name})
        with pytest.raises(CircuitError, match=f"field '{name}': Field required"):
            TraceStore(traced)
    forge_trace(traced, payload | {"tensors": 3})
    with pytest.raises(CircuitError, match="field 'tensors': Extra inputs"):
        TraceStore(traced)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_indices": [1.5]}, "batch_indices"),
        ({"batch_indices": "all"}, "batch_indices"),
        ({"digests": {"parameters": 3}}, "digests.parameters"),
        ({"digests": None}, "digests"),
        ({"loss": "low"}, "loss"),
        ({"step": 1e12}, "step"),
        ({"top_parameters": [{"name": 3}]}, "top_parameters"),
        ({"further": 1}, "further"),
    ],
)
def test_a_forged_row_is_refused_by_line_and_field(
    change: Payload, message: str, traced: Path
) -> None:
    rows = read_jsonl(traced / ROWS)
    rows[2] |= change
    (traced / ROWS).write_text("".join(dump_row(row) + "\n" for row in rows))
    with pytest.raises(CircuitError, match=rf"rows\.jsonl:3: field '{message}"):
        TraceStore(traced).read_rows()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("step", 10**12),
        ("step", 3.0),
        ("step", "3"),
        ("config", []),
        ("config", {}),
        ("benchmark_digest", 3),
        ("notes", []),
        ("notes", {"best": {"step": 1}}),
        ("notes", {"metrics_rows": "many"}),
        ("moments", "some"),
        ("payload_bytes", -1),
        ("payload_bytes", "0"),
        ("payload_sha256", "none"),
        ("tensors", {}),
        ("tensors", {"parameters": {}}),
        ("tensors", {"parameters": {"embed.W_E": {"shape": [10**6] * 9}}}),
        ("tensors", {"exp_avg": {"a": {"shape": [], "dtype": "x", "sha256": "0" * 64}}}),
        ("more", 1),
    ],
)
def test_a_forged_checkpoint_is_refused_by_field(field: str, value: Any, trained: Path) -> None:
    path = trained / "checkpoints/step_000003.pt"
    forge_checkpoint(path, lambda description: None)
    read_header(path)  # the forger's digest is right
    forge_checkpoint(path, lambda description: description.update({field: value}))
    with pytest.raises(CircuitError, match=r"step_000003\.pt") as refusal:
        load_checkpoint(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "facts",
    [
        [],
        3,
        {"threads": "lots"},
        {"threads": -1},
        {"threads": 1.5},
        {"torch": 3},
        {"variables": []},
        {"onednn": "on"},
    ],
)
def test_a_forged_environment_is_refused(
    facts: Any, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained / "environment.json"
    path.write_text(json.dumps(facts))
    with pytest.raises(CircuitError, match=r"environment\.json"):
        recorded_facts(path)
    done: Done = type_and_read(
        ["train", "--config", str(trained), "--resume", "--set", "steps=13"], capsys
    )
    assert (done.code, done.err.count("\n")) == (2, 1), done.err


@pytest.mark.parametrize("count", [10**12, 33])
def test_a_forged_vocabulary_is_refused_before_it_is_made(count: int, trained: Path) -> None:
    folder = Path("data/tiny")
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["config"]["num_values"] = count
    digest = {
        "config": metadata["config"],
        "heldout_pairs": metadata["heldout_pairs"],
        "splits": {name: one["sha256"] for name, one in metadata["splits"].items()},
    }
    metadata["digest"] = digest_of(digest)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(
        CircuitError,
        match=r"would need .* of memory|vocabulary or splits are not those of its config",
    ):
        load_benchmark(folder)


PLACES = st.lists(st.integers(0, 12), min_size=1, max_size=4)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | (st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(), st.integers(), max_size=2))
)


def put(payload: Any, places: list[int], value: Any) -> Any:
    """The payload with one of its values, chosen by its place, replaced."""
    if not places or not isinstance(payload, dict | list) or not payload:
        return value
    changed = copy.copy(payload)
    keys = list(payload) if isinstance(payload, dict) else list(range(len(payload)))
    key = keys[places[0] % len(keys)]
    changed[key] = put(payload[key], places[1:], value)
    return changed


@given(places=PLACES, value=VALUES)
def test_a_trace_with_any_value_replaced_is_read_or_refused(
    traced_once: Path, tmp_path_factory: pytest.TempPathFactory, places: list[int], value: Any
) -> None:
    payload = json.loads((traced_once / MANIFEST).read_text())
    if value in (float("inf"), float("-inf")):
        return
    folder = tmp_path_factory.getbasetemp() / "forged"
    folder.mkdir(exist_ok=True)
    forge_trace(folder, put(payload, places, value))
    (folder / ROWS).write_bytes((traced_once / ROWS).read_bytes())
    with suppress(CircuitError):  # whatever else is raised is a fault
        store = TraceStore(folder)
        steps = [step for step in range(store.last_step + 1) if store.manifest.is_addressable(step)]
        assert len(store.manifest.anchors()) <= store.manifest.most_anchors
        assert len(steps) <= 13
