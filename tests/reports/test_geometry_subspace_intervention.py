"""geometry-subspace-intervention: the fast layout of reads gives what one forward a read gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformer_lens import HookedTransformer

from circuit.artifacts import read_jsonl
from circuit.model.readout import read_answers
from circuit.model.stages import patch, read_stages, stage_names
from circuit.model.subspaces import Basis, embedding_identity, keep, remove
from circuit.reports import interventions
from circuit.reports.interventions import QueryMode, intervene
from circuit.runs.opening import open_run
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.positions import ROLES, Batch, EncodedSplit, role_mask
from circuit.tasks.symbolic_kv import Record

CHECKPOINTS = [f"runs/tiny/checkpoints/step_{step:06d}.pt" for step in (6, 12)]
WORDS = (
    *("geometry-subspace-intervention", "--config", "runs/tiny/run_config.json"),
    *("--probe-set", "runs/tiny/analysis/probe_set.jsonl", "--output-dir", "out"),
    *("--checkpoint", CHECKPOINTS[0], "--checkpoint", CHECKPOINTS[1]),
    *("--stage", "layer_0_post_mlp", "--position-role", "prediction"),
)
VALUES = ("--subspace", "embedding_value_identity", "--rank", "4", "--operation", "remove")


@pytest.fixture
def model(trained: Path) -> HookedTransformer:
    return open_run(trained).model(12).requires_grad_(False)


def batch_of(tiny: Benchmark, records: list[Record]) -> Batch:
    return EncodedSplit(records, tiny.vocabulary, tiny.heldout_pairs).batch()


@pytest.fixture
def batch(tiny: Benchmark) -> Batch:
    return batch_of(tiny, tiny.splits["validation_iid"][:6])


@pytest.fixture
def basis(model: HookedTransformer, tiny: Benchmark) -> Basis:
    return embedding_identity(model, torch.tensor(tiny.vocabulary.value_ids), 5)


def naive(
    model: HookedTransformer,
    stage: str,
    batch: Batch,
    role: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    mode: QueryMode,
) -> torch.Tensor:
    """One whole forward pass a read, on its whole record."""
    masks, found = role_mask(batch, role), []
    for read, (row, at) in enumerate(zip(batch.reads.row, batch.reads.key_pos, strict=True)):
        alike = batch.reads.row == row if mode == "batch_union" else torch.tensor([read])
        places = masks[alike].any(0).nonzero()[:, 0]
        with patch(model, stage, (torch.zeros_like(places), places), change):
            found.append(model(batch.tokens[row][None])[0, at])
    return torch.stack(found)


@pytest.mark.parametrize("operation", [remove, keep])
@pytest.mark.parametrize("mode", ["single_query", "batch_union"])
@pytest.mark.parametrize("stage", stage_names(2))
def test_many_reads_at_once_equal_one_forward_pass_a_read(
    model: HookedTransformer,
    batch: Batch,
    basis: Basis,
    stage: str,
    mode: QueryMode,
    operation: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interventions, "_ROWS", 4)  # several passes
    logits, states = read_stages(model, batch.tokens, stage)
    change = partial(operation, basis=basis)
    for role in ("prediction", "value_distractors"):
        found = intervene(model, stage, states[stage], batch, role, change, mode)
        expected = naive(model, stage, batch, role, change, mode)
        assert torch.allclose(found, expected, atol=1e-5)
    clean = logits[batch.reads.row, batch.reads.key_pos]
    found = intervene(model, stage, states[stage], batch, "prediction", change, mode)
    assert not torch.allclose(found, clean, atol=1e-3)


@pytest.mark.parametrize("role", ROLES)
def test_keeping_everything_changes_nothing(
    model: HookedTransformer, batch: Batch, role: str
) -> None:
    logits, states = read_stages(model, batch.tokens, "embedding")
    for mode in ("single_query", "batch_union"):
        found = intervene(
            model, "embedding", states["embedding"], batch, role, partial(keep, basis=None), mode
        )
        clean = logits[batch.reads.row, batch.reads.key_pos]
        assert torch.allclose(found, clean, atol=1e-5)


def test_batch_union_is_single_query_where_records_have_one_read(
    model: HookedTransformer, tiny: Benchmark, basis: Basis
) -> None:
    """To float tolerance: the two lay rows out differently, and batch shape moves last bits."""
    records = tiny.splits["validation_iid"]
    reads = [len(batch_of(tiny, [record]).reads) for record in records]
    single = batch_of(tiny, [r for r, n in zip(records, reads, strict=True) if n == 1])
    several = batch_of(tiny, [r for r, n in zip(records, reads, strict=True) if n > 1])
    stage, change = "layer_0_post_attn", partial(remove, basis=basis)
    gaps = []
    for batch in (single, several):
        _, states = read_stages(model, batch.tokens, stage)
        one, union = (
            intervene(model, stage, states[stage], batch, "prediction", change, mode)
            for mode in ("single_query", "batch_union")
        )
        gaps.append(float((one - union).abs().max()))
    assert gaps[0] < 1e-5
    assert gaps[1] > 1e-3


def test_rows_and_means_are_those_of_the_reads(
    circuit: Callable[..., Any], model: HookedTransformer, tiny: Benchmark
) -> None:
    done = circuit(*WORDS, *VALUES, "--rank", "2", "--json")
    assert done.code == 0, done.err
    assert [path for path in done.payload["paths"] if not Path(path).is_file()] == []
    rows = pd.DataFrame(read_jsonl(Path("out/geometry_subspace_intervention_rows.jsonl")))
    assert not rows.duplicated(["step", "rank", "sample_id", "read_index"]).any()
    records = {r.sample_id: r for name in tiny.splits for r in tiny.splits[name]}
    own = rows[(rows["step"] == 12) & (rows["rank"] == 4)]
    batch = batch_of(tiny, [records[name] for name in own["sample_id"].unique()])
    assert len(batch.reads) == len(own)
    values = tiny.vocabulary.value_ids
    change = partial(remove, basis=embedding_identity(model, torch.tensor(values), 4))
    logits = naive(model, "layer_0_post_mlp", batch, "prediction", change, "single_query")
    clean = model(batch.tokens)[batch.reads.row, batch.reads.key_pos]
    for prefix, at in (("baseline", clean), ("intervened", logits)):
        answers = read_answers(at, batch.reads.answer, values)
        assert own[f"{prefix}_margin"].tolist() == pytest.approx(answers.margin.tolist(), abs=1e-5)
        assert own[f"{prefix}_answer_correct"].tolist() == answers.is_answer.tolist()
        assert own[f"{prefix}_value_correct"].tolist() == answers.is_value.tolist()
    means = pd.DataFrame(done.payload["summary"]["means"])
    assert len(means) == 2 * 2 * 3  # steps, ranks, two splits and all of them
    for mean in means.itertuples():
        chosen = rows[(rows["step"] == mean.step) & (rows["rank"] == mean.rank)]
        if mean.split != "all":
            chosen = chosen[chosen["split"] == mean.split]
        assert mean.reads == len(chosen)
        assert mean.intervened_margin == pytest.approx(chosen["intervened_margin"].mean())
        drop = chosen["baseline_answer_correct"].mean() - chosen["intervened_answer_correct"].mean()
        assert mean.answer_accuracy_drop == pytest.approx(drop)
        assert 0 < mean.subspace_share < 1


def test_max_records_and_split_choose_reads_in_file_order(circuit: Callable[..., Any]) -> None:
    file = Path("out/geometry_subspace_intervention_rows.jsonl")
    assert circuit(*WORDS, *VALUES).code == 0
    everything = [row for row in read_jsonl(file) if row["step"] == 6]
    assert circuit(*WORDS, *VALUES, "--max-records", "3", "--overwrite").code == 0
    few = [row for row in read_jsonl(file) if row["step"] == 6]
    assert circuit(*WORDS, *VALUES, "--split", "heldout_pairs", "--overwrite").code == 0
    heldout = [row for row in read_jsonl(file) if row["step"] == 6]
    names = [(row["sample_id"], row["read_index"]) for row in everything]
    assert [(row["sample_id"], row["read_index"]) for row in few] == names[:3]
    assert {row["split"] for row in heldout} == {"heldout_pairs"}
    assert all(row["is_heldout"] for row in heldout)
    for subset in (few, heldout):
        for row in subset:
            whole = everything[names.index((row["sample_id"], row["read_index"]))]
            assert row["intervened_margin"] == pytest.approx(whole["intervened_margin"], abs=1e-5)


def test_full_residual_and_heads_are_subspaces_too(circuit: Callable[..., Any]) -> None:
    file = Path("out/geometry_subspace_intervention_rows.jsonl")
    full = ("--subspace", "full_residual", "--operation")
    assert circuit(*WORDS, *full, "keep", "--query-mode", "batch_union").code == 0
    for row in read_jsonl(file):
        assert row["rank"] is None
        assert row["intervened_margin"] == pytest.approx(row["baseline_margin"], abs=1e-5)
        assert row["subspace_share"] == pytest.approx(1)
    head = ("--subspace", "head_qk_query", "--head", "L1H0", "--rank", "8", "--operation", "remove")
    assert circuit(*WORDS, *head, "--overwrite").code == 0
    assert (
        "ln1 is not folded in" in Path("out/geometry_subspace_intervention_report.md").read_text()
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("--stage", "layer_2_post_mlp"),
            "unknown stage 'layer_2_post_mlp'; expected one of embed",
        ),
        (("--position-role", "answer"), "unknown role 'answer'; expected prediction"),
        (("--subspace", "value"), "unknown subspace 'value'; expected one of embedding_key"),
        (("--rank", "17"), "rank 17 of embedding_value_identity; expected 1 to 16"),
        (("--rank", "4"), "a rank is named twice"),
        (("--subspace", "head_qk_key"), "subspace 'head_qk_key' needs a head"),
        (("--subspace", "head_qk_key", "--head", "L2H0"), "the model has no component 'L2H0'"),
        (("--operation", "drop"), "unknown operation 'drop'; expected one of remove, keep"),
        (("--query-mode", "all"), "unknown query mode 'all'; expected one of single_query"),
        (("--split", "train"), "holds no record of split 'train'"),
        (("--checkpoint", "runs/tiny/checkpoints/step_000004.pt"), "no such checkpoint"),
    ],
)
def test_bad_input_is_one_line(
    circuit: Callable[..., Any], words: tuple[str, ...], says: str
) -> None:
    done = circuit(*WORDS, *VALUES, *words)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert says in done.err
    assert not list(Path("out").glob("*report*"))


def test_states_and_probe_sets_of_something_else_are_refused(
    circuit: Callable[..., Any], benchmark_payload: Callable[[], dict[str, Any]]
) -> None:
    config = Path("runs/tiny/run_config.json")
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "seed": 12}))
    other = circuit(*WORDS, *VALUES)
    assert (other.code, "belongs to another config: seed" in other.err) == (2, True)
    config.write_text(text)
    benchmark = {**benchmark_payload(), "seed": 6, "output_dir": "data/other"}
    Path("other.json").write_text(json.dumps(benchmark))
    assert circuit("generate-benchmark", "--config", "other.json").code == 0
    probes = ("--benchmark-dir", "data/other", "--examples-per-split", "4")
    probes += ("--split", "validation_iid", "--output", "other.jsonl")
    assert circuit("generate-probe-set", *probes).code == 0
    other = circuit(*WORDS, *VALUES, "--probe-set", "other.jsonl")
    assert (other.code, "benchmark" in other.err, len(other.err.splitlines())) == (2, True, 1)
    assert not list(Path("out").glob("*report*"))
