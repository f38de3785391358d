"""Whether a run or trace that was cut off may go on, or has to start anew.

It may go on if what stands there was made by this version of the program from the same config and
the same benchmark. Otherwise what it would become is not what a run from the start would be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from circuit import __version__
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.reading import read_json
from circuit.studies.commands import BENCHMARK_FILE
from circuit.trace.store import TraceStore
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import list_checkpoints, read_description
from circuit.training.run_folder import ENVIRONMENT


def run_goes_on(config: TrainConfig, traced: Path | None = None) -> bool:
    """Whether a training run goes on from its last checkpoint.

    Args:
        traced: folder of the trace that is recorded in the same pass, which has to go on, too.
    """
    folder = Path(config.output_dir)
    theirs = _read(folder / RUN_CONFIG)
    if theirs is None or _without_machine(theirs) != _without_machine(
        config.model_dump(mode="json")
    ):
        return False
    if (_read(folder / ENVIRONMENT) or {}).get("circuit") != __version__:
        return False
    try:
        saved = list_checkpoints(folder / "checkpoints")
        if not saved or not _of_benchmark(
            read_description(saved[max(saved)]).benchmark_digest, config
        ):
            return False
        return traced is None or _reaches(traced, config, max(saved))
    except CircuitError:  # a damaged checkpoint or trace: start anew
        return False


def trace_goes_on(folder: Path, config: TrainConfig) -> bool:
    """Whether a recording goes on from its last anchor."""
    manifest = _read(folder / "trace.json")
    if manifest is None:
        return False
    theirs = _without_machine(manifest.get("config") or {})
    return (
        theirs == _without_machine(config.model_dump(mode="json"))
        and (manifest.get("environment") or {}).get("circuit") == __version__
        and _of_benchmark(manifest.get("benchmark_digest"), config)
    )


def _reaches(folder: Path, config: TrainConfig, step: int) -> bool:
    """Whether a trace goes on, and is not behind its run."""
    if not trace_goes_on(folder, config):
        return False
    store = TraceStore(folder)
    return len(store.read_rows()) >= min(step, store.manifest.end_step)


def _of_benchmark(digest: Any, config: TrainConfig) -> bool:
    present = _read(Path(config.benchmark_dir) / Path(BENCHMARK_FILE).name) or {}
    return bool(digest == present.get("digest"))


def _without_machine(config: dict[str, Any]) -> dict[str, Any]:
    aside = ("device", "threads", "overrides")
    return {name: value for name, value in config.items() if name not in aside}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        payload = read_json(path)
    except CircuitError:
        return None
    return payload if isinstance(payload, dict) else None
