"""A benchmark's files, and what is said when they are missing or damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuit.errors import CircuitError
from circuit.tasks.benchmark import Benchmark, generate_benchmark, load_benchmark

WriteInto = Callable[[Path], Callable[[str, str], None]]


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def test_a_loaded_benchmark_is_the_saved_one(small: Benchmark, saved: Path) -> None:
    assert load_benchmark(saved) == small
    part = load_benchmark(saved, ["train"])
    assert list(part.splits) == ["train"]
    assert part.digest == small.digest
    assert part.records("train") == small.records("train")
    assert str(saved) not in (saved / "metadata.json").read_text()


def test_saving_again_gives_the_same_bytes(
    small: Benchmark, saved: Path, tmp_path_factory: pytest.TempPathFactory, write_into: WriteInto
) -> None:
    other = tmp_path_factory.mktemp("again")
    generate_benchmark(small.config).save(write_into(other))
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }


def test_any_flipped_bit_of_a_split_is_found(saved: Path) -> None:
    path = saved / "train.jsonl"
    whole = path.read_bytes()
    for offset in range(0, len(whole), 997):
        flip_byte(path, offset)
        with pytest.raises(CircuitError, match=re.escape(str(path))):
            load_benchmark(saved, ["train"])
        path.write_bytes(whole)
    load_benchmark(saved, ["train"])


def test_a_truncated_line_is_named(saved: Path) -> None:
    path = saved / "train.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:30])
    with pytest.raises(CircuitError, match=re.escape(f"{path}:8: not valid JSON")):
        load_benchmark(saved, ["train"])
    path.write_bytes(b"".join(lines[:7]))
    with pytest.raises(CircuitError, match=r"7 records, but metadata.json says 40"):
        load_benchmark(saved, ["train"])
    path.write_bytes(b"".join(lines)[:-1])
    with pytest.raises(CircuitError, match="sha256"):
        load_benchmark(saved, ["train"])


def test_a_bad_token_is_named_by_line(saved: Path) -> None:
    path = saved / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace("<bos>", "<box>")
    path.write_text("".join(lines))
    with pytest.raises(CircuitError, match=re.escape(f"{path}:3: unknown token '<box>'")):
        load_benchmark(saved)


def test_missing_things_say_what_to_do(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match="circuit generate-benchmark --config"):
        load_benchmark(tmp_path / "nowhere")
    with pytest.raises(CircuitError, match=r"unknown split 'tests'; expected train, heldout"):
        load_benchmark(saved, ["tests"])
    lazily, whole = load_benchmark(saved, []), load_benchmark(saved)
    assert (list(lazily.splits), list(whole.splits)) == ([], list(whole.files))
    assert {name: lazily.records(name) for name in whole.files} == whole.splits
    unread = load_benchmark(saved, [])
    (saved / "train.jsonl").unlink()
    with pytest.raises(CircuitError, match=r"train.jsonl: no such file"):
        load_benchmark(saved, ["train"])
    with pytest.raises(CircuitError, match=r"train.jsonl: no such file"):
        unread.records("train")


def edit_seed(payload: Any) -> None:
    payload["config"]["seed"] += 1


def edit_pair(payload: Any) -> None:
    payload["heldout_pairs"].pop()


def edit_sha(payload: Any) -> None:
    payload["splits"]["train"]["sha256"] = "0" * 64


def edit_vocabulary(payload: Any) -> None:
    payload["vocabulary"][5] = "K99"


def edit_extra(payload: Any) -> None:
    payload["note"] = "mine"


def edit_version(payload: Any) -> None:
    payload["schema_version"] = 0


def edit_name(payload: Any) -> None:
    payload["name"] = "other"


def edit_figure(payload: Any) -> None:
    payload["figures"]["splits"]["train"]["writes"] += 1


@pytest.mark.parametrize(
    "edit",
    [
        edit_seed,
        edit_pair,
        edit_sha,
        edit_vocabulary,
        edit_extra,
        edit_version,
        edit_name,
        edit_figure,
    ],
)
def test_edited_metadata_is_refused(saved: Path, edit: Callable[[Any], None]) -> None:
    path = saved / "metadata.json"
    payload = json.loads(path.read_text())
    edit(payload)
    path.write_text(json.dumps(payload))
    with pytest.raises(CircuitError, match=re.escape(f"{path}: ") + ".*generate the benchmark"):
        load_benchmark(saved, ["train"])


def test_another_benchmark_has_another_digest(small: Benchmark) -> None:
    other = generate_benchmark(small.config.model_copy(update={"seed": 4}))
    assert other.digest != small.digest
