"""The Task protocol: what the inputs of a run mean.

A task draws *records* (rows of tokens) from a config, and parses each into *questions*: where an
answer is predicted, which answer is right, and facts about it (a lag, whether it was held out).
Everything else is written once over these: batches, roles, pairs, probe sets, evaluation, reports.

    class Sorting(Task):
        Config = SortingConfig                       # what a benchmark's config holds
        kinds = ("input", "arrow", "answer")         # of tokens
        roles = {"prediction": "at", "inputs": lambda examples: examples.of_kind("input")}

        def draw(self, report): ...                  # records by split
        def parse(self, record, through=None): ...   # questions of a record

The names and rules of each task stand in docs/definitions.md and docs/tasks.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel

from circuit.config import Config, FolderName, NonNegativeInt
from circuit.documents import Document
from circuit.errors import CircuitError

if TYPE_CHECKING:
    from torch import Tensor

    from circuit.tasks.examples import Examples, Split

RoleMask: TypeAlias = "Callable[[Examples], Tensor]"
"""Which positions have a role, Bool `[example, pos]`."""

Progress = Callable[[str, int], None]
"""Called with the split's name and the number of its records drawn so far."""


class TaskConfig(Config):
    """What the config of every benchmark holds; a task's own config adds its settings."""

    name: str
    benchmark_type: str
    """The task: one of circuit/tasks/, or `file.py:Class` of one's own."""
    output_dir: FolderName
    seed: NonNegativeInt

    def stored(self) -> dict[str, tuple[int, int]]:
        """How many records are drawn, and how long the longest is, in words that name settings.

        Of these follow what the benchmark takes, before it is drawn, and the bar while it is.
        """
        return {}

    def memory(self) -> dict[str, int]:
        """Bytes that the benchmark takes while it is drawn, checked and encoded, by what does."""
        return {
            what: count * (900 + 45 * length) for what, (count, length) in self.stored().items()
        }

    def disk(self) -> dict[str, int]:
        """Bytes of the benchmark's files, by what takes them."""
        stored = self.stored().items()
        return {what: count * (80 + 6 * length) for what, (count, length) in stored}


class Vocabulary:
    """The tokens of a task, by id.

    Attributes:
        tokens: every token's text.
        pad: id of the token that fills rows up; what stands behind a row's end has no effect.
    """

    def __init__(self, tokens: Iterable[str], pad: int = 0) -> None:
        self.tokens = tuple(tokens)
        self.pad = pad

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    def __hash__(self) -> int:
        return hash(self.tokens)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a string of tokens separated by spaces.

        Raises:
            CircuitError: a token is not of this vocabulary.
        """
        try:
            return tuple([self._ids[token] for token in text.split(" ")])
        except KeyError as error:
            raise CircuitError(
                f"unknown token {error.args[0]!r}",
                expected=f"{self.tokens[0]} .. {self.tokens[-1]}, separated by single spaces",
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The tokens of `ids` as one string, separated by spaces.

        Raises:
            CircuitError: an id is not of this vocabulary.
        """
        ids = list(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.size):
            wrong = next(i for i in ids if not 0 <= i < self.size)
            raise CircuitError(f"unknown token id {wrong}", expected=f"0 .. {self.size - 1}")
        return " ".join([self.tokens[i] for i in ids])


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a split.

    Attributes:
        tokens: token ids, unpadded.
        source_id: id of the record that this one is a copy of.
        changed_write: of a copy, number of the write whose value differs from the source's.
    """

    sample_id: str
    split: str
    tokens: tuple[int, ...]
    source_id: str | None = None
    changed_write: int | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One answer of a record that is asked for.

    Attributes:
        index: its number in the record, from 0.
        at: the prediction position; the answer is the token behind it.
        answer: token id.
        facts: of the names in `Task.facts`: positions, counts, token ids, whether something holds.
        site: what the task's pair rules look at.
    """

    index: int
    at: int
    answer: int
    facts: Mapping[str, int]
    site: Any = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """A record's questions, in order, and the kind of each of its tokens (-1: of none)."""

    questions: Sequence[Question]
    kinds: Sequence[int]


