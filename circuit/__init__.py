"""circuit: how training writes a circuit into a transformer, step by step and exactly.

The public names are imported when they are first used, so that `import circuit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from circuit.errors import CircuitError

if TYPE_CHECKING:
    from circuit.runs import Run, attribute, open_run, read_rows
    from circuit.trace.replay import Trace, open_trace
    from circuit.training.imported import import_checkpoints

__version__ = "0.2.0.dev0"

_HOME = {
    "Run": "circuit.runs",
    "Trace": "circuit.trace.replay",
    "attribute": "circuit.runs",
    "import_checkpoints": "circuit.training.imported",
    "open_trace": "circuit.trace.replay",
    "open_run": "circuit.runs",
    "read_rows": "circuit.runs",
}

__all__ = [
    "CircuitError",
    "Run",
    "Trace",
    "__version__",
    "attribute",
    "import_checkpoints",
    "open_run",
    "open_trace",
    "read_rows",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'circuit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
