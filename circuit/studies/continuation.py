"""Whether a run or trace that was cut off may go on, or has to start anew.

It may go on if what stands there was made by this version of the program from the same config and
the same benchmark. Otherwise what it would become is not what a run from the start would be. What
another run of the same recipe has done counts as done, too: it is taken over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from circuit import __version__
from circuit.artifacts import OutputFolder, Row, atomic_write_text, dump_json, dump_rows
from circuit.config import parse_config
from circuit.environment import changed_facts, environment_facts, prepare_process, recorded_facts
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.reading import read_json
from circuit.sealed import sealed
from circuit.studies.commands import BENCHMARK_FILE
from circuit.trace.store import TraceStore
from circuit.train_config import TrainConfig, load_run_config
from circuit.training.checkpoints import (
    Best,
    Notes,
    checkpoint_name,
    encode_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_description,
)
from circuit.training.loop import COMMAND, FILES, planned
from circuit.training.run_folder import ENVIRONMENT, METRICS, read_metrics


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
        recipe, benchmark or environment, has written other rows, or has saved none of its states.

    Raises:
        CircuitError: the other run is damaged, or is this one; or this one's folder is not free.
    """
    theirs = load_run_config(source / RUN_CONFIG)
    if Path(config.output_dir).exists() and source.samefile(config.output_dir):
        raise CircuitError(
            "is the run itself",
            where=source,
            expected="the folder of another run",
            fix="leave `same_as` out, which trains it anew; `circuit train --resume` goes on",
        )
    if config.recipe_difference(theirs) is not None:
        return 0
    saved, rows = list_checkpoints(source / "checkpoints"), read_metrics(source)
    taken = _common_states(config, saved, rows)
    prepare_process(threads=config.threads, device=config.device)
    facts, recorded = environment_facts(config.device), recorded_facts(source / ENVIRONMENT)
    if not taken or recorded.get("circuit") != __version__ or changed_facts(recorded, facts):
        return 0
    last = max(taken)
    with OutputFolder(
        config.output_dir, COMMAND, writes=FILES, overwrite=True, resumable=True
    ) as folder:
        folder.clear(planned(config))
        folder.write_text(RUN_CONFIG, config.to_json(origin=True))
        folder.write_text(ENVIRONMENT, dump_json(sealed(facts)))
        # before the states that have counted them: one that is cut off here goes on from the last
        folder.claim([METRICS])
        atomic_write_text(folder.path(METRICS), dump_rows(rows[: taken[last]]))
        for step in taken:
            state = replace(load_checkpoint(saved[step]), config=config)
            folder.write_bytes(f"checkpoints/{checkpoint_name(step)}", encode_checkpoint(state))
    return last


def _common_states(
    config: TrainConfig, saved: Mapping[int, Path], rows: Sequence[Row]
) -> dict[int, int]:
    """Of the states that a run is to save, those that another has saved; rows up to each."""
    every, end, common = config.checkpoint_every, config.steps, dict[int, int]()
    for step, notes in _notes(config, rows):
        if step == 0 or (step % every and step != end):
            continue
        if step not in saved:
            break
        state = read_description(saved[step])
        theirs = parse_config(state.config, TrainConfig, where=saved[step])
        if config.recipe_difference(theirs) or not _of_benchmark(state.benchmark_digest, config):
            break
        if (state.notes.best, state.notes.metrics_rows) != (notes.best, notes.metrics_rows):
            break
        common[step] = notes.metrics_rows or 0
        if notes.best is not None and notes.best.step not in common:
            del common[step]  # the best state would be one that is not taken
            break
    return common


def _notes(config: TrainConfig, rows: Sequence[Row]) -> Iterator[tuple[int, Notes]]:
    """Of each step the notes of its state, as far as rows are those that training would write.

    A run that ended, or was resumed with other bookkeeping, has rows that another would not have.
    """
    asked, end = config.best, config.steps
    best, count = None, 0
    for step in range(end + 1):
        due: list[str | None] = []
        if step and (step % config.log_every == 0 or step == end):
            due.append(None)
        if step % config.eval_every == 0 or step == end:
            due += config.tracked_splits
        written = rows[count : count + len(due)]
        if [(row["step"], row.get("split")) for row in written] != [(step, of) for of in due]:
            return
        count += len(due)
        for row in written:
            if step and row.get("split") == asked.split:
                value = row[asked.metric]
                if best is None or value > best.value:
                    best = Best(step=step, split=asked.split, metric=asked.metric, value=value)
        yield step, Notes(best=best, metrics_rows=count)


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
