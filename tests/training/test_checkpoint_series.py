"""Series of checkpoints: Hugging Face folders, files, and what can be wrong with them."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from circuit.errors import CircuitError
from circuit.model.hugging_face import load_pretrained
from circuit.reports.report import run_report
from circuit.reports.series_scan import SeriesOptions, SeriesScan, matching, repeated
from circuit.scalars.base import evaluate_scalar
from circuit.training.series import CheckpointSeries

NEOX = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NEOX |= {"intermediate_size": 24, "max_position_embeddings": 16, "vocab_size": 20}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 20}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, Callable[[], Any]] = {
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
    "gpt-neox, one after the other": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**NEOX, use_parallel_residual=False)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2, of another width": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, n_inner=20)),
}


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def drifted(model: nn.Module, seed: int) -> None:
    """Some training: every step goes a random way."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_a_converted_model_has_the_logits_of_its_own(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    drifted(model, 1)
    save(model, tmp_path)
    tokens = torch.randint(0, 20, (3, 12))
    with torch.no_grad():
        theirs, ours = model(tokens).logits, load_pretrained(tmp_path)(tokens)
    assert float((theirs - ours).abs().max()) < 1e-5 * float(theirs.abs().max())


ODD: list[Any] = [None, 0, -1, 3, 1.5, 10**9, 10**40, "x", [], {}, True]


@pytest.mark.parametrize("kind", ["gpt-neox", "gpt2"])
def test_a_config_that_says_anything_is_read_or_refused_in_one_line(
    kind: str, tmp_path: Path
) -> None:
    """Sizes beyond the memory, too: they are refused before anything of them is made."""
    save(MODELS[kind](), tmp_path)
    path, rng = tmp_path / "config.json", random.Random(1)
    refusals: list[str] = []
    config = json.loads(path.read_text())
    for name in sorted(config):
        path.write_text(json.dumps({**config, name: rng.choice(ODD)}))
        try:
            load_pretrained(tmp_path)
        except CircuitError as error:
            refusals.append(str(error))
    assert len(refusals) >= len(config) / 4
    assert not [told for told in refusals if len(told.splitlines()) > 1]


def test_a_model_is_gone_before_the_next_one_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, as nothing in it refers to itself: of a series there is memory for two."""
    for step in range(3):
        save(MODELS["gpt-neox"](), tmp_path / f"series/step{step}")
    alive: list[weakref.ref[Any]] = []

    def load(folder: Path) -> Any:
        assert [model() for model in alive] == [None] * len(alive)
        model = load_pretrained(folder)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr("circuit.training.series.load_pretrained", load)
    gc.disable()
    try:
        asked = SeriesOptions(series=(tmp_path / "series",), strings=1, length=4)
        run_report(SeriesScan, None, asked, tmp_path / "out")
    finally:
        gc.enable()
    assert len(alive) == 3


def test_more_strings_than_memory_holds_are_refused_before_they_are_drawn(tmp_path: Path) -> None:
    save(MODELS["gpt2"](), tmp_path / "step1")
    asked = SeriesOptions(series=(tmp_path / "step1",), strings=10**9)
    with pytest.raises(CircuitError, match=r"would need .* reading strings \(strings, length\)"):
        run_report(SeriesScan, None, asked, tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = MODELS["gpt2"]()
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    save(model, tmp_path)
    with pytest.raises(CircuitError, match=r"transformer\.wte\.weight is not finite"):
        load_pretrained(tmp_path)


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (GPT2LMHeadModel, GPT2Config(**GPT2, activation_function="tanh"), "activation is tanh"),
        (GPTNeoXForCausalLM, GPTNeoXConfig(**NEOX, attention_bias=False), "attention_bias is Fa"),
        (GPTNeoXForCausalLM, GPTNeoXConfig(**NEOX, rope_parameters=SCALED), "rope_type is linear"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(
    model: Any, config: Any, message: str, tmp_path: Path
) -> None:
    save(model(config), tmp_path)
    with pytest.raises(CircuitError, match=rf"config\.json: {message}"):
        load_pretrained(tmp_path)


def test_a_weight_that_is_missing_is_not_drawn(tmp_path: Path) -> None:
    save(MODELS["gpt2"](), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CircuitError, match=r"holds no transformer\.h\.1\.mlp\.c_fc\.weight"):
        load_pretrained(tmp_path)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Pythia-like series in which step 3 is served for step 1, and 4 and 5 are exchanged."""
    folder = tmp_path_factory.mktemp("series")
    torch.manual_seed(0)
    model = MODELS["gpt-neox"]()
    for number, name in enumerate(("step0", "step1", "step2", "step3", "step5", "step4", "step6")):
        drifted(model, number)
        save(model, folder / name)
    (folder / "step1/model.safetensors").write_bytes(
        (folder / "step3/model.safetensors").read_bytes()
    )
    return folder


