"""What attribution costs: seconds per traced step for one scalar and for all heads.

    python benchmarks/attribution.py TRACE PROBE_SET [--steps N] [--start A] [--workers]

Alternates a plain training step with the attribution of one traced step (its replay is counted), so
that the ratios hold when the speed of the machine drifts. With --workers, also the time of a window
with one and with two processes. Ratios come last.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

from circuit.attribution.attribute import Attributor
from circuit.attribution.window import Job, attribute_window
from circuit.reports.traced import TracedScalars
from circuit.scalars.qk_match import QKMatches
from circuit.trace.replay import ReplayedRun
from circuit.training.session import TrainingSession

RULES = ("midpoint", "simpson")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("probe_set", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--start", type=int)
    parser.add_argument("--head", default="L1H2")
    parser.add_argument("--workers", action="store_true")
    parser.add_argument("--window", type=int, default=400, help="steps that --workers attributes")
    args = parser.parse_args()
    trace = ReplayedRun.open(args.trace)
    start = trace.manifest.start_step if args.start is None else args.start
    ratios = {}
    for what, heads in (("one head", (args.head,)), ("all heads", ())):
        for rule in RULES:
            source = _source(trace, args.probe_set, heads)
            ratios[f"{what}, {rule}"] = _measure(trace, source, rule, start, args.steps)
    if args.workers:
        _workers(args, trace, start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MB, threads {trace.manifest.environment['threads']}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} plain training steps per traced and attributed step")


def _source(trace: ReplayedRun, probe_set: Path, heads: tuple[str, ...]) -> TracedScalars:
    return TracedScalars(trace.config, probe_set, (QKMatches(heads=heads),))


def _measure(trace: ReplayedRun, source: TracedScalars, rule: str, start: int, steps: int) -> float:
    """Median ratio of a replayed and attributed step to a plain one."""
    state = trace.state(start)
    model = trace.setup.model(state)
    attributor = Attributor(model, source.scalars(source.inputs(trace)), rule=rule)
    plain = TrainingSession(trace.setup, state=state)
    times: dict[str, list[float]] = {"plain": [], "attributed": []}
    replay = trace.replay(start, start + steps)
    for _ in range(steps):
        trace.prepare()
        began = time.perf_counter()
        plain.advance()
        middle = time.perf_counter()
        attributor.step(next(replay)).rows(["circuit"])
        times["plain"].append(middle - began)
        times["attributed"].append(time.perf_counter() - middle)
    median = {name: statistics.median(found) for name, found in times.items()}
    print(
        f"{len(attributor.scalars):2} scalars, {rule:8}: plain {1e3 * median['plain']:6.1f} ms,"
        f" replayed and attributed {1e3 * median['attributed']:6.1f} ms"
    )
    pairs = zip(times["attributed"], times["plain"], strict=True)
    return statistics.median(attributed / base for attributed, base in pairs)


def _workers(args: argparse.Namespace, trace: ReplayedRun, start: int) -> None:
    """Wall time of one window with one and with two processes."""
    job = Job(args.trace, _source(trace, args.probe_set, (args.head,)))
    end = min(start + args.window, trace.store.last_step)
    seconds = {}
    for workers in (1, 2):
        began = time.perf_counter()
        found = sum(1 for _ in attribute_window(job.prepare(), start, end, workers=workers))
        seconds[workers] = time.perf_counter() - began
        print(f"{found} steps with {workers} workers: {seconds[workers]:.1f} s")
    print(f"speed-up of two workers {seconds[1] / seconds[2]:.2f}")


if __name__ == "__main__":
    main()
