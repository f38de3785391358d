"""value-code-transfer-rescue: what is removed, what is put back, and what that is worth."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit.artifacts import read_jsonl
from circuit.core import intervals
from circuit.errors import CircuitError
from circuit.model.codes import RidgeMap, logits_with_code
from circuit.model.rescue import (
    CONTROLS,
    condition_codes,
    explained,
    next_other,
    random_basis,
    removed_share,
    rescue_fractions,
)
from circuit.model.stages import patch, read_stages, stage_names
from circuit.model.subspaces import identity_basis, keep, remove
from circuit.reports.report import ReportResult, run_report
from circuit.reports.value_code_transfer_rescue import RescueOptions, ValueCodeTransferRescue
from circuit.runs.opening import open_run
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import Examples
from circuit.tasks.groups import is_for_fitting

RUN = Path("runs/tiny")
ASKED: dict[str, Any] = {
    "probe_set": RUN / "analysis" / "probe_set.jsonl",
    "checkpoints": tuple(RUN / f"checkpoints/step_{step:06d}.pt" for step in (6, 12)),
    "source_stage": "layer_0_post_mlp",
    "target_stage": "layer_1_post_mlp",
    "basis_rank": 4,
    "context_rank": 3,
    "fit_fraction": 0.6,
    "batch_size": 3,
}
SCALARS = ("correct_value_logit", "value_margin", "negative_answer_loss")


def random(seed: int, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


# --- the split, and who stands in for whom -------------------------------------------------------


@pytest.fixture
def batch(tiny: Benchmark) -> Examples:
    records = tiny.splits["validation_iid"]
    return tiny.task.split(records).batch()


def test_the_split_is_the_hash_of_the_definitions(batch: Examples) -> None:
    for fraction in (0.25, 0.75):
        want = []
        for row, index in zip(batch.row.tolist(), batch.index.tolist(), strict=True):
            digest = hashlib.sha256(f"{batch.sample_ids[row]}:{index}".encode()).hexdigest()
            want.append(int(digest[:16], 16) / 2**64 < fraction)
        assert is_for_fitting(batch, fraction).tolist() == want
        assert 0 < sum(want) < len(want)


def test_the_split_of_a_read_depends_on_nothing_else(batch: Examples) -> None:
    some = torch.arange(0, len(batch), 3)
    assert torch.equal(is_for_fitting(batch.select(some), 0.5), is_for_fitting(batch, 0.5)[some])
    wider = is_for_fitting(batch, 0.8)
    assert bool((wider | ~is_for_fitting(batch, 0.5)).all())


@pytest.mark.parametrize("seed", range(5))
def test_the_next_other_answer_equals_a_loop(seed: int) -> None:
    answers = torch.randint(0, 3, (11,), generator=torch.Generator().manual_seed(seed)).tolist()
    want = []
    for i, answer in enumerate(answers):
        j = (i + 1) % 11
        while answers[j] == answer:
            j = (j + 1) % 11
        want.append(j)
    assert next_other(torch.tensor(answers)).tolist() == want
    with pytest.raises(CircuitError, match="one answer"):
        next_other(torch.tensor([4, 4, 4]))


# --- maps and codes ------------------------------------------------------------------------------


def test_the_map_is_ridge_regression() -> None:
    x, y = random(0, 30, 5), random(1, 30, 3)
    for penalty in (1e-3, 10.0):
        theirs = Ridge(alpha=penalty).fit(x.numpy(), y.numpy())
        ours = RidgeMap.fit(x, y, penalty)(random(2, 7, 5))
        assert torch.allclose(ours, torch.tensor(theirs.predict(random(2, 7, 5).numpy())))


def codes_of(**changes: Any) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Any]]:
    """Codes on 40 reads of 8 tokens, of which the last 12 are held out."""
    names = ("source", "target", "context", "wrong_support_value", "key_identity")
    given: dict[str, Any] = {
        "vectors": {name: random(seed, 40, 10) for seed, name in enumerate(names)},
        "groups": torch.arange(40) % 8,
        "fit": torch.arange(28),
        "held_out": torch.arange(28, 40),
        "shuffled": torch.arange(28, 40).roll(1),
        "controls": CONTROLS,
        "rank": 4,
        "context_rank": 3,
        "ridge": 1e-3,
        "seed": 5,
        **changes,
    }
    basis, codes = condition_codes(given.pop("vectors"), **given)
    return basis, codes, given


def test_codes_are_the_coordinates_that_the_maps_predict() -> None:
    basis, codes, given = codes_of()
    source, target, context, wrong, key = (random(seed, 40, 10) for seed in range(5))
    fit, groups = given["fit"], given["groups"]
    bases = {
        name: identity_basis(x[fit], groups[fit], rank)
        for name, x, rank in (
            ("source", source, 4),
            ("target", target, 4),
            ("context", context, 3),
            ("key", key, 4),
        )
    }
    assert torch.allclose(basis, bases["target"])
    want = target @ bases["target"]
    beside = context @ bases["context"]
    own = source @ bases["source"]
    drawn = random_basis(10, 4, 5)
    for name, x, asked in (
        ("true_transfer", own, own[28:]),
        ("context_only", beside, beside[28:]),
        ("shuffled_answer_value", own, own[28:].roll(1, 0)),
        ("wrong_support_value", own, wrong[28:] @ bases["source"]),
        ("random_subspace", source @ drawn, source[28:] @ drawn),
        ("key_identity", key @ bases["key"], key[28:] @ bases["key"]),
    ):
        model = Ridge(alpha=1e-3).fit(x[:28].numpy(), want[:28].numpy())
        assert torch.allclose(codes[name], torch.tensor(model.predict(asked.numpy()))), name
        if name != "context_only":
            both = Ridge(alpha=1e-3).fit(torch.cat([x, beside], 1)[:28].numpy(), want[:28].numpy())
            found = both.predict(torch.cat([asked, beside[28:]], 1).numpy())
            joint = f"{name}_plus_context" if name in CONTROLS else "source_plus_context"
            assert torch.allclose(codes[joint], torch.tensor(found)), joint
    assert torch.equal(codes["oracle"], want[28:])
    assert not codes["removed"].any()


def test_a_source_that_is_the_target_transfers_everything() -> None:
    vectors = dict.fromkeys(("source", "target", "context"), random(7, 40, 10))
    _, codes, _ = codes_of(vectors=vectors, controls=(), ridge=1e-9)
    for name in ("true_transfer", "context_only", "source_plus_context"):
        condition = 4 if name != "context_only" else 3
        assert torch.allclose(codes[name][:, :condition], codes["oracle"][:, :condition], atol=1e-6)
    assert explained(codes["true_transfer"], codes["oracle"]) == pytest.approx(1)


def test_the_held_out_reads_decide_no_basis_and_no_map() -> None:
    _, codes, _ = codes_of()
    vectors = {name: random(seed, 40, 10) for seed, name in enumerate(("source", "target"))}
    changed = {**vectors, "context": random(2, 40, 10)}
    changed["target"] = torch.cat([vectors["target"][:28], 9 * random(9, 12, 10)])
    _, other, _ = codes_of(vectors=changed, controls=("random_subspace",))
    for name in ("true_transfer", "source_plus_context", "random_subspace"):
        assert torch.equal(codes[name], other[name])
    assert not torch.equal(codes["oracle"], other["oracle"])


def test_the_random_subspace_is_seeded() -> None:
    one, same, other = (random_basis(10, 4, seed) for seed in (5, 5, 6))
    assert torch.allclose(one.T @ one, torch.eye(4, dtype=torch.float64))
    assert torch.equal(one, same)
    assert not torch.allclose(one @ one.T, other @ other.T, atol=0.1)
    codes = [codes_of(seed=seed)[1]["random_subspace"] for seed in (5, 5, 6)]
    assert torch.equal(codes[0], codes[1])
    assert not torch.allclose(codes[0], codes[2])


def test_the_share_that_is_removed() -> None:
    vectors, keys = random(0, 30, 6), torch.arange(30) % 4
    assert removed_share(vectors, torch.eye(6, dtype=torch.float64), keys) == pytest.approx((1, 1))
    keyed = identity_basis(vectors, keys, 3)
    share, key = removed_share(vectors, keyed, keys)
    want = (keep(vectors, keyed).norm(dim=1) / vectors.norm(dim=1)).square().mean()
    assert (share, key) == pytest.approx((float(want), 1))
    rest = torch.linalg.svd(keyed).U[:, 3:]
    assert removed_share(vectors, rest, keys)[1] == pytest.approx(0, abs=1e-12)
    assert removed_share(vectors, rest, torch.zeros(30))[1] is None


# --- what it is worth ----------------------------------------------------------------------------


def test_rescue_is_of_means_and_its_interval_of_whole_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 50)
    records = torch.tensor([3, 3, 5, 8, 8, 8, 9])
    names = ("clean", "removed", "patched")
    values = {name: random(seed, 7, 2) for seed, name in enumerate(names)}
    values["clean"] += 4
    values["removed"][:, 1] = values["clean"][:, 1]  # removal changes nothing here
    (found, low, high), nothing = rescue_fractions(values, records, "patched", 1)
    clean, removed, patched = (values[name][:, 0] for name in names)
    assert found == pytest.approx(
        float((patched.mean() - removed.mean()) / (clean - removed).mean())
    )
    assert nothing == (None, None, None)
    drawn = torch.randint(4, (50, 4), generator=torch.Generator().manual_seed(1))
    fractions = []
    for draw in drawn.tolist():
        reads = [i for d in draw for i, r in enumerate(records.tolist()) if r == [3, 5, 8, 9][d]]
        fractions.append(float((patched - removed)[reads].sum() / (clean - removed)[reads].sum()))
    ends = torch.tensor(fractions, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    assert (low, high) == pytest.approx(tuple(ends.tolist()))
    assert rescue_fractions(values, records, "clean", 1)[0] == pytest.approx((1, 1, 1))
    assert rescue_fractions(values, records, "removed", 1)[0] == (0, 0, 0)


def test_a_code_explains_all_nothing_or_less() -> None:
    true = random(0, 20, 3)
    assert explained(true, true) == 1
    assert explained(true.mean(0).expand(20, 3), true) == pytest.approx(0)
    assert explained(-true, true) < 0
    assert explained(None, true) is None
    assert explained(true, torch.ones(20, 3)) is None


# --- in the network ------------------------------------------------------------------------------


@pytest.fixture
def model(trained: Path) -> HookedTransformer:
    return open_run(trained).model(12).requires_grad_(False)


@pytest.mark.parametrize("stage", stage_names(2))
def test_each_row_is_one_read_with_its_own_code(
    model: HookedTransformer, batch: Examples, stage: str
) -> None:
    at = batch.select(torch.arange(5))
    position = at.position("support_value")
    logits, states = read_stages(model, at.tokens, stage)
    basis, code = random_basis(16, 3, 0), random(1, 5, 3)
    where = (model, stage, states[stage][at.row], position, at.at, basis)
    own = states[stage][at.row, position].double() @ basis
    clean = logits[at.row, at.at]
    for written, want in ((None, clean), (own, clean)):  # the true code undoes its removal
        assert torch.allclose(logits_with_code(*where, written), want, atol=1e-5)
    found = logits_with_code(*where, code)
    for i in range(5):
        place = (at.row[i : i + 1], position[i : i + 1])
        change = (code[i : i + 1] @ basis.T).float()
        with patch(model, stage, place, lambda x, c=change: remove(x, basis.float()) + c):
            naive = model(at.tokens)[at.row[i], at.at[i]]
        assert torch.allclose(found[i], naive, atol=1e-5)
    moved = not torch.allclose(found, clean, atol=1e-3)
    read_later = stage not in ("layer_1_post_attn", "layer_1_post_mlp", "final_norm")
    assert moved == read_later  # another position matters until the last attention


# --- the report ----------------------------------------------------------------------------------


def report(output: str, **asked: Any) -> ReportResult:
    options = RescueOptions(**ASKED | asked)
    return run_report(ValueCodeTransferRescue, open_run(RUN), options, output)


@pytest.mark.usefixtures("trained")
def test_the_true_code_rescues_everything() -> None:
    result = report("out")
    assert "the oracle, the read's own code put back, rescues everything" in result.law
    rows, of_reads = (read_jsonl(path) for path in result.rows)
    conditions = [row["condition"] for row in rows if row["step"] == 12]
    assert len(conditions) == len(set(conditions)) == 6 + 2 * len(CONTROLS)
    for row in rows:
        if row["condition"] == "oracle":
            for scalar in SCALARS:
                assert row[f"rescue_{scalar}"] == pytest.approx(1, abs=1e-3)
        own = [
            r for r in of_reads if (r["step"], r["condition"]) == (row["step"], row["condition"])
        ]
        assert len(own) == row["reads"] == result.summary["evaluation_reads"]
        for scalar in SCALARS:
            assert sum(r[scalar] for r in own) / len(own) == pytest.approx(row[scalar])


@pytest.mark.usefixtures("trained")
def test_the_batch_size_moves_last_bits_only_and_the_target_is_its_own_best_source() -> None:
    itself = {"source_stage": "layer_1_post_mlp", "source_position_role": "prediction"}
    itself |= {"controls": ("random_subspace",), "ridge_lambda": 1e-9}
    results = [report(f"out{size}", batch_size=size, **itself) for size in (2, 50)]
    few, many = (read_jsonl(result.rows[1]) for result in results)
    assert len(few) == len(many) > 16
    for one, other in zip(few, many, strict=True):
        assert one["sample_id"] == other["sample_id"]
        for scalar in SCALARS:
            assert one[scalar] == pytest.approx(other[scalar], abs=1e-4)
    for row in read_jsonl(results[1].rows[0]):
        if row["condition"] == "true_transfer":
            assert row["code_r2"] == pytest.approx(1)


@pytest.mark.usefixtures("trained")
def test_the_context_has_the_sources_stage_and_the_bases_rank() -> None:
    asked = {"context_rank": 4, "context_stage": "layer_0_post_mlp"}
    named, left_out = report("named", **asked), report("left_out", context_rank=None)
    assert named.rows[0].read_bytes() == left_out.rows[0].read_bytes()


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"group_by": "query_key"}, "rank 4 of the basis by query_key (4 tokens in"),
        ({"basis_rank": 17}, "rank 17 of the basis; expected 1 to 16"),
        ({"context_rank": 16}, "rank 16 of the context by answer_value ("),
        ({"fit_fraction": 0.9}, "`fit_fraction` 0.9: "),
        (
            {"target_position_role": "causal_prefix"},
            "`target_position_role`: role 'causal_prefix' has several positions",
        ),
    ],
)
def test_what_the_reads_do_not_allow_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(CircuitError, match=re.escape(said)):
        report("out", **asked)
    assert not Path("out").exists()
