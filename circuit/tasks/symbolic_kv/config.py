"""The config of a latest-write benchmark."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from circuit.config import Config, NonNegativeInt, PositiveInt
from circuit.tasks.base import TaskConfig

SplitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class Range(Config):
    """An inclusive range of integers."""

    min: NonNegativeInt
    max: NonNegativeInt

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class GeneratedSplit(Config):
    """A split whose records are drawn by the generator (definitions.md section 1)."""

    samples: PositiveInt
    active_keys: Range
    overwrite_count: Range
    num_queries: Range
    query_lag: Range
    answer_pairs: Literal["seen", "heldout"] = "seen"


class CounterfactualSplit(Config):
    """A split made from another one by changing the value of one write that some read needs."""

    samples: PositiveInt
    counterfactual_of: str


def _split_kind(value: Any) -> str:
    if isinstance(value, CounterfactualSplit):
        return "counterfactual"
    is_counterfactual = isinstance(value, dict) and "counterfactual_of" in value
    return "counterfactual" if is_counterfactual else "generated"


SplitConfig = Annotated[
    Annotated[GeneratedSplit, Tag("generated")]
    | Annotated[CounterfactualSplit, Tag("counterfactual")],
    Discriminator(_split_kind),
]


class BenchmarkConfig(TaskConfig):
    """A symbolic latest-write key-value benchmark."""

    benchmark_type: Literal["symbolic_kv_stream"]
    num_keys: Annotated[int, Field(ge=2)]
    num_values: Annotated[int, Field(ge=2)]
    holdout_answer_pair_fraction: Annotated[float, Field(gt=0, lt=1)]
    heuristic_max_accuracy: Annotated[float, Field(gt=0, le=1)]
    lag_sampling: Literal["eligible", "uniform"] = "eligible"
    splits: dict[SplitName, SplitConfig]

    def stored(self) -> dict[str, tuple[int, int]]:
        """See `TaskConfig.stored`."""
        return {
            f"records (splits.{name}.samples)": (split.samples, self._longest(split))
            for name, split in self.splits.items()
        }

    def _longest(self, split: SplitConfig) -> int:
        drawn = (
            self.splits[split.counterfactual_of]
            if isinstance(split, CounterfactualSplit)
            else split
        )
        assert isinstance(drawn, GeneratedSplit), "as `_counterfactual_sources` has checked"
        return 2 + 3 * (drawn.active_keys.max + drawn.overwrite_count.max + drawn.num_queries.max)

    def memory(self) -> dict[str, int]:
        """See `TaskConfig.memory`."""
        pairs = self.num_keys * self.num_values
        return {"pairs of keys and values (num_keys, num_values)": 150 * pairs} | super().memory()

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
