"""Recording: the same bytes however often it is stopped, and nobody else's files touched."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killed import calls_of, killed_at

from circuit import artifacts
from circuit.artifacts import read_jsonl
from circuit.errors import CircuitError
from circuit.trace.prune import prune_trace
from circuit.trace.record import RecordResult
from circuit.trace.replay import ReplayedRun
from circuit.trace.states import States
from circuit.trace.step import STAGES
from circuit.trace.store import TraceManifest, TraceStore
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import load_checkpoint, save_checkpoint
from circuit.training.loop import train
from circuit.training.session import TrainingSession

MakeConfig = Callable[..., TrainConfig]
Recording = Callable[..., RecordResult]
Same = Callable[[Any, Any], bool]
BytesOf = Callable[[Path | str], dict[str, bytes]]

ROWS = Path("trace/optimizer_update_trace_rows.jsonl")


class Killed(BaseException):
    """Stands for a signal: nothing in the program catches it."""


def test_a_recording_killed_at_any_moment_ends_with_the_same_bytes(
    workplace: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
    recorded_once: Path,
) -> None:
    def record() -> None:
        recording(make_config(), resume=True)

    whole = calls_of(record)
    straight = bytes_of("trace")
    assert straight == bytes_of(recorded_once)
    rng, tries, died, same_bytes = random.Random(0), 12, 0, 0
    reached = set()
    for number in range(tries):
        shutil.rmtree("trace")
        died += killed_at(whole * (number + 0.9 * rng.random()) / tries, record)
        reached.add(len(ROWS.read_bytes().splitlines()) if ROWS.exists() else -1)
        record()
        same_bytes += bytes_of("trace") == straight
    print(f"killed {died} of {tries}, with {sorted(reached)} rows: equal {same_bytes} of {tries}")
    assert (died, same_bytes) == (tries, tries)
    assert len(reached) >= 6  # some of the moments lie before the first row and behind the last


def test_a_recording_killed_again_and_again_ends_with_the_same_bytes(
    workplace: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
    recorded_once: Path,
) -> None:
    def record() -> None:
        recording(make_config(), resume=True)

    whole = calls_of(record)
    shutil.rmtree("trace")
    rng = random.Random(1)
    died = sum(killed_at(whole * rng.uniform(0.3, 0.6), record) for _ in range(4))
    record()
    assert died >= 2
    assert bytes_of("trace") == bytes_of(recorded_once)


def test_a_recording_stopped_before_or_after_any_write_goes_on(
    workplace: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every atomic write: the list of files, the manifest, the row file, the states."""
    write, short = artifacts.atomic_write_bytes, {"end_step": 4, "anchor_every": 2}
    recording(make_config(), "whole", **short)
    expected = bytes_of("whole")
    total = same_bytes = 0
    finished = False
    while not finished:
        left = total // 2

        def stopped(path: Path, payload: bytes, after: bool = bool(total % 2)) -> None:
            nonlocal left
            left -= 1
            if after or left >= 0:
                write(path, payload)
            if left < 0:
                raise Killed

        monkeypatch.setattr(artifacts, "atomic_write_bytes", stopped)
        try:
            recording(make_config(), **short)
            finished = True
        except Killed:
            monkeypatch.setattr(artifacts, "atomic_write_bytes", write)
            recording(make_config(), resume=True, **short)
            same_bytes += bytes_of("trace") == expected
            total += 1
            shutil.rmtree("trace")
    print(f"stopped before or after a write: equal {same_bytes} of {total}")
    assert total >= 2 * (2 + 1 + 1 + 3)
    assert same_bytes == total


