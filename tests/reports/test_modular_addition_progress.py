"""The progress of modular addition: columns against loops over sums, files, refusals, the page."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from command_line import Done, type_and_read
from installed import of_installed
from tiny_run import RUN as LOOKUP
from tiny_run import trained, trained_once

from circuit.artifacts import read_jsonl
from circuit.config import parse_config
from circuit.page.formation import formation_page
from circuit.reports.modular_addition_progress import (
    FREQUENCY_ROWS,
    ModularAdditionProgress,
    ProgressOptions,
    fewest,
    learned_at,
)
from circuit.reports.report import ReportResult, run_report
from circuit.runs.opening import open_run
from circuit.scalars.modular_addition import Measure
from circuit.tasks.benchmark import write_benchmark
from circuit.tasks.modular_addition.task import ModularAdditionConfig
from circuit.tasks.probes import write_probe_set
from circuit.trace.record import RecordOptions, record_trace
from circuit.train_config import TrainConfig
from circuit.training.loop import train

__all__ = ["trained", "trained_once"]

RUN, P = Path("runs/sums"), 5
COMMAND = ModularAdditionProgress.command
SHAPE = {"layers": 1, "heads": 2, "d_model": 8, "d_ff": 16, "max_sequence_length": 4}
BARE = {"activation": "relu", "normalization": "none", "biases": False, "tied_unembedding": False}


def make_run(name: str, **shape: Any) -> None:
    payload = {
        "name": "sums",
        "output_dir": f"runs/{name}",
        "benchmark_dir": "data/sums",
        "seed": 1,
        "threads": 1,
        "model": SHAPE | BARE | shape,
        "steps": 6,
        "batch_size": 10,
        "optimizer": {"name": "adamw", "learning_rate": 0.05, "weight_decay": 1.0},
        "gradient_clip": None,
        "eval_every": 3,
        "checkpoint_every": 3,
        "tracked_splits": ["train", "test"],
        "best": {"split": "test"},
    }
    train(parse_config(of_installed(payload), TrainConfig, where="sums"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on sums modulo 5, and one of attention alone."""
    folder = tmp_path_factory.mktemp("sums")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        payload = {"name": "sums", "benchmark_type": "modular_addition", "seed": 2}
        payload |= {"output_dir": "data/sums", "modulus": P, "train_fraction": 0.4}
        write_benchmark(parse_config(payload, ModularAdditionConfig, where="sums"))
        make_run("sums")
        make_run("bare", d_ff=0, activation="gelu")
    return folder


@pytest.fixture
def at_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(desk)
    monkeypatch.delenv("CIRCUIT_DEVICE", raising=False)
    yield desk
    for made in ("out", "again", "runs/sums/analysis", "trace", "probes"):
        shutil.rmtree(made, ignore_errors=True)


def report(run: Path = RUN, out: str = "out", **options: Any) -> ReportResult:
    asked = ProgressOptions(checkpoint_dir=run / "checkpoints", **options)
    return run_report(ModularAdditionProgress, open_run(run), asked, out)


def test_columns_are_those_of_loops_over_sums(at_desk: Path) -> None:
    result = report(key_frequencies=(2,))
    rows = list(read_jsonl(result.rows[0]))
    assert [row["step"] for row in rows] == [3, 6]
    model = open_run(RUN).model(6)
    task = open_run(RUN).setup.benchmark.task
    logits = {}
    with torch.no_grad():
        for a in range(P):
            for b in range(P):
                logits[a, b] = model(torch.tensor([[a, b, P]]))[0, 2].double()
    splits: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    for pair in logits:
        splits["train" if task.is_trained(*pair) else "test"].append(pair)  # type: ignore[attr-defined]
    for split, pairs in splits.items():
        losses = [-logits[a, b].log_softmax(0)[(a + b) % P] for a, b in pairs]
        assert rows[1][f"{split}_loss"] == pytest.approx(float(sum(losses)) / len(pairs), rel=1e-6)
        hits = [int(logits[a, b].argmax()) == (a + b) % P for a, b in pairs]
        assert rows[1][f"{split}_accuracy"] == sum(hits) / len(hits)
    waves = {(a, b): 2 * math.pi * 2 * (a + b) / P for a, b in logits}
    mean = sum(logits.values()) / P**2
    of = [sum(f(waves[x]) * logits[x] for x in logits) * 2 / P**2 for f in (math.cos, math.sin)]
    key = {x: math.cos(waves[x]) * of[0] + math.sin(waves[x]) * of[1] for x in logits}
    restricted = [-(mean + key[a, b]).log_softmax(0)[(a + b) % P] for a, b in logits]
    assert rows[1]["restricted_loss"] == pytest.approx(float(sum(restricted)) / P**2, rel=1e-6)
    excluded = [-(logits[a, b] - key[a, b]).log_softmax(0)[(a + b) % P] for a, b in splits["train"]]
    expected = float(sum(excluded)) / len(excluded)
    assert rows[1]["excluded_loss"] == pytest.approx(expected, rel=1e-6)
    weights = sum(float(one.detach().double().square().sum()) for one in model.parameters())
    assert rows[1]["squared_weights"] == pytest.approx(weights, rel=1e-12)
    whole = [rows[1][f"logits_{part}"] for part in ("mean", "key", "rest")]
    assert sum(whole) == pytest.approx(1, abs=1e-12)


