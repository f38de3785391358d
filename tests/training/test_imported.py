"""Weights of another program become a run: by name, exactly, and without an invented past."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Done, type_and_read
from new_shapes import NEW_SHAPES
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.model.build import build_model
from circuit.model.shapes import expected_shapes
from circuit.reports.export import export_checkpoint
from circuit.runs.opening import open_run
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.probes import write_probe_set
from circuit.train_config import ImportedConfig, ModelConfig, TrainConfig
from circuit.training.checkpoints import (
    TrainState,
    encode_checkpoint,
    load_checkpoint,
    read_description,
)
from circuit.training.foreign import _as_float32, read_tensors
from circuit.training.imported import import_checkpoints, steps_of
from circuit.training.loop import train

Tensors = dict[str, Tensor]
LAYERS, HEADS, WIDTH, LENGTH = 2, 2, 8, 40


def theirs(vocabulary: int, seed: int = 0, **settings: Any) -> HookedTransformer:
    """A plain HookedTransformer with random weights everywhere, unembedding and biases too."""
    fields: dict[str, Any] = {"n_layers": LAYERS, "n_heads": HEADS, "d_model": HEADS * WIDTH}
    fields |= {"d_head": WIDTH, "d_mlp": 24, "n_ctx": LENGTH, "d_vocab": vocabulary}
    fields |= {"act_fn": "gelu", "normalization_type": "LN", "device": "cpu"}
    model = HookedTransformer(HookedTransformerConfig(**fields | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tied(model: HookedTransformer) -> Tensors:
    """Its tensors with the embedding as unembedding."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["unembed.W_U"] = tensors["embed.W_E"].T.contiguous()
    tensors["unembed.b_U"] = torch.zeros_like(tensors["unembed.b_U"])
    return tensors


def backwards(tensors: Tensors) -> Tensors:
    """The same by name, in another order."""
    return {name: tensors[name].contiguous() for name in sorted(tensors, reverse=True)}


def write(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def tokens_of(vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (3, 20), generator=torch.Generator().manual_seed(1))


def logits(model: HookedTransformer, tensors: Tensors, tokens: Tensor) -> Tensor:
    model.load_state_dict(tensors)
    with torch.no_grad():
        made: Tensor = model(tokens)
    return made


@pytest.mark.parametrize("fields", NEW_SHAPES.values(), ids=list(NEW_SHAPES))
def test_a_run_of_any_shape_is_exported_and_comes_back(
    workplace: Path,
    tiny: Benchmark,
    make_config: Callable[..., TrainConfig],
    fields: dict[str, Any],
) -> None:
    shape = {**make_config().model.model_dump(mode="json"), "layers": 2, **fields}
    config = make_config(model=shape, steps=3)
    train(config)
    ours = open_run("runs/tiny").model(3)
    assert list(expected_shapes(config.model, tiny.vocabulary.size)) == [
        name for name, _ in ours.named_parameters()
    ]
    result = export_checkpoint(config, "runs/tiny/checkpoints/step_000003.pt", "w")
    assert result.gap <= 1e-5 * result.largest
    back = import_checkpoints(["w/model.safetensors"], "data/tiny", "runs/back", steps=[3]).config
    for name in ("d_ff", "activation", "normalization", "tied_unembedding"):
        assert getattr(back.model, name) == getattr(config.model, name)
    assert {"act_fn", "normalization_type"}.isdisjoint(back.imported.assumed)
    tokens = tokens_of(tiny.vocabulary.size)
    with torch.no_grad():
        torch.testing.assert_close(open_run("runs/back").model(3)(tokens), ours(tokens))
    told = json.loads(Path("w/config.json").read_text())
    other = {"attn_only": not told["attn_only"], "act_fn": "gelu"}
    Path("w/config.json").write_text(json.dumps(told | other))
    with pytest.raises(CircuitError, match="and attn_only is"):
        import_checkpoints(["w/model.safetensors"], "data/tiny", "runs/other", steps=[3])
    Path("w/config.json").unlink()
    if config.model.normalization == "none":
        with pytest.raises(CircuitError, match="a model without normalization says so in a config"):
            import_checkpoints(["w/model.safetensors"], "data/tiny", "runs/other", steps=[3])


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_expected_names_and_shapes_are_the_models(is_tied: bool, layers: int) -> None:
    config = ModelConfig(
        layers=layers, heads=2, d_model=6, d_ff=5, max_sequence_length=4, tied_unembedding=is_tied
    )
    model = build_model(config, vocabulary_size=9, seed=0)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    found = expected_shapes(config, 9)
    assert list(found) == list(shapes)
    assert found == shapes


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_series_computes_what_its_files_do(
    workplace: Path, tiny: Benchmark, is_tied: bool
) -> None:
    """Names in any order, either format, wrapped or not, in half precision: equal logits."""
    size = tiny.vocabulary.size
    model, tokens = theirs(size), tokens_of(size)
    expected, folder = {}, workplace / "theirs"
    for step, name in ((0, "step_000000.safetensors"), (30, "checkpoint-30.pt"), (200, "200.pth")):
        random = theirs(size, seed=step)
        tensors = tied(random) if is_tied else dict(random.state_dict())
        if step == 200:
            tensors = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
            if is_tied:  # a file may leave the tied one out
                tensors = {n: t for n, t in tensors.items() if not n.startswith("unembed.")}
        write(folder / name, backwards(tensors))
        filled = {"unembed.W_U": tensors["embed.W_E"].T, "unembed.b_U": torch.zeros(size)} | tensors
        expected[step] = logits(model, filled, tokens)
    wrapped = {"epoch": 3, "model_state_dict": dict(torch.load(folder / "checkpoint-30.pt"))}
    renamed = {f"module.{n}": t for n, t in wrapped["model_state_dict"].items()}
    torch.save(wrapped | {"model_state_dict": renamed}, folder / "checkpoint-30.pt")

    result = import_checkpoints([folder], "data/tiny", "runs/theirs")
    assert result.config.model.tied_unembedding == is_tied
    run = open_run("runs/theirs")
    assert run.steps == [0, 30, 200]
    for step in run.steps:
        ours = run.model(step)
        assert ("unembed.W_U" in dict(ours.named_parameters())) != is_tied
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), expected[step], rtol=1e-5, atol=1e-5)


