"""A report in parts as rules: `parts.py` writes what they are made from. One rule stands for all
parts, so that they can be an array of Slurm's (`--slurm-array-jobs part`)."""

import sys

from circuit import __version__
from circuit.reading import read_json

PLAN = read_json(config["plan"])
HERE, NEEDS, REPORT = PLAN["here"], PLAN["needs"], PLAN["report"]
DONE = f"{{part}}_of_{len(PLAN['parts'])}/{REPORT}"
PYTHON = sys.executable
RUN = "exec > {log:q} 2>&1; cd {HERE:q} && exec {PYTHON:q} -m circuit.cli.job {params.command}"


wildcard_constraints:
    part=r"\d+",


rule gather:
    default_target: True
    input:
        lambda w: PLAN["reads"],
        [DONE.format(part=number) for number, _ in enumerate(PLAN["parts"], start=1)],
    output:
        f"../{REPORT}",
    log:
        "logs/gather.log",
    params:
        command=PLAN["gather"],
        version=__version__,
    threads: NEEDS["threads"]
    resources:
        **NEEDS["resources"],
    shell:
        RUN


rule part:
    input:
        lambda w: PLAN["reads"],
    output:
        DONE,
    log:
        "logs/part_{part}.log",
    params:
        command=lambda w: PLAN["parts"][int(w.part) - 1],
        version=__version__,
    threads: NEEDS["threads"]
    resources:
        **NEEDS["resources"],
    shell:
        RUN
