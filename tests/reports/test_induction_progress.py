"""Induction's progress: on the tiny run, its law with something broken, and its arithmetic."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_run import RUN

from circuit import CircuitError
from circuit.artifacts import read_jsonl
from circuit.reports import induction_progress
from circuit.reports.induction_progress import (
    PAIR_ROWS,
    POSITION_ROWS,
    InductionOptions,
    InductionProgress,
    half_step,
    in_context_score,
)
from circuit.reports.report import ReportResult, run_report
from circuit.runs.opening import open_run
from circuit.training import step


def made(**options: Any) -> ReportResult:
    asked = InductionOptions(
        probe_set=RUN / "analysis/probe_set.jsonl", checkpoint_dir=RUN / "checkpoints", **options
    )
    return run_report(InductionProgress, open_run(RUN), asked, "out", overwrite=True)


def test_intervals_are_over_whole_records(trained: Path) -> None:
    """One record has none; of many, draws of the records' own sums have these ends."""
    result = made()
    rows, ends = (
        list(read_jsonl(Path("out") / name))
        for name in ("induction_progress_rows.jsonl", "induction_progress_intervals.jsonl")
    )
    assert [(r["step"], r["head"]) for r in rows] == [(e["step"], e["head"]) for e in ends]
    run = open_run(trained)
    places = {"probe_set": RUN / "analysis/probe_set.jsonl", "checkpoint_dir": RUN / "checkpoints"}
    report = InductionProgress(InductionOptions(**places), run.config)
    report.check()
    report.prepare()
    batch = report.batch
    with torch.no_grad():
        _, cache = run.model(12).run_with_cache(batch.tokens)
    pattern = cache["blocks.0.attn.hook_pattern"][:, 0].double()
    found = pattern[batch.row, batch.at, batch.position("support_value")]
    sums, counts = (
        torch.zeros(len(batch.tokens), dtype=torch.float64).index_add(0, batch.row, of)
        for of in (found, torch.ones_like(found))
    )
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(len(sums), (20000, len(sums)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    (row,) = (e for e in ends if (e["step"], e["head"]) == (12, "L0H0"))
    for end, place in (("low", 0.025), ("high", 0.975)):
        own = float(means.quantile(place))
        assert row[f"prefix_matching_{end}"] == pytest.approx(own, abs=0.2 * float(means.std()))
    assert "bootstrap draws of whole records" in " ".join(result.notes)
    made(max_records=1)
    (one, *_) = read_jsonl(Path("out/induction_progress_intervals.jsonl"))
    assert one["prefix_matching_low"] is None


def gaps(law: str) -> list[float]:
    """The three numbers of the law: of attention, loss and composition."""
    return [float(number) for number in re.findall(r"to ([0-9.e+-]+),", law)]


def test_rows_are_those_of_the_models_own_attention_and_loss(trained: Path) -> None:
    result = made()
    heads, pairs, positions = (
        list(read_jsonl(Path("out") / name))
        for name in ("induction_progress_rows.jsonl", PAIR_ROWS, POSITION_ROWS)
    )
    run = open_run(trained)
    report = InductionProgress(
        InductionOptions(
            probe_set=RUN / "analysis/probe_set.jsonl",
            checkpoints=(RUN / "checkpoints/step_000012.pt",),
        ),
        run.config,
    )
    report.check()
    report.prepare()
    batch, model = report.batch, run.model(12)
    with torch.no_grad():
        logits, cache = model.run_with_cache(batch.tokens)
    for row in (row for row in heads if row["step"] == 12):
        layer, head = int(row["head"][1]), int(row["head"][3])
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, head].double()
        support = batch.position("support_value")
        matching = pattern[batch.row, batch.at, support].mean()
        back = [
            float(pattern[one, place, place - 1])
            for one, length in enumerate(batch.lengths.tolist())
            for place in range(1, length - 1)
        ]
        assert row["prefix_matching"] == pytest.approx(float(matching), rel=1e-5)
        assert row["previous_token_attention"] == pytest.approx(sum(back) / len(back), rel=1e-5)
    last = {row["position"]: row for row in positions if row["step"] == 12}
    real = batch.lengths > 5
    own = -logits.double().log_softmax(-1)[real, 4].gather(1, batch.tokens[real, 5][:, None])
    assert last[5]["tokens"] == len(own)
    assert last[5]["loss"] == pytest.approx(float(own.mean()), rel=1e-6)
    assert {(row["earlier"][1], row["later"][1]) for row in pairs} == {("0", "1")}
    assert max(gaps(result.law)) < 1e-5


@pytest.mark.parametrize(
    ("module", "broken", "place"),
    [(step, "next_token_loss", 1), (induction_progress, "composition_by_qr", 2)],
)
def test_the_law_tells_what_is_broken(
    trained: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, broken: str, place: int
) -> None:
    whole = getattr(module, broken)
    monkeypatch.setattr(module, broken, lambda *given: whole(*given) * 1.01)
    assert [gap > 1e-4 for gap in gaps(made().law)] == [one == place for one in range(3)]


def test_roles_of_the_task_are_taken_and_others_refused(trained: Path) -> None:
    assert made(support_key_role="support_key", heads=("L1H0",)).summary["reads"] > 0
    with pytest.raises(CircuitError, match="`support_key_role`: unknown role 'first'"):
        made(support_key_role="first")


def test_the_half_step_is_the_last_crossing() -> None:
    assert half_step({0: 0.0, 1: 0.6, 2: 0.4, 3: 0.5, 4: 1.0}) == 3
    assert half_step({0: 3.0, 1: 1.0, 2: 1.0}, -1) == 1
    assert half_step({0: 1.0, 1: 0.0}) is None
    assert half_step({0: 1.0}) is None
    assert half_step({0: None, 1: 1.0}) is None


def test_the_score_is_of_the_second_half_against_the_first() -> None:
    """Of eight tokens the predicted ones at 4 to 7 against those at 1 to 3."""
    sums = torch.tensor([1.0, 2, 3, 8, 8, 8, 8])
    assert in_context_score(sums, torch.ones(7)) == pytest.approx(8 - 2)
    counts = torch.tensor([0.0, 0, 0, 1, 1, 1, 1])
    assert in_context_score(sums, counts) is None
