"""What a lookup benchmark must hold to exist, and its figures, worked out on words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.tasks.base import Record
from circuit.tasks.benchmark import Benchmark, generate_benchmark
from circuit.tasks.symbolic_kv import generator
from circuit.tasks.symbolic_kv.checks import check_benchmark
from circuit.tasks.symbolic_kv.config import BenchmarkConfig, GeneratedSplit
from circuit.tasks.symbolic_kv.stream import program_of

CONFIGS = Path(__file__).parents[3] / "configs" / "benchmark"
WriteInto = Callable[[Path], Callable[[str, str], None]]


def check(benchmark: Benchmark, splits: dict[str, list[Record]], **changes: Any) -> None:
    config = benchmark.config.model_copy(update=changes)
    check_benchmark(config, benchmark.vocabulary, benchmark.task.heldout_pairs, splits)


def naive_shares(benchmark: Benchmark, split: str) -> dict[str, float]:
    """Every shortcut's accuracy, from the text."""
    hits: dict[str, int] = {}
    reads = 0
    for record in benchmark.records(split):
        words = benchmark.vocabulary.decode(record.tokens).split()[1:-1]
        values: list[str] = []
        writes: list[tuple[str, str]] = []
        for op, key, value in zip(words[::3], words[1::3], words[2::3], strict=True):
            if op == "W":
                writes.append((key, value))
            else:
                reads += 1
                guesses = {
                    "last_value_written": writes[-1][1],
                    "first_value_of_key": next(v for k, v in writes if k == key),
                    "most_frequent_value": min(values, key=lambda v: (-values.count(v), v)),
                }
                for k in range(1, 7):
                    guesses[str(k)] = writes[-k][1] if k <= len(writes) else "none"
                for name, guess in guesses.items():
                    hits[name] = hits.get(name, 0) + (guess == value)
            values.append(value)
    return {name: count / reads for name, count in hits.items()}


@pytest.mark.parametrize("lag_sampling", ["eligible", "uniform"])
def test_the_figures_are_those_of_the_text(
    config_of: Callable[..., BenchmarkConfig], lag_sampling: str
) -> None:
    config = config_of(lag_sampling="eligible", heuristic_max_accuracy=1.0)
    if lag_sampling == "uniform":
        config = load_config(CONFIGS / "quickstart.json", BenchmarkConfig)
        shorter = {
            name: split.model_copy(update={"samples": 30}) for name, split in config.splits.items()
        }
        config = config.model_copy(update={"splits": shorter})
    benchmark = generate_benchmark(config)
    for name, figures in benchmark.figures.splits.items():
        positional = {str(k): share for k, share in figures.positional_shortcuts.items()}
        assert {**figures.shortcuts, **positional} == naive_shares(benchmark, name)
        best = max(positional.values())
        assert positional[str(figures.strongest_positional)] == best
        assert figures.leaked_writes == 0
        warned = [warning for warning in benchmark.figures.warnings if f" {name}:" in warning]
        assert bool(warned) == (best > 0.5)


def test_the_base_benchmark_is_drawn_nearly_at_once_and_small(
    tmp_path: Path, write_into: WriteInto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few records are drawn again, which is what it would be slow by."""
    config = load_config(CONFIGS / "symbolic_kv_base.json", BenchmarkConfig)
    seen: dict[str, int] = {}
    draws: list[int] = []
    real = generator._draw_write_keys

    def counted(draw: generator.Draw, num_keys: int, overwrites: int) -> list[int]:
        draws.append(num_keys)
        return real(draw, num_keys, overwrites)

    monkeypatch.setattr(generator, "_draw_write_keys", counted)
    benchmark = generate_benchmark(config, lambda split, done: seen.update({split: done}))
    drawn = sum(isinstance(s, GeneratedSplit) * s.samples for s in config.splits.values())
    assert drawn <= len(draws) < 1.01 * drawn
    benchmark.save(write_into(tmp_path))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000_000
    assert seen == {name: split.samples for name, split in config.splits.items()}
    assert seen["train"] == 8000
    train = benchmark.figures.splits["train"]
    assert train.strongest_positional == 2
    assert train.positional_shortcuts[2] == pytest.approx(0.82, abs=0.01)
    assert len(benchmark.figures.warnings) == 6
    longest = max(figures.max_tokens for figures in benchmark.figures.splits.values())
    assert longest <= 96


def test_no_position_answers_the_uniform_benchmark() -> None:
    config = load_config(CONFIGS / "symbolic_kv_uniform_lag.json", BenchmarkConfig)
    fewer = {name: s.model_copy(update={"samples": 500}) for name, s in config.splits.items()}
    figures = generate_benchmark(config.model_copy(update={"splits": fewer})).figures
    for split in figures.splits.values():
        assert max(split.positional_shortcuts.values()) <= 0.35
        assert split.max_tokens <= 96
    assert figures.warnings == []


def test_quickstart_is_small() -> None:
    config = load_config(CONFIGS / "quickstart.json", BenchmarkConfig)
    benchmark = generate_benchmark(config)
    assert benchmark.figures.splits["train"].max_tokens <= 40
    assert benchmark.figures.warnings == []


def test_duplicates_are_refused(small: Benchmark) -> None:
    train = small.records("train")
    twin = replace(train[0], sample_id="other")
    with pytest.raises(CircuitError, match="train-00000 and heldout_pairs/other share their token"):
        check(small, {"train": train, "heldout_pairs": [twin]})
    renamed = replace(train[1], sample_id=train[0].sample_id)
    with pytest.raises(CircuitError, match="share their sample id"):
        check(small, {"train": [train[0], renamed]})


def test_reads_moved_to_another_slot_are_the_same_program(small: Benchmark) -> None:
    vocab = small.vocabulary
    early = "<bos> W K00 V01 W K01 V02 R K00 V01 W K01 V03 <eos>"
    late = "<bos> W K00 V01 W K01 V02 W K01 V03 R K00 V01 <eos>"
    pair = [Record(name, "train", vocab.encode(text)) for name, text in (("a", early), ("b", late))]
    with pytest.raises(CircuitError, match="share their program"):
        check(small, {"train": pair})


def test_a_wrong_answer_is_refused(small: Benchmark) -> None:
    record = small.records("train")[0]
    answer = program_of(record, small.vocabulary).reads[0].answer_pos
    tokens = list(record.tokens)
    tokens[answer] = small.vocabulary.value_id(
        0 if tokens[answer] != small.vocabulary.value_id(0) else 1
    )
    with pytest.raises(CircuitError, match=f"record train-00000, position {answer}"):
        check(small, {"train": [replace(record, tokens=tuple(tokens))]})


def test_leakage_is_refused_with_its_figures(small: Benchmark) -> None:
    with pytest.raises(CircuitError, match=r"split train: \d+ of \d+ writes leak"):
        check(small, {"train": small.records("heldout_pairs")})


def test_a_strong_shortcut_is_refused_with_its_figures(small: Benchmark) -> None:
    with pytest.raises(CircuitError, match=r"split train: .*most_frequent_value \d+\.\d%"):
        check(small, {"train": small.records("train")}, heuristic_max_accuracy=0.001)
    text = "<bos> W K00 V01 W K01 V02 R K01 V02 <eos>"
    record = Record("a", "train", small.vocabulary.encode(text))
    with pytest.raises(CircuitError, match=r"last_value_written 100.0%, first_value_of_key 100.0%"):
        check_benchmark(small.config, small.vocabulary, frozenset(), {"train": [record]})
