"""The workflow as it runs: resume, invalidation with its reason, commands in one process."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from circuit.cli import main
from circuit.cli.jobs import run_commands
from warm_jobs import warm_jobs

from circuit import artifacts
from circuit.artifacts import atomic_write_bytes, dump_json
from circuit.config import load_config
from circuit.environment import recorded_facts
from circuit.errors import CircuitError
from circuit.sealed import sealed
from circuit.studies.continuation import run_goes_on, take_over, trace_goes_on
from circuit.studies.costs import cost_of
from circuit.studies.reproduce import (
    Plan,
    Request,
    make_plan,
)
from circuit.studies.scales import SCALES
from circuit.studies.workflow import Event, Outcome, packaged_profile, read_events, run
from circuit.train_config import TrainConfig
from circuit.training.loop import train

SMOKE = Path("artifacts/scale/smoke")
PROBE = SMOKE / "artifacts/runs/symbolic_kv_reference_formation/analysis/probe_set.jsonl"
CONFIG = SMOKE / "configs/benchmark/symbolic_kv_base.json"
DATA = ("--until", "generate_probe_set__common")


def reproduce(*options: str, target: str = "reference", **more: Any) -> list[Event]:
    """Runs a target at the smallest scale; what was heard."""
    heard: list[Event] = []
    request = Request(target, SCALES["smoke"], options=options)
    outcome = run(request, heard.append, **more)
    assert outcome.code == 0, (SMOKE / "artifacts/logs/snakemake.log").read_text()[-3000:]
    return heard


def digests(folder: Path) -> dict[str, str]:
    """Of every row file; clocks stand in other files."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.jsonl"))
    }


@pytest.fixture
def jobs() -> Iterator[str]:
    """A python whose jobs of a workflow import nothing anew."""
    with warm_jobs() as python:
        yield python


def test_data_are_made_again_where_the_config_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", jobs)
    heard = reproduce(*DATA)
    done = [event.rule for event in heard if event.kind == "finished"]
    assert done == ["configs__common", "generate_benchmark__common", "generate_probe_set__common"]
    first = PROBE.read_bytes()
    changed = json.loads(CONFIG.read_text()) | {"seed": 8}
    CONFIG.write_text(json.dumps(changed))
    plan = make_plan(Request("reference", SCALES["smoke"], options=DATA))
    (again,) = (rule for rule in plan.again if rule.name == "generate_benchmark__common")
    assert "symbolic_kv_base.json" in again.reason
    reproduce(*DATA)
    assert PROBE.read_bytes() != first


def test_the_smoke_run_ends_with_every_output_of_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", jobs)
    reproduce(target="paper")
    plan = make_plan(Request("paper", SCALES["smoke"]))
    assert plan.jobs == ()
    missing = [p for p in plan.outputs if not any(SMOKE.glob(p.replace("SELECTED", "L*")))]
    assert missing == []


@pytest.mark.slow
def test_a_smoke_run_killed_three_times_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    reproduce(target="paper")
    monkeypatch.chdir(tmp_path / "killed")
    command = [sys.executable, "-m", "circuit.cli", "reproduce", "paper", "--scale", "smoke"]
    for seconds in (20, 35, 50):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        assert process.poll() is None, "it ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)
    reproduce(target="paper")
    monkeypatch.chdir(tmp_path)
    whole, killed = (
        {path.removeprefix(name): digest for path, digest in digests(Path(name)).items()}
        for name in ("whole", "killed")
    )
    assert len(whole) > 50
    assert whole == killed


SAID = """
localrule paper:
    jobid: 0
rule part:
    output: 2_of_4/it.json
    log: logs/part_2.log
    jobid: 3
    wildcards: part=2
Finished jobid: 0 (Rule: paper)
3 of 20 steps (15%) done
Error in rule part:
    jobid: 3
    log: logs/part_2.log (check log file(s) for error details)
Exiting because a job execution failed. Look below for error messages
Error in rule part:
    jobid: 3
"""


def test_lines_of_the_log_are_events() -> None:
    """A job of a rule that has several is called as its log is; what is told twice is one event."""
    assert list(read_events(SAID.splitlines())) == [
        Event("started", "paper"),
        Event("started", "part_2"),
        Event("finished", "paper"),
        Event("progress", done=3, total=20),
        Event("failed", "part_2"),
    ]


