"""Scales of the study: the contract's numbers, and smaller ones of the same shape.

The contract speaks in multiples of 250 steps. A scale says how many optimizer steps stand for 250
(`unit`) and which task and model they are run on; every other number follows. Only `full` runs at
the project's root. The others have a folder of their own, `artifacts/scale/<scale>/`, in which the
contract's commands and paths hold as they stand there, but for the steps and ranks in their names.
So has the study with another seed than the contract's: `artifacts/scale/<scale>_seed0011/`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from circuit.errors import CircuitError

CONTRACT_UNIT = 250
LONG = 16000
"""Steps of the two reference runs in the contract."""
CONTRACT_SEED = 7
"""Of every run but those of the cross-seed study."""
ALL_SEEDS = (11, 13, 17, 23, 29)
LARGEST_SEED = 9999
"""Folders of seeds are named by four digits."""


@dataclass(frozen=True)
class Scale:
    """One size of the study.

    Attributes:
        name: of the scale.
        seed: of every run but those of the cross-seed study; None is the contract's.
        unit: optimizer steps that stand for 250 of the contract's.
        long_steps: of the two reference runs.
        seeds: of the cross-seed study.
        ablations: names of the ablation configs; None takes all.
        batched: whether all instances of a command run in one process.
        qk_shards, write_shards: parts into which attributions are cut.
        task: replaces fields of the benchmark's config.
        splits: replaces fields of each of its splits.
        samples: records of the training split, and of each other.
        run: replaces fields of the training configs.
        model: replaces fields of their model.
        learning_rate: of AdamW's configs.
        probes: records of the probe set.
        reads: that value-code reports look at.
        threads: intra-op threads of every command.
        shows_effects: whether its runs are long enough to show what the study claims.
    """

    name: str
    seed: int | None = None
    unit: int = CONTRACT_UNIT
    long_steps: int = LONG
    seeds: tuple[int, ...] = ALL_SEEDS
    ablations: tuple[str, ...] | None = None
    batched: bool = False
    qk_shards: int = 12
    write_shards: int = 4
    task: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, Any] = field(default_factory=dict)
    samples: tuple[int, int] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    probes: int = 96
    reads: int = 256
    threads: int = 1
    shows_effects: bool = True

    @property
    def is_contract(self) -> bool:
        """Whether it is the contract's own."""
        return self.name == "full" and self.seed is None

    @property
    def label(self) -> str:
        """Its name, with its seed if that is another than the contract's."""
        return self.name if self.seed is None else f"{self.name}_seed{self.seed:04}"

    @property
    def folder(self) -> Path:
        """Where it runs, relative to the project's root."""
        return Path() if self.is_contract else Path("artifacts") / "scale" / self.label

    def step(self, contract: int) -> int:
        """The step that stands for one of the contract's (a multiple of 250)."""
        if contract % CONTRACT_UNIT:
            raise ValueError(f"{contract} is no multiple of {CONTRACT_UNIT}")
        return contract // CONTRACT_UNIT * self.unit

    def name_of(self, *contract: int, digits: int = 4) -> str:
        """Steps as folder names have them: `1500_2500`."""
        return "_".join(f"{self.step(step):0{digits}}" for step in contract)

    @property
    def heads(self) -> tuple[str, ...]:
        """Every head of the model."""
        layers, heads = self.model.get("layers", 3), self.model.get("heads", 4)
        return tuple(f"L{layer}H{head}" for layer in range(layers) for head in range(heads))

    def key_rank(self, contract: int) -> int:
        """A rank of key identity: at most keys - 1."""
        return min(contract, int(self.task.get("num_keys", 8)) - 1)

    def value_rank(self, contract: int) -> int:
        """A rank of value identity: at most values - 1, and the model's width."""
        values = int(self.task.get("num_values", 128))
        return min(contract, values - 1, int(self.model.get("d_model", 128)))


