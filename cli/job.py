"""`python -m circuit.cli.job A ... + B ...`: commands of the workflow, one after the other.

Importing torch and TransformerLens costs about five seconds of processor time; commands of one rule
share it. The process ends with the one that started it, so that a killed workflow leaves no writer.
"""

from __future__ import annotations

import shlex
import sys

from circuit import CircuitError
from circuit.studies.jobs import split_commands
from circuit.studies.processes import end_with_parent

from .app import app
from .output import print_error, stderr


def run_commands(commands: list[list[str]]) -> int:
    """The exit code of the first command that fails, or 0."""
    for words in commands:
        stderr.print(f"$ circuit {shlex.join(words)}", soft_wrap=True)
        try:
            code = app(words, prog_name="circuit", standalone_mode=False)
        except CircuitError as error:
            print_error(error)
            return 2
        if code:
            return int(code)
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(run_commands(split_commands(sys.argv[1:])))
