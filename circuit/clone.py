"""Where Python finds `circuit.cli` and `circuit.configs` in a clone: beside the package.

An installed package holds them, and never imports this module.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
FOLDERS = ("cli", "configs")


class Beside:
    """Finder of the two packages; Python's own finds what is in them."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package of that name, if it is one of the two."""
        parent, _, last = name.rpartition(".")
        if parent != "circuit" or last not in FOLDERS:
            return None
        folder = ROOT / last
        return spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


sys.meta_path.append(Beside)