def test_a_scan_names_copies_and_steps_that_go_back(series: Path, tmp_path: Path) -> None:
    options = SeriesOptions(series=(series,), strings=2, length=6)
    result = run_report(SeriesScan, None, options, tmp_path / "scan")
    assert result.summary["steps"] == [0, 1, 2, 3, 4, 5, 6]
    assert result.summary["equal"] == [[1, 3]]
    assert result.summary["backwards"] == [[6, 4]]
    notes = " ".join(result.notes)
    assert "Steps 1, 3 have equal weights" in notes
    assert "may stand in the wrong place" in notes
    assert "7 checkpoints, 1 of them copies" in result.law


def test_a_series_in_order_is_not_complained_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["gpt2"]()
    for number in range(5):
        drifted(model, number)
        save(model, tmp_path / f"in/checkpoint-{10 * number}")
    options = SeriesOptions(series=(tmp_path / "in",), strings=2, length=6)
    result = run_report(SeriesScan, None, options, tmp_path / "scan")
    assert (result.summary["equal"], result.summary["backwards"]) == ([], [])
    assert result.summary["steps"] == [0, 10, 20, 30, 40]


def test_the_two_measures_are_what_they_say() -> None:
    """Against attention that looks at exactly one position."""
    tokens = repeated(20, 16, SeriesOptions(series=(Path("x"),), strings=3, length=5))
    assert tokens.shape == (3, 10)
    assert torch.equal(tokens[:, :5], tokens[:, 5:])
    assert all(len(set(row.tolist())) == 5 for row in tokens)
    prefix, previous = matching("L0H0", tokens)
    position = torch.arange(10)
    for scalar, distance in ((prefix, 4), (previous, 1)):
        pattern = torch.zeros(3, 1, 10, 10)
        pattern[:, 0, position, (position - distance).clamp_min(0)] = 1
        values = scalar.values(None, {scalar.hook: pattern})  # type: ignore[arg-type]
        assert bool((values == 1).all())
    # what the prefix is followed by, is what it is followed by again
    assert all(tokens[0, at - 4] == tokens[0, at + 1] for at in range(5, 9))


def test_files_of_weights_are_members_too(tmp_path: Path) -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = {"n_layers": 1, "d_model": 8, "n_ctx": 6, "d_head": 4, "n_heads": 2, "d_vocab": 9}
    model = HookedTransformer(HookedTransformerConfig(**shape, act_fn="gelu", d_mlp=16))
    state = {n: t.clone() for n, t in model.state_dict().items() if "mask" not in n}
    save_file(
        {n: t for n, t in state.items() if "IGNORE" not in n}, tmp_path / "step_7.safetensors"
    )
    ((step, ours),) = CheckpointSeries([tmp_path]).models()
    tokens = torch.randint(0, 9, (2, 6))
    assert step == 7
    torch.testing.assert_close(ours(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    scalar = matching("L0H1", repeated(9, 6, SeriesOptions(series=(Path("x"),))))[0]
    assert evaluate_scalar(scalar, ours).shape == (16 * 3,)


def test_checkpoints_of_two_models_are_no_series(tmp_path: Path) -> None:
    for step, name in enumerate(("gpt2", "gpt2, of another width"), 1):
        save(MODELS[name](), tmp_path / f"series/step{step}")
    asked = SeriesOptions(series=(tmp_path / "series",), strings=2)
    with pytest.raises(CircuitError, match=r"step2: .* has shape .*, as at step 1"):
        run_report(SeriesScan, None, asked, tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "config.json").write_text('{"architectures": ["Other"]}'),
            "expected GPT2LM",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 20), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no checkpoint"),
    ],
    ids=["another architecture", "damaged", "no weights"],
)
def test_what_is_no_member_is_refused(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    save(MODELS["gpt2"](), tmp_path / "step1")
    spoil(tmp_path / "step1")
    with pytest.raises(CircuitError, match=message):
        list(CheckpointSeries([tmp_path]).models())
