"""cross-seed-comparison: does the role repeat in every seed, and does its address move?

Reads what the commands of each seed wrote: the selections of heads and of write paths, and the
attributions of the selected. Reports name their seed by their folder, `seed_NNNN`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from circuit.artifacts import dump_json
from circuit.errors import CircuitError
from circuit.figures.seeds import roles_by_seed, terms_by_seed
from circuit.reports.base import ReportResult, open_report
from circuit.strict_json import parse_json
from circuit.studies.selection import ROLES
from circuit.training.run_folder import refuse_another_runs

COMMAND = "cross-seed-comparison"
_SEED = re.compile(r"seed_(\d{4})")
_KINDS = {
    "head-selection": "heads",
    "write-path-selection": "paths",
    "bilinear-qk-rank-adam-state-attribution": "match",
    "mlp-functional-write-adam-state-attribution": "write",
}
FORMED = 0.5
"""Share of reads in which the winner's support beats every distractor, from which a role exists."""
WRITTEN = 1.0
"""Final functional write of the winner path, in logits of margin, from which it has the role."""

Reports = dict[int, dict[str, dict[str, Any]]]
"""By seed and kind."""


def read_reports(paths: Sequence[Path]) -> tuple[Reports, list[dict[str, Any]]]:
    """The reports by seed and kind, and a manifest of them.

    Raises:
        CircuitError: a file is no report of the study, or a seed lacks one or has two of a kind.
    """
    found: Reports = {}
    manifest = []
    for path in paths:
        match = _SEED.search(str(path))
        try:
            text = path.read_bytes()
            payload = parse_json(text)
            kind = _KINDS[payload["command"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise CircuitError(
                "is no report of the cross-seed study", where=path, expected=", ".join(_KINDS)
            ) from None
        refuse_another_runs(path, payload.get("provenance", {}))
        if match is None:
            raise CircuitError("stands in no folder seed_NNNN", where=path)
        seed = int(match[1])
        if kind in found.setdefault(seed, {}):
            raise CircuitError(f"a second {payload['command']} of seed {seed}", where=path)
        found[seed][kind] = payload
        digest = hashlib.sha256(text).hexdigest()
        manifest.append(
            {"seed": seed, "command": payload["command"], "report": str(path), "sha256": digest}
        )
    for seed, kinds in found.items():
        missing = [command for command, kind in _KINDS.items() if kind not in kinds]
        if missing:
            raise CircuitError(f"seed {seed} has no report of {', '.join(missing)}")
    return dict(sorted(found.items())), sorted(manifest, key=lambda e: (e["seed"], e["command"]))


def compare_seeds(
    reports: Sequence[Path], output_dir: str | Path, *, overwrite: bool = False
) -> ReportResult:
    """Compare the seeds of the study: one row a seed.

    Raises:
        CircuitError: as `read_reports`.
    """
    found, manifest = read_reports(reports)
    if not found:
        raise CircuitError("no reports", expected="those of at least one seed")
    rows = [seed_row(seed, kinds) for seed, kinds in found.items()]
    summary = summarize(rows)
    winners = [_winner(row) for row in rows]
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        return writer.write(
            parameters={
                "reports": [str(path) for path in reports],
                "formed_from": FORMED,
                "written_from": WRITTEN,
            },
            summary=summary,
            rows=rows,
            page=_page(rows, summary),
            figures={"roles": roles_by_seed(rows), "terms": terms_by_seed(rows)},
            further={
                "winners.json": dump_json(winners),
                "winners.csv": _csv(winners),
                "manifest.json": dump_json(manifest),
            },
        )


def seed_row(seed: int, kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What one seed says: selected heads and path, and what moved them."""
    heads, paths = (kinds[kind]["summary"]["selected"] for kind in ("heads", "paths"))
    row: dict[str, Any] = {"seed": seed, "score": kinds["heads"]["summary"]["score"]}
    for role in ROLES:
        row[f"{role}_head"] = heads[role]["head"]
        row[f"{role}_growth"] = heads[role]["growth"]
    row["winner_support_wins"] = heads["winner"]["support_wins_at_end"]
    row["winner_path"] = paths["winner"]["path"]
    row["winner_path_write"] = paths["winner"]["final_write"]
    row["runner_up_path"] = paths["runner_up"]["path"]
    row["bottom_path_write"] = paths["bottom"]["final_write"]
    match = _window(kinds["match"], heads["winner"]["head"])
    write = _window(kinds["write"], "")
    for name, window in (("match", match), ("write", write)):
        row[f"{name}_actual"] = window["actual"]
        row[f"{name}_terms"] = {n: v for n, v in window["path"].items() if n != "rounding"}
        row[f"{name}_closure_path"] = window["closure"]["path"]
        row[f"{name}_closure_first_order"] = window["closure"]["first_order"]
    return row


def _window(report: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The whole window of the scalar that names a component."""
    summary = report["summary"]
    for window in summary["windows"]:
        whole = (window["start_step"], window["end_step"]) == (
            summary["start_step"],
            summary["end_step"],
        )
        if whole and (not component or f".{component}." in f".{window['scalar']}."):
            return dict(window)
    raise CircuitError(f"the attribution holds no scalar of {component}", where=report["command"])


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
        "worst_match_closure": _worst(rows, "match_closure_path"),
        "worst_write_closure": _worst(rows, "write_closure_path"),
    }


def _worst(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    return max((row[column] for row in rows if row[column] is not None), default=None)


def _same_layer(path: str) -> bool:
    source, mlp = path.split("_to_")
    return source.partition("H")[0] == mlp.partition("MLP")[0]


def _winner(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("seed", "winner_head", "winner_growth", "winner_path", "winner_path_write")
    return {name: row[name] for name in names}


def _csv(winners: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, list(winners[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(winners)
    return text.getvalue()


def _page(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    count = len(rows)
    lines = [
        f"- *The matching role*: in {summary['head_role_repeats']} of {count} seeds the winner's"
        f" support beats every distractor in at least {100 * FORMED:.0f} % of the reads. Its"
        f" address is {', '.join(summary['head_addresses'])} ({len(summary['head_addresses'])}"
        " addresses).",
        f"- *The writing role*: the winner path writes at least {WRITTEN:g} logit in"
        f" {summary['write_role_repeats']} of {count} seeds, at {len(summary['path_addresses'])}"
        f" addresses; in {summary['same_layer_readers']} the MLP is of the head's own layer.",
        "",
        "![roles](roles.svg)",
        "",
        "| seed | winner head | growth | support wins | runner-up | bottom | winner path | final"
        " write | runner-up path |",
        "|---:|---|---:|---:|---|---|---|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['seed']} | {row['winner_head']} | {row['winner_growth']:+.4g}"
            f" | {100 * row['winner_support_wins']:.0f} %"
            f" | {row['runner_up_head']} ({row['runner_up_growth']:+.4g})"
            f" | {row['bottom_head']} ({row['bottom_growth']:+.4g}) | {row['winner_path']}"
            f" | {row['winner_path_write']:+.4g} | {row['runner_up_path']} |"
        )
    lines += ["", "What moved the winners (path contributions over their windows):", ""]
    lines += ["![terms](terms.svg)", ""]
    for name in ("match", "write"):
        terms = list(rows[0][f"{name}_terms"])
        lines += [
            f"| seed ({name}) | actual | {' | '.join(f'`{t}`' for t in terms)} | closure, path |"
            " closure, first order |",
            "|---:|---:|" + "---:|" * (len(terms) + 2),
        ]
        for row in rows:
            shares = " | ".join(f"{row[f'{name}_terms'][t]:+.4g}" for t in terms)
            closures = (row[f"{name}_closure_{kind}"] for kind in ("path", "first_order"))
            lines.append(
                f"| {row['seed']} | {row[f'{name}_actual']:+.4g} | {shares} | "
                + " | ".join("-" if c is None else f"{100 * c:.2g} %" for c in closures)
                + " |"
            )
        lines.append("")
    return lines
