"""geometry-subspace-intervention: the fast layout of reads gives what one forward a read gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformer_lens import HookedTransformer

from circuit.artifacts import read_jsonl
from circuit.core.intervals import RecordDraws
from circuit.errors import CircuitError
from circuit.figures.charts import Chart
from circuit.model.readout import read_answers
from circuit.model.stages import patch, read_stages, stage_names
from circuit.model.subspaces import Basis, embedding_identity, keep, remove
from circuit.reports import changed_places
from circuit.reports.changed_places import QueryMode, intervene
from circuit.reports.geometry_subspace_intervention import (
    GeometrySubspaceIntervention,
    InterventionOptions,
)
from circuit.reports.report import ReportResult, run_report
from circuit.reports.written import read_report
from circuit.runs.opening import open_run
from circuit.tasks.base import Record
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import Examples
from circuit.tasks.symbolic_kv.task import SymbolicKV

RUN = Path("runs/tiny")
ASKED: dict[str, Any] = {
    "probe_set": RUN / "analysis" / "probe_set.jsonl",
    "checkpoints": tuple(RUN / f"checkpoints/step_{step:06d}.pt" for step in (6, 12)),
    "stage": "layer_0_post_mlp",
    "subspace": "embedding_value_identity",
    "ranks": (4,),
    "operation": "remove",
}
LAST = ASKED["checkpoints"][1:]


def report(output: str, **asked: Any) -> ReportResult:
    options = InterventionOptions(**ASKED | asked)
    return run_report(GeometrySubspaceIntervention, open_run(RUN), options, output)


@pytest.fixture
def model(trained: Path) -> HookedTransformer:
    return open_run(trained).model(12).requires_grad_(False)


def batch_of(tiny: Benchmark, records: list[Record]) -> Examples:
    return tiny.task.split(records).batch()


@pytest.fixture
def batch(tiny: Benchmark) -> Examples:
    return batch_of(tiny, tiny.splits["validation_iid"][:6])


@pytest.fixture
def basis(model: HookedTransformer, tiny: Benchmark) -> Basis:
    return embedding_identity(model, torch.tensor(tiny.vocabulary.value_ids), 5)


def naive(
    model: HookedTransformer,
    stage: str,
    batch: Examples,
    role: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    mode: QueryMode,
) -> torch.Tensor:
    """One whole forward pass a read, on its whole record."""
    masks, found = batch.role(role), []
    for read, (row, at) in enumerate(zip(batch.row, batch.at, strict=True)):
        alike = batch.row == row if mode == "batch_union" else torch.tensor([read])
        places = masks[alike].any(0).nonzero()[:, 0]
        with patch(model, stage, (torch.zeros_like(places), places), change):
            found.append(model(batch.tokens[row][None])[0, at])
    return torch.stack(found)


@pytest.mark.parametrize("operation", [remove, keep])
@pytest.mark.parametrize("mode", ["single_query", "batch_union"])
@pytest.mark.parametrize("stage", stage_names(2))
def test_many_reads_at_once_equal_one_forward_pass_a_read(
    model: HookedTransformer,
    batch: Examples,
    basis: Basis,
    stage: str,
    mode: QueryMode,
    operation: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(changed_places, "_ROWS", 4)  # several passes
    logits, states = read_stages(model, batch.tokens, stage)
    change = partial(operation, basis=basis)
    for role in ("prediction", "value_distractors"):
        found = intervene(model, stage, states[stage], batch, role, change, mode)
        expected = naive(model, stage, batch, role, change, mode)
        assert torch.allclose(found, expected, atol=1e-5)
    clean = logits[batch.row, batch.at]
    found = intervene(model, stage, states[stage], batch, "prediction", change, mode)
    assert not torch.allclose(found, clean, atol=1e-3)


@pytest.mark.parametrize("role", SymbolicKV.roles)
def test_keeping_everything_changes_nothing(
    model: HookedTransformer, batch: Examples, role: str
) -> None:
    logits, states = read_stages(model, batch.tokens, "embedding")
    for mode in ("single_query", "batch_union"):
        found = intervene(
            model, "embedding", states["embedding"], batch, role, partial(keep, basis=None), mode
        )
        clean = logits[batch.row, batch.at]
        assert torch.allclose(found, clean, atol=1e-5)


def test_batch_union_is_single_query_where_records_have_one_read(
    model: HookedTransformer, tiny: Benchmark, basis: Basis
) -> None:
    """To float tolerance: the two lay rows out differently, and batch shape moves last bits."""
    records = tiny.splits["validation_iid"]
    reads = [len(batch_of(tiny, [record])) for record in records]
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


def test_rows_and_means_are_those_of_the_reads(model: HookedTransformer, tiny: Benchmark) -> None:
    result = report("out", ranks=(4, 2))
    rows = pd.DataFrame(read_jsonl(result.rows[0]))
    assert not rows.duplicated(["step", "rank", "sample_id", "read_index"]).any()
    records = {r.sample_id: r for name in tiny.splits for r in tiny.splits[name]}
    own = rows[(rows["step"] == 12) & (rows["rank"] == 4)]
    batch = batch_of(tiny, [records[name] for name in own["sample_id"].unique()])
    assert len(batch) == len(own)
    values = tiny.vocabulary.value_ids
    change = partial(remove, basis=embedding_identity(model, torch.tensor(values), 4))
    logits = naive(model, "layer_0_post_mlp", batch, "prediction", change, "single_query")
    clean = model(batch.tokens)[batch.row, batch.at]
    for prefix, at in (("baseline", clean), ("intervened", logits)):
        answers = read_answers(at, batch.answer, values)
        assert own[f"{prefix}_margin"].tolist() == pytest.approx(answers.margin.tolist(), abs=1e-5)
        assert own[f"{prefix}_answer_correct"].tolist() == answers.is_answer.tolist()
        assert own[f"{prefix}_value_correct"].tolist() == answers.is_value.tolist()
    means = pd.DataFrame(result.summary["means"])
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
        drops = chosen["baseline_margin"] - chosen["intervened_margin"]
        values = torch.tensor([drops.tolist(), chosen["subspace_share"].tolist()]).double().T
        margin, share = RecordDraws(chosen["sample_id"].tolist()).means(values)
        assert (mean.margin_drop_low, mean.margin_drop_high) == pytest.approx(margin)
        assert (mean.subspace_share_low, mean.subspace_share_high) == pytest.approx(share)


@pytest.mark.usefixtures("trained")
def test_max_records_and_split_choose_reads_in_file_order() -> None:
    everything, few, heldout = (
        [row for row in read_jsonl(report(output, **asked).rows[0]) if row["step"] == 6]
        for output, asked in (
            ("all", {}),
            ("few", {"max_records": 3}),
            ("heldout", {"splits": ("heldout_pairs",)}),
        )
    )
    names = [(row["sample_id"], row["read_index"]) for row in everything]
    assert [(row["sample_id"], row["read_index"]) for row in few] == names[:3]
    assert {row["split"] for row in heldout} == {"heldout_pairs"}
    assert all(row["is_heldout"] for row in heldout)
    for row in (*few, *heldout):
        whole = everything[names.index((row["sample_id"], row["read_index"]))]
        assert row["intervened_margin"] == pytest.approx(whole["intervened_margin"], abs=1e-5)


@pytest.mark.usefixtures("trained")
def test_full_residual_and_heads_are_subspaces_too() -> None:
    whole = {"subspace": "full_residual", "ranks": (), "query_mode": "batch_union"}
    for row in read_jsonl(report("full", operation="keep", **whole).rows[0]):
        assert row["rank"] is None
        assert row["intervened_margin"] == pytest.approx(row["baseline_margin"], abs=1e-5)
        assert row["subspace_share"] == pytest.approx(1)
    head = report("head", subspace="head_qk_query", head="L1H0", ranks=(8,))
    assert "ln1 is not folded in" in head.page.read_text()
    titles = [
        chart.title
        for folder in ("full", "head")
        for chart in GeometrySubspaceIntervention.charts(
            read_report(f"{folder}/geometry_subspace_intervention_report.json").results
        )
    ]
    assert titles == [
        f"{what} at layer_0_post_mlp / prediction{mode}: {quantity} over steps"
        for what, mode in (
            ("keep full_residual", ", batch_union"),
            ("remove head_qk_query of L1H0", ""),
        )
        for quantity in ("answer accuracy", "value margin")
    ]


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"ranks": (17,)}, "rank 17 of embedding_value_identity; expected 1 to 16"),
        ({"ranks": ()}, "subspace 'embedding_value_identity' needs a rank"),
        ({"subspace": "head_qk_key"}, "subspace 'head_qk_key' needs a head"),
        ({"subspace": "full_residual"}, "is everything and takes no rank"),
        ({"head": "L1H0"}, "is no head's and takes none"),
    ],
)
def test_a_subspace_that_there_is_not_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(CircuitError, match=says):
        report("out", **asked)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("operation", ["remove", "keep"])
def test_random_bases_are_drawn_beside_the_real_one(operation: str) -> None:
    """The rows of the real basis stay byte for byte; of the draws every number is their rows'."""
    asked = {"operation": operation, "ranks": (4, 16), "random_bases": 7}
    alone, beside = report("alone", **asked | {"random_bases": 0}), report("beside", **asked)
    assert beside.rows[0].read_bytes() == alone.rows[0].read_bytes()
    assert beside.summary["means"] == alone.summary["means"]
    assert [path.name for path in alone.rows] == ["geometry_subspace_intervention_rows.jsonl"]
    assert "random_bases" not in alone.summary
    assert "andom" not in alone.page.read_text()
    draws = pd.DataFrame(read_jsonl(beside.rows[1]))
    assert len(draws) == 2 * 2 * 2 * 7  # checkpoints, ranks, controls
    means = pd.DataFrame(beside.summary["means"]).query("split == 'all'")
    means = means.set_index(["step", "rank"])
    for told in beside.summary["random_bases"]:
        place = told["step"], told["rank"]
        own = draws[(draws["step"] == place[0]) & (draws["rank"] == place[1])]
        own = own[own["control"] == told["control"]]
        assert sorted(own["draw"]) == list(range(7))
        real = means.loc[place]
        assert told["real_margin_drop"] == pytest.approx(real["margin_drop"], abs=1e-6)
        assert told["real_answer_accuracy"] == real["intervened_answer_accuracy"]
        for column, harm in (("margin_drop", 1), ("answer_accuracy", -1)):
            values = own[column]
            assert told[f"{column}_mean"] == pytest.approx(values.mean())
            ends = told[f"{column}_low"], told[f"{column}_high"]
            assert ends == pytest.approx(values.quantile([0.025, 0.975]).tolist())
            sign = harm if operation == "remove" else -harm
            reach = (sign * values >= sign * told[f"real_{column}"] - 1e-4).sum()
            assert told[f"{column}_p"] == (1 + reach) / 8
        if told["control"] == "equal_rank":  # in the mean a subspace holds its share of directions
            share = place[1] / 16 if operation == "remove" else 1 - place[1] / 16
            assert told["energy_share"] == pytest.approx(share, abs=0.15)
        elif operation == "remove":
            assert told["energy_share"] == pytest.approx(real["subspace_share"], abs=1e-5)
        if place[1] == 16:  # of every direction: all bases do the same
            assert told["margin_drop_p"] == 1
            assert told["margin_drop_low"] == pytest.approx(told["real_margin_drop"], abs=1e-4)
    gap = re.search(r"the real basis does, to (\S+) of the vector's", beside.law)
    assert gap is not None
    assert float(gap[1]) < 1e-6
    titles = {chart.name: chart for chart in charts_of("beside")}
    assert titles.keys() == {chart.name for chart in charts_of("alone")}
    assert all("random_bases" in chart.data for chart in titles.values())


