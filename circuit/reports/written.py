"""Reports on disk: read back, and held against their digest and their run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from circuit.artifacts import iter_jsonl
from circuit.config import digest_of
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.overrides import Overrides
from circuit.quoting import shell_line
from circuit.reading import file_digest, open_file, read_json
from circuit.reports.report import Report, ReportResult, Results, find_report
from circuit.sealed import unsealed
from circuit.train_config import TrainConfig
from circuit.training.run_folder import refuse_another_runs

SUFFIX, PAGE, ROWS = "_report.json", "_report.md", "_rows.jsonl"
ANEW = "make it again"
_AWAY = "make it again, or move it away"


class LacksFieldError(CircuitError, KeyError):
    """A report does not say what its reader asks for."""

    __str__ = CircuitError.__str__  # a KeyError's own puts quotes around the line


class _Said(dict[str, Any]):
    """An object of a report's JSON, which names the report where it lacks a key."""

    where: Path

    def __missing__(self, key: str) -> Any:
        problem = f"says nothing of {key!r}"
        raise LacksFieldError(problem, where=self.where, fix="make it again with this version")

    @classmethod
    def all(cls, value: Any, where: Path) -> Any:
        """A JSON value with every object in it."""
        if isinstance(value, list):
            return [cls.all(item, where) for item in value]
        if not isinstance(value, dict):
            return value
        checked = cls({key: cls.all(item, where) for key, item in value.items()})
        checked.where = where
        return checked


@dataclass(frozen=True)
class Written:
    """A report that stands on disk.

    Attributes:
        path: of its JSON.
        payload: the JSON.
    """

    path: Path
    payload: Mapping[str, Any]

    @property
    def command(self) -> str:
        """The command that wrote it."""
        return str(self.payload["command"])

    @property
    def law(self) -> str:
        """What it checked; empty in some reports of schema 1."""
        return str(self.payload["law"])

    @property
    def summary(self) -> Mapping[str, Any]:
        """Its main numbers."""
        summary: Mapping[str, Any] = self.payload["summary"]
        return summary

    @property
    def parameters(self) -> Mapping[str, Any]:
        """With which it was called."""
        parameters: Mapping[str, Any] = self.payload["parameters"]
        return parameters

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What it was made from, where and when."""
        provenance: Mapping[str, Any] = self.payload["provenance"]
        return provenance

    @property
    def written(self) -> float:
        """When it was begun, seconds since 1970."""
        return float(self.provenance["started_unix"])

    @property
    def overrides(self) -> Mapping[str, Any] | None:
        """Its record of a config's fields that the command line had set."""
        return self.provenance.get("overrides")

    @cached_property
    def kind(self) -> type[Report[Any]] | None:
        """The report that it is; None where this version has no such one."""
        return find_report(self.command)

    @cached_property
    def results(self) -> Results[Any]:
        """What it says, for notes, tables and charts.

        Raises:
            CircuitError: this version has no such report, or cannot read its options.
        """
        if self.kind is None:
            raise CircuitError(f"no report of this version: {self.command}", where=self.path)
        options = self.kind.Options.from_json(
            self.parameters, schema=self.payload["schema_version"]
        )
        return Results(
            options,
            self.summary,
            lambda name, holding: iter_jsonl(self.file(name), holding=holding),
            self.payload["provenance"].get("slice", "lag"),
        )

    @property
    def result(self) -> ReportResult:
        """What its command has returned.

        Raises:
            CircuitError: as `results`.
        """
        results, kind = self.results, self.kind
        assert kind is not None
        names, digested = self.payload["paths"], self.payload["sha256"]
        (page,) = (name for name in names if name.endswith(PAGE))
        return ReportResult(
            kind,
            self.path,
            self.path.with_name(page),
            tuple(map(self.path.with_name, digested)),
            tuple(self.path.with_name(name) for name in names if name.endswith(".svg")),
            self.summary,
            self.law,
            kind.notes(results),
            kind.tables(results),
        )

    def command_line(self, config: TrainConfig, folder: str) -> str:
        """The line that makes the report again.

        Args:
            config: of its run, whose `output_dir` is the run's folder as the line names it.
            folder: of the report, likewise.

        Raises:
            CircuitError: as `results`.
        """
        options, kind = self.results.options, self.kind
        assert kind is not None
        words = ["circuit", *(kind.names or (kind.command,))[0].split()]
        if kind.reads_run:
            typed = self.overrides if self.overrides != config.origin().get("overrides") else None
            words += ["--config", typed["config"] if typed else f"{config.output_dir}/{RUN_CONFIG}"]
            words += [word for text in typed["set"] for word in ("--set", text)] if typed else []
            words += config.recipe_words
            environment = self.provenance["environment"]
            for name in ("device", "threads"):
                set_so = any(text.startswith(f"{name}=") for text in (typed or {"set": ()})["set"])
                if environment[name] != getattr(config, name) and not set_so:
                    words += [f"--{name}", str(environment[name])]
        return shell_line([*words, *options.words(), "--output-dir", folder, "--overwrite"])

    def file(self, name: str = "") -> Path:
        """One of its files; `<name>_rows.jsonl` where none is named.

        Raises:
            CircuitError: it is not there, or not as it was written.
        """
        path = self.path.with_name(name or self.path.name.removesuffix(SUFFIX) + ROWS)
        if self.payload.get("sha256", {}).get(path.name) not in (None, file_digest(path)):
            raise CircuitError("was changed after it was written", where=path, fix=ANEW)
        return path

    def refuse_another_runs(self) -> None:
        """Refuse it where it stands in the folder of a run and is of another one.

        Raises:
            CircuitError: the run was trained anew after the report was made.
        """
        refuse_another_runs(self.path, self.provenance)


