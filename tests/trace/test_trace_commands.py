"""The commands of a trace, as they are typed: what they print, write and return."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from command_line import type_and_read

from circuit.artifacts import read_jsonl
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig
from circuit.training import step as step_module
from circuit.training.checkpoints import load_checkpoint

MakeConfig = Callable[..., TrainConfig]
Same = Callable[[Any, Any], bool]
BytesOf = Callable[[Path | str], dict[str, bytes]]
Run = Callable[..., tuple[int, str, str]]

OUTPUT = "runs/tiny/analysis/optimizer_update_trace/stepwise"
CONFIG = "runs/tiny/run_config.json"
CONTRACT = [
    *("--config", CONFIG, "--from-initialization", "--output-dir", OUTPUT, "--device", "cpu"),
    *("--end-step", "12", "--train-split", "train", "--progress-every", "100"),
    *("--checkpoint-every", "1", "--checkpoint-start-step", "0", "--top-k-parameters", "40"),
    *("--require-historical-replay", "--overwrite"),
]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Types a command: exit code, stdout, stderr."""

    def typed(*words: str | Path) -> tuple[int, str, str]:
        done = type_and_read([str(word) for word in words], capsys)
        return done.code, done.out, done.err

    return typed


def report_of(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "optimizer_update_trace_report.json").read_text("utf-8"))


def test_the_contracts_command_leaves_its_outputs(run_folder: Path, run: Run) -> None:
    code, out, err = run("optimizer-update-trace", *CONTRACT)
    assert (code, err) == (0, "")
    law = "4 of 4 checkpoints that the run saved are equal, 0 bits differ"
    assert " ".join(out.split()).endswith(law)
    assert sorted(path.name for path in Path(OUTPUT).iterdir() if path.name[0] != ".") == [
        "checkpoints",
        "optimizer-update-trace.manifest.json",
        "optimizer_update_trace.svg",
        "optimizer_update_trace_loss.svg",
        "optimizer_update_trace_report.json",
        "optimizer_update_trace_report.md",
        "optimizer_update_trace_rows.jsonl",
        "trace.json",
    ]
    assert ReplayedRun.open(OUTPUT).verify().equal
    code, _, _ = run("optimizer-update-trace", *CONTRACT)  # again, over the first
    assert code == 0


