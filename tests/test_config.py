"""Configs: every mistake is refused by its path in the file, and the shipped files are right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit.config import load_config, parse_config
from circuit.errors import CircuitError
from circuit.tasks.registry import find_task, load_benchmark_config
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.train_config import TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"
TRAIN_FILES = sorted((CONFIGS / "train").rglob("*.json"))
BENCHMARK_FILES = sorted((CONFIGS / "benchmark").rglob("*.json"))
ABLATION_FILES = [path for path in TRAIN_FILES if "optimizer_ablation" in path.parts]

FULL_TRAIN: dict[str, Any] = {
    "name": "full",
    "output_dir": "runs/full",
    "benchmark_dir": "data/full",
    "seed": 1,
    "device": "cpu",
    "threads": 1,
    "kernels": "fast",
    "model": {
        "layers": 1,
        "heads": 2,
        "d_model": 16,
        "d_ff": 32,
        "max_sequence_length": 40,
        "dropout": 0.0,
        "initialization": "pytorch_default",
        "embedding_std": 0.5,
    },
    "steps": 10,
    "batch_size": 8,
    "train_split": "train",
    "optimizer": {
        "name": "adamw",
        "learning_rate": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
    },
    "schedule": {"name": "cosine", "warmup_steps": 2, "floor": 0.1},
    "gradient_clip": 1.0,
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "tracked_splits": ["validation_iid"],
    "best": {"split": "validation_iid", "metric": "answer_accuracy"},
}
FULL_BENCHMARK: dict[str, Any] = {
    "name": "full",
    "benchmark_type": "symbolic_kv_stream",
    "output_dir": "data/full",
    "seed": 1,
    "num_keys": 4,
    "num_values": 32,
    "holdout_answer_pair_fraction": 0.1,
    "heuristic_max_accuracy": 0.5,
    "lag_sampling": "eligible",
    "splits": {
        "train": {
            "samples": 4,
            "active_keys": {"min": 2, "max": 3},
            "overwrite_count": {"min": 3, "max": 4},
            "num_queries": {"min": 1, "max": 2},
            "query_lag": {"min": 1, "max": 2},
            "answer_pairs": "seen",
        },
        "counterfactual": {"samples": 2, "counterfactual_of": "train"},
    },
}
KINDS: list[tuple[type[Any], dict[str, Any]]] = [
    (TrainConfig, FULL_TRAIN),
    (BenchmarkConfig, FULL_BENCHMARK),
]
OPTIONAL = {
    "device",
    "threads",
    "kernels",
    "model.dropout",
    "model.initialization",
    "model.embedding_std",
    "train_split",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.eps",
    "optimizer.weight_decay",
    "schedule",
    "schedule.name",
    "schedule.warmup_steps",
    "schedule.floor",
    "gradient_clip",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "tracked_splits",
    "best",
    "best.metric",
    "lag_sampling",
    "splits.train.answer_pairs",
    "splits.counterfactual",
}


def paths(payload: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field of a payload, objects included."""
    for key, value in payload.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


def holder(payload: Any, path: tuple[str, ...]) -> Any:
    for key in path[:-1]:
        payload = payload[key]
    return payload