def test_shares_are_those_of_an_fft_over_the_numbers(at_desk: Path) -> None:
    result = report()
    rows = [row for row in read_jsonl(Path("out") / FREQUENCY_ROWS) if row["step"] == 6]
    model = open_run(RUN).model(6)
    matrices = {
        "W_E": model.W_E[:P],
        "neuron_logit": (model.W_out[0].double() @ model.W_U[:, :P].double()).T,
    }
    for name, matrix in matrices.items():
        power = torch.fft.fft(matrix.detach().double(), dim=0).abs().square().sum(1)
        own = [row["share"] for row in rows if row["matrix"] == name]
        assert own == pytest.approx((power[1:3] / power[1:3].sum()).tolist(), rel=1e-10)
    share = [row["share"] for row in rows if row["matrix"] == "W_E"]
    assert result.summary["key_frequencies"] == sorted(fewest(share))
    assert "90%" in result.summary["key_frequencies_are"]


def test_the_fewest_frequencies_and_the_step_from_which_a_split_is_learned() -> None:
    assert fewest([0.1, 0.5, 0.05, 0.35]) == [2, 4, 1]
    assert fewest([0.91, 0.09]) == [1]
    course = [0.2, 0.995, 0.9, 1.0, 0.99]
    rows = [{"step": i, "train_accuracy": value} for i, value in enumerate(course)]
    assert learned_at(rows, "train") == 3
    assert learned_at(rows[:3], "train") is None


def test_equal_inputs_give_equal_bytes_and_the_law_has_numbers(at_desk: Path) -> None:
    one, other = report(), report(out="again")
    for first, second in zip(one.paths[1:], other.paths[1:], strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
    gaps = [
        float(word) for word in one.law.replace(",", " ").split() if "e-" in word or word == "0"
    ]
    assert len(gaps) == 3
    assert max(gaps) < 1e-12
    assert json.loads(one.report.read_text())["digest"]


def test_a_model_without_mlps_has_no_neuron_logit_map(at_desk: Path) -> None:
    result = report(Path("runs/bare"))
    rows = list(read_jsonl(Path("out") / FREQUENCY_ROWS))
    assert {row["matrix"] for row in rows} == {"W_E"}
    assert next(iter(read_jsonl(result.rows[0])))["spread_neuron_logit"] is None
    assert not any("neuron" in path.name for path in result.figures)


def typed(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Done:
    given = ["--config", str(run), "--checkpoint-dir", str(run / "checkpoints")]
    return type_and_read([COMMAND, *given, "--output-dir", "out", *words], capsys)


def test_other_frequencies_are_refused(at_desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = typed(RUN, capsys, "--key-frequency", "3")
    assert done.code == 2
    assert "frequency 3" in done.err
    assert "1 to 2" in done.err


def test_every_measure_is_attributed_and_closes(
    at_desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record_trace(open_run(RUN).config, "trace", RecordOptions(end_step=6))
    write_probe_set("data/sums", "probes/sums.jsonl", ["test"], 4)
    measures = get_args(Measure)
    key = ",key_frequency=2," + ",".join(f"measure={name}" for name in measures)
    words = ["trace", "attribute", "--config", str(RUN), "--probe-set", "probes/sums.jsonl"]
    words += ["--optimizer-trace-dir", "trace", "--start-step", "3", "--end-step", "6"]
    done = type_and_read(
        [
            *words,
            "--path",
            "midpoint:64",
            "--scalar",
            f"modular_addition{key}",
            "--output-dir",
            "out",
        ],
        capsys,
    )
    assert (done.code, done.err) == (0, "")
    progress = {
        row["step"]: row for row in read_jsonl(report(out="again", key_frequencies=(2,)).rows[0])
    }
    course: dict[str, list[Any]] = {name: [] for name in measures}
    for row in read_jsonl(Path("out/scalar_attribution_rows.jsonl")):
        course[row["scalar"]].append(row)
        off = abs(sum(row["path"].values()) - row["actual"])
        assert off <= 2e-3 * abs(row["actual"]) + 1e-6, row["scalar"]
    for name, rows in course.items():
        assert len(rows) == 3
        whole = progress[6][name] - progress[3][name]  # it telescopes, over other code
        assert sum(row["actual"] for row in rows) == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_another_task_is_refused_before_a_model_is_built(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("circuit.training.setup.Setup._build", built)
    done = typed(LOOKUP, capsys)
    assert done.code == 2
    assert "symbolic_kv_stream" in done.err
    assert "modular_addition" in done.err
    assert not list(Path("out").glob("*_report.json"))


def test_the_page_asks_for_it_on_sums_and_leaves_it_out_elsewhere(
    at_desk: Path, trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    formation_page(RUN, page)
    assert COMMAND in page.read_text()
    report(out=str(RUN / "analysis" / ModularAdditionProgress.stem()))
    formation_page(RUN, page, overwrite=True)
    assert "powers sum to" not in page.read_text()
    assert "two-dimensional FFT" in page.read_text()
    shutil.copytree(trained_once, tmp_path / "lookup")
    monkeypatch.chdir(tmp_path / "lookup")
    formation_page(LOOKUP, page, overwrite=True)
    assert COMMAND not in page.read_text()
