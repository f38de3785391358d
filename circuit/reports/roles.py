"""What components in a role do in runs of several seeds, aligned on when each run forms.

An address means nothing in another seed, and a step little: what is compared is the component in a
role, at steps counted from the one at which the run first answers a share of the reads of one slice
value. The component of a run in a role is the one that its own report puts first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.reports.intervals import ends, t_interval
from circuit.reports.written import Written, read_report

_OF_PLACE = ("probe_set", "checkpoints", "checkpoint_dir")
"""Options that name files of a run."""
_WRITES = re.compile(r"L\d+(H\d+|MLP)")


class Role(NamedTuple):
    """Who has a role, by one report.

    Attributes:
        name: of the role.
        what: column of its rows that names components.
        value: column that is followed.
    """

    name: str
    what: str
    value: str

    def component(self, report: Written) -> str:
        """The one in the role: that whose separation grew most, or whose contribution is largest.

        Raises:
            CircuitError: the report knows none.
        """
        if self.what == "head":
            return str(report.summary["winner"]["head"])
        parts = [part["part"] for part in report.summary["parts"]]  # the largest first
        found = next(filter(_WRITES.fullmatch, parts), None)
        if found is None:
            raise CircuitError("no head and no MLP writes", where=report.path)
        return str(found)

    def course(self, report: Written, component: str) -> dict[int, float]:
        """Its value at every step, over all reads."""
        only = {self.what: component, report.results.slice: "all"}
        if self.what == "head":
            only["score"] = report.summary["winner"]["score"]
        rows = (row for row in report.results.rows() if only.items() <= row.items())
        return {int(row["step"]): float(row[self.value]) for row in rows}


ROLES = {
    "bilinear-qk-match-separation": Role("best-matching head", "head", "separation"),
    "path-logit-decomposition": Role("strongest writer", "part", "contribution"),
}
"""By the command of the report that tells who has them."""


def read_reports(
    paths: Sequence[Path], recipes: Mapping[str, int]
) -> dict[str, dict[int, Written]]:
    """The reports by command and seed.

    Args:
        recipes: seed of each run, by the digest of its recipe.

    Raises:
        CircuitError: one is of another command or of none of the runs, a second of its kind and
            seed, or made with other options than its kind's first.
    """
    found: dict[str, dict[int, Written]] = {}
    for path in paths:
        report = read_report(path)
        if report.command not in ROLES:
            expected = f"a report of {' or '.join(ROLES)}"
            raise CircuitError(f"is of {report.command}", where=path, expected=expected)
        report.refuse_another_runs()
        seed = recipes.get(report.provenance["recipe_digest"])
        if seed is None:
            raise CircuitError("is of none of the runs", where=path, expected="one of `runs`")
        of_kind = found.setdefault(report.command, {})
        if seed in of_kind:
            raise CircuitError(f"a second {report.command} of seed {seed}", where=path)
        first = next(iter(of_kind.values()), report)
        if _asked(first) != _asked(report):
            raise CircuitError(f"was asked otherwise than {first.path}", where=path)
        of_kind[seed] = report
    return found


def _asked(report: Written) -> dict[str, Any]:
    options = {n: v for n, v in report.parameters.items() if n not in _OF_PLACE}
    return {**options, "probe_set_sha256": report.provenance["probe_set_sha256"]}


def formed_at(rows: Sequence[Row], by: str, value: str, share: float) -> int | None:
    """The first step at which a share of the reads of one slice value is answered; None if never.

    Args:
        rows: evaluations of one split, ascending by step, as a run logged them.
    """
    return next(
        (int(r["step"]) for r in rows if r["by_slice"][by][value]["answer_accuracy"] >= share), None
    )


def follow(
    reports: Mapping[str, Mapping[int, Written]], formed: Mapping[int, int | None]
) -> Iterator[Row]:
    """A row a role, seed and step of its report; the offset is null in a run that does not form.

    Offsets are from the report's first step at or after the one at which the run forms.
    """
    for command, by_seed in reports.items():
        role = ROLES[command]
        for seed, report in sorted(by_seed.items()):
            component = role.component(report)
            course, begin = role.course(report, component), formed[seed]
            start = None if begin is None else min((s for s in course if s >= begin), default=None)
            for step, value in course.items():
                offset = None if start is None else step - start
                row = {"role": role.name, "seed": seed, "component": component, "step": step}
                yield {**row, "offset": offset, "value": value}


def aligned_means(rows: Sequence[Row]) -> list[Row]:
    """Mean over seeds of each role, with its t interval, where every seed that forms has a value.

    So all means of a role are of the same seeds.
    """
    values: dict[str, dict[int, list[float]]] = {}
    seeds: dict[str, set[int]] = {}
    for row in rows:
        if row["offset"] is not None:
            at = values.setdefault(row["role"], {}).setdefault(row["offset"], [])
            at.append(row["value"])
            seeds.setdefault(row["role"], set()).add(row["seed"])
    return [
        {"role": role, "offset": offset, "seeds": len(of), "mean": fmean(of)}
        | ends({"mean": t_interval(of)})
        for role, at_offsets in values.items()
        for offset, of in sorted(at_offsets.items())
        if len(of) == len(seeds[role])
    ]
