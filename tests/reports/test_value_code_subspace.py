"""value-code-subspace-report: vectorised readouts give what a loop over reads gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from circuit.artifacts import read_jsonl
from circuit.errors import CircuitError
from circuit.model.codes import mean_at, nearest_centroid, nearest_centroid_without
from circuit.model.stages import stage_hook
from circuit.reports.report import ReportResult, run_report
from circuit.reports.value_code_subspace import (
    SubspaceOptions,
    ValueCodeSubspace,
    first_to_stay,
)
from circuit.reports.written import read_report
from circuit.runs.opening import open_run
from circuit.tasks.base import Vocabulary
from circuit.tasks.examples import Examples
from circuit.tasks.groups import group_tokens, groups_of, nonempty_mask
from circuit.tasks.probes import read_probe_set

RUN = Path("runs/tiny")
ASKED: dict[str, Any] = {
    "probe_set": RUN / "analysis" / "probe_set.jsonl",
    "checkpoints": tuple(RUN / f"checkpoints/step_{step:06d}.pt" for step in (3, 12)),
    "stages": ("layer_0_post_mlp", "final_norm"),
    "position_roles": ("prediction", "value_distractors"),
    "group_by": ("answer_value", "query_key"),
    "pca_rank": 2,
}


def report(output: str, **asked: Any) -> ReportResult:
    return run_report(ValueCodeSubspace, open_run(RUN), SubspaceOptions(**ASKED | asked), output)


def drawn(seed: int, reads: int, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors with a signal, their groups, and units of up to four reads."""
    draw = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, max(2, reads // 3), (reads,), generator=draw) + 40
    units = torch.randint(0, max(2, reads // 2), (reads,), generator=draw)
    means = torch.randn(100, width, generator=draw, dtype=torch.float64)
    noise = torch.randn(reads, width, generator=draw, dtype=torch.float64)
    return means[groups] + 0.7 * noise, groups, units


def naive_centroids(vectors: Tensor, groups: Tensor, units: Tensor) -> tuple[list[int], list[bool]]:
    found, scored = [], []
    for i in range(len(vectors)):
        cosines = {}
        for group in sorted(set(groups.tolist())):
            rest = [
                vectors[j]
                for j in range(len(vectors))
                if groups[j] == group and units[j] != units[i]
            ]
            if rest:
                centroid = torch.stack(rest).mean(0)
                cosines[group] = float(torch.cosine_similarity(vectors[i], centroid, dim=0))
        found.append(max(cosines, key=lambda group: cosines[group]))
        scored.append(int(groups[i]) in cosines)
    return found, scored


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("alone", [True, False])
def test_leaving_out_equals_a_loop_over_reads(seed: int, alone: bool) -> None:
    vectors, groups, units = drawn(seed, reads=9 + 7 * seed)
    units = torch.arange(len(vectors)) if alone else units
    found, scored = nearest_centroid(vectors, groups, units)
    want, want_scored = naive_centroids(vectors, groups, units)
    assert scored.tolist() == want_scored
    assert found.tolist() == want
    assert not all(want_scored) or len(set(want)) > 1


def test_a_group_without_others_is_no_candidate() -> None:
    vectors = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, 0.0]])
    found, scored = nearest_centroid(vectors, torch.tensor([1, 2, 2]), torch.arange(3))
    assert found.tolist() == [2, 2, 2]
    assert scored.tolist() == [False, True, True]


def test_a_group_whose_vectors_cancel_is_no_candidate() -> None:
    vectors, groups, _ = drawn(1, reads=30)
    alone = torch.arange(len(vectors))
    found, scored = nearest_centroid(vectors, groups, alone)
    for pair in (torch.zeros(2, 6), torch.stack([vectors[0], -vectors[0]])):
        more = nearest_centroid(
            torch.cat([vectors, pair.double()]),
            torch.cat([groups, torch.tensor([900, 900])]),
            torch.arange(len(vectors) + 2),
        )
        assert torch.equal(more[0][:-2], found)
        assert torch.equal(more[1][:-2], scored)
    # one of three that leave nothing when it is left out
    third = nearest_centroid(
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.1], [1.0, 0.0]]),
        torch.tensor([1, 1, 1, 2, 2]),
        torch.arange(5),
    )
    assert int(third[0][0]) == 2