def test_the_reports_summary_is_that_of_the_rows(run_folder: Path, run: Run) -> None:
    run("optimizer-update-trace", *CONTRACT)
    rows = read_jsonl(Path(OUTPUT) / "optimizer_update_trace_rows.jsonl")
    report = report_of(OUTPUT)
    found = report["summary"]
    assert (found["steps"], found["start_step"], found["end_step"]) == (12, 0, 12)
    assert found["anchors"] == len(list((Path(OUTPUT) / "checkpoints").iterdir())) == 2
    assert (found["first_loss"], found["last_loss"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert found["mean_clip_factor"] == fmean(row["clip_factor"] for row in rows)
    assert found["mean_update_norm"] == fmean(row["update_norm"] for row in rows)
    for term, value in found["mean_term_norms"].items():
        assert value == fmean(row["term_norms"][term] for row in rows)
    assert list(found["mean_term_norms"]) == list(rows[0]["term_norms"])
    assert found["max_rounding_ulps"] == max(row["rounding_ulps"] for row in rows)
    relative = [row["term_norms"]["rounding"] / row["update_norm"] for row in rows]
    assert found["max_relative_rounding"] == max(relative)
    first = Counter(row["top_parameters"][0]["name"] for row in rows)
    assert found["most_moved_tensors"] == dict(first)
    assert found["historical_checkpoints_equal"] == [3, 6, 9, 12]
    assert report["schema_version"] == 2
    assert report["parameters"]["top_k_parameters"] == 40
    assert {"environment", "seconds", "config_digest"} <= set(report["provenance"])
    tensors = load_checkpoint(Path(OUTPUT) / "checkpoints" / "step_000012.pt").parameters
    assert all(len(row["top_parameters"]) == min(40, len(tensors)) for row in rows)
    page = (Path(OUTPUT) / "optimizer_update_trace_report.md").read_text("utf-8")
    for term, value in found["mean_term_norms"].items():
        assert f"| {term} | {value:.4g} |" in page
    assert "![Norms of the update and its terms](optimizer_update_trace.svg)" in page
    figure = ElementTree.parse(Path(OUTPUT) / "optimizer_update_trace.svg").getroot()
    assert figure.tag.endswith("svg")


def test_equal_inputs_give_equal_reports(run_folder: Path, run: Run) -> None:
    """All but the provenance, in whatever folder."""
    for folder in ("one", "deep/two"):
        words = ["--from-initialization", "--end-step", "6", "--output-dir", folder]
        assert run("optimizer-update-trace", "--config", CONFIG, *words)[0] == 0
    reports = [report_of(folder) for folder in ("one", "deep/two")]
    for report in reports:
        del report["provenance"], report["digest"]
    assert reports[0] == reports[1]
    for name in ("optimizer_update_trace.svg", "optimizer_update_trace_report.md"):
        texts = [(Path(folder) / name).read_text("utf-8") for folder in ("one", "deep/two")]
        assert texts[0] == texts[1]
        assert str(Path.cwd()) not in texts[0]


def test_a_rate_of_zero_at_the_last_step_is_reported(
    workplace: Path, make_config: MakeConfig, run: Run
) -> None:
    Path("c.json").write_text(make_config(schedule={"name": "linear"}).to_json(), "utf-8")
    words = ["--from-initialization", "--end-step", "12", "--output-dir", "trace"]
    code, _, err = run("trace", "record", "--config", "c.json", *words)
    assert (code, err) == (0, "")
    rows = read_jsonl(Path("trace/optimizer_update_trace_rows.jsonl"))
    assert rows[-1]["update_norm"] == 0.0
    assert math.isfinite(report_of("trace")["summary"]["max_relative_rounding"])


def test_record_speaks_json_and_its_paths_exist(run_folder: Path, run: Run) -> None:
    start = "runs/tiny/checkpoints/step_000006.pt"
    words = ["--resume-checkpoint", start, "--num-steps", "4", "--output-dir", "trace"]
    words += ["--anchor-every", "2", "--config", CONFIG, "--storage", "dense", "--json"]
    code, out, err = run("trace", "record", *words)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["summary"]["steps"] == 4
    assert found["law"].startswith("recorded 4 steps; the terms sum to every update")
    paths = [Path(path) for path in found["paths"]]
    assert all(path.is_file() for path in paths)
    assert len(paths) == len(set(paths)) == 2 + 5 + 4
    code, out, _ = run("trace", "record", *words)
    assert code == 2
    words[-1] = "--resume"
    assert run("trace", "record", *words)[0] == 0


WRONG: dict[str, tuple[list[str], str]] = {
    "no start": (["--end-step", "3"], "give one of --from-initialization"),
    "two starts": (
        ["--from-initialization", "--resume-checkpoint", "x.pt", "--end-step", "3"],
        "give one of --from-initialization",
    ),
    "no end": (["--from-initialization"], "give one of --end-step and --num-steps"),
    "two ends": (
        ["--from-initialization", "--end-step", "3", "--num-steps", "3"],
        "give one of --end-step and --num-steps",
    ),
    "storage": (
        ["--from-initialization", "--end-step", "3", "--storage", "full"],
        "unknown --storage 'full'",
    ),
    "split": (
        ["--from-initialization", "--end-step", "3", "--train-split", "nowhere"],
        "nowhere",
    ),
    "missing start": (
        ["--resume-checkpoint", "runs/tiny/checkpoints/step_000005.pt", "--num-steps", "1"],
        "no such checkpoint",
    ),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_options_are_one_line(
    run_folder: Path, run: Run, words: list[str], message: str
) -> None:
    code, out, err = run("trace", "record", "--config", CONFIG, "--output-dir", "trace", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_show_says_what_is_in_a_trace(trace_folder: Path, run: Run) -> None:
    code, out, err = run("trace", "show", trace_folder)
    assert (code, err) == (0, "")
    for fact in (
        "1 layers, 2 heads, d_model 16, fast kernels",
        "adamw",
        "0 to 12",
        "4, every 4 steps",
        "MB",
    ):
        assert fact in out
    assert any(block in out for block in "▁▂▃▄▅▆▇█")
    code, out, _ = run("trace", "show", trace_folder, "--json")
    found = json.loads(out)
    rows = read_jsonl(trace_folder / "optimizer_update_trace_rows.jsonl")
    assert found["losses"] == [row["loss"] for row in rows]
    own = [trace_folder / "trace.json", *trace_folder.glob("*_rows.jsonl")]
    own += trace_folder.glob("checkpoints/*.pt")
    assert found["bytes"] == sum(path.stat().st_size for path in own)


def test_verify_ends_with_the_law(trace_folder: Path, run: Run) -> None:
    code, out, err = run("trace", "verify", trace_folder)
    assert (code, err) == (0, "")
    assert out.endswith("replayed 12 steps, 0 bits differ\n")
    code, out, _ = run("trace", "verify", trace_folder, "--steps", "3:9", "--json")
    found = json.loads(out)
    assert code == 0
    assert found == {
        "law": "replayed 6 steps, 0 bits differ",
        "steps": 6,
        "equal": True,
        "drifts": [],
        "anchors": [],
        "changed_facts": [],
        "paths": [],
    }


def test_verify_fails_with_step_stage_tensor_and_count(
    trace_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step_module.training_step

    def step_aside(*args: Any, **kw: Any) -> Any:
        outcome = real(*args, **kw)
        if outcome.step == 8:
            with torch.no_grad():
                args[1].ln_final.b[:3] += 1e-3
        return outcome

    monkeypatch.setattr(step_module, "training_step", step_aside)
    code, out, _ = run("trace", "verify", trace_folder)
    assert code == 1
    assert "anchor 8: parameters ln_final.b: 3 of 16 elements differ" in out
    assert "changed since the recording: none that is recorded" in out
    assert out.endswith("replayed 12 steps, 1 differ, first at step 8 in parameters\n")
    code, out, _ = run("trace", "verify", trace_folder, "--json")
    found = json.loads(out)
    assert (code, found["equal"]) == (1, False)
    assert found["drifts"] == [{"step": 8, "stage": "parameters"}]
    assert found["anchors"][0]["step"] == 8


@pytest.mark.parametrize("window", ["3", "3:", ":4", "4:3", "3:3", "-1:3", "a:b", "1:2:3"])
def test_windows_that_are_none_are_refused(trace_folder: Path, run: Run, window: str) -> None:
    code, _, err = run("trace", "verify", trace_folder, f"--steps={window}")
    assert code == 2
    assert f"window '{window}'; expected a:b with a < b" in err


def test_checkout_writes_the_state_of_any_step(trace_folder: Path, run: Run, same: Same) -> None:
    state = ReplayedRun.open(trace_folder).state(7)
    words = ["trace", "checkout", trace_folder, "--step", "7"]
    code, out, err = run(*words, "--output", "out/seven.pt")
    assert (code, err) == (0, "")
    assert "wrote out/seven.pt" in out
    assert same(load_checkpoint("out/seven.pt"), state)
    code, _, err = run(*words, "--output", "out/seven.pt")
    assert code == 2
    assert "pass --overwrite" in err
    Path("out/eight.pt").write_bytes(b"mine")
    code, _, err = run(*words, "--output", "out/eight.pt", "--overwrite")
    assert (code, Path("out/eight.pt").read_bytes()) == (2, b"mine")
    code, out, _ = run(*words, "--output", "out/seven.pt", "--overwrite", "--json")
    assert json.loads(out) == {"step": 7, "drifts": [], "paths": ["out/seven.pt"]}
    code, out, _ = run(*words, "--json")
    kept = trace_folder / "checkpoints" / "step_000007.pt"
    assert json.loads(out) == {"step": 7, "drifts": [], "paths": [str(kept)]}
    assert same(load_checkpoint(kept), state)
    code, _, err = run("trace", "checkout", trace_folder, "--step", "13")
    assert code == 2
    assert "step 13 of the trace is not addressable" in err


def test_prune_thins_and_refuses(trace_folder: Path, run: Run, bytes_of: BytesOf) -> None:
    before = bytes_of(trace_folder)
    code, _, err = run("trace", "prune", trace_folder, "--anchor-every", "6")
    assert code == 2
    assert "expected a multiple of the trace's 4" in err
    assert bytes_of(trace_folder) == before
    code, out, _ = run("trace", "prune", trace_folder, "--anchor-every", "12", "--json")
    found = json.loads(out)
    assert code == 0
    gone = len(before["checkpoints/step_000004.pt"]) + len(before["checkpoints/step_000008.pt"])
    assert found == {
        "removed": 2,
        "freed_bytes": gone,
        "anchors": 2,
        "paths": [str(trace_folder / "trace.json")],
    }
    assert run("trace", "verify", trace_folder)[0] == 0


def test_a_command_takes_a_checkpoint_that_is_no_file(trace_folder: Path, run: Run) -> None:
    missing = trace_folder / "checkpoints" / "step_000007.pt"
    config = ReplayedRun.open(trace_folder).manifest.config
    Path("c.json").write_text(config.to_json(), "utf-8")
    words = ["evaluate", "--config", "c.json", "--checkpoint", missing, "--split", "train"]
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["step"] == 7
    assert all(Path(path).is_file() for path in found["paths"])
    assert not missing.exists()


@pytest.mark.parametrize("command", ["show", "verify", "checkout", "prune"])
def test_a_folder_without_a_trace_is_refused(workplace: Path, run: Run, command: str) -> None:
    more = {"checkout": ["--step", "1"], "prune": ["--anchor-every", "2"]}.get(command, [])
    code, _, err = run("trace", command, "data", *more)
    assert code == 2
    assert "data: there is no trace here" in err


def test_the_folder_of_a_run_is_told_where_its_trace_is(trace_folder: Path, run: Run) -> None:
    name = Path("run") / "analysis" / "a trace"
    name.mkdir(parents=True)
    (name / "trace.json").write_bytes((trace_folder / "trace.json").read_bytes())
    code, _, err = run("trace", "show", "run")
    assert (code, "run: there is no trace here" in err) == (2, True)
    assert err.rstrip().endswith(f"this run's is {name}")
