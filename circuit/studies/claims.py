"""What the study claims, held against the reports of a reproduction.

The claims are data, `claims.json`. A claim says in which report its numbers stand and how they are
compared; its sentence is made from the comparisons, so that a threshold stands once. It holds or
does not; it is not judged only where a report is not there, or where the scale cannot show it. A
damaged report is an error.

A number's path is made of keys and of verbs with arguments, such as `@max growth` (see `_VERBS`);
comparisons are those of circuit/reports/comparisons.py. `{0}` in the text is the threshold of the
first one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.reports.comparisons import Comparison, NotShownError, compared
from circuit.reports.tables import Table
from circuit.reports.written import SUFFIX, read_document, read_report
from circuit.sealed import sealed
from circuit.strict_json import parse_json
from circuit.studies.configs import FORMATION, ablation_configs
from circuit.studies.reference import KEY_RANK
from circuit.studies.study import PAPER, Study
from circuit.train_config import TrainConfig
from circuit.training.run_folder import SUMMARY, read_metrics

Numbers = dict[str, float | int | str | None]


@dataclass(frozen=True)
class Statement:
    """A claim of the study, as `claims.json` has it.

    Attributes:
        part: that it belongs to.
        text: with places for the thresholds.
        report: target, kind and name of the job that writes it; the name is a pattern.
        numbers: by name, the path, or an object with a report of its own and the path.
        tests: all of which hold where it does.
        name: by which others presuppose it.
        given: a comparison, or the name of a claim, without which it cannot be judged,
        unless: and why.
        run: of the ablation that it is about, which a scale may lack.
    """

    part: str
    text: str
    report: str
    numbers: Mapping[str, Any]
    tests: Sequence[str]
    name: str = ""
    given: str = ""
    unless: str = ""
    run: str = ""

    @property
    def sentence(self) -> str:
        """The claim in words."""
        bounds = [Comparison.parse(test).bound for test in self.tests]
        return self.text.format(*bounds).replace("%", " %")

    @property
    def compared(self) -> set[str]:
        """Names of the numbers that decide; the others are only shown."""
        return compared((*self.tests, self.given))


@cache
def statements() -> list[Statement]:
    """The claims, in the order of the study."""
    text = files("circuit.studies").joinpath("claims.json").read_text(encoding="utf-8")
    return [Statement(**entry) for entry in parse_json(text)]


@dataclass(frozen=True)
class Claim:
    """One claim and what a reproduction says of it.

    Attributes:
        target: part of the study that it belongs to.
        statement: with its threshold.
        holds: null where it cannot be judged.
        numbers: that decide, and that are shown.
        note: why it cannot be judged.
        tests: the comparisons, all of which hold where it does.
    """

    target: str
    statement: str
    holds: bool | None
    numbers: Numbers
    note: str = ""
    tests: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def judge(study: Study, root: Path, target: str) -> list[Claim]:
    """The claims of a target, in the order of the study.

    Args:
        root: folder that the study ran in.

    Raises:
        CircuitError: a report is damaged, or of another run than the one that it stands in.
    """
    parts = PAPER if target == "paper" else (target,)
    judge = _Judge(study, root)
    return [judge.judged(claim) for claim in statements() if claim.part in parts]


@dataclass(frozen=True)
class _Judge:
    study: Study
    root: Path
    contents: dict[Path, Mapping[str, Any]] = field(default_factory=dict)
    """Files that were read."""

    def judged(self, claim: Statement) -> Claim:
        """A claim with its verdict."""
        try:
            holds, numbers = self.verdict(claim)
        except NotShownError as error:
            return Claim(claim.part, claim.sentence, None, {}, str(error), claim.tests)
        return Claim(claim.part, claim.sentence, holds, numbers, tests=claim.tests)

    def verdict(self, claim: Statement) -> tuple[bool, Numbers]:
        """Whether it holds, and the numbers that decide.

        Raises:
            NotShownError: it cannot be judged.
        """
        if claim.run and claim.run not in ablation_configs(self.study.scale):
            raise NotShownError(f"this scale has no run {claim.run}")
        numbers = {name: self.number(claim, name) for name in claim.numbers}
        if claim.given:
            other = next((c for c in statements() if c.name == claim.given), None)
            met = self.verdict(other)[0] if other else Comparison.parse(claim.given).holds(numbers)
            if not met:
                raise NotShownError(claim.unless)
        return all(Comparison.parse(test).holds(numbers) for test in claim.tests), numbers

    def number(self, claim: Statement, name: str) -> Any:
        """A number of a claim.

        Raises:
            NotShownError: its file is not there.
            CircuitError: it is damaged, or of another run than the one that it stands in.
        """
        at = claim.numbers[name]
        report, steps = (at["report"], at["path"]) if isinstance(at, dict) else (claim.report, at)
        path = self.path(report)
        if not path.exists():
            raise NotShownError(f"{path.relative_to(self.root)} is not there")
        if path not in self.contents:
            self.contents[path] = _content(path)
        value: Any = self.contents[path]
        try:
            for step in steps:
                verb, *words = step.split()
                value = _VERBS[verb](value, *words) if verb in _VERBS else value[step]
            # of what is not defined a report says null, and its digest that it did
            undefined = value is None and path.name.endswith(SUFFIX)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in claim.compared and not (number or undefined):
                raise TypeError(f"{value!r} is no number")
        except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            problem = f"has no {name.replace('_', ' ')} ({error!r})"
            raise CircuitError(problem, where=path, fix="make it again") from None
        return value

    def path(self, report: str) -> Path:
        """The file that a job writes last."""
        target, kind, name = report.format(key_rank=self.study.scale.key_rank(KEY_RANK)).split()
        jobs = [*self.study.jobs, self.study.comparison]
        of_kind = (job for job in jobs if (job.target, job.kind) == (target, kind))
        return self.root / next(job.outputs[-1] for job in of_kind if fnmatch(job.name, name))


def _content(path: Path) -> Mapping[str, Any]:
    """The summary of a report, and of another file all; evaluations of a run from its rows."""
    if not path.name.endswith(SUFFIX):
        document = read_document(path)
        if path.name == SUMMARY:  # version 0.1.0 gave a digest only to the rows of its step
            rows = read_metrics(path.parent, whole=True)
            ended = ("evaluation", document.get("steps"))
            last = [row for row in rows if (row["kind"], row["step"]) == ended]
            document["evaluations"] = {row["split"]: row for row in last}
        return document
    report = read_report(path)
    report.refuse_another_runs()
    return report.summary


def _with(rows: Sequence[Any], *fields: str) -> list[Any]:
    """The rows whose fields match: `@with group=SGD* diverged=None`."""
    patterns = [one.split("=") for one in fields]
    return [row for row in rows if all(fnmatch(str(row[k]), text) for k, text in patterns)]


def _max(rows: Sequence[Any], key: str) -> Any:
    """The row with the largest value under a key; null is the smallest."""
    if not rows:
        raise NotShownError(f"there is no {key.replace('_', ' ')}")
    return max(rows, key=lambda row: float("-inf") if row[key] is None else row[key])


def _greater(record: Mapping[str, Any], *keys: str) -> Any:
    values = [record[key] for key in keys]
    return None if None in values else max(values)


_VERBS: dict[str, Callable[..., Any]] = {
    "@with": _with,
    "@first": lambda rows: rows[0],
    "@max": _max,
    "@most": lambda rows, key: max((r[key] for r in rows if r[key] is not None), default=None),
    "@sum": lambda rows, key: sum(row[key] for row in rows),
    "@values": lambda mapping: list(mapping.values()),
    "@last": lambda by_step, _: by_step[max(by_step, key=int)],
    "@count": len,
    "@list": ", ".join,
    "@ratio": lambda of, over, under: of[over] / of[under],
    "@greater": _greater,
    "@or": lambda value, other: float(other) if value is None else value,
}


def claims_document(
    study: Study, root: Path, target: str, claims: Sequence[Claim]
) -> dict[str, Any]:
    """The claims as a file: whose they are, and what holds."""
    config = load_config(root / FORMATION, TrainConfig)
    return sealed(
        {
            **{"target": target, "scale": study.scale.name, "seed": config.seed},
            "recipe_digest": config.replace(seed=0).recipe_digest(),
            "claims": [claim.to_json() for claim in claims],
        }
    )


def claims_page(claims: list[Claim], title: str) -> list[str]:
    """Lines of the Markdown that says what held."""
    counts = {verdict: sum(c.holds is verdict for c in claims) for verdict in (True, False, None)}
    words = {True: "yes", False: "NO", None: "?"}
    rows = [
        {**c.to_json(), "holds": words[c.holds], "numbers": numbers_of(c) or c.note} for c in claims
    ]
    headings = {"target": "part", "statement": "claim", "holds": "holds", "numbers": "numbers"}
    counted = (
        f"{counts[True]} claims hold, {counts[False]} do not, {counts[None]} could not be judged."
    )
    return [f"# {title}", "", counted, "", *Table("", headings, rows).markdown()]


def numbers_of(claim: Claim) -> str:
    """The numbers of a claim in one line."""
    shown = (
        f"{name.replace('_', ' ')} {value:.4g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' ')} {value}"
        for name, value in claim.numbers.items()
    )
    return ", ".join(shown)
