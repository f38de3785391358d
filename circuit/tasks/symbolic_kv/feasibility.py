"""Settings of a benchmark that can never work are refused before anything is drawn.

Every bound here is necessary, not sufficient: what passes may still be refused by the generator
after many draws. Each combination that the ranges allow must be possible, for one that is not
would never be drawn and the benchmark would silently be another than its config says.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from circuit.errors import CircuitError
from circuit.tasks.symbolic_kv.config import BenchmarkConfig, GeneratedSplit
from circuit.tasks.symbolic_kv.stream import Vocabulary


def refuse_impossible(config: BenchmarkConfig) -> None:
    """Check the settings that need no randomness.

    Raises:
        CircuitError: naming the setting, its value and what would do.
    """
    if not config.splits:
        raise CircuitError("there is no split", where="splits", expected="at least one")
    for name, split in config.splits.items():
        if not name or ":" in name or "/" in name or "\\" in name or name.startswith("."):
            raise CircuitError(f"{name!r} cannot name a file", where="splits")
        if isinstance(split, GeneratedSplit):
            _refuse_counts(config, f"splits.{name}", split)
            for num_keys, overwrites in _sizes(split):
                _refuse_lags(config, f"splits.{name}", split, num_keys, overwrites)


def _refuse_counts(config: BenchmarkConfig, where: str, split: GeneratedSplit) -> None:
    keys, overwrites = split.active_keys, split.overwrite_count
    if keys.max > config.num_keys:
        raise CircuitError(
            f"{keys.max} active keys of {config.num_keys}",
            where=f"{where}.active_keys.max",
            expected=f"at most num_keys ({config.num_keys})",
        )
    if keys.min < 2:
        raise CircuitError(
            f"{keys.min} active keys",
            where=f"{where}.active_keys.min",
            expected="at least 2 (an overwrite goes to another key than the previous write)",
        )
    if split.num_queries.min < 1:
        raise CircuitError("no reads", where=f"{where}.num_queries.min", expected="at least 1")
    if keys.max + overwrites.max > config.num_values:
        raise CircuitError(
            f"{keys.max} + {overwrites.max} writes need as many values, none twice",
            where=f"{where}.overwrite_count.max",
            expected=f"at most num_values ({config.num_values}) writes in all",
        )


def _sizes(split: GeneratedSplit) -> Iterator[tuple[int, int]]:
    keys, overwrites = split.active_keys, split.overwrite_count
    return product(
        range(keys.min, keys.max + 1),
        range(overwrites.min, overwrites.max + 1),
    )


def largest_lag(num_keys: int, overwrites: int) -> int:
    """The largest lag that a read of one of some overwrites, at least one, can have.

    Overwrites come in rounds that visit each key once, so at most 2 (num_keys - 1) other writes
    stand between two overwrites of a key; two keys alternate.
    """
    return min(overwrites - 1, 1 if num_keys == 2 else 2 * (num_keys - 1))


def _refuse_lags(
    config: BenchmarkConfig, where: str, split: GeneratedSplit, num_keys: int, overwrites: int
) -> None:
    if overwrites == 0:
        raise CircuitError(
            "no overwrites, so that no read can be placed (it reads an overwrite)",
            where=f"{where}.overwrite_count.min",
            expected="at least 1",
        )
    lags, largest = split.query_lag, largest_lag(num_keys, overwrites)
    sizes = f"with {num_keys} active keys and {overwrites} overwrites"
    must_reach = lags.max if config.lag_sampling == "uniform" else lags.min
    if must_reach > largest:
        raise CircuitError(
            f"no read has lag {must_reach} {sizes}",
            where=f"{where}.query_lag",
            expected=f"at most {largest}",
            fix="raise active_keys.min or overwrite_count.min, or lower query_lag",
        )
    # After overwrite j a read reaches back j lags at most, one key a lag, num_keys keys in all.
    most = sum(
        min(num_keys, max(0, min(lags.max, largest, j) - lags.min + 1)) for j in range(overwrites)
    )
    if most < split.num_queries.max:
        raise CircuitError(
            f"at most {most} eligible reads {sizes} and lags {lags.min} to {lags.max}",
            where=f"{where}.num_queries.max",
            expected=f"at most {most}, not {split.num_queries.max}",
            fix="lower num_queries, raise overwrite_count.min or widen query_lag",
        )


def refuse_few_values(
    config: BenchmarkConfig, vocab: Vocabulary, heldout_pairs: frozenset[tuple[int, int]]
) -> None:
    """Check that enough keys have enough admissible values in every split.

    Raises:
        CircuitError: naming the split.
    """
    for name, split in config.splits.items():
        if not isinstance(split, GeneratedSplit):
            continue
        heldout = split.answer_pairs == "heldout"
        values = {
            key: {v for v in vocab.value_ids if ((key, v) in heldout_pairs) == heldout}
            for key in vocab.key_ids
        }
        for num_keys, overwrites in _sizes(split):
            # A round visits each key once, so a key is written at least this often.
            needed = 1 + overwrites // num_keys
            usable = [admissible for admissible in values.values() if len(admissible) >= needed]
            distinct = len(set().union(*usable))
            if len(usable) < num_keys or distinct < num_keys + overwrites:
                raise CircuitError(
                    f"too few admissible {split.answer_pairs} values: {len(usable)} keys have the"
                    f" {needed} that {num_keys} active keys and {overwrites} overwrites need,"
                    f" {distinct} values in all",
                    where=f"splits.{name}.answer_pairs",
                    fix="raise num_values, change holdout_answer_pair_fraction or lower"
                    " overwrite_count",
                )
