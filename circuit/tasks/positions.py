"""Records as index tensors: batches, the token positions of each role, shortcut values.

`EncodedSplit` parses every record once; a batch is then sliced from its flat tables without a
Python loop. Roles are those of definitions.md section 2: every mask is `[read, pos]`, and none goes
beyond the read's prediction position.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from circuit.errors import CircuitError
from circuit.lazy import np, torch
from circuit.tasks.symbolic_kv import PAD, READ, Program, Record, Vocabulary

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class ReadIndex:
    """Every read of a batch, record by record, in order: one entry a read.

    Attributes:
        row: the read's row in `Batch.tokens`.
        index: its number in the record, from 0.
        op_pos, key_pos, answer_pos: token positions; `key_pos` is the prediction position.
        key, answer: token ids.
        support_index: number of the latest write of the key.
        support_op_pos, support_key_pos, support_value_pos: its token positions.
        lag: writes after the support and before the read.
        token_lag: tokens from the support's value to the prediction position.
        is_heldout: whether (key, answer) is a held-out pair.
        active_keys: number of distinct keys written in the record.
        writes_before: number of writes before the read.
        num_reads: number of reads in the record.
    """

    row: Int64[Tensor, " read"]
    index: Int64[Tensor, " read"]
    op_pos: Int64[Tensor, " read"]
    key_pos: Int64[Tensor, " read"]
    answer_pos: Int64[Tensor, " read"]
    key: Int64[Tensor, " read"]
    answer: Int64[Tensor, " read"]
    support_index: Int64[Tensor, " read"]
    support_op_pos: Int64[Tensor, " read"]
    support_key_pos: Int64[Tensor, " read"]
    support_value_pos: Int64[Tensor, " read"]
    lag: Int64[Tensor, " read"]
    token_lag: Int64[Tensor, " read"]
    is_heldout: Bool[Tensor, " read"]
    active_keys: Int64[Tensor, " read"]
    writes_before: Int64[Tensor, " read"]
    num_reads: Int64[Tensor, " read"]

    def __len__(self) -> int:
        """Number of reads."""
        return len(self.row)

    def select(self, chosen: Tensor) -> ReadIndex:
        """The reads that a mask `[read]` or an index tensor chooses."""
        return _map_tensors(self, lambda tensor: tensor[chosen])


@dataclass(frozen=True)
class WriteIndex:
    """Every write of a batch, record by record, in order: row, number, positions, token ids."""

    row: Int64[Tensor, " write"]
    index: Int64[Tensor, " write"]
    op_pos: Int64[Tensor, " write"]
    key_pos: Int64[Tensor, " write"]
    value_pos: Int64[Tensor, " write"]
    key: Int64[Tensor, " write"]
    value: Int64[Tensor, " write"]

    def __len__(self) -> int:
        """Number of writes."""
        return len(self.row)


_Index = TypeVar("_Index", ReadIndex, WriteIndex)


@dataclass(frozen=True)
class Batch:
    """Records side by side.

    Attributes:
        tokens: token ids, padded on the right to the longest record of the batch.
        lengths: number of tokens of each record.
        reads, writes: index tensors over all reads and writes.
        sample_ids: one a row.
    """

    tokens: Int64[Tensor, "batch pos"]
    lengths: Int64[Tensor, " batch"]
    reads: ReadIndex
    writes: WriteIndex
    sample_ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            lengths=self.lengths.to(device),
            reads=_map_tensors(self.reads, lambda tensor: tensor.to(device)),
            writes=_map_tensors(self.writes, lambda tensor: tensor.to(device)),
        )

    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """The token ids of each row, without padding."""
        return tuple(
            tuple(row[:length])
            for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        )

    def with_reads(self, chosen: Tensor) -> Batch:
        """The same rows with only the reads that a mask `[read]` or an index tensor chooses."""
        return replace(self, reads=self.reads.select(chosen))


def _map_tensors(index: _Index, change: Callable[[Tensor], Tensor]) -> _Index:
    return type(index)(
        **{field.name: change(getattr(index, field.name)) for field in fields(index)}
    )


class EncodedSplit:
    """Records parsed once, from which batches are sliced."""

    def __init__(
        self,
        records: Sequence[Record],
        vocab: Vocabulary,
        heldout_pairs: Collection[tuple[int, int]],
        *,
        through_reads: Sequence[int | None] | None = None,
    ) -> None:
        """Parse the records.

        Args:
            records: in the order that batch indices refer to.
            vocab: their vocabulary.
            heldout_pairs: the held-out (key token id, value token id).
            through_reads: per record, the last read to parse (None: all). Later reads and writes
                are left out of the tables; the corrupted copies of pairs need it.

        Raises:
            CircuitError: there is no record, or one is invalid (record and position are named).
        """
        if not records:
            raise CircuitError("no records to encode", expected="at least one")
        last_reads = through_reads or [None] * len(records)
        programs = [
            record.program(vocab, through_read=last)
            for record, last in zip(records, last_reads, strict=True)
        ]
        heldout = frozenset(heldout_pairs)
        self.vocabulary = vocab
        self._sample_ids = [record.sample_id for record in records]
        self._lengths = torch.tensor([len(record.tokens) for record in records])
        self._tokens = torch.full((len(records), int(self._lengths.max())), PAD)
        for row, record in enumerate(records):
            self._tokens[row, : len(record.tokens)] = torch.tensor(record.tokens)
        self._reads = _Table([_read_rows(program, heldout) for program in programs], ReadIndex)
        self._writes = _Table([_write_rows(program) for program in programs], WriteIndex)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._sample_ids)

    def batch(self, indices: Sequence[int] | NDArray[np.int64] | Tensor | None = None) -> Batch:
        """The records at `indices` (all by default), in that order.

        Raises:
            CircuitError: an index is out of range, or there is none.
        """
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
        lengths = self._lengths[rows]
        reads = self._reads.rows_of(rows)
        reads["is_heldout"] = reads["is_heldout"].bool()
        return Batch(
            tokens=self._tokens[rows, : int(lengths.max())],
            lengths=lengths,
            reads=ReadIndex(**reads),
            writes=WriteIndex(**self._writes.rows_of(rows)),
            sample_ids=tuple([self._sample_ids[i] for i in rows.tolist()]),
        )


def make_batch(
    records: Sequence[Record], vocab: Vocabulary, heldout_pairs: Collection[tuple[int, int]]
) -> Batch:
    """All of the records as one batch; for many batches of one split use `EncodedSplit`.

    Raises:
        CircuitError: there is no record, or one is invalid.
    """
    return EncodedSplit(records, vocab, heldout_pairs).batch()


class _Table:
    """The columns of an index, without its `row`, over many records one after the other."""

    def __init__(self, rows_by_record: list[list[tuple[int, ...]]], index: type[Any]) -> None:
        self.names = [field.name for field in fields(index) if field.name != "row"]
        self.counts = torch.tensor([len(rows) for rows in rows_by_record])
        self.starts = self.counts.cumsum(0) - self.counts
        flat = [row for rows in rows_by_record for row in rows]
        columns = np.array(flat, dtype=np.int64).reshape(len(flat), len(self.names)).T
        self.columns = torch.from_numpy(np.ascontiguousarray(columns))

    def rows_of(self, records: Tensor) -> dict[str, Tensor]:
        """The columns over the rows of `records` in turn; `row` is the place in `records`."""
        counts = self.counts[records]
        place = torch.repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        source = torch.arange(len(place)) + (self.starts[records] - first)[place]
        columns = self.columns[:, source].unbind(0)
        return {"row": place, **dict(zip(self.names, columns, strict=True))}


def _read_rows(
    program: Program, heldout_pairs: frozenset[tuple[int, int]]
) -> list[tuple[int, ...]]:
    """The columns of `ReadIndex` after `row`, in its order."""
    active_keys = len({write.key for write in program.writes})
    return [
        (
            read.index,
            read.op_pos,
            read.key_pos,
            read.answer_pos,
            read.key,
            read.answer,
            read.support.index,
            read.support.op_pos,
            read.support.key_pos,
            read.support.value_pos,
            read.lag,
            read.token_lag,
            (read.key, read.answer) in heldout_pairs,
            active_keys,
            read.writes_before,
            len(program.reads),
        )
        for read in program.reads
    ]


def _write_rows(program: Program) -> list[tuple[int, ...]]:
    """The columns of `WriteIndex` after `row`, in its order."""
    return [(w.index, w.op_pos, w.key_pos, w.value_pos, w.key, w.value) for w in program.writes]


def _at(positions: Tensor, batch: Batch) -> Tensor:
    """Mask `[read, pos]` of one position a read."""
    return torch.arange(batch.tokens.shape[1], device=positions.device) == positions[:, None]


def _prefix(batch: Batch) -> Tensor:
    pos = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return pos <= batch.reads.key_pos[:, None]


def _distractors(batch: Batch, written: Tensor, support: Tensor) -> Tensor:
    """Positions `written` (one a write) before the read, without the support's."""
    of_row = torch.zeros_like(batch.tokens, dtype=torch.bool)
    of_row[batch.writes.row, written] = True
    return of_row[batch.reads.row] & _prefix(batch) & ~_at(support, batch)


