"""A model of ours goes through TransformerLens's own tools, in memory and as exported files."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import type_and_read
from torch import Tensor
from transformer_lens import (
    ActivationCache,
    FactoredMatrix,
    HookedTransformer,
    SVDInterpreter,
    patching,
)
from transformer_lens.components import Attention, LayerNorm, TransformerBlock, Unembed
from warm import warm_python

from circuit.model.build import build_model
from circuit.model.standard import standard_model
from circuit.runs.opening import open_run
from circuit.train_config import ModelConfig, TrainConfig
from circuit.training.loop import train

VOCABULARY, LAYERS, HEADS, LENGTH = 23, 2, 2, 10
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def some_model(kernels: str = "fast", tied: bool = True) -> HookedTransformer:
    config = ModelConfig(
        layers=LAYERS,
        heads=HEADS,
        d_model=16,
        d_ff=24,
        max_sequence_length=LENGTH,
        tied_unembedding=tied,
    )
    made = build_model(config, vocabulary_size=VOCABULARY, seed=3, kernels=kernels)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():  # no bias and no LayerNorm weight at rest
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture
def model() -> HookedTransformer:
    return standard_model(some_model())


def some_tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (4, LENGTH), generator=generator)


def read(model: HookedTransformer, seed: int = 0) -> tuple[Tensor, ActivationCache]:
    with torch.no_grad():
        logits, cache = model.run_with_cache(some_tokens(seed))
    return logits, cache


@pytest.mark.parametrize("kernels", ["plain", "fast"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_standard_model_is_the_same_function_in_plain_classes(kernels: str, tied: bool) -> None:
    ours = some_model(kernels, tied)
    standard = standard_model(ours)
    close(standard(some_tokens()), ours(some_tokens()))
    kinds = {type(module) for module in standard.modules()}
    assert {Unembed, Attention, LayerNorm, TransformerBlock} <= kinds
    assert not [kind for kind in kinds if kind.__module__.startswith("circuit")]
    assert torch.equal(standard.unembed.W_U, ours.W_U)
    assert {"unembed.W_U", "unembed.b_U"} <= dict(standard.named_parameters()).keys()
    with torch.no_grad():  # a copy: nothing of ours moves with it
        before = ours(some_tokens())
        for parameter in standard.parameters():
            parameter.zero_()
        assert torch.equal(ours(some_tokens()), before)


@pytest.mark.parametrize("tied", [True, False])
def test_decompositions_sum_to_what_they_decompose(tied: bool) -> None:
    """Of our own model as it is, and of the standard one."""
    ours = some_model(tied=tied)
    for model in (ours, standard_model(ours)):
        logits, cache = read(model)
        parts, labels = cache.decompose_resid(return_labels=True)
        assert labels[:2] == ["embed", "pos_embed"]
        close(parts.sum(0), cache["resid_post", LAYERS - 1])
        accumulated = cache.accumulated_resid(incl_mid=True)
        close(accumulated[-1], cache["resid_post", LAYERS - 1])
        heads = cache.stack_head_results(layer=LAYERS)
        assert heads.shape[0] == LAYERS * HEADS

        answers, wrong = some_tokens(seed=1)[:, -1], some_tokens(seed=2)[:, -1]
        rows = torch.arange(len(answers))
        actual = logits[rows, -1, answers] - logits[rows, -1, wrong]
        # the pieces are all but what ln_final's bias and b_U write
        directions = model.W_U[:, answers] - model.W_U[:, wrong]
        constant = model.ln_final.b @ directions + model.b_U[answers] - model.b_U[wrong]
        # logit_attrs scales by ln_final, and leaves its weight to fold_ln
        folded = copy.deepcopy(standard_model(model))
        folded.process_weights_(center_writing_weights=False, center_unembed=False)
        _, plain = read(folded)
        pieces = plain.decompose_resid(layer=-1, mode="all", pos_slice=-1, return_labels=False)
        told = plain.logit_attrs(pieces, tokens=answers, incorrect_tokens=wrong, pos_slice=-1)
        close(told.sum(0) + constant, actual)


def test_patching_sweeps_restore_the_clean_answer_where_everything_is_patched() -> None:
    """At the last position of the last block's residual stream stands the whole answer."""
    ours = some_model()
    for model in (ours, standard_model(ours)):
        clean, cache = read(model, seed=0)
        corrupted = some_tokens(seed=1)

        def metric(logits: Tensor, clean: Tensor = clean) -> Tensor:
            return logits[:, -1, 3].mean() - clean[:, -1, 3].mean()

        sweep = patching.get_act_patch_resid_pre(model, corrupted, cache, metric)
        assert sweep.shape == (LAYERS, LENGTH)
        with torch.no_grad():
            untouched = float(metric(model(corrupted)))
        assert abs(untouched) > 0.01
        heads = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, metric)
        assert heads.shape == (LAYERS, HEADS)
        assert (heads - untouched).abs().max() > 1e-3
        blocks = patching.get_act_patch_block_every(model, corrupted, cache, metric)
        assert blocks.shape == (3, LAYERS, LENGTH)
        with torch.no_grad():
            patched = model.run_with_hooks(
                corrupted,
                fwd_hooks=[
                    (
                        f"blocks.{LAYERS - 1}.hook_resid_post",
                        lambda x, hook, cache=cache: cache[hook.name],
                    )
                ],
            )
        close(metric(patched), torch.tensor(0.0))


