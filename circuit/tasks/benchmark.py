"""A benchmark in memory and on disk: `metadata.json` and one `<split>.jsonl` a split.

`metadata.json` holds the config, vocabulary, what the draw decided, every figure that the task
measured, and the sha256 and record count of each split. Its digest names the benchmark: config, the
draw's facts and the bytes of every split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from circuit.artifacts import OutputFolder, find_near
from circuit.config import Sha256, digest_of, parse_config
from circuit.documents import validated
from circuit.errors import CircuitError
from circuit.overrides import Overrides
from circuit.reading import MissingFileError, checked_path, read_json
from circuit.sizes import require_disk, require_memory
from circuit.tasks.base import Progress, Record, Stored, Task, TaskConfig, Vocabulary
from circuit.tasks.records import records_from_jsonl, records_to_jsonl
from circuit.tasks.registry import file_digest_of, find_task, source_digest

SCHEMA_VERSION, METADATA = 1, "metadata.json"

WriteFile = Callable[[str, str], None]
"""Writes a text under a file name, in a folder that the caller chose."""


class SplitFile(Stored):
    """One split's file: number of records (lines) and sha256 of its bytes."""

    records: Annotated[int, Field(ge=1)]
    sha256: Sha256


class BenchmarkMetadata(Stored):
    """The content of `metadata.json`; beside these fields stand the facts of the task's draw."""

    model_config = ConfigDict(extra="allow")

    schema_version: int
    name: str
    digest: Sha256
    splits: dict[str, SplitFile]
    config: dict[str, Any]
    figures: dict[str, Any]
    figures_sha256: Sha256 | None = None
    """Digest of the figures, which that of the benchmark leaves out; none in version 0.1."""
    vocabulary: list[str]
    task_sha256: Sha256 | None = None
    """Of the file of somebody's own task; left out of the file otherwise."""
    overrides: Overrides | None = None
    """Of the config; left out of the file where there are none."""


