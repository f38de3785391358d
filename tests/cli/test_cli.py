"""The command line as it is typed: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from circuit.cli.options import resolve_device
from circuit.cli.output import print_table

from circuit.artifacts import read_jsonl
from circuit.errors import CircuitError
from circuit.reports.tables import Table
from circuit.tasks.benchmark import load_benchmark
from circuit.tasks.probes import read_probe_set
from circuit.training.checkpoints import load_checkpoint

RUN = Path("runs/tiny")
TRAIN = ["train", "--config", "configs/train/tiny.json"]
GENERATE = ["generate-benchmark", "--config", "configs/benchmark/tiny.json"]
EVALUATE = [
    *("evaluate", "--config", str(RUN / "run_config.json")),
    *("--checkpoint", str(RUN / "checkpoints" / "best.pt"), "--split", "heldout_pairs"),
]
PROBES = [
    *("generate-probe-set", "--benchmark-dir", "data/tiny"),
    *("--output", str(RUN / "analysis" / "probe_set.jsonl")),
    *("--examples-per-split", "5", "--split", "validation_iid"),
]


Run = Callable[..., Any]


def write_config(kind: str, payload: dict[str, Any]) -> None:
    path = Path("configs") / kind / "tiny.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=2))


def change_config(kind: str, **changes: Any) -> None:
    path = Path("configs") / kind / "tiny.json"
    write_config(kind, {**json.loads(path.read_text()), **changes})


def files(root: Path = Path()) -> dict[str, bytes]:
    """Every file but locks."""
    return {
        path.as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_the_commands_of_the_contract_work_as_they_are_typed(circuit: Run) -> None:
    """Twice, since each may overwrite its own files; no result differs the second time."""
    shutil.rmtree("data")
    results = []
    for _ in range(2):
        for words in (GENERATE, PROBES, TRAIN, EVALUATE):
            overwrite = [] if words is EVALUATE else ["--overwrite"]
            done = circuit(*words, *overwrite)
            assert (done.code, "Traceback" in done.err) == (0, False), done.err
            assert "wrote " in done.out
        results.append(files())
    first, second = results
    changed = {name for name, data in first.items() if second.get(name) != data}
    assert first.keys() == second.keys()
    # the summary tells the speed, and the manifest its digest
    assert changed <= {"runs/tiny/summary.json", "runs/tiny/train.manifest.json"}
    benchmark = load_benchmark("data/tiny")
    assert len(read_probe_set(RUN / "analysis" / "probe_set.jsonl", benchmark).records) == 5
    assert load_checkpoint(RUN / "checkpoints" / "step_000004.pt").step == 4
    report = json.loads((RUN / "evaluation" / "best.json").read_text())
    assert list(report["evaluations"]) == ["heldout_pairs"]
    rows = read_jsonl(RUN / "metrics.jsonl")
    (row,) = [r for r in rows if (r["step"], r.get("split")) == (report["step"], "heldout_pairs")]
    assert report["evaluations"]["heldout_pairs"] == {
        key: value for key, value in row.items() if key not in ("kind", "step")
    }


@pytest.mark.parametrize("words", [GENERATE, PROBES, TRAIN, EVALUATE], ids=lambda words: words[0])
def test_json_is_one_object_whose_paths_all_exist(circuit: Run, words: list[str]) -> None:
    if words is EVALUATE:
        assert circuit(*TRAIN).code == 0
    if words is GENERATE:
        change_config("benchmark", output_dir="data/fresh")
    before = files()
    done = circuit(*words, "--json")
    assert done.code == 0
    paths = done.payload["paths"]
    assert [path for path in paths if not Path(path).is_file()] == []
    written = {path for path, data in files().items() if before.get(path) != data}
    assert set(paths) == {path for path in written if not path.endswith(".manifest.json")}


def test_train_says_what_it_trained(circuit: Run) -> None:
    payload = circuit(*TRAIN, "--json").payload
    summary = json.loads((RUN / "summary.json").read_text())
    assert payload["step"] == 4
    assert payload["best"] == summary["best"]
    assert payload["evaluations"] == summary["evaluations"]


def test_stopping_and_resuming_by_option(circuit: Run) -> None:
    circuit(*TRAIN)
    straight = files(RUN / "checkpoints")
    stopped = circuit(*TRAIN, "--overwrite", "--stop-at-step", "2")
    assert "step 2 of 4; 2 steps in" in stopped.out
    assert "step 4 of 4; 2 steps in" in circuit(*TRAIN, "--resume").out
    found = files(RUN / "checkpoints")
    assert {name: found[name] for name in straight} == straight
    refused = circuit(*TRAIN, "--resume", "--overwrite")
    assert (refused.code, "exclude each other" in refused.err) == (2, True)


def test_an_interrupt_says_how_to_go_on(circuit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    from circuit.training import loop

    monkeypatch.setattr(loop._Loop, "_after_step", interrupted)
    done = circuit(*TRAIN)
    assert done.code == 130
    assert "--resume" in done.err
    assert "Traceback" not in done.err


def test_an_interrupted_report_says_so_in_one_line(
    circuit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("circuit.reports.evaluation.evaluate_checkpoint", interrupted)
    done = circuit("evaluate", *TRAIN[1:], "--checkpoint", "any.pt")
    assert done.code == 130
    (line,) = done.err.strip().splitlines()
    assert line.startswith("interrupted;")


# --- errors: exit code 2, one line on stderr, nothing else ---------------------------------------


def a_run(circuit: Run) -> None:
    assert circuit(*TRAIN).code == 0


def unknown_key(_: Run) -> None:
    change_config("train", sed=1)


def unknown_benchmark_key(_: Run) -> None:
    change_config("benchmark", sed=1)


def wrong_type(_: Run) -> None:
    change_config("train", steps="many")


def bad_json(_: Run) -> None:
    Path("configs/train/tiny.json").write_text('{\n  "name": }')


def no_config(_: Run) -> None:
    Path("configs/train/tiny.json").unlink()


def no_benchmark(_: Run) -> None:
    change_config("train", benchmark_dir="data/none")


def truncated_split(_: Run) -> None:
    path = Path("data/tiny/train.jsonl")
    path.write_bytes(path.read_bytes()[:-20])


def missing_split(_: Run) -> None:
    Path("data/tiny/heldout_pairs.jsonl").unlink()


def other_config(circuit: Run) -> None:
    a_run(circuit)
    path = RUN / "run_config.json"
    path.write_text(path.read_text().replace('"seed": 11', '"seed": 12'))


def corrupt_checkpoint(circuit: Run) -> None:
    a_run(circuit)
    path = RUN / "checkpoints" / "best.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def half_checkpoint(circuit: Run) -> None:
    a_run(circuit)
    path = RUN / "checkpoints" / "best.pt"
    path.write_bytes(path.read_bytes()[:5000])


class RunsCode:
    """An object whose unpickling makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def code_checkpoint(circuit: Run) -> None:
    a_run(circuit)
    torch.save({"parameters": RunsCode()}, RUN / "checkpoints" / "best.pt")


