"""A trace that is recorded in the pass that trains: the bytes of both are those of either alone."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from circuit.cli.app import app
from command_line import type_and_read
from killed import calls_of, killed_at
from typer.main import get_command

from circuit import artifacts
from circuit.errors import CircuitError
from circuit.trace.record import RecordOptions, RecordResult
from circuit.trace.replay import ReplayedRun
from circuit.trace.store import MANIFEST, ROWS, WHILE_TRAINING
from circuit.trace.while_training import DEFAULT_FOLDER, TraceRecorder
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import load_checkpoint, save_checkpoint
from circuit.training.loop import Progress, train
from circuit.training.session import TrainingSession

MakeConfig = Callable[..., TrainConfig]
Recording = Callable[..., RecordResult]
BytesOf = Callable[[Path | str], dict[str, bytes]]
Files = dict[str, bytes]

RUN, TRACE = Path("runs/tiny"), Path("runs/tiny") / DEFAULT_FOLDER
SGD = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}


class Killed(BaseException):
    """Stands for a signal: nothing in the program catches it."""


def traced(config: TrainConfig, *, anchor_every: int = 4, **switches: Any) -> TraceRecorder:
    """Trains with a trace of anchors every 4 steps; keywords are `train`'s."""
    end = switches.pop("end_step", None)
    recorder = TraceRecorder(
        switches.pop("folder", None), RecordOptions(end_step=end, anchor_every=anchor_every)
    )
    train(config, recorder=recorder, **switches)
    return recorder


def run_bytes(root: Path = RUN) -> Files:
    """The bytes that equal runs share."""
    paths = [*(root / "checkpoints").glob("*.pt"), root / "metrics.jsonl", root / "run_config.json"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def apart(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
) -> tuple[Files, Files]:
    """What a run leaves that is only trained, and what its trace leaves, recorded afterwards."""
    folder = tmp_path_factory.mktemp("apart")
    shutil.copytree(tiny_folder, folder / "data" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(make_config())
        recording(make_config(), TRACE)
        return run_bytes(), bytes_of(TRACE)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"optimizer": SGD, "gradient_clip": 0.1}, {"anchor_every": 50, "top_k_parameters": 3}),
        ({"log_every": 5, "eval_every": 12}, {"end_step": 7, "checkpoint_every": 2}),
        ({"checkpoint_every": 12}, {"num_steps": 9, "checkpoint_start_step": 3}),
        ({}, {"storage": "dense", "checkpoint_every": 3, "anchor_every": 5}),
    ],
    ids=["adamw", "sgd", "shorter", "steps", "dense"],
)
def test_the_bytes_are_those_of_a_run_and_of_a_trace_recorded_afterwards(
    workplace: Path,
    make_config: MakeConfig,
    recording: Recording,
    bytes_of: BytesOf,
    changes: dict[str, Any],
    options: dict[str, Any],
) -> None:
    config = make_config(**changes)
    train(config, recorder=TraceRecorder(options=RecordOptions(**options)))
    together = run_bytes(), bytes_of(TRACE)
    shutil.move("runs", "together")
    train(config)
    recording(config, TRACE, **{"anchor_every": 50, **options})
    assert together == (run_bytes(), bytes_of(TRACE))
    assert ReplayedRun.open("together" / TRACE.relative_to("runs")).verify().equal


