"""A run of weights that were trained elsewhere: `circuit import-checkpoints`.

A series of files (circuit/training/foreign.py) becomes a run's folder: `run_config.json`, which
holds what is known (the benchmark, the model's shape, the files with their digests) and no recipe,
and `checkpoints/step_NNNNNN.pt`, which hold weights and no optimizer moments, and say so. What only
needs weights works on it; what would take a step is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from circuit.artifacts import OutputFolder
from circuit.config import parse_config
from circuit.errors import CircuitError
from circuit.reading import MissingFileError, checked_path, read_bytes, read_json
from circuit.tasks.benchmark import Benchmark, load_benchmark
from circuit.train_config import ImportedConfig, ModelConfig, TrainConfig
from circuit.training.checkpoints import (
    STEP_FILES,
    TrainState,
    checkpoint_name,
    encode_checkpoint,
)
from circuit.training.foreign import (
    SUFFIXES,
    absent_biases,
    fitted,
    infer_model,
    is_tied,
    read_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

COMMAND = "import-checkpoints"
RUN_CONFIG = "run_config.json"
FILES = (RUN_CONFIG, STEP_FILES)
TRACKED = ("validation_iid", "heldout_pairs")
"""Splits that `evaluate` takes by default, where the benchmark has them."""

ASSUMED = {
    "act_fn": "gelu",
    "eps": 1e-5,
    "attention_dir": "causal",
    "use_attn_scale": True,
    "positional_embedding_type": "standard",
}
"""Settings that weights do not tell; a HookedTransformerConfig beside the files does."""
_FIELDS: dict[str, tuple[str, dict[Any, str]]] = {
    "act_fn": ("activation", {"gelu": "gelu", "relu": "relu"}),
    "normalization_type": ("normalization", {"LN": "layer_norm", None: "none"}),
}
"""Of these settings, those of which there are several here: field of the model, and its values."""

_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter)[-_ ]?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class ImportResult:
    """A run that was made of files.

    Attributes:
        config: of the run.
        folder: where it stands.
        files: written, relative to the folder.
    """

    config: ImportedConfig
    folder: Path
    files: list[str]


def import_checkpoints(
    paths: Sequence[str | Path],
    benchmark_dir: str | Path,
    output_dir: str | Path,
    *,
    steps: Sequence[int] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImportResult:
    """Make a run of files of weights.

    Args:
        paths: files, or folders of them.
        benchmark_dir: of the benchmark that the model was trained on.
        output_dir: the run's folder.
        steps: one a file, in their order; None takes them from the files' names.
        overwrite: replace an earlier import there, and nothing else.
        progress: called with files done and their number.

    Raises:
        CircuitError: a file is missing, damaged, holds more than tensors, or is no model of this
            study or of this benchmark; a step is not told or told twice; the folder is not free.
    """
    files = list_files(paths)
    by_step = dict(sorted(zip(steps_of(files, steps), files, strict=True)))
    told = told_settings(files)
    report = progress or (lambda done, total: None)
    with OutputFolder(output_dir, COMMAND, writes=FILES, overwrite=overwrite) as folder:
        names = [RUN_CONFIG, *(f"checkpoints/{checkpoint_name(step)}" for step in by_step)]
        folder.refuse_foreign(names)
        benchmark = load_benchmark(benchmark_dir, splits=[])
        config = _survey(by_step, benchmark, Path(benchmark_dir), folder.root, told)
        folder.clear(planned=names)
        for done, entry in enumerate(config.imported.files, start=1):
            path = by_step[entry.step]
            digest, tensors = _read(path)
            if digest != entry.sha256:
                raise CircuitError("has changed while it was imported", where=path)
            state = TrainState(
                step=entry.step,
                config=config,
                benchmark_digest=benchmark.digest,
                parameters=fitted(tensors, config.model, benchmark.vocabulary.size, path),
                moments=None,
            )
            folder.write_bytes(
                f"checkpoints/{checkpoint_name(entry.step)}", encode_checkpoint(state)
            )
            report(done, len(by_step))
        folder.write_text(RUN_CONFIG, config.to_json())  # last: a run is there when it is whole
        return ImportResult(config, folder.root, folder.owned)


def list_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that are named, and those in the folders that are, by name.

    Raises:
        CircuitError: there is none, or one does not exist.
    """
    files: list[Path] = []
    for path in map(checked_path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in SUFFIXES)
            if not inside:
                raise CircuitError(
                    "holds no file of weights", where=path, expected=", ".join(SUFFIXES)
                )
            files += inside
        elif path.exists():  # a pipe or a device is refused where it is read
            files.append(path)
        else:
            raise CircuitError("no such file or folder", where=path)
    if not files:
        raise CircuitError("no file is named", expected="files of weights, or folders of them")
    return files


