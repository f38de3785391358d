"""What a benchmark must hold to exist, and what it reports about itself (definitions.md section 1).

It refuses duplicate ids, shared programs or tokens, a wrong answer, held-out leakage and a strong
shortcut. It reports the positional shortcuts "value of the k-th last write".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from circuit.documents import Document
from circuit.errors import CircuitError
from circuit.tasks.base import Record
from circuit.tasks.symbolic_kv.config import BenchmarkConfig, CounterfactualSplit, GeneratedSplit
from circuit.tasks.symbolic_kv.generator import Pair, program_key
from circuit.tasks.symbolic_kv.stream import Program, Vocabulary, program_of

POSITIONAL_SHORTCUTS = range(1, 7)
STRONG_SHORTCUT = 0.5
"""Accuracy above which a positional shortcut is warned of."""


class SplitFigures(Document):
    """What was measured on one split; accuracies are shares of its reads.

    Attributes:
        min_tokens, max_tokens: shortest and longest record, `<bos>` and `<eos>` included.
        leaked_writes: writes whose held-out status is not the split's.
        lags: number of reads by lag.
        shortcuts: accuracy of the three shortcuts that are limited.
        positional_shortcuts: accuracy of "value of the k-th last write", by k.
        strongest_positional: the k of the strongest.
    """

    records: int
    writes: int
    reads: int
    min_tokens: int
    max_tokens: int
    leaked_writes: int
    lags: dict[int, int]
    shortcuts: dict[str, float]
    positional_shortcuts: dict[int, float]
    strongest_positional: int


class BenchmarkFigures(Document):
    """The figures of every split, and the warnings (one sentence each)."""

    splits: dict[str, SplitFigures]
    warnings: list[str]


def check_benchmark(
    config: BenchmarkConfig,
    vocab: Vocabulary,
    heldout_pairs: frozenset[Pair],
    splits: Mapping[str, Sequence[Record]],
) -> BenchmarkFigures:
    """Measure every split.

    Raises:
        CircuitError: the benchmark must not exist; the figures at fault are given.
    """
    # Parsing re-executes each sequence: an answer that is not the latest write is refused there.
    programs = {
        name: [program_of(record, vocab) for record in records] for name, records in splits.items()
    }
    _refuse_shared(splits, programs)
    figures = {}
    for name, records in splits.items():
        heldout = _expects_heldout(config, name)
        figures[name] = _measure(records, programs[name], heldout_pairs, heldout=heldout)
        _refuse(name, figures[name], config.heuristic_max_accuracy)
    warnings = [
        f"split {name}: the value of write number {f.strongest_positional} from the last answers"
        f" {f.positional_shortcuts[f.strongest_positional]:.1%} of its reads"
        for name, f in figures.items()
        if f.positional_shortcuts[f.strongest_positional] > STRONG_SHORTCUT
    ]
    return BenchmarkFigures(splits=figures, warnings=warnings)


def _expects_heldout(config: BenchmarkConfig, name: str) -> bool:
    split = config.splits[name]
    if isinstance(split, CounterfactualSplit):
        return _expects_heldout(config, split.counterfactual_of)
    assert isinstance(split, GeneratedSplit)
    return split.answer_pairs == "heldout"


def _refuse_shared(
    splits: Mapping[str, Sequence[Record]], programs: Mapping[str, Sequence[Program]]
) -> None:
    ids: dict[object, str] = {}
    tokens: dict[object, str] = {}
    contents: dict[object, str] = {}
    for name, records in splits.items():
        for record, program in zip(records, programs[name], strict=True):
            for what, labels, key in (
                ("sample id", ids, record.sample_id),
                ("tokens", tokens, record.tokens),
                ("program", contents, program_key(program)),
            ):
                label = f"{name}/{record.sample_id}"
                if key in labels:
                    raise CircuitError(f"{labels[key]} and {label} share their {what}")
                labels[key] = label


def _measure(
    records: Sequence[Record],
    programs: Sequence[Program],
    heldout_pairs: frozenset[Pair],
    *,
    heldout: bool,
) -> SplitFigures:
    lags: Counter[int] = Counter()
    hits: Counter[str] = Counter()
    leaked = 0
    for record, program in zip(records, programs, strict=True):
        leaked += sum(((w.key, w.value) in heldout_pairs) != heldout for w in program.writes)
        lags.update(read.lag for read in program.reads)
        _count_shortcuts(record, program, hits)
    reads = lags.total()
    # A value is written at most once in a generated record, so the value of the k-th last write
    # is right exactly when the lag is k - 1.
    positional = {k: lags[k - 1] / reads for k in POSITIONAL_SHORTCUTS}
    lengths = [len(record.tokens) for record in records]
    return SplitFigures(
        records=len(records),
        writes=sum(len(program.writes) for program in programs),
        reads=reads,
        min_tokens=min(lengths),
        max_tokens=max(lengths),
        leaked_writes=leaked,
        lags=dict(sorted(lags.items())),
        shortcuts={name: hits[name] / reads for name in _SHORTCUTS},
        positional_shortcuts=positional,
        strongest_positional=max(positional, key=lambda k: (positional[k], -k)),
    )


_SHORTCUTS = ("last_value_written", "first_value_of_key", "most_frequent_value")


def _count_shortcuts(record: Record, program: Program, hits: Counter[str]) -> None:
    """Count the reads that each limited shortcut answers."""
    first: dict[int, int] = {}
    for write in program.writes:
        first.setdefault(write.key, write.value)
    frequency: Counter[int] = Counter()
    counted = 0
    for read in program.reads:
        # Every value in the sequence so far counts, in writes and in earlier answers alike.
        frequency.update(record.tokens[counted * 3 + 3 : read.op_pos : 3])
        counted = (read.op_pos - 1) // 3
        most = max(frequency.values())
        smallest = min([value for value, times in frequency.items() if times == most])
        last = program.writes[read.writes_before - 1].value
        hits["last_value_written"] += last == read.answer
        hits["first_value_of_key"] += first[read.key] == read.answer
        hits["most_frequent_value"] += smallest == read.answer


def _refuse(name: str, figures: SplitFigures, limit: float) -> None:
    if figures.leaked_writes:
        raise CircuitError(
            f"{figures.leaked_writes} of {figures.writes} writes leak held-out status",
            where=f"split {name}",
            expected="none",
        )
    strong = {what: share for what, share in figures.shortcuts.items() if share > limit}
    if strong:
        shown = ", ".join(f"{what} {share:.1%}" for what, share in figures.shortcuts.items())
        raise CircuitError(
            f"a shortcut answers too many of the {figures.reads} reads: {shown}",
            where=f"split {name}",
            expected=f"at most heuristic_max_accuracy ({limit:.1%})",
            fix="raise query_lag.min above 0, or vary active_keys and overwrite_count more",
        )
