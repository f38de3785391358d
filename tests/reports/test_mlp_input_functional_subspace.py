"""mlp-input-functional-subspace-report: products against loops over pairs, rows against models."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from circuit.artifacts import read_jsonl
from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.model.components import ablate
from circuit.options import PairOptions
from circuit.reports.answer_scalar_residual_diagnosis import PAIR_ROWS
from circuit.reports.inputs import Inputs, open_inputs
from circuit.reports.mlp_input_functional_subspace import FunctionalSubspace, SubspaceOptions
from circuit.reports.report import ReportResult, run_report
from circuit.reports.written import read_report
from circuit.scalars.answers import FIXED_SOURCE, FIXED_TARGET, MOVING
from circuit.scalars.functional_write import WritePath
from circuit.scalars.interval_ends import ENDPOINTS, read_intervals
from circuit.scalars.write_products import PRODUCTS, SIZES, SUMMED, Readout, measure
from circuit.schemas import RowKey, ScalarPairRow, read_typed_rows
from circuit.tasks.examples import Examples
from circuit.tasks.pairs import Pair
from circuit.tasks.symbolic_kv.stream import program_of
from circuit.train_config import TrainConfig

RUN = Path("runs/tiny")
PROBE = RUN / "analysis" / "probe_set.jsonl"
ROWS = RUN / "analysis" / "answers" / PAIR_ROWS
OPTIONS = SubspaceOptions(
    probe_set=PROBE,
    scalar_pair_rows=ROWS,
    source_component="L0H1",
    component="L0MLP",
    position_roles=("prediction", "value_distractors"),
    scalars=(MOVING, FIXED_SOURCE, FIXED_TARGET, "negative_answer_loss", "target_best_wrong_logit"),
    group_by=("query_key",),
    pair_types=("support_value", "recency"),
    subspace_rank=3,
)
INTO, OUT = "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"
INTERVALS = [(3, 6), (6, 9), (9, 12)]


@pytest.fixture(scope="module")
def desk(
    trained_once: Path, diagnosed_once: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A working directory with the tiny run and scalar pair rows of three intervals."""
    folder = tmp_path_factory.mktemp("functional")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    shutil.copytree(diagnosed_once, folder / ROWS.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def study(desk: Path) -> Inputs:
    return open_inputs(load_config(RUN / "run_config.json", TrainConfig), PROBE)


@pytest.fixture(scope="module")
def report(study: Inputs) -> dict[str, Any]:
    """Its result, rows and group rows."""
    result = make(study.config, "report")
    return {
        "result": result,
        "rows": read_jsonl(result.rows[0]),
        "groups": read_jsonl(result.rows[1]),
    }


def make(config: TrainConfig, folder: str, **changes: Any) -> ReportResult:
    options = SubspaceOptions(**{**dict(OPTIONS), **changes})
    return run_report(FunctionalSubspace, config, options, folder)


def stage_gradient(
    model: HookedTransformer,
    tokens: Tensor,
    hook: str,
    held: Tensor,
    read: Callable[[Tensor], Tensor],
    position: int,
) -> Tensor:
    """Gradient of `read` with respect to one stage of one sequence, held at some value."""
    leaf = held.clone().requires_grad_()

    def replace(value: Tensor, hook: HookPoint) -> Tensor:
        return leaf

    logits = model.run_with_hooks(tokens, fwd_hooks=[(hook, replace)])[0, position]
    (gradient,) = torch.autograd.grad(read(logits), leaf)
    return gradient[0].double()


def reader(row: ScalarPairRow, end: str, scalar: str) -> Callable[[Tensor], Tensor]:
    """A scalar of one read's logits, straight from its definition."""
    competitor = {
        MOVING: getattr(row, f"{end}_competitor"),
        FIXED_SOURCE: row.source_competitor,
        FIXED_TARGET: row.target_competitor,
        "target_best_wrong_logit": row.target_competitor,
        "negative_answer_loss": row.answer,
    }[scalar]
    if scalar == "negative_answer_loss":
        return lambda logits: logits.log_softmax(-1)[row.answer]
    if scalar == "target_best_wrong_logit":
        return lambda logits: logits[competitor]
    return lambda logits: logits[row.answer] - logits[competitor]


def naive(
    model: HookedTransformer,
    batch: Examples,
    index: int,
    role: str,
    read: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """One pair: its five vectors `[position of the role, d_model]`, and the effect of ablation."""
    tokens = batch.tokens[batch.row[index]][None]
    at = int(batch.at[index])
    with torch.no_grad():
        logits, clean = model.run_with_cache(tokens)
        with ablate(model, "L0H1"):
            logits_without, without = model.run_with_cache(tokens)
    gradients = [stage_gradient(model, tokens, h, without[h], read, at) for h in (INTO, OUT)]
    into, total = ((clean[h].double() - without[h].double())[0] for h in (INTO, OUT))
    mine = batch.role(role)[index][: tokens.shape[1]]
    return {
        "delta_in": into[mine],
        "delta_mlp": (total - into)[mine],
        "delta_total": total[mine],
        "g_in": gradients[0][mine],
        "g_out": gradients[1][mine],
        "effect": read(logits[0, at]) - read(logits_without[0, at]),
    }


def naive_overlap(vectors: list[np.ndarray], basis_of: list[np.ndarray], index: int) -> float:
    centred = np.stack(basis_of) - np.mean(basis_of, 0)
    basis = np.linalg.svd(centred)[2][:3]
    own = vectors[index] / np.linalg.norm(vectors[index])
    return float(np.linalg.norm(basis @ own))


def test_rows_are_those_of_one_pair_at_a_time(
    report: dict[str, Any], study: Inputs, desk: Path
) -> None:
    """Plain runs of the model of each end, with the row's own competitor."""
    pairs = read_intervals(ROWS, pair_types=OPTIONS.pair_types, side="clean")
    batch = study.side(pairs.pairs(study), "clean")
    for number, (end, scalar) in enumerate(CHECKED):
        steps = INTERVALS[number % 3]
        step, interval = steps[ENDPOINTS.index(end)], pairs.by_steps[steps]
        (point,) = study.models([RUN / "checkpoints" / f"step_{step:06d}.pt"])
        for role in OPTIONS.position_roles:
            rows = [
                row
                for row in report["rows"]
                if (row["source_step"], row["target_step"]) == steps
                and (row["endpoint_role"], row["scalar"]) == (end, scalar)
                and row["position_role"] == role
            ]
            assert [row["pair_id"] for row in rows] == [row.pair_id for row in interval]
            assert {row["step"] for row in rows} == {step}
            expected = [
                naive(point.model, batch, i, role, reader(row, end, scalar))
                for i, row in enumerate(interval)
            ]
            means = {name: [one[name].mean(0).numpy() for one in expected] for name in expected[0]}
            for i, (row, one) in enumerate(zip(rows, expected, strict=True)):
                assert row["positions"] == len(one["g_in"])
                assert row["ablation_effect"] == pytest.approx(float(one["effect"]), abs=2e-5)
                for product, (g, delta) in PRODUCTS.items():
                    dot, size = (one[g] * one[delta]).sum(), one[g].norm() * one[delta].norm()
                    assert row[product] == pytest.approx(float(dot), abs=1e-5 * float(size) + 1e-9)
                    assert row[f"cosine_{product}"] == pytest.approx(float(dot / size), abs=1e-4)
                    for a, b in ((g, delta), (delta, g)):
                        overlap = naive_overlap(means[a], means[b], i)
                        assert row[f"overlap_{a}_on_{b}"] == pytest.approx(overlap, abs=1e-3)


CHECKED = (
    ("source", FIXED_TARGET),
    ("target", MOVING),
    ("source", "negative_answer_loss"),
    ("target", FIXED_SOURCE),
    ("source", "target_best_wrong_logit"),
)


def test_the_total_is_what_goes_past_the_mlp_and_through_it(report: dict[str, Any]) -> None:
    largest = max(abs(row["g_out_delta_total"]) for row in report["rows"])
    assert largest > 1e-3
    for row in report["rows"]:
        whole = row["g_out_delta_in"] + row["g_out_delta_mlp"]
        assert row["g_out_delta_total"] == pytest.approx(whole, abs=1e-9 * largest)
    assert report["result"].summary["closure_error"] < 1e-4
    assert any(abs(row["g_out_delta_mlp"]) > 1e-3 * largest for row in report["rows"])


def test_every_end_reads_with_its_competitor(report: dict[str, Any], desk: Path) -> None:
    pair_rows = {row.key: row for row in read_typed_rows(ROWS, ScalarPairRow)}
    assert {row["switched"] for row in report["rows"]} == {True, False}
    for row in report["rows"]:
        own = pair_rows[
            RowKey(row["source_step"], row["target_step"], row["pair_id"], row["record_side"])
        ]
        end = row["endpoint_role"]
        assert row["step"] == getattr(own, f"{end}_step")
        assert row["scalar_value"] == getattr(own, f"{end}_values")[row["scalar"]]
        expected = {
            MOVING: getattr(own, f"{end}_competitor"),
            FIXED_SOURCE: own.source_competitor,
            FIXED_TARGET: own.target_competitor,
            "target_best_wrong_logit": own.target_competitor,
        }
        assert row["competitor"] == expected.get(row["scalar"])


def test_an_end_that_two_intervals_share_reads_alike(report: dict[str, Any]) -> None:
    """The moving margin at a step is the same whether an interval begins or ends there."""
    of: dict[tuple[Any, ...], list[float]] = {}
    for row in report["rows"]:
        if row["scalar"] == MOVING:
            key = (row["step"], row["pair_id"], row["position_role"])
            of.setdefault(key, []).append(row["g_out_delta_total"])
    shared = [values for values in of.values() if len(values) == 2]
    assert len(shared) == 2 * len({pair for _, pair, _ in of}) * len(OPTIONS.position_roles)
    assert all(one == other for one, other in shared)


def test_groups_are_sums_and_means_of_their_pairs(report: dict[str, Any], study: Inputs) -> None:
    keys = {pair.pair_id: query_key(pair, study) for pair in study.pairs(PAIRS)}
    total = 0
    for group in report["groups"]:
        own = [
            row
            for row in report["rows"]
            if all(row[name] == group[name] for name in SAME)
            and group["group_token"] in (None, keys[row["pair_id"]])
        ]
        assert group["pairs"] == len(own) > 0
        for name in SUMMED:
            summed = sum(row[name] for row in own)
            assert group[f"sum_{name}"] == pytest.approx(summed, abs=1e-12)
        for name in SIZES:
            held = [row[name] for row in own if row[name] is not None]
            mean = pytest.approx(sum(held) / len(held)) if held else None
            assert group[f"mean_{name}"] == mean
        total += len(own) if group["group_by"] == "query_key" else 0
    assert total == len(report["rows"])
    assert {group["group_by"] for group in report["groups"]} == {"all", "query_key"}


PAIRS = PairOptions(pair_types=OPTIONS.pair_types, max_pairs_per_type=6, min_pairs_per_type=3)
SAME = ("source_step", "endpoint_role", "position_role", "scalar", "pair_type")


def query_key(pair: Pair, study: Inputs) -> str:
    read = program_of(pair.clean, study.vocabulary).reads[pair.read_index]
    return study.vocabulary.tokens[read.key]


def test_a_source_that_writes_nothing_is_read_as_nothing(study: Inputs, desk: Path) -> None:
    batch = study.side(study.pairs(PairOptions()), "clean")
    (point,) = study.models([RUN / "checkpoints" / "step_000012.pt"])
    readout = Readout(FIXED_SOURCE, tuple((batch.answer - 1).tolist()))
    path = WritePath.parse("L0H1", "L1MLP")
    roles = ("prediction", "support_write")
    before = measure(point.model, batch, path, roles, [readout], 3)
    assert min(abs(v or 0.0) for v in before.columns[readout, roles[0]]["ablation_effect"]) > 0
    with torch.no_grad():
        point.model.blocks[0].attn.W_O[1] = 0
    found = measure(point.model, batch, path, roles, [readout], 3)
    for (_, role), columns in found.columns.items():
        for name in (*SUMMED, "norm_delta_in", "norm_delta_mlp", "norm_delta_total"):
            assert not any(columns[name]), name
        for name in SIZES:
            if name.startswith(("cosine", "overlap")):
                assert columns[name] == [None] * len(batch), name
        # behind the last layer nothing but the prediction is read
        assert all(columns["norm_g_out"]) == (role == "prediction")
    assert found.gap == found.largest == 0


def test_every_scalar_role_type_and_end_has_its_chart(report: dict[str, Any]) -> None:
    drawn = {
        one.name: one
        for one in FunctionalSubspace.charts(read_report(report["result"].report).results)
    }
    roles, types = OPTIONS.position_roles, OPTIONS.pair_types
    assert len(drawn) == len(OPTIONS.scalars) * len(roles) * len(types) * len(ENDPOINTS)
    name = f"{MOVING}_prediction_recency_source"
    data = drawn[f"mlp_input_functional_subspace_{name}"].data[f"written_{name}"]
    expected = [
        row["mean_g_out_delta_total"]
        for row in report["result"].summary["means"]
        if (row["scalar"], row["position_role"], row["pair_type"], row["endpoint_role"])
        == (MOVING, "prediction", "recency", "source")
    ]
    assert [r["value"] for r in data if r["part"] == "mean_g_out_delta_total"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"component": "L0H0"}, "'L0H0' is a head"),
        ({"source_component": "L1H0"}, "'L1H0' does not write before 'L0MLP'"),
        ({"group_by": ("position_token",)}, "several positions"),
        ({"pair_types": ("distractor",)}, "no row of pair type 'distractor'"),
        ({"subspace_rank": 12}, "rank 12 of `subspace_rank`; expected 1 to 11"),
        ({"start_step": 7, "end_step": 11}, "steps 7 to 11; expected some of 3 -> 6"),
        (
            {"scalar_pair_rows": ROWS.with_name(ROWS.name.replace("_pair_rows", "_rows"))},
            "rows.jsonl:1: field 'source_digest'",
        ),
    ],
)
def test_what_the_rows_or_the_model_do_not_have_is_refused(
    study: Inputs, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CircuitError, match=re.escape(message)):
        make(study.config, "refused", **changes)
    assert not list(Path("refused").glob("*_report.*"))


def test_the_options_of_an_earlier_report_are_read() -> None:
    """Schema 1 called them otherwise."""
    earlier = {
        **{"probe_set": str(PROBE), "scalar_pair_rows": str(ROWS), "source": "L0H1"},
        **{"mlp": "L0MLP", "roles": ["prediction", "value_distractors"], "rank": 3},
        **{"scalars": OPTIONS.scalars, "endpoints": ENDPOINTS, "group_by": ["query_key"]},
        **{"pair_types": OPTIONS.pair_types, "side": "clean", "start_step": None},
    }
    assert SubspaceOptions.from_json(earlier, schema=1) == OPTIONS
