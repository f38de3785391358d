"""Fixed probe sets: a few records of chosen splits of one benchmark (definitions.md section 1).

A probe set is one JSONL in the record format. Beside it `<name>.metadata.json` names the benchmark
that it was drawn from; a probe set of another benchmark is refused.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from circuit.artifacts import OutputFolder, dump_json
from circuit.config import Sha256
from circuit.documents import validated
from circuit.errors import CircuitError
from circuit.folders import metadata_path, no_probe_set
from circuit.reading import MissingFileError, checked_path, read_json
from circuit.sealed import sealed, unsealed
from circuit.tasks.base import Record, Stored, Task
from circuit.tasks.benchmark import Benchmark, WriteFile, load_benchmark
from circuit.tasks.records import records_from_jsonl, records_to_jsonl

DEFAULT_SEED = 17
_SCHEMA_VERSION = 1
_ANEW = "draw the probe set again with `overwrite`"


class ProbeSetMetadata(Stored):
    """The content of `<name>.metadata.json`.

    Attributes:
        benchmark, benchmark_digest: name and digest of the benchmark drawn from.
        seed: seed of the draw.
        counts: number of records by split, in the order of the file.
        sha256: of the JSONL's bytes.

    Beside them stand the size of each of the task's token sets, such as `num_keys`, and a digest of
    all that the file says.
    """

    model_config = ConfigDict(extra="allow")

    schema_version: int
    benchmark: str
    benchmark_digest: Sha256
    seed: int
    counts: dict[str, Annotated[int, Field(ge=1)]]
    sha256: Sha256


@dataclass(frozen=True)
class ProbeSet:
    """Records drawn from a benchmark, split by split, in the benchmark's file order."""

    records: list[Record]
    metadata: ProbeSetMetadata
    task: Task = field(compare=False)

    def save(self, name: str, write: WriteFile) -> None:
        """Write `name` (a file name that ends in `.jsonl`) and its metadata file.

        Raises:
            CircuitError: the name does not end in `.jsonl`.
        """
        write(name, records_to_jsonl(self.records, self.task.vocabulary))
        metadata = self.metadata.model_dump(mode="json")
        first = ("schema_version", "benchmark", "benchmark_digest", *_sizes(self.task))
        payload = sealed({key: metadata.pop(key) for key in first} | metadata)
        write(metadata_path(name).name, dump_json(payload))


def draw_probe_set(
    benchmark: Benchmark,
    splits: Sequence[str],
    examples_per_split: int,
    seed: int = DEFAULT_SEED,
) -> ProbeSet:
    """Draw `examples_per_split` records of each split, without replacement.

    Raises:
        CircuitError: a split is unknown, named twice or too small, or nothing is asked for.
    """
    if not splits or len(set(splits)) != len(splits):
        names = ", ".join(splits) or "(none)"
        raise CircuitError(f"splits {names}", expected="at least one split, each named once")
    rng = random.Random(seed)
    records: list[Record] = []
    for split in splits:
        available = benchmark.records(split)
        if not 1 <= examples_per_split <= len(available):
            raise CircuitError(
                f"{examples_per_split} examples of split {split!r}",
                expected=f"1 to {len(available)}",
                fix="change `examples_per_split`",
            )
        chosen = sorted(rng.sample(range(len(available)), examples_per_split))
        records += [available[i] for i in chosen]
    text = records_to_jsonl(records, benchmark.vocabulary)
    metadata = ProbeSetMetadata(
        schema_version=_SCHEMA_VERSION,
        benchmark=benchmark.config.name,
        benchmark_digest=benchmark.digest,
        seed=seed,
        counts=dict.fromkeys(splits, examples_per_split),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )
    metadata = metadata.model_copy(update=_sizes(benchmark.task))
    return ProbeSet(records, metadata, benchmark.task)


def write_probe_set(
    benchmark_dir: str | Path,
    output: str | Path,
    splits: Sequence[str],
    examples_per_split: int,
    *,
    seed: int = DEFAULT_SEED,
    overwrite: bool = False,
) -> tuple[ProbeSet, list[Path]]:
    """Draw a probe set of a benchmark on disk and write it.

    Args:
        output: the JSONL file; its metadata goes beside it.
        overwrite: replace an earlier probe set of that name, and nothing else.

    Returns:
        The probe set and the files written.

    Raises:
        CircuitError: as `load_benchmark` and `draw_probe_set`; or the names are not free.
    """
    output = Path(output)
    command = f"generate-probe-set.{output.stem}"
    names = [output.name, metadata_path(output).name]
    with OutputFolder(output.parent, command, writes=names, overwrite=overwrite) as folder:
        probe_set = draw_probe_set(
            load_benchmark(benchmark_dir, splits=splits), splits, examples_per_split, seed=seed
        )
        folder.clear(planned=names)
        paths: list[Path] = []
        probe_set.save(output.name, lambda name, text: paths.append(folder.write_text(name, text)))
    return probe_set, paths


def read_probe_set(path: str | Path, benchmark: Benchmark) -> ProbeSet:
    """Read and verify a probe set.

    Args:
        path: the JSONL file.
        benchmark: that it has to be of.

    Raises:
        CircuitError: a file is missing or was edited, or the set is of another benchmark.
    """
    path = checked_path(path)
    metadata = _read_metadata(path)
    if metadata.benchmark_digest != benchmark.digest:
        raise CircuitError(
            f"a probe set of benchmark {metadata.benchmark!r}"
            f" (digest {metadata.benchmark_digest[:12]})",
            where=path,
            expected=f"one of the benchmark in use (digest {benchmark.digest[:12]})",
            fix="run `circuit generate-probe-set` on this benchmark",
        )
    records, sha256 = records_from_jsonl(path, benchmark.vocabulary)
    if sha256 != metadata.sha256:
        raise CircuitError(
            f"{len(records)} records with sha256 {sha256}",
            where=path,
            expected=f"{sum(metadata.counts.values())} with {metadata.sha256}, as"
            f" {metadata_path(path).name} says",
            fix=_ANEW,
        )
    recorded = metadata.model_dump(mode="json")
    expected = recorded | _sizes(benchmark.task)
    expected |= {"schema_version": _SCHEMA_VERSION, "benchmark": benchmark.config.name}
    expected["counts"] = dict(Counter(record.split for record in records))
    for name in recorded.keys() | expected.keys():
        if recorded.get(name) != expected.get(name):
            raise CircuitError(
                f"field '{name}' is {recorded.get(name)}",
                where=metadata_path(path),
                expected=str(expected.get(name)),
                fix=_ANEW,
            )
    return ProbeSet(records, metadata, benchmark.task)


def _sizes(task: Task) -> dict[str, int]:
    return {f"num_{name}s": len(ids) for name, ids in task.token_sets.items()}


def _read_metadata(path: Path) -> ProbeSetMetadata:
    where = metadata_path(path)
    try:
        payload = read_json(where, fix=_ANEW)
    except MissingFileError:
        raise no_probe_set(path) from None
    if isinstance(payload, dict):
        payload = unsealed(payload, where=where, fix=_ANEW)
    return validated(payload, ProbeSetMetadata, where=where, fix=_ANEW)
