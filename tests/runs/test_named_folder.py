"""The folder that is named is the folder that is meant: copied, moved and retrained runs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from circuit.cli.app import app
from command_line import Done
from tiny_run import RUN
from watched import OPENED, opens

import circuit as library
from circuit.config import digest_of
from circuit.errors import CircuitError
from circuit.page.reports import Reports
from circuit.runs.checkpointed import open_folder
from circuit.train_config import load_run_config
from circuit.training.loop import train
from circuit.training.run_folder import BEST, METRICS, saved_states

Circuit = Callable[..., Done]
COPY = Path("runs/copy")
PROBE = f"{COPY}/analysis/probe_set.jsonl"
FROM_START = ("--from-initialization", "--end-step", "6", "--anchor-every", "3")
STEPS = [f"{COPY}/checkpoints/step_{step:06d}.pt" for step in (6, 12)]
TWO = [word for path in STEPS for word in ("--checkpoint", path)]
OUT = ("--output-dir", f"{COPY}/analysis/out")
CONFIG = ("--config", str(COPY))
PROBES = (*CONFIG, "--probe-set", PROBE, *OUT)
QK = ("--head", "L1H0", "--rank", "2", "--end-step", "2", "--optimizer-trace-dir", f"{COPY}/trace")

COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", *CONFIG, "--overwrite", "--stop-at-step", "3"),
    "evaluate": ("evaluate", *CONFIG, "--checkpoint", STEPS[0]),
    "optimizer-update-trace": ("optimizer-update-trace", *CONFIG, *FROM_START, *OUT),
    "trace record": ("trace", "record", *CONFIG, *FROM_START, *OUT),
    "bilinear-qk-match-separation": (
        *("bilinear-qk-match-separation", *PROBES, "--rank", "2"),
        *("--checkpoint-dir", f"{COPY}/checkpoints"),
    ),
    "weight-svd-trace": ("weight-svd-trace", *CONFIG, *OUT, *TWO),
    "trace qk": ("trace", "qk", *PROBES, *QK, "--min-route-pairs-per-type", "1"),
    "page": ("page", str(COPY), "--output", f"{COPY}/page.html"),
}
"""Commands that take a run, so that each writes into the copy alone."""


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def copied(trained: Path, traced: Path) -> Iterator[Path]:
    """A copy of the run, whose original is in its old place and must stay as it is."""
    shutil.copytree(traced, trained / "trace")
    shutil.copytree(trained, COPY)
    before = contents(trained)
    yield COPY
    assert contents(trained) == before


def test_every_command_of_a_copied_run_is_listed_or_needs_none() -> None:
    """A command that takes `--config` of a run is in the table, or shares its reader with one."""
    names = {command.name for command in app.registered_commands}
    assert {name for name in COMMANDS if " " not in name} <= names


@pytest.mark.parametrize("name", COMMANDS)
def test_a_copy_is_read_and_written_and_the_original_is_not(
    copied: Path, circuit: Circuit, name: str
) -> None:
    done = circuit(*COMMANDS[name])
    assert done.code == 0, done.err
    for path in COPY.rglob("*.json"):
        assert str(RUN) not in path.read_text() or path.name in ("trace.json", "run_config.json")


def test_a_copy_never_opens_the_original(copied: Path) -> None:
    """A command that reads config, checkpoints, benchmark and trace."""
    assert opens(RUN, [COMMANDS["trace qk"]]) == 0
    assert opens(copied, [COMMANDS["trace qk"]]) == OPENED


def test_a_retrained_copy_records_where_it_lies(copied: Path, circuit: Circuit) -> None:
    assert circuit("train", "--config", str(copied), "--overwrite").code == 0
    assert json.loads((copied / "run_config.json").read_text())["output_dir"] == str(copied)


def test_resuming_a_moved_run_goes_on_there(trained: Path, circuit: Circuit) -> None:
    """m1 has become m2, and another run has begun at m1."""
    config = load_run_config(trained).replace(output_dir="runs/m1")
    train(config, stop_at=6)
    Path("runs/m1").rename("runs/m2")
    train(config.replace(seed=99), stop_at=3)
    other = contents(Path("runs/m1"))
    assert circuit("train", "--config", "runs/m2", "--resume").code == 0
    assert contents(Path("runs/m1")) == other
    assert max(saved_states(Path("runs/m2"))) == 12


@pytest.mark.parametrize("where", [".", "elsewhere/deep"])
def test_a_moved_run_resumes_from_any_working_directory(
    trained: Path, circuit: Circuit, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected = contents(trained / "checkpoints")
    train(load_run_config(trained).replace(output_dir="runs/m1"), stop_at=6)
    moved = Path("runs/m1").rename("runs/m2").resolve()
    Path(where).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(where)
    done = circuit("train", "--config", os.path.relpath(moved), "--resume")
    assert done.code == 0, done.err
    assert "resumed from the checkpoint of step 6" in done.out
    found = {Path(name).name for name in contents(moved / "checkpoints")}
    assert found == {Path(name).name for name in expected}


@pytest.mark.parametrize("name", COMMANDS)
def test_another_folder_of_the_benchmarks_name_is_not_taken_for_it(
    copied: Path, circuit: Circuit, name: str
) -> None:
    """It stands nearer, as the folder of a report does that is named like the benchmark's."""
    for nearer in (copied / "analysis", copied, copied.parent):
        (nearer / "data/tiny").mkdir(parents=True)
    done = circuit(*COMMANDS[name])
    assert done.code == 0, done.err