def edited(payload: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(payload)
    holder(made, path)[path[-1]] = value
    return made


def refusal(payload: Any, kind: type[Any]) -> str:
    with pytest.raises(CircuitError) as caught:
        parse_config(payload, kind, where="configs/x.json")
    message = str(caught.value)
    assert message.startswith("configs/x.json: ")
    assert "\n" not in message
    return message


@st.composite
def fields(draw: st.DrawFn) -> tuple[type[Any], dict[str, Any], tuple[str, ...]]:
    kind, payload = draw(st.sampled_from(KINDS))
    return kind, payload, draw(st.sampled_from(list(paths(payload))))


@pytest.mark.parametrize(("kind", "payload"), KINDS)
def test_a_full_config_is_accepted_and_survives_being_written(
    kind: type[Any], payload: dict[str, Any]
) -> None:
    config = parse_config(payload, kind, where="test")
    assert config.model_dump(mode="json") == payload
    assert parse_config(json.loads(config.to_json()), kind, where="test") == config
    assert parse_config(dict(reversed(payload.items())), kind, where="test").digest() == (
        config.digest()
    )


@given(field=fields(), name=st.from_regex(r"[a-z]{3,8}_x", fullmatch=True))
def test_an_unknown_key_is_named_by_its_path(field: Any, name: str) -> None:
    kind, payload, path = field
    place = path[:-1]
    message = refusal(edited(payload, (*place, name), 1), kind)
    if place == ("splits",):
        assert f"splits.{name}" in message  # any name of a split is fine, its content is not
    else:
        assert f"unknown field '{'.'.join((*place, name))}'" in message


@given(field=fields())
def test_a_missing_field_is_named_unless_it_is_optional(field: Any) -> None:
    kind, payload, path = field
    made = copy.deepcopy(payload)
    del holder(made, path)[path[-1]]
    dotted = ".".join(path)
    if dotted in OPTIONAL:
        if dotted not in ("best", "tracked_splits"):  # one's default is no match for the other
            parse_config(made, kind, where="test")
        return
    message = refusal(made, kind)
    if dotted == "optimizer.name":
        assert "'optimizer'" in message
        assert "'name'" in message
    elif dotted == "splits.train":
        assert "counterfactual_of names 'train'" in message
    elif dotted == "splits.counterfactual.counterfactual_of":
        assert "missing field 'splits.counterfactual.active_keys'" in message
    else:
        assert f"missing field '{dotted}'" in message


@given(field=fields().filter(lambda f: f[2] != ("splits", "counterfactual")))
def test_a_value_of_the_wrong_type_is_named_by_its_path(field: Any) -> None:
    kind, payload, path = field
    present = holder(payload, path)[path[-1]]
    wrong: Any = "7" if isinstance(present, bool | int | float) else 7
    message = refusal(edited(payload, path, wrong), kind)
    dotted = "optimizer" if path == ("optimizer", "name") else ".".join(path)
    assert f"'{dotted}'" in message or f"'{dotted}." in message
    assert json.dumps(wrong) in message or "'7'" in message


def test_a_list_item_is_named_by_its_place() -> None:
    message = refusal(edited(FULL_TRAIN, ("tracked_splits",), ["validation_iid", 3]), TrainConfig)
    assert "field 'tracked_splits.1'" in message
    assert "got 3" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("steps", 0),
        ("steps", 1.0),
        ("steps", True),
        ("batch_size", 0),
        ("device", "tpu"),
        ("threads", 0),
        ("model.layers", 0),
        ("model.d_model", 0),
        ("model.max_sequence_length", 1),
        ("model.dropout", 0.1),
        ("model.initialization", "xavier"),
        ("model.embedding_std", 0.0),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", float("inf")),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.beta1", 1.0),
        ("optimizer.beta2", -0.1),
        ("optimizer.eps", 0.0),
        ("optimizer.weight_decay", -1.0),
        ("schedule.name", "step"),
        ("schedule.warmup_steps", -1),
        ("schedule.floor", 1.5),
        ("gradient_clip", 0.0),
        ("gradient_clip", float("inf")),
        ("log_every", 0),
        ("eval_every", 0),
        ("checkpoint_every", 0),
        ("best.metric", "loss"),
    ],
)
def test_a_training_value_out_of_range_is_named_with_what_was_given(path: str, value: Any) -> None:
    message = refusal(edited(FULL_TRAIN, tuple(path.split(".")), value), TrainConfig)
    assert f"field '{path}'" in message
    assert f"got {json.dumps(value)}" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("benchmark_type", "copy"),
        ("num_keys", 1),
        ("num_values", 1),
        ("holdout_answer_pair_fraction", 0.0),
        ("holdout_answer_pair_fraction", 1.0),
        ("heuristic_max_accuracy", 1.1),
        ("lag_sampling", "normal"),
        ("splits.train.samples", 0),
        ("splits.train.query_lag.min", -1),
        ("splits.train.answer_pairs", "both"),
        ("splits.counterfactual.samples", 0),
    ],
)
def test_a_benchmark_value_out_of_range_is_named_with_what_was_given(path: str, value: Any) -> None:
    message = refusal(edited(FULL_BENCHMARK, tuple(path.split(".")), value), BenchmarkConfig)
    assert f"field '{path}'" in message
    assert f"got {json.dumps(value)}" in message