def _support_write(batch: Batch) -> Tensor:
    reads = batch.reads
    return (
        _at(reads.support_op_pos, batch)
        | _at(reads.support_key_pos, batch)
        | _at(reads.support_value_pos, batch)
    )


_ROLE_MASKS: dict[str, Callable[[Batch], Tensor]] = {
    "prediction": lambda b: _at(b.reads.key_pos, b),
    "query_key": lambda b: _at(b.reads.key_pos, b),
    "support_op": lambda b: _at(b.reads.support_op_pos, b),
    "support_key": lambda b: _at(b.reads.support_key_pos, b),
    "support_value": lambda b: _at(b.reads.support_value_pos, b),
    "support_write": _support_write,
    "key_distractors": lambda b: _distractors(b, b.writes.key_pos, b.reads.support_key_pos),
    "value_distractors": lambda b: _distractors(b, b.writes.value_pos, b.reads.support_value_pos),
    "causal_prefix": _prefix,
}

ROLES = tuple(_ROLE_MASKS)
"""The roles of definitions.md section 2, in its order."""


def check_roles(*roles: str) -> None:
    """Refuse a role that does not exist.

    Raises:
        CircuitError: lists the roles.
    """
    for role in roles:
        if role not in _ROLE_MASKS:
            raise CircuitError(f"unknown role {role!r}", expected=", ".join(ROLES))


