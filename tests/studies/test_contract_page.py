"""The contract's page as a script: its blocks, in order, in one bash, at the smallest scale.

Replaced are the configs (by smaller ones with the same names and folders) and the steps (of
checkpoints and options; folders keep the page's names); of the line that sets CIRCUIT, what the
guide says to export instead. What a block reads and no block of the page makes, the study's own
commands make before it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from circuit.cli.jobs import run_commands
from warm import warm_python

from circuit.studies.configs import contract_configs, scaled
from circuit.studies.jobs import Job
from circuit.studies.scales import SCALES
from circuit.studies.study import Study

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reproducibility.txt").read_text(encoding="utf-8")
RUN = "artifacts/runs/symbolic_kv_reference_formation"
SMOKE = SCALES["smoke"]
SCALE = replace(SMOKE, ablations=None, samples=(256, 128), task={**SMOKE.task, "num_values": 128})
"""The smallest, with all runs of the ablation, a split that holds the page's 96 probes, and as many
values as its ranks ask for."""
FIRST = re.compile(r"export |\$CIRCUIT |find |for |[A-Z_]+=")
"""How a block begins; the page has no other marks."""
NOT_A_COMMAND = 'export CIRCUIT="PYTHONPATH=src $CIRCUIT_PYTHON -m circuit.cli"'
INSTEAD = 'export CIRCUIT="env PYTHONPATH=src $CIRCUIT_PYTHON -m circuit.cli"'


def blocks() -> list[str]:
    """What the page has typed into a shell, from its first export on; a loop is one block."""
    found: list[str] = []
    lines = iter(PAGE.splitlines())
    for line in lines:
        if not FIRST.match(line):
            continue
        block = line
        for following in lines:
            if not following and len(re.findall(r"\bfor\b", block)) == block.count("\ndone"):
                break
            block += f"\n{following}"
        found.append(block)
    return found


def expected() -> list[str]:
    """Paths that the page expects."""
    after = re.findall(r"^Expected output:\n\n(\S+)$", PAGE, re.MULTILINE)
    assert len(after) == PAGE.count("Expected output:")
    return after


def at_this_scale(text: str) -> str:
    """A block with the steps of the scale."""
    text = re.sub(r"step_(\d{6})", lambda name: f"step_{SCALE.step(int(name[1])):06}", text)
    return re.sub(
        r"(--(?:start|end|reference)-step )(\d+)", lambda o: o[1] + str(SCALE.step(int(o[2]))), text
    )


def without(block: str) -> list[Job]:
    """Jobs of the study that make what a block reads and the page does not make, in order."""
    paths = re.findall(r"--(?:scalar-pair|route-closure)-rows (\S+)", block)
    folders = {str(Path(path.replace("$RUN", RUN)).parent) for path in paths}
    jobs = Study(SCALES["full"]).of("reference")
    return [job for job in jobs if job.folder in folders]


def bash(script: str, folder: Path, python: str) -> str:
    """What the script prints; it ends at the first command that fails."""
    done = subprocess.run(
        ["bash", "-c", "set -e\n" + script],
        cwd=folder,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "CIRCUIT_PYTHON": python},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_page_has_blocks_and_expectations() -> None:
    found = blocks()
    commands = re.findall(r"^ *\$CIRCUIT ", PAGE, re.MULTILINE)
    assert sum(block.count("$CIRCUIT ") for block in found) == len(commands)
    assert NOT_A_COMMAND in found[0]
    assert len(expected()) == 10
    for block in found:
        subprocess.run(["bash", "-n", "-c", block], check=True)


@pytest.mark.parametrize("instead", [INSTEAD, "export CIRCUIT=circuit"])
def test_what_is_exported_instead_is_a_command(instead: str, tmp_path: Path) -> None:
    assert instead.removeprefix("export ") in (DOCS / "guide.md").read_text(encoding="utf-8")
    said = bash(f"{instead}\n$CIRCUIT --version", tmp_path, sys.executable)
    assert said.startswith("circuit ")


@pytest.mark.system
def test_the_page_runs(tmp_path: Path) -> None:
    from warm_jobs import OTHERS  # imports what the commands do

    for config in contract_configs(SCALE):
        (tmp_path / config).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / config).write_text(scaled(config, SCALE))
    script = []
    for block in blocks():
        script += ["$CIRCUIT " + shlex.join(job.argv) for job in without(block)] + [block]
    others = OTHERS.replace("circuit.cli.job", "circuit.cli").format(python=sys.executable)
    with warm_python(lambda words: run_commands([words[2:]]), others) as python:
        said = bash(
            at_this_scale("\n".join(script)).replace(NOT_A_COMMAND, INSTEAD), tmp_path, python
        )
    for path in expected():
        files = (tmp_path / path).glob("*.json") if path.endswith("/") else [tmp_path / path]
        assert any(file.is_file() for file in files), path
    count = re.search(r"^Expected count:\n\n(\d+)$", PAGE, re.MULTILINE)
    assert count
    assert count[1] in said.splitlines()
