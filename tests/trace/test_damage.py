"""Damage: whatever is not what was recorded is refused, by file and step, line or tensor."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuit.artifacts import dump_rows, read_jsonl
from circuit.config import digest_of, parse_config
from circuit.errors import CircuitError
from circuit.tasks.benchmark import Benchmark, load_benchmark, write_benchmark
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.trace.record import RecordResult
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import load_checkpoint, save_checkpoint

MakeConfig = Callable[..., TrainConfig]
Recording = Callable[..., RecordResult]

ROWS = "optimizer_update_trace_rows.jsonl"


def state_file(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:06d}.pt"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def refusal(folder: Path, benchmark: Benchmark | None = None) -> str | None:
    """What opening and verifying says against a trace, or None where all is equal."""
    try:
        trace = ReplayedRun.open(folder)
        if benchmark is not None:
            trace.__dict__["benchmark"] = benchmark  # read once for many traces
        found = trace.verify()
    except CircuitError as error:
        return str(error)
    return None if found.equal and trace.store.complete else found.law


def content(path: Path) -> Any:
    """What a file says, whatever its notation; bytes if it is no text."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except ValueError:
        pass
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        return path.read_bytes()


def refusal_to_open(folder: Path) -> str | None:
    try:
        ReplayedRun.open(folder)
    except CircuitError as error:
        return str(error)
    return None


