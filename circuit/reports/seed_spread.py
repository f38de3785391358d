"""seed-spread: what runs of one recipe reach with different seeds, as mean and spread.

The runs are folders of any name; their seeds are those of their configs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.figures.charts import Chart, at_step, chart, colour, lines
from circuit.folders import RUN_CONFIG
from circuit.options import Option, Options
from circuit.reading import values_of
from circuit.reports.report import Findings, Report, Results
from circuit.reports.tables import Columns, Table, cell
from circuit.reports.written import read_document
from circuit.train_config import TrainConfig, load_run_config
from circuit.training.run_folder import METRICS, SUMMARY, read_metrics

_MEASURES = {
    "loss": ".3f",
    "token_accuracy": ".1%",
    "answer_accuracy": ".1%",
    "q": ".2f",
    "r": ".2f",
    "w": ".2f",
}
"""Numbers of an evaluation that are compared, and their formats; a task need not have a `q`."""
_ANEW = "train it again"


class SeedSpreadOptions(Options):
    """Which runs are compared."""

    runs: Annotated[
        tuple[Path, ...],
        Option("Folder of a run; each has another seed.", flag="--run", kind="run"),
    ]


class SeedSpread(Report[SeedSpreadOptions]):
    """What runs of one recipe reach with different seeds: mean and spread."""

    command = "seed-spread"
    Options = SeedSpreadOptions
    names = ("study seed-spread",)
    panel = "Study"
    reads_run = False
    title = "Seeds of one recipe"
    question = "How much of what a run reaches is its seed?"

    def prepare(self) -> None:
        self.configs = [load_run_config(folder / RUN_CONFIG) for folder in self.options.runs]
        refuse_other_recipes(self.options.runs, self.configs)
        self.ended = [_summary(folder) for folder in self.options.runs]

    def conclude(self, rows: list[Row]) -> Findings:
        runs = zip(self.options.runs, self.configs, strict=True)
        rows = [row for folder, config in runs for row in evaluations(folder, config)]
        if not rows:
            raise CircuitError("hold no evaluation", where="`runs`", expected="tracked splits")
        last, gap = _last(rows), 0.0
        for folder, config, ended in zip(self.options.runs, self.configs, self.ended, strict=True):
            with values_of(folder / SUMMARY, fix=_ANEW):
                reported = [
                    (row[name], ended["evaluations"][row["split"]][name])
                    for row in last
                    if row["seed"] == config.seed
                    for name in _MEASURES
                    if row[name] is not None
                ]
                gap = max(gap, *(abs(a - b) for a, b in reported))
        law = (
            f"the last evaluations of {len(self.configs)} runs are those that the runs reported"
            f" when they ended, to {gap:.1g}"
        )
        digests = {str(config.seed): config.digest() for config in self.configs}
        return Findings(rows, summarize(last), law, provenance={"config_digests": digests})

    @classmethod
    def notes(cls, results: Results[SeedSpreadOptions]) -> list[str]:
        seeds = ", ".join(map(str, results.summary["seeds"]))
        return [
            f"Seeds {seeds}. `sd` is the sample standard deviation over seeds (n - 1); a dash"
            " where there is one run."
        ]

    @classmethod
    def tables(cls, results: Results[SeedSpreadOptions]) -> list[Table]:
        tables = []
        for split, of in results.summary["splits"].items():
            spread = {"mean": "mean", "sd": "sd", "least": "least", "most": "most"}
            rows = [
                {"measure": name.replace("_", " ")}
                | {key: cell(of[name][key], spec) for key in spread}
                for name, spec in _MEASURES.items()
            ]
            tables.append(Table(split, {"measure": "measure", **spread}, rows, console=len(rows)))
        last: Columns = {
            "run": "run",
            "seed": "seed",
            "split": "split",
            "step": "step",
            **{name: (name.replace("_", " "), spec) for name, spec in _MEASURES.items()},
        }
        return [*tables, Table("Runs", last, results.summary["last"])]

    @classmethod
    def charts(cls, results: Results[SeedSpreadOptions]) -> list[Chart]:
        split = next(iter(results.summary["splits"]))
        kept = ("run", "seed", "step", "answer_accuracy")
        data = [
            {name: row[name] for name in kept} | {"seed": str(row["seed"])}
            for row in results.rows()
            if row["split"] == split
        ]
        shade = colour("seed", [str(seed) for seed in results.summary["seeds"]], title="seed")
        course = lines("seeds", "answer_accuracy", "answer accuracy", shade, kept)
        title = f"answer accuracy on {split}, by seed"
        return [chart("seeds", title, {"seeds": data}, course, at_step())]


def refuse_other_recipes(folders: Sequence[Path], configs: Sequence[TrainConfig]) -> None:
    """Refuse runs that are not of one recipe, or of which two have a seed.

    Raises:
        CircuitError: names the run, and the field or the seed.
    """
    first, seen = configs[0], dict[int, Path]()
    for folder, config in zip(folders, configs, strict=True):
        difference = config.replace(seed=first.seed).recipe_difference(first)
        if difference is not None:
            raise CircuitError(
                f"is of another recipe than {folders[0]}: {difference}",
                where=folder,
                expected="runs that differ in their seed alone",
            )
        if config.seed in seen:
            raise CircuitError(
                f"has seed {config.seed}, as {seen[config.seed]} has",
                where=folder,
                expected="each seed once",
            )
        seen[config.seed] = folder


def _summary(folder: Path) -> Mapping[str, Any]:
    if not (folder / SUMMARY).is_file():
        raise CircuitError(f"holds no {SUMMARY}", where=folder, fix="finish the run first")
    return read_document(folder / SUMMARY)


def evaluations(folder: Path, config: TrainConfig) -> list[dict[str, Any]]:
    """What a run logged of its tracked splits, step by step."""
    known = {"run": config.name, "seed": config.seed}
    with values_of(folder / METRICS, fix=_ANEW):
        return [
            {**known, "step": int(row["step"]), "split": str(row["split"])}
            | {name: row[name] and float(row[name]) for name in _MEASURES}
            for row in read_metrics(folder, whole=True)
            if row["kind"] == "evaluation"
        ]


def _last(rows: Sequence[Row]) -> list[Row]:
    """The last evaluation of every split of every seed."""
    by_run = {(row["seed"], row["split"]): row for row in rows}  # in the order of steps
    return list(by_run.values())


def summarize(last: Sequence[Row]) -> dict[str, Any]:
    """Mean, sample standard deviation and ends of every measure, by split."""
    splits = dict.fromkeys(row["split"] for row in last)
    of = {split: [row for row in last if row["split"] == split] for split in splits}
    return {
        "seeds": sorted({row["seed"] for row in last}),
        "splits": {
            split: {name: spread([row[name] for row in rows]) for name in _MEASURES}
            for split, rows in of.items()
        },
        "last": list(last),
    }


def spread(measured: Sequence[float | None]) -> dict[str, float | None]:
    """Of some values, those that there are; one alone has no standard deviation."""
    values = [value for value in measured if value is not None]
    return {
        "mean": fmean(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
        "least": min(values, default=None),
        "most": max(values, default=None),
    }
