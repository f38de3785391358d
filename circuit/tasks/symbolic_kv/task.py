"""Latest-write lookup as a task: its facts, roles, pairs and shortcuts (definitions.md 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from circuit.tasks.base import (
    Drawn,
    Parsed,
    Progress,
    Question,
    Record,
    RoleMask,
    Stored,
    Task,
    Told,
)
from circuit.tasks.symbolic_kv.checks import BenchmarkFigures, check_benchmark
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.tasks.symbolic_kv.generator import Pair, draw_splits
from circuit.tasks.symbolic_kv.pairs import PAIR_RULES, Site
from circuit.tasks.symbolic_kv.stream import EOS, PAD, Program, Read, Vocabulary, program_of

if TYPE_CHECKING:
    from torch import Tensor

    from circuit.tasks.examples import Examples

KINDS = ("op", "write_key", "write_value", "read_key", "answer", "eos")
_OP, _WRITE_KEY, _WRITE_VALUE, _READ_KEY, _ANSWER, _EOS = range(len(KINDS))

LAST_WRITES = tuple(f"last_write_{k}" for k in range(1, 7))
"""The value of the k-th last write before the read; `<pad>` if there is none."""


def _distractors(kind: str, support: str, examples: Examples) -> Tensor:
    """Written keys or values before the read, without the support's."""
    return examples.of_kind(kind) & ~examples.role(support)


def _support_write(examples: Examples) -> Tensor:
    parts = (examples.role(f"support_{part}") for part in ("op", "key", "value"))
    op, key, value = parts
    return op | key | value


class HeldOut(Stored):
    """The held-out (key, value) by their tokens' texts."""

    heldout_pairs: list[tuple[str, str]]


class SymbolicKV(Task):
    """Latest-write lookup in a stream; its examples are reads.

    Attributes:
        heldout_pairs: the held-out (key token id, value token id).
    """

    Config = BenchmarkConfig
    Figures = BenchmarkFigures
    Facts = HeldOut
    kinds = KINDS
    roles: ClassVar[Mapping[str, str | RoleMask]] = {
        "prediction": "at",
        "query_key": "at",
        "support_op": "support_op_pos",
        "support_key": "support_key_pos",
        "support_value": "support_value_pos",
        "support_write": _support_write,
        "key_distractors": lambda e: _distractors("write_key", "support_key", e),
        "value_distractors": lambda e: _distractors("write_value", "support_value", e),
        "causal_prefix": lambda e: e.prefix(),
    }
    facts: ClassVar[Mapping[str, bool]] = {
        "key": False,
        "support_index": False,
        "support_op_pos": False,
        "support_key_pos": False,
        "support_value_pos": False,
        "lag": False,
        "token_lag": False,
        "is_heldout": True,
        "active_keys": False,
        "writes_before": False,
        "num_reads": False,
        **dict.fromkeys(LAST_WRITES, False),
    }
    slices: ClassVar[Mapping[str, str]] = {
        "lag": "lag",
        "active_keys": "active_keys",
        "writes_before": "writes_before",
        "heldout": "is_heldout",
    }
    shortcuts = LAST_WRITES
    shortcut_words = "the value of the k-th last write"
    pair_types = PAIR_RULES
    token_set_names = ("key", "value")
    support = "support_value"
    attended = "query_key"

    config: BenchmarkConfig
    vocabulary: Vocabulary

    def __init__(self, config: BenchmarkConfig, facts: HeldOut | None = None) -> None:
        super().__init__(config)
        self.vocabulary = Vocabulary(config.num_keys, config.num_values)
        self.choices = self.vocabulary.value_ids
        self.token_sets = {"key": self.vocabulary.key_ids, "value": self.vocabulary.value_ids}
        self.split_names = tuple(config.splits)
        pairs = [] if facts is None else facts.heldout_pairs
        self.heldout_pairs: frozenset[Pair] = frozenset(
            (key, value) for key, value in (self.vocabulary.encode(" ".join(p)) for p in pairs)
        )

    def draw(self, report: Progress) -> Drawn:
        """See `Task.draw`; a benchmark that must not exist is refused (checks.py)."""
        self.heldout_pairs, splits = draw_splits(self.config, report)
        figures = check_benchmark(self.config, self.vocabulary, self.heldout_pairs, splits)
        text = self.vocabulary.tokens
        pairs = [(text[key], text[value]) for key, value in sorted(self.heldout_pairs)]
        return Drawn(splits, figures, HeldOut(heldout_pairs=pairs))

    def parse(self, record: Record, through: int | None = None) -> Parsed:
        """The reads of a record; see `Task.parse`."""
        program = program_of(record, self.vocabulary, through_read=through)
        kinds = [_OP] * len(record.tokens)
        for write in program.writes:
            kinds[write.key_pos], kinds[write.value_pos] = _WRITE_KEY, _WRITE_VALUE
        for read in program.reads:
            kinds[read.key_pos], kinds[read.answer_pos] = _READ_KEY, _ANSWER
        if record.tokens[-1] == EOS:
            kinds[-1] = _EOS
        return Parsed([self._question(program, read) for read in program.reads], kinds)

    def _question(self, program: Program, read: Read) -> Question:
        before = program.writes[: read.writes_before]
        support = read.support
        facts = {
            "key": read.key,
            "support_index": support.index,
            "support_op_pos": support.op_pos,
            "support_key_pos": support.key_pos,
            "support_value_pos": support.value_pos,
            "lag": read.lag,
            "token_lag": read.token_lag,
            "is_heldout": (read.key, read.answer) in self.heldout_pairs,
            "active_keys": len({write.key for write in program.writes}),
            "writes_before": read.writes_before,
            "num_reads": len(program.reads),
        }
        for k, name in enumerate(LAST_WRITES, start=1):
            facts[name] = before[-k].value if k <= len(before) else PAD
        site = Site(program, read, self.vocabulary, self.heldout_pairs)
        return Question(read.index, read.key_pos, read.answer, facts, site)

    @classmethod
    def tell(cls, figures: BenchmarkFigures) -> Told:
        """Sizes and shortcut accuracies, a row a split."""
        rows = []
        for name, split in figures.splits.items():
            k = split.strongest_positional
            accuracies = [*split.shortcuts.values(), split.positional_shortcuts[k]]
            *limited, positional = [f"{100 * accuracy:.1f}" for accuracy in accuracies]
            sizes = [str(split.records), str(split.reads), f"{split.min_tokens}-{split.max_tokens}"]
            rows.append([name, *sizes, *limited, str(k), positional])
        warnings = []
        if figures.warnings:
            warnings.append(
                f"in {len(figures.warnings)} splits 'the value of the k-th last write' answers"
                " more than half of the reads without looking at a key (last two columns); read"
                " accuracy by lag, or see configs/benchmark/symbolic_kv_uniform_lag.json"
            )
        return Told(
            ["split", "records", "reads", "tokens", "last %", "first %", "freq. %", "k", "k-th %"],
            rows,
            "shortcuts, in % of the reads that they answer: last value written, first value of the"
            " key, most frequent value, value of the k-th last write",
            warnings,
        )