def charts_of(folder: str) -> list[Chart]:
    read = read_report(f"{folder}/geometry_subspace_intervention_report.json")
    return GeometrySubspaceIntervention.charts(read.results)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("mode", ["single_query", "batch_union"])
def test_what_is_removed_may_be_replaced(mode: str) -> None:
    """By a mean that is the vectors' own nothing changes: here where one position is changed."""
    asked = {"query_mode": mode, "stage": "embedding", "ranks": (4,)}
    zero, mean, resample, again, other = (
        pd.DataFrame(read_jsonl(report(name, **asked | changes).rows[0]))["intervened_margin"]
        for name, changes in {
            "zero": {},
            "mean": {"replacement": "mean"},
            "resample": {"replacement": "resample"},
            "again": {"replacement": "resample", "seed": 17},
            "other": {"replacement": "resample", "seed": 18},
        }.items()
    )
    assert resample.equals(again)
    for one, another in ((zero, mean), (zero, resample), (mean, resample), (resample, other)):
        assert float((one - another).abs().max()) > 1e-3
    single = {**asked, "max_records": 1, "query_mode": "single_query", "checkpoints": LAST}
    (row,) = read_jsonl(report("single", **single, replacement="mean").rows[0])
    assert row["intervened_margin"] == pytest.approx(row["baseline_margin"], abs=1e-5)
    with pytest.raises(CircuitError, match="`replacement` resample: all changed positions are of"):
        report("refused", **single, replacement="resample")


@pytest.mark.usefixtures("trained")
def test_there_is_no_random_basis_of_everything() -> None:
    with pytest.raises(CircuitError, match="`random_bases`: full_residual has no rank"):
        report("out", subspace="full_residual", ranks=(), random_bases=1)
