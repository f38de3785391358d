"""The contract's optimizer ablation, its comparison page, and a wider sweep of SGD's rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from circuit.reports.optimizer_comparison import OptimizerComparison, OptimizerComparisonOptions
from circuit.reports.ov_write_progress import OvWriteProgress
from circuit.studies.commands import evaluate_job, progress_options, train_job
from circuit.studies.configs import HORIZON, ablation_configs
from circuit.studies.jobs import Job, Words, report_job
from circuit.studies.scales import PILOTS, SWEEP, Scale

TARGET, WIDE = "ablation", "sgd-wide"
ROOT = "artifacts/runs/symbolic_kv_optimizer_ablation"
WIDE_ROOT = "artifacts/runs/symbolic_kv_sgd_wide"
RATES = ("0.003", "0.01", "0.03", "0.1", "0.3", "1.0", "3.0")
BASES = {"sgd_plain": PILOTS[4], "sgd_momentum_09": PILOTS[3]}


def run_of(name: str) -> str:
    """Folder of an ablation run, as its config names it."""
    return f"{ROOT}/{name}/seed_0007"


def audit_folder(name: str, scale: Scale) -> str:
    """Folder of the QK/OV audit of an ablation run."""
    kind = "sgd_lr_sweep" if name in SWEEP else "optimizer_ablation"
    span = scale.name_of(750, HORIZON)
    return f"{run_of(name)}/analysis/ov_write_progress/all_heads_{span}_{kind}"


def ablation_jobs(scale: Scale) -> list[Job]:
    """Runs, final evaluations, audits, and the page that compares them."""
    configs = ablation_configs(scale)
    steps = scale.step(HORIZON)
    jobs = [train_job(TARGET, path, run_of(name), steps, name) for name, path in configs.items()]
    jobs += [
        evaluate_job(TARGET, run_of(name), f"step_{steps:06}", config=path)
        for name, path in configs.items()
    ]
    audits = [_audit(name, path, scale) for name, path in configs.items()]
    inputs = (*(job.outputs[0] for job in audits), *(f"{run_of(n)}/summary.json" for n in configs))
    runs = [run_of(name) for name in configs]
    return [*jobs, *audits, _comparison(TARGET, ROOT, "contract", runs, inputs)]


def _comparison(target: str, root: str, name: str, runs: Sequence[str], inputs: Words) -> Job:
    options = OptimizerComparisonOptions(runs=tuple(map(Path, runs)))
    folder = f"{root}/comparison"
    return report_job(target, OptimizerComparison, options, folder, name=name, inputs=inputs)


def _audit(name: str, config: str, scale: Scale) -> Job:
    run = run_of(name)
    return report_job(
        TARGET,
        OvWriteProgress,
        progress_options(scale, f"{run}/checkpoints"),
        audit_folder(name, scale),
        run=config,
        name=name,
        inputs=(f"{run}/summary.json", config),
        units=16,
    )


def wide_jobs(scale: Scale) -> list[Job]:
    """SGD at rates beyond the contract's, in a root of its own; a run may diverge."""
    rates = RATES if not scale.batched else RATES[3:6:2]
    configs, runs = [], []
    for kind, base in BASES.items():
        for rate in rates:
            name = f"{kind}_lr_{rate.replace('.', 'p')}"
            run = f"{WIDE_ROOT}/{name}/seed_0007"
            path = f"{WIDE_ROOT}/configs/{name}.json"
            source = f"configs/train/optimizer_ablation/pilot_seed0007/{base}.json"
            changes = (f"name={name}", f"output_dir={run}", f"optimizer.learning_rate={rate}")
            configs.append(derive_job(WIDE, name, source, path, changes))
            steps = scale.step(HORIZON)
            runs.append(train_job(WIDE, path, run, steps, name, made="outcome.json"))
    inputs = tuple(job.outputs[0] for job in runs)
    folders = [job.folder for job in runs]
    return [*configs, *runs, _comparison(WIDE, WIDE_ROOT, "sgd_wide", folders, inputs)]


def derive_job(target: str, name: str, base: str, path: str, changes: Words) -> Job:
    """A config that differs from another in some fields."""
    argv: Words = ("study", "derive-config", "--config", base, "--output", path)
    argv += (*(word for change in changes for word in ("--set", change)), "--overwrite")
    return Job(target, "derive_config", name, argv, (base,), (path,))
