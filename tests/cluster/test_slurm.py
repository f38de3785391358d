"""The same workflow as Slurm jobs, on a scheduler that runs on this machine.

tests/cluster/one_node_slurm.sh start
pytest -m system tests/cluster
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from circuit.artifacts import read_jsonl

pytestmark = pytest.mark.system

SMOKE = Path("artifacts/scale/smoke")
ON_ONE_MACHINE = (
    *("--slurm-no-account", "--slurm-status-command", "squeue", "--jobs", "2"),
    *("--slurm-init-seconds-before-status-checks", "3", "--seconds-between-status-checks", "4"),
)


def slurm_answers() -> bool:
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo", "-h"], capture_output=True, check=False).returncode == 0


def reproduce(*words: str) -> None:
    command = [sys.executable, "-m", "circuit.cli", "reproduce", "ablation", "--scale", "smoke"]
    subprocess.run([*command, *words], check=True)


@pytest.mark.skipif(not slurm_answers(), reason="no Slurm: tests/cluster/one_node_slurm.sh start")
def test_jobs_of_slurm_give_what_local_ones_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {}
    for name, words in (("local", ()), ("slurm", ("--profile", "slurm", "--", *ON_ONE_MACHINE))):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        reproduce(*words)
        found = (SMOKE / "artifacts" / "runs").rglob("*.jsonl")
        rows[name] = {str(path): path.read_bytes() for path in found}
    assert rows["local"] == rows["slurm"]
    log = (SMOKE / "artifacts/logs/snakemake.log").read_text()
    assert log.count("has been submitted with SLURM jobid") >= 5
    assert json.loads((SMOKE / "artifacts/claims/claims_ablation.json").read_text())
    assert read_jsonl(next(SMOKE.rglob("metrics.jsonl")))
