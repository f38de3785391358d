"""Direct logit attribution of the margin, against TransformerLens's own decomposition."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_run import RUN

from circuit.artifacts import read_jsonl
from circuit.model.readout import read_answers
from circuit.reports.path_logit_decomposition import DecompositionOptions, LogitDecomposition
from circuit.reports.report import run_report
from circuit.runs.opening import open_run

STEP = 12
OPTIONS = DecompositionOptions(
    probe_set=RUN / "analysis/probe_set.jsonl",
    checkpoints=(RUN / f"checkpoints/step_{STEP:06d}.pt",),
)


@pytest.fixture
def rows(trained: Path) -> pd.DataFrame:
    return rows_of(trained, OPTIONS)


def rows_of(run: Path, options: DecompositionOptions) -> pd.DataFrame:
    run_report(LogitDecomposition, open_run(run), options, "out", overwrite=True)
    return pd.DataFrame(read_jsonl(Path("out/path_logit_decomposition_rows.jsonl")))


def test_shares_are_those_of_transformer_lens(rows: pd.DataFrame, trained: Path) -> None:
    """`ActivationCache.logit_attrs` has the scale of `ln_final` frozen, too."""
    run = open_run(trained)
    report = LogitDecomposition(OPTIONS, run.config)
    report.check()
    report.prepare()
    batch, model = report.batch, run.model(STEP)
    logits = model(batch.tokens)
    rival = read_answers(
        logits[batch.row, batch.at], batch.answer, report.inputs.vocabulary.value_ids
    ).competitor
    folded = run.model(STEP, untied=True)  # TransformerLens's attribution wants ln_final.w in W_U
    folded.unembed.W_U.data.mul_(folded.ln_final.w[:, None])
    folded.set_use_attn_result(True)
    _, cache = folded.run_with_cache(batch.tokens)
    stack, labels = cache.decompose_resid(mode="mlp", return_labels=True)
    heads, head_labels = cache.stack_head_results(return_labels=True)
    names = {"embed": "embed", "pos_embed": "pos_embed"}
    names |= {f"{layer}_mlp_out": f"L{layer}MLP" for layer in range(model.cfg.n_layers)}
    mean = rows[rows["lag"] == "all"].set_index("part")["contribution"]
    for parts, part_labels in ((stack, labels), (heads, head_labels)):
        shares = torch.stack(
            [
                cache.logit_attrs(parts, tokens=answer, incorrect_tokens=other, has_batch_dim=True)[
                    :, row, place
                ]
                for row, place, answer, other in zip(
                    batch.row.tolist(),
                    batch.at.tolist(),
                    batch.answer.tolist(),
                    rival.tolist(),
                    strict=True,
                )
            ]
        ).mean(0)
        for label, share in zip(part_labels, shares.tolist(), strict=True):
            name = names.get(label, label)
            if name in mean:
                assert mean[name] == pytest.approx(share, abs=2e-5), name


def test_shares_sum_to_the_margin_in_every_group(rows: pd.DataFrame) -> None:
    for _, own in rows.groupby("lag"):
        assert own["contribution"].sum() == pytest.approx(own["margin"].iloc[0], abs=1e-5)
    counts = rows.groupby("lag")["reads"].first()
    assert counts.drop("all").sum() == counts["all"]


def test_against_the_mean_the_answer_is_held_against_all_values(trained: Path) -> None:
    options = OPTIONS.model_copy(update={"against": "mean"})
    mean = rows_of(trained, options).groupby("lag")["margin"].first()["all"]
    report = LogitDecomposition(options, open_run(trained).config)
    report.check()
    report.prepare()
    batch, values = report.batch, report.inputs.vocabulary.value_ids
    at = open_run(trained).model(STEP)(batch.tokens)[batch.row, batch.at].double()
    own = at.detach().gather(1, batch.answer[:, None])[:, 0] - at.detach()[:, list(values)].mean(1)
    assert mean == pytest.approx(own.mean().item(), abs=1e-5)