def test_a_torn_row_and_the_rows_beyond_the_last_anchor_are_written_again(
    trace_folder: Path, make_config: MakeConfig, recording: Recording, bytes_of: BytesOf
) -> None:
    expected = bytes_of(trace_folder)
    whole = ROWS.read_bytes()
    lines = whole.splitlines(keepends=True)
    rng = random.Random(2)
    for rows in (0, 1, 3, 4, 6, 11):
        for step in range(rows + 1, 13):
            (trace_folder / "checkpoints" / f"step_{step:06d}.pt").unlink(missing_ok=True)
        ROWS.write_bytes(b"".join(lines[:rows]) + lines[rows][: rng.randrange(1, 500)])
        stopped = ReplayedRun.open(trace_folder)
        assert not stopped.store.complete
        assert stopped.store.last_step == rows
        if rows:
            assert stopped.verify().law == f"replayed {rows} step{'s' * (rows > 1)}, 0 bits differ"
        with pytest.raises(CircuitError, match=f"stopped at {rows}; .*record --resume"):
            list(stopped.replay(rows, rows + 1))
        found = recording(make_config(), resume=True)
        assert (found.first_step, found.steps) == (rows // 4 * 4, 12 - rows // 4 * 4)
        assert bytes_of(trace_folder) == expected


def test_a_recording_stopped_between_a_row_and_its_anchor_says_how_to_go_on(
    trace_folder: Path, make_config: MakeConfig, recording: Recording, bytes_of: BytesOf
) -> None:
    expected = bytes_of(trace_folder)
    ROWS.write_bytes(b"".join(ROWS.read_bytes().splitlines(keepends=True)[:8]))
    for step in (8, 12):
        (trace_folder / "checkpoints" / f"step_{step:06d}.pt").unlink()
    with pytest.raises(CircuitError, match=r"step 8 is missing; recording stopped at 8;.*resume"):
        ReplayedRun.open(trace_folder).state(8)
    assert recording(make_config(), resume=True).first_step == 4
    assert bytes_of(trace_folder) == expected


def test_a_finished_recording_is_left_as_it_is(
    trace_folder: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = bytes_of(trace_folder)
    monkeypatch.setattr(TrainingSession, "advance", None)
    assert recording(make_config(), resume=True).steps == 0
    assert bytes_of(trace_folder) == expected


def test_equal_recordings_give_equal_bytes_wherever_they_stand(
    trace_folder: Path,
    workplace: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
) -> None:
    """No clock, no folder of its own, in rows, manifest and states."""
    time.sleep(1.1)  # a clock in whole seconds would show
    recording(make_config(), workplace / "deep" / "other name")
    assert bytes_of(workplace / "deep" / "other name") == bytes_of(trace_folder)
    for name in ("trace.json", ROWS.name):
        text = (trace_folder / name).read_text(encoding="utf-8")
        assert str(workplace) not in text
        assert not re.search(r'"(/|[A-Za-z]:\\)', text)
        assert not re.search(r"20\d\d-\d\d-\d\d[T ]\d\d:|unix|seconds", text)
        numbers = [float(n) for n in re.findall(r"(?<![\w.])\d{9,11}(?:\.\d+)?(?![\w.])", text)]
        assert not [n for n in numbers if abs(n - time.time()) < 1e7]


CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "anchors": ({}, {"anchor_every": 6}, "anchor_every"),
    "grid": ({}, {"checkpoint_every": 2}, "checkpoint_every"),
    "end": ({}, {"end_step": 11}, "end_step"),
    "storage": ({}, {"storage": "dense"}, "storage"),
    "top": ({}, {"top_k_parameters": 3}, "top_k_parameters"),
    "seed": ({"seed": 12}, {}, ".*the config.s seed is"),
    "rate": ({"optimizer": {"name": "adamw", "learning_rate": 0.02}}, {}, ".*learning_rate is"),
}


@pytest.mark.parametrize(("config", "options", "named"), CHANGED.values(), ids=list(CHANGED))
def test_resuming_with_other_options_is_refused(
    trace_folder: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
    config: dict[str, Any],
    options: dict[str, Any],
    named: str,
) -> None:
    before = bytes_of(trace_folder)
    with pytest.raises(CircuitError, match=rf"trace\.json: .* with other settings: {named}"):
        recording(make_config(**config), resume=True, **options)
    assert bytes_of(trace_folder) == before


def test_resuming_elsewhere_names_the_changed_fact(
    trace_folder: Path,
    make_config: MakeConfig,
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MKL_LAW_UNDER_TEST", "1")
    with pytest.raises(CircuitError, match=r"settings: variables: .*UNDER_TEST"):
        recording(make_config(), resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end_step": 13}, "cannot record steps 0 to 13; expected .* at most the config's 12"),
        ({"num_steps": 13}, "cannot record steps 0 to 13"),
        ({"end_step": 3, "resume_checkpoint": "x/step_000004.pt"}, "cannot record steps 4 to 3"),
        ({"end_step": None}, "give one of `end_step` and `num_steps`"),
        ({"overwrite": True, "resume": True}, "`overwrite` and `resume` exclude each other"),
    ],
)
def test_options_that_cannot_be_met_are_refused_before_anything_is_written(
    workplace: Path,
    make_config: MakeConfig,
    recording: Recording,
    recorded_once: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    if "resume_checkpoint" in options:
        shutil.copytree(recorded_once / "checkpoints", "x")
        options = {**options, "resume_checkpoint": Path(options["resume_checkpoint"])}
    with pytest.raises(CircuitError, match=message):
        recording(make_config(), **options)
    assert not [p for p in Path("trace").rglob("*") if not p.name.endswith(".lock")]


def test_a_folder_in_use_is_refused_and_foreign_files_survive(
    trace_folder: Path, make_config: MakeConfig, recording: Recording, bytes_of: BytesOf
) -> None:
    foreign = {
        trace_folder / "notes.txt": b"mine",
        trace_folder / "checkpoints" / "best.pt": b"mine too",
        trace_folder / "attribution" / "rows.jsonl": b"another command's",
    }
    for path, payload in foreign.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(payload)
    ReplayedRun.open(trace_folder).state(7, cache=True)
    before = bytes_of(trace_folder)
    with pytest.raises(CircuitError, match=r"holds .* files of an earlier .* `overwrite`"):
        recording(make_config(), anchor_every=6)
    assert bytes_of(trace_folder) == before
    recording(make_config(), anchor_every=6, overwrite=True)
    lost = [path for path, payload in foreign.items() if path.read_bytes() != payload]
    print(f"foreign files lost {len(lost)} of {len(foreign)}")
    assert lost == []
    states = sorted(path.name for path in (trace_folder / "checkpoints").glob("step_*"))
    assert states == [f"step_{step:06d}.pt" for step in (0, 6, 12)]
    assert ReplayedRun.open(trace_folder).verify().equal


def test_a_foreign_file_in_the_way_is_kept(
    workplace: Path, make_config: MakeConfig, recording: Recording
) -> None:
    path = Path("trace/checkpoints/step_000008.pt")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    for switch in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(CircuitError, match=r"step_000008\.pt: exists and was not written by"):
            recording(make_config(), **switch)
        assert path.read_bytes() == b"mine"


def test_the_store_holds_what_its_manifest_lists(trace_folder: Path) -> None:
    store = TraceStore(trace_folder)
    manifest = store.manifest
    states = sorted(path.name for path in (trace_folder / "checkpoints").iterdir())
    assert states == [f"step_{step:06d}.pt" for step in manifest.anchors()]
    assert manifest.anchors() == [0, 4, 8, 12]
    rows = read_jsonl(ROWS)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert store.rows == rows
    state = store.anchor(12)
    assert manifest.parameters == {n: list(t.shape) for n, t in state.parameters.items()}
    stages = [stage for stage in STAGES if stage not in ("loss", "grad_norm", "memory")]
    assert all(list(row["digests"]) == stages for row in rows)
    for step in (0, 13):
        with pytest.raises(CircuitError, match=f"no row of step {step}; .* from 1 to 12"):
            store.row(step)


def manifest_of(config: TrainConfig, **fields: Any) -> TraceManifest:
    defaults: dict[str, Any] = {
        "top_k_parameters": 1,
        "parameters": {"embed.W_E": [2, 3]},
        "start_digests": {"parameters": "0" * 64},
        "environment": {"threads": 1},
    }
    config = config.replace(steps=max(config.steps, fields["end_step"]))
    return TraceManifest(
        config=config, benchmark_digest="", digest_algorithm="", **{**defaults, **fields}
    )


@given(
    start=st.integers(0, 30),
    length=st.integers(1, 60),
    anchor_every=st.integers(1, 12),
    checkpoint_every=st.integers(1, 12),
    first=st.integers(0, 60),
    storage=st.sampled_from(["anchors", "dense"]),
)
def test_the_grids_of_a_manifest(
    make_config: MakeConfig,
    start: int,
    length: int,
    anchor_every: int,
    checkpoint_every: int,
    first: int,
    storage: str,
) -> None:
    manifest = manifest_of(
        make_config(),
        start_step=start,
        end_step=start + length,
        anchor_every=anchor_every,
        checkpoint_every=checkpoint_every,
        checkpoint_start_step=first,
        storage=storage,
    )
    anchors = manifest.anchors()
    assert anchors == sorted(anchors)
    assert (anchors[0], anchors[-1]) == (start, start + length)
    assert all(manifest.is_addressable(step) for step in anchors)
    assert all(b - a <= anchor_every for a, b in pairwise(anchors))
    reachable = [s for s in range(start - 2, start + length + 3) if manifest.is_addressable(s)]
    wanted = {
        s for s in range(start, start + length + 1) if s >= first and not s % checkpoint_every
    }
    assert wanted <= set(reachable)
    if storage == "dense":
        assert anchors == reachable
    else:
        assert set(anchors) == {start, start + length} | {
            s for s in anchors if not s % anchor_every
        }
    assert TraceManifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize("storage", ["anchors", "dense"])
def test_a_thinned_trace_says_the_same(
    workplace: Path, make_config: MakeConfig, recording: Recording, same: Same, storage: str
) -> None:
    """Also where the old anchors lay off the grid of addressable steps."""
    options = {"anchor_every": 2, "checkpoint_every": 3, "checkpoint_start_step": 6}
    recording(make_config(), storage=storage, **options)
    trace = ReplayedRun.open("trace")
    states = {s: trace.state(s) for s in range(13) if trace.manifest.is_addressable(s)}
    assert set(states) == {0, 2, 4, 6, 8, 9, 10, 12}
    trace.store.checkpoint_path(1).write_bytes(b"mine")
    rows = ROWS.read_bytes()
    size = sum(path.stat().st_size for path in Path("trace/checkpoints").iterdir())
    found = prune_trace("trace", 8)
    left = sorted(path.name for path in Path("trace/checkpoints").iterdir())
    assert left == [f"step_{step:06d}.pt" for step in (0, 1, 8, 12)]
    assert (found.removed, found.anchors) == ({"anchors": 4, "dense": 5}[storage], 3)
    assert found.freed_bytes == size - sum(
        path.stat().st_size for path in Path("trace/checkpoints").iterdir()
    )
    assert ROWS.read_bytes() == rows
    thinned = ReplayedRun.open("trace")
    assert all(same(thinned.state(step), state) for step, state in states.items())
    assert thinned.verify().law == "replayed 12 steps, 0 bits differ"
    assert prune_trace("trace", 8).removed == 0


def test_an_interrupted_thinning_leaves_a_whole_trace(
    trace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.OutputFolder, "remove", interrupted)
        with pytest.raises(Killed):
            prune_trace(trace_folder, 8)
    assert ReplayedRun.open(trace_folder).verify().equal
    assert prune_trace(trace_folder, 8).removed == 1
    assert ReplayedRun.open(trace_folder).verify().compared_anchors == 2


def test_thinning_is_refused_where_it_would_lose_something(
    trace_folder: Path, bytes_of: BytesOf
) -> None:
    before = bytes_of(trace_folder)
    for distance in (1, 2, 6, 9):
        with pytest.raises(CircuitError, match=f"every. {distance}; expected a multiple of .* 4"):
            prune_trace(trace_folder, distance)
    assert bytes_of(trace_folder) == before
    (trace_folder / "checkpoints" / "step_000012.pt").unlink()
    ROWS.write_bytes(b"".join(ROWS.read_bytes().splitlines(keepends=True)[:10]))
    with pytest.raises(CircuitError, match="recording stopped at step 10 of 12; finish it"):
        prune_trace(trace_folder, 8)


# History: a run that was only trained


def test_a_run_that_was_only_trained_is_traced_afterwards(
    run_folder: Path, make_config: MakeConfig, recording: Recording, same: Same
) -> None:
    proved = recording(make_config(), require_historical_replay=True)
    assert proved.history == [3, 6, 9, 12]
    middle = run_folder / "checkpoints" / "step_000006.pt"
    later = recording(
        make_config(), "later", resume_checkpoint=middle, require_historical_replay=True
    )
    assert later.history == [9, 12]
    for folder, first in (("trace", 3), ("later", 6)):
        trace = ReplayedRun.open(folder)
        saved = {step: run_folder / f"checkpoints/step_{step:06d}.pt" for step in (3, 6, 9, 12)}
        wanted = [step for step in saved if step >= first]
        found = sum(same(load_checkpoint(saved[step]), trace.state(step)) for step in wanted)
        print(f"from step {trace.manifest.start_step}: {found} of {len(wanted)} equal")
        assert found == len(wanted)
    assert recording(make_config(), "unproved").history == []


def swap(path: Path, group: str, name: str, count: int) -> None:
    """A sound file of a state that differs in `count` elements of one tensor, by one ulp."""
    state = load_checkpoint(path)
    tensor = {"parameters": state.parameters, **state.moments}[group][name]
    flat = tensor.view(-1)[:count]
    flat.copy_(torch.nextafter(flat, torch.tensor(torch.inf)))
    save_checkpoint(path, state)


@pytest.mark.parametrize(
    ("group", "stage", "count"),
    [("parameters", "parameters", 1), ("exp_avg", "m", 2), ("exp_avg_sq", "v", 5)],
)
def test_a_past_that_is_not_the_runs_is_refused(
    run_folder: Path,
    make_config: MakeConfig,
    recording: Recording,
    group: str,
    stage: str,
    count: int,
) -> None:
    name = "blocks.0.attn.b_Q"
    swap(run_folder / "checkpoints" / "step_000009.pt", group, name, count)
    named = rf"step_000009\.pt: .* step 9 differs in {stage} {name}: {count} of 16 elements differ"
    with pytest.raises(CircuitError, match=named):
        recording(make_config(), require_historical_replay=True)
    assert recording(make_config(), "free").history == []


@pytest.mark.parametrize("at", [3, 12])
def test_a_past_that_was_recorded_before_is_proved_on_resume_too(
    run_folder: Path, make_config: MakeConfig, recording: Recording, at: int
) -> None:
    recording(make_config())
    proved = recording(make_config(), resume=True, require_historical_replay=True)
    assert proved.history == [3, 6, 9, 12]
    swap(run_folder / "checkpoints" / f"step_{at:06d}.pt", "parameters", "ln_final.b", 1)
    with pytest.raises(CircuitError, match=f"step {at} differs in parameters"):
        recording(make_config(), resume=True, require_historical_replay=True)


def test_a_history_without_checkpoints_cannot_be_proved(
    workplace: Path, make_config: MakeConfig, recording: Recording
) -> None:
    with pytest.raises(CircuitError, match="saved no checkpoint after step 0 and up to step 12"):
        recording(make_config(), require_historical_replay=True)
    train(make_config())
    with pytest.raises(CircuitError, match="saved no checkpoint after step 0 and up to step 2"):
        recording(make_config(), require_historical_replay=True, end_step=2)


def test_a_checkpoint_of_another_run_is_no_history(
    run_folder: Path, make_config: MakeConfig, recording: Recording
) -> None:
    other = {"layers": 1, "heads": 2, "d_model": 8, "d_ff": 32, "max_sequence_length": 40}
    with pytest.raises(CircuitError, match=r"step 3 belongs to another config: model\.d_model is"):
        recording(make_config(model=other), require_historical_replay=True)
    with pytest.raises(CircuitError, match="step 6 belongs to another config: seed is 11"):
        recording(
            make_config(seed=12),
            "later",
            resume_checkpoint=run_folder / "checkpoints" / "step_000006.pt",
        )


def test_the_past_of_another_setting_names_the_changed_fact(
    run_folder: Path,
    make_config: MakeConfig,
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MKL_LAW_UNDER_TEST", "1")
    swap(run_folder / "checkpoints" / "step_000003.pt", "parameters", "ln_final.w", 16)
    with pytest.raises(CircuitError, match=r"16 of 16 .* \(variables: .*MKL_LAW_UNDER_TEST"):
        recording(make_config(), require_historical_replay=True)


def test_a_recorded_state_is_what_training_goes_on_from(
    trace_folder: Path, make_config: MakeConfig, same: Same
) -> None:
    trace = ReplayedRun.open(trace_folder)
    state = States().state(trace_folder / "checkpoints" / "step_000005.pt")
    session = TrainingSession(trace.setup, state=state)
    while session.step < 12:
        session.advance()
    assert same(session.state(), trace.state(12))


def test_resume_without_a_manifest_deletes_nothing(
    trace_folder: Path, make_config: MakeConfig, recording: Recording
) -> None:
    (trace_folder / "trace.json").unlink()
    states = sorted((trace_folder / "checkpoints").iterdir())
    with pytest.raises(CircuitError, match=r"trace\.json is missing beside .* `overwrite`"):
        recording(make_config(), resume=True)
    assert sorted((trace_folder / "checkpoints").iterdir()) == states


def test_divergence_is_named(
    workplace: Path, make_config: MakeConfig, recording: Recording
) -> None:
    wild = {"name": "sgd", "learning_rate": 1e9}
    with pytest.raises(CircuitError, match=r"diverged at step .* lower the learning"):
        recording(make_config(optimizer=wild, gradient_clip=None))