def test_commands_of_one_process_stop_at_the_first_failure(circuit: Callable[..., Any]) -> None:
    good = ["study", "configs", "--scale", "smoke"]
    bad = ["evaluate", "--config", "nowhere.json", "--checkpoint", "x.pt"]
    assert run_commands([good, good]) == 0
    assert Path("configs/train/symbolic_kv_formation.json").is_file()
    Path("configs/train/symbolic_kv_formation.json").unlink()
    assert run_commands([bad, good]) == 2
    assert not Path("configs/train/symbolic_kv_formation.json").exists()


@pytest.fixture
def config(trained: Path) -> TrainConfig:
    return load_config(trained / "run_config.json", TrainConfig)


def test_a_run_goes_on_with_its_own_config_benchmark_and_version_alone(
    trained: Path, config: TrainConfig
) -> None:
    assert run_goes_on(config)
    assert run_goes_on(config.replace(threads=2)), "threads are the machine's"
    assert not run_goes_on(config.replace(seed=12))
    environment = trained / "environment.json"
    facts = json.loads(environment.read_text())
    environment.write_text(json.dumps(facts | {"circuit": "0.0.0"}))
    assert not run_goes_on(config)
    environment.write_text(json.dumps(facts))
    metadata = Path(config.benchmark_dir) / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"digest": "0" * 64}))
    assert not run_goes_on(config)


def test_a_run_without_checkpoints_starts_anew(trained: Path, config: TrainConfig) -> None:
    for checkpoint in (trained / "checkpoints").glob("step_*.pt"):
        checkpoint.unlink()
    assert not run_goes_on(config)


def test_a_trace_goes_on_with_its_own_run_alone(config: TrainConfig, traced: Path) -> None:
    assert trace_goes_on(traced, config)
    assert not trace_goes_on(traced, config.replace(seed=12))
    assert not trace_goes_on(Path("nowhere"), config)


def test_a_traced_run_goes_on_if_its_trace_is_not_behind(config: TrainConfig, traced: Path) -> None:
    assert run_goes_on(config, traced)
    assert not run_goes_on(config, Path("nowhere"))
    rows = traced / "optimizer_update_trace_rows.jsonl"
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:-1]))
    assert not run_goes_on(config, traced)
    assert run_goes_on(config)


@pytest.fixture
def shorter(trained: Path, config: TrainConfig) -> TrainConfig:
    """A run of 12 steps whose best state is one of those that it saves every third."""
    again = config.replace(eval_every=6)
    train(again, overwrite=True)
    return again


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"checkpoint_every": 6}, 12),
        ({"steps": 18}, 12),
        ({"steps": 6}, 6),
        ({"steps": 7}, 6),
    ],
)
def test_a_run_taken_over_is_the_one_that_was_trained(
    circuit: Callable[..., Any], shorter: TrainConfig, change: dict[str, int], taken: int
) -> None:
    """Fewer states, or another end: byte for byte, but for the clock and the order of writing."""
    own = shorter.replace(**change, name="other", output_dir="runs/other")
    assert f"step 0 to {taken} taken over" in trained_twice(circuit, own, shorter.output_dir)


def trained_twice(circuit: Callable[..., Any], own: TrainConfig, source: str) -> str:
    """What a run says that begins with another one; it ends as one from the start does."""
    Path("own.json").write_text(own.to_json())
    said, folders = [], [Path("runs/over"), Path("runs/whole")]
    for folder, more in zip(folders, (("--same-as", source), ()), strict=True):
        done = circuit("study", "train", "--config", "own.json", *more)
        assert done.code == 0, done.err
        said.append(done.out)
        Path(own.output_dir).rename(folder)
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert files[0] == files[1]
    for file in files[0]:
        if file.name not in ("summary.json", "train.manifest.json"):
            assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    return said[0]


@pytest.mark.parametrize(
    ("legs", "said"),
    [
        ([{"log_every": 3, "steps": 6}, {"steps": 12}], "nothing"),
        ([{"log_every": 2, "steps": 9}, {"log_every": 2, "steps": 18}], "step 0 to 6"),
        ([{"steps": 6, "best": {"split": "heldout_pairs"}}, {"steps": 12}], "step 0 to 3"),
    ],
)
def test_what_a_run_did_with_another_bookkeeping_is_not_taken_over(
    circuit: Callable[..., Any], shorter: TrainConfig, legs: list[dict[str, Any]], said: str
) -> None:
    """Where it was resumed: other rows, those of an end that is none any more, another best."""
    for number, leg in enumerate(legs):
        train(shorter.replace(**leg, output_dir="runs/legs"), resume=number > 0)
    own = shorter.replace(**legs[-1], output_dir="runs/own")
    assert f"{said} taken over from runs/legs" in trained_twice(circuit, own, "runs/legs")


