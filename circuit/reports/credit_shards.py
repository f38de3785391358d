"""Credit of a long window in shards: the last one first, each goes on where that behind it ended.

A pass over a window goes from its last step to its first. What it carries there is all that the
steps before have to know of those behind, so that a shard leaves it, and the report of the shard
before is that of both, number for number as if one pass had taken them.
"""

from __future__ import annotations

import base64
import itertools
from dataclasses import dataclass, fields
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.artifacts import Row, dump_row
from circuit.attribution.credit import Carried, Totals
from circuit.errors import CircuitError
from circuit.lazy import np, torch
from circuit.reading import values_of
from circuit.reports.data_facts import Facts, Sums
from circuit.reports.seams import inputs_of, refuse_difference
from circuit.reports.written import SUFFIX, Written, read_report

if TYPE_CHECKING:
    from circuit.reports.traced import PathOptions, TracedReport

ROWS, STEPS, CARRIED = (f"data_credit_{what}.jsonl" for what in ("rows", "steps", "carried"))
_ANEW = "make the credit of that window again, with `shard`"
_SAME = ("scalars", "by", "path", "splits", "half")
"""Options that two shards share."""


def carried_row(end: int, sums: Sums, carried: Carried) -> Row:
    """What a shard leaves beside its rows: with JSON's shortest digits and whole bytes, exact.

    Args:
        end: the last state that the credit is of.
    """
    kernels = [base64.b64encode(one.numpy().tobytes()).decode() for one in carried.kernel]
    totals = {one.name: getattr(carried.totals, one.name).tolist() for one in fields(Totals)}
    row = {"end": end, "scalars": list(sums.names), "kernels": kernels, "totals": totals}
    return {**row, "texts": sums.texts}


@dataclass(frozen=True)
class Behind:
    """The report of the window behind, and what it leaves."""

    report: Written
    row: Row

    @classmethod
    def read(cls, folder: Path, before: TracedReport[Any]) -> Behind:
        """The one in a folder, of a window that begins where that of `before` ends.

        Raises:
            CircuitError: there is none, it was made without `shard`, with other options or inputs,
                or of another window or run.
        """
        with values_of(folder, fix=_ANEW):
            report = read_report(folder / f"data_credit{SUFFIX}")
            report.refuse_another_runs()
            if not (folder / CARRIED).exists():
                raise CircuitError("was made without `shard`", where=folder, fix=_ANEW)
            (row,) = report.results.rows(CARRIED)
            behind = cls(report, row)
            behind._refuse_seam(before)
            return behind

    def _refuse_seam(self, before: TracedReport[Any]) -> None:
        theirs: PathOptions = self.report.results.options
        where, (_, end) = self.report.path.parent, before.steps
        if theirs.start_step != end:
            raise CircuitError(
                f"is of steps {theirs.start_step}:{self.end}",
                where=where,
                expected=f"a window that begins at {end}, where this one ends",
            )
        sides = (
            (before.options, before.provenance(), "state_at_end"),
            (theirs, self.report.provenance, "state_at_start"),
        )
        settings = [
            {
                **{name: options.to_json().get(name) for name in _SAME},
                **inputs_of(provenance),
                f"the state of step {end}": provenance["trace"][state],
            }
            for options, provenance, state in sides
        ]
        refuse_difference(
            *settings, where=where, expected="shards of one run, with the same scalars and options"
        )

    @property
    def end(self) -> int:
        """The last state that its credit is of."""
        return int(self.row["end"])

    def carried(self, names: tuple[str, ...], size: int) -> Carried:
        """What its pass had at its first step.

        Args:
            names: of the scalars.
            size: number of parameters.

        Raises:
            CircuitError: it is of other scalars, or of another model.
        """
        with values_of(self.report.path.parent, fix=_ANEW):
            kernels = [
                np.frombuffer(base64.b64decode(text, validate=True)) for text in self.row["kernels"]
            ]
            if tuple(self.row["scalars"]) != names or {len(one) for one in kernels} != {size}:
                raise CircuitError(
                    f"is of {len(self.row['scalars'])} scalars, or of another model",
                    where=self.report.path.parent,
                    expected=f"{len(names)} scalars of {size} parameters",
                )
            totals = {
                name: torch.tensor(values, dtype=torch.float64)
                for name, values in self.row["totals"].items()
            }
            return Carried(torch.from_numpy(np.stack(kernels)), Totals(**totals))

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        results = self.report.results
        return {file: [*results.rows(file)] for file in (ROWS, STEPS)}

    def lines(self) -> dict[str, list[str]]:
        """Its rows as text, from the last to the first."""
        return {
            file: [dump_row(row) for row in reversed(rows)] for file, rows in self._rows.items()
        }

    def sums(self, names: tuple[str, ...]) -> Sums:
        """Those of its steps, added up in the order of the pass: the last step first."""
        sums = Sums(names, texts=dict(self.row["texts"]))
        by_step = {
            file: {step: [*rows] for step, rows in itertools.groupby(of, itemgetter("step"))}
            for file, of in self._rows.items()
        }
        for step, rows in reversed(by_step[ROWS].items()):
            count = len(rows) // len(names)  # a scalar's records stand together
            shares = torch.tensor([row["credit"] for row in rows], dtype=torch.float64)
            facts = _joined([row["facts"] for row in by_step[STEPS][step]])
            ids = [row["example"] for row in rows[:count]]
            sums.add_known(ids, shares.view(len(names), count).T, facts)
        return sums


def _joined(of_scalars: list[dict[str, dict[str, float]]]) -> Facts:
    """Sums by fact and value, of all scalars of a step."""
    return {
        fact: {
            value: torch.tensor([one[fact][value] for one in of_scalars], dtype=torch.float64)
            for value in values
        }
        for fact, values in of_scalars[0].items()
    }
