"""Configs that the study derives from the contract's: of smaller scales, seeds and sweeps."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from circuit.config import parse_config
from circuit.reading import read_json
from circuit.studies.scales import LONG, PILOTS, SWEEP, Scale
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.train_config import TrainConfig

BENCHMARK = "configs/benchmark/symbolic_kv_base.json"
FORMATION = "configs/train/symbolic_kv_formation.json"
GENERALIZATION = "configs/train/symbolic_kv_generalization.json"
_ABLATION = "configs/train/optimizer_ablation"
HORIZON = 6000
"""Steps of the traces, of the ablation and of the cross-seed runs."""


def ablation_configs(scale: Scale) -> dict[str, str]:
    """Name and config file of every ablation run of a scale, the pilots first."""
    files = {name: f"{_ABLATION}/pilot_seed0007/{name}.json" for name in PILOTS}
    files |= {name: f"{_ABLATION}/sgd_lr_sweep_seed0007/{name}.json" for name in SWEEP}
    return files if scale.ablations is None else {name: files[name] for name in scale.ablations}


def contract_configs(scale: Scale) -> list[str]:
    """Every config file that the study starts from, relative to where it runs."""
    return [BENCHMARK, FORMATION, GENERALIZATION, *ablation_configs(scale).values()]


def shipped(path: str) -> dict[str, Any]:
    """The JSON of one of the contract's configs, from the package."""
    text = Path(str(files("circuit.configs"))).joinpath(*Path(path).parts[1:])
    payload = read_json(text)
    assert isinstance(payload, dict)
    return payload


def scaled(path: str, scale: Scale) -> str:
    """The text of one of the contract's configs at another scale."""
    payload = shipped(path)
    if path == BENCHMARK:
        return parse_config(_benchmark(payload, scale), BenchmarkConfig, where=path).to_json()
    return parse_config(_run(payload, scale), TrainConfig, where=path).to_json()


def _benchmark(payload: dict[str, Any], scale: Scale) -> dict[str, Any]:
    splits = {}
    for name, split in payload["splits"].items():
        train, other = scale.samples or (split["samples"],) * 2
        sized = {**split, "samples": train if name == "train" else other}
        splits[name] = sized if "counterfactual_of" in split else {**sized, **scale.splits}
        if scale.splits and name == "structural_ood":
            harder = ("active_keys", "overwrite_count")
            splits[name] |= {f: {end: n + 1 for end, n in splits[name][f].items()} for f in harder}
    return payload | scale.task | {"splits": splits}


def _run(payload: dict[str, Any], scale: Scale) -> dict[str, Any]:
    long = payload["steps"] == LONG
    changed = payload | scale.run
    changed["model"] = payload["model"] | scale.model
    changed["steps"] = scale.long_steps if long else scale.step(payload["steps"])
    for name in ("eval_every", "checkpoint_every"):
        changed[name] = scale.step(payload[name])
    changed["log_every"] = max(1, payload["log_every"] * scale.unit // 250)
    if scale.seed is not None:
        changed["seed"] = scale.seed
    if payload["optimizer"]["name"] == "adamw" and scale.learning_rate is not None:
        changed["optimizer"] = payload["optimizer"] | {"learning_rate": scale.learning_rate}
    return changed
