"""Somebody's own Python file as a module; what `FILE.py:NAME` names."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from circuit.artifacts import find_near
from circuit.errors import CircuitError
from circuit.reading import checked_path, file_digest

importing: ContextVar[Path | None] = ContextVar("importing", default=None)
"""The file that is being imported: what it does is no run of it as a script."""


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
        token = importing.set(path)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            importing.reset(token)
    return sys.modules[name]


def let_import_from(folder: Path) -> None:
    """Let somebody's code import what stands in a folder, behind all that could be imported."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def is_file_name(name: str) -> bool:
    """Whether it has the form `FILE.py:NAME`."""
    return name.rpartition(":")[0].endswith(".py")


def import_named_file(path: str | Path, near: Path | None = None, *, what: str) -> ModuleType:
    """A file; what stands beside it can be imported by it, as where it is run as a script.

    Args:
        path: relative to the nearest folder above `near` that has it, then to the current one.
        what: it is the file of, for refusals: `the model`.

    Raises:
        CircuitError: there is no such file, or whatever it raises is told.
    """
    path = checked_path(find_near(path, near))
    let_import_from(path.absolute().parent)
    try:
        return import_file(path, missing=f"{what}'s file cannot be read: there is none")
    except CircuitError:
        raise
    except (Exception, SystemExit) as error:  # it is anybody's code
        told = f"{type(error).__name__}: {error}"
        raise CircuitError(f"{what}'s file cannot be imported ({told})", where=path) from error


def import_name(name: str, near: Path | None = None, *, what: str) -> Any:
    """What `FILE.py:NAME` names; raises as `import_named_file`, or where there is no such name."""
    path, _, attribute = name.rpartition(":")
    if not is_file_name(name):
        raise CircuitError(f"{what} is named '{name}'", expected="FILE.py:NAME")
    module = import_named_file(path, near, what=what)
    if not hasattr(module, attribute):
        fix = nearest(attribute, module)
        raise CircuitError(f"has no '{attribute}'", where=path, expected="FILE.py:NAME", fix=fix)
    return getattr(module, attribute)


def nearest(name: str, module: ModuleType) -> str | None:
    """The `fix` of a refusal of a name that a module lacks; None where no name of it is near."""
    near = get_close_matches(name, vars(module), n=1)
    return f"did you mean {near[0]}?" if near else None


def refuse_while_importing(doing: str) -> None:
    """Refuse what only a script that is run may do.

    Raises:
        CircuitError: a file is being imported for what it defines.
    """
    path = importing.get()
    if path is not None:
        raise CircuitError(
            f"{doing} when it is imported, where only what it defines is asked for",
            where=path,
            fix='put the loop under `if __name__ == "__main__":`',
        )
