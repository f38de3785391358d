"""Every file under configs/ as a pydantic model; unknown keys are refused by name.

Two kinds of file: a benchmark (`BenchmarkConfig`) and a training run (`TrainConfig`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from circuit.errors import CircuitError
from circuit.overrides import Overrides, advice, apply_overrides, causes
from circuit.strict_json import parse_json

Device = Literal["cpu", "cuda", "mps"]
Kernels = Literal["fast", "plain"]
FolderName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
SplitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
RunSeed = Annotated[int, Field(ge=0, lt=2**32)]
"""What NumPy's RandomState takes (circuit/training/data_order.py)."""


def _digest_of(payload: dict[str, Any]) -> str:
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    _overrides: Overrides | None = PrivateAttr(default=None)

    @property
    def overrides(self) -> Overrides | None:
        """Which of the values a command line has set; no part of values, digest and dumps."""
        return self._overrides

    def origin(self) -> dict[str, Any]:
        """`{"overrides": ...}` for the record of what was made from this config; else empty."""
        return {} if self._overrides is None else {"overrides": self._overrides.to_json()}

    def remembering(self, other: _Config) -> Self:
        """A copy that tells the overrides of another config; the values stay."""
        made = self.model_copy()
        made._overrides = other._overrides
        return made

    def to_json(self, *, origin: bool = False) -> str:
        """The config as it is written to disk: indented, one trailing newline.

        Args:
            origin: with its overrides, if there are any; `load_config` reads them back.
        """
        payload = self.model_dump(mode="json") | (self.origin() if origin else {})
        return json.dumps(payload, indent=2) + "\n"

    def digest(self) -> str:
        """sha256 of the config's canonical JSON."""
        return _digest_of(self.model_dump(mode="json"))


class Range(_Config):
    """An inclusive range of integers."""

    min: NonNegativeInt
    max: NonNegativeInt

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class GeneratedSplit(_Config):
    """A split whose records are drawn by the generator (definitions.md section 1)."""

    samples: PositiveInt
    active_keys: Range
    overwrite_count: Range
    num_queries: Range
    query_lag: Range
    answer_pairs: Literal["seen", "heldout"] = "seen"


class CounterfactualSplit(_Config):
    """A split made from another one by changing the value of one write that some read needs."""

    samples: PositiveInt
    counterfactual_of: str


def _split_kind(value: Any) -> str:
    if isinstance(value, CounterfactualSplit):
        return "counterfactual"
    named = isinstance(value, dict) and "counterfactual_of" in value
    return "counterfactual" if named else "generated"


SplitConfig = Annotated[
    Annotated[GeneratedSplit, Tag("generated")]
    | Annotated[CounterfactualSplit, Tag("counterfactual")],
    Discriminator(_split_kind),
]


class BenchmarkConfig(_Config):
    """A symbolic latest-write key-value benchmark."""

    name: str
    benchmark_type: Literal["symbolic_kv_stream"]
    output_dir: FolderName
    seed: NonNegativeInt
    num_keys: Annotated[int, Field(ge=2)]
    num_values: Annotated[int, Field(ge=2)]
    holdout_answer_pair_fraction: Annotated[float, Field(gt=0, lt=1)]
    heuristic_max_accuracy: Annotated[float, Field(gt=0, le=1)]
    lag_sampling: Literal["eligible", "uniform"] = "eligible"
    splits: dict[SplitName, SplitConfig]

    @model_validator(mode="after")
    def _split_names(self) -> BenchmarkConfig:
        if len({name.casefold() for name in self.splits}) < len(self.splits):
            raise ValueError("two splits whose names differ in case alone")
        for name, split in self.splits.items():
            heldout = isinstance(split, GeneratedSplit) and split.answer_pairs == "heldout"
            if heldout != (name == "heldout_pairs") and isinstance(split, GeneratedSplit):
                raise ValueError(
                    f"splits.{name}.answer_pairs is {split.answer_pairs!r}: the split heldout_pairs"
                    " holds held-out pairs, and no other does"
                )
        return self

    @model_validator(mode="after")
    def _counterfactual_sources(self) -> BenchmarkConfig:
        for name, split in self.splits.items():
            if isinstance(split, CounterfactualSplit):
                source = self.splits.get(split.counterfactual_of)
                if not isinstance(source, GeneratedSplit):
                    raise ValueError(
                        f"splits.{name}.counterfactual_of names {split.counterfactual_of!r},"
                        " which is no generated split of this file"
                    )
                if split.samples > source.samples:
                    raise ValueError(
                        f"splits.{name}.samples is {split.samples}, more than the"
                        f" {source.samples} of its source {split.counterfactual_of!r}"
                    )
        return self


