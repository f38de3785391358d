"""What every drawn record obeys, on random small configs, by an interpreter of its own."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuit.config import parse_config
from circuit.errors import CircuitError
from circuit.tasks.base import Record, Vocabulary
from circuit.tasks.benchmark import Benchmark, generate_benchmark
from circuit.tasks.symbolic_kv.config import BenchmarkConfig, CounterfactualSplit, GeneratedSplit
from circuit.tasks.symbolic_kv.feasibility import largest_lag
from circuit.tasks.symbolic_kv.stream import program_of


@st.composite
def configs(draw: st.DrawFn) -> BenchmarkConfig:
    few = draw(st.integers(2, 4))
    lag_min = draw(st.integers(0, 1))
    split = {
        "samples": draw(st.integers(4, 10)),
        "active_keys": {"min": few, "max": few + draw(st.integers(0, 1))},
        "overwrite_count": {"min": 6, "max": 6 + draw(st.integers(0, 2))},
        "num_queries": {"min": 1, "max": draw(st.integers(1, 3))},
        "query_lag": {"min": lag_min, "max": 1 if few == 2 else draw(st.integers(lag_min, 3))},
    }
    payload: dict[str, Any] = {
        "name": "drawn",
        "benchmark_type": "symbolic_kv_stream",
        "output_dir": "out",
        "seed": draw(st.integers(0, 10**6)),
        "num_keys": draw(st.integers(5, 7)),
        "num_values": draw(st.integers(48, 64)),
        "holdout_answer_pair_fraction": draw(st.floats(0.4, 0.6)),
        "heuristic_max_accuracy": 1.0,
        "lag_sampling": draw(st.sampled_from(["eligible", "uniform"])),
        "splits": {
            "counterfactual": {"samples": 3, "counterfactual_of": "train"},
            "train": split,
            "heldout_pairs": {**split, "answer_pairs": "heldout"},
        },
    }
    return parse_config(payload, BenchmarkConfig, where="drawn")


def events(record: Record, vocab: Vocabulary) -> list[tuple[str, str, str]]:
    words = vocab.decode(record.tokens).split()
    assert words[0] == "<bos>"
    assert words[-1] == "<eos>"
    return [tuple(words[i : i + 3]) for i in range(1, len(words) - 1, 3)]  # type: ignore[misc]


def check_record(record: Record, split: GeneratedSplit, benchmark: Benchmark) -> None:
    vocab = benchmark.vocabulary
    written: list[tuple[str, str]] = []
    asked: list[tuple[int, str]] = []
    for op, key, value in events(record, vocab):
        if op == "W":
            written.append((key, value))
            continue
        support = max(i for i, (k, _) in enumerate(written) if k == key)
        assert written[support][1] == value
        assert split.query_lag.min <= len(written) - 1 - support <= split.query_lag.max
        assert support >= len({k for k, _ in written})
        asked.append((len(written), key))
    keys = [key for key, _ in written]
    active = len(set(keys))
    assert split.active_keys.min <= active <= split.active_keys.max
    assert len(set(keys[:active])) == active
    assert split.overwrite_count.min <= len(keys) - active <= split.overwrite_count.max
    for i in range(active, len(keys)):
        times = {key: keys[active:i].count(key) for key in set(keys) - {keys[i - 1]}}
        assert times[keys[i]] == min(times.values())
    assert split.num_queries.min <= len(asked) <= split.num_queries.max
    assert len(set(asked)) == len(asked)
    assert len({value for _, value in written}) == len(written)
    for key, value in written:
        pair = vocab.encode(f"{key} {value}")
        assert (pair in benchmark.task.heldout_pairs) == (split.answer_pairs == "heldout")


@given(configs())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_record_obeys_the_definition(config: BenchmarkConfig) -> None:
    benchmark = generate_benchmark(config)
    total = config.num_keys * config.num_values
    expected = round(config.holdout_answer_pair_fraction * total)
    assert len(benchmark.task.heldout_pairs) == expected
    for name, split in config.splits.items():
        records = benchmark.records(name)
        assert len(records) == split.samples
        for record in records:
            shape = config.splits["train"] if isinstance(split, CounterfactualSplit) else split
            assert isinstance(shape, GeneratedSplit)
            check_record(record, shape, benchmark)
    everything = [record for records in benchmark.splits.values() for record in records]
    assert len({record.tokens for record in everything}) == len(everything)
    assert len({record.sample_id for record in everything}) == len(everything)


@given(configs())
@settings(max_examples=15, deadline=None)
def test_same_config_same_benchmark(config: BenchmarkConfig) -> None:
    first, again = generate_benchmark(config), generate_benchmark(config)
    assert first == again
    other = generate_benchmark(config.model_copy(update={"seed": config.seed + 1}))
    assert other.digest != first.digest


def test_a_counterfactual_differs_in_one_needed_value(small: Benchmark) -> None:
    vocab = small.vocabulary
    sources = {record.sample_id: record for record in small.records("train")}
    for record in small.records("counterfactual"):
        source = sources[record.source_id or ""]
        changed = [
            i for i, (a, b) in enumerate(zip(source.tokens, record.tokens, strict=True)) if a != b
        ]
        program = program_of(source, vocab)
        write = program.writes[record.changed_write or 0]
        dependent = [r.answer_pos for r in program.reads if r.support == write]
        assert dependent
        assert changed == sorted([write.value_pos, *dependent])
        assert len({record.tokens[i] for i in changed}) == 1


def test_uniform_lags_are_uniform(config_of: Callable[..., BenchmarkConfig]) -> None:
    config = config_of(num_keys=6, lag_sampling="uniform")
    split = {
        "samples": 600,
        "active_keys": {"min": 5, "max": 5},
        "overwrite_count": {"min": 16, "max": 16},
        "num_queries": {"min": 4, "max": 4},
        "query_lag": {"min": 1, "max": 4},
    }
    payload = {**config.model_dump(mode="json"), "splits": {"train": split}}
    figures = generate_benchmark(parse_config(payload, BenchmarkConfig, where="test")).figures
    shares = figures.splits["train"].positional_shortcuts
    assert all(abs(shares[k] - 0.25) < 0.04 for k in (2, 3, 4, 5))


def write_orders(num_keys: int, overwrites: int) -> Iterator[list[int]]:
    """Every order of the writes' keys, up to renaming keys."""

    def grow(keys: list[int]) -> Iterator[list[int]]:
        if len(keys) == num_keys + overwrites:
            yield keys
            return
        times = Counter(keys)
        others = [key for key in range(num_keys) if key != keys[-1]]
        least = min(times[key] for key in others)
        for key in others:
            if times[key] == least:
                yield from grow([*keys, key])

    yield from grow(list(range(num_keys)))


