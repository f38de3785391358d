"""cross-seed-comparison: does the role repeat in every seed, and does its address move?

Reads what the commands of each seed wrote: the selections of heads and of write paths, and the
attributions of the selected. Reports name their seed by their folder, `seed_NNNN`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Annotated, Any

from circuit.artifacts import Row, dump_csv, dump_json
from circuit.errors import CircuitError
from circuit.figures.charts import (
    CATEGORY,
    GREY,
    INK,
    TERM_NAMES,
    Chart,
    chart,
    colour,
    exact,
    named,
)
from circuit.lazy import alt
from circuit.options import Option, Options
from circuit.reading import file_digest, values_of
from circuit.reports.ranking import ROLES
from circuit.reports.report import Findings, Report, Results
from circuit.reports.tables import Columns, Table
from circuit.reports.written import Written, read_report

_WINNER = ("seed", "winner_head", "winner_growth", "winner_path", "winner_path_write")
"""Columns of the table of winners."""
_SEED = re.compile(r"seed_(\d{4}|[1-9]\d{4,})")  # `seed_{seed:04}`
_KINDS = {
    "head-selection": "heads",
    "write-path-selection": "paths",
    "bilinear-qk-rank-adam-state-attribution": "match",
    "mlp-functional-write-adam-state-attribution": "write",
}
_ATTRIBUTIONS = {
    "match": "QK match of the winner head",
    "write": "write of the winner path",
}
FORMED = 0.5
"""Share of reads in which the winner's support beats every distractor, from which a role exists."""
WRITTEN = 1.0
"""Final functional write of the winner path, in logits of margin, from which it has the role."""

Reports = dict[int, dict[str, Written]]
"""By seed and kind."""


class CrossSeedOptions(Options):
    """Which reports are compared."""

    reports: Annotated[
        tuple[Path, ...],
        Option("Report of a seed: selections and attributions.", flag="--report", kind="report"),
    ]


class CrossSeedComparison(Report[CrossSeedOptions]):
    """Compare seeds: does the role repeat, does its address move?"""

    command = "cross-seed-comparison"
    Options = CrossSeedOptions
    names = ("study compare-seeds",)
    panel = "Study"
    reads_run = False
    further = ("winners.json", "winners.csv", "manifest.json")
    title = "Seeds"
    question = "Does the role repeat in every seed, and does its address move?"

    def prepare(self) -> None:
        self.reports, self.manifest = read_reports(self.options.reports)

    def conclude(self, rows: list[Row]) -> Findings:
        rows = []
        for seed, kinds in self.reports.items():
            with values_of(f"the reports of seed {seed}", fix="make them again"):
                rows.append(seed_row(seed, kinds))
        with values_of("`reports`", fix="make them again"):
            summary, law = summarize(rows), law_of(self.reports)
            shares = {str(seed): raw_sgd_share(kinds) for seed, kinds in self.reports.items()}
            summary["raw_sgd_shares"] = shares
            summary["largest_raw_sgd_share"] = _worst(shares.values())
        winners = [{column: row[column] for column in _WINNER} for row in rows]
        return Findings(
            rows,
            summary,
            law,
            {
                "winners.json": dump_json(winners),
                "winners.csv": dump_csv(winners),
                "manifest.json": dump_json(self.manifest),
            },
        )

    @classmethod
    def notes(cls, results: Results[CrossSeedOptions]) -> list[str]:
        of, count = results.summary, len(results.summary["seeds"])
        return [
            f"- *The matching role*: in {of['head_role_repeats']} of {count} seeds the winner's"
            f" support beats every distractor in at least {100 * FORMED:.0f} % of the"
            f" reads. Its address is {', '.join(of['head_addresses'])}"
            f" ({len(of['head_addresses'])} addresses).\n"
            f"- *The writing role*: the winner path writes at least {WRITTEN:g} logit in"
            f" {of['write_role_repeats']} of {count} seeds, at {len(of['path_addresses'])}"
            f" addresses; in {of['same_layer_readers']} the MLP is of the head's own layer."
        ]

    @classmethod
    def tables(cls, results: Results[CrossSeedOptions]) -> list[Table]:
        rows = list(results.rows())
        winners: Columns = {
            "seed": "seed",
            "winner_head": "winner head",
            "winner_growth": ("growth", "+.4g"),
            "winner_support_wins": ("support wins", ".0%"),
            "winner_path": "winner path",
            "winner_path_write": ("final write", "+.4g"),
        }
        controls: Columns = {
            "seed": "seed",
            "runner_up_head": "runner-up",
            "runner_up_growth": ("growth", "+.4g"),
            "bottom_head": "bottom",
            "bottom_growth": ("growth", "+.4g"),
            "runner_up_path": "runner-up path",
        }
        tables = [
            Table("Winners", winners, rows, console=len(rows)),
            Table("Controls", controls, rows),
        ]
        for name, title in _ATTRIBUTIONS.items():
            terms = {term: (term, "+.4g") for term in rows[0][f"{name}_terms"]}
            moved: Columns = {
                "seed": "seed",
                f"{name}_actual": ("actual", "+.4g"),
                **terms,
                f"{name}_closure_path": ("closure, path", ".2g"),
                f"{name}_closure_first_order": ("closure, first order", ".2g"),
            }
            shown = [{**row, **row[f"{name}_terms"]} for row in rows]
            tables.append(Table(f"What moved the {title}", moved, shown))
        return tables

    @classmethod
    def charts(cls, results: Results[CrossSeedOptions]) -> list[Chart]:
        rows = list(results.rows())
        return [_roles(rows), *(terms_chart(name, rows) for name in _ATTRIBUTIONS)]


