"""The command line: parse, call the library, print. Installed as `circuit.cli`."""

from .program import main

__all__ = ["main"]
