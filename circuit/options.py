"""What a report may be asked: options that are declared once, as fields, with their help.

From a declaration come the command line's option, its completion and its refusals; the guide's
table; the report's `parameters`; and the words that make the report again. A new option is one
field of a report's options, its use, and its test.

    class SpectrumOptions(CheckpointOptions):
        top_vector_ranks: Annotated[int, Option("Vectors of each matrix, at most.", least=1)] = 4

Nothing here imports torch: what options alone tell is refused before it is loaded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from circuit.errors import CircuitError
from circuit.numerals import whole_number
from circuit.reading import checked_path
from circuit.schemas import SIDES, SWITCH_BUCKETS

if TYPE_CHECKING:
    from circuit.tasks.base import Task
    from circuit.train_config import ModelConfig

OF_TASK = ("role", "single_role", "pair_type", "group_by", "subspace", "task_slice")
"""Kinds of values that the run's task says."""


def parse_window(text: str, where: str) -> tuple[int, int]:
    """Steps `a:b`, from state to state.

    Raises:
        CircuitError: it is no window.
    """
    start, end = (whole_number(part) for part in (text.partition(":")[::2]))
    if start is None or end is None or start >= end:
        expected = "a:b with a < b, such as 0:750"
        raise CircuitError(f"window '{text}'", where=where, expected=expected)
    return start, end


@dataclass(frozen=True)
class Option:
    """What is said of a field once.

    Attributes:
        help: what it is for, in one line.
        flag: of the command line, where it is not the field's name.
        choices: values that there are; none where they are not known beforehand.
        kind: what the values name: it is completed, and `head`, `mlp`, `component` and `stage` are
            held against the model (`Options.check_model`); those of `OF_TASK` against the task
            (`Options.check_task`).
        least, most: bounds that belong to the range.
        above, below: bounds that do not.
        folder: whether it is a folder that is written to.
        unset: what stands for a value that is not given, in words.
        earlier: name of the field in reports of schema 1.
        text: the value as the command line has it.
    """

    help: str
    flag: str = ""
    choices: tuple[str, ...] = ()
    kind: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    folder: bool = False
    unset: str = ""
    earlier: str = ""
    text: Callable[[Any], str] = str

    @property
    def of_task(self) -> bool:
        """Whether the run's task says which values there are."""
        return self.kind in OF_TASK

    def check(self, field: str, value: Any) -> None:
        """Refuse a value that is no choice, out of range (as NaN is), or that no path could be.

        Raises:
            CircuitError: names the field, the value and what there is.
        """
        if isinstance(value, str | Path):
            try:
                str(value).encode()
            except UnicodeEncodeError:
                raise CircuitError(repr(str(value)), where=f"`{field}`", expected="UTF-8") from None
        if isinstance(value, Path):
            checked_path(value)
            if self.folder and value.exists() and not value.is_dir():
                raise CircuitError(f"{value} is a file", where=f"`{field}`", expected="a folder")
        if self.choices and value not in self.choices:
            raise CircuitError(
                f"unknown value '{value}'",
                where=f"`{field}`",
                expected=f"one of {', '.join(self.choices)}",
            )
        bounds = (
            (self.least, "at least", operator.ge),
            (self.most, "at most", operator.le),
            (self.above, "more than", operator.gt),
            (self.below, "less than", operator.lt),
        )
        limits = [(words, bound, holds) for bound, words, holds in bounds if bound is not None]
        if not all(holds(value, bound) for _, bound, holds in limits):
            expected = " and ".join(f"{words} {bound:g}" for words, bound, _ in limits)
            raise CircuitError(str(value), where=f"`{field}`", expected=expected)
        if isinstance(value, int | float) and not abs(value) < 2**63:
            raise CircuitError(str(value), where=f"`{field}`", expected="less than 2^63 in size")

    def check_model(self, field: str, value: str, shape: ModelConfig) -> None:
        """Refuse a component or stage that a model of this shape does not have.

        Raises:
            CircuitError: names it.
        """
        from circuit.model.components import parse_component
        from circuit.model.stages import stage_hook

        kinds: dict[str, Literal["head", "MLP"]] = {"head": "head", "mlp": "MLP"}
        try:
            if self.kind == "stage":
                stage_hook(value, shape.layers, attention_only=shape.attention_only)
            elif self.kind in ("head", "mlp", "component"):
                parse_component(value, shape=shape, kind=kinds.get(self.kind))
        except CircuitError as error:
            raise CircuitError(
                error.what, where=f"`{field}`", expected=error.expected, fix=error.fix
            ) from None

    def check_task(self, field: str, value: str, task: Task) -> None:
        """Refuse what the run's task does not have.

        Raises:
            CircuitError: names the field, the value and what there is.
        """
        from circuit.model.subspaces import check_name
        from circuit.tasks.examples import check_single
        from circuit.tasks.groups import groups_of
        from circuit.tasks.pairs import check_pair_types

        checks: dict[str, Callable[[], None]] = {
            "role": lambda: task.check_roles(value),
            "single_role": lambda: check_single(task, value),
            "pair_type": lambda: check_pair_types(task, [value]),
            "group_by": lambda: _refuse_unless(value, groups_of(task)),
            "subspace": lambda: check_name(value, task.token_sets),
            "task_slice": lambda: task.check_slice(value),
        }
        if self.kind in checks:
            try:
                checks[self.kind]()
            except CircuitError as error:
                raise CircuitError(
                    error.what, where=f"`{field}`", expected=error.expected
                ) from None