def _roles(rows: Sequence[Row]) -> Chart:
    """Growth of the selected heads of every seed, each bar with its address."""
    data = [
        {
            "seed": row["seed"],
            "role": role,
            "head": row[f"{role}_head"],
            "growth": row[f"{role}_growth"],
        }
        for row in rows
        for role in ROLES
    ]
    place = named("roles").encode(
        x=alt.X("seed:O").title("seed").axis(labelAngle=0),
        xOffset=alt.XOffset("role:N").sort(list(ROLES)),
        y=alt.Y("growth:Q").title("growth of separation").scale(padding=32),
    )
    shades = (CATEGORY[0], CATEGORY[5], GREY, "var(--line)")
    labels = {role: role.replace("_", "-") for role in ROLES}
    bars = place.mark_bar().encode(
        color=colour("role", ROLES, palette=shades, labels=labels), tooltip=exact(*data[0])
    )
    addresses = (
        place.transform_calculate(top="max(datum.growth, 0)")
        .mark_text(angle=270, align="left", dx=4, fontSize=10, fill=INK)
        .encode(y="top:Q", text="head:N")
    )
    title = f"selected heads of every seed ({rows[0]['score']})"
    return chart("roles", title, {"roles": data}, bars, addresses)


def terms_chart(name: str, rows: Sequence[Row]) -> Chart:
    """What each optimizer term contributed in every seed; a dash marks the actual change."""
    terms = list(rows[0][f"{name}_terms"])
    actual = f"{name}_actual"
    data = [
        {"seed": row["seed"], "term": term, "contribution": value, actual: row[actual]}
        for row in rows
        for term, value in row[f"{name}_terms"].items()
    ]
    place = named(f"{name}_terms").encode(x=alt.X("seed:O").title("seed").axis(labelAngle=0))
    labels = {term: TERM_NAMES.get(term, term) for term in terms}
    bars = place.mark_bar().encode(
        xOffset=alt.XOffset("term:N").sort(terms),
        y=alt.Y("contribution:Q").title("contribution"),
        color=colour("term", terms, labels=labels),
        tooltip=exact(*data[0]),
    )
    change = place.mark_tick(color=INK, thickness=2).encode(
        y=f"{actual}:Q", tooltip=exact(*data[0])
    )
    title = f"{_ATTRIBUTIONS[name]}: terms, and the actual change (dash)"
    return chart(f"{name}_terms", title, {f"{name}_terms": data}, bars, change)


def read_reports(paths: Sequence[Path]) -> tuple[Reports, list[dict[str, Any]]]:
    """The reports by seed and kind, and a manifest of them.

    Raises:
        CircuitError: a file is no report of the study, is damaged or of another run than the one
            that it stands in; or a seed lacks one or has two of a kind.
    """
    found: Reports = {}
    manifest = []
    for path in paths:
        report, folders = read_report(path), (parent.name for parent in path.parents)
        match = next(filter(None, map(_SEED.fullmatch, folders)), None)  # the innermost
        kind = _KINDS.get(report.command)
        if kind is None:
            raise CircuitError(
                "is no report of the cross-seed study",
                where=path,
                expected=f"a report of {', '.join(_KINDS)}",
            )
        report.refuse_another_runs()
        if match is None:
            raise CircuitError(
                "stands in no folder that names its seed",
                where=path,
                expected="reports of `circuit reproduce cross-seed`, below a folder such as"
                " seed_0007",
                fix="of runs elsewhere, `circuit study seed-spread --run RUN --run RUN` tells mean"
                " and spread",
            )
        seed = int(match[1])
        if kind in found.setdefault(seed, {}):
            raise CircuitError(f"a second {report.command} of seed {seed}", where=path)
        found[seed][kind] = report
        digest = file_digest(path)
        manifest.append(
            {"seed": seed, "command": report.command, "report": str(path), "sha256": digest}
        )
    for seed, kinds in found.items():
        missing = [command for command, kind in _KINDS.items() if kind not in kinds]
        if missing:
            raise CircuitError(
                f"seed {seed} has no report of {', '.join(missing)}",
                where="`reports`",
                expected="four reports of every seed",
                fix="make them, and give each with `reports`",
            )
    return dict(sorted(found.items())), sorted(manifest, key=lambda e: (e["seed"], e["command"]))


