"""Importing the library imports nothing heavy, but for what constructs models and trains them."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from circuit.lazy import LazyModule

HEAVY_BY_NATURE = {
    "circuit.model.bridge",
    "circuit.model.build",
    "circuit.model.kernels",
    "circuit.training.step",
}
IMPORT_ALL = f"""
import pkgutil, sys
from importlib import import_module
import circuit
for module in pkgutil.walk_packages(circuit.__path__, "circuit."):
    if module.name not in {HEAVY_BY_NATURE} and not module.name.endswith("__main__"):
        import_module(module.name)
heavy = "torch transformer_lens transformers jaxtyping numpy pandas matplotlib altair scipy sklearn"
print(*[name for name in heavy.split() if name in sys.modules])
"""


def test_no_module_imports_a_heavy_library_before_it_uses_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_what_was_used_is_at_hand() -> None:
    module = LazyModule("json")
    assert "dumps" not in vars(module)
    assert module.dumps is json.dumps
    assert vars(module)["dumps"] is json.dumps


def test_nobody_searches_for_garbage_while_modules_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(tmp_path, "imported_once.py").write_text("import gc\nsearched = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert gc.isenabled()
    assert not LazyModule("imported_once").searched
    assert gc.isenabled()
