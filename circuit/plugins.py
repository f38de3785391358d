"""Somebody's own Python file as a module."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from circuit.reading import checked_path, file_digest


def import_file(path: str | Path, *, missing: str) -> ModuleType:
    """Execute a file, once: under a name that its content gives it, which no other has.

    Raises:
        CircuitError: there is no such file; `missing` says so.
        ImportError: it is no Python file.
        Exception: whatever its code raises.
    """
    path = checked_path(path)
    name = f"circuit_file_{file_digest(path, missing=missing)[:16]}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError("it is no Python file")
        sys.modules[name] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