@pytest.mark.parametrize("num_keys", [2, 3, 4])
@pytest.mark.parametrize("overwrites", [1, 2, 4, 5, 7])
def test_largest_lag_is_the_largest(num_keys: int, overwrites: int) -> None:
    found = -1
    for keys in write_orders(num_keys, overwrites):
        for slot in range(num_keys, len(keys)):
            for key in set(keys[num_keys : slot + 1]):
                support = max(i for i in range(slot + 1) if keys[i] == key)
                found = max(found, slot - support)
    assert found == largest_lag(num_keys, overwrites)


def changed(field: str, low: int, high: int) -> dict[str, Any]:
    train = {
        "samples": 5,
        "active_keys": {"min": 2, "max": 3},
        "overwrite_count": {"min": 8, "max": 8},
        "num_queries": {"min": 2, "max": 2},
        "query_lag": {"min": 1, "max": 2},
    }
    return {"splits": {"train": {**train, field: {"min": low, "max": high}}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (changed("active_keys", 2, 5), "splits.train.active_keys.max: 5 active keys of 4"),
        (changed("active_keys", 1, 2), "splits.train.active_keys.min: 1 active keys"),
        (changed("overwrite_count", 8, 70), r"3 \+ 70 writes need as many values"),
        (changed("num_queries", 0, 2), "splits.train.num_queries.min: no reads"),
        (changed("num_queries", 2, 20), "at most 7 eligible reads with 2 active keys"),
        (changed("query_lag", 2, 3), "no read has lag 2 with 2 active keys"),
        ({**changed("query_lag", 1, 2), "lag_sampling": "uniform"}, "no read has lag 2 with 2"),
        ({"splits": {}}, "splits: there is no split"),
        ({"holdout_answer_pair_fraction": 0.01}, "splits.heldout_pairs.*too few admissible"),
    ],
)
def test_settings_that_never_work_are_refused_at_once(
    config_of: Callable[..., BenchmarkConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CircuitError, match=message):
        generate_benchmark(config_of(**changes))


def test_endless_redraws_are_an_error(config_of: Callable[..., BenchmarkConfig]) -> None:
    split = {
        "samples": 400,
        "active_keys": {"min": 2, "max": 2},
        "overwrite_count": {"min": 2, "max": 2},
        "num_queries": {"min": 1, "max": 1},
        "query_lag": {"min": 1, "max": 1},
    }
    config = config_of(num_keys=2, num_values=4, splits={"train": split})
    with pytest.raises(CircuitError, match=r"splits.train: no record in \d+ draws; \d+ times"):
        generate_benchmark(config)


def test_the_global_stream_plays_no_part(config_of: Callable[..., BenchmarkConfig]) -> None:
    digests = set()
    for seed in (5, 6):
        random.seed(seed)
        digests.add(generate_benchmark(config_of()).digest)
    assert len(digests) == 1
