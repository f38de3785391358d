"""What the batches of steps were about, for shares of their examples: facts, texts, sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from circuit.artifacts import Row, dump_row
from circuit.lazy import torch
from circuit.reports.report import Results
from circuit.reports.tables import Columns
from circuit.tasks.examples import UNPREDICTED, Examples

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from circuit.training.recipe import NamedExamples

Batch: TypeAlias = "Examples | NamedExamples"
"""Of a task, or of a recipe."""
SHOWN = 8
"""Examples at either end of a ranking."""
SEVERAL = "several"
"""The value of a fact in which the questions of one record differ."""
Facts = Mapping[str, Mapping[str, "Float[Tensor, ' scalar']"]]
"""Sums by fact and value."""


def by_fact(shares: Float[Tensor, "scalar record pos"], batch: Batch) -> Facts:
    """Sums of shares by each fact, over the answers that it is of, or over whole records.

    Of a batch of which no task says anything there are none.

    Args:
        shares: by position that predicts, or one position a record: then a record counts under the
            value that all of its questions have, or under `several`.
    """
    if not isinstance(batch, Examples):
        return {}
    facts = _values(batch)
    if shares.shape[2] == 1:
        whole = shares[:, :, 0]
        return {name: _grouped(whole, _of_records(values, batch)) for name, values in facts.items()}
    answers = shares[:, batch.row, batch.at]
    kinds = batch.kinds[:, 1:]
    predicted = batch.targets() != UNPREDICTED
    names = (*batch.task.kinds, "other")
    labels = [names[kind] for kind in kinds[predicted].tolist()]
    return {
        "predicted": _grouped(shares[:, predicted], labels),
        **{name: _grouped(answers, values) for name, values in facts.items()},
    }


def _values(batch: Examples) -> dict[str, list[str]]:
    """The value of each question by fact: the task's slices, what is asked, what is answered."""
    tokens = batch.task.vocabulary.tokens
    slices = {name: batch.facts[fact].tolist() for name, fact in batch.task.slices.items()}
    return {
        **{name: [str(value) for value in values] for name, values in slices.items()},
        "asked": [tokens[token] for token in batch.asked().tolist()],
        "answer": [tokens[token] for token in batch.answer.tolist()],
    }


def _of_records(values: list[str], batch: Examples) -> list[str]:
    """The value that all questions of each record have."""
    of: list[set[str]] = [set() for _ in batch.sample_ids]
    for row, value in zip(batch.row.tolist(), values, strict=True):
        of[row].add(value)
    return [next(iter(one)) if len(one) == 1 else SEVERAL for one in of]


def _grouped(shares: Float[Tensor, "scalar one"], labels: list[str]) -> dict[str, Tensor]:
    names = sorted(set(labels), key=lambda label: (len(label), label))
    place = {name: at for at, name in enumerate(names)}
    at = torch.tensor([place[label] for label in labels], dtype=torch.int64)
    sums = torch.zeros(len(shares), len(names), dtype=torch.float64).index_add_(1, at, shares)
    return dict(zip(names, sums.T, strict=True))


def example_lines(
    step: int, scalar: str, name: str, shares: Float[Tensor, "record pos"], batch: Batch
) -> list[str]:
    """A row a record of one step and scalar, as text.

    Args:
        name: of the column of shares.
    """
    lines = []
    for row, share in enumerate(shares.sum(1).tolist()):
        line = {"step": step, "scalar": scalar, "row": row, "example": batch.sample_ids[row]}
        line[name] = share
        if shares.shape[1] > 1:
            last = int(batch.lengths[row]) - 1 if isinstance(batch, Examples) else shares.shape[1]
            line["positions"] = shares[row, :last].tolist()
        lines.append(dump_row(line))
    return lines


def text_of(batch: Batch, row: int) -> str:
    """The tokens of a record, where it has some."""
    if not isinstance(batch, Examples):
        return ""
    ids = batch.tokens[row, : int(batch.lengths[row])].tolist()
    return batch.task.vocabulary.decode(ids)


@dataclass
class Sums:
    """What the examples of a run have, summed while steps pass by.

    Attributes:
        names: of the scalars.
        examples: by id, how often it occurred and its shares by scalar.
        facts: by fact and value, shares by scalar.
        texts: tokens of the examples, by id.
    """

    names: tuple[str, ...]
    examples: dict[str, list[Any]] = field(default_factory=dict)
    facts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def add(self, shares: Float[Tensor, "scalar record pos"], batch: Batch) -> Facts:
        """The shares of one step; gives those by fact."""
        for row, name in enumerate(batch.sample_ids):
            if name not in self.texts:
                self.texts[name] = text_of(batch, row)
        facts = by_fact(shares, batch)
        self.add_known(batch.sample_ids, shares.sum(2).T, facts)
        return facts

    def add_known(
        self, ids: Sequence[str], shares: Float[Tensor, "record scalar"], facts: Facts
    ) -> None:
        """The shares of one step's records, and their sums by fact."""
        for name, share in zip(ids, shares, strict=True):
            entry = self.examples.setdefault(name, [0, torch.zeros_like(share)])
            entry[0] += 1
            entry[1] = entry[1] + share
        for fact, values in facts.items():
            sums = self.facts.setdefault(fact, {})
            for value, share in values.items():
                sums[value] = sums.get(value, 0.0) + share

    def ranked(self, at: int) -> list[Row]:
        """Every example of one scalar, the largest share first."""
        rows = [
            {"scalar": self.names[at], "example": name, "times": times, "share": float(share[at])}
            for name, (times, share) in self.examples.items()
        ]
        return sorted(rows, key=lambda row: (-row["share"], row["example"]))

    def ends(self, ranked: list[Row], count: int) -> dict[str, list[Row]]:
        """The top and the bottom of a ranking, with their tokens."""
        bottom = ranked[max(count, len(ranked) - count) :][::-1]
        return {
            end: [{**row, "text": self.texts[row["example"]]} for row in rows]
            for end, rows in (("top", ranked[:count]), ("bottom", bottom))
        }

    def of_scalar(self, at: int) -> dict[str, dict[str, float]]:
        """Sums by fact and value of one scalar."""
        return {fact: numbers(values, at) for fact, values in self.facts.items()}


def with_tokens(columns: Columns, rows: Iterable[Row]) -> Columns:
    """The columns of a ranking, and the examples' tokens where they have some."""
    return {**columns, "text": "tokens"} if any(row["text"] for row in rows) else columns


def numbers(values: Mapping[str, Tensor], at: int) -> dict[str, float]:
    """One scalar's numbers, by value."""
    names = sorted(values, key=lambda label: (len(label), label))
    return {name: float(values[name][at]) for name in names}


def lead_of(results: Results[Any]) -> dict[str, Any]:
    """The scalar of a report's charts, from its summary."""
    scalars, lead = results.summary["scalars"], results.summary["lead"]
    return next(one for one in scalars if one["scalar"] == lead)