def read_report(path: str | Path) -> Written:
    """A report from its JSON; those of schema 1 have no digest.

    Raises:
        CircuitError: there is none, it is damaged, or one of its digits is not what was written.
    """
    path = Path(path)
    try:
        payload = read_json(path, missing="no such report", fix=_AWAY)
        for key in ("summary", "parameters", "provenance"):
            _ = payload[key].keys()
        _ = payload.get("sha256", {}).keys()
        _ = payload["command"], payload["law"], float(payload["provenance"]["started_unix"])
        if "overrides" in payload["provenance"]:
            Overrides.model_validate(payload["provenance"]["overrides"])
        claimed, schema = payload.pop("digest", None), int(payload["schema_version"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CircuitError(
            f"is no report of this program ({error!r})", where=path, fix=_AWAY
        ) from None
    if (claimed is not None or schema >= 2) and claimed != digest_of(payload):
        raise CircuitError(
            "was changed after it was written: its digest is another",
            where=path,
            fix=ANEW,
        )
    return Written(path, _Said.all(payload, path))


def report_of(rows: Path, command: str) -> Written:
    """The report that stands beside a row file.

    Raises:
        CircuitError: there is no such file, its rows are another command's or another run's, or
            as `read_report`.
    """
    open_file(rows).close()
    report = read_report(rows.with_name(rows.name.removesuffix(ROWS) + SUFFIX))
    if report.command != command:
        problem = f"holds rows of {report.command}"
        raise CircuitError(problem, where=rows, expected=f"rows of {command}")
    report.refuse_another_runs()
    return report


def read_document(path: str | Path) -> dict[str, Any]:
    """A JSON object of this program that is no report, such as a run's `summary.json`.

    Raises:
        CircuitError: there is none, it is damaged, or was changed.
    """
    payload = read_json(path, fix=ANEW)
    if not isinstance(payload, dict):
        raise CircuitError("is damaged (no object)", where=path, fix=ANEW)
    checked = _Said.all(unsealed(payload, where=path, fix=ANEW), Path(path))
    return cast("dict[str, Any]", checked)