def test_factored_matrices_are_the_heads_circuits(model: HookedTransformer) -> None:
    ov, qk = model.OV[1, 0], model.QK[1, 0]
    for found, left, right in (
        (ov, model.W_V[1, 0], model.W_O[1, 0]),
        (qk, model.W_Q[1, 0], model.W_K[1, 0].T),
    ):
        assert isinstance(found, FactoredMatrix)
        close(found.AB, left @ right)
        close(found.svd()[1], torch.linalg.svdvals(left @ right)[: found.mdim])
    full = model.embed.W_E @ ov @ model.unembed.W_U
    assert full.shape == (VOCABULARY, VOCABULARY)
    assert model.all_composition_scores("Q").shape == (LAYERS, HEADS, LAYERS, HEADS)


def test_processed_weights_give_the_same_probabilities(model: HookedTransformer) -> None:
    """fold_ln, centred writing weights and unembedding: they change no probability."""
    before = model(some_tokens()).log_softmax(-1)
    embedding = model.embed.W_E.clone()
    model.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    close(model(some_tokens()).log_softmax(-1), before)
    assert not torch.equal(model.embed.W_E, embedding)
    close(model.unembed.W_U.mean(-1), torch.zeros(16))


def test_singular_vectors_are_read_through_the_unembedding(model: HookedTransformer) -> None:
    interpreter = SVDInterpreter(model)
    for kind in ("OV", "w_in", "w_out"):
        vectors = interpreter.get_singular_vectors(kind, layer_index=1, head_index=0, num_vectors=3)
        assert vectors.shape == (VOCABULARY, 1, 3)
    # the first of OV is the right singular vector, in logits
    expected = torch.linalg.svd(model.OV[1, 0].AB)[2][0] @ model.unembed.W_U
    found = interpreter.get_singular_vectors("OV", layer_index=1, head_index=0, num_vectors=1)[
        :, 0, 0
    ]
    close(found.abs(), expected.abs())


def test_generation_is_greedy_argmax() -> None:
    """Without the cache: with one, TransformerLens 3.9 takes a position from the tokenizer's mask,
    and a wrong one where there is no tokenizer, of any HookedTransformer."""
    ours = some_model()
    prompt = some_tokens()[:, :4]
    for model in (ours, standard_model(ours)):
        expected = prompt
        for _ in range(5):
            best = model(expected)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, best], dim=1)
        found = model.generate(
            prompt,
            max_new_tokens=5,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=False,
            verbose=False,
        )
        assert torch.equal(found, expected)


def test_copies_and_state_dicts_go_there_and_back(model: HookedTransformer) -> None:
    expected = model(some_tokens())
    clone = copy.deepcopy(model)
    assert torch.equal(clone(some_tokens()), expected)
    with torch.no_grad():
        clone.unembed.W_U.zero_()
    assert torch.equal(model(some_tokens()), expected)
    clone.load_state_dict(model.state_dict())
    assert torch.equal(clone(some_tokens()), expected)
    ours = some_model()
    again = some_model("plain")
    with torch.no_grad():
        again.embed.W_E.zero_()
    again.load_state_dict(ours.state_dict())  # a tied model's holds no unembedding
    close(again(some_tokens()), ours(some_tokens()))


# --- a run's models -------------------------------------------------------------------------------

LOADING = """
import sys, torch
for name in [one for one in sys.modules if one.partition(".")[0] == "circuit"]:
    del sys.modules[name]
sys.modules["circuit"] = None  # to import it is an error now
{lines}
torch.save(model(torch.load("tokens.pt")), "logits.pt")
"""


def test_an_exported_model_is_loaded_in_three_lines_without_this_program(
    workplace: Path,
    make_config: Callable[..., TrainConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(make_config(steps=2, checkpoint_every=2, eval_every=2))
    run = open_run("runs/tiny")
    tokens = run.batch("validation_iid").tokens
    with torch.no_grad():
        expected = run.model(2)(tokens)
        close(run.model(2, untied=True)(tokens), expected)
    words = ["export", "--config", "runs/tiny", "--output-dir", "out"]
    words += ["--checkpoint", "runs/tiny/checkpoints/step_000002.pt"]
    done = type_and_read([*words, "--json"], capsys)
    assert (done.code, done.err) == (0, "")
    assert done.payload["gap"] < 1e-4
    assert len(done.payload["load"]) == 1 + 3  # the imports first
    assert json.loads(Path("out/config.json").read_text())["act_fn"] == "gelu"
    torch.save(tokens, "tokens.pt")
    script = LOADING.format(lines="\n".join(done.payload["load"]))
    with warm_python() as python:
        subprocess.run([python, "-c", script], check=True, capture_output=True)
    close(torch.load("logits.pt"), expected)
    again = type_and_read(words, capsys)
    assert again.code == 2
    assert "holds 2 files of an earlier `circuit export`" in again.err
    # and it comes back as a run, tied as it was
    words = ["import-checkpoints", "out", "--step", "2", "--benchmark-dir", "data/tiny"]
    assert type_and_read([*words, "--output-dir", "runs/back"], capsys).code == 0
    back = open_run("runs/back")
    assert back.config.model.tied_unembedding
    saved = run.state(2).parameters
    assert all(torch.equal(t, saved[n]) for n, t in back.state(2).parameters.items())


def test_an_untied_model_trains_resumes_and_replays_like_any(
    workplace: Path, make_config: Callable[..., TrainConfig]
) -> None:
    from circuit.trace.record import RecordOptions, record_trace

    config = make_config(steps=4, checkpoint_every=2, eval_every=4)
    config = config.replace(model=config.model.model_copy(update={"tied_unembedding": False}))
    train(config, stop_at=2)
    assert train(config, resume=True).step == 4
    options = RecordOptions(end_step=4, require_historical_replay=True)
    assert record_trace(config, "trace", options).history == [2, 4]
