"""The one shape of every report: options in, findings out, the same files for all.

    <name>_report.json   schema version, every option, law, summary, paths, provenance, digest
    <name>_report.md     the same to read: notes, charts and tables
    <name>_rows.jsonl    one object a row (and further row files that the report names)
    *.svg                charts

`<name>` is the command with underscores and without a trailing `-report`; the module of the report
is called so, too, and is found by it: a new report is a module here. What is shown (notes, tables,
charts) is made from what is written, so that the page draws it again from the files. Clock times,
host and versions stand in `provenance` of the JSON alone: equal inputs give equal bytes elsewhere.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast
from urllib.parse import quote

from circuit.artifacts import OutputFolder, Row, dump_json, dump_rows
from circuit.environment import environment_facts
from circuit.errors import CircuitError
from circuit.options import CheckpointOptions, Options, ProbeOptions
from circuit.quoting import markdown_text
from circuit.reports.listing import PANEL
from circuit.reports.tables import Table
from circuit.sealed import sealed
from circuit.strict_json import parse_json

if TYPE_CHECKING:
    from circuit.figures.charts import Chart
    from circuit.reports.inputs import Inputs
    from circuit.tasks.base import Task
    from circuit.train_config import ModelConfig, TrainConfig

O = TypeVar("O", bound=Options)  # noqa: E741  the field's name for it
Progress = Callable[[int, int, str], None]
"""Called with what is done, of how much, and what is being done."""


@dataclass(frozen=True)
class Findings:
    """What a report found.

    Attributes:
        rows: of `<name>_rows.jsonl`; or their text, where they are too many to keep.
        summary: the main numbers, JSON.
        law: what was checked, with its number, in one sentence.
        further: further files by name: rows, or text.
        provenance: digests of what was read, beside those that every such report has.
    """

    rows: Iterable[Row] | str
    summary: Mapping[str, Any]
    law: str
    further: Mapping[str, Iterable[Row] | str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results(Generic[O]):
    """What a report has written, as notes, tables and charts are made from it.

    Attributes:
        options: it was made with.
        summary: its main numbers.
        read: the rows of a file by its name; see `rows`.
        slice: column of the values by which figures are given apart.
    """

    options: O
    summary: Mapping[str, Any]
    read: Callable[[str, str], Iterable[Row]]
    slice: str = "lag"

    def rows(self, file: str = "", *, holding: str = "") -> Iterator[Row]:
        """Rows of one of its files, the main one by default; see `iter_jsonl`."""
        return iter(self.read(file, holding))


@dataclass(frozen=True)
class Place:
    """What a run offers to a report that is yet to be made.

    Attributes:
        model: its shape.
        given: by name of an option: its probe set, the folder of its checkpoints, its trace.
        head: the one whose match grew most, as far as that is known.
        task: of the run, where its benchmark is there.
    """

    model: ModelConfig
    given: Mapping[str, Path]
    head: str
    task: Task | None = None

    def has_role(self, role: str) -> bool:
        """Whether the run's task has a role, as far as that is known."""
        return self.task is None or role in self.task.roles

    @property
    def embeddings(self) -> str:
        """The subspace of the embeddings of the task's last token set."""
        names = ("value",) if self.task is None else self.task.token_set_names
        return f"embedding_{names[-1] if names else ''}_identity"

    @property
    def read(self) -> dict[str, Any]:
        """The probe set and the folder of checkpoints, by their options."""
        return {name: self.given[name] for name in ("probe_set", "checkpoint_dir")}

    @property
    def rank(self) -> int:
        """Of a subspace of the residual stream, also of that which the last token set spans."""
        sets = () if self.task is None else tuple(self.task.token_sets.values())
        spanned = min((len(ids) for ids in sets[-1:]), default=self.model.d_model)
        return max(1, min(16, self.model.d_model // 8, spanned - 1))

    @property
    def after_mlps(self) -> list[str]:
        """The stages after the layers' MLPs."""
        return [f"layer_{layer}_post_mlp" for layer in range(self.model.layers)]


class Report(Generic[O]):
    """A question; its docstring's first line is what `--help` says.

    Attributes:
        command: its name.
        Options: what it may be asked.
        names: words of the command line, where they are not `command` alone.
        further: patterns of files whose names do not begin with the report's.
        panel: heading of the command in `--help`.
        reads_run: whether it takes a run's config.
        any_module: whether a recorded module of any class will do, or a HookedTransformer.
        of_recipes: whether the run may be one of a recipe, which has no task.
        generated: whether `run_report` makes it, and the command line its command; else both are
            of its own.
        title, question: of its panel on the page.
        place: of the panel among others; where there is none, the page shows the report but does
            not ask for it.
        every: whether the page shows every report of the kind, or the most complete one.
        task: of the runs that it is about, where it is about those of one task alone: the page of
            another run leaves it out.
        asked_of: the task of which it is usual to ask, where it is not usual of every one: pages of
            other runs show it, but do not ask for it.
    """

    command: ClassVar[str]
    Options: ClassVar[type[Options]]
    names: ClassVar[tuple[str, ...]] = ()
    further: ClassVar[tuple[str, ...]] = ()
    panel: ClassVar[str] = PANEL
    reads_run: ClassVar[bool] = True
    any_module: ClassVar[bool] = False
    of_recipes: ClassVar[bool] = False
    generated: ClassVar[bool] = True
    title: ClassVar[str] = ""
    question: ClassVar[str] = ""
    place: ClassVar[int | None] = None
    every: ClassVar[bool] = False
    task: ClassVar[str] = ""
    asked_of: ClassVar[str] = ""

    def __init__(self, options: O, config: TrainConfig | None = None) -> None:
        self.options = options
        self._config = config
        self.tell: Callable[[str], None] = lambda _: None
        """Says what is being done, within one of the loop's points."""

    @property
    def config(self) -> TrainConfig:
        """Of the run."""
        assert self._config is not None, f"{self.command} reads a run"
        return self._config

    @property
    def recipe(self) -> bool:
        """Whether the run is one of a recipe."""
        from circuit.train_config import RecipeConfig

        return isinstance(self._config, RecipeConfig)

    @classmethod
    def stem(cls) -> str:
        """Of its files, and its module."""
        return report_name(cls.command)

    @classmethod
    def usual(cls, place: Place) -> O:
        """The options with which the page asks for the report."""
        names = cls.Options.declared()
        paths = {name: path for name, path in place.given.items() if name in names}
        return cast("O", cls.Options(**paths))

    # --- the run of a report, in this order ---

    def check(self) -> None:
        """Refuse what the options and the run's config tell, before anything is opened."""
        if self._config is None or (self.of_recipes and self.recipe):
            return
        if self._config.shape is not None or self.recipe or not self.any_module:
            self.options.check_model(self._config.model)  # where there is none it is refused

    def prepare(self) -> None:
        """Open what is read, and refuse what headers tell; nothing here needs torch yet."""

    def points(self) -> Iterable[Any]:
        """What is measured, one after the other; a sequence, or `total` says how many."""
        return ()

    @property
    def total(self) -> int:
        """How many points there are."""
        return 0

    def measure(self, point: Any) -> Iterable[Row]:
        """The rows of one point."""
        raise NotImplementedError

    def conclude(self, rows: list[Row]) -> Findings:
        """What all rows say."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """Digests of what was read."""
        return {}

    @property
    def device(self) -> str:
        """That was computed on."""
        return "cpu" if self._config is None else self._config.device

    # --- what is shown, from what was written ---

    @classmethod
    def notes(cls, results: Results[O]) -> list[str]:
        """Paragraphs: what was measured, and what stands out."""
        return []

    @classmethod
    def tables(cls, results: Results[O]) -> list[Table]:
        """Of the Markdown, the console and the page."""
        return []

    @classmethod
    def charts(cls, results: Results[O]) -> list[Chart]:
        """Of the SVGs and the page."""
        return []

    @classmethod
    def about(cls, results: Results[O]) -> str:
        """What tells it from others of its kind, in a few words: the page's headings have it."""
        return ""

    @classmethod
    def size(cls, results: Results[O]) -> tuple[float, ...]:
        """How complete a report is: the page shows the most complete one."""
        return ()


C = TypeVar("C", bound=CheckpointOptions)


class OfCheckpoints(Report[C]):
    """Measures models at checkpoints of the run, on reads of a probe set if the options have one.

    Attributes:
        least: checkpoints that it takes.
        finite: whether weights that are not finite are refused.
        inputs: what is read besides the weights, after `prepare`.
        digests: of the weights of each step, as they are measured.
    """

    least: ClassVar[int] = 1
    finite: ClassVar[bool] = True
    inputs: Inputs

    def check(self) -> None:
        super().check()
        from circuit.reports.inputs import choose_checkpoints

        chosen = choose_checkpoints(
            self.options.checkpoints, self.options.checkpoint_dir, least=self.least
        )
        self.options = self.options.model_copy(update={"checkpoints": tuple(chosen)})
        self.digests: dict[str, str] = {}

    def prepare(self) -> None:
        from circuit.reports.inputs import open_inputs

        options = cast("ProbeOptions", self.options)
        self.inputs = open_inputs(
            self.config,
            options.probe_set,
            splits=options.splits or None,
            half=options.half,
            checkpoints=self.options.checkpoints,
        )
        self.options.check_task(self.inputs.task)

    def points(self) -> Iterator[Any]:
        for point in self.inputs.models(self.options.checkpoints, finite=self.finite):
            self.digests[str(point.step)] = point.digest
            yield point

    @property
    def total(self) -> int:
        return len(self.options.checkpoints)

    @property
    def slice(self) -> str:
        """The fact by which figures are given apart: the one asked for, or the task's first."""
        return getattr(self.options, "slice", None) or self.inputs.task.slice_name

    def provenance(self) -> dict[str, Any]:
        of_inputs = self.inputs.provenance() | {"slice": self.slice}
        return {**of_inputs, "parameters_sha256": self.digests}


# --- running and writing --------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportResult:
    """A written report.

    Attributes:
        report, page: the JSON and the Markdown.
        rows: the row files, `<name>_rows.jsonl` first.
        figures: the SVGs.
        law: what was checked, in one sentence.
        notes, tables: as the page has them.
    """

    kind: type[Report[Any]]
    report: Path
    page: Path
    rows: tuple[Path, ...]
    figures: tuple[Path, ...]
    summary: Mapping[str, Any]
    law: str
    notes: Sequence[str]
    tables: Sequence[Table]

    @property
    def paths(self) -> list[Path]:
        """Every file, the report first."""
        return [self.report, self.page, *self.rows, *self.figures]


def run_report(
    kind: type[Report[O]],
    run: Any,
    options: O,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ReportResult:
    """Make a report: the one loop, the one refusal path, the one writer.

    Args:
        run: the run's config, or an opened run; None where the report reads none.
        output_dir: folder of this report alone.
        overwrite: replace an earlier report of the same command there.
        progress: told how far it is.

    Raises:
        CircuitError: bad options, or what is read does not belong together; or the folder holds a
            report of this command and `overwrite` was not given, a report of another command, or
            somebody else's file under a name that is needed.
    """
    report = kind(options, getattr(run, "config", run))
    report.check()
    with open_report(kind, output_dir, overwrite=overwrite) as writer:
        report.prepare()
        rows: list[Row] = []
        tell = progress or (lambda *_: None)
        done = 0
        report.tell = lambda note: tell(done, report.total, note)
        for point in report.points():
            rows += report.measure(point)
            del point  # such as a model, which goes before the next one comes
            done += 1
            tell(done, report.total, "")
        return writer.write(report, report.conclude(rows))


class open_report:  # noqa: N801  a context manager
    """Lock the folder of a report; earlier files of the command are replaced on writing.

    Files that the earlier report wrote and the new one does not are removed when the block ends
    without an error, if a new one was written in it.

    Raises:
        CircuitError: as `run_report` says of the folder.
    """

    def __init__(
        self, kind: type[Report[Any]], output_dir: str | Path, *, overwrite: bool = False
    ) -> None:
        self.kind = kind
        writes = (f"{kind.stem()}_*", "*.svg", *kind.further)
        self.folder = OutputFolder(output_dir, kind.command, writes=writes, overwrite=overwrite)
        self.began = time.time()
        self.written = False

    def __enter__(self) -> open_report:
        folder = self.folder.__enter__()
        try:
            folder.refuse_foreign([*_names(self.kind), *folder.owned])
            for other in sorted(folder.root.glob("*_report.json")):
                if other.name not in folder.owned:
                    raise CircuitError(
                        f"the folder holds another report, {other.name}",
                        where=folder.root,
                        fix="give each report a folder of its own",
                    )
        except BaseException as error:
            folder.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            if raised[0] is None and self.written:
                self.folder.remove_stale()
        finally:
            self.folder.__exit__(*raised)

    def write(self, report: Report[Any], findings: Findings) -> ReportResult:
        """Write every file of the report, the JSON last."""
        kind, provenance = type(report), report.provenance()
        row_file, page_file, report_file = _names(kind)
        further = {row_file: findings.rows, **findings.further}
        files = {n: f if isinstance(f, str) else list(f) for n, f in further.items()}
        results = Results(
            report.options,
            findings.summary,
            lambda name, text: _rows(files[name or row_file], text),
            provenance.get("slice", "lag"),
        )
        notes, tables, charts = kind.notes(results), kind.tables(results), kind.charts(results)
        texts = {name: f if isinstance(f, str) else dump_rows(f) for name, f in files.items()}
        drawn = {f"{chart.name}.svg": chart.svg() for chart in charts}
        texts |= {**drawn, page_file: markdown(kind.command, findings.law, notes, charts, tables)}
        contents = {name: text.encode() for name, text in texts.items()}
        payload = {
            "schema_version": SCHEMA,
            "command": kind.command,
            "parameters": report.options.to_json(),
            "law": findings.law,
            "summary": dict(findings.summary),
            "paths": list(contents),
            "sha256": {name: hashlib.sha256(contents[name]).hexdigest() for name in files},
            "provenance": {
                **provenance,
                **findings.provenance,
                "environment": environment_facts(report.device),
                "started_unix": self.began,
                "seconds": time.time() - self.began,
            },
        }
        contents[report_file] = dump_json(sealed(payload)).encode()
        # everything is ready and every name is free before the earlier report goes
        self.folder.claim(contents)
        self.folder.remove([report_file])
        paths = {name: self.folder.write_bytes(name, data) for name, data in contents.items()}
        self.written = True
        return ReportResult(
            kind,
            paths[report_file],
            paths[page_file],
            tuple(paths[name] for name in files),
            tuple(paths[name] for name in drawn),
            dict(findings.summary),
            findings.law,
            notes,
            tables,
        )


def markdown(
    title: str, law: str, notes: Sequence[str], charts: Sequence[Chart], tables: Sequence[Table]
) -> str:
    """The page of a report, whose charts stand beside it."""
    page = [f"# {title}", "", f"**{markdown_text(_sentence(law))}**"]
    for part in (
        *notes,
        *(f"![{markdown_text(one.title)}]({quote(one.name)}.svg)" for one in charts),
    ):
        page += ["", part]
    for table in tables:
        page += ["", *table.markdown()]
    return "\n".join(page) + "\n"


SCHEMA = 2
"""Of the JSON: from 2 on it and its row files have digests, and `parameters` are the options."""


def _names(kind: type[Report[Any]]) -> tuple[str, str, str]:
    """Names of rows, page and report."""
    return tuple(f"{kind.stem()}_{end}" for end in ("rows.jsonl", "report.md", "report.json"))  # type: ignore[return-value]


def _rows(file: Sequence[Row] | str, holding: str) -> Iterator[Row]:
    if not isinstance(file, str):
        return iter(file)
    return (parse_json(line) for line in file.split("\n") if line and holding in line)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


# --- finding --------------------------------------------------------------------------------------


def report_name(command: str) -> str:
    """`ov-write-progress-report` -> `ov_write_progress`."""
    return command.removesuffix("-report").replace("-", "_")


def find_report(command: str) -> type[Report[Any]] | None:
    """The report of a command, found by its module's name; None where there is none."""
    module = f"circuit.reports.{report_name(command)}"
    if not report_name(command).isidentifier() or find_spec(module) is None:
        return None
    return next((kind for kind in _declared_in(module) if kind.command == command), None)


def all_reports() -> list[type[Report[Any]]]:
    """Every report, by the name of its module."""
    names = [module.name for module in iter_modules(import_module("circuit.reports").__path__)]
    return [kind for name in names for kind in _declared_in(f"circuit.reports.{name}")]


def _declared_in(module: str) -> list[type[Report[Any]]]:
    """The reports of a module, those that it imports left out."""
    classes = [one for one in vars(import_module(module)).values() if inspect.isclass(one)]
    kinds = [one for one in classes if issubclass(one, Report) and hasattr(one, "command")]
    return [kind for kind in kinds if kind.__module__ == module]