def test_biases_that_no_block_holds_are_zero_and_said_to_be(
    workplace: Path, tiny: Benchmark
) -> None:
    size = tiny.vocabulary.size
    model, tokens = theirs(size), tokens_of(size)
    whole = dict(model.state_dict())
    left = {n: t for n, t in whole.items() if not n.endswith((".b_Q", ".b_in", "unembed.b_U"))}
    write(Path("w/step_1.safetensors"), left)
    config = import_checkpoints(["w"], "data/tiny", "runs/theirs").config
    assert config.imported.zero == ["attn.b_Q", "mlp.b_in"]
    zeroed = {n: t if n in left else torch.zeros_like(t) for n, t in whole.items()}
    with torch.no_grad():
        found = open_run("runs/theirs").model(1)(tokens)
    torch.testing.assert_close(found, logits(model, zeroed, tokens), rtol=1e-5, atol=1e-5)


class Runs:
    """What unpickling would run."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def damage(tensors: Tensors, how: str) -> Any:
    """Content that is no model of this study in one way."""
    name = "blocks.1.attn.W_K"
    changed: dict[str, Any] = dict(tensors)
    if how == "missing":
        del changed[name]
    elif how == "unknown":
        changed["blocks.0.mlp.W_gate"] = torch.zeros(2)
    elif how == "shape":
        changed[name] = changed[name][:, :, :-1].clone()
    elif how == "one bias":
        del changed["blocks.1.attn.b_Q"]
    elif how == "rms":
        changed = {n: t for n, t in changed.items() if ".ln" not in n or not n.endswith(".b")}
    elif how == "no positions":
        del changed["pos_embed.W_pos"]
    elif how == "vocabulary":
        changed["embed.W_E"] = changed["embed.W_E"][:-1].clone()
    elif how == "width":
        changed["embed.W_E"] = changed["embed.W_E"][:, :-1].clone()
    elif how == "mask":
        changed["blocks.0.attn.mask"] = torch.ones(LENGTH, LENGTH).bool()
    elif how == "double":
        changed[name] = changed[name].double() + 1e-12
    elif how == "integers":
        changed[name] = changed[name].long()
    elif how == "nan":
        changed[name] = torch.full_like(changed[name], torch.nan)
    elif how == "expanded":
        changed[name] = torch.zeros(1).expand(10**6, 10**6)
    elif how == "code":
        changed["x"] = Runs()
    elif how == "whole object":
        return Runs()
    elif how == "list":
        return list(changed.values())
    else:
        assert how == "of this program"
        return {"parameters": changed, "exp_avg": changed}
    return changed


REFUSALS = [
    ("missing", "holds no blocks.1.attn.W_K; expected a HookedTransformer"),
    ("unknown", "holds the unknown blocks.0.mlp.W_gate"),
    ("shape", "blocks.1.attn.W_K has shape [2, 16, 7]; expected [2, 16, 8]"),
    ("one bias", "holds no blocks.1.attn.b_Q"),
    ("rms", "holds no blocks.0.ln1.b, blocks.0.ln2.b, blocks.1.ln1.b and 1 more"),
    ("no positions", "holds no pos_embed.W_pos"),
    ("vocabulary", "embed.W_E has shape [40, 16]; expected [41, 16], as the benchmark's 41 tokens"),
    ("width", "blocks.0.attn.W_Q has 2 heads of width 8; expected heads whose widths add up"),
    ("mask", "blocks.0.attn.mask is not causal over 40 positions"),
    ("double", "blocks.1.attn.W_K is torch.float64 and has no exact float32 form"),
    ("integers", "blocks.1.attn.W_K is torch.int64"),
    ("nan", "blocks.1.attn.W_K holds values that are not finite"),
    ("expanded", "blocks.1.attn.W_K is not stored in full"),
    ("code", "refused: it holds more than tensors"),
    ("whole object", "refused: it holds more than tensors"),
    ("list", "holds no state_dict: list; expected named tensors"),
    ("of this program", "is a checkpoint of this program"),
]


@pytest.mark.parametrize(("how", "said"), REFUSALS, ids=[how for how, _ in REFUSALS])
def test_what_is_no_model_of_this_study_is_refused_by_name(
    workplace: Path, tiny: Benchmark, how: str, said: str
) -> None:
    path = Path("w/step_1.pt")
    path.parent.mkdir()
    torch.save(damage(dict(theirs(tiny.vocabulary.size).state_dict()), how), path)
    with pytest.raises(CircuitError) as caught:
        import_checkpoints([path], "data/tiny", "runs/theirs")
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message
    assert "weights_only" not in message
    assert not Path("ran").exists()  # nothing in it was executed
    assert not Path("runs").exists()  # and nothing was written


def test_damaged_files_are_refused(workplace: Path, tiny: Benchmark) -> None:
    tensors = dict(theirs(tiny.vocabulary.size).state_dict())
    for name in ("step_1.pt", "step_1.safetensors"):
        path = write(Path("w") / name, tensors)
        whole = path.read_bytes()
        for part in (b"", b"\x80", whole[: len(whole) // 2], b"x" * 100):
            path.write_bytes(part)
            with pytest.raises(CircuitError, match=rf"^{path}: "):
                import_checkpoints([path], "data/tiny", "runs/theirs")
        path.unlink()


def test_steps_are_told_by_names_or_given() -> None:
    def steps(*names: str, given: list[int] | None = None) -> list[int]:
        return steps_of([Path(name) for name in names], given)

    assert steps("step_000100.safetensors", "checkpoint-7.pt", "model3.pth") == [100, 7, 3]
    assert steps("v2_step250_seed3.pt") == [250]
    assert steps("final.pt", "a.pt", given=[9, 0]) == [9, 0]
    for names, given, said in (
        (["final.pt"], None, "final.pt: its name tells no step"),
        (["v2_seed3.pt"], None, "tells several numbers: 2, 3"),
        (["a_1.pt", "b_1.pt"], None, "2 files of step 1: a_1.pt, b_1.pt"),
        (["a.pt", "b.pt"], [1], "1 steps for 2 files"),
    ):
        with pytest.raises(CircuitError, match=said):
            steps(*names, given=given)


def test_settings_beside_the_files_are_believed_or_refused(
    workplace: Path, tiny: Benchmark
) -> None:
    write(Path("w/step_1.pt"), dict(theirs(tiny.vocabulary.size).state_dict()))
    told = Path("w/config.json")
    told.write_text(json.dumps({"act_fn": "silu"}))
    said = r"w/config\.json: act_fn is 'silu'; expected 'gelu' or 'relu'"
    with pytest.raises(CircuitError, match=said):
        import_checkpoints(["w"], "data/tiny", "runs/theirs")
    told.write_text('{"act_fn": "relu",}')
    with pytest.raises(CircuitError, match=r"w/config\.json:1:19: not valid JSON .* move it away"):
        import_checkpoints(["w"], "data/tiny", "runs/theirs")
    told.write_text(json.dumps({"act_fn": "gelu", "eps": 1e-5}))
    config = import_checkpoints(["w"], "data/tiny", "runs/theirs").config
    assert list(config.imported.assumed) == [
        "attention_dir",
        "use_attn_scale",
        "positional_embedding_type",
    ]


@pytest.fixture
def imported(workplace: Path, tiny: Benchmark) -> Path:
    """The folder of an imported run with states 0, 100 and 200."""
    for step in (0, 100, 200):
        random = theirs(tiny.vocabulary.size, seed=step)
        write(Path(f"w/step_{step:06d}.safetensors"), dict(random.state_dict()))
    import_checkpoints(["w"], "data/tiny", "runs/theirs")
    write_probe_set("data/tiny", "probe.jsonl", ["validation_iid", "heldout_pairs"], 8)
    return Path("runs/theirs")


@pytest.fixture
def circuit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Types `circuit ...`."""

    def run(*words: str) -> Done:
        return type_and_read(words, capsys)

    return run


