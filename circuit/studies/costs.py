"""What the rules need of a machine, and what a plan costs, from the rates in `resources.json`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from circuit.strict_json import parse_json
from circuit.studies.jobs import Job
from circuit.studies.scales import CONTRACT_UNIT, Scale

SMALLER = {"full": 1.0, "uniform": 0.5, "short": 0.14, "smoke": 0.05}
"""Cost of a unit of work at a scale, over that of the contract's model and data (measured)."""
SMALLER_STATES = {"full": 1.0, "uniform": 1.0, "short": 0.26, "smoke": 0.19}
"""Size of a checkpoint at a scale, over that of the contract's 7.57 MB (measured)."""

TRACED = 0.1
"""What tracing a step in the pass that trains adds, over the step (docs/performance.md)."""


@dataclass(frozen=True)
class Cost:
    """Estimated cost of some jobs.

    Attributes:
        jobs: how many.
        seconds: of one core.
        longest: seconds of the longest of them.
        megabytes: on disk.
    """

    jobs: int
    seconds: float
    longest: float
    megabytes: float

    def wall(self, cores: int) -> float:
        """Seconds on that many cores, at least those of the longest job."""
        return max(self.seconds / max(cores, 1), self.longest)


def rates(kind: str) -> dict[str, Any]:
    """The entry of a rule, the defaults filled in."""
    table = parse_json(files("circuit.studies").joinpath("resources.json").read_text())
    return {**table["default"], **table["rules"].get(kind, {})}


def needs_of(scale: Scale) -> dict[str, dict[str, Any]]:
    """Threads and resources of every rule, as Snakemake takes them; cards where they are used."""
    table = parse_json(files("circuit.studies").joinpath("resources.json").read_text())
    cuda = os.environ.get("CIRCUIT_DEVICE") == "cuda"
    needs = {kind: needs_of_rule(kind, cuda=cuda) for kind in table["rules"]}
    if not scale.is_contract:
        for entry in needs.values():
            entry["resources"]["runtime"] = 60
    return needs


def needs_of_rule(kind: str, *, cuda: bool) -> dict[str, Any]:
    """Threads and resources of one rule; cards where it computes on them."""
    entry = rates(kind)
    resources = {"mem_mb": entry["mem_mb"], "runtime": entry["minutes"]}
    resources["gpu"] = entry["gpu"] if cuda else 0
    return {"threads": entry["threads"], "resources": resources}


def _files(kind: str, scale: Scale) -> float:
    """Size of what a unit of work writes at a scale, over the contract's.

    Rows are as many at every scale; states shrink with the model; checkpoints are as many for fewer
    steps.
    """
    if kind == "rows":
        return 1.0
    often = CONTRACT_UNIT / scale.unit if kind == "checkpoints" else 1.0
    return SMALLER_STATES[scale.name] * often


def cost_of(jobs: Iterable[Job], scale: Scale) -> Cost:
    """What some jobs cost; jobs of one batch share a start-up."""
    seconds, megabytes, count, longest = 0.0, 0.0, 0, 0.0
    started: set[tuple[str, str]] = set()
    for job in jobs:
        entry = rates(job.kind)
        batch = (job.target, job.kind)
        start = 0.0 if scale.batched and batch in started else float(entry["start"])
        started.add(batch)
        done = job.units - job.taken + TRACED * job.traced
        own = start + entry["unit"] * done * SMALLER[scale.name]
        count += 1
        seconds += own
        longest = max(longest, own)
        megabytes += entry["mb"] * job.units * job.scalars * _files(entry["files"], scale)
        if job.traced:
            trace = rates("optimizer_update_trace")
            megabytes += trace["mb"] * job.traced * _files(trace["files"], scale)
    return Cost(count, seconds, longest, megabytes)