def test_a_state_of_another_run_is_not_taken_over(shorter: TrainConfig) -> None:
    train(shorter.replace(seed=12, output_dir="runs/seed"))
    own, state = shorter.replace(output_dir="runs/own"), "checkpoints/step_000009.pt"
    Path("runs/seed", state).replace(Path(shorter.output_dir, state))
    assert take_over(own, Path(shorter.output_dir)) == 6


def test_nothing_is_taken_over_where_each_step_is_traced(
    circuit: Callable[..., Any], shorter: TrainConfig
) -> None:
    Path("own.json").write_text(shorter.replace(output_dir="runs/own").to_json())
    asked = ("study", "train", "--config", "own.json", "--same-as", shorter.output_dir)
    done = circuit(*asked, "--trace", "runs/trace")
    assert done.code == 0, done.err
    assert "nothing taken over" in done.out


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all its files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_cannot_be_taken_over_leaves_what_there_is(
    circuit: Callable[..., Any], shorter: TrainConfig
) -> None:
    """A run that is to begin with itself; one whose folder has a file of somebody else."""
    source, own = Path(shorter.output_dir), shorter.replace(output_dir="runs/own", steps=18)
    train(own.replace(seed=12, steps=12))
    Path("runs/own/checkpoints/step_000015.pt").write_text("somebody's")
    for config, fault in ((shorter.replace(steps=18), "itself"), (own, "was not written by")):
        before = contents(Path("runs"))
        Path("own.json").write_text(config.to_json())
        done = circuit("study", "train", "--config", "own.json", "--same-as", str(source))
        assert done.code == 2
        assert fault in done.err
        assert contents(Path("runs")) == before


class Killed(BaseException):
    """What nothing in the program catches."""


@pytest.mark.parametrize("writes", [1, 4, 7, 10, 13])
def test_a_take_over_that_is_killed_ends_like_a_training(
    circuit: Callable[..., Any], shorter: TrainConfig, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """After so many files, manifests among them, in the folder of an earlier run."""
    own, left = shorter.replace(output_dir="runs/own", steps=18), iter(range(writes))
    train(own.replace(seed=12))

    def write(path: Path, payload: bytes) -> None:
        if next(left, None) is None:
            raise Killed
        atomic_write_bytes(path, payload)

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "atomic_write_bytes", write)
        with pytest.raises(Killed):
            take_over(own, Path(shorter.output_dir))
    trained_twice(circuit, own, shorter.output_dir)


@pytest.mark.parametrize(
    "change",
    [{"seed": 12}, {"log_every": 3}, {"eval_every": 3}, {"checkpoint_every": 1}, {"batch_size": 3}],
)
def test_what_is_no_part_of_a_run_is_not_taken_over(
    shorter: TrainConfig, change: dict[str, int]
) -> None:
    own = shorter.replace(**change, output_dir="runs/over")
    assert take_over(own, Path(shorter.output_dir)) == 0
    assert not Path("runs/over").exists()


@pytest.mark.parametrize("fact", [{"circuit": "0.0.0"}, {"torch": "1.0"}, {"threads": 99}])
def test_a_run_of_another_environment_is_not_taken_over(
    shorter: TrainConfig, fact: dict[str, Any]
) -> None:
    source = Path(shorter.output_dir)
    own, path = shorter.replace(output_dir="runs/over"), source / "environment.json"
    facts = recorded_facts(path)
    path.write_text(dump_json(sealed(facts | fact)))
    assert take_over(own, source) == 0
    path.write_text(dump_json(sealed(facts)))
    assert take_over(own, source) == 12


