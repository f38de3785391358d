"""weight-svd-trace: the numbers are those of the plain SVD, and the files say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens import HookedTransformer

from circuit.artifacts import read_jsonl
from circuit.model.build import build_model
from circuit.model.components import parse_component
from circuit.model.weights import named_tensors
from circuit.reports.weight_svd_trace import Spectra, weight_spectra
from circuit.runs.opening import open_run
from circuit.train_config import ModelConfig

WORDS = (
    *("weight-svd-trace", "--config", "runs/tiny/run_config.json"),
    *("--checkpoint-dir", "runs/tiny/checkpoints", "--output-dir", "out"),
)
FEW = ("--max-singular-values", "5", "--top-vector-ranks", "3")


def dense(model: HookedTransformer, matrix: str, component: str) -> torch.Tensor:
    """The matrix itself, in float64."""
    at = parse_component(component)
    block, head = model.blocks[at.layer], at.head
    if matrix == "W_QK":
        return block.attn.W_Q[head].double() @ block.attn.W_K[head].double().T
    if matrix == "W_OV":
        return block.attn.W_V[head].double() @ block.attn.W_O[head].double()
    return getattr(block.mlp, matrix).double()


def spectra_of(values: torch.Tensor) -> Spectra:
    empty = torch.zeros(len(values), 1, 1)
    return Spectra("W_QK", (), empty, values.double(), empty)


def test_spectra_are_those_of_the_dense_matrices() -> None:
    shape = ModelConfig(layers=2, heads=2, d_model=16, d_ff=24, max_sequence_length=12)
    model = build_model(shape, vocabulary_size=20, seed=1).requires_grad_(False)
    found = weight_spectra(named_tensors(model), shape)
    assert [spectra.matrix for spectra in found] == ["W_QK", "W_OV", "W_in", "W_out"]
    for spectra in found:
        ranks = 8 if spectra.matrix in ("W_QK", "W_OV") else 16
        for i, component in enumerate(spectra.components):
            matrix = dense(model, spectra.matrix, str(component))
            u, s, v = spectra.left[i], spectra.values[i], spectra.right[i]
            assert torch.allclose(s, torch.linalg.svdvals(matrix)[:ranks], atol=1e-10)
            assert torch.allclose(u * s @ v.T, matrix, atol=1e-10)
            largest = u.gather(0, u.abs().argmax(0, keepdim=True))
            assert (largest > 0).all()


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_effective_rank_counts_equal_directions(scale: float) -> None:
    for count in (1, 2, 5, 8):
        values = torch.zeros(1, 8)
        values[0, :count] = scale
        found = spectra_of(values)
        assert torch.allclose(found.effective_rank, torch.tensor(float(count)).double())
        assert torch.allclose(found.top3_mass, torch.tensor(min(1.0, 3 / count)).double())


def test_the_rows_are_the_matrices_of_the_checkpoints(
    circuit: Callable[..., Any], trained: Path
) -> None:
    done = circuit(*WORDS, *FEW, "--json")
    assert done.code == 0, done.err
    assert [path for path in done.payload["paths"] if not Path(path).is_file()] == []
    run = open_run(trained)
    steps = [3, 6, 9, 12]
    rows = pd.DataFrame(read_jsonl(Path("out/weight_svd_trace_rows.jsonl")))
    values = pd.DataFrame(read_jsonl(Path("out/weight_svd_singular_values.jsonl")))
    vectors = pd.DataFrame(read_jsonl(Path("out/weight_svd_top_singular_vectors.jsonl")))
    assert len(rows) == 4 * (2 * 4 + 2 * 2)  # steps x (head matrices x heads + MLP's x layers)
    assert list(rows["step"].unique()) == steps
    key = ["step", "matrix", "component"]
    last = {
        (row.matrix, row.component, row.rank): np.array(row.left)
        for row in vectors[vectors["step"] == 12].itertuples()
    }
    for step in (3, 12):
        model = run.model(step)
        for row in rows[rows["step"] == step].itertuples():
            sigma = torch.linalg.svdvals(dense(model, row.matrix, row.component).detach())
            sigma = sigma[: 8 if "H" in row.component else 16]
            assert row.top_singular_value == pytest.approx(float(sigma[0]), abs=1e-9)
            naive = float(sum(sigma) ** 2 / sum(s * s for s in sigma))
            assert row.effective_rank == pytest.approx(naive)
            assert row.top3_mass == pytest.approx(float(sum(sigma[:3]) / sum(sigma)))
            same = (values[key] == [step, row.matrix, row.component]).all(axis=1)
            assert values[same]["rank"].tolist() == [1, 2, 3, 4, 5]
            assert values[same]["singular_value"].tolist() == pytest.approx(sigma[:5].tolist())
    for row in vectors.itertuples():
        left, right = np.array(row.left), np.array(row.right)
        assert np.linalg.norm(left) == pytest.approx(1, abs=1e-4)
        assert np.linalg.norm(right) == pytest.approx(1, abs=1e-4)
        cosine = abs(left @ last[row.matrix, row.component, row.rank])
        assert row.left_cosine_to_last == pytest.approx(cosine, abs=1e-4)
    assert vectors["rank"].max() == 3
    final = rows[rows["step"] == 12]
    assert np.allclose(final[["left_cosine_to_last", "right_cosine_to_last"]], 1)
    frame = pd.read_csv("out/weight_svd_singular_values.csv")
    pd.testing.assert_frame_equal(frame, values, check_dtype=False)


def test_the_summary_ranks_components_by_growth(circuit: Callable[..., Any]) -> None:
    growth = circuit(*WORDS, "--json").payload["summary"]["growth"]
    rows = pd.DataFrame(read_jsonl(Path("out/weight_svd_trace_rows.jsonl")))
    assert list(growth) == ["W_QK", "W_OV", "W_in", "W_out"]
    for matrix, courses in growth.items():
        grown = [course["growth"] for course in courses]
        assert grown == sorted(grown, reverse=True)
        for course in courses:
            own = rows[(rows["matrix"] == matrix) & (rows["component"] == course["component"])]
            top = dict(zip(own["step"], own["top_singular_value"], strict=True))
            assert course["growth"] == top[12] - top[3]
            halves = [s for s in top if top[s] - top[3] >= course["growth"] / 2]
            assert course["half_growth_step"] == (min(halves) if course["growth"] > 0 else None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--max-singular-values", "17"), "--max-singular-values: 17; expected 1 to 16"),
        (("--top-vector-ranks", "17"), "--top-vector-ranks: 17; expected 1 to 16"),
        (("--checkpoint", "runs/tiny/checkpoints/step_000004.pt"), "no such checkpoint"),
    ],
)
def test_bad_input_is_one_line(
    circuit: Callable[..., Any], words: tuple[str, ...], says: str
) -> None:
    done = circuit(*WORDS, *words)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert says in done.err
    assert not list(Path("out").glob("*report*"))
