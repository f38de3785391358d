"""circuit: how training writes a circuit into a transformer, step by step and exactly.

The public names are imported when they are first used, so that `import circuit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.errors import CircuitError

if TYPE_CHECKING:
    from circuit.attribution.counterfactual import counterfactual
    from circuit.attribution.credit import credit
    from circuit.attribution.influence import influence
    from circuit.attribution.live import watch
    from circuit.attribution.window import attribute
    from circuit.core.edit import Edit
    from circuit.reports.import_recording import import_recording
    from circuit.runs.base import Run
    from circuit.runs.opening import open_run
    from circuit.runs.rows import read_rows
    from circuit.trace.counterfactual import record_counterfactual
    from circuit.training.imported import import_checkpoints
    from circuit.training.recipe import Batch, Recipe

__version__ = "0.2.0"

if not (Path(__file__).parent / "cli").is_dir():
    import_module("circuit.clone")

_HOME = {
    "Batch": "circuit.training.recipe",
    "Edit": "circuit.core.edit",
    "Recipe": "circuit.training.recipe",
    "Run": "circuit.runs.base",
    "attribute": "circuit.attribution.window",
    "counterfactual": "circuit.attribution.counterfactual",
    "credit": "circuit.attribution.credit",
    "import_checkpoints": "circuit.training.imported",
    "import_recording": "circuit.reports.import_recording",
    "influence": "circuit.attribution.influence",
    "open_run": "circuit.runs.opening",
    "read_rows": "circuit.runs.rows",
    "record_counterfactual": "circuit.trace.counterfactual",
    "watch": "circuit.attribution.live",
}

__all__ = [
    "Batch",
    "CircuitError",
    "Edit",
    "Recipe",
    "Run",
    "__version__",
    "attribute",
    "counterfactual",
    "credit",
    "import_checkpoints",
    "import_recording",
    "influence",
    "open_run",
    "read_rows",
    "record_counterfactual",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'circuit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