def no_checkpoint(circuit: Run) -> None:
    a_run(circuit)
    (RUN / "checkpoints" / "best.pt").unlink()


def foreign_metrics(_: Run) -> None:
    RUN.mkdir(parents=True)
    (RUN / "metrics.jsonl").write_text("mine")


def file_as_folder(_: Run) -> None:
    change_config("train", output_dir="notes")
    Path("notes").write_text("mine")


def foreign_probe_set(_: Run) -> None:
    (RUN / "analysis").mkdir(parents=True)
    (RUN / "analysis" / "probe_set.jsonl").write_text("mine")


def foreign_benchmark(_: Run) -> None:
    change_config("benchmark", output_dir="data/mine")
    Path("data/mine").mkdir()
    Path("data/mine/train.jsonl").write_text("mine")


def foreign_evaluation(circuit: Run) -> None:
    a_run(circuit)
    (RUN / "evaluation").mkdir()
    (RUN / "evaluation" / "best.json").write_text("mine")


def impossible_benchmark(_: Run) -> None:
    change_config("benchmark", num_values=2, output_dir="data/fresh")


def nothing(_: Run) -> None:
    pass


ERRORS: list[tuple[Callable[[Run], None], list[str], list[str]]] = [
    (unknown_key, TRAIN, ["configs/train/tiny.json: unknown field 'sed'", "correct its name"]),
    (unknown_benchmark_key, GENERATE, ["configs/benchmark/tiny.json: unknown field 'sed'"]),
    (wrong_type, TRAIN, ["field 'steps': Input should be a valid integer", 'got "many"']),
    (bad_json, TRAIN, ["configs/train/tiny.json:2:11: not valid JSON"]),
    (no_config, TRAIN, ["configs/train/tiny.json: no such config file", "check the path"]),
    (no_benchmark, TRAIN, ["data/none: no benchmark", "draw it: `circuit generate-benchmark"]),
    (truncated_split, TRAIN, ["data/tiny/train.jsonl:60: "]),
    (missing_split, TRAIN, ["data/tiny/heldout_pairs.jsonl: no such file"]),
    (other_config, EVALUATE, ["belongs to another config: seed is 11 there and 12 here"]),
    (corrupt_checkpoint, EVALUATE, ["checkpoints/best.pt: digest mismatch in "]),
    (half_checkpoint, EVALUATE, ["checkpoints/best.pt: truncated, altered, or not a checkpoint"]),
    (code_checkpoint, EVALUATE, ["checkpoints/best.pt: truncated, altered, or not a checkpoint"]),
    (no_checkpoint, EVALUATE, ["best.pt: no such checkpoint", "there are 2 from step 3 to 4"]),
    (a_run, TRAIN, ["runs/tiny: holds 7 files of an earlier `circuit train`", "--overwrite"]),
    (
        foreign_metrics,
        [*TRAIN, "--overwrite"],
        ["metrics.jsonl: exists and was not written by `circuit train`"],
    ),
    (file_as_folder, [*TRAIN, "--overwrite"], ["notes: is a file"]),
    (
        foreign_probe_set,
        [*PROBES, "--overwrite"],
        ["probe_set.jsonl: exists and was not written by `circuit generate-probe-set"],
    ),
    (
        foreign_benchmark,
        [*GENERATE, "--overwrite"],
        ["data/mine/train.jsonl: exists and was not written by `circuit generate-benchmark`"],
    ),
    (foreign_evaluation, EVALUATE, ["best.json: exists and was not written by"]),
    (impossible_benchmark, GENERATE, ["expected"]),
    (nothing, [*PROBES, "--split", "none"], ["unknown split 'none'", "train, validation_iid"]),
    (nothing, [*PROBES[:-4], "--examples-per-split", "99"], ["expected 1 to 24"]),
    (nothing, [*TRAIN, "--stop-at-step", "9"], ["cannot stop at step 9; expected 1 to 4"]),
    (nothing, [*TRAIN, "--device", "tpu"], ["--device: unknown device 'tpu'"]),
    (
        nothing,
        [*TRAIN, "--device", "mps"],
        ["device 'mps' is not available here; expected one of cpu", "CIRCUIT_DEVICE"],
    ),
    (a_run, [*EVALUATE, "--split", "none"], ["unknown split 'none'"]),
]