def steps_of(files: Sequence[Path], given: Sequence[int] | None = None) -> list[int]:
    """The step of each file: as given, else from its name (`step_000100`, `checkpoint-100`, `100`).

    Raises:
        CircuitError: a name tells none, or several; two files have the same; or the numbers of
            files and steps differ.
    """
    if given and len(given) != len(files):
        raise CircuitError(
            f"{len(given)} steps for {len(files)} files",
            expected="one step a file, in the order of the files, or none",
        )
    steps = list(given) if given else [_named_step(path) for path in files]
    for step, path in zip(steps, files, strict=True):
        if steps.count(step) > 1:
            same = [str(f) for s, f in zip(steps, files, strict=True) if s == step]
            raise CircuitError(f"{len(same)} files of step {step}: {', '.join(same)}", where=path)
    return steps


def _named_step(path: Path) -> int:
    numbers = _STEP.findall(path.stem) or re.findall(r"\d+", path.stem)
    if len(numbers) != 1:
        raise CircuitError(
            "its name tells "
            + (f"several numbers: {', '.join(numbers)}" if numbers else "no step"),
            where=path,
            expected="a name such as step_000100.safetensors or checkpoint-100.pt",
            fix="rename it, or give the step of every file",
        )
    return int(numbers[0])


def _survey(
    by_step: dict[int, Path],
    benchmark: Benchmark,
    benchmark_dir: Path,
    folder: Path,
    told: dict[str, Any],
) -> ImportedConfig:
    """Read every file once: the config of the run that they make, or the first refusal."""
    model: ModelConfig | None = None
    files: list[dict[str, Any]] = []
    tied, zero = True, None
    for step, path in by_step.items():
        digest, tensors = _read(path)
        model = model or model_of(tensors, path, told)
        untied = model.model_copy(update={"tied_unembedding": False})
        whole = fitted(tensors, untied, benchmark.vocabulary.size, path)
        tied = tied and is_tied(whole)
        absent = absent_biases(tensors, model)
        if zero is not None and absent != zero:
            raise CircuitError(
                "holds other kinds of biases than the files before it",
                where=path,
                expected=f"all but {', '.join(zero) or 'none'}",
            )
        zero = absent
        files.append({"step": step, "file": path.name, "sha256": digest})
    assert model is not None
    splits = [name for name in TRACKED if name in benchmark.files] or list(benchmark.files)
    known = {
        "name": folder.resolve().name,
        "output_dir": str(folder),
        "benchmark_dir": str(benchmark_dir),
        "model": model.model_copy(update={"tied_unembedding": tied}).model_dump(mode="json"),
        "tracked_splits": splits,
        "imported": {
            "files": files,
            "zero": zero,
            "assumed": {
                name: value
                for name, value in ASSUMED.items()
                if name not in told and not (model.attention_only and name == "act_fn")
            },
        },
    }
    return cast(ImportedConfig, parse_config(known, TrainConfig, where=folder))


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """sha256 of a file, and its tensors."""
    payload = read_bytes(path, overhead=4)  # and its tensors, as they stand and as float32
    return hashlib.sha256(payload).hexdigest(), read_tensors(path, payload)


def told_settings(files: Sequence[Path]) -> dict[str, Any]:
    """Settings that a HookedTransformerConfig beside the files tells: `config.json`.

    Raises:
        CircuitError: they are not those of this study's model, or the file is damaged.
    """
    told: dict[str, Any] = {}
    for path in dict.fromkeys(file.parent / "config.json" for file in files):
        try:
            payload = read_json(path, fix="repair it, or move it away")
        except MissingFileError:
            continue
        if not isinstance(payload, dict) or "act_fn" not in payload:
            continue  # of something else
        allowed = {name: [value] for name, value in ASSUMED.items()} | {"gated_mlp": [False]}
        allowed |= {name: list(values) for name, (_, values) in _FIELDS.items()}
        if payload.get("attn_only"):
            del allowed["act_fn"]  # of MLPs that there are not
        for name, values in allowed.items():
            if name in payload and payload[name] not in [told.get(name, value) for value in values]:
                expected = " or ".join(map(repr, values))
                raise CircuitError(f"{name} is {payload[name]!r}", where=path, expected=expected)
        known = {**ASSUMED, **_FIELDS, "attn_only": False}
        told |= {name: payload[name] for name in known if name in payload}
    return told


def model_of(tensors: dict[str, Tensor], path: Path, told: dict[str, Any]) -> ModelConfig:
    """The shape of a file's model, by its tensors and what is told beside it."""
    fields = {
        field: values[told[name]]
        for name, (field, values) in _FIELDS.items()
        if name in told and not (told.get("attn_only") and name == "act_fn")
    }
    model = infer_model(tensors, path, fields)
    if told.get("attn_only", model.attention_only) != model.attention_only:
        held = "no MLP" if model.attention_only else "MLPs"
        raise CircuitError(
            f"holds {held}, and attn_only is {told['attn_only']} in the config.json beside it",
            where=path,
        )
    return model
