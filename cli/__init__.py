"""The command line: parse, call the library, print. Installed as `circuit.cli`."""

from .app import main

__all__ = ["main"]