@dataclass(frozen=True, slots=True)
class Change:
    """How a pair's copy differs: new token ids by position, its name, the transfer tokens."""

    tokens: Mapping[int, int]
    what: str
    transfer: tuple[int, int]
    changed_write: int | None = None


class SkippedError(Exception):
    """A question that gives no pair of a type; the message is the reason."""


PairRule: TypeAlias = Callable[[Any], Change]
"""The change of a question's `site`; raises `SkippedError` where there is none."""


class Stored(Document):
    """Something of a benchmark's `metadata.json`: closed, frozen, strict."""


class SplitSizes(Stored):
    """One split: its records, their questions, and the lengths of the records in tokens."""

    records: int
    questions: int
    min_tokens: int
    max_tokens: int


class Sizes(Stored):
    """What is told of a benchmark whose task measures nothing else."""

    splits: dict[str, SplitSizes]


class NoFacts(Stored):
    """Of a draw that decided nothing that parsing has to know."""


@dataclass(frozen=True)
class Drawn:
    """What a task draws from its config.

    Attributes:
        splits: records by split.
        figures: what is worth knowing of them; None: their sizes.
        facts: what the draw decided and parsing has to know.
    """

    splits: dict[str, list[Record]]
    figures: BaseModel | None = None
    facts: BaseModel = field(default_factory=NoFacts)


