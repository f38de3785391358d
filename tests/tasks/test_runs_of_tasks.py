"""Laws of runs over every registered task: replay, resume, recording, refusals, completion."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Done, type_and_read
from installed import of_installed
from small_benchmarks import HELD, SETTINGS

from circuit.config import parse_config
from circuit.tasks.benchmark import write_benchmark
from circuit.tasks.probes import write_probe_set
from circuit.tasks.registry import BUILT_IN, find_task
from circuit.trace.record import RecordOptions, record_trace
from circuit.trace.replay import ReplayedRun
from circuit.trace.while_training import DEFAULT_FOLDER, TraceRecorder
from circuit.train_config import TrainConfig
from circuit.training.loop import train

RUN = Path("runs/tiny")
STEPS = 8


def test_every_task_has_a_tiny_benchmark_here() -> None:
    assert SETTINGS.keys() == HELD.keys() == BUILT_IN.keys()


@pytest.fixture(params=BUILT_IN)
def task(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task's name, in a folder where its tiny benchmark lies in `data`."""
    monkeypatch.chdir(tmp_path)
    name = str(request.param)
    payload = {"name": "tiny", "benchmark_type": name, "output_dir": "data", "seed": 3}
    write_benchmark(parse_config(payload | SETTINGS[name], find_task(name).Config, where="tiny"))
    return name


def config(task: str, **changes: Any) -> TrainConfig:
    """Two layers, eight steps."""
    held = HELD[task]
    payload = {
        "name": "tiny",
        "output_dir": str(RUN),
        "benchmark_dir": "data",
        "seed": 5,
        "model": {"layers": 2, "heads": 2, "d_model": 8, "d_ff": 16, "max_sequence_length": 64},
        "steps": STEPS,
        "batch_size": 6,
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
        "tracked_splits": [held],
        "best": {"split": held},
        "eval_every": 4,
        "log_every": 2,
        "checkpoint_every": 4,
    }
    return parse_config(of_installed(payload | changes), TrainConfig, where="tiny")


def files_of(folder: Path) -> dict[str, bytes]:
    """What equal runs share: everything but clocks, machine facts and digests of these."""
    told = ("environment.json", "summary.json", "trace.json", "train.manifest.json")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in told]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def traced(config: TrainConfig, **switches: Any) -> None:
    train(config, recorder=TraceRecorder(options=RecordOptions(anchor_every=3)), **switches)


def test_stopped_and_resumed_it_is_the_straight_run_and_replays(task: str) -> None:
    traced(config(task))
    straight = files_of(RUN)
    assert len(straight) > 8
    traced(config(task), overwrite=True, stop_at=4)
    traced(config(task), resume=True)
    assert files_of(RUN) == straight
    replayed = ReplayedRun.open(RUN / DEFAULT_FOLDER).verify()
    assert replayed.equal
    record_trace(config(task), "again", RecordOptions(end_step=STEPS, anchor_every=3))
    rows = (RUN / DEFAULT_FOLDER / "optimizer_update_trace_rows.jsonl").read_bytes()
    assert Path("again/optimizer_update_trace_rows.jsonl").read_bytes() == rows
    print(f"{task}: {STEPS} of {STEPS} steps replay with 0 bits different, {len(straight)} files")


def test_the_seed_decides_the_batches_of_every_step(task: str) -> None:
    traced(config(task))
    first = files_of(RUN / DEFAULT_FOLDER)
    traced(config(task, seed=6), overwrite=True)
    assert files_of(RUN / DEFAULT_FOLDER) != first


@pytest.fixture
def circuit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    return lambda *words: type_and_read(words, capsys)


def test_what_the_task_has_not_is_refused_with_what_it_has(
    task: str, circuit: Callable[..., Done]
) -> None:
    train(config(task))
    held = HELD[task]
    write_probe_set("data", RUN / "analysis/probe_set.jsonl", [held], 4)
    common = ["--config", str(RUN), "--checkpoint-dir", str(RUN / "checkpoints")]
    common += ["--probe-set", str(RUN / "analysis/probe_set.jsonl"), "--output-dir", "out"]
    intervene = ["geometry-subspace-intervention", *common, "--stage", "embedding"]
    intervene += ["--operation", "remove"]
    kind = find_task(task)
    sets = kind.token_set_names[0]
    for words, known in (
        (["--subspace", "full_residual", "--position-role", "nowhere"], ", ".join(kind.roles)),
        (["--subspace", "embedding_nothing_identity", "--rank", "1"], f"embedding_{sets}_identity"),
        (["--subspace", "full_residual", "--slice", "nothing"], ", ".join(kind.slices)),
    ):
        done = circuit(*intervene, *words)
        assert done.code == 2
        (line,) = done.err.splitlines()
        assert known in line
        assert not Path("out").exists()
    done = circuit(*intervene, "--subspace", f"embedding_{sets}_identity", "--rank", "1")
    assert done.code == 0
    evaluate = ["evaluate", "--config", str(RUN), "--checkpoint", f"{RUN}/checkpoints/best.pt"]
    refused = circuit(*evaluate, "--slice", "nothing")
    assert (refused.code, ", ".join(kind.slices) in refused.err) == (2, True)
    told = circuit(*evaluate, *(word for name in kind.slices for word in ("--slice", name)))
    assert told.code == 0
    assert all(name in told.out for name in kind.slices)


def test_roles_subspaces_and_slices_are_completed(task: str, circuit: Callable[..., Done]) -> None:
    train(config(task))
    kind = find_task(task)
    flags = {"--position-role": list(kind.roles), "--slice": list(kind.slices)}
    for flag, names in (*flags.items(), ("--subspace", None)):
        words = f"circuit geometry-subspace-intervention --config {RUN} {flag} "
        asked = {"_CIRCUIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "5"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in asked.items():
                patch.setenv(name, value)
            offered = circuit().out.split()
        expected = names or [f"embedding_{name}_identity" for name in kind.token_set_names]
        assert set(expected) <= set(offered)
    assert os.environ.get("_CIRCUIT_COMPLETE") is None


def test_an_edited_record_is_refused(task: str, circuit: Callable[..., Done]) -> None:
    held = Path("data") / f"{HELD[task]}.jsonl"
    line, *rest = held.read_text().splitlines()
    record = json.loads(line)
    words = record["tokens"].split(" ")
    words[-2], words[-1] = words[-1], words[-2]
    held.write_text("\n".join([json.dumps(record | {"tokens": " ".join(words)}), *rest]) + "\n")
    Path("tiny.json").write_text(config(task).to_json())
    done = circuit("train", "--config", "tiny.json")
    assert done.code == 2
    assert held.name in done.err