def test_a_run_that_diverges_is_an_outcome_where_one_is_asked_for(
    circuit: Callable[..., Any], trained: Path
) -> None:
    source = str(trained / "run_config.json")
    changes = ("--set", "name=wild", "--set", "output_dir=runs/wild")
    changes += ("--set", 'optimizer={"name":"sgd","learning_rate":1e30}')
    changes += ("--set", "gradient_clip=null")
    made = circuit("study", "derive-config", "--config", source, "--output", "wild.json", *changes)
    assert made.code == 0, made.err
    refused = circuit("study", "train", "--config", "wild.json")
    assert (refused.code, "diverged" in refused.err) == (2, True)
    outcome = Path("runs/wild/outcome.json")
    done = circuit("study", "train", "--config", "wild.json", "--outcome", str(outcome))
    assert done.code == 0, done.err
    assert "diverged" in json.loads(outcome.read_text())["diverged"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nothing=1", "unknown field 'nothing'"),
        ("optimizer.rate=1", "unknown field 'optimizer.rate'"),
        ("steps.last=1", "'steps' holds no fields"),
        ("steps", "field=value"),
        ("steps=-1", "steps"),
    ],
)
def test_bad_changes_of_a_config_are_refused(
    circuit: Callable[..., Any], trained: Path, change: str, said: str
) -> None:
    source = str(trained / "run_config.json")
    words = ("study", "derive-config", "--config", source, "--output", "out.json", "--set", change)
    done = circuit(*words)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("out.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("everything",), "unknown target 'everything'; expected one of reference"),
        (("paper", "--scale", "huge"), "unknown scale 'huge'; expected one of full"),
        (("paper", "--scale", "full"), "configs of the contract are not here"),
        (("paper", "--profile", "nowhere"), "no profile 'nowhere'"),
        (("cross-seed", "--seed", "9:7"), "--seed: '9:7'; expected a seed of 0 to 9999, or FIRST"),
        (("cross-seed", "--seed", "10000"), "--seed: '10000'; expected a seed of 0 to 9999"),
    ],
)
def test_bad_requests_are_refused_in_one_line(
    circuit: Callable[..., Any], words: tuple[str, ...], said: str
) -> None:
    done = circuit("reproduce", *words)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_one_reproduction_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.chdir(tmp_path)
    (SMOKE / ".snakemake").mkdir(parents=True)
    with (SMOKE / ".snakemake" / "circuit.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CircuitError, match="another start of this command is at work"):
            run(Request("paper", SCALES["smoke"]), lambda event: None)


def test_the_slurm_profile_ships() -> None:
    assert "executor: slurm" in (packaged_profile("slurm") / "config.yaml").read_text()


@pytest.mark.parametrize(
    "words", [("--profile", "slurm"), ("--", "--executor", "slurm"), ("--", "--executor=slurm")]
)
def test_without_slurm_nothing_is_submitted(
    circuit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    done = circuit("reproduce", "reference", "--scale", "smoke", *words)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "no Slurm here: sbatch is not on PATH; start it where jobs are submitted" in line
    assert not SMOKE.exists()


@pytest.mark.parametrize("json_asked", [(), ("--json",)])
def test_after_a_failed_pipeline_nothing_is_claimed(
    circuit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, json_asked: tuple[str, ...]
) -> None:
    """The line names the rule and what its command said."""

    def failing(request: Request, _: Any) -> Outcome:
        log = request.folder / "artifacts/logs/snakemake.log"
        log.parent.mkdir(parents=True)
        log.with_name("train__one.log").write_text("$ circuit train\nerror: the disk is full\n")
        return Outcome(1, ["train__one"], log)

    plan = Plan(Request("reference", SCALES["smoke"]), (), (), (), cost_of([], SCALES["smoke"]))
    monkeypatch.setattr("circuit.studies.reproduce.make_plan", lambda _: plan)
    monkeypatch.setattr("circuit.studies.workflow.run", failing)
    done = circuit("reproduce", "reference", "--scale", "smoke", *json_asked)
    assert done.code == 2
    assert "claim" not in done.out + done.err
    assert "failed: train__one (the disk is full); the log holds" in done.err
    assert list(SMOKE.rglob("claims*")) == []


def test_help_of_the_study_imports_no_torch() -> None:
    code = (
        "import sys; from circuit.cli.app import app; import circuit.studies.reproduce;"
        " import circuit.studies.claims; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert main is not None


CHAIN = """
rule all:
    input: expand("o{i}", i=range(4))
rule first:
    output: "f"
    shell: "touch {output}"
rule after:
    input: "f"
    output: "o{i}"
    shell: "echo + >> log; sleep 0.2; echo - >> log; touch {output}"
"""


def test_no_more_jobs_than_cores(tmp_path: Path) -> None:
    """Also behind a job that was ready alone, which Snakemake 9.15.0 does not charge."""
    (tmp_path / "Snakefile").write_text(CHAIN)
    command = [sys.executable, "-m", "circuit.studies.processes", "--cores", "1"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "log").read_text().split() == ["+", "-"] * 4
