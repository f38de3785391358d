"""Completion as a user meets it, in a real shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

BIN = Path(sys.executable).parent
COMPLETE = r"""
eval "$(_CIRCUIT_COMPLETE=source_bash circuit)"
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMP_LINE="{words}"
COMP_POINT=${{#COMP_LINE}}
_circuit_completion circuit
printf '%s\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    configs = Path(__file__).parents[2] / "configs"
    shutil.copytree(configs, tmp_path / "configs")
    checkpoints = tmp_path / "artifacts/runs/one/checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(configs / "train/quickstart.json", checkpoints.parent / "run_config.json")
    for name in ("best.pt", "step_000050.pt"):
        (checkpoints / name).write_bytes(b"")
    (tmp_path / "artifacts/runs/one/analysis/trace").mkdir(parents=True)
    (tmp_path / "artifacts/runs/one/analysis/trace/trace.json").write_text("{}")
    return tmp_path


def bash(folder: Path, words: str) -> list[str]:
    """What bash would offer after these words."""
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE.format(words=words)],
        cwd=folder,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("circuit generate-b", ["generate-benchmark"]),
        ("circuit trace ve", ["verify"]),
        ("circuit trace verify arti", ["artifacts/runs/one/analysis/trace"]),
        ("circuit train --config configs/train/q", ["configs/train/quickstart.json"]),
        (
            "circuit evaluate --config artifacts/runs/one/run_config.json --checkpoint arti",
            [
                "artifacts/runs/one/checkpoints/best.pt",
                "artifacts/runs/one/checkpoints/step_000050.pt",
            ],
        ),
        ("circuit evaluate --split held", ["heldout_pairs"]),
        ("circuit train --device c", ["cpu", "cuda"]),
    ],
)
def test_bash_completes(folder: Path, words: str, offered: list[str]) -> None:
    assert sorted(bash(folder, words)) == offered
