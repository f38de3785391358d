"""Records as index tensors: batches of examples, and the token positions of each role.

`Split` parses every record once; a batch is then sliced from its flat tables without a Python loop.
Roles are those that the task declares (definitions.md section 2): every mask is `[example, pos]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from circuit.errors import CircuitError
from circuit.lazy import np, torch
from circuit.tasks.base import Record, Task

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64
    from numpy.typing import NDArray
    from torch import Tensor

UNPREDICTED = -100
"""A target that no loss counts (`ignore_index` of torch's cross-entropy)."""


@dataclass(frozen=True)
class Examples:
    """Rows of tokens, and every question about them, row by row, in order.

    Attributes:
        task: whose records they are.
        tokens: token ids, padded on the right to the longest row of the batch.
        lengths: number of tokens of each row.
        kinds: index into `Task.kinds` of each token; -1 where it has none.
        sample_ids: one a row.
        row: the row of each example.
        index: its number in the row, from 0.
        at: its prediction position.
        answer: token id of the right answer.
        facts: what the task says of each example, by name; those that hold or not are Bool.
    """

    task: Task = field(repr=False)
    tokens: Int64[Tensor, "row pos"]
    lengths: Int64[Tensor, " row"]
    kinds: Int64[Tensor, "row pos"]
    sample_ids: tuple[str, ...]
    row: Int64[Tensor, " example"]
    index: Int64[Tensor, " example"]
    at: Int64[Tensor, " example"]
    answer: Int64[Tensor, " example"]
    facts: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.row)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Examples:
        """The same rows with another form of everything that is one an example."""
        return replace(
            self,
            row=change(self.row),
            index=change(self.index),
            at=change(self.at),
            answer=change(self.answer),
            facts={name: change(fact) for name, fact in self.facts.items()},
        )

    def to(self, device: torch.device | str) -> Examples:
        """The same examples with every tensor on `device`."""
        return replace(
            self._map(lambda tensor: tensor.to(device)),
            tokens=self.tokens.to(device),
            lengths=self.lengths.to(device),
            kinds=self.kinds.to(device),
        )

    def select(self, chosen: Tensor) -> Examples:
        """The same rows with only the examples that a mask `[example]` or an index chooses."""
        return self._map(lambda tensor: tensor[chosen])

    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """The token ids of each row, without padding."""
        return tuple(
            tuple(row[:length])
            for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        )

    def targets(self) -> Int64[Tensor, "row but_last"]:
        """What the training loss predicts at each position but the last; see `Task.loss`."""
        targets = torch.full_like(self.tokens[:, 1:], UNPREDICTED)
        if self.task.loss == "answer":
            targets[self.row, self.at] = self.answer
            return targets
        position = torch.arange(targets.shape[1], device=targets.device)
        return torch.where(position < self.lengths[:, None] - 1, self.tokens[:, 1:], targets)

    def is_answer(self) -> Bool[Tensor, "row pos"]:
        """Where the answers stand."""
        mask = torch.zeros_like(self.tokens, dtype=torch.bool)
        mask[self.row, self.at + 1] = True
        return mask

    def asked(self) -> Int64[Tensor, " example"]:
        """Token id at the prediction position."""
        return self.tokens[self.row, self.at]

    def of_kind(self, kind: str) -> Bool[Tensor, "example pos"]:
        """The tokens of a kind in each example's row, up to its prediction position."""
        return (self.kinds == self.task.kinds.index(kind))[self.row] & self.prefix()

    def prefix(self) -> Bool[Tensor, "example pos"]:
        """Every position up to the prediction position."""
        return torch.arange(self.tokens.shape[1], device=self.at.device) <= self.at[:, None]

    def at_position(self, position: Int64[Tensor, " example"]) -> Bool[Tensor, "example pos"]:
        """One position an example as a mask."""
        return torch.arange(self.tokens.shape[1], device=position.device) == position[:, None]

    def slice_values(self, by: str | None = None) -> Int64[Tensor, " example"] | None:
        """A fact by which reports give figures apart; None if the task has none.

        Args:
            by: one of the task's slices, the first by default.

        Raises:
            CircuitError: the task has slices, but not this one.
        """
        if not self.task.slices:
            return None
        by = by or self.task.slice_name
        self.task.check_slice(by)
        return self.facts[self.task.slices[by]].long()

    def by_slice(self, by: str | None = None) -> dict[str, Bool[Tensor, " example"]]:
        """Masks of `all` examples, and of those of each value of `slice_values`."""
        groups, values = {"all": torch.ones_like(self.row, dtype=torch.bool)}, self.slice_values(by)
        if values is None:
            return groups
        return groups | {str(value): values == value for value in torch.unique(values).tolist()}

    def role(self, name: str) -> Bool[Tensor, "example pos"]:
        """Which token positions have a role.

        Raises:
            CircuitError: the task has no such role.
        """
        self.task.check_roles(name)
        role = self.task.roles[name]
        return role(self) if callable(role) else self.at_position(self.position(name))

    def position(self, role: str) -> Int64[Tensor, " example"]:
        """The position of a role that is one token of each example.

        Raises:
            CircuitError: there is no such role, or it has several positions.
        """
        check_single(self.task, role)
        fact = str(self.task.roles[role])
        return self.at if fact == "at" else self.facts[fact]

    def positions(
        self, role: str
    ) -> tuple[Int64[Tensor, "example slot"], Bool[Tensor, "example slot"]]:
        """A role's positions in ascending order, padded on the right with 0, and which are real.

        Raises:
            CircuitError: there is no such role.
        """
        mask = self.role(role)
        counts = mask.sum(dim=1)
        width = int(counts.max()) if len(counts) else 0
        real = torch.arange(width, device=mask.device) < counts[:, None]
        positions = torch.zeros_like(real, dtype=torch.int64)
        positions[real] = mask.nonzero()[:, 1]
        return positions, real