def law_of(reports: Reports) -> str:
    """What reports of a seed say of each other, and of themselves, and how well they agree."""
    sums, ends, writes = [], [], []
    for kinds in reports.values():
        chosen = _windows(kinds)
        for window in chosen.values():
            actual, size = window["actual"], abs(window["actual"]) or 1.0
            sums.append(abs(fsum(window["path"].values()) - actual) / size)
            if window["telescopes"]:
                moved = window["value_at_end"] - window["value_at_start"]
                ends.append(abs(moved - actual) / size)
        selection, window = kinds["paths"].summary, chosen["write"]
        if selection["step"] == window["end_step"]:
            written = selection["selected"]["winner"]["final_write"]
            writes.append(abs(window["value_at_end"] - written) / (abs(written) or 1.0))
    law = (
        "the terms of every winner, rounding included, sum to the change that its attribution"
        f" states, to {max(sums):.1g} of it"
    )
    if ends:
        law += (
            "; where steps telescope, that is the last value minus the first, to"
            f" {max(ends):.1g} of it"
        )
    if writes:
        law += (
            "; the write for which a path was selected is the one with which its attribution"
            f" ends, to {max(writes):.1g} of it"
        )
    return law


def _windows(kinds: Mapping[str, Written]) -> dict[str, dict[str, Any]]:
    """The attributions of the winner head and of the winner path."""
    heads, paths = (kinds[kind].summary["selected"]["winner"] for kind in ("heads", "paths"))
    return {
        "match": _window(kinds["match"], heads["head"]),
        "write": _window(kinds["write"], paths["path"]),
    }


def seed_row(seed: int, kinds: Mapping[str, Written]) -> dict[str, Any]:
    """What one seed says: selected heads and path, and what moved them."""
    heads, paths = (kinds[kind].summary["selected"] for kind in ("heads", "paths"))
    row: dict[str, Any] = {"seed": seed, "score": kinds["heads"].summary["score"]}
    for role in ROLES:
        row[f"{role}_head"] = heads[role]["head"]
        row[f"{role}_growth"] = heads[role]["growth"]
    row["winner_support_wins"] = heads["winner"]["support_wins_at_end"]
    row["winner_path"] = paths["winner"]["path"]
    row["winner_path_write"] = paths["winner"]["final_write"]
    row["runner_up_path"] = paths["runner_up"]["path"]
    row["bottom_path_write"] = paths["bottom"]["final_write"]
    for name, window in _windows(kinds).items():
        row[f"{name}_actual"] = window["actual"]
        row[f"{name}_terms"] = {n: v for n, v in window["path"].items() if n != "rounding"}
        row[f"{name}_closure_path"] = window["closure"]["path"]
        row[f"{name}_closure_first_order"] = window["closure"]["first_order"]
    return row


def raw_sgd_share(kinds: Mapping[str, Written]) -> float | None:
    """What raw SGD would have done to the winner's match, over what happened; to first order.

    Null where nothing moved.
    """
    window = _windows(kinds)["match"]
    return float(window["references"]["raw_sgd"] / window["actual"]) if window["actual"] else None


def _window(report: Written, component: str) -> dict[str, Any]:
    """The whole window of the scalar that names a component or a path."""
    summary = report.summary
    for window in summary["windows"]:
        whole = (window["start_step"], window["end_step"]) == (
            summary["start_step"],
            summary["end_step"],
        )
        if whole and f".{component}." in f".{window['scalar']}.":
            return dict(window)
    raise CircuitError(f"the attribution holds no scalar of {component}", where=report.path)


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether the roles repeat over the seeds, and at how many addresses."""
    heads = [row["winner_head"] for row in rows]
    paths = [row["winner_path"] for row in rows]
    return {
        "seeds": [row["seed"] for row in rows],
        "head_role_repeats": sum(row["winner_support_wins"] >= FORMED for row in rows),
        "head_addresses": sorted(set(heads)),
        "write_role_repeats": sum(row["winner_path_write"] >= WRITTEN for row in rows),
        "path_addresses": sorted(set(paths)),
        "same_layer_readers": sum(_same_layer(path) for path in paths),
        "winner_heads": dict(zip([str(row["seed"]) for row in rows], heads, strict=True)),
        "winner_paths": dict(zip([str(row["seed"]) for row in rows], paths, strict=True)),
        "worst_match_closure": _worst(row["match_closure_path"] for row in rows),
        "worst_write_closure": _worst(row["write_closure_path"] for row in rows),
    }


def _worst(values: Iterable[float | None]) -> float | None:
    """The largest size; null where one is not defined, as nothing moved: it might be worse."""
    known = list(values)
    return None if None in known else max(abs(value) for value in known if value is not None)


def _same_layer(path: str) -> bool:
    source, mlp = path.split("_to_")
    return source.partition("H")[0] == mlp.partition("MLP")[0]
