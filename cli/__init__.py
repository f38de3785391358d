"""The command line: parse, call the library, print. Installed as `circuit.cli`."""

from importlib import import_module

from . import signals

__all__ = ["main"]


def main(program: str = "program") -> None:
    """Run the program; see `circuit.cli.program.main`.

    Args:
        program: the module of it, which takes time to import.
    """
    signals.begin()
    try:
        import_module(f".{program}", __name__).main()
    finally:
        signals.take_over(signals.leave)
