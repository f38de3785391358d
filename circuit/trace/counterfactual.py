"""Counterfactual training: the steps of a run taken again with something otherwise.

The run with an edit is a run of its own: its config is the run's with that `edit`, and its steps
are those of training (`training_step`). Up to the edit it is the run, from whose state there it
starts; an edit that changes nothing gives the run, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from circuit.artifacts import OutputFolder, dump_json
from circuit.core.edit import Edit
from circuit.core.state import FlatState
from circuit.environment import environment_facts
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.reading import read_bytes
from circuit.sealed import sealed
from circuit.tasks.benchmark import find_benchmark
from circuit.trace.record import RecordOptions, record_trace
from circuit.trace.replay import ReplayedRun
from circuit.trace.step import TracedStep
from circuit.trace.while_training import DEFAULT_FOLDER
from circuit.train_config import RecipeConfig
from circuit.training.checkpoints import STEP_FILES, checkpoint_name, encode_checkpoint
from circuit.training.run_folder import ENVIRONMENT

COMMAND = "counterfactual-run"
FILES = (RUN_CONFIG, ENVIRONMENT, STEP_FILES)


def record_counterfactual(
    run: ReplayedRun,
    edit: Edit,
    end: int,
    folder: str | Path,
    *,
    anchor_every: int = 50,
    overwrite: bool = False,
    progress: Callable[[TracedStep], None] | None = None,
) -> FlatState:
    """Train from state `edit.start` to state `end` with an edit, and leave a run behind.

    The folder is that of any run (`circuit.open_run`): its config, the states at both ends, and the
    trace of the steps between, which are executed again from the nearest anchor. A recording that
    was cut off goes on.

    Args:
        run: the trace of the run that is left.
        folder: of the new run.
        anchor_every: steps between stored full states.
        overwrite: replace an earlier one there, and nothing else.
        progress: called after every step.

    Returns:
        The state at the end.

    Raises:
        CircuitError: as `ReplayedRun.counterfactual`; the run is no trace; or the folder holds
            another run.
    """
    opened: Any = run  # a caller may have opened something else
    if not isinstance(opened, ReplayedRun):
        raise CircuitError(
            f"a {type(opened).__name__}",
            where="`run`",
            expected="the trace of a run",
            fix=f"open its folder, such as {DEFAULT_FOLDER} of the run's, with circuit.open_run",
        )
    root = Path(folder)
    places = {"name": f"{run.config.name} with an edit", "output_dir": root.as_posix()}
    if not isinstance(run.config, RecipeConfig):
        places["benchmark_dir"] = _benchmark_from(root, run).as_posix()
    run.check_edit(edit, end)  # before anything is left
    config = run.otherwise(edit, end).replace(**places)
    outputs = OutputFolder(
        root, COMMAND, writes=FILES, overwrite=overwrite, resume=not overwrite, resumable=True
    )
    with outputs as files:
        names = [f"checkpoints/{checkpoint_name(step)}" for step in (edit.start, end)]
        planned = [RUN_CONFIG, ENVIRONMENT, *names]
        files.refuse_foreign(planned)
        text = config.to_json()
        there = root / RUN_CONFIG
        if there.exists() and not overwrite and read_bytes(there) != text.encode():
            raise CircuitError(
                "holds a run with another edit", where=root, fix="choose another folder"
            )
        first = replace(run.state(edit.start), config=config)
        run.prepare()
        if overwrite:  # an earlier one's states of other steps would count as this one's
            files.clear(planned)
        files.write_text(RUN_CONFIG, text)
        facts = environment_facts(config.device)
        files.write_text(ENVIRONMENT, dump_json(sealed(facts)))
        files.write_bytes(names[0], encode_checkpoint(first))
        recorded = record_trace(
            config,
            root / DEFAULT_FOLDER,
            RecordOptions(
                resume_checkpoint=root / names[0], end_step=end, anchor_every=anchor_every
            ),
            overwrite=overwrite,
            resume=not overwrite,
            progress=progress,
        )
        last = recorded.store.anchor(end)
        files.write_bytes(names[1], encode_checkpoint(last))
    return FlatState.of(last)


def _benchmark_from(root: Path, run: ReplayedRun) -> Path:
    """The run's benchmark as a run in that folder names it: as before, where that leads there."""
    named = run.config.benchmark_dir
    there = find_benchmark(named, run.setup.near)
    return Path(named) if find_benchmark(named, root / RUN_CONFIG) == there else there.absolute()
