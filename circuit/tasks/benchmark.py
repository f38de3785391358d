"""A benchmark in memory and on disk: `metadata.json` and one `<split>.jsonl` a split.

`metadata.json` holds the config, vocabulary, held-out pairs, every figure of the checks, and the
sha256 and record count of each split. Its digest names the benchmark: config, held-out pairs and
the bytes of every split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from circuit.artifacts import OutputFolder
from circuit.benchmark_config import BenchmarkConfig
from circuit.config import Sha256
from circuit.errors import CircuitError
from circuit.overrides import Overrides
from circuit.reading import MissingFileError, checked_path, read_bytes, read_json, validated
from circuit.sizes import benchmark_disk, benchmark_memory, require_disk, require_memory
from circuit.tasks.checks import BenchmarkFigures, check_benchmark
from circuit.tasks.generator import Pair, Progress, draw_splits
from circuit.tasks.symbolic_kv import Record, Vocabulary, record_from_json, record_to_json

SCHEMA_VERSION = 1

_RECORD_OVERHEAD = 10
"""Bytes of memory for a byte of a split's file: of its text, its lines and its records."""

WriteFile = Callable[[str, str], None]
"""Writes a text under a file name, in a folder that the caller chose."""


class _Metadata(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SplitFile(_Metadata):
    """One split's file: number of records (lines) and sha256 of its bytes."""

    records: Annotated[int, Field(ge=1)]
    sha256: Sha256


class BenchmarkMetadata(_Metadata):
    """The content of `metadata.json`."""

    schema_version: int
    name: str
    digest: Sha256
    splits: dict[str, SplitFile]
    config: BenchmarkConfig
    figures: BenchmarkFigures
    vocabulary: list[str]
    heldout_pairs: list[tuple[str, str]]
    overrides: Overrides | None = None
    """Of the config; left out of the file where there are none."""


@dataclass(frozen=True)
class Benchmark:
    """A checked benchmark, or the splits of one that were loaded.

    Attributes:
        config: what it was generated from.
        vocabulary: its tokens.
        heldout_pairs: the held-out (key token id, value token id).
        splits: records by split name; a loaded benchmark holds the splits that were asked for.
        read: reads and verifies a split of a loaded benchmark.
        figures: everything the checks measured, and their warnings.
        files: record count and sha256 of every split's file, loaded or not.
        digest: sha256 that names the benchmark.
    """

    config: BenchmarkConfig
    vocabulary: Vocabulary
    heldout_pairs: frozenset[Pair]
    splits: dict[str, list[Record]]
    figures: BenchmarkFigures
    files: dict[str, SplitFile]
    digest: str
    read: Callable[[str], list[Record]] | None = field(default=None, compare=False)

    def records(self, split: str) -> list[Record]:
        """The records of a split in file order; read when they are first asked for.

        Raises:
            CircuitError: there is no such split, or its file is not what was written.
        """
        if split not in self.files:
            raise _unknown_split(split, self.files)
        if split not in self.splits:
            assert self.read is not None, "what was generated holds all of its splits"
            self.splits[split] = self.read(split)
        return self.splits[split]

    def save(self, write: WriteFile) -> None:
        """Write every split, then `metadata.json`, through `write(name, text)`.

        Raises:
            CircuitError: a split has to be read for it, and is not what was written.
        """
        for split in self.files:
            write(f"{split}.jsonl", records_to_jsonl(self.records(split), self.vocabulary))
        metadata = BenchmarkMetadata(
            schema_version=SCHEMA_VERSION,
            name=self.config.name,
            digest=self.digest,
            splits=self.files,
            config=self.config,
            figures=self.figures,
            vocabulary=list(self.vocabulary.tokens),
            heldout_pairs=_pair_tokens(self.heldout_pairs, self.vocabulary),
        )
        payload = metadata.model_dump(mode="json", exclude={"overrides"}) | self.config.origin()
        write("metadata.json", json.dumps(payload, indent=1) + "\n")


def generate_benchmark(config: BenchmarkConfig, progress: Progress | None = None) -> Benchmark:
    """Draw and check a benchmark; the same config gives the same bytes.

    Args:
        config: the benchmark's settings.
        progress: called with a split's name and its records so far, after each record.

    Raises:
        CircuitError: the settings cannot work, or the benchmark fails one of its checks.
    """
    require_memory(benchmark_memory(config), where=f"config {config.name}")
    vocab = Vocabulary(config.num_keys, config.num_values)
    heldout_pairs, splits = draw_splits(config, progress)
    figures = check_benchmark(config, vocab, heldout_pairs, splits)
    files = {}
    for split, records in splits.items():
        data = records_to_jsonl(records, vocab).encode()
        files[split] = SplitFile(records=len(records), sha256=hashlib.sha256(data).hexdigest())
    digest = _digest(config, _pair_tokens(heldout_pairs, vocab), files)
    return Benchmark(config, vocab, heldout_pairs, splits, figures, files, digest)


def write_benchmark(
    config: BenchmarkConfig,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[Benchmark, list[Path]]:
    """Generate a benchmark into its output_dir.

    Args:
        overwrite: replace the files of an earlier benchmark there, and no others.
        progress: as in `generate_benchmark`.

    Returns:
        The benchmark and the files written.

    Raises:
        CircuitError: as `generate_benchmark`; or the folder is not free.
    """
    with OutputFolder(
        config.output_dir,
        "generate-benchmark",
        writes=("*.jsonl", "metadata.json"),
        overwrite=overwrite,
    ) as folder:
        freed = folder.owned_bytes()
        require_disk(benchmark_disk(config), folder.root, freed=freed, where=config.name)
        made = generate_benchmark(config, progress=progress)
        folder.clear(planned=[*(f"{split}.jsonl" for split in made.splits), "metadata.json"])
        paths: list[Path] = []
        made.save(lambda name, text: paths.append(folder.write_text(name, text)))
    return made, paths


def load_benchmark(folder: str | Path, splits: Sequence[str] | None = None) -> Benchmark:
    """Read a benchmark's metadata and the named splits (all by default), and verify them.

    The others are read when their records are asked for.

    Raises:
        CircuitError: the folder or a file is missing, a split is unknown, a line is no record, or
            a digest or count is not the recorded one; file and line are named.
    """
    folder = checked_path(folder)
    metadata = _read_metadata(folder)
    config = metadata.config
    vocab = Vocabulary(config.num_keys, config.num_values)
    where = folder / "metadata.json"
    if len(metadata.vocabulary) != vocab.size:  # before one of that size is made
        raise _edited(where, f"{len(metadata.vocabulary)} tokens, not {vocab.size} as its config")
    if metadata.schema_version != SCHEMA_VERSION:
        raise _edited(where, f"schema version {metadata.schema_version}, not {SCHEMA_VERSION}")
    if metadata.name != config.name:
        raise _edited(where, f"name {metadata.name!r} is not {config.name!r} of its config")
    if metadata.digest != _digest(config, metadata.heldout_pairs, metadata.splits):
        raise _edited(where, "the digest is not that of its config, pairs and splits")
    if metadata.vocabulary != list(vocab.tokens) or metadata.splits.keys() != config.splits.keys():
        raise _edited(where, "vocabulary or splits are not those of its config")
    wanted = list(metadata.splits) if splits is None else list(splits)
    for name in wanted:
        if name not in metadata.splits:
            raise _unknown_split(name, metadata.splits, where=folder)
    heldout_pairs = frozenset(
        (key, value)
        for pair in metadata.heldout_pairs
        for key, value in [vocab.encode(" ".join(pair))]
    )
    return Benchmark(
        config=config,
        vocabulary=vocab,
        heldout_pairs=heldout_pairs,
        splits={name: _read_split(folder, name, metadata, vocab) for name in wanted},
        figures=metadata.figures,
        files=metadata.splits,
        digest=metadata.digest,
        read=lambda split: _read_split(folder, split, metadata, vocab),
    )


def records_to_jsonl(records: Sequence[Record], vocab: Vocabulary) -> str:
    """The records as JSON Lines, one object a line, each line ended by a newline."""
    return "".join([record_to_json(record, vocab) + "\n" for record in records])


def records_from_jsonl(path: Path, vocab: Vocabulary) -> tuple[list[Record], str]:
    """The records of a JSONL file, and the sha256 of its bytes.

    Raises:
        CircuitError: the file is missing or a line is no record; file and line are named.
    """
    data = read_bytes(path, overhead=_RECORD_OVERHEAD)
    records = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise CircuitError("not valid UTF-8", where=where) from None
        records.append(record_from_json(text, vocab, where=where))
    return records, hashlib.sha256(data).hexdigest()


def _read_split(
    folder: Path, name: str, metadata: BenchmarkMetadata, vocab: Vocabulary
) -> list[Record]:
    path = folder / f"{name}.jsonl"
    records, sha256 = records_from_jsonl(path, vocab)
    for number, record in enumerate(records, start=1):
        if record.split != name:
            raise CircuitError(
                f"record of split {record.split!r}", where=f"{path}:{number}", expected=repr(name)
            )
    expected = metadata.splits[name]
    if len(records) != expected.records:
        raise _edited(path, f"{len(records)} records, but metadata.json says {expected.records}")
    if sha256 != expected.sha256:
        raise _edited(path, f"sha256 {sha256} is not {expected.sha256} of metadata.json")
    return records


def _read_metadata(folder: Path) -> BenchmarkMetadata:
    path = folder / "metadata.json"
    try:
        payload = read_json(path, missing="no benchmark in this folder", fix=_REGENERATE)
    except MissingFileError as error:
        raise CircuitError(
            error.what,
            where=folder,
            expected="metadata.json",
            fix="run `circuit generate-benchmark --config configs/benchmark/<name>.json`; of a run"
            " that was moved away from its data, bring them along, or start where they are",
        ) from None
    return validated(payload, BenchmarkMetadata, where=path, expected=_AS_WRITTEN, fix=_REGENERATE)


def _digest(
    config: BenchmarkConfig, heldout_pairs: Sequence[tuple[str, str]], files: dict[str, SplitFile]
) -> str:
    """sha256 over the config's canonical JSON, the held-out pairs and the splits' digests."""
    payload = {
        "config": config.model_dump(mode="json"),
        "heldout_pairs": [list(pair) for pair in heldout_pairs],
        "splits": {name: file.sha256 for name, file in files.items()},
    }
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _pair_tokens(pairs: frozenset[Pair], vocab: Vocabulary) -> list[tuple[str, str]]:
    return [(vocab.tokens[key], vocab.tokens[value]) for key, value in sorted(pairs)]


def _edited(where: Path, what: str) -> CircuitError:
    return CircuitError(
        what,
        where=where,
        expected=_AS_WRITTEN,
        fix=_REGENERATE,
    )


_AS_WRITTEN = "the file as `circuit generate-benchmark` wrote it"
_REGENERATE = "generate the benchmark again with --overwrite"


def _unknown_split(split: str, known: dict[str, Any], where: object | None = None) -> CircuitError:
    return CircuitError(f"unknown split {split!r}", where=where, expected=", ".join(known))