class ModelConfig(_Config):
    """Shape and initialization of the HookedTransformer (`circuit/model/build.py`)."""

    layers: PositiveInt
    heads: PositiveInt
    d_model: PositiveInt
    d_ff: PositiveInt
    max_sequence_length: Annotated[int, Field(ge=2)]
    dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Must be 0: a HookedTransformer has none."""
    initialization: Literal["pytorch_default", "gpt2"] = "pytorch_default"
    embedding_std: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the initial embeddings; null is the scheme's (1, or 0.02 for gpt2)."""
    tied_unembedding: bool = True
    """Whether the unembedding is the embedding. False is written, True is not: dumps and digests
    of configs that know no other are what they were."""

    @model_serializer(mode="wrap")
    def _without_the_usual(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        made: dict[str, Any] = dump(self)
        if self.tied_unembedding:
            made.pop("tied_unembedding", None)
        return made

    @model_validator(mode="after")
    def _head_width(self) -> ModelConfig:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        return self


class AdamWConfig(_Config):
    """AdamW with decoupled weight decay on all parameters, one group."""

    name: Literal["adamw"]
    learning_rate: Annotated[float, Field(gt=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class SGDConfig(_Config):
    """SGD with torch's coupled weight decay; `momentum` 0 is plain SGD."""

    name: Literal["sgd"]
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class ScheduleConfig(_Config):
    """Linear warm-up over `warmup_steps`, then constant, or cosine/linear decay to a floor."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegativeInt = 0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step, as a fraction of the base rate (cosine and linear)."""


class BestConfig(_Config):
    """Which evaluation selects `checkpoints/best.pt` (the largest value wins)."""

    split: str
    metric: Literal["answer_accuracy", "value_accuracy", "token_accuracy"] = "answer_accuracy"


class Recipe(_Config):
    """What decides the weights of every step, given the benchmark."""

    seed: RunSeed
    kernels: Kernels = "fast"
    """Of forward and backward pass (circuit/model/kernels.py): they decide bits. `plain` is what
    TransformerLens wrote, and what every run recorded before there was a choice has used."""
    model: ModelConfig
    steps: PositiveInt
    batch_size: PositiveInt
    train_split: str = "train"
    optimizer: Annotated[AdamWConfig | SGDConfig, Field(discriminator="name")]
    schedule: ScheduleConfig = ScheduleConfig()
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0

    def deciding(self) -> dict[str, Any]:
        """The fields that decide bits, as JSON: `steps` only where the schedule depends on it."""
        payload = self.model_dump(mode="json", include=set(Recipe.model_fields))
        steps = payload.pop("steps")
        return payload if self.schedule.name == "constant" else payload | {"steps": steps}

    def recipe_digest(self) -> str:
        """sha256 of the recipe: equal recipes on equal benchmarks are one run, bit for bit."""
        return _digest_of(self.deciding())

    def recipe_difference(self, theirs: Recipe) -> str | None:
        """The first field of this recipe that another one has otherwise, with both values."""
        if isinstance(theirs, ImportedConfig) != isinstance(self, ImportedConfig):
            return "one of them was trained elsewhere and imported"
        other = theirs.deciding()
        for field, value in self.deciding().items():
            if other.get(field) != value:
                return first_difference(field, other.get(field), value)
        return None


class Machine(_Config):
    """What executes the recipe; it decides bits too, so that a run records what it had."""

    device: Device = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Intra-op threads; null is torch's default on this machine. The number used is recorded."""


class Places(_Config):
    """What a run is called and where it lies; one that lies elsewhere is the same run."""

    name: str
    output_dir: FolderName
    """Of a run's own `run_config.json` it is the folder that holds it, wherever that is now."""
    benchmark_dir: FolderName


class Bookkeeping(_Config):
    """What is written down while the recipe runs; no weight depends on it."""

    log_every: PositiveInt = 50
    eval_every: PositiveInt = 1000
    checkpoint_every: PositiveInt = 250
    tracked_splits: list[str] = ["validation_iid", "heldout_pairs"]
    best: BestConfig = BestConfig(split="heldout_pairs")


class TrainConfig(Bookkeeping, Recipe, Machine, Places):
    """One training run: four roles in one flat file."""

    def digest(self) -> str:
        """sha256 of what the run is; not of where it lies."""
        return _digest_of(self.model_dump(mode="json", exclude=set(Places.model_fields)))

    def provenance(self, benchmark_digest: str) -> dict[str, Any]:
        """What a report records of the run that it is about; equal recipes are one run."""
        return {
            **self.origin(),
            "config_digest": self.digest(),
            "recipe_digest": self.recipe_digest(),
            "benchmark_digest": benchmark_digest,
        }

    @model_validator(mode="wrap")
    @classmethod
    def _trained_elsewhere(cls, payload: Any, read: ValidatorFunctionWrapHandler) -> TrainConfig:
        """A file with `imported` is that of an `ImportedConfig`."""
        if cls is TrainConfig and isinstance(payload, dict) and "imported" in payload:
            return ImportedConfig.model_validate(payload)
        return cast(TrainConfig, read(payload))

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_record(cls, payload: Any) -> Any:
        """Version 0.1.0 recorded `compile` and `optimizer.fused`, and ran plain kernels."""
        if not isinstance(payload, dict) or "compile" not in payload:
            return payload
        recorded = dict(payload)
        removed = {"compile": recorded.pop("compile")}
        if isinstance(recorded.get("optimizer"), dict):
            recorded["optimizer"] = dict(recorded["optimizer"])
            removed["optimizer.fused"] = recorded["optimizer"].pop("fused", False)
        for name, value in removed.items():
            if value is not False:
                raise ValueError(
                    f"'{name}' is {json.dumps(value)}, which only version 0.1.0 can run; remove it"
                    " for a run with the kernels of today"
                )
        return {"kernels": "plain", **recorded}

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if isinstance(self, ImportedConfig):
            return self
        if self.best.split not in self.tracked_splits:
            raise ValueError(
                f"best.split {self.best.split!r} is not among tracked_splits {self.tracked_splits}"
            )
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} exceeds steps {self.steps}"
            )
        return self

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other top-level values, validated like a file; it keeps its overrides.

        Raises:
            CircuitError: a value is not allowed.
        """
        payload = self.model_dump(mode="json")
        changed = {
            key: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            for key, value in changes.items()
        }
        made = parse_config(payload | changed, TrainConfig, where=f"config {self.name}")
        return made.remembering(self)


class ImportedFile(_Config):
    """A file whose weights are a state of an imported run."""

    step: NonNegativeInt
    file: str
    """Its name, without its folder."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Imported(_Config):
    """What is known of a run that was trained elsewhere."""

    files: Annotated[list[ImportedFile], Field(min_length=1)]
    zero: list[str] = []
    """Kinds of biases that the files do not hold, such as `attn.b_Q`: exactly zero."""
    assumed: dict[str, Any] = {}
    """Settings of the model that weights do not tell, as HookedTransformerConfig names them."""


def _unknown() -> Any:
    """A field without a value, and without a place in the file."""
    return Field(default=None, exclude=True)


class ImportedConfig(TrainConfig):
    """A run of which weights at some steps are known, and no recipe (circuit/training/imported.py).

    Whoever asks for a field of the recipe is refused with the reason: what only needs the weights
    works, and whatever would take a step does not.
    """

    imported: Imported
    kernels: Kernels = "plain"
    seed: RunSeed = _unknown()
    steps: PositiveInt = _unknown()
    batch_size: PositiveInt = _unknown()
    train_split: str = _unknown()
    optimizer: AdamWConfig | SGDConfig = _unknown()
    schedule: ScheduleConfig = _unknown()
    gradient_clip: float | None = _unknown()
    log_every: PositiveInt = _unknown()
    eval_every: PositiveInt = _unknown()
    checkpoint_every: PositiveInt = _unknown()
    best: BestConfig = _unknown()

    def __getattribute__(self, name: str) -> Any:
        if name in _UNKNOWN:
            raise CircuitError(
                f"'{name}' is not known: the run was trained elsewhere and imported, so no step of"
                " it can be taken, neither to train on nor to trace",
                where=f"config {self.name}",
                expected="a run of `circuit train`",
                fix="reports on its checkpoints work",
            )
        return super().__getattribute__(name)

    @model_validator(mode="after")
    def _no_recipe(self) -> Self:
        given = sorted(_UNKNOWN & self.model_fields_set)
        if given:
            raise ValueError(f"'{given[0]}' belongs to a recipe, and an imported run has none")
        return self

    def deciding(self) -> dict[str, Any]:
        """What decides the weights: the files that they were read from, and their shape."""
        payload = self.model_dump(mode="json")
        files = json.dumps(payload["imported"], sort_keys=True).encode()
        of = {"imported": hashlib.sha256(files).hexdigest()[:16]}
        return of | {field: payload[field] for field in ("model", "kernels")}

    @model_serializer(mode="wrap")
    def _without_initialization(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        made: dict[str, Any] = dump(self)
        for unknown in ("initialization", "embedding_std"):
            made["model"].pop(unknown, None)
        return made


_UNKNOWN = {name for name, field in ImportedConfig.model_fields.items() if field.exclude}


ConfigT = TypeVar("ConfigT", bound=_Config)


def load_config(
    path: str | Path,
    kind: type[ConfigT],
    overrides: Sequence[str] = (),
    *,
    places: Mapping[str, str] | None = None,
) -> ConfigT:
    """Read and validate one JSON config file.

    Args:
        path: the file.
        kind: `TrainConfig` or `BenchmarkConfig`.
        overrides: `field=value`, applied in order before validation (circuit/overrides.py); the
            config remembers them.
        places: fields that the file's place decides, whatever stands in it.

    Raises:
        CircuitError: the file is missing, is not JSON, or a field is unknown, missing, of the
            wrong type or out of range; the field is named by its path in the file. Or an override
            is none.
    """
    path = Path(path)
    payload = _read_json(path)
    earlier = None
    if isinstance(payload, dict) and _ORIGIN in payload:
        earlier = _parse_origin(payload.pop(_ORIGIN), path)
    if isinstance(payload, dict):
        payload |= places or {}
    payload = apply_overrides(payload, overrides, kind)
    made = parse_config(payload, kind, where=path, overrides=overrides)
    made._overrides = (
        Overrides(config=str(path), set=list(overrides), earlier=earlier) if overrides else earlier
    )
    return made


RUN_CONFIG = "run_config.json"
"""In the folder of a run: the values in use."""


def load_run_config(where: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A training config: a file, or the folder of a run.

    A run's own `run_config.json` speaks of the folder that holds it, whether the run was made there
    or has been copied or moved since; its benchmark is looked for above it.

    Args:
        where: as said.
        overrides: as for `load_config`; one of them may name another `output_dir`.

    Raises:
        CircuitError: as `load_config`.
    """
    path = Path(where)
    if (path / RUN_CONFIG).is_file():
        path = path / RUN_CONFIG
    if path.name != RUN_CONFIG:
        return load_config(path, TrainConfig, overrides)
    folder, here = Path(os.path.normpath(path.parent.absolute())), Path.cwd()
    # below the working directory, however it was named, so that equal runs give equal records
    named = folder.relative_to(here) if folder.is_relative_to(here) else path.parent
    run = {"output_dir": named.as_posix()}
    return load_config(path, TrainConfig, overrides, places=run)


_ORIGIN = "overrides"
"""Key of the record in a run_config.json."""


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CircuitError("no such config file", where=path, fix="check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CircuitError(f"cannot be read ({error})", where=path) from None
    try:
        return parse_json(text)
    except RecursionError:
        raise CircuitError("not valid JSON (nested too deeply)", where=path) from None
    except json.JSONDecodeError as error:
        raise CircuitError(
            f"not valid JSON ({error.msg})", where=f"{path}:{error.lineno}:{error.colno}"
        ) from None
    except ValueError as error:
        raise CircuitError(f"not valid JSON ({error})", where=path) from None


def _parse_origin(payload: Any, path: Path) -> Overrides:
    try:
        return Overrides.model_validate(payload)
    except ValidationError:
        raise CircuitError(
            f"field '{_ORIGIN}' is no record of overrides",
            where=path,
            fix="remove it; it is written by this program alone",
        ) from None


def parse_config(
    payload: Any, kind: type[ConfigT], *, where: object, overrides: Sequence[str] = ()
) -> ConfigT:
    """Validate a JSON payload that stands at `where` (a file name, used in messages).

    Args:
        payload: the JSON.
        kind: of config.
        where: as said.
        overrides: that are in the payload already; a complaint names those that it may be due to.

    Raises:
        CircuitError: as `load_config`.
    """
    try:
        return kind.model_validate_json(json.dumps(payload))
    except ValidationError as error:
        problems = error.errors()
        shown = "; ".join(_describe(item) for item in problems[:3])
        more = f" (+{len(problems) - 3} more)" if len(problems) > 3 else ""
        due = dict.fromkeys(o for item in problems for o in causes(_location(item), overrides))
        place = f"{where} with {', '.join(due)}" if due else where
        raise CircuitError(
            shown + more, where=place, fix=advice(problems) if due else None
        ) from None


# pydantic puts the tried member of a union into the location, behind the field (of `splits`, behind
# the split's name); it is no key of the file.
_UNION_TAG_AT = {"optimizer": 1, "splits": 2}


def _location(item: Any) -> tuple[str, ...]:
    """Path in the file of what a complaint is about."""
    location = [str(part) for part in item["loc"]]
    tag_at = _UNION_TAG_AT.get(location[0]) if location else None
    if tag_at is not None and tag_at < len(location):
        del location[tag_at]
    return tuple(location)


def _describe(item: Any) -> str:
    field = ".".join(_location(item)) or "(top level)"
    if item["type"] == "extra_forbidden":
        return f"unknown field '{field}'; remove it or correct its name"
    if item["type"] == "missing":
        return f"missing field '{field}'"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    if isinstance(given, dict | list):
        return f"field '{field}': {message}"
    shown = json.dumps(given)
    return f"field '{field}': {message}, got {shown if len(shown) < 80 else shown[:77] + '...'}"


def first_difference(field: str, theirs: Any, ours: Any) -> str:
    """The innermost field that differs, with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*ours, *theirs]:
            if theirs.get(key) != ours.get(key):
                return first_difference(f"{field}.{key}", theirs.get(key), ours.get(key))
    return f"{field} is {theirs!r} there and {ours!r} here"
