"""The contract's page as a script: its blocks, in order, in one bash, at the smallest scale.

Replaced are the configs (by smaller ones with the same names and folders) and the steps (of
checkpoints and options; folders keep the page's names); of the line that sets CIRCUIT, what the
guide says to export instead. What a block reads and no block of the page makes, the study's own
commands make before it. The page's three controls are typed as it says: the same command with
other arguments.
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
from circuit.studies.cross_seed import ROOT as CROSS_SEED
from circuit.studies.cross_seed import Seed
from circuit.studies.jobs import Job
from circuit.studies.scales import SCALES
from circuit.studies.study import Study

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reproducibility.txt").read_text(encoding="utf-8")
RUN = "artifacts/runs/symbolic_kv_reference_formation"
SMOKE = SCALES["smoke"]
SCALE = replace(
    SMOKE,
    ablations=None,
    samples=(256, 128),
    task={**SMOKE.task, "num_values": 128},
    model={**SMOKE.model, "d_model": 128},
)
"""The smallest, with all runs of the ablation, a split that holds the page's 96 probes, and as many
values and as wide a model as its ranks ask for."""
FIRST = re.compile(r"export |\$CIRCUIT |find |for |[A-Z_]+=")
"""How a block begins; the page has no other marks."""
NOT_A_COMMAND = 'export CIRCUIT="PYTHONPATH=src $CIRCUIT_PYTHON -m circuit.cli"'
CONTROL = re.compile(r"^(?:rank-matched|high-rank) .*--output-dir (\S+) .*$", re.MULTILINE)
"""A line of the page that says which arguments of a block to replace."""
WINNER = re.compile(r"^seed_(\d{4})/\.\.\./(winner_)L\dH\d_to_L\dMLP(_\w+)/$", re.MULTILINE)
"""A folder of the page's cross-seed study; the addresses are results, of each seed and scale."""
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
    return after + [f"{control[1].replace('$RUN', RUN)}/" for control in CONTROL.finditer(PAGE)]


def at_this_scale(text: str) -> str:
    """A block with the steps of the scale."""
    text = re.sub(r"step_(\d{6})", lambda name: f"step_{SCALE.step(int(name[1])):06}", text)
    return re.sub(
        r"(--(?:start|(?:trace-)?end|reference)-step |--set steps=)(\d+)",
        lambda option: option[1] + str(SCALE.step(int(option[2]))),
        text,
    )


def before(block: str) -> list[str]:
    """Lines of the study that make what a block reads and the page does not make, in order."""
    paths = re.findall(r"--(?:scalar-pair|route-closure)-rows (\S+)", block)
    folders = {str(Path(path.replace("$RUN", RUN)).parent) for path in paths}
    jobs = Study(SCALES["full"]).of("reference")
    lines = [typed(job) for job in jobs if job.folder in folders]
    if f"find {CROSS_SEED}" in block:
        for seed in Study(SCALES["full"]).seeds:
            lines += cross_seed(seed)
    return lines


def typed(job: Job) -> str:
    """A job as a line of the page's shell."""
    return f"$CIRCUIT {shlex.join(job.argv)}"


def cross_seed(seed: Seed) -> list[str]:
    """Lines that trace a seed, select its path and attribute what that writes."""
    derive, train, _ = seed.jobs()
    _, select = seed.selections()
    writes = "\n".join(typed(job) for job in seed.write_jobs("L90H0_to_L90MLP"))
    return [
        *map(typed, (derive, train, select)),
        f"WINNER=$(jq -r .summary.selected.winner.path {seed.selected_paths})",
        writes.replace("L90H0", "${WINNER%_to_*}").replace("L90MLP", "${WINNER#*_to_}"),
    ]


def after(block: str) -> list[str]:
    """The block with the arguments of each control that the page names beside it."""
    controls = list(CONTROL.finditer(PAGE)) if "geometry-subspace-intervention" in block else []
    return [with_arguments(block, control[0]) for control in controls]


def with_arguments(block: str, control: str) -> str:
    """The block with what the control replaces; of the checkpoints those that it names, if any."""
    for option, value in re.findall(r"(--\S+) (\S+)", control):
        block, count = re.subn(rf"{option} \S+", f"{option} {value}", block)
        assert count == 1, option
    steps = re.findall(r"step_\d{6}\.pt", control)
    lines = block.split("\n")
    if steps:
        lines = [x for x in lines if "--checkpoint " not in x or any(step in x for step in steps)]
    return "\n".join(lines)


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
    assert len(expected()) == 10 + 3
    assert len(WINNER.findall(PAGE)) == PAGE.count("winner_") == 5
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
        script += [*before(block), block, *after(block)]
    others = OTHERS.replace("circuit.cli.job", "circuit.cli").format(python=sys.executable)
    with warm_python(lambda words: run_commands([words[2:]]), others) as python:
        said = bash(
            at_this_scale("\n".join(script)).replace(NOT_A_COMMAND, INSTEAD), tmp_path, python
        ).splitlines()
    for path in expected():
        files = (tmp_path / path).glob("*.json") if path.endswith("/") else [tmp_path / path]
        assert any(file.is_file() for file in files), path
    count = re.search(r"^Expected count:\n\n(\d+)$", PAGE, re.MULTILINE)
    assert count
    assert count[1] in said
    listed = [line for line in said if line.startswith(CROSS_SEED)]
    assert len(listed) == len(WINNER.findall(PAGE))
    for (seed, *name), line in zip(WINNER.findall(PAGE), listed, strict=True):
        folder = r"L\dH\d_to_L\dMLP".join(name)
        assert re.fullmatch(rf"{CROSS_SEED}/seed_{seed}/.*/{folder}/\w+_report\.json", line), line
        assert (tmp_path / line).is_file()