def test_an_imported_run_says_what_is_known_and_no_more(imported: Path) -> None:
    payload = json.loads((imported / "run_config.json").read_text())
    recipe = {"seed", "steps", "batch_size", "optimizer", "schedule", "gradient_clip", "best"}
    assert not recipe & payload.keys()
    assert not {"initialization", "embedding_std"} & payload["model"].keys()
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path("w").iterdir())
    ]
    assert [file["sha256"] for file in payload["imported"]["files"]] == digests
    config = load_config(imported / "run_config.json", TrainConfig)
    assert isinstance(config, ImportedConfig)
    assert config.replace(name="other").deciding() == config.deciding()
    for step in (0, 100, 200):
        path = imported / f"checkpoints/step_{step:06d}.pt"
        state = load_checkpoint(path)
        assert state.moments is None
        assert state.config == config
        assert encode_checkpoint(state) == path.read_bytes()
        description = read_description(path)
        assert description.moments == "absent"
        assert list(description.tensors) == ["parameters"]
    for field in ("seed", "optimizer", "batch_size"):
        with pytest.raises(CircuitError, match=f"'{field}' is not known: the run was trained else"):
            getattr(config, field)
    (imported / "run_config.json").write_text(json.dumps(payload | {"seed": 3}))
    with pytest.raises(CircuitError, match="'seed' belongs to a recipe"):
        open_run(imported)


