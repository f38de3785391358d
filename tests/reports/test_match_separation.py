"""Match separation against a loop over reads, and the head that it finds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from circuit.artifacts import read_jsonl
from circuit.config import load_config
from circuit.core.intervals import RecordDraws
from circuit.reports.bilinear_qk_match_separation import gap_to_attention, summarize
from circuit.reports.inputs import open_inputs
from circuit.scalars.qk_match import ReadMasks
from circuit.tasks.symbolic_kv.stream import program_of
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import load_checkpoint
from circuit.training.setup import Setup

NAME = "bilinear_qk_match_separation"
RUN = Path("runs/tiny")
PROBES = RUN / "analysis/probe_set.jsonl"
CONFIG = RUN / "run_config.json"
STUDY = ("bilinear-qk-match-separation", "--config", str(CONFIG), "--probe-set", str(PROBES))
Circuit = Callable[..., Any]


def points(*steps: int) -> list[str]:
    return [word for s in steps for word in ("--checkpoint", f"{RUN}/checkpoints/step_{s:06d}.pt")]


def rows_of(folder: str) -> list[dict[str, Any]]:
    return read_jsonl(Path(folder) / f"{NAME}_rows.jsonl")


def loop(step: int, layer: int, head: int, rank: int | None, biases: bool) -> dict[str, Any]:
    """Columns by lag (and `all`): one record, one read, one position at a time."""
    config = load_config(CONFIG, TrainConfig)
    study = open_inputs(config, PROBES)
    state = load_checkpoint(RUN / "checkpoints" / f"step_{step:06d}.pt")
    model = Setup(config, benchmark=study.benchmark).model(state)
    attention = model.blocks[layer].attn
    product = (attention.W_Q[head] @ attention.W_K[head].T).detach().double()
    u, sigma, vh = torch.linalg.svd(product)
    if rank is not None:
        u, v = u[:, :rank], vh[:rank].T
        product = u @ u.T @ product @ v @ v.T
    found: dict[str, dict[str, list[float]]] = {}
    record_of: dict[str, list[str]] = {}
    values = study.vocabulary.value_ids
    for record in study.records:
        with torch.no_grad():
            logits, cache = model.run_with_cache(torch.tensor([record.tokens]))
        x = cache[f"blocks.{layer}.ln1.hook_normalized"][0]
        x = (x * model.blocks[layer].ln1.w + model.blocks[layer].ln1.b).detach().double()
        real = cache[f"blocks.{layer}.attn.hook_attn_scores"][0, head].double()
        program = program_of(record, study.vocabulary)
        for read in program.reads:
            line = real[read.key_pos]
            if not biases:
                line = x[read.key_pos] @ product @ x.T / math.sqrt(model.cfg.d_head)
            others = [w for w in program.writes[: read.writes_before] if w != read.support]
            far = [float(line[write.value_pos]) for write in others]
            near = float(line[read.support.value_pos])
            at = logits[0, read.key_pos]
            wrong = max(float(at[token]) for token in values if token != read.answer)
            columns = {
                "support_mean": near,
                "distractor_mean": fmean(far),
                "separation": near - fmean(far),
                "support_wins": float(all(near > score for score in far)),
                "answer_margin": float(at[read.answer]) - wrong,
                "top_singular_value": float(sigma[0]),
            }
            for group in ("all", str(read.lag)):
                record_of.setdefault(group, []).append(record.sample_id)
                for name, value in columns.items():
                    found.setdefault(group, {}).setdefault(name, []).append(value)
    measured = {}
    for group, columns in found.items():
        measured[group] = {"reads": len(columns["separation"])}
        measured[group] |= {n: fmean(v) for n, v in columns.items()}
        for name in ("separation", "support_wins"):
            of_reads = torch.tensor(columns[name], dtype=torch.float64)[:, None]
            low, high = RecordDraws(record_of[group]).means(of_reads)[0]
            measured[group] |= {f"{name}_low": low, f"{name}_high": high}
    return measured


@pytest.fixture
def measured(circuit: Circuit) -> list[dict[str, Any]]:
    """All heads at three checkpoints, ranks 1 and 3."""
    done = circuit(*STUDY, *points(12, 3, 6), "--rank", "3", "--rank", "1", "--output-dir", "out")
    assert (done.code, done.err) == (0, "")
    intervals = read_jsonl(Path("out") / f"{NAME}_intervals.jsonl")
    return [{**row, **of} for row, of in zip(rows_of("out"), intervals, strict=True)]


def test_the_rows_are_the_loops(measured: list[dict[str, Any]]) -> None:
    kinds: dict[str, tuple[int | None, bool]] = {
        "full": (None, False),
        "full_with_biases": (None, True),
        "rank3": (3, False),
        "rank1": (1, False),
    }
    heads = [(layer, head) for layer in range(2) for head in range(2)]
    assert [(row["step"], row["head"], row["score"], row["lag"]) for row in measured] == [
        (step, f"L{layer}H{head}", kind, lag)
        for step in (3, 6, 12)
        for layer, head in heads
        for kind in kinds
        for lag in ("all", "1", "2")
    ]
    for step, layer, head in ((3, 0, 1), (12, 1, 0), (12, 1, 1)):
        for kind, (rank, biases) in kinds.items():
            expected = loop(step, layer, head, rank, biases)
            for row in measured:
                if (row["step"], row["head"], row["score"]) == (step, f"L{layer}H{head}", kind):
                    for name, value in expected[row["lag"]].items():
                        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_the_lags_are_the_parts_of_all(measured: list[dict[str, Any]]) -> None:
    for whole in (row for row in measured if row["lag"] == "all"):
        same = ("step", "head", "score", "top_singular_value", "weights_sha256")
        parts = [
            row
            for row in measured
            if row["lag"] != "all" and all(row[name] == whole[name] for name in same)
        ]
        assert sum(row["reads"] for row in parts) == whole["reads"]
        for name in ("support_mean", "distractor_mean", "separation", "support_wins"):
            mean = sum(row[name] * row["reads"] for row in parts) / whole["reads"]
            assert mean == pytest.approx(whole[name], rel=1e-9, abs=1e-12)
        assert whole["separation"] == pytest.approx(
            whole["support_mean"] - whole["distractor_mean"], rel=1e-5, abs=1e-6
        )


def test_the_winner_is_the_head_that_grew_most(measured: list[dict[str, Any]]) -> None:
    report = json.loads((Path("out") / f"{NAME}_report.json").read_text())
    own = {
        (row["head"], row["step"]): row
        for row in measured
        if (row["score"], row["lag"]) == ("rank1", "all")
    }
    heads = ["L0H0", "L0H1", "L1H0", "L1H1"]
    grown = {h: own[h, 12]["separation"] - own[h, 3]["separation"] for h in heads}
    winner = report["summary"]["winner"]
    assert winner["head"] == max(heads, key=lambda head: grown[head])
    assert (winner["score"], winner["growth"]) == ("rank1", grown[winner["head"]])
    course = [own[winner["head"], step] for step in (3, 6, 12)]
    for name, column in (
        ("correlation_with_margin", "answer_margin"),
        ("correlation_with_singular_value", "top_singular_value"),
    ):
        x, y = ([row[c] for row in course] for c in ("separation", column))
        assert winner[name] == pytest.approx(float(np.corrcoef(x, y)[0, 1]))
    assert f"**{winner['head']}** (rank1)" in (Path("out") / f"{NAME}_report.md").read_text()


def summary_row(head: str, step: int, separation: float, score: str = "rank8") -> dict[str, Any]:
    return {
        "head": head,
        "step": step,
        "score": score,
        "lag": "all",
        "separation": separation,
        "separation_low": None,
        "separation_high": None,
        "answer_margin": 1.0,
        "support_wins": 0.5,
        "top_singular_value": separation,
    }


def test_growth_decides_and_not_size() -> None:
    rows = [summary_row("L0H0", 0, 5.0), summary_row("L0H1", 0, 0.0)]
    rows += [summary_row("L0H0", 9, 5.5), summary_row("L0H1", 9, 1.0)]
    found = summarize(rows)
    assert found["winner"]["head"] == "L0H1"
    assert found["winner"]["correlation_with_margin"] is None  # the margin has no variance
    assert found["winner"]["correlation_with_singular_value"] == pytest.approx(1.0)
    assert summarize(rows[:2])["winner"]["correlation_with_singular_value"] is None
    full = [{**row, "score": "full"} for row in rows]
    assert summarize(full)["winner"]["score"] == "full"
    ranks = [summary_row("L0H0", step, step, f"rank{r}") for step in (0, 9) for r in (16, 4)]
    assert summarize(ranks)["winner"]["score"] == "rank4"


def test_at_one_checkpoint_the_largest_separation_decides(circuit: Circuit) -> None:
    done = circuit(*STUDY, *points(12), "--rank", "1", "--output-dir", "out")
    assert (done.code, done.err) == (0, "")
    summary = json.loads((Path("out") / f"{NAME}_report.json").read_text())["summary"]
    assert summary["ranked_by"] == "separation_at_last"
    own = {
        row["head"]: row["separation"]
        for row in rows_of("out")
        if (row["score"], row["lag"]) == ("rank1", "all")
    }
    best = max(own, key=lambda head: own[head])
    assert best != next(iter(own))
    assert (summary["winner"]["head"], summary["winner"]["growth"]) == (best, None)
    assert summary["winner"]["separation_at_last"] == own[best]
    page = (Path("out") / f"{NAME}_report.md").read_text()
    assert f"The separation of **{best}** (rank1) is the largest: {own[best]:.4g}" in page
    assert "grew" not in page


def test_options_choose_heads_reads_and_roles(circuit: Circuit) -> None:
    roles = ("--support-key-role", "support_key", "--distractor-key-role", "key_distractors")
    done = circuit(
        *(*STUDY, "--checkpoint-dir", f"{RUN}/checkpoints", "--head", "L1H1", "--rank", "8"),
        *(*roles, "--score-query-role", "query_key", "--layernorm-mode", "none", "--device", "cpu"),
        *("--context-stage", "layer_0_post_attn", "--split", "heldout_pairs", "--max-records", "5"),
        *("--output-dir", "out", "--json"),
    )
    assert (done.code, done.err) == (0, "")
    assert all(Path(path).is_file() for path in done.payload["paths"])
    rows = [row for row in rows_of("out") if row["lag"] == "all"]
    assert {row["step"] for row in rows} == {3, 6, 9, 12}
    assert {(row["head"], row["reads"]) for row in rows} == {("L1H1", 5)}
    for full, _, ranked in (rows[i : i + 3] for i in range(0, len(rows), 3)):
        assert full["separation"] == pytest.approx(ranked["separation"], rel=1e-3, abs=1e-6)


def test_the_law_is_the_models_own_attention(trained: Path) -> None:
    """Where the match is not that of the model, the law says by how much."""
    config = load_config(CONFIG, TrainConfig)
    inputs = open_inputs(config, PROBES)
    model = Setup(config, benchmark=inputs.benchmark).model(
        load_checkpoint(RUN / "checkpoints/step_000012.pt")
    )
    reads = ReadMasks.of(inputs.reads())
    gap, largest = gap_to_attention(model, ["L0H1", "L1H0"], reads)
    assert gap < 1e-5 < largest
    scores = model.blocks[1].attn.hook_attn_scores
    scores.add_hook(lambda value, hook: value + 0.5, is_permanent=True)
    assert gap_to_attention(model, ["L1H0"], reads)[0] == pytest.approx(0.5, rel=1e-4)