def test_no_step_is_executed_twice(
    workplace: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, advance = [], TrainingSession.advance

    def counted(session: TrainingSession, **hooks: Any) -> Any:
        steps.append(session.step + 1)
        return advance(session, **hooks)

    monkeypatch.setattr(TrainingSession, "advance", counted)
    traced(make_config(), end_step=7)
    assert steps == list(range(1, 13))


def test_stopping_and_resuming_at_every_step_changes_nothing(
    workplace: Path,
    make_config: MakeConfig,
    apart: tuple[Files, Files],
    recording: Recording,
    bytes_of: BytesOf,
) -> None:
    """Before the trace's last step, at it, and beyond it."""
    recording(make_config(), "afterwards", end_step=7)
    for stop in (1, 6, 7, 8):
        half = traced(make_config(), end_step=7, stop_at=stop, overwrite=stop > 1)
        assert (half.result() is None) == (stop < 7)
        whole = traced(make_config(), end_step=7, resume=True).result()
        assert whole is not None
        assert (whole.first_step, whole.steps) == (stop, max(7 - stop, 0))
        run = {name: run_bytes()[name] for name in apart[0]}  # that of the stop stands beside them
        assert (run, bytes_of(TRACE)) == (apart[0], bytes_of("afterwards"))


def test_an_interruption_after_any_step_changes_nothing(
    workplace: Path, make_config: MakeConfig, apart: tuple[Files, Files], bytes_of: BytesOf
) -> None:
    """The run goes on from a checkpoint every 3 steps, the trace has anchors every 4."""
    for at in (1, 3, 4, 5, 9, 12):

        def interrupt(progress: Progress, at: int = at) -> None:
            if progress.step == at and progress.loss is not None:
                raise Killed

        with pytest.raises(Killed):
            traced(make_config(), overwrite=at > 1, progress=interrupt)
        traced(make_config(), resume=True)
        assert (run_bytes(), bytes_of(TRACE)) == apart


def test_a_stop_before_any_write_of_either_changes_nothing(
    workplace: Path,
    make_config: MakeConfig,
    bytes_of: BytesOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every atomic write of run and trace, in the order in which they come."""
    config = make_config(steps=4, eval_every=4, tracked_splits=["validation_iid"])
    traced(config)
    straight = run_bytes(), bytes_of(TRACE)
    write, stops, finished = artifacts.atomic_write_bytes, 0, False
    while not finished:
        shutil.rmtree("runs")
        left = stops

        def stopped(path: Path, payload: bytes) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            write(path, payload)

        with monkeypatch.context() as patch:
            patch.setattr(artifacts, "atomic_write_bytes", stopped)
            try:
                traced(config)
                finished = True
            except Killed:
                stops += 1
        traced(config, resume=True)
        assert (run_bytes(), bytes_of(TRACE)) == straight, f"stopped at write {stops}"
    print(f"stopped before each of {stops} writes")
    assert stops > len(straight[0]) + len(straight[1])


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    workplace: Path, make_config: MakeConfig, apart: tuple[Files, Files], bytes_of: BytesOf
) -> None:
    def go_on() -> None:
        traced(make_config(), resume=True)

    whole, rng = calls_of(go_on), random.Random(4)
    for _ in range(2):
        shutil.rmtree("runs")
        died = sum(killed_at(whole * rng.uniform(0.2, 0.9), go_on) for _ in range(3))
        go_on()
        assert died >= 1
        assert (run_bytes(), bytes_of(TRACE)) == apart


@pytest.mark.parametrize("behind", ["rows", "anchor", "all", "another run"])
def test_a_trace_that_lacks_steps_of_its_run_is_refused_and_both_are_kept(
    workplace: Path,
    make_config: MakeConfig,
    recording: Recording,
    apart: tuple[Files, Files],
    bytes_of: BytesOf,
    behind: str,
) -> None:
    traced(make_config(), stop_at=6)
    rows = TRACE / "optimizer_update_trace_rows.jsonl"
    said = "the trace ends at step 5, and the run is at step 6"
    if behind == "rows":
        rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:5]))
    elif behind == "anchor":
        (TRACE / "checkpoints/step_000004.pt").unlink()
        said = "the anchor of step 4 is missing"
    elif behind == "all":
        shutil.rmtree(TRACE)
        said = "at step 6, and no trace of its steps so far is here"
    else:
        path = RUN / "checkpoints/step_000006.pt"
        state = load_checkpoint(path)
        state.parameters["ln_final.b"].add_(1)
        save_checkpoint(path, state)
        said = "the trace is not this run's: step 6 differs in parameters"
    before = run_bytes(), bytes_of(TRACE) if behind != "all" else None
    with pytest.raises(CircuitError, match=said):
        traced(make_config(), resume=True)
    assert before == (run_bytes(), bytes_of(TRACE) if behind != "all" else None)
    if behind == "another run":
        return
    train(make_config(), resume=True)  # what the message says to do
    recording(make_config(), TRACE, resume=behind != "all")
    restored = bytes_of(TRACE)
    if behind == "anchor":  # an earlier one than the last is not made again
        assert restored.keys() | {"checkpoints/step_000004.pt"} == apart[1].keys()
        return
    assert (run_bytes(), restored) == apart


def test_what_cannot_be_traced_is_refused_before_anything_is_written(
    workplace: Path, make_config: MakeConfig
) -> None:
    foreign = TRACE / "checkpoints/step_000008.pt"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"mine")
    for switch in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(CircuitError, match=r"step_000008\.pt: exists and was not written by"):
            traced(make_config(), **switch)
    for options, said in (
        ({"folder": RUN}, "is the run's own folder"),
        ({"folder": "trace", "end_step": 13}, "cannot record steps 0 to 13"),
    ):
        with pytest.raises(CircuitError, match=said):
            traced(make_config(), **options)
    for options in ({"require_historical_replay": True}, {"resume_checkpoint": foreign}):
        with pytest.raises(CircuitError, match="traced while it trains"):
            TraceRecorder(options=RecordOptions(**options))
    left = {path for path in Path().rglob("*") if path.is_file() and path.parts[0] != "data"}
    assert {path for path in left if path.suffix != ".lock"} == {foreign}
    assert foreign.read_bytes() == b"mine"


@pytest.mark.parametrize("name", [MANIFEST, ROWS, "checkpoints/step_000008.pt", WHILE_TRAINING])
def test_a_foreign_file_in_a_traces_place_keeps_the_run_that_was_to_be_replaced(
    workplace: Path, make_config: MakeConfig, name: str
) -> None:
    train(make_config())
    before = run_bytes()
    foreign = TRACE / name
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_bytes(b"mine")
    with pytest.raises(CircuitError, match="exists and was not written by"):
        traced(make_config(), overwrite=True)
    assert (run_bytes(), foreign.read_bytes()) == (before, b"mine")


def test_a_recorder_without_an_end_traces_each_run_to_its_own(
    workplace: Path, make_config: MakeConfig
) -> None:
    recorder = TraceRecorder()
    for steps in (2, 3, 1):
        config = make_config(steps=steps, output_dir=f"runs/{steps}")
        train(config, recorder=recorder)
        store = ReplayedRun.open(recorder.folder_of(config)).store
        assert (store.manifest.end_step, store.complete) == (steps, True)


def test_overwriting_replaces_run_and_trace_and_needs_to_be_asked_for(
    workplace: Path, make_config: MakeConfig, apart: tuple[Files, Files], bytes_of: BytesOf
) -> None:
    traced(make_config(seed=12), folder="trace")
    (Path("trace") / "notes.txt").write_text("mine")
    before = run_bytes(), bytes_of("trace")
    with pytest.raises(CircuitError, match="of an earlier `circuit train`"):
        traced(make_config(), folder="trace")
    with pytest.raises(CircuitError, match="of an earlier `circuit optimizer-update-trace`"):
        traced(make_config(output_dir="runs/other"), folder="trace")
    with pytest.raises(CircuitError, match=r"with other settings: .*the config.s seed"):
        traced(make_config(output_dir="runs/other"), folder="trace", resume=True)
    assert not Path("runs/other").exists()
    assert before == (run_bytes(), bytes_of("trace"))
    traced(make_config(), folder="trace", overwrite=True)
    assert (run_bytes(), bytes_of("trace")) == apart
    assert (Path("trace") / "notes.txt").read_text() == "mine"


def test_a_historical_replay_executes_the_steps_again(
    workplace: Path, make_config: MakeConfig, recording: Recording, bytes_of: BytesOf
) -> None:
    """What was recorded while training proves nothing of itself."""
    traced(make_config())
    assert (TRACE / WHILE_TRAINING).exists()
    with pytest.raises(CircuitError, match="none has been executed again"):
        recording(make_config(), TRACE, resume=True, require_historical_replay=True)
    recorded = bytes_of(TRACE)
    proved = recording(make_config(), TRACE, overwrite=True, require_historical_replay=True)
    assert (proved.steps, proved.history) == (12, [3, 6, 9, 12])
    assert bytes_of(TRACE) == recorded
    assert not (TRACE / WHILE_TRAINING).exists()


def test_a_trace_that_was_executed_again_stays_so_while_its_run_goes_on_beyond_it(
    workplace: Path, make_config: MakeConfig, recording: Recording
) -> None:
    again = {"end_step": 7, "require_historical_replay": True}
    train(make_config(), stop_at=7)
    assert {3, 6, 7} <= {*recording(make_config(), TRACE, **again).history}
    traced(make_config(), end_step=7, resume=True)
    assert not (TRACE / WHILE_TRAINING).exists()
    assert {3, 6, 7} <= {*recording(make_config(), TRACE, resume=True, **again).history}


# --- as it is typed -------------------------------------------------------------------------------


def report_of(folder: Path) -> dict[str, Any]:
    """Its report without what belongs to one call."""
    report = json.loads((folder / "optimizer_update_trace_report.json").read_text("utf-8"))
    del report["provenance"], report["digest"]
    return report


@pytest.fixture
def config_file(workplace: Path, make_config: MakeConfig) -> str:
    Path("tiny.json").write_text(make_config().to_json(), "utf-8")
    return "tiny.json"


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (("--trace", "--overwrite"), TRACE),
        (("--trace=elsewhere", "--trace-anchor-every", "5"), Path("elsewhere")),
        (("--trace=runs/../runs/tiny/analysis/it", "--overwrite"), RUN / "analysis/it"),
    ],
    ids=["without a folder", "with one", "with one spelled another way"],
)
def test_a_typed_trace_is_the_one_that_trace_record_makes(
    config_file: str,
    capsys: pytest.CaptureFixture[str],
    bytes_of: BytesOf,
    words: tuple[str, ...],
    folder: Path,
) -> None:
    done = type_and_read(["train", "--config", config_file, *words], capsys)
    assert done.code == 0, done.err
    assert "recorded 12 steps; the terms sum to every update" in done.out
    assert "made from an earlier run" not in done.out
    own = ("--config", f"{RUN}/run_config.json", "--from-initialization", "--end-step", "12")
    anchors = ("--anchor-every", "5") if len(words) == 3 else ()
    record = ["trace", "record", *own, *anchors, "--output-dir", "afterwards"]
    assert type_and_read(record, capsys).code == 0
    assert bytes_of(folder) == bytes_of("afterwards")
    assert report_of(folder) == report_of(Path("afterwards"))


@pytest.mark.parametrize("command", ["train", "study train"])
@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("", None),
        ("--trace", ""),
        ("--trace --set seed=3", ""),
        ("--trace=", ""),
        ("--trace .", "."),
        ("--trace=a --set seed=3", "a"),
    ],
)
def test_a_trace_may_stand_without_a_folder(command: str, words: str, folder: str | None) -> None:
    parser: Any = get_command(app)
    for name in command.split():
        parser = parser.commands[name]
    typed = f"--config c.json {words}".split()
    assert parser.make_context(command, typed).params["trace"] == folder


def test_a_stopped_trace_is_reported_once_it_is_finished(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", config_file, "--trace", "--json"]
    half = type_and_read([*words, "--stop-at-step", "7"], capsys)
    assert (half.code, "trace" in half.payload) == (0, False)
    assert not (TRACE / "optimizer_update_trace_report.json").exists()
    whole = type_and_read([*words, "--resume"], capsys)
    assert whole.payload["trace"]["summary"]["steps"] == 12
    paths = [Path(path) for path in whole.payload["paths"]]
    assert all(path.is_file() for path in paths)
    assert TRACE / "optimizer_update_trace_report.json" in paths


def test_options_of_a_trace_need_one(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("end-step", "anchor-every", "checkpoint-every", "top-k-parameters"):
        typed = ["train", "--config", config_file, f"--trace-{option}", "3"]
        done = type_and_read(typed, capsys)
        assert (done.code, f"--trace-{option} without --trace" in done.err) == (2, True)
    assert not Path("runs").exists()
    assert "missing option '--config'" in type_and_read(["train"], capsys).err
    assert "missing option '--config'" in type_and_read(["train", "--trace"], capsys).err


def test_ctrl_c_stops_run_and_trace_at_one_step(
    config_file: str,
    capsys: pytest.CaptureFixture[str],
    apart: tuple[Files, Files],
    bytes_of: BytesOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    advance = TrainingSession.advance

    def interrupted(session: TrainingSession, **hooks: Any) -> Any:
        if session.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(session, **hooks)

    words = ["train", "--config", config_file, "--trace", "--trace-anchor-every", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "advance", interrupted)
        done = type_and_read(words, capsys)
    assert (done.code, "interrupted after step 5" in done.err) == (130, True)
    assert done.err.endswith("go on with --resume and the same --trace\n")
    assert ReplayedRun.open(TRACE).store.last_step == 5
    assert type_and_read([*words, "--resume"], capsys).code == 0
    kept = {name: run_bytes()[name] for name in apart[0]}  # a checkpoint of step 5 beside them
    assert (kept, bytes_of(TRACE)) == apart


def test_a_run_that_leaves_its_trace_behind_says_how_to_finish_it(
    config_file: str, capsys: pytest.CaptureFixture[str], bytes_of: BytesOf
) -> None:
    words = ["train", "--config", config_file]
    few = ("--trace-anchor-every", "5", "--stop-at-step", "4")
    assert type_and_read([*words, "--trace", *few], capsys).code == 0
    (TRACE / ROWS).rename("rows")
    done = type_and_read([*words, "--resume", "--stop-at-step", "5"], capsys)
    assert (done.code, "note: the trace of this run cannot be read" in done.out) == (0, True)
    Path("rows").rename(TRACE / ROWS)
    done = type_and_read([*words, "--resume"], capsys)
    said, command = done.out.rstrip().splitlines()[-1].split(" ends at step 4; finish it with: ")
    assert said == f"note: the trace in {TRACE}"
    assert type_and_read(shlex.split(command)[1:], capsys).code == 0
    assert ReplayedRun.open(TRACE).verify().steps == 12
    assert "note" not in type_and_read([*words, "--resume"], capsys).out