def role_mask(batch: Batch, role: str) -> Bool[Tensor, "read pos"]:
    """Which token positions have a role for each read of the batch.

    Raises:
        CircuitError: there is no such role.
    """
    check_roles(role)
    return _ROLE_MASKS[role](batch)


def role_positions(
    batch: Batch, role: str
) -> tuple[Int64[Tensor, "read slot"], Bool[Tensor, "read slot"]]:
    """A role's positions in ascending order, padded on the right with 0, and which are real.

    Raises:
        CircuitError: there is no such role.
    """
    mask = role_mask(batch, role)
    counts = mask.sum(dim=1)
    width = int(counts.max()) if len(counts) else 0
    real = torch.arange(width, device=mask.device) < counts[:, None]
    positions = torch.zeros_like(real, dtype=torch.int64)
    positions[real] = mask.nonzero()[:, 1]
    return positions, real


def answer_mask(tokens: Int64[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Where the answers stand: two tokens after an `R`."""
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 2:] = tokens[:, :-2] == READ
    return mask


def shortcut_values(batch: Batch, k: int) -> Int64[Tensor, " read"]:
    """The value (token id) of the k-th last write before each read; `<pad>` if there is none.

    Raises:
        CircuitError: k is below 1.
    """
    if k < 1:
        raise CircuitError(f"write number {k} from the last", expected="1 (the last) or more")
    reads, writes = batch.reads, batch.writes
    wanted = reads.writes_before - k
    first = torch.searchsorted(writes.row, reads.row)
    values = writes.value[(first + wanted).clamp(min=0)]
    return torch.where(wanted >= 0, values, PAD)
