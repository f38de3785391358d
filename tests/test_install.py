"""What an installation needs, and where Python finds it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from circuit.cli.program import of_the_machine
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = {"torch", "numpy", "pandas", "pydantic", "rich", "typer", "safetensors"}
EXTRAS = PROJECT["optional-dependencies"]

CORE_ALONE = """
import importlib.metadata, sys

blocked = sys.argv[1:]
for name in blocked:
    sys.modules[name] = None  # importing it fails as if it were not there
version = importlib.metadata.version
def absent(name):
    if name in blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = absent

import torch
from torch import nn
import circuit

torch.manual_seed(0)
inputs, targets = torch.randn(16, 3), torch.randn(16, 2)
module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
optimizer = torch.optim.AdamW(module.parameters())

def loss(module):
    return nn.functional.mse_loss(module(inputs), targets)

with circuit.watch(module, optimizer, "recording", scalars=[loss]):
    for _ in range(3):
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()

run = circuit.open_run("recording", module=module)
assert all(map(torch.equal, run.state(3).parameters.values(), module.parameters()))
assert circuit.attribute(run, [loss], 0, 3)["loss"].closure().path < 1e-3
for name in circuit.__all__:
    getattr(circuit, name)
try:
    import circuit.model.build
except ModuleNotFoundError as error:
    print(error.name)
"""


def module_of(requirement: str) -> str:
    """The name by which a required distribution is imported."""
    renamed = {"scikit-learn": "sklearn", "vl-convert-python": "vl_convert"}
    name = Requirement(requirement).name
    return renamed.get(name, name)


def test_a_plain_install_is_the_core_and_lens() -> None:
    assert {Requirement(one).name for one in PROJECT["dependencies"]} == CORE | {
        Requirement(one).name for one in EXTRAS["lens"]
    }
    assert set(EXTRAS["lens"]) <= set(PROJECT["dependencies"])


def test_a_loop_is_watched_and_attributed_by_the_core_alone(tmp_path: Path) -> None:
    blocked = [module_of(one) for one in EXTRAS["lens"]]
    done = subprocess.run(
        [sys.executable, "-c", CORE_ALONE, *blocked],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["transformer_lens"]


def test_what_is_not_installed_is_said_in_one_line() -> None:
    refusal = of_the_machine(ModuleNotFoundError("no", name="transformer_lens"))
    assert str(refusal) == (
        'transformer_lens is not installed; pip install "circuit-formation[lens]"'
    )
    assert of_the_machine(ModuleNotFoundError("no", name="circuit.nothing")) is None


def test_a_folder_named_circuit_hides_nothing(tmp_path: Path) -> None:
    """An editable installation puts the clone on Python's path, as is done here by hand."""
    (tmp_path / "circuit" / "circuit").mkdir(parents=True)
    script = tmp_path / "beside.py"
    script.write_text("import circuit, circuit.cli, circuit.configs; print(circuit.cli.__file__)")
    done = subprocess.run(
        [sys.executable, "-S", script.name],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(ROOT / "cli" / "__init__.py")
