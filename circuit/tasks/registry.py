"""Tasks by name: those of this package, and anybody's as `file.py:Class`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from circuit.config import load_config, read_json
from circuit.errors import CircuitError
from circuit.tasks.base import Task, TaskConfig

BUILT_IN = {
    "symbolic_kv_stream": "circuit.tasks.symbolic_kv.task:SymbolicKV",
    "modular_addition": "circuit.tasks.modular_addition.task:ModularAddition",
    "induction": "circuit.tasks.induction.task:Induction",
}
"""`module:class` by `benchmark_type`."""


def load_benchmark_config(path: str | Path, overrides: Sequence[str] = ()) -> TaskConfig:
    """The config of a benchmark, whatever its task.

    Raises:
        CircuitError: as `find_task` and `circuit.config.load_config`.
    """
    payload = read_json(Path(path))
    named = payload.get("benchmark_type") if isinstance(payload, dict) else None
    kind = find_task(named).Config if isinstance(named, str) else TaskConfig
    return load_config(path, kind, overrides)


def find_task(name: str) -> type[Task]:
    """The task of a `benchmark_type`.

    Raises:
        CircuitError: there is no such task, or its file cannot be used.
    """
    module, colon, attribute = BUILT_IN.get(name, name).rpartition(":")
    if not colon:
        known = ", ".join(BUILT_IN)
        raise CircuitError(
            f"unknown task '{name}'",
            where="field 'benchmark_type'",
            expected=f"one of {known}, or file.py:Class of your own",
        )
    loaded: Any = import_module(module) if name in BUILT_IN else _own_module(Path(module))
    kind = getattr(loaded, attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise CircuitError(
            f"'{attribute}' is no task", where=module, expected="a class of circuit.tasks.base.Task"
        )
    return kind


def _own_module(path: Path) -> Any:
    """A module of one's own, by its file; imported once, under a name that no other has."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise CircuitError(
            f"the task's file cannot be read ({error.strerror})",
            where=path,
            expected="file.py:Class, found from the current folder",
        ) from None
    name = f"circuit_task_{hashlib.sha256(source).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise CircuitError("is no Python file", where=path, expected="file.py:Class")
        sys.modules[name] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # it is anybody's code
            del sys.modules[name]
            raise CircuitError(
                f"the task's file cannot be imported ({type(error).__name__}: {error})", where=path
            ) from error
    return sys.modules[name]