def test_a_history_that_is_not_there_is_refused(copied: Path, circuit: Circuit) -> None:
    shutil.rmtree(copied / "checkpoints")
    words = ("trace", "record", *CONFIG, *FROM_START, *OUT, "--require-historical-replay")
    done = circuit(*words)
    assert done.code == 2
    assert f"{copied}/checkpoints" in done.err.replace("\n", "")


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_starting_where_there_is_nothing_to_resume_is_said(
    trained: Path, circuit: Circuit, words: tuple[str, ...]
) -> None:
    fresh = ("--set", "output_dir=runs/fresh", "--set", "steps=2")
    done = circuit("train", "--config", "tiny.json", *fresh, "--resume", *words)
    assert done.code == 0
    said = "runs/fresh holds no saved state to resume from: starting at step 0"
    assert said in " ".join(done.err.split())
    assert circuit("train", "--config", "tiny.json", *fresh, "--resume-from", "1").code == 2


def test_a_finished_run_without_states_is_not_trained_anew(trained: Path, circuit: Circuit) -> None:
    shutil.rmtree(trained / "checkpoints")
    before = contents(trained)
    done = circuit("train", "--config", str(trained), "--resume")
    assert (done.code, contents(trained)) == (2, before)
    assert "checkpoints are gone" in done.err.replace("\n", " ")


def test_a_run_that_has_only_its_best_state_goes_on(trained: Path, circuit: Circuit) -> None:
    """As after SIGKILL or a full disk between the best state and the first checkpoint."""
    config = load_run_config(trained).replace(
        output_dir="runs/killed", eval_every=2, checkpoint_every=12
    )
    expected = train(config.replace(output_dir="runs/straight"))
    train(config, stop_at=6)
    (Path("runs/killed/checkpoints/step_000006.pt")).unlink()
    best = max(saved_states(Path("runs/killed")))
    assert best > 0
    done = circuit("train", "--config", "runs/killed", "--resume")
    assert (done.code, f"step {best}" in done.out) == (0, True)
    for name in (BEST, "checkpoints/step_000012.pt"):
        states = (
            library.open_run(run).state("best" if name == BEST else 12)
            for run in (expected.folder, "runs/killed")
        )
        one, other = states
        assert one.step == other.step
        assert all(one.parameters[n].equal(other.parameters[n]) for n in one.parameters)
    assert Path("runs/killed", METRICS).read_bytes() == (expected.folder / METRICS).read_bytes()


