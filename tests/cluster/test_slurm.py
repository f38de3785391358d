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
from tiny_run import RUN

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


def circuit(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "circuit.cli", *words], check=True)


on_slurm = pytest.mark.skipif(
    not slurm_answers(), reason="no Slurm: tests/cluster/one_node_slurm.sh start"
)


@on_slurm
def test_jobs_of_slurm_give_what_local_ones_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {}
    for name, words in (("local", ()), ("slurm", ("--profile", "slurm", "--", *ON_ONE_MACHINE))):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        circuit("reproduce", "ablation", "--scale", "smoke", *words)
        found = (SMOKE / "artifacts" / "runs").rglob("*.jsonl")
        rows[name] = {str(path): path.read_bytes() for path in found}
    assert rows["local"] == rows["slurm"]
    log = (SMOKE / "artifacts/logs/snakemake.log").read_text()
    assert log.count("has been submitted with SLURM jobid") >= 5
    assert json.loads((SMOKE / "artifacts/claims/claims_ablation.json").read_text())
    assert read_jsonl(next(SMOKE.rglob("metrics.jsonl")))


@on_slurm
def test_a_queue_gives_the_same_in_one_process_as_jobs_here_and_as_an_array(traced: Path) -> None:
    edits = [f"--edit=from {start},set=rate*0.5,steps={start}:9" for start in (4, 5, 7, 8)]
    words = (
        *("trace", "counterfactual", "--config", f"{RUN}/run_config.json", *edits),
        *("--probe-set", f"{RUN}/analysis/probe_set.jsonl", "--optimizer-trace-dir", str(traced)),
        *("--scalar", "loss", "--start-step", "4", "--end-step", "9"),
    )
    parts = ("--parts", "2")
    array = (*parts, "--profile", "slurm", "--", *ON_ONE_MACHINE, "--slurm-array-jobs", "part")
    rows, kept = [], []
    for name, more in (("one", ()), ("local", parts), ("slurm", array)):
        circuit(*words, "--replays", f"{name}_kept", "--output-dir", name, *more)
        rows.append(Path(name, "counterfactual_training_rows.jsonl").read_bytes())
        kept.append(sorted(Path(f"{name}_kept", "replays.jsonl").read_bytes().splitlines()))
    assert rows == rows[:1] * 3
    assert kept == kept[:1] * 3
    log = Path("slurm/parts/logs/snakemake.log").read_text()
    assert "has been submitted with SLURM jobid" in log