def test_reports_work_on_it(imported: Path, circuit: Callable[..., Done]) -> None:
    config = ["--config", str(imported)]
    inputs = [*config, "--probe-set", "probe.jsonl"]
    folder = ["--checkpoint-dir", str(imported / "checkpoints")]
    pairs = ["--min-pairs-per-type", "1"]
    last = str(imported / "checkpoints/step_000200.pt")
    ends = ["--checkpoint", str(imported / "checkpoints/step_000100.pt"), "--checkpoint", last]
    for words in (
        ["evaluate", *config, "--checkpoint", last],
        ["weight-svd-trace", *config, *folder, "--output-dir", "o/svd"],
        ["bilinear-qk-match-separation", *inputs, *folder, "--output-dir", "o/qk"],
        ["ov-write-progress-report", *inputs, *folder, *pairs, "--output-dir", "o/ov"],
        ["answer-scalar-residual-diagnosis", *inputs, *ends, *pairs, "--output-dir", "o/answers"],
        ["page", str(imported)],
    ):
        done = circuit(*words, "--json")
        assert (done.code, done.err) == (0, ""), words


def test_what_would_take_a_step_is_refused_with_the_reason(
    imported: Path, circuit: Callable[..., Done]
) -> None:
    config = ["--config", str(imported)]
    state = str(imported / "checkpoints/step_000100.pt")
    before = sorted(p for p in Path().rglob("*") if p.is_file())
    for words in (
        ["train", *config, "--resume"],
        ["train", *config, "--overwrite"],
        ["train", *config, "--trace"],
        ["trace", "record", *config, "--from-initialization", "--end-step", "5"],
        ["trace", "record", *config, "--resume-checkpoint", state, "--num-steps", "5"],
    ):
        output = ["--output-dir", "o/trace"] if words[0] == "trace" else []
        done = circuit(*words, *output)
        assert done.code == 2, words
        assert done.err.startswith("error: config theirs: '")
        assert "is not known: the run was trained elsewhere and imported" in done.err
        assert done.err.count("\n") == 1
    assert sorted(p for p in Path().rglob("*") if p.is_file()) == before