def test_a_key_that_stands_twice_is_refused_in_every_json_of_a_run(
    trained: Path, traced: Path, circuit: Circuit
) -> None:
    """The files that commands read: config, environment, manifests, benchmark, probe set, trace."""
    wrong = []
    shutil.copytree(traced, trained / "trace")
    resume = ("train", "--config", str(trained), "--resume")
    show = ("trace", "show", f"{trained}/trace")
    draw = ("generate-probe-set", "--benchmark-dir", "data/tiny", "--output", "p.jsonl")
    draw += ("--split", "train", "--examples-per-split", "1")
    read = (*COMMANDS["bilinear-qk-match-separation"],)
    read = tuple(word.replace(str(COPY), str(RUN)) for word in read)
    for path, words in {
        trained / "run_config.json": resume,
        trained / "environment.json": resume,
        trained / "train.manifest.json": resume,
        trained / "trace/trace.json": show,
        Path("data/tiny/metadata.json"): draw,
        trained / "analysis/probe_set.metadata.json": read,
    }.items():
        sound = path.read_text()
        key, value = next(iter(json.loads(sound).items()))
        path.write_text("{" + f"{json.dumps(key)}: {json.dumps(value)}, " + sound.lstrip()[1:])
        done = circuit(*words)
        if done.code != 2 or f"'{key}' stands twice" not in done.err.replace("\n", " "):
            wrong.append((path, done))
        path.write_text(sound)
    assert wrong == []


def recipe_of(run: Path) -> str:
    return load_run_config(run).recipe_digest()


def test_reports_of_the_run_that_was_here_before_are_left_out(
    trained: Path, circuit: Circuit
) -> None:
    report = "analysis/bilinear_qk_match_separation/bilinear_qk_match_separation_report.json"
    words = ("bilinear-qk-match-separation", "--config", str(trained), "--rank", "2")
    words += ("--probe-set", f"{trained}/analysis/probe_set.jsonl")
    words += ("--checkpoint-dir", f"{trained}/checkpoints")
    words += ("--output-dir", str((trained / report).parent))
    assert circuit(*words).code == 0
    assert Reports(open_folder(trained)).left_out == []
    moved = trained.rename("runs/moved")  # the same run, wherever it lies
    assert Reports(open_folder(moved)).left_out == []
    moved.rename(trained)
    retrain = ("train", "--config", str(trained), "--overwrite", "--set", "seed=99")
    assert circuit(*retrain).code == 0
    found = Reports(open_folder(trained))
    assert (found.left_out, found.by_command) == ([report], {})
    done = circuit("page", str(trained), "--output", "page.html")
    assert f"left out, a report of another run: {report}" in done.out
    assert "left out, as reports of another run" in Path("page.html").read_text()
    again = next(line for line in done.out.splitlines() if f"  circuit {words[0]} " in line)
    assert again.endswith("--overwrite")
    assert circuit(*shlex.split(again)[1:]).code == 0
    assert Reports(open_folder(trained)).left_out == []
    payload = json.loads((trained / report).read_text().replace(recipe_of(trained), "0"))
    del payload["digest"]
    (trained / report).write_text(json.dumps({**payload, "digest": digest_of(payload)}))
    other = train(load_run_config(trained).replace(output_dir="runs/other", seed=5)).folder
    done = circuit("page", str(trained), str(other), "--compare", "--output", "c.html", "--json")
    assert [name.endswith(report) for name in done.payload["left_out"]] == [True]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def test_a_finished_run_is_extended_and_equals_the_straight_one(
    trained: Path, circuit: Circuit
) -> None:
    config = load_run_config(trained).replace(output_dir="runs/long", steps=18)
    straight = train(config)
    done = circuit("train", "--config", str(trained), "--resume", "--set", "steps=18")
    assert done.code == 0, done.err
    ends = (library.open_run(run).state(18) for run in (straight.folder, trained))
    one, other = ends
    assert all(one.parameters[name].equal(other.parameters[name]) for name in one.parameters)
    assert load_run_config(trained).steps == 18
    assert json.loads((trained / "summary.json").read_text())["steps"] == 18
    assert rows(trained) == rows(straight.folder)


def test_a_run_whose_schedule_ends_cannot_be_extended(trained: Path, circuit: Circuit) -> None:
    changes = ("--set", 'schedule={"name":"cosine"}', "--set", "output_dir=runs/cosine")
    assert circuit("train", "--config", "tiny.json", *changes).code == 0
    done = circuit("train", "--config", "runs/cosine", "--resume", "--set", "steps=18")
    assert done.code == 2
    assert "steps is 12 there and 18 here" in done.err.replace("\n", " ")


