"""seed-spread: what runs of one recipe reach with different seeds, as mean and spread.

The runs are folders of any name; their seeds are those of their configs. With reports of the runs
it also follows who matches and who writes, by role, aligned on when each run forms
(circuit/reports/roles.py). Intervals over seeds are Student's t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.figures.charts import (
    CATEGORY,
    GREY,
    TICKS,
    Chart,
    at_step,
    chart,
    colour,
    exact,
    lines,
    named,
)
from circuit.folders import RUN_CONFIG
from circuit.lazy import alt
from circuit.options import Option, Options
from circuit.reading import values_of
from circuit.reports.intervals import between, ends_of, spread
from circuit.reports.report import Findings, Report, Results
from circuit.reports.roles import (
    ROLES,
    aligned_means,
    follow,
    formed_at,
    read_reports,
)
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
ROLE_ROWS = "seed_spread_roles.jsonl"
ROLE_VALUES = {role.name: role.value for role in ROLES.values()}


class SeedSpreadOptions(Options):
    """Which runs are compared."""

    runs: Annotated[
        tuple[Path, ...],
        Option("Folder of a run; each has another seed.", flag="--run", kind="run"),
    ]
    reports: Annotated[
        tuple[Path, ...],
        Option(
            "bilinear-qk-match-separation or path-logit-decomposition of a run: who matches or"
            " writes most is followed by role.",
            flag="--report",
            kind="report",
        ),
    ] = ()
    formed_share: Annotated[
        float,
        Option(
            "Answer accuracy at which a run counts as formed: steps of roles are counted from"
            " there.",
            above=0,
            most=1,
        ),
    ] = 0.6
    formed_value: Annotated[
        int | None,
        Option("Value of the task's first slice, such as lag, that it is of.", unset="the last"),
    ] = None

    def check(self) -> None:
        """Also refuses to be told when a run counts as formed where nothing is aligned on it."""
        super().check()
        for name in ("formed_share", "formed_value"):
            default = type(self).model_fields[name].default
            if not self.reports and getattr(self, name) != default:
                raise CircuitError(
                    f"{getattr(self, name)}, but no report to align",
                    where=f"`{name}`",
                    expected="a report of each run, too",
                )


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
        recipes = {config.recipe_digest(): config.seed for config in self.configs}
        self.reports = read_reports(self.options.reports, recipes)

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
        summary, further = summarize(last), {}
        if self.reports:
            formed = self._formed()
            further[ROLE_ROWS] = roles = list(follow(self.reports, formed))
            summary |= {
                "formed_at": {str(seed): step for seed, step in sorted(formed.items())},
                "roles": aligned_means(roles),
                "components": {
                    role: {str(r["seed"]): r["component"] for r in roles if r["role"] == role}
                    for role in dict.fromkeys(row["role"] for row in roles)
                },
            }
        return Findings(rows, summary, law, further, {"config_digests": digests})

    def _formed(self) -> dict[int, int | None]:
        """By seed, the step at which the run forms on its first tracked split.

        Raises:
            CircuitError: its evaluations do not have the slice value.
        """
        asked, formed = self.options, {}
        for folder, config in zip(asked.runs, self.configs, strict=True):
            with values_of(folder / METRICS, fix=_ANEW):
                every = [r for r in read_metrics(folder, whole=True) if r["kind"] == "evaluation"]
                rows = [row for row in every if row["split"] == every[0]["split"]]
                by, of_values = next(iter(rows[0]["by_slice"].items()), ("slice", {}))
                known = sorted(of_values, key=int)
            last = known[-1] if known else "any"
            value = last if asked.formed_value is None else str(asked.formed_value)
            if value not in known:
                raise CircuitError(
                    f"no {by} is {value}",
                    where="`formed_value`",
                    expected=f"one of {', '.join(known)}",
                )
            formed[config.seed] = formed_at(rows, by, value, asked.formed_share)
        return formed

    @classmethod
    def notes(cls, results: Results[SeedSpreadOptions]) -> list[str]:
        seeds = ", ".join(map(str, results.summary["seeds"]))
        return [
            f"Seeds {seeds}. `sd` is the sample standard deviation over seeds (n - 1); a dash"
            " where there is one run; 95 %: Student's t interval of the mean over seeds.",
            *_said_roles(results),
        ]

    @classmethod
    def tables(cls, results: Results[SeedSpreadOptions]) -> list[Table]:
        tables = []
        for split, of in results.summary["splits"].items():
            spread = {"mean": "mean", "sd": "sd", "least": "least", "most": "most"}
            rows = [
                {"measure": name.replace("_", " "), "between": between(of[name], "mean", spec)}
                | {key: cell(of[name][key], spec) for key in spread}
                for name, spec in _MEASURES.items()
            ]
            columns = {"measure": "measure", "mean": "mean", "between": "95 %", **spread}
            tables.append(Table(split, columns, rows, console=len(rows)))
        last: Columns = {
            "run": "run",
            "seed": "seed",
            "split": "split",
            "step": "step",
            **{name: (name.replace("_", " "), spec) for name, spec in _MEASURES.items()},
        }
        aligned: Columns = {
            "role": "role",
            "offset": "steps from formation",
            "seeds": "seeds",
            "mean": ("mean", ".4g"),
            "between": "95 %",
        }
        means = results.summary.get("roles", [])
        shown = [{**row, "between": between(row, "mean", ".4g")} for row in means]
        at_formation = [row for row in shown if row["offset"] == 0]
        roles = [
            Table("Roles where the runs form", aligned, at_formation, console=len(at_formation)),
            Table("Roles, aligned", aligned, shown),
        ]
        return [*tables, *(roles if shown else []), Table("Runs", last, results.summary["last"])]

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
        drawn = [chart("seeds", title, {"seeds": data}, course, at_step())]
        means = results.summary.get("roles", [])
        for role in dict.fromkeys(row["role"] for row in means):
            of_seeds = [row for row in results.rows(ROLE_ROWS) if row["role"] == role]
            drawn.append(_aligned([row for row in means if row["role"] == role], of_seeds))
        return drawn


def _said_roles(results: Results[SeedSpreadOptions]) -> list[str]:
    """Who has each role in which seed, and when the runs form."""
    components, formed = (results.summary.get(name, {}) for name in ("components", "formed_at"))
    said = [
        f"**{role}**: " + ", ".join(f"{part} (seed {seed})" for seed, part in of.items()) + "."
        for role, of in components.items()
    ]
    if formed:
        steps = ", ".join(f"{cell(step)} (seed {seed})" for seed, step in formed.items())
        said.append(
            f"Formed, at accuracy {results.options.formed_share:g}, at step {steps}; -: not within"
            " the run. Means are where all seeds that form were measured so many steps from it. A"
            " component is chosen on the reads on which it is measured."
        )
    return said


def _aligned(means: Sequence[Row], of_seeds: Sequence[Row]) -> Chart:
    """The mean of a role over seeds with its interval, and every seed beneath it."""
    role = means[0]["role"]
    name = f"aligned_{role.replace(' ', '_').replace('-', '_')}"
    value = ROLE_VALUES[role]
    x = (
        alt.X("offset:Q")
        .title("steps from formation")
        .axis(format="d", tickCount=TICKS)
        .scale(nice=False)
    )
    y = alt.Y("mean:Q").title(value)
    mean = named(name).encode(x=x)
    shown = ("role", "offset", "seeds", "mean", *ends_of("mean"))
    kept = ("seed", "component", "step", "offset", "value")
    seeds = [{key: row[key] for key in kept} for row in of_seeds if row["offset"] is not None]
    layers = (
        mean.transform_filter("isValid(datum.mean_low)")
        .mark_area(color=CATEGORY[0], opacity=0.16, aria=False)
        .encode(y=alt.Y("mean_low:Q").title(value), y2="mean_high:Q"),
        named(f"{name}_seeds")
        .mark_line(color=GREY, strokeWidth=1, point={"size": 12, "color": GREY})
        .encode(x=x, y=alt.Y("value:Q").title(value), detail="seed:N", tooltip=exact(*kept)),
        mean.mark_line(
            color=CATEGORY[0], strokeWidth=2, point={"size": 28, "color": CATEGORY[0]}
        ).encode(y=y, tooltip=exact(*shown)),
    )
    title = f"{role}: mean over seeds and its interval, each seed in grey"
    data = {name: [{key: row[key] for key in shown} for row in means], f"{name}_seeds": seeds}
    return chart(name, title, data, *layers)


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
