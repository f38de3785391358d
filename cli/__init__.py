"""The command line: parse, call the library, print. Installed as `circuit.cli`."""

import gc
import os
import sys
from importlib import import_module

from . import signals

__all__ = ["main"]


def main(program: str = "program") -> None:
    """Run the program; see `circuit.cli.program.main`.

    Args:
        program: the module of it, which takes time to import.
    """
    signals.begin()
    gc.disable()  # while modules are imported, of which nothing is garbage; see parsing.py
    # no command of ours needs plug-ins of pydantic's, for which it searches every installed package
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    # importing what jupyterlab brings for the jsonschema of altair builds 38 grammars of addresses,
    # three quarters of the import; no schema of a chart has an address
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    try:
        import_module(f".{program}", __name__).main()
    finally:
        gc.enable()
        signals.take_over(signals.leave)