def test_the_only_read_of_a_key_is_no_code_without_the_keys_mean() -> None:
    vectors, groups, _ = drawn(5, reads=44)
    keys = torch.randint(0, 5, (44,), generator=torch.Generator().manual_seed(6))
    keys[7] = 99
    means = {k: vectors[keys == k].mean(0) for k in set(keys.tolist())}
    without = torch.stack([v - means[int(k)] for v, k in zip(vectors, keys, strict=True)])
    assert not without[7].any()
    want, want_scored = naive_centroids(without, groups, torch.arange(44))
    assert want_scored[7]
    found, scored = nearest_centroid_without(vectors, groups, keys)
    assert scored.tolist() == [one and i != 7 for i, one in enumerate(want_scored)]
    assert found[scored].tolist() == torch.tensor(want)[scored].tolist()
    # alone in its group as well: the zero vector is a centroid, of which there is no direction
    groups[7] = 999
    found, scored = nearest_centroid_without(vectors, groups, keys)
    assert scored.tolist() == [one and i != 7 for i, one in enumerate(want_scored)]
    assert found[scored].tolist() == torch.tensor(want)[scored].tolist()


def test_a_code_is_read_and_noise_is_not() -> None:
    groups = torch.arange(8).repeat(40)
    noise = torch.randn(320, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code = 6 * torch.eye(64, dtype=torch.float64)[groups]
    for vectors, low, high in ((code + noise, 0.99, 1.0), (noise, 0.02, 0.25)):
        found, scored = nearest_centroid(vectors, groups, torch.arange(320))
        assert bool(scored.all())
        assert low <= float((found == groups).double().mean()) <= high


def test_means_of_roles_equal_a_loop(probes: tuple[Examples, Vocabulary]) -> None:
    batch, _ = probes
    draw = torch.Generator().manual_seed(3)
    activations = torch.randn(*batch.tokens.shape, 5, generator=draw)
    for role in batch.task.roles:
        mask = batch.role(role)
        found = mean_at(activations, batch.row, mask)
        for i in range(len(batch)):
            row = activations[batch.row[i]].double()
            assert torch.allclose(found[i], row[mask[i]].mean(0), atol=1e-12)


def test_groups_are_the_tokens_at_their_positions(probes: tuple[Examples, Vocabulary]) -> None:
    batch, _ = probes
    at = {name: batch.position(name) for name in batch.task.single_roles()}
    at |= {"answer_value": batch.at + 1, "position_token": batch.facts["support_op_pos"]}
    assert groups_of(batch.task) == tuple(dict.fromkeys(["answer_value", *at]))
    for name, positions in at.items():
        want = [int(batch.tokens[r, p]) for r, p in zip(batch.row, positions, strict=True)]
        assert group_tokens(batch, name, "support_op").tolist() == want
    assert torch.equal(
        group_tokens(batch, "support_value", "prediction"),
        group_tokens(batch, "answer_value", "prediction"),
    )
    with pytest.raises(CircuitError, match="role 'value_distractors' has several positions"):
        group_tokens(batch, "position_token", "value_distractors")
    with pytest.raises(CircuitError, match="unknown role 'nowhere'"):
        group_tokens(batch, "position_token", "nowhere")


def test_a_read_without_the_role_is_named(probes: tuple[Examples, Vocabulary]) -> None:
    batch, _ = probes
    bare = replace(batch, kinds=torch.full_like(batch.kinds, -1))
    with pytest.raises(CircuitError, match=f"first in {batch.sample_ids[0]}: .* no position of ro"):
        nonempty_mask(bare, "key_distractors")


def test_readable_means_from_there_on() -> None:
    rows = [{"step": s, "accuracy": a} for s, a in ((1, 0.9), (2, 0.1), (3, 0.5), (4, 0.8))]
    assert first_to_stay(rows, "accuracy") == 3
    assert first_to_stay(rows[:2], "accuracy") is None
    assert first_to_stay([*rows, {"step": 5, "accuracy": None}], "accuracy") is None


@pytest.fixture
def probes(trained: Path) -> tuple[Examples, Vocabulary]:
    """All probe records of the tiny run."""
    benchmark = open_run(trained).benchmark
    records = read_probe_set(trained / "analysis" / "probe_set.jsonl", benchmark).records
    split = benchmark.task.split(records)
    return split.batch(), benchmark.vocabulary


def top_right(rows: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(rows - rows.mean(0)).Vh[:rank].T


def test_every_number_equals_a_loop_over_reads(
    trained: Path, probes: tuple[Examples, Vocabulary]
) -> None:
    result = report("out")
    rows = read_jsonl(result.rows[0])
    assert len(rows) == 2 * 2 * 2 * 2
    assert {row["step"] for row in rows} == {3, 12}
    assert len(result.summary["readout"]) == 8
    (row,) = [
        r
        for r in rows
        if (r["step"], r["stage"], r["position_role"], r["group_by"])
        == (12, "layer_0_post_mlp", "value_distractors", "answer_value")
    ]
    batch, vocabulary = probes
    reads, model = batch, open_run(trained).model(12).requires_grad_(False)
    logits, cache = model.run_with_cache(batch.tokens)
    mask = batch.role("value_distractors")
    states = cache[stage_hook("layer_0_post_mlp", 2)].double()
    vectors = torch.stack([states[reads.row[i]][mask[i]].mean(0) for i in range(len(reads))])
    tokens = reads.answer.tolist()
    of = {t: vectors[[x == t for x in tokens]].mean(0) for t in sorted(set(tokens))}
    identity, everything = top_right(torch.stack(list(of.values())), 2), top_right(vectors, 2)
    want: dict[str, list[float]] = {}
    for i, vector in enumerate(vectors):
        unit, answer = vector / vector.norm(), tokens[i]
        want.setdefault("identity_projection", []).append(float((unit @ identity).norm()))
        want.setdefault("vector_projection", []).append(float((unit @ everything).norm()))
        cosine = torch.cosine_similarity(vector, vectors.mean(0), dim=0)
        want.setdefault("mean_cosine", []).append(abs(float(cosine)))
        seen = model.unembed(model.ln_final(vector.float()[None, None]))[0, 0]
        final = logits[reads.row[i], reads.at[i]]
        for name, scores in (("lens", seen), ("final", final)):
            others = [float(scores[v]) for v in vocabulary.value_ids if v != answer]
            margin = float(scores[answer]) - max(others)
            want.setdefault(f"{name}_value_margin", []).append(margin)
            want.setdefault(f"{name}_value_accuracy", []).append(margin > 0)
        want.setdefault("final_answer_accuracy", []).append(int(final.argmax()) == answer)
    for column, values in want.items():
        assert row[column] == pytest.approx(sum(values) / len(values), abs=1e-5), column
    keys = reads.facts["key"].tolist()
    means = {k: vectors[[x == k for x in keys]].mean(0) for k in set(keys)}
    without = torch.stack([v - means[k] for v, k in zip(vectors, keys, strict=True)])
    for column, points, units in (
        ("centroid_accuracy", vectors, torch.arange(len(vectors))),
        ("centroid_accuracy_other_records", vectors, reads.row),
        ("centroid_accuracy_key_removed", without, torch.arange(len(vectors))),
    ):
        found, scored = naive_centroids(points, reads.answer, units)
        hits = [f == t for f, t, s in zip(found, tokens, scored, strict=True) if s]
        assert row[column] == pytest.approx(sum(hits) / len(hits)), column
        assert row[column.replace("accuracy", "reads")] == len(hits)
    assert sum(of_lag["reads"] for of_lag in row["by_lag"].values()) == row["reads"] == len(reads)
    by_key = [r for r in rows if r["group_by"] == "query_key"]
    assert {r["centroid_accuracy_key_removed"] for r in by_key} == {None}
    assert {r["centroid_reads_key_removed"] for r in by_key} == {None}


@pytest.mark.usefixtures("trained")
def test_the_models_own_readout_is_checked_whichever_stages_are_asked_for() -> None:
    everywhere = ASKED["position_roles"][1:]
    result = report("out", stages=("embedding",), position_roles=everywhere)
    gap = float(result.law.rsplit(" ", 1)[-1])
    assert result.law.startswith("the lens at final_norm gives the model's own value margins")
    assert 0 <= gap < 1e-5
    assert {row["stage"] for row in read_jsonl(result.rows[0])} == {"embedding"}


@pytest.mark.usefixtures("trained")
def test_groupings_that_are_alike_are_drawn_once() -> None:
    groups = ("support_value", "answer_value", "query_key")
    roles = ("prediction", "support_value")
    result = report("out", group_by=groups, position_roles=roles)
    charts = ValueCodeSubspace.charts(read_report(result.report).results)
    drawn = {chart.title.partition(":")[0] for chart in charts}
    assert drawn == {f"{group} at {role}" for group in groups[1:] for role in roles}
    assert {chart.title for chart in charts if "key removed" in chart.title} == {
        f"answer_value at {role}: nearest centroid, query key removed" for role in roles
    }
    assert len({chart.name for chart in charts}) == len(charts)


@pytest.mark.usefixtures("trained")
def test_bases_and_groups_that_there_are_not_are_refused() -> None:
    with pytest.raises(CircuitError, match="role 'value_distractors' has several positions"):
        report("out", group_by=("position_token",))
    with pytest.raises(CircuitError, match=r"rank 4 of the identity basis by query_key \(4 tokens"):
        report("out", pca_rank=4)
