"""The tiny trained run of the reports' tests, and the command line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_source = Path(__file__).parents[1] / "reports" / "conftest.py"
_spec = importlib.util.spec_from_file_location("reports_fixtures", _source)
assert _spec is not None
assert _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _shared
_spec.loader.exec_module(_shared)

trained_once, trained, circuit = _shared.trained_once, _shared.trained, _shared.circuit
traced_once, traced = _shared.traced_once, _shared.traced
