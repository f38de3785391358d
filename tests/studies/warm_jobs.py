"""Jobs of a workflow as forks of the tests' process: ten seconds of processor time less for each.

Snakemake plans, starts and waits as ever, with the Snakefile's command lines. Only its `python` is
another: `python -m circuit.cli.job ...` is a fork, everything else the real one.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

import transformer_lens  # noqa: F401  what a fork would else import anew
from circuit.cli.jobs import run_commands
from warm import warm_python

import circuit.page
import circuit.reports.export
import circuit.trace.replay
import circuit.training.loop  # noqa: F401
from circuit.reports.report import all_reports
from circuit.studies.jobs import split_commands

all_reports()

OTHERS = """
if sys.argv[1:3] != ["-m", "circuit.cli.job"]:
    os.execv({python!r}, [sys.argv[0], *sys.argv[1:]])
"""


def warm_jobs() -> AbstractContextManager[str]:
    """The path of that python."""
    others = OTHERS.format(python=sys.executable)
    return warm_python(lambda words: run_commands(split_commands(words[2:])), others)