@pytest.mark.parametrize("size", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_accepted(
    workplace: Path, make_config: MakeConfig, recording: Recording, tiny_folder: Path, size: int
) -> None:
    """Only a change of notation (1e-08 to 1E-08) may pass, and it says the same number."""
    recording(make_config(batch_size=2), end_step=4, anchor_every=2, top_k_parameters=2)
    whole = Path("trace")
    benchmark = load_benchmark(tiny_folder, splits=["train"])
    assert refusal(whole, benchmark) is None
    rng = random.Random(0)
    states = [f"checkpoints/step_{step:06d}.pt" for step in (0, 2, 4)]
    targets = ([ROWS] * 10 + ["trace.json"] * 8 + states * 4) * size
    wrong, unnamed, notation = [], [], 0
    for name in targets:
        path = whole / name
        sound = path.read_bytes()
        bit = rng.randrange(8 * len(sound))
        flip(path, bit)
        message = refusal(whole, benchmark)
        if message is None and content(path) == content_of(sound):
            notation += 1
        elif message is None:
            wrong.append((name, bit))
        elif name not in message:
            unnamed.append((name, bit, message))
        path.unlink()
        path.write_bytes(sound)
    print(f"flips: silently wrong {len(wrong)} of {len(targets)}; of notation only {notation}")
    assert len(targets) == 30 * size
    assert wrong == []
    assert unnamed == []


def content_of(data: bytes) -> Any:
    copy = Path("sound")
    copy.write_bytes(data)
    return content(copy)


def test_no_flipped_bit_of_the_manifest_changes_what_it_says(trace_folder: Path) -> None:
    path = trace_folder / "trace.json"
    sound, accepted = path.read_bytes(), 0
    bits = random.Random(1).sample(range(8 * len(sound)), 600)
    for bit in bits:
        path.unlink()
        path.write_bytes(sound)
        flip(path, bit)
        message = refusal_to_open(trace_folder)
        assert message is None or message.startswith("trace/trace.json:")
        accepted += message is None and content(path) != content_of(sound)
    print(f"manifest: silently wrong {accepted} of {len(bits)}")
    assert accepted == 0


def test_a_flipped_bit_of_a_tensor_is_named(trace_folder: Path) -> None:
    path = state_file(trace_folder, 8)
    raw = load_checkpoint(path).moments["exp_avg"]["blocks.0.mlp.W_in"].numpy().tobytes()
    flip(path, 8 * (path.read_bytes().index(raw) + 100) + 3)
    named = r"step_000008\.pt: digest mismatch in exp_avg blocks\.0\.mlp\.W_in"
    trace = ReplayedRun.open(trace_folder)
    for use in (lambda: trace.state(8), lambda: list(trace.replay(9, 10)), trace.verify):
        with pytest.raises(CircuitError, match=named):
            use()
    assert len(list(trace.replay(0, 8))) == 8  # what does not need it still replays


def test_every_truncation_of_the_rows_is_refused(trace_folder: Path) -> None:
    path = trace_folder / ROWS
    sound = path.read_bytes()
    lines = sound.splitlines(keepends=True)
    ends = [sum(len(line) for line in lines[:n]) for n in range(12)]
    rng = random.Random(0)
    cuts = [*ends, *(end + 1 for end in ends), *rng.sample(range(len(sound)), 30), len(sound) - 1]
    accepted = 0
    for cut in cuts:
        path.write_bytes(sound[:cut])
        message = refusal(trace_folder)
        accepted += message is None
        rows = sound[:cut].count(b"\n")
        stored = next(step for step in (4, 8, 12) if step > rows)
        named = f"{ROWS}: ends at step {rows}, but the state of step {stored} is stored"
        assert message is not None
        assert named in message
    print(f"row file: truncations read {accepted} of {len(cuts)}")
    assert accepted == 0


def test_truncated_rows_are_recorded_again(
    trace_folder: Path, make_config: MakeConfig, recording: Recording
) -> None:
    path = trace_folder / ROWS
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    recording(make_config(), resume=True)
    assert path.read_bytes() == sound
    assert refusal(trace_folder) is None


def edit(path: Path, line: int, change: Callable[[dict[str, Any]], None], digest: bool) -> None:
    lines = path.read_text("utf-8").splitlines(keepends=True)
    row = json.loads(lines[line - 1])
    change(row)
    if digest:
        del row["row_digest"]
    lines[line - 1] = dump_rows([row]) if digest else json.dumps(row) + "\n"
    path.write_text("".join(lines), "utf-8")


def test_an_edited_row_is_named_by_its_line(trace_folder: Path) -> None:
    path = trace_folder / ROWS
    sound = path.read_bytes()
    changes: list[Callable[[dict[str, Any]], None]] = [
        lambda row: row.update(loss=row["loss"] + 1e-9),
        lambda row: row["digests"].update(m="0" * 64),
        lambda row: row["batch_indices"].reverse(),
        lambda row: row.pop("lr"),
        lambda row: row.pop("row_digest"),
        lambda row: row.update(note="mine"),
    ]
    for change in changes:
        path.write_bytes(sound)
        edit(path, 7, change, digest=False)
        with pytest.raises(CircuitError, match=rf"{ROWS}:7: .*(row_digest|digest)"):
            list(ReplayedRun.open(trace_folder).replay(0, 1))


def test_a_row_edited_with_its_digest_is_found_by_replay(trace_folder: Path) -> None:
    path = trace_folder / ROWS
    edit(path, 7, lambda row: row.update(loss=row["loss"] + 1e-9), digest=True)
    assert refusal(trace_folder) == "replayed 12 steps, 1 differ, first at step 7 in loss"
    edit(path, 3, lambda row: row["digests"].update(v="0" * 64), digest=True)
    assert refusal(trace_folder) == "replayed 12 steps, 2 differ, first at step 3 in v"


def test_lost_doubled_and_misplaced_rows_are_named(trace_folder: Path) -> None:
    path = trace_folder / ROWS
    lines = path.read_bytes().splitlines(keepends=True)
    cases = {
        rf"{ROWS}:5: holds step 6; expected step 5": lines[:4] + lines[5:],
        rf"{ROWS}:6: holds step 5; expected step 6": lines[:5] + lines[4:],
        rf"{ROWS}:1: holds step 2; expected step 1": [lines[1], lines[0], *lines[2:]],
        rf"{ROWS}: no such file": None,
    }
    for named, kept in cases.items():
        path.unlink()
        if kept is not None:
            path.write_bytes(b"".join(kept))
        with pytest.raises(CircuitError, match=named):
            ReplayedRun.open(trace_folder).state(2)


def test_a_missing_anchor_is_named_with_its_step(trace_folder: Path) -> None:
    state_file(trace_folder, 4).unlink()
    trace = ReplayedRun.open(trace_folder)
    named = r"step_000004\.pt: the anchor of step 4 is missing"
    for use in (lambda: trace.state(6), lambda: trace.state(4), trace.verify):
        with pytest.raises(CircuitError, match=named):
            use()
    assert trace.state(9).step == 9


def test_exchanged_and_foreign_anchors_are_refused(
    trace_folder: Path, make_config: MakeConfig, recording: Recording
) -> None:
    eight = state_file(trace_folder, 8)
    sound = eight.read_bytes()
    shutil.copy(state_file(trace_folder, 4), eight)
    with pytest.raises(CircuitError, match=r"step_000008\.pt: is not the state of step 8"):
        ReplayedRun.open(trace_folder).state(8)
    recording(make_config(seed=12), "other")
    shutil.copy(state_file(Path("other"), 8), eight)
    with pytest.raises(CircuitError, match=r"step_000008\.pt: .* step 8 belongs to another config"):
        ReplayedRun.open(trace_folder).state(8)
    eight.write_bytes(sound)
    assert refusal(trace_folder) is None


@pytest.mark.parametrize("group", ["parameters", "exp_avg", "exp_avg_sq"])
def test_a_sound_file_of_other_numbers_is_refused(trace_folder: Path, group: str) -> None:
    stage = {"parameters": "parameters", "exp_avg": "m", "exp_avg_sq": "v"}[group]
    for step in (8, 0):
        state = load_checkpoint(state_file(trace_folder, step))
        tensors = {"parameters": state.parameters, **state.moments}[group]
        tensors["ln_final.w"][5] += 1e-3
        save_checkpoint(state_file(trace_folder, step), state)
        with pytest.raises(CircuitError, match=f"step {step} is not the recorded state: {stage}"):
            ReplayedRun.open(trace_folder).state(step)
        with pytest.raises(CircuitError, match=f"step {step} is not the recorded state: {stage}"):
            list(ReplayedRun.open(trace_folder).replay(step, step + 1))
        if step:
            found = ReplayedRun.open(trace_folder).verify()  # the replay itself is right
            assert found.law == "replayed 12 steps, 0 differ, at anchors only"
            ((at, difference),) = found.anchors
            assert at == 8
            assert f"{stage} ln_final.w: 1 of 16 elements differ" in str(difference)


def test_the_manifest_of_another_config_is_refused(
    trace_folder: Path, make_config: MakeConfig, recording: Recording
) -> None:
    recording(make_config(optimizer={"name": "adamw", "learning_rate": 0.02}), "other")
    shutil.copy("other/trace.json", trace_folder / "trace.json")
    trace = ReplayedRun.open(trace_folder)
    named = r"step_000004\.pt: the anchor of step 4 belongs to another config than trace\.json"
    for use in (lambda: trace.state(5), lambda: list(trace.replay(4, 5))):
        with pytest.raises(CircuitError, match=named):
            use()
    message = refusal(trace_folder)
    assert message is not None
    assert "step_000000.pt" in message


def test_the_rows_of_another_recording_are_refused(
    trace_folder: Path, make_config: MakeConfig, recording: Recording
) -> None:
    recording(make_config(seed=12), "other")
    shutil.copy(Path("other") / ROWS, trace_folder / ROWS)
    assert refusal(trace_folder) is not None
    with pytest.raises(CircuitError, match="step 1 does not replay: it first differs in batch"):
        ReplayedRun.open(trace_folder).state(2)
    with pytest.raises(CircuitError, match=r"step_000004\.pt: .* not the recorded state"):
        ReplayedRun.open(trace_folder).state(6)


def test_an_edited_manifest_is_refused(trace_folder: Path) -> None:
    path = trace_folder / "trace.json"
    sound = path.read_text("utf-8")
    edits = {
        '"anchor_every": 4': '"anchor_every": 2',
        '"seed": 11': '"seed": 12',
        '"threads": 1': '"threads": 2',
        '"end_step": 12': '"end_step": 8',
        '"eps": 1e-08': '"eps": 2e-08',
    }
    for old, new in edits.items():
        assert old in sound
        path.write_text(sound.replace(old, new), "utf-8")
        with pytest.raises(CircuitError, match=r"trace\.json: damaged or edited manifest"):
            ReplayedRun.open(trace_folder)
    for text in ("", "{", "[]", "null", "{}", "[1]", sound[:-3], "\0" * 100):
        path.write_text(text, "utf-8")
        with pytest.raises(CircuitError, match=r"trace\.json(:\d+:\d+)?: (damaged|not valid JSON)"):
            ReplayedRun.open(trace_folder)


def test_a_manifest_of_another_version_names_the_field(trace_folder: Path) -> None:
    path = trace_folder / "trace.json"
    payload = json.loads(path.read_text("utf-8"))
    del payload["digest"]
    for change, field in (({"schema_version": 2}, "schema_version"), ({"extra": 1}, "extra")):
        changed = payload | change
        path.write_text(json.dumps(changed | {"digest": digest_of(changed)}), "utf-8")
        with pytest.raises(CircuitError, match=rf"trace\.json: field '{field}'"):
            ReplayedRun.open(trace_folder)


def test_a_benchmark_regenerated_with_another_seed_is_refused(
    trace_folder: Path, benchmark_payload: Callable[[], dict[str, Any]]
) -> None:
    shutil.rmtree("data")
    with pytest.raises(CircuitError, match="data/tiny"):
        ReplayedRun.open(trace_folder).state(1)
    write_benchmark(parse_config({**benchmark_payload(), "seed": 6}, BenchmarkConfig, where="test"))
    trace = ReplayedRun.open(trace_folder)
    for use in (lambda: trace.state(5), lambda: list(trace.replay(0, 1)), trace.verify):
        with pytest.raises(CircuitError, match="data/tiny: the benchmark is not the recorded one"):
            use()
    assert trace.state(4).step == 4  # needs no benchmark
    shutil.rmtree("data")
    write_benchmark(parse_config(benchmark_payload(), BenchmarkConfig, where="test"))
    assert refusal(trace_folder) is None


def test_damaged_rows_stop_a_resume_and_lose_nothing(
    trace_folder: Path, make_config: MakeConfig, recording: Recording
) -> None:
    path = trace_folder / ROWS
    edit(path, 2, lambda row: row.update(lr=1.0), digest=False)
    before = {p: p.read_bytes() for p in trace_folder.rglob("*") if p.is_file()}
    with pytest.raises(CircuitError, match=re.escape(f"{ROWS}:2: the row does not match")):
        recording(make_config(), resume=True)
    assert {p: p.read_bytes() for p in trace_folder.rglob("*") if p.is_file()} == before
    assert len(read_jsonl_lines(path)) == 12


def read_jsonl_lines(path: Path) -> list[bytes]:
    with pytest.raises(CircuitError):
        read_jsonl(path)
    return path.read_bytes().splitlines()