@pytest.mark.parametrize(
    "change", ["log_every=4", "eval_every=3", "checkpoint_every=2", 'tracked_splits=["train"]']
)
def test_bookkeeping_may_change_on_resume_and_moves_no_bit(
    trained: Path, circuit: Circuit, change: str
) -> None:
    best = ("--set", 'best={"split":"train"}') if "tracked" in change else ()
    train(load_run_config(trained).replace(output_dir="runs/half"), stop_at=6)
    done = circuit("train", "--config", "runs/half", "--resume", "--set", change, *best)
    assert done.code == 0, done.err
    one, other = (library.open_run(run).state(12) for run in (trained, "runs/half"))
    for mine, theirs in ((one.parameters, other.parameters), *zip_moments(one, other)):
        assert all(mine[name].equal(theirs[name]) for name in mine)
    name, _, value = change.partition("=")
    assert json.loads(Path("runs/half/run_config.json").read_text())[name] == json.loads(value)


def zip_moments(one: Any, other: Any) -> list[tuple[Any, Any]]:
    return [(one.moments[name], other.moments[name]) for name in one.moments]


def test_going_on_from_an_earlier_checkpoint(trained: Path, circuit: Circuit) -> None:
    expected = contents(trained)
    refused = circuit("train", "--config", str(trained), "--resume-from", "6")
    assert (refused.code, contents(trained)) == (2, expected)
    assert "2 later checkpoints, up to step 12" in refused.err.replace("\n", " ")
    with pytest.raises(CircuitError, match=r"no checkpoint of step 7 .* expected one of 3, "):
        train(load_run_config(trained), resume_from=7)
    words = ("train", "--config", str(trained), "--resume-from", "6", "--overwrite")
    assert circuit(*words, "--stop-at-step", "9").code == 0
    assert [step for step in saved_states(trained) if step > 9] == []
    assert circuit("train", "--config", str(trained), "--resume").code == 0
    again = contents(trained)
    differing = {Path(name).name for name in expected if again[name] != expected[name]}
    assert differing <= {"summary.json", "train.manifest.json"}  # seconds; the order of claims


def test_lost_rows_are_refused_before_anything_is_dropped(trained: Path, circuit: Circuit) -> None:
    metrics = trained / METRICS
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines[:3], *lines[4:]]))
    before = contents(trained)
    done = circuit("train", "--config", str(trained), "--resume-from", "9", "--overwrite")
    assert (done.code, contents(trained)) == (2, before)
    assert "rows up to step 9; expected" in " ".join(done.err.split())


def test_a_kill_while_later_states_are_dropped_loses_none_for_good(
    trained: Path, circuit: Circuit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each file that `--resume-from` removes, and after the last."""
    straight = {name: data for name, data in contents(trained).items() if "summary" not in name}
    shutil.copytree(trained, "whole")
    unlink, kept = Path.unlink, 0
    while True:
        shutil.rmtree(trained)
        shutil.copytree("whole", trained)
        left = kept

        def stopped(path: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if path.is_relative_to(trained) and left == 0:
                raise KeyboardInterrupt
            left -= path.is_relative_to(trained)
            unlink(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", stopped)
            with contextlib.suppress(KeyboardInterrupt):
                config = load_run_config(trained)
                train(config, resume_from=3, overwrite=True, stop=lambda: True)
        finished = left >= 0
        train(load_run_config(trained), resume=True)
        again = contents(trained)
        wrong = [name for name, data in straight.items() if again.get(name) != data]
        assert [name for name in wrong if "manifest" not in name] == [], f"before removal {kept}"
        if finished and left > 0:
            break
        kept += 1
    print(f"killed before each of {kept} removals: files that differ 0")
    assert kept >= 4


def test_a_best_state_by_another_measure_is_forgotten(trained: Path, circuit: Circuit) -> None:
    done = circuit(
        "train", "--config", str(trained), "--resume", "--set", "best.metric=value_accuracy"
    )
    assert done.code == 0, done.err
    assert json.loads((trained / "summary.json").read_text())["best"] is None
    assert not (trained / BEST).exists()


def test_a_link_and_two_dots_lead_where_the_file_is(trained: Path, circuit: Circuit) -> None:
    Path("far/deep").mkdir(parents=True)
    shutil.copytree(trained, "far/tiny")
    shutil.copytree(trained, "tiny")
    Path("link").symlink_to("far/deep")
    before = contents(Path("tiny"))
    done = circuit("train", "--config", "link/../tiny", "--overwrite", "--set", "seed=5")
    assert done.code == 0, done.err
    assert contents(Path("tiny")) == before
    assert load_run_config("far/tiny").seed == 5
