"""The commands of reports, made from what the reports declare: options, completion, refusals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

from circuit.reports.listing import listed_reports

from . import complete, options, parts
from .output import print_result, progress_bar
from .training import load_train_config

if TYPE_CHECKING:
    from rich.progress import Progress

    from circuit.options import Option, Options
    from circuit.reports.report import Report

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
        run, reading = None, {}
        divided = {name: given.pop(name) for name in parts.OPTIONS if name in given}
        if kind.reads_run:
            reading = {name: given.pop(name, None) for name in (*READING, *RECIPE, *COMPUTING)}
            path, overrides, recipe, device, threads = reading.values()
            run = load_train_config(path, overrides, device, threads, recipe=recipe)
        writing = {name: given.pop(name) for name in WRITING}
        chosen = kind.Options(**{n: v for n, v in given.items() if v is not None})
        if divided and parts.asked_for(**divided):
            parts.run_and_print(kind, run, chosen, reading, **divided, **writing)
        else:
            run_and_print(kind, run, chosen, **writing)

    declared = {
        name: (_annotation(kind, name), _default(kind, name)) for name in kind.Options.declared()
    }
    needed = {**declared, **WRITING}
    if kind.reads_run:
        of_recipe = RECIPE if kind.of_recipes else {}
        divided = parts.OPTIONS if "part" in declared else {}
        needed = {**READING, **of_recipe, **declared, **divided, **COMPUTING, **WRITING}
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
    chosen: Options,
    output_dir: Path,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make a report, and say what it found.

    Raises:
        CircuitError: as `run_report`.
    """
    from circuit.reports.report import run_report

    with progress_bar(not as_json) as bar:
        shown = ReportBar(bar, kind.stem().replace("_", " "))
        result = run_report(kind, run, chosen, output_dir, overwrite=overwrite, progress=shown)
    print_result(result, as_json)


class ReportBar:
    """Shows how far a report is."""

    def __init__(self, bar: Progress, what: str) -> None:
        self.bar = bar
        self.task = bar.add_task(what, total=None, note="")

    def __call__(self, done: int, total: int, note: str) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=done, total=total or None, note=note)


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
            typed = name.split()
            in_full = words is None or list(words[: len(typed)]) == typed
            function = report_command(_kind(one.command)) if in_full else heading(one.help)
            divisible = "parts" in inspect.signature(function).parameters
            settings = options.FOR_SNAKEMAKE if divisible else {}
            place.command(last, rich_help_panel=panel, context_settings=settings)(function)


def _kind(command: str) -> type[Report[Any]]:
    from circuit.reports.report import find_report

    kind = find_report(command)
    assert kind is not None, command
    return kind
