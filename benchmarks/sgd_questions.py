"""Does SGD learn the lookup with another clip norm or schedule, or at Adam's norm? Over seeds.

    python benchmarks/sgd_questions.py FOLDER [FIRST:LAST]    # seeds 1:5

The task and model are those of `circuit reproduce --scale short`, the 1440 steps and the rates'
ends those of its sweep (docs/results.md). A variant is one change of its SGD with momentum 0.9;
`at Adam's norm` is AdamW whose step, decay aside, is turned straight against the gradient, or the
momentum, and keeps its length (definitions.md, section 7). What a training gave stays in FOLDER,
and another start does what is missing. Prints the validation answer accuracy at the last step:
mean over seeds with Student's t interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuit.artifacts import atomic_write_text, dump_json
from circuit.config import parse_config
from circuit.reading import read_json
from circuit.reports.intervals import spread
from circuit.strict_json import parse_json
from circuit.studies.configs import BENCHMARK, ablation_configs, scaled
from circuit.studies.scales import find_scale
from circuit.tasks.benchmark import write_benchmark
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import DivergedError
from circuit.training.loop import train

SCALE = find_scale("short")
SPLIT = "validation_iid"


def against(direction: str) -> dict[str, Any]:
    """AdamW's step, as long as it is, straight against the gradient or the momentum."""
    whole = {"start": 0, "end": SCALE.long_steps}
    return {"edit": {**whole, "direction": {direction: 1.0}}}


def at_rate(rate: float, **changes: Any) -> dict[str, Any]:
    """SGD at a rate, and otherwise as changed."""
    return {"optimizer": {"learning_rate": rate}, **changes}


COSINE = {"name": "cosine", "warmup_steps": 50}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("adamw_baseline", {}),
    "AdamW's norm, against the gradient": ("adamw_baseline", against("gradient")),
    "AdamW's norm, against the momentum": ("adamw_baseline", against("momentum")),
    **{
        f"SGD, rate {rate}, {what}": ("sgd_momentum_09", at_rate(rate, **changes))
        for what, changes, rates in (
            ("clip 1", {}, (0.03, 0.3)),
            ("no clip", {"gradient_clip": None}, (0.03, 0.3)),
            ("clip 0.1", {"gradient_clip": 0.1}, (0.3, 3.0)),
            ("cosine to 0", {"schedule": COSINE}, (0.1, 1.0)),
        )
        for rate in rates
    },
}


def config_of(folder: Path, base: str, seed: int, changes: Mapping[str, Any]) -> TrainConfig:
    """The config of one training."""
    payload = parse_json(scaled(ablation_configs(SCALE)[base], SCALE))
    optimizer = payload["optimizer"] | changes.get("optimizer", {})
    places = {"output_dir": str(folder), "benchmark_dir": str(folder.parents[1] / "data")}
    payload |= {**changes, "optimizer": optimizer, "seed": seed, "threads": 1, **places}
    return parse_config(payload, TrainConfig, where=base)


def accuracy(folder: Path, base: str, seed: int, changes: Mapping[str, Any]) -> float | None:
    """Answer accuracy at the last step; None of a training that diverges."""
    told = folder / "accuracy.json"
    if not told.exists():
        try:
            result = train(config_of(folder, base, seed, changes), resume=True)
            reached: float | None = result.evaluations[SPLIT].answer_accuracy
        except DivergedError:
            reached = None
        atomic_write_text(told, dump_json(reached))
    value: float | None = read_json(told)
    return value


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seeds", nargs="?", default="1:5")
    asked = parser.parse_args()
    first, last = map(int, asked.seeds.split(":"))
    benchmark = parse_config(parse_json(scaled(BENCHMARK, SCALE)), BenchmarkConfig, where=BENCHMARK)
    data = benchmark.model_copy(update={"output_dir": str(asked.folder / "data")})
    write_benchmark(data, overwrite=True)
    reached: dict[str, list[float | None]] = {name: [] for name in VARIANTS}
    for seed in range(first, last + 1):
        for number, (name, (base, changes)) in enumerate(VARIANTS.items()):
            run = asked.folder / f"seed_{seed:04}" / f"{number:02}"
            reached[name].append(accuracy(run, base, seed, changes))
    for name, values in reached.items():
        of = spread(values)
        shown = ["-" if of[key] is None else f"{of[key]:6.1%}" for key in ("mean", "least", "most")]
        ends = [of["mean_low"], of["mean_high"]]
        between = "-" if None in ends else " to ".join(f"{end:.1%}" for end in ends)
        print(f"{name:38} {shown[0]} ({between}), {shown[1]} to {shown[2]}, {len(values)} seeds")


if __name__ == "__main__":
    main()