@pytest.mark.parametrize(
    ("prepare", "words", "said"), ERRORS, ids=[f"{e[0].__name__}-{e[1][0]}" for e in ERRORS]
)
def test_a_mistake_is_one_line_and_exit_code_2(
    circuit: Run, prepare: Callable[[Run], None], words: list[str], said: list[str]
) -> None:
    prepare(circuit)
    before = files()
    done = circuit(*words)
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    for part in said:
        assert part in line
    assert "Traceback" not in done.err
    after = files()
    lost = [name for name, data in before.items() if after.get(name) != data]
    assert lost == []
    assert not Path("executed").exists()


def test_a_mistake_in_the_words_is_named(circuit: Run) -> None:
    for words, said in (
        (["trian"], "trian"),
        (["train"], "--config"),
        ([*TRAIN, "--confg"], "--confg"),
        ([*TRAIN, "--threads", "0"], "--threads"),
    ):
        done = circuit(*words)
        assert done.code == 2
        assert said in done.err
        assert "Traceback" not in done.err


def test_texts_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = ":key: [bold]"
    print_table(Table(text, {"it": text}, [{"it": text}], console=1))
    assert capsys.readouterr().out.count(text) == 3


def test_a_table_that_is_cut_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": step, "it": step} for step in (1, 2, 2, 2)]
    for console, said in ((1, "and 2 more in the report"), (3, None)):
        print_table(Table("", {"it": "it"}, rows, console=console))
        out = capsys.readouterr().out
        assert said in out if said else "more" not in out


# --- device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [None, "cpu", "cuda", "mps"])
@pytest.mark.parametrize("variable", [None, "", "cpu", "cuda", "mps"])
@pytest.mark.parametrize("configured", ["cpu", "cuda"])
def test_the_option_beats_the_variable_which_beats_the_config(
    monkeypatch: pytest.MonkeyPatch, option: str | None, variable: str | None, configured: str
) -> None:
    monkeypatch.delenv("CIRCUIT_DEVICE", raising=False)
    if variable is not None:
        monkeypatch.setenv("CIRCUIT_DEVICE", variable)
    assert resolve_device(option, configured) == (option or variable or configured)
    monkeypatch.setenv("CIRCUIT_DEVICE", "gpu")
    if option is None:
        with pytest.raises(CircuitError, match="CIRCUIT_DEVICE: unknown device 'gpu'; expected"):
            resolve_device(option, configured)


def test_the_device_in_use_is_the_resolved_one(
    circuit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUIT_DEVICE", "mps")
    refused = circuit(*TRAIN)
    assert (refused.code, "device 'mps' is not available here" in refused.err) == (2, True)
    assert circuit(*TRAIN, "--device", "cpu").code == 0
    assert json.loads((RUN / "run_config.json").read_text())["device"] == "cpu"
    monkeypatch.delenv("CIRCUIT_DEVICE")
    change_config("train", device="mps")
    assert circuit(*TRAIN, "--overwrite").code == 2
    monkeypatch.setenv("CIRCUIT_DEVICE", "cpu")
    assert circuit(*TRAIN, "--overwrite").code == 0


# --- the program itself ---------------------------------------------------------------------------


def test_the_module_form_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "circuit.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("circuit ")


def test_every_command_has_help_for_every_option(circuit: Run) -> None:
    for words in (GENERATE, PROBES, TRAIN, EVALUATE, ["quickstart"]):
        done = circuit(words[0], "--help")
        assert done.code == 0
        for line in done.out.splitlines():
            if "--" in line and "│" in line:
                assert len(line.strip("│ ").split("  ")) > 1, line
