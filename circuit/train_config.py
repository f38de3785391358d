"""The config of a training run: recipe, machine, places and bookkeeping in one flat file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidatorFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from circuit.config import (
    Config,
    FolderName,
    NonNegativeInt,
    PositiveInt,
    Sha256,
    digest_of,
    first_difference,
    load_config,
    parse_config,
)
from circuit.core.edit import Edit
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG, config_file

Device = Literal["cpu", "cuda", "mps"]
Kernels = Literal["fast", "plain"]
ModelKind = Literal["hooked_transformer", "bridge"]
RunSeed = Annotated[int, Field(ge=0, lt=2**32)]
"""What NumPy's RandomState takes (circuit/training/data_order.py)."""


MAX_STEPS = 10**9
"""Of a run: weeks at the speed of the smallest model, and more files and rows than can be kept."""

StepNumber = Annotated[int, Field(ge=0, le=MAX_STEPS)]

_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The least and largest normal number of the weights' type: what lies beyond is 0 or infinite."""


def _float32(value: float) -> float:
    if value and not _FLOAT32_MIN <= value <= _FLOAT32_MAX:
        became = "0" if value < 1 else "infinite"
        raise ValueError(
            f"is {became} in float32, of which numbers from {_FLOAT32_MIN:.2g} to"
            f" {_FLOAT32_MAX:.2g} can be held"
        )
    return value


Float32 = Annotated[float, AfterValidator(_float32)]


