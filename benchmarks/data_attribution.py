"""What it costs to ask which data moved a scalar, in plain training steps a step.

    python benchmarks/data_attribution.py TRACE PROBE_SET [--steps N] [--start A] [--scalars N]
    python benchmarks/data_attribution.py TRACE PROBE_SET [--steps N] [--start A] --influence

Alternates a plain training step with each way of asking, step by step, so that ratios hold when the
speed of the machine drifts, and counts processor time: attribution to the terms; credit (which
holds that attribution) by example and by position, of one scalar and of several; influence. All of
them hold the replay. Ratios come last, with the laws.

Influence holds graphs, and memory costs more where a process has not touched it before. So it comes
first and several times: what the first round costs in a new process, and later ones in the median.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from circuit.attribution.credit import CreditPass
from circuit.attribution.influence import InfluencePass
from circuit.attribution.losses import By
from circuit.attribution.window import attributor_of
from circuit.quoting import counted
from circuit.reports.traced import TracedScalars
from circuit.scalars.base import Scalar
from circuit.scalars.family import parse_scalars
from circuit.trace.replay import ReplayedRun
from circuit.training.session import TrainingSession


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("probe_set", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--start", type=int, required=True)
    parser.add_argument("--scalars", type=int, default=17, help="QK matches beside one another")
    parser.add_argument("--rounds", type=int, default=9, help="of influence, two at least")
    parser.add_argument("--influence", action="store_true", help="and nothing else")
    args = parser.parse_args()
    trace = ReplayedRun.open(args.trace)
    shape, start, end = trace.config.model, args.start, args.start + args.steps
    heads = [f"L{layer}H{head}" for layer in range(shape.layers) for head in range(shape.heads)]
    ranks = range(1, shape.d_model // shape.heads + 1)
    words = [f"qk_match,head={h},rank={r}" for r, h in itertools.product(ranks, heads)]
    several = _scalars(trace, args.probe_set, words[: args.scalars])
    count, told, ratios = len(several), [], {}
    asked = _Influenced(trace, several[:1])
    first, *later = [_ratio(trace, start, asked, end) for _ in range(args.rounds)]
    ratios["influence, 1 scalar, in a new process"] = first
    ratios[f"influence, 1 scalar, in memory used before, {len(later)} rounds"] = median(later)
    by: By
    for scalars in () if args.influence else (several[:1], several):
        name = counted(len(scalars), "scalar")
        ratios[f"attribution, {name}"] = _ratio(trace, start, _Attributed(trace, scalars), end)
        for by in ("example", "position"):
            credited = _Credited(trace, scalars, by)
            ratios[f"credit by {by}, {name}"] = _ratio(trace, start, credited, end)
            totals = credited.passed.totals
            told.append(
                f"credit by {by}, {name}: closure {float(totals.closure.max()):.2g}, examples"
                f" against the batch {float(totals.examples_error.max()):.2g},"
                f" {credited.passed.bytes_a_step} bytes a step"
            )
    print("\n".join(told))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MB, threads {trace.manifest.environment['threads']}")
    print(f"steps {start}:{end}, plain training steps a step:")
    for name, ratio in ratios.items():
        print(f"  {name}: {ratio:.2f}")
    for by in () if args.influence else ("example", "position"):
        single, many = (
            ratios[f"credit by {by}, {n}"] for n in ("1 scalar", counted(count, "scalar"))
        )
        beyond = single - ratios["attribution, 1 scalar"]
        print(f"credit by {by}: {beyond:.2f} beyond attribution; {many / single:.2f} for {count}")


def _scalars(trace: ReplayedRun, probe_set: Path, words: Sequence[str]) -> list[Scalar]:
    source = TracedScalars(trace.config, probe_set, tuple(map(parse_scalars, words)))
    return source.scalars(source.inputs(trace))


@dataclass
class _Attributed:
    trace: ReplayedRun
    scalars: Sequence[Scalar]

    def steps(self, start: int, end: int) -> Iterator[Any]:
        attributor = attributor_of(self.trace, self.scalars)
        return (attributor.step(step).rows(["circuit"]) for step in self.trace.replay(start, end))


@dataclass
class _Credited:
    trace: ReplayedRun
    scalars: Sequence[Scalar]
    by: By

    def steps(self, start: int, end: int) -> Iterator[Any]:
        attributor = attributor_of(self.trace, self.scalars, averages=True)
        self.passed = CreditPass(self.trace, attributor, start, end, self.by)
        return iter(self.passed)


@dataclass
class _Influenced:
    trace: ReplayedRun
    scalars: Sequence[Scalar]

    def steps(self, start: int, end: int) -> Iterator[Any]:
        return iter(InfluencePass(self.trace, attributor_of(self.trace, self.scalars), start, end))


def _ratio(
    trace: ReplayedRun, start: int, asked: _Attributed | _Credited | _Influenced, end: int
) -> float:
    """Time of a whole pass over that of as many plain steps, one of which follows each of its."""
    for _ in asked.steps(start, start + 1):  # whatever is imported or made once
        pass
    plain = TrainingSession(trace.setup, state=trace.state(start))
    trace.prepare()
    plain.advance()
    waiting, passed = asked.steps(start, end), 0.0
    steps: list[float] = []
    while True:
        began = time.process_time()
        ended = next(waiting, None) is None
        middle = time.process_time()
        passed += middle - began
        if ended:
            return passed / sum(steps)
        plain.advance()
        steps.append(time.process_time() - middle)


if __name__ == "__main__":
    main()
