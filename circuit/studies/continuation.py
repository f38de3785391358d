"""Whether a run or trace that was cut off may go on, or has to start anew.

It may go on if what stands there was made by this version of the program from the same config and
the same benchmark. Otherwise what it would become is not what a run from the start would be. What
another run of the same recipe has done counts as done, too: it is taken over.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from circuit import __version__
from circuit.artifacts import OutputFolder, atomic_write_text, dump_json, dump_rows
from circuit.environment import changed_facts, environment_facts, prepare_process, recorded_facts
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.reading import read_json
from circuit.sealed import sealed
from circuit.studies.commands import BENCHMARK_FILE
from circuit.trace.store import TraceStore
from circuit.train_config import TrainConfig, load_run_config
from circuit.training.checkpoints import (
    checkpoint_name,
    encode_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_description,
)
from circuit.training.loop import COMMAND, FILES
from circuit.training.run_folder import ENVIRONMENT, METRICS, read_metrics

_WRITTEN = {"log_every", "eval_every", "tracked_splits", "best"}
"""What decides the rows of a run, besides its steps."""


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


def take_over(config: TrainConfig, source: Path) -> int:
    """Let a run begin with the states and rows of another one of its recipe.

    Up to that step its folder is what training would have left, byte for byte (`best.pt` comes when
    it is resumed); from there `train` goes on.

    Args:
        config: of the run that begins; it may save fewer states and end elsewhere.
        source: folder of the other.

    Returns:
        The last step that was taken over. 0, and nothing is written, if the other has another
        recipe, benchmark or environment, writes other rows, or has not come as far as one state.

    Raises:
        CircuitError: the other run is damaged, or the folder of this one is not free.
    """
    steps = _common_steps(config, load_run_config(source / RUN_CONFIG), source)
    prepare_process(threads=config.threads, device=config.device)
    facts, theirs = environment_facts(config.device), recorded_facts(source / ENVIRONMENT)
    if not steps or theirs.get("circuit") != __version__ or changed_facts(theirs, facts):
        return 0
    saved = list_checkpoints(source / "checkpoints")
    with OutputFolder(
        config.output_dir, COMMAND, writes=FILES, overwrite=True, resumable=True
    ) as folder:
        folder.clear()
        folder.write_text(RUN_CONFIG, config.to_json(origin=True))
        folder.write_text(ENVIRONMENT, dump_json(sealed(facts)))
        # before the states that have counted them: one that is cut off here goes on from the last
        written = read_description(saved[steps[-1]]).notes.metrics_rows
        folder.claim([METRICS])
        atomic_write_text(folder.path(METRICS), dump_rows(read_metrics(source)[:written]))
        for step in steps:
            state = replace(load_checkpoint(saved[step]), config=config)
            folder.write_bytes(f"checkpoints/{checkpoint_name(step)}", encode_checkpoint(state))
    return steps[-1]


def _common_steps(config: TrainConfig, theirs: TrainConfig, source: Path) -> list[int]:
    """Steps at which both save a state, up to the last at which both have written the same."""
    ours, others = (c.model_dump(include=_WRITTEN) for c in (config, theirs))
    saved = list_checkpoints(source / "checkpoints")
    if ours != others or config.recipe_difference(theirs) is not None or not saved:
        return []
    if not _of_benchmark(read_description(saved[max(saved)]).benchmark_digest, config):
        return []
    every, end = config.checkpoint_every, config.steps
    grid = sorted({*range(every, end + 1, every), end})
    common = list(takewhile(saved.__contains__, grid))
    # rows are written at the last step, too, which is another one for each of them
    regular = (config.log_every, config.eval_every)
    while common and any(common[-1] % n for n in regular) and not common[-1] == end == theirs.steps:
        common.pop()
    # the best state is one of those that are taken
    return common if config.eval_every % every == 0 else []


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
