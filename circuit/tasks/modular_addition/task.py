"""Modular addition (definitions.md section 8): `a b =` is answered by `(a + b) mod p`.

Power et al. 2022, Nanda et al. 2023: trained on a part of all pairs, a small transformer first
memorizes it and generalizes much later.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from circuit.errors import CircuitError
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

TRAIN, TEST = "train", "test"
KINDS = ("first", "second", "equals", "answer")


class ModularAdditionConfig(TaskConfig):
    """All pairs of numbers below `modulus`; a random `train_fraction` of them is trained on."""

    benchmark_type: Literal["modular_addition"]
    modulus: Annotated[int, Field(ge=2, le=1000)]
    train_fraction: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _both_splits(self) -> ModularAdditionConfig:
        if not 0 < self.trained_pairs < self.modulus**2:
            raise ValueError(
                f"train_fraction {self.train_fraction} leaves a split of {self.modulus**2} pairs"
                " empty"
            )
        return self

    def stored(self) -> dict[str, tuple[int, int]]:
        """See `TaskConfig.stored`."""
        return {"pairs of numbers (modulus)": (self.modulus**2, len(KINDS))}

    @property
    def trained_pairs(self) -> int:
        """Number of pairs in the training split."""
        return int(self.modulus**2 * self.train_fraction)


@dataclass(frozen=True)
class Site:
    """A sum in its split, as pair rules look at it."""

    task: ModularAddition
    first: int
    second: int

    def changed(self, which: Literal["first", "second"]) -> Change:
        """The operand replaced by the next number whose sum is in the same split."""
        p, numbers = self.task.modulus, [self.first, self.second]
        place, split = KINDS.index(which), self.task.is_trained(self.first, self.second)
        for step in range(1, p):
            other = numbers.copy()
            other[place] = (numbers[place] + step) % p
            if self.task.is_trained(*other) == split:
                answers = (sum(numbers) % p, sum(other) % p)
                tokens = {place: other[place], len(KINDS) - 1: answers[1]}
                return Change(tokens, str(other[place]), answers)
        raise SkippedError("no other sum with that operand is in the split")


class ModularAddition(Task):
    """Sums modulo p; one question a record, and the loss is of its answer alone, in float64."""

    Config = ModularAdditionConfig
    kinds = KINDS
    roles: ClassVar[Mapping[str, str | RoleMask]] = {
        "prediction": "at",
        "first": "first_pos",
        "second": "second_pos",
        "causal_prefix": lambda examples: examples.prefix(),
    }
    facts: ClassVar[Mapping[str, bool]] = {
        "first_pos": False,
        "second_pos": False,
        "first": False,
        "second": False,
        "is_mirrored": True,
        "is_wrapped": True,
    }
    slices: ClassVar[Mapping[str, str]] = {"mirrored": "is_mirrored", "wrapped": "is_wrapped"}
    shortcuts = ("first", "second")
    shortcut_words = "the first number (k 1), or the second one (k 2)"
    pair_types: ClassVar[Mapping[str, PairRule]] = {
        "first": lambda site: site.changed("first"),
        "second": lambda site: site.changed("second"),
    }
    token_set_names = ("number",)
    support = "first"
    attended = "second"
    loss = "answer"
    loss_dtype = "float64"

    config: ModularAdditionConfig

    def __init__(self, config: ModularAdditionConfig, facts: None = None) -> None:
        super().__init__(config)
        self.modulus = p = config.modulus
        self.vocabulary = Vocabulary([*map(str, range(p)), "="])
        self.choices = range(p)
        self.token_sets = {"number": self.choices}
        self.split_names = (TRAIN, TEST)
        pairs = [(a, b) for a in range(p) for b in range(p)]
        self._trained = frozenset(random.Random(config.seed).sample(pairs, config.trained_pairs))

    def is_trained(self, first: int, second: int) -> bool:
        """Whether the training split holds a sum."""
        return (first, second) in self._trained

    def draw(self, report: Progress) -> Drawn:
        """Both splits, each in ascending order."""
        splits: dict[str, list[Record]] = {TRAIN: [], TEST: []}
        for a in self.choices:
            for b in self.choices:
                name = TRAIN if self.is_trained(a, b) else TEST
                tokens = (a, b, self.modulus, (a + b) % self.modulus)
                splits[name].append(Record(f"{a}+{b}", name, tokens))
                report(name, len(splits[name]))
        return Drawn(splits)

    def parse(self, record: Record, through: int | None = None) -> Parsed:
        """The sum of a record; see `Task.parse`.

        `mirrored`: training has it the other way round, so that a model that knows addition to be
        commutative has seen the answer. `wrapped`: as integers the two sum to p or more.
        """
        p, tokens = self.modulus, record.tokens
        if len(tokens) != len(KINDS) or max(*tokens[:2], tokens[3]) >= p or tokens[2] != p:
            raise CircuitError(
                f"found {self.vocabulary.decode(tokens)}",
                where=f"record {record.sample_id}",
                expected=f"two numbers below {p}, =, and a number",
            )
        a, b, _, answer = tokens
        if answer != (a + b) % p:
            raise CircuitError(
                f"found {answer}",
                where=f"record {record.sample_id}, position 3",
                expected=f"{(a + b) % p}, the sum modulo {p}",
            )
        mirrored = a != b and self.is_trained(b, a)
        facts = {"first_pos": 0, "second_pos": 1, "first": a, "second": b}
        facts |= {"is_mirrored": mirrored, "is_wrapped": a + b >= p}
        return Parsed([Question(0, 2, answer, facts, Site(self, a, b))], range(len(KINDS)))