def check_single(task: Task | type[Task], role: str) -> None:
    """Refuse a role that does not exist, or that has several positions.

    Raises:
        CircuitError: lists those that have one.
    """
    task.check_roles(role)
    single = task.single_roles()
    if role not in single:
        raise CircuitError(
            f"role '{role}' has several positions", expected=f"one of {', '.join(single)}"
        )


class Split:
    """Records parsed once, from which batches are sliced."""

    def __init__(
        self,
        task: Task,
        records: Sequence[Record],
        *,
        through: Sequence[int | None] | None = None,
    ) -> None:
        """Parse the records.

        Args:
            task: whose records they are.
            records: in the order that batch indices refer to.
            through: per record, the last question to parse (None: all); the corrupted copies of
                pairs need it.

        Raises:
            CircuitError: there is no record, or one is invalid (record and position are named).
        """
        if not records:
            raise CircuitError("no records to encode", expected="at least one")
        last = through or [None] * len(records)
        parsed = [task.parse(record, end) for record, end in zip(records, last, strict=True)]
        self.task = task
        self._sample_ids = [record.sample_id for record in records]
        self._lengths = torch.tensor([len(record.tokens) for record in records])
        shape = (len(records), int(self._lengths.max()))
        self._tokens = torch.full(shape, task.vocabulary.pad)
        self._kinds = torch.full(shape, -1)
        for row, (record, parse) in enumerate(zip(records, parsed, strict=True)):
            self._tokens[row, : len(record.tokens)] = torch.tensor(record.tokens)
            self._kinds[row, : len(parse.kinds)] = torch.tensor(parse.kinds)
        self._counts = torch.tensor([len(parse.questions) for parse in parsed])
        self._starts = self._counts.cumsum(0) - self._counts
        # one column an attribute of the questions, over all records one after the other
        flat = [
            (q.index, q.at, q.answer, *[q.facts[name] for name in task.facts])
            for parse in parsed
            for q in parse.questions
        ]
        columns = np.array(flat, dtype=np.int64).reshape(len(flat), 3 + len(task.facts)).T
        self._columns = torch.from_numpy(np.ascontiguousarray(columns))

    @property
    def sample_ids(self) -> Sequence[str]:
        """Of all records, in order."""
        return self._sample_ids

    def __len__(self) -> int:
        """Number of records."""
        return len(self._sample_ids)

    def batch(self, indices: Sequence[int] | NDArray[np.int64] | Tensor | None = None) -> Examples:
        """The records at `indices` (all by default), in that order.

        Raises:
            CircuitError: an index is out of range, or there is none.
        """
        records = self._checked(indices)
        counts, lengths = self._counts[records], self._lengths[records]
        row = torch.repeat_interleave(counts)  # the place in `records` of each question
        first = counts.cumsum(0) - counts
        source = torch.arange(len(row)) + (self._starts[records] - first)[row]
        index, at, answer, *facts = self._columns[:, source].unbind(0)
        width = int(lengths.max())
        return Examples(
            task=self.task,
            tokens=self._tokens[records, :width],
            lengths=lengths,
            kinds=self._kinds[records, :width],
            sample_ids=tuple([self._sample_ids[i] for i in records.tolist()]),
            row=row,
            index=index,
            at=at,
            answer=answer,
            facts={
                name: fact.bool() if holds else fact
                for (name, holds), fact in zip(self.task.facts.items(), facts, strict=True)
            },
        )

    def _checked(self, indices: Sequence[int] | NDArray[np.int64] | Tensor | None) -> Tensor:
        rows = torch.arange(len(self)) if indices is None else torch.as_tensor(indices)
        if rows.dtype == torch.bool and rows.shape == (len(self),):
            rows = rows.nonzero()[:, 0]
        wrong = rows.is_floating_point() or rows.dtype == torch.bool or rows.ndim != 1
        if wrong and rows.numel():
            raise CircuitError(
                f"record indices of {rows.dtype} {list(rows.shape)}",
                expected=f"integers, or a mask of {len(self)}",
            )
        rows = rows.long()
        if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= len(self):
            raise CircuitError(
                f"record indices {rows.tolist()[:5]}", expected=f"some of 0 .. {len(self) - 1}"
            )
        return rows


KEPT = 2**14
"""Records that a stream keeps, at most."""


class Stream:
    """A split without an end, whose records are drawn when a batch asks for them.

    The last batches are kept, for whoever takes the same steps again and again.
    """

    def __init__(self, task: Task, name: str, seed: int) -> None:
        self.task, self.name, self.seed = task, name, seed
        self._kept: dict[tuple[int, ...], Examples] = {}

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Examples:
        """The records of these numbers, in that order."""
        numbers = tuple(int(i) for i in indices)
        if numbers not in self._kept:
            if sum(map(len, self._kept)) + len(numbers) > KEPT:
                self._kept.clear()
            drawn = [self.task.drawn_record(self.name, self.seed, number) for number in numbers]
            self._kept[numbers] = self.task.examples(drawn)
        return self._kept[numbers]
