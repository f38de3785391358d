"""claims-comparison: which claims of the study hold with every seed, and their numbers over seeds.

Reads the claims that `circuit reproduce` writes of the study with one seed and another. Intervals
over seeds are Student's t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.figures.charts import CATEGORY, GREY, Chart, chart, colour, exact, named
from circuit.lazy import alt
from circuit.options import Option, Options
from circuit.reading import values_of
from circuit.reports.comparisons import Comparison, NotShownError
from circuit.reports.intervals import said_between, spread
from circuit.reports.report import Findings, Report, Results
from circuit.reports.tables import Columns, Table, cell
from circuit.reports.written import ANEW, read_document

_OF_ALL = ("target", "scale", "recipe_digest")
"""What the studies have to have in common."""
_VERDICTS = {True: "holds", False: "does not hold", None: "not judged"}


class ClaimsOptions(Options):
    """Which studies are compared."""

    claims: Annotated[
        tuple[Path, ...],
        Option(
            "Claims of the study with one seed, claims_TARGET.json of `circuit reproduce`.",
            flag="--claims",
            kind="claims",
        ),
    ]


class ClaimsComparison(Report[ClaimsOptions]):
    """Compare the study's claims over seeds: which hold in all, and between which numbers?"""

    command = "claims-comparison"
    Options = ClaimsOptions
    names = ("study compare-claims",)
    panel = "Study"
    reads_run = False
    title = "Claims over seeds"
    question = "Which claims of the study hold with every seed?"

    def prepare(self) -> None:
        self.studies = read_claims(self.options.claims)

    def conclude(self, rows: list[Row]) -> Findings:
        with values_of("`claims`", fix=ANEW):
            rows = [row for seed, study in self.studies.items() for row in judged(seed, study)]
            judged_rows = [row for row in rows if row["holds"] is not None]
            for row in judged_rows:
                if not follows(row):
                    raise CircuitError(
                        f"the verdict of seed {row['seed']} does not follow from its numbers:"
                        f" {row['claim']}",
                        where="`claims`",
                        fix=ANEW,
                    )
            claims = summarize(rows)
        law = (
            f"the {len(judged_rows)} verdicts of {len(self.studies)} studies follow from their"
            " numbers"
        )
        first = next(iter(self.studies.values()))
        summary = {name: first[name] for name in _OF_ALL} | {"seeds": list(self.studies)}
        return Findings(rows, summary | {"claims": claims}, law)

    @classmethod
    def notes(cls, results: Results[ClaimsOptions]) -> list[str]:
        of = results.summary
        told = [claim for claim in of["claims"] if claim["judged"]]
        held = sum(claim["holds"] == claim["judged"] for claim in told)
        return [
            f"Target {of['target']} at scale {of['scale']}, seeds"
            f" {', '.join(map(str, of['seeds']))}. {held} of {len(told)} claims hold in every seed"
            " in which they can be judged. Numbers: mean over seeds, with Student's t interval of"
            " 95 %; what is no number, by seed.",
        ]

    @classmethod
    def tables(cls, results: Results[ClaimsOptions]) -> list[Table]:
        columns: Columns = {"claim": "claim", "holds": "holds in", "numbers": "numbers"}
        rows = [
            {
                "claim": claim["claim"],
                "holds": f"{claim['holds']} of {claim['judged']}",
                "numbers": "; ".join(
                    f"{name.replace('_', ' ')} {_shown(of)}"
                    for name, of in claim["numbers"].items()
                ),
            }
            for claim in results.summary["claims"]
        ]
        return [Table("Claims", columns, rows, console=len(rows))]

    @classmethod
    def charts(cls, results: Results[ClaimsOptions]) -> list[Chart]:
        lines = {claim["claim"]: fill(claim["claim"], 76) for claim in results.summary["claims"]}
        data = [
            {
                "claim": lines[row["claim"]],
                "seed": str(row["seed"]),
                "verdict": _VERDICTS[row["holds"]],
            }
            for row in results.rows()
        ]
        shades = (CATEGORY[0], CATEGORY[1], GREY)
        sentences = alt.Axis(
            labelExpr="split(datum.label, '\\n')",
            labelLimit=440,
            labelFontSize=11,
            labelOffset=-6,
            labelOverlap=False,
        )
        seeds = alt.Axis(labelAngle=0)
        cells = (
            named("claims")
            .mark_rect(stroke="var(--paper)", strokeWidth=2)
            .encode(
                x=alt.X("seed:N", axis=seeds, sort=list(map(str, results.summary["seeds"]))),
                y=alt.Y("claim:N", axis=sentences, sort=list(lines.values())).title(None),
                color=colour("verdict", list(_VERDICTS.values()), palette=shades),
                tooltip=exact("claim", "seed", "verdict"),
            )
        )
        title = "which claims hold with which seed"
        return [chart("claims", title, {"claims": data}, cells, height=32 * len(lines))]


def read_claims(paths: Sequence[Path]) -> dict[int, Mapping[str, Any]]:
    """The claims of some studies, by seed, ascending.

    Raises:
        CircuitError: one is damaged, of another study than the first, or of a seed that is there.
    """
    studies: dict[int, Mapping[str, Any]] = {}
    for path in paths:
        study = read_document(path)
        with values_of(path, fix=ANEW):
            seed, first = int(study["seed"]), next(iter(studies.values()), study)
            if other := [name for name in _OF_ALL if study[name] != first[name]]:
                raise CircuitError(
                    f"is of another {other[0].removesuffix('_digest')} than {paths[0]}",
                    where=path,
                    expected="studies that differ in their seed alone",
                )
        if seed in studies:
            raise CircuitError(f"is a second study of seed {seed}", where=path)
        studies[seed] = study
    return dict(sorted(studies.items()))


def judged(seed: int, study: Mapping[str, Any]) -> list[Row]:
    """A row a claim of the study with one seed."""
    return [
        {
            **{"seed": seed, "part": claim["target"], "claim": claim["statement"]},
            **{name: claim[name] for name in ("holds", "numbers", "tests", "note")},
        }
        for claim in study["claims"]
    ]


def follows(row: Row) -> bool:
    """Whether the verdict of a claim is that of its comparisons."""
    try:
        held = all(Comparison.parse(test).holds(row["numbers"]) for test in row["tests"])
    except NotShownError:  # a number is null: there is no verdict
        return False
    return held is row["holds"]


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every claim: in how many seeds it holds, of how many, and its numbers over them."""
    claims = []
    for text in dict.fromkeys(row["claim"] for row in rows):
        of = [row for row in rows if row["claim"] == text]
        told = [row for row in of if row["holds"] is not None]
        claims.append(
            {
                **{"part": of[0]["part"], "claim": text, "judged": len(told)},
                "holds": sum(row["holds"] for row in told),
                "numbers": {
                    name: _over_seeds({row["seed"]: row["numbers"][name] for row in told})
                    for name in dict.fromkeys(name for row in told for name in row["numbers"])
                },
            }
        )
    return claims


def _over_seeds(by_seed: Mapping[int, Any]) -> dict[str, Any]:
    """Mean and interval of numbers; what is none, by seed."""
    values = {str(seed): value for seed, value in by_seed.items()}
    if any(isinstance(value, str) for value in values.values()):
        return {"by_seed": values}
    return {"by_seed": values, **spread(list(values.values()))}


def _shown(of: Mapping[str, Any]) -> str:
    if "mean" not in of:
        return ", ".join(f"{cell(value)} (seed {seed})" for seed, value in of["by_seed"].items())
    return cell(of["mean"], ".4g") + said_between(of, "mean", ".4g")
