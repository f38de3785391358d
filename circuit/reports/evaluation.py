"""evaluate: a checkpoint on any splits of the run's benchmark, written as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from circuit.artifacts import OutputFolder, dump_json
from circuit.config import TrainConfig
from circuit.environment import environment_facts, prepare_process
from circuit.tasks.benchmark import load_benchmark
from circuit.trace.replay import load_state
from circuit.training.evaluate import Evaluation, evaluate
from circuit.training.session import encode_split, model_from_state


@dataclass(frozen=True)
class EvaluationReport:
    """The evaluations of one checkpoint, and where they were written."""

    step: int
    evaluations: list[Evaluation]
    path: Path


def evaluate_checkpoint(
    config: TrainConfig,
    checkpoint: str | Path,
    *,
    splits: Sequence[str] | None = None,
    output: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> EvaluationReport:
    """Evaluate a checkpoint and write the figures.

    Args:
        splits: None evaluates the config's tracked splits.
        output: JSON file; by default `evaluation/<checkpoint>.json` in the config's output_dir. An
            evaluation that stands there is replaced, since the inputs decide it.
        progress: called with split, records done and their number.

    Raises:
        CircuitError: the checkpoint is damaged or of another config or benchmark, a split does not
            exist, or the output file is not an evaluation of this command.
    """
    checkpoint = Path(checkpoint)
    state = load_state(checkpoint)
    # after load_state, which may have replayed with the threads of a trace
    prepare_process(threads=config.threads, device=config.device)
    names = list(splits or config.tracked_splits)
    benchmark = load_benchmark(config.benchmark_dir, splits=list(dict.fromkeys(names)))
    model = model_from_state(state, config, benchmark)
    evaluations = [
        evaluate(model, encode_split(benchmark, name, config.model), name, progress=progress)
        for name in dict.fromkeys(names)
    ]
    path = output or Path(config.output_dir) / "evaluation" / f"{checkpoint.stem}.json"
    with OutputFolder(path.parent, "evaluate", overwrite=True) as folder:
        folder.write_text(
            path.name,
            dump_json(
                {
                    "schema_version": 1,
                    "checkpoint": checkpoint.name,
                    "step": state.step,
                    "benchmark_digest": benchmark.digest,
                    "evaluations": {e.split: e.to_row() for e in evaluations},
                    "provenance": environment_facts(config.device),
                }
            ),
        )
    return EvaluationReport(state.step, evaluations, path)
