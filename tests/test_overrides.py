"""--set field=value: the same as editing the file, refused by name, and remembered."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit.config import load_config, parse_config
from circuit.errors import CircuitError
from circuit.overrides import apply_overrides, field_names, field_values, parse_override
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.train_config import TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"
TRAIN = CONFIGS / "train" / "quickstart.json"
BENCHMARK = CONFIGS / "benchmark" / "symbolic_kv_base.json"
FILES: list[tuple[Path, type[Any]]] = [(TRAIN, TrainConfig), (BENCHMARK, BenchmarkConfig)]


def written(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def spelled_out(config: Any) -> Any:
    """Its values, with the defaults that files do not hold, in the order of the fields."""
    payload = config.model_dump(mode="json")
    if isinstance(config, TrainConfig):
        model = config.model
        payload["model"] = {name: getattr(model, name) for name in type(model).model_fields}
        payload = {name: payload.get(name) for name in type(config).model_fields}
    return payload


@cache
def full(path: Path, kind: type[Any]) -> Any:
    """The file with every default in it; not to be changed."""
    return spelled_out(load_config(path, kind))


def value_at(payload: Any, name: str) -> Any:
    for part in name.split("."):
        payload = payload[part]
    return payload


def edited(payload: Any, name: str, value: Any) -> Any:
    made = copy.deepcopy(payload)
    *outer, last = name.split(".")
    holder = value_at(made, ".".join(outer)) if outer else made
    holder[last] = value
    return made


def refusal(path: Path, kind: type[Any], *texts: str) -> str:
    with pytest.raises(CircuitError) as caught:
        load_config(path, kind, texts)
    message = str(caught.value)
    assert "\n" not in message
    return message


@st.composite
def fields(draw: st.DrawFn) -> tuple[Path, type[Any], str]:
    path, kind = draw(st.sampled_from(FILES))
    return path, kind, draw(st.sampled_from(field_names(kind, written(path))))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(field=fields(), value=JSON)
def test_an_override_is_an_edit_of_the_file(field: Any, value: Any) -> None:
    path, kind, name = field
    payload = full(path, kind)
    before = copy.deepcopy(payload)
    assert apply_overrides(payload, [f"{name}={json.dumps(value)}"], kind) == edited(
        payload, name, value
    )
    assert payload == before


@given(field=fields())
def test_a_field_set_to_what_it_is_changes_nothing(field: Any) -> None:
    """Also for fields that the file leaves to their defaults."""
    path, kind, name = field
    config = load_config(path, kind)
    value = value_at(spelled_out(config), name)
    again = load_config(path, kind, [f"{name}={json.dumps(value)}"])
    assert again.digest() == config.digest()
    assert again.to_json() == config.to_json()


@pytest.mark.parametrize(("path", "kind"), FILES)
def test_the_names_are_those_of_every_value_of_the_file(path: Path, kind: type[Any]) -> None:
    def leaves(payload: Any, before: str = "") -> list[str]:
        return [
            leaf
            for key, value in payload.items()
            for leaf in (
                leaves(value, f"{before}{key}.") if isinstance(value, dict) else [before + key]
            )
        ]

    assert field_names(kind, written(path)) == leaves(full(path, kind))


def test_overrides_apply_in_order_and_before_validation() -> None:
    sgd = 'optimizer={"name": "sgd", "learning_rate": 0.1}'
    config = load_config(TRAIN, TrainConfig, [sgd, "optimizer.momentum=0.9"])
    assert config.optimizer.model_dump() == {
        "name": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.01,
    }
    # each alone contradicts the file: its warm-up takes 50 steps
    both = load_config(TRAIN, TrainConfig, ["steps=10", "schedule.warmup_steps=10"])
    assert both.steps == both.schedule.warmup_steps == 10


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name=run 7", "run 7"),
        ("name=", ""),
        ("name=a=b", "a=b"),
        ('name="7"', "7"),
        ("name=NaN", "NaN"),
        ("name=-Infinity", "-Infinity"),
        ("threads=2", 2),
        ("threads=null", None),
        ("gradient_clip=0.5", 0.5),
        ("name=true", True),
        ('tracked_splits=["train"]', ["train"]),
        ("name=[1", "[1"),
        ('name={"a":1,"a":2} and more', '{"a":1,"a":2} and more'),
        ('model=[{"a": 1}, {"a": 1}]', [{"a": 1}, {"a": 1}]),
    ],
)
def test_a_value_is_json_or_else_text(text: str, value: Any) -> None:
    assert parse_override(text) == ((text.partition("=")[0],), value)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["steps"], "--set steps: not a pair; expected field=value"),
        (["=3"], "--set =3: not a pair"),
        (["optimizer..eps=3"], "--set optimizer..eps=3: not a pair"),
        (["stps=3"], "--set stps=3: unknown field 'stps'; did you mean steps?"),
        (["optimizer.learning_rte=3"], "did you mean optimizer.learning_rate?"),
        (["learning_rate=3"], "did you mean optimizer.learning_rate?"),
        (["optimizer.zzz=3"], "unknown field 'optimizer.zzz'; expected one of name, learning_rate"),
        (["zzz=3"], "unknown field 'zzz'; expected one of name, output_dir"),
        (["overrides=3"], "unknown field 'overrides'"),
        (["steps.x=3"], "--set steps.x=3: 'steps' holds no fields; expected steps=value"),
        (["tracked_splits.0=x"], "'tracked_splits' holds no fields"),
        (["schedule=3", "schedule.floor=0"], "--set schedule.floor=0: 'schedule' is 3, no object"),
        (["steps=50", "steps=60"], "--set steps=60: 'steps' is set already"),
        (["optimizer.eps=1", "optimizer={}"], "--set optimizer={}: 'optimizer.eps' is set already"),
        (
            ['optimizer={"name":"sgd","learning_rate":1,"learning_rate":2}'],
            "'learning_rate' stands",
        ),
        (["name=" + "[" * 100_000], "nested more than 64 deep"),
        (['model=[{"a": {"x": 1, "x": 1}}]'], "'x' stands twice in an object"),
    ],
)
def test_an_override_that_fits_nothing_is_named(texts: list[str], said: str) -> None:
    assert said in refusal(TRAIN, TrainConfig, *texts)


def test_a_mistyped_split_is_no_new_split() -> None:
    message = refusal(BENCHMARK, BenchmarkConfig, "splits.trian.samples=5")
    assert "unknown field 'splits.trian'; did you mean splits.train.samples?" in message
    counterfactual = 'splits.more={"samples": 3, "counterfactual_of": "train"}'
    assert "more" in load_config(BENCHMARK, BenchmarkConfig, [counterfactual]).splits


@pytest.mark.parametrize(
    ("texts", "due", "said"),
    [
        (["seed=1", "steps=many"], "with --set steps=many:", "field 'steps'"),
        (["seed=-1", "steps=0"], "with --set seed=-1, --set steps=0:", "field 'seed'"),
        (["steps=10"], "with --set steps=10:", "warmup_steps 50 exceeds steps 10"),
        (["optimizer.name=sgd"], "with --set optimizer.name=sgd:", "set as a whole: --set 'opt"),
        (["name=7"], "with --set name=7:", "quotes: --set 'name=\"7\"'"),
    ],
)
def test_a_value_that_validation_refuses_is_named_beside_the_file(
    texts: list[str], due: str, said: str
) -> None:
    message = refusal(TRAIN, TrainConfig, *texts)
    assert message.startswith(f"{TRAIN} {due}")
    assert said in message


def test_a_mistake_of_the_file_is_not_put_on_an_override(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**written(TRAIN), "steps": "many"}))
    assert refusal(path, TrainConfig, "seed=3").startswith(f"{path}: field 'steps'")


# --- the record -----------------------------------------------------------------------------------


@given(field=fields())
def test_overrides_are_no_part_of_the_values(field: Any) -> None:
    path, kind, name = field
    plain = load_config(path, kind)
    text = f"{name}={json.dumps(value_at(spelled_out(plain), name))}"
    config = load_config(path, kind, [text])
    assert config.overrides is not None
    assert config.overrides.to_json() == {"config": str(path), "set": [text]}
    assert config.to_json() == plain.to_json() == plain.to_json(origin=True)
    assert config.model_dump() == plain.model_dump()
    assert plain.overrides is None
    assert plain.origin() == {}


def test_a_written_config_gives_its_record_back_and_keeps_it_when_it_is_set_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run_config.json"
    first = load_config(TRAIN, TrainConfig, ["steps=60", "seed=3"])
    path.write_text(first.to_json(origin=True))
    read = load_config(path, TrainConfig)
    assert read == first
    second = load_config(path, TrainConfig, ["seed=4"])
    assert second.origin()["overrides"] == {
        "config": str(path),
        "set": ["seed=4"],
        "earlier": {"config": str(TRAIN), "set": ["steps=60", "seed=3"]},
    }
    assert (second.steps, second.seed) == (60, 4)


@pytest.mark.parametrize("record", [3, {}, {"config": "x", "set": ["a=1"], "more": 1}])
def test_a_record_that_is_none_is_refused(tmp_path: Path, record: Any) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**written(TRAIN), "overrides": record}))
    assert f"{path}: field 'overrides' is no record" in refusal(path, TrainConfig)


def test_a_changed_copy_keeps_the_record() -> None:
    config = load_config(TRAIN, TrainConfig, ["steps=60"])
    for copied in (config.replace(threads=2), config.model_copy(update={"device": "cpu"})):
        assert copied.overrides == config.overrides
    assert load_config(TRAIN, TrainConfig).replace(threads=2).overrides is None


def test_configs_without_overrides_are_equal_as_before(
    make_config: Callable[..., TrainConfig],
) -> None:
    config = make_config()
    assert parse_config(json.loads(config.to_json()), TrainConfig, where="test") == config
    assert hash(config.model) == hash(make_config().model)


# --- what completion offers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("optimizer.name", ["adamw"]),  # SGD has not its fields
        ("device", ["cpu", "cuda", "mps"]),
        ("kernels", ["fast", "plain"]),
        ("steps", ["500"]),
        ("name", ["quickstart"]),
        ("threads", ["1"]),
        ("schedule.floor", []),
        ("tracked_splits", []),
        ("model", []),
        ("nope", []),
    ],
)
def test_the_values_offered_are_the_closed_set_or_the_present_one(
    name: str, offered: list[str]
) -> None:
    assert field_values(TrainConfig, written(TRAIN), name) == offered


SGD = {"name": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("payload", "name", "offered"),
    [
        ({}, "optimizer.name", ["adamw", "sgd"]),
        ({}, "kernels", ["fast", "plain"]),
        ({"optimizer": SGD}, "optimizer.name", ["adamw", "sgd"]),
        ({"optimizer": SGD | {"momentum": 0.9}}, "optimizer.name", ["sgd"]),
        ({"optimizer": SGD | {"eps": 0.1}}, "optimizer.name", ["adamw", "sgd"]),
        ({"optimizer": SGD}, "optimizer.eps", []),
        ({"optimizer": 3}, "optimizer.name", []),
        ({"steps": "many", "optimizer": {"name": "adamw", "eps": 1}}, "optimizer.name", ["adamw"]),
        ({"name": "7"}, "name", ['"7"']),
    ],
)
def test_a_value_is_offered_where_the_rest_of_the_file_allows_it(
    payload: Any, name: str, offered: list[str]
) -> None:
    assert field_values(TrainConfig, payload, name) == offered


@given(field=fields(), every=st.booleans())
def test_every_value_that_is_offered_is_accepted(field: Any, every: bool) -> None:
    path, kind, name = field
    payload = full(path, kind) if every else written(path)
    for value in field_values(kind, payload, name):
        parse_config(apply_overrides(payload, [f"{name}={value}"], kind), kind, where="test")


@given(field=fields())
def test_what_a_field_is_stays_offered(field: Any) -> None:
    path, kind, name = field
    payload = full(path, kind)
    value = value_at(payload, name)
    if value is not None and not isinstance(value, list):
        text = value if isinstance(value, str) else json.dumps(value)
        assert text in field_values(kind, payload, name)
