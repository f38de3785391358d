"""Jobs of a workflow as forks of the tests' process: five seconds of processor time less for each.

Snakemake plans, starts and waits as ever, with the Snakefile's command lines. Only its `python` is
another: `python -m circuit.cli.job ...` is a fork, everything else the real one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from circuit.cli.jobs import run_commands
from warm import warm_program

from circuit.studies.jobs import split_commands

OTHERS = """
if sys.argv[1:3] != ["-m", "circuit.cli.job"]:
    os.execv({python!r}, [sys.argv[0], *sys.argv[1:]])
"""


@contextmanager
def warm_python() -> Iterator[str]:
    """The path of that python, in an environment with the packages of this one."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pyvenv.cfg", "lib"):
            if Path(sys.prefix, name).exists():
                Path(folder, name).symlink_to(Path(sys.prefix, name))
        python, first = Path(folder, "bin", "python"), OTHERS.format(python=sys.executable)
        with warm_program(python, lambda words: run_commands(split_commands(words[2:])), first):
            yield str(python)