class ModelConfig(Config):
    """Kind, shape and initialization of the model (`circuit/model/`)."""

    layers: PositiveInt
    heads: PositiveInt
    d_model: PositiveInt
    d_ff: NonNegativeInt
    """Width of the MLPs; 0 is a model of attention alone, which has none."""
    max_sequence_length: Annotated[int, Field(ge=2)]
    dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Must be 0: a HookedTransformer has none."""
    initialization: Literal["pytorch_default", "gpt2", "transformer_lens"] = "pytorch_default"
    embedding_std: Annotated[Float32, Field(gt=0)] | None = None
    """Standard deviation of the initial embeddings; null is the scheme's own."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Of the MLPs; gelu is the exact one."""
    normalization: Literal["layer_norm", "none"] = "layer_norm"
    """Before attention, MLP and unembedding."""
    biases: bool = True
    """Whether linear maps and LayerNorms have biases; else they are zero and no parameters."""
    tied_unembedding: bool = True
    """Whether the unembedding is the embedding."""
    kind: ModelKind = "hooked_transformer"
    """What computes it, which decides bits: a HookedTransformer (TransformerLens before 4), or a
    `bridge` around the native model of TransformerLens 4."""

    unless_usual: ClassVar = ("activation", "normalization", "biases", "tied_unembedding", "kind")
    """Fields that are written only where they are not at their default: configs that know nothing
    of them have the dumps and digests that they always had."""

    @property
    def head_addresses(self) -> list[str]:
        """Every head, such as L2H1, layer by layer."""
        return [f"L{layer}H{head}" for layer in range(self.layers) for head in range(self.heads)]

    @property
    def attention_only(self) -> bool:
        """Whether there is no MLP."""
        return self.d_ff == 0

    @model_serializer(mode="wrap")
    def _without_the_usual(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        payload: dict[str, Any] = dump(self)
        for name in self.unless_usual:
            if getattr(self, name) == type(self).model_fields[name].default:
                payload.pop(name, None)
        return payload

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        if self.attention_only and self.activation != "gelu":
            raise ValueError(f"activation {self.activation!r} has no MLP to stand in: d_ff is 0")
        return self


class AdamWConfig(Config):
    """AdamW with decoupled weight decay on all parameters, one group."""

    name: Literal["adamw"]
    learning_rate: Annotated[Float32, Field(gt=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[Float32, Field(gt=0)] = 1e-8
    """If it were 0 in float32, a parameter whose gradient is 0 would become 0 / 0."""
    weight_decay: Annotated[Float32, Field(ge=0)] = 0.01

    @model_validator(mode="after")
    def _of_float32(self) -> AdamWConfig:
        """What weights and moments are multiplied with, at the most: torch refuses larger ones."""
        rate, first = self.learning_rate, 1 - self.beta1
        factors = {
            "learning_rate / (1 - beta1)": rate / first,
            "learning_rate * weight_decay": rate * self.weight_decay,
        }
        for name, factor in factors.items():
            if factor > _FLOAT32_MAX:
                raise ValueError(
                    f"{name} is {factor:.2g}; float32 holds numbers up to {_FLOAT32_MAX:.2g}"
                )
        return self


class SGDConfig(Config):
    """SGD with torch's coupled weight decay; `momentum` 0 is plain SGD."""

    name: Literal["sgd"]
    learning_rate: Annotated[Float32, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[Float32, Field(ge=0)] = 0.01


class ScheduleConfig(Config):
    """Linear warm-up over `warmup_steps`, then constant, or cosine/linear decay to a floor."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegativeInt = 0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step, as a fraction of the base rate (cosine and linear)."""


class BestConfig(Config):
    """Which evaluation selects `checkpoints/best.pt` (the largest value wins)."""

    split: str
    metric: Literal["answer_accuracy", "value_accuracy", "token_accuracy"] = "answer_accuracy"


class Recipe(Config):
    """What decides the weights of every step, given the benchmark."""

    seed: RunSeed
    kernels: Kernels = "fast"
    """Of forward and backward pass (circuit/model/kernels.py): they decide bits. `plain` is what
    TransformerLens wrote, and what every run recorded before there was a choice has used."""
    model: ModelConfig
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    batch_size: PositiveInt
    train_split: str = "train"
    optimizer: Annotated[AdamWConfig | SGDConfig, Field(discriminator="name")]
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    edit: Edit | None = None
    """What some steps of a counterfactual training do otherwise; written only where there is."""

    @model_serializer(mode="wrap")
    def _edit_where_there_is_one(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = dump(self)
        if written.pop("edit", None) is not None and self.edit is not None:
            written["edit"] = self.edit.to_json()
        return written

    def deciding(self) -> dict[str, Any]:
        """The fields that decide bits, as JSON: `steps` only where the schedule depends on it."""
        payload = self.model_dump(mode="json", include=set(Recipe.model_fields))
        steps = payload.pop("steps")
        return payload if self.schedule.name == "constant" else payload | {"steps": steps}

    def recipe_digest(self) -> str:
        """sha256 of the recipe: equal recipes on equal benchmarks are one run, bit for bit."""
        return digest_of(self.deciding())

    def recipe_difference(self, theirs: Recipe) -> str | None:
        """The first field of this recipe that another one has otherwise, with both values."""
        for kind, what in _VARIETIES.values():
            if isinstance(theirs, kind) != isinstance(self, kind):
                return f"one of them {what}"
        ours, others = self.deciding(), theirs.deciding()
        for field in dict.fromkeys((*ours, *others)):
            if others.get(field) != ours.get(field):
                return first_difference(field, others.get(field), ours.get(field))
        return None


class Machine(Config):
    """What executes the recipe; it decides bits too, so that a run records what it had."""

    device: Device = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Intra-op threads; null is torch's default on this machine. The number used is recorded."""


class Places(Config):
    """What a run is called and where it lies; one that lies elsewhere is the same run."""

    name: str
    output_dir: FolderName
    """Of a run's own `run_config.json` it is the folder that holds it, wherever that is now."""
    benchmark_dir: FolderName


class Bookkeeping(Config):
    """What is written down while the recipe runs; no weight depends on it."""

    log_every: PositiveInt = 50
    eval_every: PositiveInt = 1000
    checkpoint_every: PositiveInt = 250
    tracked_splits: list[str] = Field(default=["validation_iid", "heldout_pairs"])
    best: BestConfig = Field(default_factory=lambda: BestConfig(split="heldout_pairs"))


class TrainConfig(Bookkeeping, Recipe, Machine, Places):
    """One training run: four roles in one flat file."""

    @property
    def shape(self) -> ModelConfig | None:
        """The shape of the model, where it is known to be a HookedTransformer."""
        return self.model

    @property
    def module_words(self) -> str:
        """What was trained, to read."""
        shape = self.model
        return (
            f"{shape.layers} layers, {shape.heads} heads, d_model {shape.d_model},"
            f" {self.kernels} kernels"
        )

    @property
    def optimizer_words(self) -> str:
        """What trained it."""
        return self.optimizer.name

    def digest(self) -> str:
        """sha256 of what the run is; not of where it lies."""
        return digest_of(self.model_dump(mode="json", exclude=set(Places.model_fields)))

    @property
    def recipe_words(self) -> list[str]:
        """The option by which a command line names the run's own code; none of a run of a task."""
        return []

    def executing(self, code: str | None) -> Self:
        """Itself: nothing but this package's code is executed for it; see `RecipeConfig`.

        Raises:
            CircuitError: a recipe is named.
        """
        if code is not None:
            raise CircuitError(
                f"is of a task, and `recipe` {code} is named",
                where=f"run {self.name}",
                fix="leave it out",
            )
        return self

    @property
    def expected_benchmark(self) -> str | None:
        """Digest of the benchmark, where the config tells it."""
        return None

    def provenance(self, benchmark_digest: str | None) -> dict[str, Any]:
        """What a report records of the run that it is about; equal recipes are one run.

        Args:
            benchmark_digest: None of a recording without a task.
        """
        of_benchmark = {} if benchmark_digest is None else {"benchmark_digest": benchmark_digest}
        digests = {"config_digest": self.digest(), "recipe_digest": self.recipe_digest()}
        return {**self.origin(), **digests, **of_benchmark}

    @model_validator(mode="wrap")
    @classmethod
    def _of_a_variety(cls, payload: Any, read: ValidatorFunctionWrapHandler) -> TrainConfig:
        """A file with `imported` is that of an `ImportedConfig`, one with `recipe` of a recipe."""
        if cls is TrainConfig and isinstance(payload, dict):
            for key, (kind, _) in _VARIETIES.items():
                if key in payload:
                    return kind.model_validate(payload)
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
        if isinstance(self, PartialConfig):
            return self
        if self.model.kind == "bridge" and self.kernels != "plain":
            raise ValueError(
                "kernels 'fast' are those of a HookedTransformer, and model.kind is 'bridge': set"
                " kernels to 'plain'"
            )
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
        changed = {key: _as_written(value) for key, value in changes.items()}
        config = parse_config(payload | changed, TrainConfig, where=f"config {self.name}")
        return config.remembering(self)


def _as_written(value: Any) -> Any:
    """A value of a config as its file has it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value.to_json() if isinstance(value, Edit) else value


class ImportedFile(Config):
    """A file whose weights are a state of an imported run."""

    step: StepNumber
    file: str
    """Its name, without its folder."""
    sha256: Sha256


class Imported(Config):
    """What is known of a run that was trained elsewhere."""

    files: Annotated[list[ImportedFile], Field(min_length=1)]
    zero: list[str] = Field(default=[])
    """Kinds of biases that the files do not hold, such as `attn.b_Q`: exactly zero."""
    assumed: dict[str, Any] = Field(default={})
    """Settings of the model that weights do not tell, as HookedTransformerConfig names them."""


def _unknown() -> Any:
    """A field without a value, and without a place in the file."""
    return Field(default=None, exclude=True)


class PartialConfig(TrainConfig):
    """A run that lacks some of a config's fields: whoever asks for one is refused."""

    def refusal(self, name: str) -> CircuitError:
        """Why there is no such field, and what works without it."""
        raise NotImplementedError

    def __getattribute__(self, name: str) -> Any:
        field = type(self).model_fields.get(name)
        if field is not None and field.exclude:
            raise self.refusal(name)
        return super().__getattribute__(name)

    @model_validator(mode="after")
    def _unknown_stays_so(self) -> Self:
        lacking = {name for name, field in type(self).model_fields.items() if field.exclude}
        refused = sorted(lacking & self.model_fields_set)
        if refused:
            raise ValueError(f"'{refused[0]}' {self._no_such_field}")
        return self

    _no_such_field: ClassVar[str]


class ForeignConfig(PartialConfig):
    """A run that was trained by something else: it has weights, and no recipe."""

    seed: RunSeed = _unknown()
    steps: int = _unknown()
    batch_size: PositiveInt = _unknown()
    train_split: str = _unknown()
    optimizer: AdamWConfig | SGDConfig = _unknown()
    schedule: ScheduleConfig = _unknown()
    gradient_clip: float | None = _unknown()
    edit: Edit | None = _unknown()
    log_every: PositiveInt = _unknown()
    eval_every: PositiveInt = _unknown()
    checkpoint_every: PositiveInt = _unknown()
    best: BestConfig = _unknown()

    @model_serializer(mode="wrap")
    def _edit_where_there_is_one(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """There is none; nor is it known how the weights began."""
        written: dict[str, Any] = dump(self)
        for unknown in ("initialization", "embedding_std"):
            (written["model"] or {}).pop(unknown, None)
        return written


class ImportedConfig(ForeignConfig):
    """A run of which weights at some steps are known, and no recipe (circuit/training/imported.py).

    What only needs the weights works, and whatever would take a step does not.
    """

    imported: Imported
    kernels: Kernels = "plain"

    _no_such_field = "belongs to a recipe, and an imported run has none"

    def refusal(self, name: str) -> CircuitError:
        """See `PartialConfig.refusal`."""
        return CircuitError(
            f"'{name}' is not known: the run was trained elsewhere and imported, so no step of"
            " it can be taken, neither to train on nor to trace",
            where=f"config {self.name}",
            expected="a run of `circuit train`",
            fix="reports on its checkpoints work",
        )

    def deciding(self) -> dict[str, Any]:
        """What decides the weights: the files that they were read from, and their shape."""
        payload = self.model_dump(mode="json")
        files = json.dumps(payload["imported"], sort_keys=True).encode()
        imported = {"imported": hashlib.sha256(files).hexdigest()[:16]}
        return imported | {field: payload[field] for field in ("model", "kernels")}


class RecipeFile(Config):
    """A class of somebody's own that says what steps are made of (circuit/training/own_recipe.py).

    Nothing is ever executed because a config names it: whoever runs the code names it again.
    """

    file: str
    """Its name, without its folder."""
    name: str
    """The class."""
    sha256: Sha256
    """Of the file."""
    imports: dict[str, Sha256] | None = None
    """Of what it imports from beside itself, and that in turn, by name; null of a run from before
    it was looked at."""

    @property
    def word(self) -> str:
        """`FILE:NAME`, as a command line has it."""
        return f"{self.file}:{self.name}"


class RecipeConfig(PartialConfig):
    """A run of a recipe of somebody's own: module, batches, losses and optimizer are its code."""

    recipe: RecipeFile
    tracked_splits: list[str] = Field(default=[], max_length=0)
    benchmark_dir: FolderName = _unknown()
    kernels: Kernels = _unknown()
    model: ModelConfig = _unknown()
    batch_size: PositiveInt = _unknown()
    train_split: str = _unknown()
    optimizer: AdamWConfig | SGDConfig = _unknown()
    schedule: ScheduleConfig = _unknown()
    gradient_clip: float | None = _unknown()
    eval_every: PositiveInt = _unknown()
    best: BestConfig = _unknown()

    _no_such_field = "belongs to a task, and a run of a recipe has none"
    _code: str | None = PrivateAttr(default=None)

    @property
    def code(self) -> str | None:
        """`FILE:NAME`, where whoever uses the config has named it; only then it is executed."""
        return self._code

    @property
    def recipe_words(self) -> list[str]:
        """See `TrainConfig.recipe_words`; the file's name alone, where nobody has named it."""
        return ["--recipe", self.code or self.recipe.word]

    def executing(self, code: str | None) -> Self:
        """A copy whose recipe may be executed, from a file that is named here and now."""
        copied = self.model_copy()
        copied._code = code
        return copied

    def remembering(self, other: Config) -> Self:
        """See `Config.remembering`; the code that may be executed stays, too."""
        copied = super().remembering(other)
        copied._code = other.code if isinstance(other, RecipeConfig) else None
        return copied

    @property
    def shape(self) -> None:
        """None: of a recipe's module nothing is known."""

    @property
    def module_words(self) -> str:
        """See `TrainConfig.module_words`."""
        return f"of the recipe {self.recipe.word}"

    @property
    def optimizer_words(self) -> str:
        """See `TrainConfig.optimizer_words`."""
        return f"that of {self.recipe.word}"

    def refusal(self, name: str) -> CircuitError:
        """See `PartialConfig.refusal`."""
        return CircuitError(
            f"has no {_WORDS.get(name, name)}: it is of the recipe {self.recipe.word}, and of no"
            " task",
            where=f"run {self.name}",
            expected="a run of a task",
            fix="what needs none works: trace show, verify, checkout, attribute, data, influence"
            " and counterfactual",
        )

    def deciding(self) -> dict[str, Any]:
        """What decides the weights: the code, the seed that it is given, what is otherwise."""
        edit = {} if self.edit is None else {"edit": self.edit.to_json()}
        recipe = {"name": self.recipe.name, "sha256": self.recipe.sha256}
        imports = {"imports": self.recipe.imports} if self.recipe.imports else {}
        return {"recipe": recipe | imports, "seed": self.seed, **edit}


class Recorded(Config):
    """Which recording a run is, and what makes the module that was trained."""

    module: str
    """`FILE.py:NAME` of a module, or of a function that makes one."""
    optimizers: list[str] = Field(default=[])
    """`FILE.py:NAME` of the classes of optimizers that are not torch's."""
    last_step: StepNumber
    parameters_sha256: Sha256
    """Of the parameters after the last step."""
    code: dict[str, Sha256] | None = None
    """Of the files that are named, and of what they import from beside themselves; null of an
    import from before they were looked at."""
    benchmark_digest: Sha256 | None = None
    """Of its task's benchmark, if it has one."""

    @property
    def names(self) -> list[str]:
        """All that names a file."""
        return [self.module, *self.optimizers]


class RecordedConfig(ForeignConfig):
    """A run of what `circuit.watch` recorded (circuit/reports/import_recording.py)."""

    recorded: Recorded
    benchmark_dir: FolderName | None = None  # type: ignore[assignment]  # `Setup` refuses to read it
    """Of its task, if it has one."""
    model: ModelConfig | None = None  # type: ignore[assignment]  # whoever reads it is refused
    """The shape of a HookedTransformer that reads whole records; null of any other module."""
    tracked_splits: list[str] = Field(default=[])
    kernels: Kernels = "plain"

    _no_such_field = "belongs to a recipe, and a recording has none"

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "model" and value is None:
            raise CircuitError(
                "the recorded module is no HookedTransformer that reads whole records, of which"
                " heads, stages and activations are known by name",
                where=f"config {self.name}",
                expected="a report on logits or on numbers of your own",
                fix="attribute a scalar of your own"
                if self.benchmark_dir is None
                else "attribute a scalar of your own, answer_scalar or loss; evaluate checkpoints",
            )
        return value

    def refusal(self, name: str) -> CircuitError:
        """See `PartialConfig.refusal`."""
        return CircuitError(
            f"'{name}' is not known: the run was recorded from a loop of somebody's own, so no step"
            " of it can be taken, neither to train on nor to trace",
            where=f"config {self.name}",
            expected="a run of `circuit train`",
            fix="attribution of its steps and reports on its checkpoints work",
        )

    @property
    def expected_benchmark(self) -> str | None:
        """See `TrainConfig.expected_benchmark`."""
        return self.recorded.benchmark_digest

    @property
    def shape(self) -> ModelConfig | None:
        """Of a HookedTransformer; None of any other module."""
        return cast("ModelConfig | None", self.__dict__["model"])

    def deciding(self) -> dict[str, Any]:
        """What decides the weights: which recording it is, and the module's shape."""
        payload = self.model_dump(mode="json")
        which = {name: payload["recorded"][name] for name in ("last_step", "parameters_sha256")}
        return {"recorded": which, "model": payload["model"]}


_WORDS = {"benchmark_dir": "benchmark"}

_VARIETIES: dict[str, tuple[type[PartialConfig], str]] = {
    "imported": (ImportedConfig, "was trained elsewhere and imported"),
    "recipe": (RecipeConfig, "is of a recipe file"),
    "recorded": (RecordedConfig, "was recorded from a loop of somebody's own"),
}
"""By the field that tells them."""


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
    path = config_file(where)
    if path.name != RUN_CONFIG:
        return load_config(path, TrainConfig, overrides)
    folder, cwd = Path(os.path.normpath(path.parent.absolute())), Path.cwd()
    # below the working directory, however it was named, so that equal runs give equal records
    # (of a name with a link and `..` the text may lead elsewhere)
    below = folder.is_relative_to(cwd) and folder.exists() and folder.samefile(path.parent)
    output = folder.relative_to(cwd) if below else path.parent
    run = {"output_dir": output.as_posix()}
    return load_config(path, TrainConfig, overrides, places=run)
