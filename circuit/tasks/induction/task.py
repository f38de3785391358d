"""Induction (definitions.md section 8): a random string and the same string again.

At a token of the second half the answer is what followed its first occurrence (Olsson et al. 2022,
Singh et al. 2024). Where all strings have one length, the answer always stands that many positions
back: two layers then learn to look there, and no head matches anything (docs/decisions.md).
Training records are drawn as they are needed: record `i` of a run is a function
of the task's seed, the run's seed and `i`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from circuit.config import PositiveInt
from circuit.errors import CircuitError
from circuit.lazy import np
from circuit.tasks.base import (
    Change,
    Drawn,
    PairRule,
    Parsed,
    Progress,
    Question,
    Record,
    RoleMask,
    SkippedError,
    Task,
    TaskConfig,
    Vocabulary,
)
from circuit.tasks.examples import Examples

if TYPE_CHECKING:
    from torch import Tensor

TRAIN, VALIDATION = "train", "validation"
KINDS = ("first_half", "repeat_start", "second_half")


class InductionConfig(TaskConfig):
    """Strings of `min_length` to `length` distinct tokens out of `vocabulary_size`, written twice.

    Every length is as likely; without `min_length` all strings have `length` tokens.
    """

    benchmark_type: Literal["induction"]
    vocabulary_size: Annotated[int, Field(ge=3)]
    length: Annotated[int, Field(ge=2)]
    min_length: Annotated[int, Field(ge=2)] | None = None
    validation_records: PositiveInt

    def stored(self) -> dict[str, tuple[int, int]]:
        """See `TaskConfig.stored`."""
        return {"records (validation_records, length)": (self.validation_records, 2 * self.length)}

    @model_validator(mode="after")
    def _distinct(self) -> InductionConfig:
        if self.length > self.vocabulary_size:
            raise ValueError(
                f"length {self.length} exceeds vocabulary_size {self.vocabulary_size}; the tokens"
                " of a string are distinct"
            )
        if self.shortest > self.length:
            raise ValueError(f"min_length {self.min_length} exceeds length {self.length}")
        return self

    @property
    def shortest(self) -> int:
        """Tokens of the shortest string."""
        return self.length if self.min_length is None else self.min_length


@dataclass(frozen=True)
class Site:
    """A token of a second half, as pair rules look at it."""

    tokens: tuple[int, ...]
    at: int
    vocabulary: Vocabulary

    def other_follower(self) -> Change:
        """The first occurrence is followed by the first token that the string has not."""
        length, answer = len(self.tokens) // 2, self.tokens[self.at + 1]
        for token in range(self.vocabulary.size):
            if token not in self.tokens:
                changed = {self.at - length + 1: token, self.at + 1: token}
                return Change(changed, self.vocabulary.tokens[token], (answer, token))
        raise SkippedError("the string has every token")


def _other_firsts(examples: Examples) -> Tensor:
    """The positions of the first half without the support's value."""
    return examples.of_kind("first_half") & ~examples.role("support_value")


class Induction(Task):
    """Repeated random strings; every token of the second half but the last asks for the next."""

    Config = InductionConfig
    kinds = KINDS
    roles: ClassVar[Mapping[str, str | RoleMask]] = {
        "prediction": "at",
        "previous": "previous_pos",
        "support_key": "support_key_pos",
        "support_value": "support_value_pos",
        "value_distractors": _other_firsts,
        "causal_prefix": lambda examples: examples.prefix(),
    }
    facts: ClassVar[Mapping[str, bool]] = {
        "previous_pos": False,
        "support_key_pos": False,
        "support_value_pos": False,
        "position": False,
        "repeated": False,
        "unseen": False,
        "distance": False,
    }
    slices: ClassVar[Mapping[str, str]] = {"position": "position", "distance": "distance"}
    shortcuts = ("repeated", "unseen")
    shortcut_words = "the token asked about (k 1), or the smallest one not repeated yet (k 2)"
    pair_types: ClassVar[Mapping[str, PairRule]] = {
        "support_value": lambda site: site.other_follower(),
    }
    token_set_names = ("symbol",)
    support = "support_value"
    attended = "support_key"

    config: InductionConfig

    def __init__(self, config: InductionConfig, facts: None = None) -> None:
        super().__init__(config)
        size = config.vocabulary_size
        width = len(str(size - 1))
        self.vocabulary = Vocabulary(f"T{i:0{width}d}" for i in range(size))
        self.choices = range(size)
        self.token_sets = {"symbol": self.choices}
        self.split_names, self.streams = (VALIDATION,), {TRAIN: 2 * config.length}

    def _record(self, name: str, split: str, *seeds: int) -> Record:
        state = np.random.RandomState(list(seeds))
        drawn = state.permutation(self.config.vocabulary_size)
        length = state.randint(self.config.shortest, self.config.length + 1)
        string = tuple(drawn[:length].tolist())
        return Record(name, split, string + string)

    def draw(self, report: Progress) -> Drawn:
        """The validation records."""
        records = []
        for index in range(self.config.validation_records):
            # seeds of three parts are the training records'
            name = f"{VALIDATION}_{index:06d}"
            records.append(self._record(name, VALIDATION, self.config.seed, index))
            report(VALIDATION, index + 1)
        return Drawn({VALIDATION: records})

    def drawn_record(self, split: str, seed: int, index: int) -> Record:
        """See `Task.drawn_record`."""
        return self._record(f"{split}_{index}", split, self.config.seed, seed, index)

    def parse(self, record: Record, through: int | None = None) -> Parsed:
        """The questions of a record; see `Task.parse`.

        `position` counts the second half from 0, `distance` back to the first occurrence;
        `repeated` is the token asked about, `unseen` the smallest of the string that its second
        half has not shown yet.
        """
        tokens = record.tokens
        length, least, most = len(tokens) // 2, self.config.shortest, self.config.length
        where = f"record {record.sample_id}"
        distinct = len(set(tokens[:length]))
        if len(tokens) % 2 or not least <= length <= most or distinct < length:
            raise CircuitError(
                f"{len(tokens)} tokens, {distinct} of the first {length} distinct",
                where=where,
                expected=f"a string of {least} to {most} distinct tokens, twice"
                if least < most
                else f"a string of {most} distinct tokens, twice",
            )
        count = length - 1 if through is None else through + 1
        questions = []
        for number in range(count):
            at = length + number
            for position in (at, at + 1):
                if tokens[position] != tokens[position - length]:
                    raise CircuitError(
                        f"found {self.vocabulary.tokens[tokens[position]]}",
                        where=f"{where}, position {position}",
                        expected=f"{self.vocabulary.tokens[tokens[position - length]]} again",
                    )
            facts = {
                "previous_pos": at - 1,
                "support_key_pos": at - length,
                "support_value_pos": at - length + 1,
                "position": number,
                "repeated": tokens[at],
                "unseen": min(tokens[number + 1 : length]),
                "distance": length,
            }
            site = Site(tokens, at, self.vocabulary)
            questions.append(Question(number, at, tokens[at + 1], facts, site))
        kinds = [0] * length + [1] + [2] * (length - 1)
        return Parsed(questions, kinds)