@pytest.mark.parametrize(
    ("kind", "payload", "changes", "said"),
    [
        (TrainConfig, FULL_TRAIN, {"model.heads": 3}, "d_model 16 is not a multiple of heads 3"),
        (TrainConfig, FULL_TRAIN, {"best.split": "test"}, "best.split 'test' is not among"),
        (TrainConfig, FULL_TRAIN, {"steps": 1}, "schedule.warmup_steps 2 exceeds steps 1"),
        (
            BenchmarkConfig,
            FULL_BENCHMARK,
            {"splits.train.query_lag.min": 3},
            "splits.train.query_lag': min 3 is larger than max 2",
        ),
        (
            BenchmarkConfig,
            FULL_BENCHMARK,
            {"splits.counterfactual.samples": 5},
            "splits.counterfactual.samples is 5, more than the 4",
        ),
        (
            BenchmarkConfig,
            FULL_BENCHMARK,
            {"splits.counterfactual.counterfactual_of": "counterfactual"},
            "splits.counterfactual.counterfactual_of names 'counterfactual'",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    kind: type[Any], payload: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    for path, value in changes.items():
        payload = edited(payload, tuple(path.split(".")), value)
    assert said in refusal(payload, kind)


def test_many_mistakes_are_counted() -> None:
    payload = {**FULL_TRAIN, "aa": 1, "bb": 1, "cc": 1, "dd": 1, "ee": 1}
    assert "(+2 more)" in refusal(payload, TrainConfig)


def test_bad_json_is_refused_with_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{\n  "name": "x",\n  "seed": }\n', encoding="utf-8")
    with pytest.raises(CircuitError, match=r"x\.json:3:11: not valid JSON"):
        load_config(path, TrainConfig)


@pytest.mark.parametrize("payload", [b"", b"\xff\xfe", b"[]", b"null", b"3"])
def test_files_that_hold_no_config_are_refused(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(payload)
    with pytest.raises(CircuitError, match=r"x\.json"):
        load_config(path, TrainConfig)


def test_a_missing_file_and_a_folder_are_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match=r"none\.json: no such config file"):
        load_config(tmp_path / "none.json", TrainConfig)
    with pytest.raises(CircuitError, match=r"holds no run_config\.json; expected .*a config file"):
        load_config(tmp_path, TrainConfig)


@pytest.mark.parametrize("path", TRAIN_FILES, ids=lambda path: path.stem)
def test_shipped_training_configs_load_and_name_their_folder_at_the_top(path: Path) -> None:
    config = load_config(path, TrainConfig)
    payload = json.loads(path.read_text(encoding="utf-8"))
    assert payload["output_dir"] == config.output_dir  # the contract reads it with jq
    benchmarks = {one.output_dir: one for one in map(load_benchmark_config, BENCHMARK_FILES)}
    benchmark = benchmarks[config.benchmark_dir]
    task = find_task(benchmark.benchmark_type)(benchmark)
    assert {config.train_split, *config.tracked_splits} <= {*task.split_names, *task.streams}


def test_formation_and_generalization_carry_the_contracts_values() -> None:
    formation, generalization = (
        load_config(CONFIGS / "train" / f"symbolic_kv_{name}.json", TrainConfig)
        for name in ("formation", "generalization")
    )
    assert formation.deciding() == generalization.deciding()
    assert formation.name == "symbolic_kv_reference_formation"
    assert generalization.name == "symbolic_kv_heldout_generalization"
    for config in (formation, generalization):
        assert config.output_dir == f"artifacts/runs/{config.name}"
        assert config.benchmark_dir == "data/generated/symbolic_kv_stream_learnability"
        assert config.steps == 16000
    assert formation.checkpoint_every == 250 < generalization.checkpoint_every
    recipe = formation.deciding()
    assert recipe["seed"] == 7
    assert recipe["batch_size"] == 128
    assert recipe["gradient_clip"] == 1.0
    assert recipe["model"] == {
        "layers": 3,
        "heads": 4,
        "d_model": 128,
        "d_ff": 512,
        "max_sequence_length": 96,
        "dropout": 0.0,
        "initialization": "pytorch_default",
        "embedding_std": None,
    }
    optimizer = recipe["optimizer"]
    assert optimizer["name"] == "adamw"
    assert optimizer["learning_rate"] == 0.0004
    assert (optimizer["beta1"], optimizer["beta2"]) == (0.9, 0.95)
    assert optimizer["weight_decay"] == 0.01
    assert recipe["schedule"] == {"name": "constant", "warmup_steps": 200, "floor": 0.0}


def test_the_base_benchmark_carries_the_contracts_values() -> None:
    config = load_config(CONFIGS / "benchmark" / "symbolic_kv_base.json", BenchmarkConfig)
    assert config.output_dir == "data/generated/symbolic_kv_stream_learnability"
    assert (config.seed, config.num_keys, config.num_values) == (7, 8, 128)
    assert config.holdout_answer_pair_fraction == 0.1
    assert config.lag_sampling == "eligible"
    train = config.model_dump()["splits"]["train"]
    assert train["samples"] == 8000
    assert train["active_keys"] == {"min": 2, "max": 3}
    assert train["overwrite_count"] == {"min": 8, "max": 8}
    assert train["num_queries"] == {"min": 6, "max": 7}
    for name in ("validation_iid", "test_iid", "heldout_pairs"):
        assert config.splits[name].samples == 1024


def test_the_fifteen_ablation_runs_differ_in_optimizer_and_folder_only() -> None:
    configs = [load_config(path, TrainConfig) for path in ABLATION_FILES]
    assert len(configs) == 15
    assert len({config.output_dir for config in configs}) == 15
    assert len({config.name for config in configs}) == 15
    assert len({config.optimizer.model_dump_json() for config in configs}) == 15
    formation = load_config(CONFIGS / "train" / "symbolic_kv_formation.json", TrainConfig)
    for config in configs:
        assert config.steps == 6000
        assert config.benchmark_dir == formation.benchmark_dir
        recipes = formation.deciding(), config.deciding()
        assert {f: v for f, v in recipes[0].items() if f != "optimizer"} == {
            f: v for f, v in recipes[1].items() if f != "optimizer"
        }
    baseline = next(config for config in configs if config.name == "adamw_baseline")
    assert baseline.deciding() == formation.deciding()


@pytest.mark.parametrize(
    ("field", "value", "moves"),
    [
        ("seed", 2, True),
        ("batch_size", 9, True),
        ("train_split", "other", True),
        ("kernels", "plain", True),
        ("gradient_clip", None, True),
        ("name", "other", False),
        ("output_dir", "elsewhere", False),
        ("device", "cuda", False),
        ("threads", 2, False),
        ("log_every", 7, False),
        ("eval_every", 7, False),
        ("checkpoint_every", 7, False),
    ],
)
def test_the_recipe_holds_what_moves_the_weights(field: str, value: Any, moves: bool) -> None:
    before = parse_config(FULL_TRAIN, TrainConfig, where="test")
    after = parse_config({**FULL_TRAIN, field: value}, TrainConfig, where="test")
    assert (after.deciding() != before.deciding()) is moves


def test_the_number_of_steps_is_of_the_recipe_only_where_the_schedule_needs_it(
    make_config: Callable[..., TrainConfig],
) -> None:
    for name, moves in (("constant", False), ("cosine", True), ("linear", True)):
        recipes = [make_config(steps=n, schedule={"name": name}).deciding() for n in (12, 13)]
        assert (recipes[0] != recipes[1]) is moves


@pytest.mark.parametrize(
    ("optimizer", "field", "became"),
    [
        ({"name": "adamw", "learning_rate": 0.1, "eps": 1e-46}, "optimizer.eps", "0"),
        ({"name": "adamw", "learning_rate": 1e-40}, "optimizer.learning_rate", "0"),
        ({"name": "sgd", "learning_rate": 1e39}, "optimizer.learning_rate", "infinite"),
        ({"name": "sgd", "learning_rate": 1, "weight_decay": 1e39}, "weight_decay", "infinite"),
    ],
)
def test_what_float32_cannot_hold_is_refused_by_field(
    train_payload: Callable[..., dict[str, Any]],
    optimizer: dict[str, Any],
    field: str,
    became: str,
) -> None:
    with pytest.raises(CircuitError, match=rf"{field}': is {became} in float32"):
        parse_config(train_payload(optimizer=optimizer), TrainConfig, where="test")
