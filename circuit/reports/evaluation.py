"""evaluate: a checkpoint on any splits of the run's benchmark, written as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuit.artifacts import OutputFolder, dump_json
from circuit.core.digests import tensors_digest
from circuit.environment import environment_facts
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.reading import MissingFileError, read_json
from circuit.reports.inputs import check_finite
from circuit.sealed import sealed, unsealed
from circuit.tasks.base import Task
from circuit.trace.states import States
from circuit.train_config import TrainConfig
from circuit.training.evaluate import Evaluation, evaluate
from circuit.training.recipe_setup import setup_of


@dataclass(frozen=True)
class EvaluationReport:
    """The evaluations of one checkpoint, and where they were written."""

    step: int
    task: Task
    """Of the run."""
    evaluations: list[Evaluation]
    slices: tuple[str, ...]
    """By which they are shown; each evaluation has those of all."""
    path: Path


def evaluate_checkpoint(
    config: TrainConfig,
    checkpoint: str | Path,
    *,
    splits: Sequence[str] | None = None,
    slices: Sequence[str] | None = None,
    output: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> EvaluationReport:
    """Evaluate a checkpoint and write the figures.

    Args:
        splits: None evaluates the config's tracked splits.
        slices: of the task, by which the figures are to be shown; None: its first.
        output: JSON file; by default `evaluation/<checkpoint>.json` in the run that holds the
            checkpoint, or in the config's output_dir where none does. Splits of the same weights
            that stand there are kept, others are replaced; each keeps the overrides that it was
            evaluated with.
        progress: called with split, records done and their number.

    Raises:
        CircuitError: the checkpoint is damaged, of another config or benchmark, or not finite, a
            split or slice does not exist, or the output file is not an evaluation of this command.
    """
    checkpoint = Path(checkpoint)
    setup = setup_of(config, checkpoint)
    setup.require_task()
    states = States(setup)
    header = states.header(checkpoint)
    names = list(dict.fromkeys(splits or config.tracked_splits))
    for name in names:
        setup.require_evaluation_memory(name)  # refused before anything heavy is imported
    task = setup.benchmark.task
    for name in slices or ():
        task.check_slice(name)
    shown = list(task.slices)[:1] if slices is None else slices
    setup.check(header)
    state = states.state(checkpoint)
    check_finite(state, checkpoint)
    setup.prepare()  # after the state, which may have been replayed with the threads of a trace
    model = setup.model(state)
    evaluations = [evaluate(model, setup.split(name), name, progress=progress) for name in names]
    holders = (folder for folder in checkpoint.parents if (folder / RUN_CONFIG).is_file())
    run = next(holders, Path(config.output_dir))
    path = output or run / "evaluation" / f"{checkpoint.stem}.json"
    with OutputFolder(path.parent, "evaluate", writes=[path.name], overwrite=True) as folder:
        of = {
            "step": state.step,
            "parameters_sha256": tensors_digest(state.parameters),
            "benchmark_digest": setup.benchmark.digest,
        }
        earlier = _earlier(path, of) if path.name in folder.owned else {}
        report = {
            "schema_version": 1,
            "checkpoint": checkpoint.name,
            **of,
            "evaluations": earlier | {e.split: e.to_row() | config.origin() for e in evaluations},
            "provenance": environment_facts(config.device),
        }
        folder.write_text(path.name, dump_json(sealed(report)))
    return EvaluationReport(state.step, task, evaluations, tuple(dict.fromkeys(shown)), path)


def _earlier(path: Path, of: dict[str, Any]) -> dict[str, Any]:
    """The evaluations of the same weights that stand in the file.

    Raises:
        CircuitError: it is damaged, or was changed after it was written.
    """
    fix = "move it away, and evaluate its splits again"
    try:
        report = unsealed(dict(read_json(path)), where=path, fix=fix)
        same = all(report[key] == value for key, value in of.items())
        return dict(report["evaluations"]) if same else {}
    except MissingFileError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise CircuitError(f"is damaged ({error!r})", where=path, fix=fix) from None
