"""Draws the records of a benchmark from one seeded stream (definitions.md section 1).

Order of the draws: held-out pairs, then every generated split in the order of the config, then
the counterfactual splits. The same config gives the same records.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from circuit.errors import CircuitError
from circuit.tasks.base import Progress, Record
from circuit.tasks.symbolic_kv.config import BenchmarkConfig, CounterfactualSplit, GeneratedSplit
from circuit.tasks.symbolic_kv.feasibility import refuse_few_values, refuse_impossible
from circuit.tasks.symbolic_kv.stream import (
    BOS,
    EOS,
    READ,
    WRITE,
    Program,
    Vocabulary,
    parse,
    program_of,
)

Pair = tuple[int, int]
"""A (key token id, value token id)."""

ProgramKey = tuple[tuple[Pair, ...], tuple[Pair, ...]]
"""The writes and the reads of a record, each in order, as (key, value)."""

MAX_REDRAWS = 2000
"""Draws of one record before its settings are refused."""


def program_key(program: Program) -> ProgramKey:
    """What two records may not share: writes and reads, wherever the reads stand."""
    return (
        tuple([(write.key, write.value) for write in program.writes]),
        tuple([(read.key, read.answer) for read in program.reads]),
    )


@dataclass
class Draw:
    """The stream of randomness, what may be written, and the programs that exist so far."""

    config: BenchmarkConfig
    vocab: Vocabulary
    rng: random.Random
    heldout_pairs: frozenset[Pair]
    programs: set[ProgramKey] = field(default_factory=set)

    def admissible(self, key: int, *, heldout: bool) -> list[int]:
        """Values that make a pair of this status with `key`, in vocabulary order."""
        return [v for v in self.vocab.value_ids if ((key, v) in self.heldout_pairs) == heldout]


def draw_splits(
    config: BenchmarkConfig, progress: Progress | None = None
) -> tuple[frozenset[Pair], dict[str, list[Record]]]:
    """Draw the held-out pairs and all splits (names in the order of the config).

    Raises:
        CircuitError: the settings can never work, or `MAX_REDRAWS` draws gave no record.
    """
    refuse_impossible(config)
    vocab = Vocabulary(config.num_keys, config.num_values)
    rng = random.Random(config.seed)
    draw = Draw(config, vocab, rng, _draw_heldout_pairs(config, vocab, rng))
    refuse_few_values(config, vocab, draw.heldout_pairs)
    report = progress or (lambda split, done: None)
    drawn: dict[str, list[Record]] = {}
    for name, split in config.splits.items():
        if isinstance(split, GeneratedSplit):
            drawn[name] = _draw_split(draw, name, split, report)
    for name, split in config.splits.items():
        if isinstance(split, CounterfactualSplit):
            source = drawn[split.counterfactual_of]
            drawn[name] = _draw_counterfactuals(draw, name, split, source, report)
    return draw.heldout_pairs, {name: drawn[name] for name in config.splits}


def _draw_heldout_pairs(
    config: BenchmarkConfig, vocab: Vocabulary, rng: random.Random
) -> frozenset[Pair]:
    pairs = [(key, value) for key in vocab.key_ids for value in vocab.value_ids]
    count = max(1, round(config.holdout_answer_pair_fraction * len(pairs)))
    return frozenset(rng.sample(pairs, count))


def _draw_split(draw: Draw, name: str, split: GeneratedSplit, report: Progress) -> list[Record]:
    heldout = split.answer_pairs == "heldout"
    admissible = {key: draw.admissible(key, heldout=heldout) for key in draw.vocab.key_ids}
    records: list[Record] = []
    while len(records) < split.samples:
        tokens = _draw_tokens(draw, name, split, admissible)
        records.append(Record(f"{name}-{len(records):05d}", name, tokens))
        report(name, len(records))
    return records


def _draw_tokens(
    draw: Draw, name: str, split: GeneratedSplit, admissible: dict[int, list[int]]
) -> tuple[int, ...]:
    reasons: Counter[str] = Counter()
    for _ in range(MAX_REDRAWS):
        num_keys, overwrites, queries = (
            draw.rng.randint(limits.min, limits.max)
            for limits in (split.active_keys, split.overwrite_count, split.num_queries)
        )
        keys = _draw_write_keys(draw, num_keys, overwrites)
        values = _draw_values(draw.rng, keys, admissible)
        if values is None:
            reasons["no unused admissible value was left for a write"] += 1
            continue
        reads = _draw_reads(draw, split, _eligible_reads(keys, num_keys, split), queries)
        if reads is None:
            reasons["too few eligible reads (num_queries, query_lag)"] += 1
            continue
        tokens, program = _assemble(list(zip(keys, values, strict=True)), reads)
        if program in draw.programs:
            reasons["the record exists already (samples)"] += 1
            continue
        draw.programs.add(program)
        return tokens
    reason, times = reasons.most_common(1)[0]
    raise CircuitError(
        f"no record in {MAX_REDRAWS} draws; {times} times {reason}",
        where=f"splits.{name}",
        fix="loosen these settings of the split, or raise num_keys or num_values",
    )


def _draw_write_keys(draw: Draw, num_keys: int, overwrites: int) -> list[int]:
    """The key of every write: each active key once, then the overwrites."""
    active = draw.rng.sample(draw.vocab.key_ids, num_keys)
    keys = list(active)
    overwritten = dict.fromkeys(active, 0)
    for _ in range(overwrites):
        others = [key for key in active if key != keys[-1]]
        least = min([overwritten[key] for key in others])
        key = draw.rng.choice([key for key in others if overwritten[key] == least])
        overwritten[key] += 1
        keys.append(key)
    return keys


def _draw_values(
    rng: random.Random, keys: Sequence[int], admissible: dict[int, list[int]]
) -> list[int] | None:
    """An admissible value for each write, none twice; None when they run out."""
    values: list[int] = []
    used: set[int] = set()
    for key in keys:
        free = [value for value in admissible[key] if value not in used]
        if not free:
            return None
        values.append(rng.choice(free))
        used.add(values[-1])
    return values


def _eligible_reads(
    keys: Sequence[int], num_keys: int, split: GeneratedSplit
) -> dict[int, list[tuple[int, int]]]:
    """The (slot, key) of every eligible read, by lag."""
    lags = range(split.query_lag.min, split.query_lag.max + 1)
    eligible: dict[int, list[tuple[int, int]]] = {lag: [] for lag in lags}
    latest: dict[int, int] = {}
    for slot, written in enumerate(keys):
        latest[written] = slot
        for key, support in latest.items():
            if support >= num_keys and slot - support in eligible:
                eligible[slot - support].append((slot, key))
    return eligible


def _draw_reads(
    draw: Draw, split: GeneratedSplit, eligible: dict[int, list[tuple[int, int]]], count: int
) -> list[tuple[int, int]] | None:
    """`count` of the eligible (slot, key) by slot, in random order within one; None if too few."""
    rng = draw.rng
    if draw.config.lag_sampling == "eligible":
        pool = [read for reads in eligible.values() for read in reads]
        if len(pool) < count:
            return None
        chosen = rng.sample(pool, count)
    else:
        chosen = []
        for _ in range(count):
            pool = eligible[rng.randint(split.query_lag.min, split.query_lag.max)]
            if not pool:
                return None
            chosen.append(pool.pop(rng.randrange(len(pool))))
        rng.shuffle(chosen)
    return sorted(chosen, key=lambda read: read[0])


def _assemble(
    writes: Sequence[Pair], reads: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], ProgramKey]:
    tokens = [BOS]
    latest: dict[int, int] = {}
    answered: list[Pair] = []
    pending = 0
    for slot, (key, value) in enumerate(writes):
        tokens += (WRITE, key, value)
        latest[key] = value
        while pending < len(reads) and reads[pending][0] == slot:
            read_key = reads[pending][1]
            tokens += (READ, read_key, latest[read_key])
            answered.append((read_key, latest[read_key]))
            pending += 1
    tokens.append(EOS)
    return tuple(tokens), (tuple(writes), tuple(answered))


def _draw_counterfactuals(
    draw: Draw, name: str, split: CounterfactualSplit, source: list[Record], report: Progress
) -> list[Record]:
    records: list[Record] = []
    for original in source:
        if len(records) == split.samples:
            break
        changed = _draw_changed(draw, original)
        if changed is not None:
            tokens, write = changed
            sample_id = f"{name}-{len(records):05d}"
            records.append(Record(sample_id, name, tokens, original.sample_id, write))
            report(name, len(records))
    if len(records) < split.samples:
        raise CircuitError(
            f"only {len(records)} records of {split.counterfactual_of!r} have an admissible,"
            " unused value for a write that some read needs",
            where=f"splits.{name}",
            expected=f"{split.samples}",
            fix="lower samples or raise num_values",
        )
    return records


def _draw_changed(draw: Draw, original: Record) -> tuple[tuple[int, ...], int] | None:
    """The tokens with one needed write's value, and the answers, replaced; and that write."""
    program = program_of(original, draw.vocab)
    written = {write.value for write in program.writes}
    needed = sorted({read.support.index for read in program.reads})
    draw.rng.shuffle(needed)
    for index in needed:
        write = program.writes[index]
        status = (write.key, write.value) in draw.heldout_pairs
        free = [v for v in draw.admissible(write.key, heldout=status) if v not in written]
        draw.rng.shuffle(free)
        for value in free:
            # No value is written twice, so every occurrence belongs to this write or its reads.
            tokens = tuple([value if t == write.value else t for t in original.tokens])
            key = program_key(parse(tokens, draw.vocab, where=original.sample_id))
            if key not in draw.programs:
                draw.programs.add(key)
                return tokens, index
    return None