@dataclass(frozen=True)
class Benchmark:
    """A checked benchmark, or the splits of one that were loaded.

    Attributes:
        task: with its config; equal where the digest is, which names all that it is made of.
        facts: of the task's draw.
        splits: records by split name; a loaded benchmark holds the splits that were asked for.
        read: reads and verifies a split of a loaded benchmark.
        figures: everything the checks measured, and their warnings.
        files: record count and sha256 of every split's file, loaded or not.
        digest: sha256 that names the benchmark.
    """

    task: Task = field(compare=False)
    facts: BaseModel
    splits: dict[str, list[Record]]
    figures: Any
    files: dict[str, SplitFile]
    digest: str
    read: Callable[[str], list[Record]] | None = field(default=None, compare=False)

    @property
    def config(self) -> Any:
        """What it was generated from."""
        return self.task.config

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens."""
        return self.task.vocabulary

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
        figures = self.figures.model_dump(mode="json")
        metadata = BenchmarkMetadata(
            schema_version=SCHEMA_VERSION,
            name=self.config.name,
            digest=self.digest,
            splits=self.files,
            config=self.config.model_dump(mode="json"),
            figures=figures,
            figures_sha256=digest_of(figures),
            vocabulary=list(self.vocabulary.tokens),
        )
        payload = metadata.model_dump(mode="json", exclude={"overrides", "task_sha256"})
        source = source_digest(type(self.task))
        payload |= {} if source is None else {"task_sha256": source}
        payload |= self.facts.model_dump(mode="json") | self.config.origin()
        write(METADATA, json.dumps(payload, indent=1) + "\n")


def generate_benchmark(config: TaskConfig, progress: Progress | None = None) -> Benchmark:
    """Draw and check a benchmark; the same config gives the same bytes.

    Args:
        config: the benchmark's settings.
        progress: called with a split's name and its records so far, after each record.

    Raises:
        CircuitError: the settings cannot work, or the benchmark fails one of its checks.
    """
    require_memory(config.memory(), where=f"config {config.name}")
    task = find_task(config.benchmark_type)(config)
    drawn = task.draw(progress or (lambda split, done: None))
    files = {}
    for split, records in drawn.splits.items():
        data = records_to_jsonl(records, task.vocabulary).encode()
        files[split] = SplitFile(records=len(records), sha256=hashlib.sha256(data).hexdigest())
    figures = task.sizes(drawn.splits) if drawn.figures is None else drawn.figures
    digest = _digest(config, drawn.facts, files, source_digest(type(task)))
    return Benchmark(task, drawn.facts, drawn.splits, figures, files, digest)


def write_benchmark(
    config: TaskConfig,
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
        writes=("*.jsonl", METADATA),
        overwrite=overwrite,
    ) as folder:
        freed = folder.owned_bytes()
        require_disk(config.disk(), folder.root, freed=freed, where=config.name)
        benchmark = generate_benchmark(config, progress=progress)
        folder.clear(planned=[*(f"{split}.jsonl" for split in benchmark.splits), METADATA])
        paths: list[Path] = []
        benchmark.save(lambda name, text: paths.append(folder.write_text(name, text)))
    return benchmark, paths


def ensure_benchmark(task: str, folder: Path) -> None:
    """Draw the benchmark of a task with its settings' defaults into a folder that has none.

    Raises:
        CircuitError: a setting has no default, or the folder holds the benchmark of another task.
    """
    if (folder / METADATA).exists():
        there = load_benchmark(folder, splits=[]).config.benchmark_type
        if there != task:
            raise CircuitError(
                f"holds a benchmark of the task '{there}'", where=folder, expected=f"'{task}'"
            )
        return
    settings = {"name": folder.name, "benchmark_type": task, "output_dir": str(folder), "seed": 0}
    try:
        config = parse_config(settings, find_task(task).Config, where=folder)
    except CircuitError as error:
        raise CircuitError(
            f"holds no benchmark, and the task '{task}' has settings without a default:"
            f" {error.what}",
            where=folder,
            fix=_draw_into(folder),
        ) from None
    write_benchmark(config)


def find_benchmark(folder: str | Path, near: Path) -> Path:
    """Where the benchmark is that a config names; another folder of that name is none."""
    return find_near(Path(folder, METADATA), near).parent


def load_benchmark(folder: str | Path, splits: Sequence[str] | None = None) -> Benchmark:
    """Read a benchmark's metadata and the named splits (all by default), and verify them.

    The others are read when their records are asked for.

    Raises:
        CircuitError: the folder or a file is missing, a split is unknown, a line is no record, or
            a digest or count is not the recorded one; file and line are named.
    """
    folder = checked_path(folder)
    metadata, task, figures, facts = _read_metadata(folder)
    vocab, where = task.vocabulary, folder / METADATA
    if metadata.schema_version != SCHEMA_VERSION:
        raise _edited(where, f"schema version {metadata.schema_version}, not {SCHEMA_VERSION}")
    if metadata.name != task.config.name:
        raise _edited(where, f"name {metadata.name!r} is not {task.config.name!r} of its config")
    if metadata.digest != _digest(task.config, facts, metadata.splits, metadata.task_sha256):
        raise _edited(where, "the digest is not that of its config, facts and splits")
    if metadata.figures_sha256 not in (None, digest_of(metadata.figures)):
        raise _edited(where, "the digest of its figures is another")
    if metadata.vocabulary != list(vocab.tokens) or tuple(metadata.splits) != task.split_names:
        raise _edited(where, "vocabulary or splits are not those of its config")
    names = list(metadata.splits) if splits is None else list(splits)
    for name in names:
        if name not in metadata.splits:
            raise _unknown_split(name, metadata.splits, where=folder)
    return Benchmark(
        task=task,
        facts=facts,
        splits={name: _read_split(folder, name, metadata, vocab) for name in names},
        figures=figures,
        files=metadata.splits,
        digest=metadata.digest,
        read=lambda split: _read_split(folder, split, metadata, vocab),
    )


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


def _read_metadata(folder: Path) -> tuple[BenchmarkMetadata, Task, BaseModel, BaseModel]:
    path = folder / METADATA
    try:
        payload = read_json(path, missing="no benchmark in this folder", fix=_REGENERATE)
    except MissingFileError as error:
        raise CircuitError(
            error.what,
            where=folder,
            expected=METADATA,
            fix=f"{_draw_into(folder)}; of a run that was moved away from its data, bring them"
            " along, or start where they are",
        ) from None
    parse = partial(validated, expected=_AS_WRITTEN, fix=_REGENERATE)
    metadata = parse(payload, BenchmarkMetadata, where=path)
    task_name = str(metadata.config.get("benchmark_type"))
    digest = file_digest_of(task_name, path)  # no other code than the benchmark's is run
    kind = find_task(task_name, path) if digest in (None, metadata.task_sha256) else None
    if kind is None or metadata.task_sha256 != source_digest(kind):
        raise CircuitError(
            "the task's file is not the one that the benchmark was drawn with",
            where=metadata.config["benchmark_type"],
            fix="bring that back, or draw the benchmark again and train anew",
        )
    config = parse(metadata.config, kind.Config, where=f"{path}, config")
    require_memory(config.memory(), where=path)
    figures = parse(metadata.figures, kind.Figures, where=f"{path}, figures")
    facts = parse(metadata.model_extra, kind.Facts, where=path)
    return metadata, kind(config, facts), figures, facts


def _digest(
    config: TaskConfig, facts: BaseModel, files: Mapping[str, SplitFile], source: str | None
) -> str:
    """sha256 over the config's canonical JSON, the draw's facts and the splits' digests."""
    splits = {name: file.sha256 for name, file in files.items()}
    drawn = facts.model_dump(mode="json")
    if source is not None:
        drawn["task_sha256"] = source
    return digest_of({"config": config.model_dump(mode="json"), **drawn, "splits": splits})


def _edited(where: Path, what: str) -> CircuitError:
    return CircuitError(
        what,
        where=where,
        expected=_AS_WRITTEN,
        fix=_REGENERATE,
    )


def _draw_into(folder: Path) -> str:
    """How a benchmark comes into a folder: by the clone's config, where this is one and has it."""
    shipped = Path("configs/benchmark") / f"{folder.name}.json"
    if shipped.is_file():
        return f"draw it: `circuit generate-benchmark --config {shipped}`"
    return (
        "draw it: `circuit generate-benchmark --config FILE.json`, a config whose output_dir it is"
        " (a clone has some in configs/benchmark)"
    )


_AS_WRITTEN = "the file as `circuit generate-benchmark` wrote it"
_REGENERATE = "generate the benchmark again with `overwrite`"


def _unknown_split(split: str, known: dict[str, Any], where: object | None = None) -> CircuitError:
    return CircuitError(f"unknown split {split!r}", where=where, expected=", ".join(known))
