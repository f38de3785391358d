"""Laws of every task: what the protocol promises, whichever task it is."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from small_benchmarks import SETTINGS

from circuit.config import parse_config
from circuit.errors import CircuitError
from circuit.folders import metadata_path
from circuit.schemas import SIDES
from circuit.tasks.base import Record, Task
from circuit.tasks.benchmark import Benchmark, generate_benchmark, load_benchmark, write_benchmark
from circuit.tasks.examples import UNPREDICTED, Examples
from circuit.tasks.groups import group_tokens, groups_of
from circuit.tasks.induction.task import Induction
from circuit.tasks.modular_addition.task import ModularAddition
from circuit.tasks.pairs import PairSet, build_pairs, pair_batch, record_of
from circuit.tasks.probes import draw_probe_set, read_probe_set, write_probe_set
from circuit.tasks.registry import BUILT_IN, find_task

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
TASKS = [name for name, place in BUILT_IN.items() if find_spec(place.split(".task:")[0])]


def payload_of(name: str, **changes: Any) -> dict[str, Any]:
    shared = {"name": "small", "benchmark_type": name, "output_dir": "data/small", "seed": 3}
    return {**shared, **SETTINGS[name], **changes}


def drawn(name: str, **changes: Any) -> Benchmark:
    payload = payload_of(name, **changes)
    return generate_benchmark(parse_config(payload, find_task(name).Config, where="test"))


@pytest.fixture(scope="module", params=TASKS)
def benchmark(request: pytest.FixtureRequest) -> Benchmark:
    return drawn(request.param)


@pytest.fixture(scope="module")
def batches(benchmark: Benchmark) -> list[Examples]:
    """All examples, split by split."""
    return [benchmark.task.examples(records) for records in benchmark.splits.values()]


@pytest.fixture(scope="module", params=[name for name in TASKS if find_task(name).pair_types])
def paired(request: pytest.FixtureRequest) -> tuple[Task, PairSet]:
    """A task that has pair types, with some pairs of each."""
    benchmark = drawn(request.param)
    records = next(iter(benchmark.splits.values()))
    return benchmark.task, build_pairs(benchmark.task, records, max_per_type=40, min_per_type=3)


@pytest.fixture
def saved(benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmark on disk."""
    monkeypatch.chdir(tmp_path)
    write_benchmark(benchmark.config)
    return Path("data/small")


def everything(benchmark: Benchmark) -> list[Record]:
    return [record for records in benchmark.splits.values() for record in records]


def test_every_task_has_its_small_benchmark_and_a_folder_that_no_other_imports() -> None:
    assert TASKS[0] == "symbolic_kv_stream"
    assert SETTINGS.keys() == set(TASKS)
    contracts = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    (protected,) = [c["protected_modules"] for c in contracts if c["type"] == "protected"]
    assert set(protected) == {BUILT_IN[name].split(".task:")[0] for name in TASKS}


def test_what_a_task_declares_fits_together(benchmark: Benchmark) -> None:
    task = benchmark.task
    assert len(set(task.vocabulary.tokens)) == task.vocabulary.size
    assert 0 <= task.vocabulary.pad < task.vocabulary.size
    everywhere = range(task.vocabulary.size)
    assert set(task.choices) <= set(everywhere)
    assert tuple(task.token_sets) == task.token_set_names
    assert all(ids and set(ids) <= set(everywhere) for ids in task.token_sets.values())
    positions = {of for of in task.roles.values() if isinstance(of, str)} - {"at"}
    assert {*positions, *task.slices.values(), *task.shortcuts} <= task.facts.keys()
    assert task.support in task.single_roles()
    assert task.attended is None or task.attended in task.roles
    assert task.slice_name == (next(iter(task.slices), "slice"))
    assert task.config.benchmark_type == benchmark.config.benchmark_type
    assert tuple(benchmark.splits) == task.split_names
    assert not set(task.streams) & set(task.split_names)
    assert sum(n for n, _ in task.config.stored().values()) == len(everything(benchmark))
    assert set(groups_of(task)) >= set(task.single_roles())


def test_records_parse_and_the_answer_stands_behind_the_prediction(benchmark: Benchmark) -> None:
    task, ids = benchmark.task, set()
    for name, records in benchmark.splits.items():
        for record in records:
            assert record.split == name
            ids.add(record.sample_id)
            parsed = task.parse(record)
            assert [q.index for q in parsed.questions] == list(range(len(parsed.questions)))
            assert len(parsed.questions) > 0
            assert len(parsed.kinds) <= len(record.tokens)
            assert set(parsed.kinds) <= {-1, *range(len(task.kinds))}
            for q in parsed.questions:
                assert record.tokens[q.at + 1] == q.answer
                assert q.answer in task.choices
                assert q.facts.keys() >= task.facts.keys()
                alone = task.parse(record, q.index).questions
                assert (len(alone), alone[-1].at, alone[-1].answer) == (q.index + 1, q.at, q.answer)
    assert len(ids) == len(everything(benchmark))