def test_the_command_says_what_it_made(
    workplace: Path, tiny: Benchmark, circuit: Callable[..., Done]
) -> None:
    write(Path("w/final.safetensors"), backwards(tied(theirs(tiny.vocabulary.size))))
    words = ["import-checkpoints", "w", "--benchmark-dir", "data/tiny", "--output-dir", "runs/x"]
    refused = circuit(*words)
    assert refused.code == 2
    assert "final.safetensors: its name tells no step" in refused.err
    done = circuit(*words, "--step", "40")
    assert done.code == 0
    assert "2 layers, 2 heads of width 8, d_model 16, d_mlp 24, 40 positions; unembedding tied" in (
        done.out
    )
    assert "assumed, since weights do not tell it: act_fn gelu" in done.out
    again = circuit(*words, "--step", "40")
    assert "holds 2 files of an earlier `circuit import-checkpoints`" in again.err
    assert circuit(*words, "--step", "41", "--overwrite", "--json").payload["paths"] == [
        "runs/x/checkpoints/step_000041.pt",
        "runs/x/run_config.json",
    ]
    assert open_run("runs/x").steps == [41]


# --- what was written before stays what it was ----------------------------------------------------


def test_digests_and_checkpoints_of_other_runs_are_what_they_were() -> None:
    """Digests and a description that were computed before there were untied and imported runs."""
    known = {
        "quickstart": "ed095696987536f0bdde3ee86cf904febfc90656acda73810792577acf1ad273",
        "symbolic_kv_formation": "b8110d8ef7096e7f18db9ad0f39ee9927eeca965fa4e1c30c276a7854a16a0f7",
    }
    folder = Path(__file__).parents[2] / "configs/train"
    for name, digest in known.items():
        config = load_config(folder / f"{name}.json", TrainConfig)
        payload = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(payload.encode()).hexdigest() == digest
        assert "tied_unembedding" not in config.to_json()
    config = load_config(folder / "quickstart.json", TrainConfig)
    weights = {"W": torch.arange(6.0).view(2, 3), "b": torch.ones(3)}
    moments = {"exp_avg": weights, "exp_avg_sq": weights}
    state = TrainState(7, config, "0" * 64, weights, moments, {"best": {"step": 7}})
    made = encode_checkpoint(state)
    text = made[made.index(b'{"step": 7') : -56]  # the description, before the footer
    # which names the payload's digest, and that is torch's to change
    shortened = json.loads(text) | {"payload_bytes": 0, "payload_sha256": ""}
    digest = "898995f23804b93d13a96e3adf4e517a4301eac18996cce64193be77f57f40f2"
    assert hashlib.sha256(json.dumps(shortened, sort_keys=True).encode()).hexdigest() == digest
    untied = config.model.model_copy(update={"tied_unembedding": False})
    assert config.replace(model=untied).digest() != config.digest()


@pytest.mark.parametrize("order", [1, -1])
def test_weights_of_two_models_in_one_file_are_refused(
    tmp_path: Path, session_after: Callable[..., Any], order: int
) -> None:
    own = {name: tensor.detach() for name, tensor in session_after(0).model.named_parameters()}
    averaged = {f"ema.{name}": tensor + 1 for name, tensor in own.items()}
    for part in (own, dict(list(own.items())[:-1])):
        path = tmp_path / "two.pt"
        torch.save(dict([*averaged.items(), *part.items()][::order]), path)
        with pytest.raises(CircuitError, match=r"holds weights twice: |holds names both with"):
            read_tensors(path, path.read_bytes())


@pytest.mark.parametrize("odd", ["inf", "meta"])
def test_tensors_that_are_no_finite_numbers_are_refused(tmp_path: Path, odd: str) -> None:
    made = {
        "inf": torch.tensor([1.0, torch.inf]),
        "meta": torch.empty(2, device="meta"),
    }[odd]
    path = tmp_path / "odd.pt"
    torch.save({"embed.W_E": made}, path)
    with pytest.raises(CircuitError, match=r"embed.W_E (is no plain tensor|holds values)"):
        _as_float32("embed.W_E", read_tensors(path, path.read_bytes())["embed.W_E"], path)