PILOTS = ("adamw_baseline", "adamw_beta1_0", "adamw_beta2_0p999", "sgd_momentum_09", "sgd_plain")
_RATES = ("0p00001", "0p00003", "0p00010", "0p00030", "0p00100")
SWEEP = tuple(f"{kind}_lr_{rate}" for kind in ("sgd_momentum_09", "sgd_plain") for rate in _RATES)

_SMALL_TASK = {"num_values": 48, "lag_sampling": "uniform", "heuristic_max_accuracy": 1.0}
_SMALL_SPLIT = {
    "active_keys": {"min": 3, "max": 3},
    "overwrite_count": {"min": 4, "max": 4},
    "num_queries": {"min": 5, "max": 5},
    "query_lag": {"min": 0, "max": 2},
}

SCALES = {
    "full": Scale("full"),
    "uniform": Scale(
        "uniform",
        unit=80,
        long_steps=1920,
        ablations=PILOTS,
        qk_shards=2,
        write_shards=2,
        task={"lag_sampling": "uniform"},
        splits={
            "active_keys": {"min": 4, "max": 5},
            "overwrite_count": {"min": 8, "max": 8},
            "num_queries": {"min": 5, "max": 6},
            "query_lag": {"min": 1, "max": 4},
        },
        samples=(8000, 1024),
        run={"batch_size": 64, "schedule": {"name": "constant", "warmup_steps": 100}},
        model={"embedding_std": 0.5},
        learning_rate=0.002,
    ),
    "short": Scale(
        "short",
        unit=60,
        long_steps=1440,
        seeds=(11, 13),
        ablations=PILOTS,
        qk_shards=2,
        write_shards=2,
        task=_SMALL_TASK,
        splits=_SMALL_SPLIT,
        samples=(4000, 256),
        run={"batch_size": 64, "schedule": {"name": "constant", "warmup_steps": 50}},
        model={"d_model": 64, "d_ff": 256, "max_sequence_length": 64, "embedding_std": 0.5},
        learning_rate=0.004,
    ),
    "smoke": Scale(
        "smoke",
        unit=1,
        long_steps=24,
        seeds=(11,),
        ablations=("adamw_baseline", "sgd_plain_lr_0p00100"),
        batched=True,
        qk_shards=2,
        write_shards=2,
        task=_SMALL_TASK,
        splits=_SMALL_SPLIT,
        samples=(256, 48),
        run={"batch_size": 16, "schedule": {"name": "constant", "warmup_steps": 4}},
        model={"d_model": 64, "d_ff": 128, "max_sequence_length": 64, "embedding_std": 0.5},
        learning_rate=0.004,
        probes=16,
        reads=80,
        shows_effects=False,
    ),
}


def seeds_of(words: str) -> range:
    """The seeds that `11`, or `1:1000` with both ends, stand for.

    Raises:
        CircuitError: it is neither, or there are none in between.
    """
    found = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", words, re.ASCII)
    seeds = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not seeds:
        raise CircuitError(
            f"'{words}'",
            where="`seed`",
            expected=f"a seed of 0 to {LARGEST_SEED}, or FIRST:LAST",
        )
    return seeds


def find_scale(name: str, seeds: Sequence[int] = (), *, seed: int | None = None) -> Scale:
    """A scale by name.

    Args:
        seeds: of its cross-seed study, in place of its own.
        seed: of all its other runs, in place of the contract's; the cross-seed study is then of
            this seed, if `seeds` names no others.

    Raises:
        CircuitError: there is no such scale, or the seed is the contract's.
    """
    if name not in SCALES:
        raise CircuitError(f"unknown scale '{name}'", expected=f"one of {', '.join(SCALES)}")
    if seed == CONTRACT_SEED:
        raise CircuitError(
            f"{seed} is the contract's own seed",
            where="`base_seed`",
            expected="another",
            fix="leave it out: the study of the scale itself has this seed",
        )
    scale, others = SCALES[name], seeds or (() if seed is None else (seed,))
    return replace(scale, seed=seed, seeds=tuple(dict.fromkeys(others)) or scale.seeds)
