"""What version 0.1.0 recorded: it ran plain kernels, and wrote `compile` and `fused` instead."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from circuit.artifacts import dump_json
from circuit.config import load_config, parse_config
from circuit.errors import CircuitError
from circuit.trace.record import RecordResult
from circuit.trace.replay import ReplayedRun
from circuit.trace.store import MANIFEST
from circuit.train_config import Kernels, TrainConfig
from circuit.training import checkpoints
from circuit.training.checkpoints import load_checkpoint

MakeConfig = Callable[..., TrainConfig]


def as_recorded(payload: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A config of plain kernels in the words of version 0.1.0."""
    assert payload["kernels"] == "plain"
    optimizer = payload["optimizer"] | {"fused": values.get("fused", False)}
    recorded = payload | {"compile": values.get("compile", False), "optimizer": optimizer}
    del recorded["kernels"]
    return recorded


def rewrite_trace(folder: Path) -> None:
    """Put a trace's manifest and anchors into the words of version 0.1.0."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    manifest["config"] = as_recorded(manifest["config"])
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / MANIFEST).write_text(dump_json(manifest | {"digest": digest}))
    for path in sorted((folder / "checkpoints").glob("*.pt")):
        payload, description = checkpoints._read(path, payload=True)
        told = description.model_dump(mode="json", exclude_unset=True)
        text = json.dumps(told | {"config": as_recorded(told["config"])}).encode()
        footer = checkpoints._FOOTER.pack(
            len(text), hashlib.sha256(text).digest(), checkpoints._MAGIC
        )
        path.write_bytes(payload + text + footer)


def test_an_earlier_trace_is_plain_and_replays_bit_for_bit(
    workplace: Path, make_config: MakeConfig, recording: Callable[..., RecordResult]
) -> None:
    recording(make_config(kernels="plain"), "trace")
    rewrite_trace(Path("trace"))
    trace = ReplayedRun.open("trace")
    assert trace.manifest.config.kernels == "plain"
    assert load_checkpoint("trace/checkpoints/step_000004.pt").config.kernels == "plain"
    found = trace.verify()
    print(f"{found.law}; {found.compared_anchors} anchors compared")
    assert found.equal
    assert (found.steps, found.compared_anchors) == (12, 3)


@pytest.mark.parametrize("kernels", get_args(Kernels))
def test_a_trace_replays_with_the_kernels_of_its_recording(
    workplace: Path,
    make_config: MakeConfig,
    recording: Callable[..., RecordResult],
    kernels: str,
) -> None:
    recording(make_config(kernels=kernels), "trace")
    trace = ReplayedRun.open("trace")
    (replayed,) = trace.replay(11, 12)
    assert replayed.step == 12
    assert trace.config.kernels == kernels
    assert trace.verify().equal


@pytest.mark.parametrize("removed", ["compile", "fused"])
def test_what_was_recorded_with_a_removed_setting_is_refused_by_name(
    train_payload: Callable[..., dict[str, Any]], tmp_path: Path, removed: str
) -> None:
    whole = parse_config(train_payload(kernels="plain"), TrainConfig, where="test")
    recorded = as_recorded(whole.model_dump(mode="json"), **{removed: True})
    path = tmp_path / "run_config.json"
    path.write_text(json.dumps(recorded))
    with pytest.raises(CircuitError, match=rf"'(optimizer\.)?{removed}' is true, which only"):
        load_config(path, TrainConfig)
    path.write_text(json.dumps(as_recorded(whole.model_dump(mode="json"))))
    assert load_config(path, TrainConfig) == whole
    assert load_config(path, TrainConfig, ["kernels=fast"]).kernels == "fast"