def _refuse_unless(value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise CircuitError(f"unknown value '{value}'", expected=f"one of {', '.join(known)}")


class Options(BaseModel):
    """Options of a report: closed, frozen, and refused with the field's name.

    Every field carries an `Option`. A field that takes several values is a tuple: its flag is
    repeatable, no value may stand twice, and where it has values by default it may not be empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, defer_build=True)

    if not TYPE_CHECKING:  # the checker knows the fields' types from the declarations

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _refusal(error) from None

    @classmethod
    def declared(cls) -> dict[str, Option]:
        """Every field's declaration, in order."""
        return _declared(cls)

    @classmethod
    def flags(cls) -> dict[str, str]:
        """The command line's name of every field."""
        return {
            name: option.flag or f"--{name.replace('_', '-')}"
            for name, option in cls.declared().items()
        }

    def model_post_init(self, _: Any) -> None:
        """Refuse values that are out of range, then what does not go together."""
        for field, option in self.declared().items():
            info, value = type(self).model_fields[field], getattr(self, field)
            if isinstance(value, tuple):
                if not value and (info.is_required() or info.default):
                    raise CircuitError("nothing", where=f"`{field}`", expected="at least one")
                if len(set(value)) < len(value):
                    shown = ", ".join(map(option.text, value))
                    raise CircuitError(shown, where=f"`{field}`", expected="each once")
            for one in _each(value):
                option.check(field, one)
        self.check()

    def check(self) -> None:
        """Refuse what does not go together; further than fields alone can tell.

        Raises:
            CircuitError: names the fields.
        """

    def check_model(self, shape: ModelConfig) -> None:
        """Refuse what a model of this shape does not have.

        Raises:
            CircuitError: names the component, stage or rank.
        """
        for field, option in self.declared().items():
            for value in _each(getattr(self, field)):
                option.check_model(field, value, shape)

    def check_task(self, task: Task) -> None:
        """Refuse roles, pair types and groupings that the run's task does not have.

        Raises:
            CircuitError: names the field and what there is.
        """
        for field, option in self.declared().items():
            for value in _each(getattr(self, field)):
                option.check_task(field, value, task)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON, as a report's `parameters` have them."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, parameters: Mapping[str, Any], *, schema: int = 2) -> Self:
        """The options that a report was made with.

        Args:
            schema: of the report; the fields of schema 1 are taken under their names of then, and
                what was no option is left out.

        Raises:
            CircuitError: they are no such options.
        """
        if schema >= 2:
            return cls(**parameters)
        flat = dict(parameters)
        pairs = flat.pop("pairs", None)
        if isinstance(pairs, dict):
            flat["pair_types"] = pairs.get("types")
            flat |= {
                f"{end}_pairs_per_type": pairs.get(f"{end}_per_type") for end in ("max", "min")
            }
        names = {name: option.earlier or name for name, option in cls.declared().items()}
        values = {name: flat.get(name, flat.get(earlier)) for name, earlier in names.items()}
        return cls(**{name: value for name, value in values.items() if value is not None})

    def words(self) -> list[str]:
        """The command line's words for every field that is not at its default."""
        words: list[str] = []
        for field, option in self.declared().items():
            value, flag = getattr(self, field), self.flags()[field]
            if value == type(self).model_fields[field].default:
                continue
            if value is True:
                words.append(flag)
                continue
            for one in _each(value):
                text = option.text(one)  # a value that looks like an option needs its `=`
                words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
        return words


@cache
def _declared(kind: type[Options]) -> dict[str, Option]:
    declared = {}
    for name, info in kind.model_fields.items():
        (option,) = (one for one in info.metadata if isinstance(one, Option))
        declared[name] = replace(option, choices=option.choices or _literals(info.annotation))
    return declared


def _literals(annotation: Any) -> tuple[str, ...]:
    """The values of a `Literal`, on its own or within a tuple or a union."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for inner in get_args(annotation) for value in _literals(inner))


def _each(value: Any) -> Iterator[Any]:
    """The values of a field: none, one, or those of a tuple."""
    if isinstance(value, tuple):
        yield from value
    elif value is not None:
        yield value


def _refusal(error: ValidationError) -> CircuitError:
    """The first complaint in one line."""
    item = error.errors()[0]
    field = f"`{item['loc'][0]}`" if item["loc"] else None
    if item["type"] == "missing":
        return CircuitError("is missing", where=field)
    if item["type"] == "extra_forbidden":
        return CircuitError(
            f"unknown option '{item['loc'][0]}'", fix="remove it or correct its name"
        )
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return CircuitError(f"{item['input']!r}", where=field, expected=message)


# --- options that several reports have ------------------------------------------------------------

Heads = Annotated[
    tuple[str, ...], Option("Head, such as L2H1.", flag="--head", kind="head", unset="all")
]
Ranks = Annotated[tuple[int, ...], Option("Rank of the basis.", flag="--rank", least=1)]
Stage = Annotated[str, Option("Stage of the residual stream.", kind="stage")]
ContextStage = Annotated[
    str | None,
    Option("Stage at which a head's input is read.", kind="stage", unset="the one before the head"),
]
LayernormMode = Annotated[
    Literal["head_ln1", "none"], Option("head_ln1 (through the head's LayerNorm) or none.")
]
Role = Annotated[str, Option("Role of the positions.", kind="role")]
Roles = Annotated[
    tuple[str, ...], Option("Role of the positions.", flag="--position-role", kind="role")
]
ScoreQueryRole = Annotated[
    str, Option("Role of the query position.", kind="single_role", earlier="query_role")
]
SupportKeyRole = Annotated[
    str, Option("Role of the matched positions.", kind="role", earlier="support_role")
]
DistractorKeyRole = Annotated[
    str, Option("Role of the compared positions.", kind="role", earlier="distractor_role")
]
RecordSide = Annotated[str, Option("Side of the pairs.", choices=SIDES, earlier="side")]
MarginSides = Annotated[
    tuple[str, ...],
    Option(
        "Side whose logits are read.",
        flag="--margin-side",
        choices=SIDES,
        unset="all",
        earlier="sides",
    ),
]
Slice = Annotated[
    str | None,
    Option(
        "Fact by which figures are also given apart, such as lag.",
        kind="task_slice",
        unset="the task's first",
    ),
]
Slices = Annotated[
    tuple[str, ...],
    Option(
        "Also follow the reads of each value of a fact apart, such as lag.",
        flag="--slice",
        kind="task_slice",
    ),
]
MaxRecords = Annotated[int | None, Option("That many reads, in file order.", least=1, unset="all")]
ProbeSet = Annotated[Path, Option("Probe set (JSONL).", kind="probe_set")]
SwitchBuckets = Annotated[
    tuple[str, ...],
    Option(
        "Changes that enter, by whether the competitor switched.",
        flag="--switch-bucket",
        choices=SWITCH_BUCKETS,
    ),
]
FitIntercept = Annotated[bool, Option("Fit a constant beside the routes.")]
ScalarPairRows = Annotated[
    Path,
    Option("Pair rows of answer-scalar-residual-diagnosis.", kind="scalar_pair_rows"),
]


Half = Literal["even", "odd"]


class ProbeOptions(Options):
    """Reads a probe set of the run's benchmark.

    Attributes:
        probe_set: file.
        splits: of its records; none takes all.
        half: of its records; none takes both.
    """

    probe_set: ProbeSet
    splits: Annotated[
        tuple[str, ...],
        Option("Split of the probe records.", flag="--split", kind="split", unset="all"),
    ] = ()
    half: Annotated[
        Half | None,
        Option("Every other record of the probe set, a copy with its source.", unset="both"),
    ] = None


class CheckpointOptions(Options):
    """Reads checkpoints of the run.

    Attributes:
        checkpoint_dir: folder, all of whose checkpoints are taken unless some are named.
        checkpoints: files, also any addressable step of a trace.
    """

    checkpoint_dir: Annotated[
        Path | None,
        Option("Folder of checkpoints; all of them unless some are named.", kind="checkpoint_dir"),
    ] = None
    checkpoints: Annotated[
        tuple[Path, ...],
        Option(
            "Checkpoint, also any addressable step of a trace.",
            flag="--checkpoint",
            kind="checkpoint",
        ),
    ] = ()


class PairOptions(Options):
    """Builds pairs of the probe records (definitions.md section 2).

    Attributes:
        pair_types: built, some of the task's.
        max_pairs_per_type: built of each type, at most.
        min_pairs_per_type: fewer of a type are an error.
        all_reads: in place of a number at most.
    """

    pair_types: Annotated[
        tuple[str, ...], Option("Pair type.", flag="--pair-type", kind="pair_type")
    ] = ("support_value",)
    max_pairs_per_type: Annotated[int, Option("Pairs built of each type, at most.", least=1)] = 64
    min_pairs_per_type: Annotated[int, Option("Fewer pairs of a type are an error.", least=0)] = 16
    all_reads: Annotated[bool, Option("Every read that makes a pair, however many they are.")] = (
        False
    )

    @property
    def most_pairs_per_type(self) -> int | None:
        """Built of each type, at most; None for all."""
        return None if self.all_reads else self.max_pairs_per_type

    def check(self) -> None:
        """The least may not be more than the most, nor a most be given beside all."""
        super().check()
        usual = type(self).model_fields["max_pairs_per_type"].default
        if self.all_reads and self.max_pairs_per_type != usual:
            raise CircuitError(
                f"{self.max_pairs_per_type} beside `all_reads`",
                where="`max_pairs_per_type`",
                fix="give one of the two",
            )
        if not self.all_reads and self.min_pairs_per_type > self.max_pairs_per_type:
            raise CircuitError(
                f"{self.min_pairs_per_type}",
                where="`min_pairs_per_type`",
                expected=f"at most `max_pairs_per_type`, {self.max_pairs_per_type}",
            )