@dataclass(frozen=True)
class Told:
    """A benchmark's figures for a reader: a table, a sentence that explains it, warnings."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    warnings: Sequence[str] = ()


class Task(ABC):
    """A task of one config. Its class attributes say what it declares.

    Attributes:
        Config, Figures, Facts: the models of its config, and of its draw's figures and facts.
        kinds: of its tokens, for losses and accuracies by kind of target.
        roles: position roles by name: the fact that holds one position (`"at"` is the prediction
            position), or a function of examples that gives a mask `[example, pos]`.
        facts: names of the facts of every question; `True` for one that holds or does not.
        slices: the facts by which figures are also given apart, by what figures call them.
        shortcuts: the facts that hold the token that a wrong circuit would answer.
        shortcut_words: what the k-th of them says, for a reader; "" names the facts.
        pair_types: rules by name (`circuit/tasks/pairs.py`).
        token_set_names: of `token_sets`.
        support: the role, of one position, from which the answer can be read.
        attended: role whose attention is the figure `q` of an evaluation; `r` is of the support.
        loss: which tokens a step predicts: `every` next token, or the `answer`s alone.
        loss_dtype: of the logits in the loss.
        config, vocabulary: of this task.
        choices: token ids among which answers compete.
        token_sets: token ids by name, for embeddings' identities.
        split_names: of its config, in order.
        streams: splits without an end, which `drawn_record` gives, with the tokens of the longest
            record of each.
    """

    Config: ClassVar[type[TaskConfig]]
    Figures: ClassVar[type[BaseModel]] = Sizes
    Facts: ClassVar[type[BaseModel]] = NoFacts
    kinds: ClassVar[tuple[str, ...]]
    roles: ClassVar[Mapping[str, str | RoleMask]]
    facts: ClassVar[Mapping[str, bool]] = {}
    slices: ClassVar[Mapping[str, str]] = {}
    shortcuts: ClassVar[tuple[str, ...]] = ()
    shortcut_words: ClassVar[str] = ""
    pair_types: ClassVar[Mapping[str, PairRule]] = {}
    token_set_names: ClassVar[tuple[str, ...]] = ()
    support: ClassVar[str]
    attended: ClassVar[str | None] = None
    loss: ClassVar[Literal["every", "answer"]] = "every"
    loss_dtype: ClassVar[Literal["float32", "float64"]] = "float32"

    config: Any
    vocabulary: Vocabulary
    choices: range
    token_sets: Mapping[str, range]
    split_names: tuple[str, ...]
    streams: Mapping[str, int] = MappingProxyType({})

    def __init__(self, config: Any, facts: Any = None) -> None:
        """Put the vocabulary together.

        Args:
            config: an instance of `Config`.
            facts: of its draw, an instance of `Facts`; None before there is one.
        """
        self.config = config

    @abstractmethod
    def draw(self, report: Progress) -> Drawn:
        """Draw every split; the same config gives the same records.

        Args:
            report: called with a split's name and its records so far.

        Raises:
            CircuitError: the settings cannot work.
        """

    @abstractmethod
    def parse(self, record: Record, through: int | None = None) -> Parsed:
        """The questions of a record.

        Args:
            record: of this task.
            through: the last question that is looked at; what stands behind it may be no record
                (the copy of a pair is right up to its own answer only).

        Raises:
            CircuitError: the tokens are no record; it is named, and the position.
        """

    @classmethod
    def tell(cls, figures: Any) -> Told:
        """Figures for a reader."""
        rows = [
            [
                name,
                str(split.records),
                str(split.questions),
                f"{split.min_tokens}-{split.max_tokens}",
            ]
            for name, split in figures.splits.items()
        ]
        return Told(["split", "records", "questions", "tokens"], rows)

    @classmethod
    def legend(cls) -> str:
        """What the figures of an evaluation are, in the task's words."""
        looks = {"q": cls.attended, "r": cls.support}
        ends = {name: role.replace("_", " ") for name, role in looks.items() if role is not None}
        to = ", ".join(f"to the {words}" for words in ends.values())
        legend = (
            f"{', '.join(ends)}: mean over reads of the largest attention from the prediction"
            f" position {to}. w: mean value margin."
        )
        if not cls.shortcuts:
            return legend
        says = cls.shortcut_words or f"the k-th of {', '.join(cls.shortcuts)}"
        return (
            f"{legend}\nk-th %: reads that '{says}' answers, for the best k."
            " agree %: wrong answers that equal it."
        )

    def sizes(self, splits: Mapping[str, Sequence[Record]]) -> Sizes:
        """The figures of a task that measures nothing else."""

        def of(records: Sequence[Record]) -> SplitSizes:
            lengths = [len(record.tokens) for record in records]
            questions = sum(len(self.parse(record).questions) for record in records)
            return SplitSizes(
                records=len(records),
                questions=questions,
                min_tokens=min(lengths),
                max_tokens=max(lengths),
            )

        return Sizes(splits={name: of(records) for name, records in splits.items()})

    def drawn_record(self, split: str, seed: int, index: int) -> Record:
        """Record `index` of one of `streams`, drawn at need: a function of the arguments.

        Args:
            seed: of the run.
        """
        raise NotImplementedError

    @property
    def slice_name(self) -> str:
        """The first of `slices`, by which figures are given apart unless others are asked for."""
        return next(iter(self.slices), "slice")

    @classmethod
    def check_slice(cls, name: str) -> None:
        """Refuse a slice that is not declared.

        Raises:
            CircuitError: lists those that are.
        """
        if name not in cls.slices:
            names = ", ".join(cls.slices)
            expected = f"one of {names}" if names else "none, as the task has none"
            raise CircuitError(f"unknown slice '{name}'", expected=expected)

    @classmethod
    def single_roles(cls) -> tuple[str, ...]:
        """The roles that are one position of every question."""
        return tuple(name for name, role in cls.roles.items() if isinstance(role, str))

    @classmethod
    def check_roles(cls, *roles: str) -> None:
        """Refuse a role that does not exist.

        Raises:
            CircuitError: lists the roles.
        """
        for role in roles:
            if role not in cls.roles:
                raise CircuitError(f"unknown role {role!r}", expected=", ".join(cls.roles))

    def split(
        self, records: Sequence[Record], through: Sequence[int | None] | None = None
    ) -> Split:
        """Records parsed once, from which batches are sliced."""
        from circuit.tasks.examples import Split

        return Split(self, records, through=through)

    def examples(self, records: Sequence[Record]) -> Examples:
        """All questions of the records as one batch; for many batches of one split use `split`.

        Raises:
            CircuitError: there is no record, or one is invalid.
        """
        return self.split(records).batch()
