"""`python -m circuit.cli.job A ... + B ...`: commands of the workflow, one after the other.

Importing torch and TransformerLens costs about five seconds of processor time; commands of one rule
share it. The process ends with the one that started it, so that a killed workflow leaves no writer.
"""

from __future__ import annotations

import sys

from circuit.environment import end_with_parent
from circuit.quoting import shell_line
from circuit.studies.jobs import split_commands

from . import parsing, signals, streams
from .output import stderr
from .program import exit_code_of, program


def run_commands(commands: list[list[str]]) -> int:
    """The exit code of the first command that fails, or 0."""
    for words in commands:
        stderr.print(f"$ circuit {shell_line(words)}", soft_wrap=True)
        code = exit_code_of(lambda words=words: parsing.run(program(words), words))  # type: ignore[misc]
        if code:
            return code
    return 0


def main() -> None:
    """Run the commands of the command line."""
    streams.take_over()
    signals.take_over(signals.interrupt)
    end_with_parent()
    sys.exit(run_commands(split_commands(sys.argv[1:])))