def test_what_stands_behind_a_question_has_no_say_in_it(benchmark: Benchmark) -> None:
    """A copy is right up to its answer only, and parsed up to there."""
    task = benchmark.task
    for record in everything(benchmark)[:20]:
        for q in task.parse(record).questions:
            behind = len(record.tokens) - q.at - 2
            tokens = record.tokens[: q.at + 2] + (task.vocabulary.pad,) * behind
            copy = Record("copy", record.split, tokens)
            (*_, same) = task.parse(copy, q.index).questions
            assert (same.at, same.answer, same.index) == (q.at, q.answer, q.index)


def test_a_record_that_says_something_else_is_refused_by_name(benchmark: Benchmark) -> None:
    task = benchmark.task
    record = everything(benchmark)[0]
    (*_, last) = task.parse(record).questions
    tokens = list(record.tokens)
    wrong = next(token for token in task.choices if token != last.answer)
    tokens[last.at + 1] = wrong
    with pytest.raises(CircuitError, match=re.escape(record.sample_id)):
        task.parse(Record(record.sample_id, record.split, tuple(tokens)))


def test_roles_lie_in_the_prefix_and_single_roles_have_one_position(
    batches: list[Examples],
) -> None:
    for batch in batches:
        prefix = batch.prefix()
        assert torch.equal(prefix.sum(1), batch.at + 1)
        for role in batch.task.roles:
            mask = batch.role(role)
            assert mask.shape == prefix.shape
            assert not (mask & ~prefix).any(), role
            positions, real = batch.positions(role)
            listed = torch.zeros_like(mask)
            listed[real.nonzero()[:, 0], positions[real]] = True
            assert torch.equal(listed, mask), role
            if role in batch.task.single_roles():
                assert (mask.sum(1) == 1).all(), role
                assert torch.equal(mask.int().argmax(1), batch.position(role)), role
                tokens = batch.tokens[batch.row, batch.position(role)]
                assert torch.equal(group_tokens(batch, role, role), tokens)
            else:
                with pytest.raises(CircuitError, match=f"role '{role}' has several positions"):
                    batch.position(role)
        assert torch.equal(batch.role("prediction"), batch.at_position(batch.at))
        with pytest.raises(CircuitError, match="unknown role 'nowhere'; expected prediction"):
            batch.role("nowhere")


def test_kinds_cover_the_prefix_no_further(batches: list[Examples]) -> None:
    for batch in batches:
        by_kind = torch.stack([batch.of_kind(kind) for kind in batch.task.kinds]).sum(0)
        assert by_kind.max() == 1
        assert not (by_kind.bool() & ~batch.prefix()).any()
        behind = torch.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]
        assert (batch.tokens[behind] == batch.task.vocabulary.pad).all()
        assert (batch.kinds[behind] == -1).all()


def test_slices_part_the_examples(batches: list[Examples]) -> None:
    for batch in batches:
        for by, fact in (*batch.task.slices.items(), (None, "")):
            whole, *parts = batch.by_slice(by).values()
            assert whole.all()
            assert len(whole) == len(batch)
            assert bool(parts) == bool(batch.task.slices)
            if parts:
                assert torch.equal(torch.stack(parts).sum(0), torch.ones_like(batch.row))
            if by is not None:
                assert torch.equal(batch.slice_values(by), batch.facts[fact].long())
        if batch.task.slices:
            with pytest.raises(CircuitError, match="'nothing'; expected one of") as refused:
                batch.by_slice("nothing")
            assert all(name in str(refused.value) for name in batch.task.slices)


def test_what_slices_mean(batches: list[Examples]) -> None:
    for batch in batches:
        facts, task = batch.facts, batch.task
        if isinstance(task, ModularAddition):
            total = facts["first"] + facts["second"]
            assert torch.equal(facts["is_wrapped"], total != batch.answer)
        if isinstance(task, Induction):
            assert torch.equal(facts["distance"], batch.at - batch.position("support_key"))


def test_targets_are_the_next_tokens_or_the_answers_alone(batches: list[Examples]) -> None:
    for batch in batches:
        targets = batch.targets()
        expected = [[UNPREDICTED] * targets.shape[1] for _ in batch.tokens]
        if batch.task.loss == "every":
            for row, sequence in enumerate(batch.sequences()):
                expected[row][: len(sequence) - 1] = sequence[1:]
        else:
            for row, at, answer in zip(
                batch.row.tolist(), batch.at.tolist(), batch.answer.tolist(), strict=True
            ):
                expected[row][at] = answer
        assert targets.tolist() == expected
        answers = batch.is_answer().nonzero().tolist()
        assert answers == sorted(
            [row, at + 1] for row, at in zip(batch.row.tolist(), batch.at.tolist(), strict=True)
        )


