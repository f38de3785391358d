"""Tasks by name: those of this package, installed ones, and anybody's as `file.py:Class`.

A package installs one by an entry point of the group `circuit.tasks`, whose name is the task's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from circuit.artifacts import find_near
from circuit.config import load_config
from circuit.errors import CircuitError, code_of_somebody
from circuit.folders import read_config
from circuit.plugins import import_file
from circuit.reading import checked_path, file_digest
from circuit.tasks.base import Task, TaskConfig

BUILT_IN = {
    "symbolic_kv_stream": "circuit.tasks.symbolic_kv.task:SymbolicKV",
    "modular_addition": "circuit.tasks.modular_addition.task:ModularAddition",
    "induction": "circuit.tasks.induction.task:Induction",
}
"""`module:class` by `benchmark_type`."""

GROUP = "circuit.tasks"
_NO_FILE = "the task's file cannot be read: there is none"


def load_benchmark_config(path: str | Path, overrides: Sequence[str] = ()) -> TaskConfig:
    """The config of a benchmark, whatever its task.

    Raises:
        CircuitError: as `find_task` and `circuit.config.load_config`.
    """
    payload = read_config(checked_path(path))
    name = payload.get("benchmark_type") if isinstance(payload, dict) else None
    kind = find_task(name, Path(path)).Config if isinstance(name, str) else TaskConfig
    return load_config(path, kind, overrides)


def find_task(name: str, near: Path | None = None) -> type[Task]:
    """The task of a `benchmark_type`.

    Args:
        near: a file of one's own is looked for above this place, then in the current folder.

    Raises:
        CircuitError: there is no such task, or its module cannot be used.
    """
    # every environment's metadata are searched for entry points: only where ours do not answer
    installed = {} if name in BUILT_IN else {e.name: e.value for e in entry_points(group=GROUP)}
    tasks = installed | BUILT_IN
    module, colon, attribute = tasks.get(name, name).rpartition(":")
    if not colon:
        raise CircuitError(
            f"unknown task '{name}'",
            where="field 'benchmark_type'",
            expected=f"one of {', '.join(tasks)}, or file.py:Class of your own",
        )
    if name in BUILT_IN:
        loaded: Any = import_module(module)
    else:
        loaded = _imported(module, near, installed=name in installed)
    kind = getattr(loaded, attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise CircuitError(
            f"'{attribute}' is no task", where=module, expected="a class of circuit.tasks.base.Task"
        )
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise CircuitError(f"'{attribute}' does not define {missing}", where=module)
    return kind


def file_digest_of(name: str, near: Path) -> str | None:
    """sha256 of the file that a `benchmark_type` names, which is not imported; None without one.

    Raises:
        CircuitError: there is no such file.
    """
    module, colon, _ = name.rpartition(":")
    if not colon or not module.endswith(".py"):
        return None
    return file_digest(checked_path(find_near(module, near)), missing=_NO_FILE)


def source_digest(kind: type[Task]) -> str | None:
    """sha256 of the file of a task that is not of this package: its code decides the examples."""
    if kind.__module__.startswith(f"{GROUP}."):
        return None
    return file_digest(inspect.getfile(kind))


def _imported(module: str, near: Path | None, *, installed: bool) -> Any:
    """Somebody's module: a file is imported once, under a name that no other has."""
    with code_of_somebody(lambda it: f"the task's module cannot be imported ({it})", where=module):
        if installed:
            return import_module(module)
        return import_file(find_near(module, near), missing=_NO_FILE)
