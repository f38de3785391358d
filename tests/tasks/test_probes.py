"""Probe sets: the same draw every time, of one benchmark and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit.errors import CircuitError
from circuit.tasks.benchmark import Benchmark, generate_benchmark
from circuit.tasks.probes import DEFAULT_SEED, draw_probe_set, read_probe_set

WriteInto = Callable[[Path], Callable[[str, str], None]]


@pytest.fixture
def probe(small: Benchmark, tmp_path: Path, write_into: WriteInto) -> Path:
    drawn = draw_probe_set(small, ["train", "heldout_pairs"], 12)
    drawn.save("probe_set.jsonl", write_into(tmp_path))
    return tmp_path / "probe_set.jsonl"


@given(st.integers(1, 30), st.integers(0, 99))
def test_a_probe_set_is_a_part_of_each_split(small: Benchmark, count: int, seed: int) -> None:
    names = ["heldout_pairs", "train"]
    drawn = draw_probe_set(small, names, count, seed)
    assert drawn == draw_probe_set(small, names, count, seed)
    assert drawn.metadata.counts == dict.fromkeys(names, count)
    for i, name in enumerate(names):
        records = drawn.records[i * count : (i + 1) * count]
        assert len(records) == count
        chosen = set(records)
        assert [record for record in small.records(name) if record in chosen] == records


def test_the_draw_depends_on_the_seed(small: Benchmark) -> None:
    draws = {tuple(draw_probe_set(small, ["train"], 12, seed).records) for seed in range(5)}
    assert len(draws) == 5


def test_a_loaded_probe_set_is_the_saved_one(small: Benchmark, probe: Path) -> None:
    drawn = draw_probe_set(small, ["train", "heldout_pairs"], 12, DEFAULT_SEED)
    assert read_probe_set(probe, small) == drawn
    metadata = json.loads((probe.parent / "probe_set.metadata.json").read_text())
    assert metadata["benchmark"] == "small"
    assert metadata["benchmark_digest"] == small.digest
    assert metadata["seed"] == 17
    assert metadata["counts"] == {"train": 12, "heldout_pairs": 12}


def test_a_probe_set_of_another_benchmark_is_refused(small: Benchmark, probe: Path) -> None:
    other = generate_benchmark(small.config.model_copy(update={"seed": 99}))
    message = (
        f"digest {small.digest[:12]}.*expected one of the benchmark in use.*{other.digest[:12]}"
    )
    with pytest.raises(CircuitError, match=message):
        read_probe_set(probe, other)


def test_any_flipped_bit_is_found(small: Benchmark, probe: Path) -> None:
    whole = probe.read_bytes()
    for offset in range(0, len(whole), 499):
        data = bytearray(whole)
        data[offset] ^= 1
        probe.write_bytes(bytes(data))
        with pytest.raises(CircuitError, match=re.escape(str(probe))):
            read_probe_set(probe, small)


def test_damaged_files_are_named(small: Benchmark, probe: Path) -> None:
    whole = probe.read_text()
    probe.write_text(whole[:-20])
    with pytest.raises(CircuitError, match=re.escape(f"{probe}:24: not valid JSON")):
        read_probe_set(probe, small)
    probe.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(CircuitError, match="23 records with sha256"):
        read_probe_set(probe, small)
    metadata = probe.parent / "probe_set.metadata.json"
    text = metadata.read_text()
    for found in re.finditer(r"\d", text):  # the seed, too, which decides nothing any more
        digit = str((int(found[0]) + 1) % 10)
        metadata.write_text(text[: found.start()] + digit + text[found.end() :])
        with pytest.raises(CircuitError, match=re.escape(str(metadata))):
            read_probe_set(probe, small)
    metadata.unlink()
    with pytest.raises(CircuitError, match=r"metadata.json: no such file.*generate-probe-set"):
        read_probe_set(probe, small)
    probe.unlink()
    with pytest.raises(CircuitError, match=r"probe_set.jsonl: no such file"):
        read_probe_set(probe, small)


def test_bad_arguments_are_refused(small: Benchmark) -> None:
    with pytest.raises(CircuitError, match="unknown split 'test'; expected train"):
        draw_probe_set(small, ["test"], 3)
    with pytest.raises(CircuitError, match="41 examples of split 'train'; expected 1 to 40"):
        draw_probe_set(small, ["train"], 41)
    with pytest.raises(CircuitError, match="at least one split"):
        draw_probe_set(small, [], 3)
    with pytest.raises(CircuitError, match="each named once"):
        draw_probe_set(small, ["train", "train"], 3)
    with pytest.raises(CircuitError, match=r"expected a name in .jsonl"):
        draw_probe_set(small, ["train"], 3).save("probe.json", lambda name, text: None)