def assert_same(left: Examples, right: Examples) -> None:
    assert left.sample_ids == right.sample_ids
    for name in ("tokens", "lengths", "kinds", "row", "index", "at", "answer"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert left.facts.keys() == right.facts.keys()
    for name, fact in left.facts.items():
        assert torch.equal(fact, right.facts[name]), name
        assert fact.dtype == (torch.bool if left.task.facts[name] else torch.int64)


def test_slicing_a_split_equals_encoding_the_records(benchmark: Benchmark) -> None:
    records, draw = everything(benchmark), torch.Generator().manual_seed(0)
    split = benchmark.task.split(records)
    assert len(split) == len(records)
    assert_same(split.batch(), benchmark.task.examples(records))
    for size in (1, 3, 12):
        rows = torch.randint(len(records), (size,), generator=draw)
        direct = benchmark.task.examples([records[i] for i in rows])
        assert_same(split.batch(rows), direct)
        assert_same(split.batch(rows.tolist()), direct)
    chosen = torch.zeros(len(records), dtype=torch.bool)
    chosen[[3, 7]] = True
    assert_same(split.batch(chosen), split.batch([3, 7]))
    for wrong in ([len(records)], [-1], []):
        with pytest.raises(CircuitError, match=f"expected some of 0 .. {len(records) - 1}"):
            split.batch(wrong)
    for mask in (chosen[:5], torch.tensor([0.5, 1.2])):
        with pytest.raises(CircuitError, match=f"expected integers, or a mask of {len(records)}"):
            split.batch(mask)
    with pytest.raises(CircuitError, match="no records"):
        benchmark.task.examples([])


def test_selected_examples_keep_what_is_theirs(batches: list[Examples]) -> None:
    for batch in batches:
        chosen = torch.arange(len(batch)) % 3 == 1
        part = batch.select(chosen)
        assert 0 < len(part) < len(batch)
        assert_same(part, batch.select(chosen.nonzero()[:, 0]))
        for role in batch.task.roles:
            assert torch.equal(part.role(role), batch.role(role)[chosen]), role
        assert torch.equal(part.tokens, batch.tokens)
        assert_same(batch.to("cpu"), batch)


def test_pairs_differ_only_where_they_say_and_their_answers_are_right(
    paired: tuple[Task, PairSet],
) -> None:
    task, pairs = paired
    assert {pair.type for pair in pairs.pairs} == set(task.pair_types)
    for pair in pairs.pairs:
        question = task.parse(pair.clean).questions[pair.read_index]
        other = task.parse(pair.corrupted, pair.read_index).questions[-1]
        assert (other.index, other.at) == (question.index, question.at)
        assert pair.corrupted.tokens[other.at + 1] == other.answer
        change = task.pair_types[pair.type](question.site)
        differing = {
            pos: new
            for pos, (old, new) in enumerate(
                zip(pair.clean.tokens, pair.corrupted.tokens, strict=True)
            )
            if old != new
        }
        assert differing == dict(change.tokens)
        assert differing
        assert max(differing) <= question.at + 1
        a, b = pair.transfer_tokens
        assert a != b
        assert (question.answer == other.answer) or (a, b) == (question.answer, other.answer)
        assert pair.pair_id == f"{pair.type}:{pair.clean.sample_id}:{question.index}:{pair.what}"
        assert record_of(pair.pair_id) == pair.clean.sample_id == pair.corrupted.source_id
        assert pair.corrupted.sample_id == pair.pair_id


def test_either_side_of_pairs_is_a_batch_of_their_examples(
    paired: tuple[Task, PairSet],
) -> None:
    task, pairs = paired
    for side in SIDES:
        batch = pair_batch(task, pairs.pairs, side)
        assert len(batch) == len(pairs.pairs)
        sequences = batch.sequences()
        for i, pair in enumerate(pairs.pairs):
            row = int(batch.row[i])
            assert sequences[row] == pair.side(side).tokens
            assert int(batch.index[i]) == pair.read_index
            assert int(batch.answer[i]) == pair.side(side).tokens[int(batch.at[i]) + 1]
    with pytest.raises(CircuitError, match="unknown pair type 'no_such_type'"):
        build_pairs(task, [pairs.pairs[0].clean], types=["no_such_type"], max_per_type=3)


def test_the_same_config_gives_the_same_bytes_and_another_seed_others(
    benchmark: Benchmark,
) -> None:
    name = benchmark.config.benchmark_type
    again, other = drawn(name), drawn(name, seed=4)
    assert again == benchmark
    assert other.digest != benchmark.digest

    def files(of: Benchmark) -> dict[str, str]:
        texts: dict[str, str] = {}
        of.save(texts.__setitem__)
        return texts

    assert files(again) == files(benchmark)


def test_a_loaded_benchmark_is_the_written_one(benchmark: Benchmark, saved: Path) -> None:
    loaded = load_benchmark(saved)
    assert loaded == benchmark
    assert type(loaded.task) is type(benchmark.task)
    for name, records in benchmark.splits.items():
        assert_same(loaded.task.examples(loaded.records(name)), benchmark.task.examples(records))
    told = loaded.task.tell(loaded.figures)
    assert [row[0] for row in told.rows] == list(benchmark.task.split_names)
    assert {len(row) for row in told.rows} == {len(told.columns)}
    assert str(saved.absolute()) not in (saved / "metadata.json").read_text()


def edits(payload: dict[str, Any], path: str = "") -> Iterator[tuple[str, Callable[[], None]]]:
    """A change of every leaf of a JSON object, and how it is made."""
    for key, value in payload.items():
        if isinstance(value, dict) and value:
            yield from edits(value, f"{path}{key}.")
        elif isinstance(value, list) and value:
            yield f"{path}{key}", value.pop
        elif isinstance(value, int | float | str):
            changed = f"{value}x" if isinstance(value, str) else value + 1
            yield f"{path}{key}", lambda k=key, v=changed: payload.__setitem__(k, v)


def test_any_edit_of_the_metadata_is_refused(saved: Path) -> None:
    path = saved / "metadata.json"
    whole = path.read_text()
    names = [name for name, _ in edits(json.loads(whole))]
    assert {"config.seed", "digest", "name", "schema_version", "vocabulary"} <= set(names)
    for place, name in enumerate(names):
        if name.startswith("figures."):
            continue  # measured, no part of what they are measured on
        payload = json.loads(whole)
        list(edits(payload))[place][1]()
        path.write_text(json.dumps(payload))
        with pytest.raises(CircuitError) as refused:
            load_benchmark(saved)
        assert "\n" not in str(refused.value), name
    for name in ("figures", "config", "splits"):
        payload = json.loads(whole)
        payload[name]["mine"] = 1
        path.write_text(json.dumps(payload))
        with pytest.raises(CircuitError, match=re.escape(str(path))):
            load_benchmark(saved)
    path.write_text(json.dumps({**json.loads(whole), "mine": 1}))
    with pytest.raises(CircuitError, match=re.escape(f"{path}: field 'mine'")):
        load_benchmark(saved)


def test_any_edit_of_a_split_is_refused(benchmark: Benchmark, saved: Path) -> None:
    for name in benchmark.splits:
        path = saved / f"{name}.jsonl"
        whole = path.read_bytes()
        for offset in range(0, len(whole), max(1, len(whole) // 40)):
            data = bytearray(whole)
            data[offset] ^= 1
            path.write_bytes(bytes(data))
            with pytest.raises(CircuitError, match=re.escape(str(path))):
                load_benchmark(saved, [name])
        path.write_bytes(whole)


def test_a_probe_set_is_read_back_and_any_edit_is_refused(
    benchmark: Benchmark, saved: Path
) -> None:
    first, *_ = benchmark.splits
    path = Path("probes/probe_set.jsonl")
    write_probe_set(saved, path, [first], 5)
    probes = read_probe_set(path, load_benchmark(saved))
    assert probes == draw_probe_set(benchmark, [first], 5)
    assert [r for r in benchmark.records(first) if r in probes.records] == probes.records
    assert len(benchmark.task.examples(probes.records)) >= 5
    other = drawn(benchmark.config.benchmark_type, seed=4)
    with pytest.raises(CircuitError, match="expected one of the benchmark in use"):
        read_probe_set(path, other)
    whole, metadata = path.read_text(), metadata_path(path)
    path.write_text("".join(whole.splitlines(keepends=True)[1:]))
    with pytest.raises(CircuitError, match=re.escape(str(path))):
        read_probe_set(path, benchmark)
    path.write_text(whole)
    told = metadata.read_text()
    for place, (name, _) in enumerate(edits(json.loads(told))):
        if name == "seed":
            continue  # of the draw: nothing hangs on it any more
        payload = json.loads(told)
        list(edits(payload))[place][1]()
        metadata.write_text(json.dumps(payload))
        with pytest.raises(CircuitError):
            read_probe_set(path, benchmark)
