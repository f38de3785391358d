"""What many counterfactual trainings of one run cost, in whole runs.

    python benchmarks/counterfactuals.py TRACE [--edits N] [--seed S]

Trains N times with the learning rate halved for one step, a random one of the trace, on to its end:
in the order of the steps, so that the replay up to them is shared, and each from there on. Counts
processor time, against N whole runs of the same steps; those are timed before, between and after.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from circuit.core.edit import Edit
from circuit.trace.replay import ReplayedRun
from circuit.training.session import TrainingSession


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--seed", type=int, default=17)
    args = parser.parse_args()
    run = ReplayedRun.open(args.trace)
    first, last = run.manifest.start_step, run.store.last_step
    steps = np.random.default_rng(args.seed).integers(first, last, args.edits)
    plain, edited = [_whole(run)], 0.0  # what is imported or made once
    plain.clear()
    for at, step in enumerate(sorted(steps.tolist())):
        if at % max(1, args.edits // 4) == 0:
            plain.append(_whole(run))
        began = time.process_time()
        run.counterfactual(Edit(step, step + 1, settings={"rate": 0.5}), last)
        edited += time.process_time() - began
    plain.append(_whole(run))
    whole = statistics.median(plain)
    print(f"a whole run of {last - first} steps: {whole:.1f} s; {args.edits} edits: {edited:.0f} s")
    print(f"steps that they share or take: {_steps(run, steps.tolist(), last)}")
    print(f"{args.edits} edits cost {edited / (args.edits * whole):.1%} of {args.edits} runs")


def _whole(run: ReplayedRun) -> float:
    """Processor time of the run's own training."""
    run.prepare()
    began = time.process_time()
    state = run.state(run.manifest.start_step)
    session = TrainingSession(run.setup, state=state)
    while session.step < run.store.last_step:
        session.advance()
    return time.process_time() - began


def _steps(run: ReplayedRun, starts: list[int], end: int) -> str:
    taken = sum(end - start for start in starts)
    return f"{taken} taken, at most {max(starts) - min(starts)} replayed"


if __name__ == "__main__":
    main()
