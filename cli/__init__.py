"""The command line: parse, call the library, print. Installed as `circuit.cli`."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the program; see `circuit.cli.program.main`."""
    try:  # Ctrl-C may come while the program is imported
        from .program import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    run()
