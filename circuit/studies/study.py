"""The whole study: its jobs by target, the rules that run them, and the paths that it ends with."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.studies import ablation, cross_seed, reference
from circuit.studies.configs import BENCHMARK, contract_configs, scaled
from circuit.studies.cross_seed import Seed, comparison_job
from circuit.studies.jobs import Batch, Job, Words
from circuit.studies.scales import Scale
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.train_config import TrainConfig

TARGETS = ("reference", "ablation", "cross-seed", "sgd-wide", "paper")
PAPER = ("reference", "ablation", "cross-seed")
UNKNOWN = "SELECTED"
"""Stands in a path for an address that is known only after the selection."""
_STAND_IN = re.compile(r"L9\d(?:H0|MLP)")
"""Addresses beyond every model of the study, for what is not selected yet."""


class Study:
    """Every job of one scale."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.seeds = [Seed(seed, scale) for seed in scale.seeds]

    @cached_property
    def jobs(self) -> list[Job]:
        """All jobs that are known from the start."""
        reference_runs = reference.Reference(self.scale)
        jobs = [
            *self._configs(),
            *reference_runs.common(),
            *reference_runs.jobs(),
            *ablation.ablation_jobs(self.scale),
            *(job for seed in self.seeds for job in (*seed.jobs(), *seed.selections())),
            *ablation.wide_jobs(self.scale),
        ]
        return [self._with_recipe(job) for job in jobs]

    def later(self, seed: Seed) -> list[Job]:
        """Those of a seed that depend on what is selected, with `SELECTED` for the addresses."""
        heads = (f"{role}_L9{n}H0" for n, role in enumerate(cross_seed.CONTROLS))
        jobs = [*seed.match_jobs("__".join(heads)), *seed.write_jobs("L90H0_to_L90MLP")]
        return [job.renamed(lambda text: _STAND_IN.sub(UNKNOWN, text)) for job in jobs]

    @property
    def comparison(self) -> Job:
        """The page on all seeds, with `SELECTED` in its inputs."""
        reports = [path for s in self.seeds for path in (s.selected_heads, s.selected_paths)]
        for seed in self.seeds:
            merges = (job for job in self.later(seed) if job.kind == "trace_merge")
            reports += [job.outputs[0] for job in merges]
        return comparison_job(reports)

    def of(self, target: str) -> list[Job]:
        """The jobs of a target as far as they are known, without what they need from others."""
        parts = PAPER if target == "paper" else (target,)
        return [job for job in self.jobs if job.target in parts]

    def everything(self, target: str) -> list[Job]:
        """All jobs of a target, those behind the selection and all that they need included."""
        chosen = self.of(target)
        if target in ("cross-seed", "paper"):
            chosen += [job for seed in self.seeds for job in self.later(seed)]
            chosen.append(self.comparison)
        makers = {path: job for job in self.jobs for path in job.outputs}
        needed = dict.fromkeys(chosen)
        waiting = list(chosen)
        while waiting:
            for path in waiting.pop().inputs:
                job = makers.get(path)
                if job is not None and job not in needed:
                    needed[job] = None
                    waiting.append(job)
        return list(needed)

    def outputs(self, target: str) -> list[str]:
        """What a target ends with, `SELECTED` standing for addresses; shards are no part of it."""
        paths = (path for job in self.everything(target) for path in job.outputs)
        return sorted(path for path in paths if not is_part(path))

    @cached_property
    def of_seeds(self) -> dict[tuple[str, str], Job]:
        """Those of the cross-seed study, by kind and seed: rules with the seed as wildcard."""
        return {(job.kind, job.name): job for job in self.jobs if job.target == cross_seed.TARGET}

    @cached_property
    def batches(self) -> list[Batch]:
        """The rules without: one a job, or, where the scale is batched, one a kind and target."""
        groups: dict[str, list[Job]] = {}
        for job in self.jobs:
            if job.target == cross_seed.TARGET:
                continue
            name = job.target if self.scale.batched else job.name
            groups.setdefault(_identifier(f"{job.kind}__{name}"), []).append(job)
        return [Batch(jobs[0].target, jobs[0].kind, n, tuple(jobs)) for n, jobs in groups.items()]

    def targets(self, target: str) -> list[str]:
        """Files that a target asks for, as far as they are known from the start."""
        # a rule for all seeds makes one file: the trace beside a run has its seed in other digits
        files = (
            (j.outputs[:1] if j.target == cross_seed.TARGET else j.outputs) for j in self.of(target)
        )
        return [path for of_job in files for path in of_job if not is_part(path)]

    def _configs(self) -> list[Job]:
        """At other scales than the contract's, the configs themselves are made."""
        if self.scale.is_contract:
            return []
        paths = tuple(contract_configs(self.scale))
        argv: Words = ("study", "configs", "--scale", self.scale.name)
        if self.scale.seed is not None:
            argv += ("--base-seed", str(self.scale.seed))
        texts = "".join(scaled(path, self.scale) for path in paths)
        recipe = f"configs {_digest(texts)}"
        return [Job("common", "configs", self.scale.label, argv, (), paths, recipe)]

    def _with_recipe(self, job: Job) -> Job:
        """A job that reads a config is invalid where what the config says is another."""
        if not self.scale.is_contract or job.recipe:
            return job
        configs = [path for path in job.inputs if path.startswith("configs/")]
        digests = (f"{path} {config_digest(path)}" for path in configs if Path(path).exists())
        return replace(job, recipe="; ".join(digests))


def config_digest(path: str) -> str:
    """Digest of what a config says, in few digits; its layout does not count."""
    kind = BenchmarkConfig if path == BENCHMARK else TrainConfig
    return load_config(path, kind).digest()[:12]


def missing_configs(scale: Scale) -> list[str]:
    """Configs of the contract that are not where it runs (at other scales they are made)."""
    paths = contract_configs(scale) if scale.is_contract else []
    return [path for path in paths if not Path(path).is_file()]


def check_target(name: str) -> None:
    """Refuse what is no target.

    Raises:
        CircuitError: names those that are.
    """
    if name not in TARGETS:
        raise CircuitError(f"unknown target '{name}'", expected=f"one of {', '.join(TARGETS)}")


def is_part(path: str) -> bool:
    """Whether it is a shard of an attribution, which its merging replaces."""
    return path.startswith("artifacts/shards/")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _identifier(text: str) -> str:
    return text.replace("-", "_").replace(".", "p")
