"""The commands of reports, made from what the reports declare: options, completion, refusals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

from circuit.quoting import plain_text
from circuit.reports.listing import listed_reports

from . import complete, options
from .output import (
    print_json,
    print_table,
    print_written,
    progress_bar,
    stdout,
)
from .training import load_train_config

if TYPE_CHECKING:
    from rich.progress import Progress

    from circuit.options import Option
    from circuit.reports.report import Report, ReportResult

READING = {
    "config": (options.TrainConfigPath, inspect.Parameter.empty),
    "overrides": (options.Set, None),
}
RECIPE = {"recipe": (options.Recipe, None)}
"""Of reports that also read a run of a recipe."""
COMPUTING = {"device": (options.Device, None), "threads": (options.Threads, None)}
"""Options of every report that reads a run."""
WRITING = {
    "output_dir": (options.OutputDir, inspect.Parameter.empty),
    "overwrite": (options.Overwrite, False),
    "as_json": (options.Json, False),
}


def report_command(kind: type[Report[Any]]) -> Callable[..., None]:
    """The function that Typer makes a command from."""

    def command(**given: Any) -> None:
        run = None
        if kind.reads_run:
            path, overrides, device, threads = (given.pop(n) for n in (*READING, *COMPUTING))
            recipe = given.pop("recipe", None)
            run = load_train_config(path, overrides, device, threads, recipe=recipe)
        folder, overwrite, as_json = (given.pop(name) for name in WRITING)
        run_and_print(kind, run, given, folder, overwrite=overwrite, as_json=as_json)

    declared = {
        name: (_annotation(kind, name), _default(kind, name)) for name in kind.Options.declared()
    }
    needed = {**declared, **WRITING}
    if kind.reads_run:
        of_recipe = RECIPE if kind.of_recipes else {}
        needed = {**READING, **of_recipe, **declared, **COMPUTING, **WRITING}
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for name, (annotation, default) in needed.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {name: annotation for name, (annotation, _) in needed.items()}
    command.__doc__ = (kind.__doc__ or "").partition("\n\n")[0]
    return command


def run_and_print(
    kind: type[Report[Any]],
    run: Any,
    given: dict[str, Any],
    folder: Path,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make a report with the values of a command line, and say what it found.

    Raises:
        CircuitError: as `run_report`.
    """
    from circuit.reports.report import run_report

    with progress_bar(not as_json) as bar:
        chosen = kind.Options(**{n: v for n, v in given.items() if v is not None})
        shown = ReportBar(bar, kind.stem().replace("_", " "))
        result = run_report(kind, run, chosen, folder, overwrite=overwrite, progress=shown)
    print_result(result, as_json)


class ReportBar:
    """Shows how far a report is."""

    def __init__(self, bar: Progress, what: str) -> None:
        self.bar = bar
        self.task = bar.add_task(what, total=None, note="")

    def __call__(self, done: int, total: int, note: str) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=done, total=total or None, note=note)


def print_result(result: ReportResult, as_json: bool) -> None:
    """What a report found, where its files stand, and its law; or `--json`."""
    if as_json:
        paths = [str(path) for path in result.paths]
        print_json({"law": result.law, "summary": result.summary, "paths": paths})
        return
    for table in result.tables:
        if table.console:
            print_table(table)
    for note in result.notes:
        stdout.print(plain_text(note), soft_wrap=True)
    print_written(result.paths)
    stdout.print(result.law, soft_wrap=True)


def _annotation(kind: type[Report[Any]], name: str) -> Any:
    """What Typer reads of a field: its type as the command line has it, flag, help, completion."""
    option = kind.Options.declared()[name]
    info = kind.Options.model_fields[name]
    several, item = _typed(info.annotation)
    flag = kind.Options.flags()[name]
    said = [option.help.removesuffix("."), *(["repeatable"] if several else [])]
    said[1:1] = ["one of the run's task"] if option.of_task else []
    default = "" if info.is_required() else _shown(info.default) or option.unset
    said += [f"{default} by default"] if default else []
    declared = typer.Option(
        flag,
        help=f"{'; '.join(said)}.",
        autocompletion=_completer(option),
    )
    typed = bool if item is bool else (list[item] if several else item) | None  # type: ignore[valid-type]
    if info.is_required():
        typed = list[item] if several else item  # type: ignore[valid-type]
    return Annotated[typed, declared]


def _default(kind: type[Report[Any]], name: str) -> Any:
    info = kind.Options.model_fields[name]
    if info.is_required():
        return inspect.Parameter.empty
    return False if info.annotation is bool else None


def _typed(annotation: Any) -> tuple[bool, Any]:
    """Whether a field takes several values, and the type of one as it is typed."""
    inner = [one for one in get_args(annotation) if one not in (type(None), ...)]
    if get_origin(annotation) is tuple:
        return True, _typed(inner[0])[1]
    if annotation in (int, float, bool, Path):
        return False, annotation
    if inner and get_origin(annotation) is not None and inner[0] in (int, float, Path):
        return False, inner[0]
    return False, str


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    return "" if default is None or default is False else str(default)


def _completer(option: Option) -> Any:
    if option.kind:
        return getattr(complete, option.kind)
    return complete.values(*option.choices) if option.choices else None


def heading(text: str) -> Callable[[], None]:
    """What Typer lists a command by, where only its name and its help are shown."""

    def command() -> None:
        pass

    command.__doc__ = text
    return command


def register(
    app: typer.Typer, groups: dict[str, typer.Typer], words: Sequence[str] | None = None
) -> None:
    """Add the commands of reports: that which the words name, and of the others what is listed.

    Args:
        groups: of the program, by name.
        words: of the command line; None for all commands in full.
    """
    for one in listed_reports():
        for name in one.names:
            group, _, last = name.rpartition(" ")
            place, panel = (groups[group], None) if group else (app, one.panel)
            parts = name.split()
            in_full = words is None or list(words[: len(parts)]) == parts
            function = report_command(_kind(one.command)) if in_full else heading(one.help)
            place.command(last, rich_help_panel=panel)(function)


def _kind(command: str) -> type[Report[Any]]:
    from circuit.reports.report import find_report

    kind = find_report(command)
    assert kind is not None, command
    return kind
