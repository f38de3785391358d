"""The cross-seed study: which head matches in every seed, which path writes, and what moved them.

A candidate head's score is its separation (rank 8) at the end of the window minus at its start. The
attributions are known only when the winners are: they are made by rules with wildcards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from circuit.strict_json import parse_json
from circuit.studies.ablation import derive_job
from circuit.studies.commands import (
    MATCH_ROLES,
    PROBE,
    shard_edges,
    sharded,
    train_job,
)
from circuit.studies.configs import FORMATION, HORIZON
from circuit.studies.jobs import Job, Words, checkpoints, options, report_file
from circuit.studies.scales import Scale

TARGET = "cross-seed"
ROOT = "artifacts/runs/symbolic_kv_cross_seed_adam"
MATCH_WINDOW = (0, 2500)
WRITE_WINDOW = (1500, 2500)
CONTROLS = ("winner", "runner_up", "bottom")
QK = "bilinear-qk-rank-adam-state-attribution"
WRITE = "mlp-functional-write-adam-state-attribution"
HEADS, PATHS = "head-selection", "write-path-selection"
COMPARISON = "cross-seed-comparison"


class Seed:
    """The paths and jobs of one seed."""

    def __init__(self, seed: int, scale: Scale) -> None:
        self.seed, self.scale = seed, scale
        self.run = f"{ROOT}/seed_{seed:04}"
        self.name = f"seed_{seed:04}"
        self.config = f"{ROOT}/configs/{self.name}.json"
        self.horizon = scale.step(MATCH_WINDOW[1])
        span = scale.name_of(*MATCH_WINDOW)
        analysis = f"{self.run}/analysis"
        self.trace = f"{analysis}/optimizer_update_trace/from_init_seed{seed}_{span}_stepwise"
        self.trace_report = report_file(self.trace, "optimizer-update-trace")
        scanned = scale.name_of(0, HORIZON)
        self.scan = f"{analysis}/bilinear_qk_match_separation/all_heads_rank8_{scanned}"
        self.heads = f"{analysis}/head_selection/growth_{span}"
        self.paths = f"{analysis}/write_path_selection/ref{scale.step(WRITE_WINDOW[1])}"

    @property
    def selected_heads(self) -> str:
        """The report that names the heads."""
        return report_file(self.heads, HEADS)

    @property
    def selected_paths(self) -> str:
        """The report that names the write paths."""
        return report_file(self.paths, PATHS)

    def jobs(self) -> list[Job]:
        """Everything that does not depend on the winners."""
        scale, run = self.scale, self.run
        changes: Words = (f"name=symbolic_kv_cross_seed_adam_{self.name}", f"output_dir={run}")
        changes += (f"seed={self.seed}", f"steps={scale.step(HORIZON)}")
        return [
            derive_job(TARGET, self.name, FORMATION, self.config, changes),
            train_job(
                *(TARGET, self.config, run, scale.step(HORIZON), self.name),
                trace=self.trace,
                traced=self.horizon,
            ),
            self._scan(),
        ]

    def _scan(self) -> Job:
        command = "bilinear-qk-match-separation"
        steps = map(self.scale.step, range(250, HORIZON + 1, 250))
        argv: Words = (
            *(command, "--config", f"{self.run}/run_config.json", "--probe-set", PROBE),
            *checkpoints(f"{self.run}/checkpoints", steps),
            *("--checkpoint", f"{self.trace}/checkpoints/step_000000.pt", "--rank", "8"),
            *MATCH_ROLES,
            *("--output-dir", self.scan, "--overwrite"),
        )
        made = (report_file(self.scan, command),)
        inputs = (self.trace_report, PROBE)
        return Job(TARGET, command.replace("-", "_"), self.name, argv, inputs, made, units=25)

    def selections(self) -> list[Job]:
        """The two commands whose results name the winners."""
        command = "bilinear-qk-match-separation"
        rows = f"{self.scan}/{command.replace('-', '_')}_rows.jsonl"
        heads: Words = (
            *("study", "select-heads", "--separation-rows", rows, "--score", "rank8"),
            *("--start-step", "0", "--end-step", str(self.horizon)),
            *("--output-dir", self.heads, "--overwrite"),
        )
        reference = f"{self.run}/checkpoints/step_{self.horizon:06}.pt"
        paths: Words = (
            *("study", "select-write-paths", "--config", f"{self.run}/run_config.json"),
            *("--probe-set", PROBE, "--checkpoint", reference),
            *("--position-role", "prediction", "--pair-type", "support_value"),
            *("--output-dir", self.paths, "--overwrite"),
        )
        scan = (report_file(self.scan, command),)
        done = (f"{self.run}/summary.json", PROBE)
        return [
            Job(TARGET, "select_heads", self.name, heads, scan, (self.selected_heads,)),
            Job(TARGET, "select_write_paths", self.name, paths, done, (self.selected_paths,)),
        ]

    def match_folder(self, address: str) -> str:
        """Folder of the QK attribution; `address` names the heads as `match_address` does."""
        span = self.scale.name_of(*MATCH_WINDOW)
        folder = f"{self.run}/analysis/{QK.replace('-', '_')}"
        return f"{folder}/{address}_rank8_support_value_{span}"

    def write_folder(self, address: str) -> str:
        """Folder of the write attribution, as the contract names it."""
        scale, reference = self.scale, self.scale.step(WRITE_WINDOW[1])
        name = f"winner_{address}_prediction_ref{reference}_postgrad_total"
        folder = f"{self.run}/analysis/{WRITE.replace('-', '_')}"
        return f"{folder}/{name}_{scale.name_of(*WRITE_WINDOW)}"

    def match_jobs(self, address: str) -> list[Job]:
        """QK attribution of winner, runner-up and bottom in one pass: shards, then the merging."""
        heads = dict(part.rsplit("_", 1) for part in address.split("__"))
        words: Words = (
            *(QK, "--config", f"{self.run}/run_config.json", "--probe-set", PROBE),
            *("--optimizer-trace-dir", self.trace, *options("--head", heads.values())),
            *("--rank", "8", "--layernorm-mode", "head_ln1", *MATCH_ROLES),
            *("--record-side", "clean", "--route-pair-type", "support_value"),
            *("--route-pair-source-type", "support_value", "--loss-scope", "full_lm"),
        )
        inputs = (self.trace_report, self.selected_heads, PROBE)
        edges = shard_edges(0, self.horizon, self.scale.qk_shards)
        folder = self.match_folder(address)
        return sharded(TARGET, f"{self.name}_{address}", words, folder, inputs, edges)

    def write_jobs(self, address: str) -> list[Job]:
        """Attribution of the winner path: shards, then the merging."""
        source, mlp = address.split("_to_")
        start, end = map(self.scale.step, WRITE_WINDOW)
        words: Words = (
            *(WRITE, "--config", f"{self.run}/run_config.json", "--probe-set", PROBE),
            *("--optimizer-trace-dir", self.trace, "--source-component", source),
            *("--component", mlp, "--reference-step", str(end), "--position-role", "prediction"),
            *("--scalar", "fixed_source_competitor_margin", "--endpoint-role", "source"),
            *("--reference-vector", "post_mlp_gradient"),
            *("--target-vector", "post_mlp_total_delta", "--pair-type", "support_value"),
            *("--record-side", "clean", "--loss-scope", "full_lm"),
        )
        inputs = (self.trace_report, self.selected_paths, PROBE)
        edges = shard_edges(start, end, self.scale.write_shards)
        folder = self.write_folder(address)
        return sharded(TARGET, f"{self.name}_{address}", words, folder, inputs, edges)


def match_address(report: str | Path) -> str:
    """The selected heads as a folder names them: `winner_L1H3__runner_up_L1H1__bottom_L0H2`."""
    chosen = _selected(report)
    return "__".join(f"{role}_{chosen[role]['head']}" for role in CONTROLS)


def write_address(report: str | Path) -> str:
    """The selected write path as a folder names it: `L1H3_to_L1MLP`."""
    return str(_selected(report)["winner"]["path"])


def _selected(report: str | Path) -> dict[str, Any]:
    payload = parse_json(Path(report).read_text(encoding="utf-8"))
    return dict(payload["summary"]["selected"])


def comparison_words(reports: Iterable[str]) -> Words:
    """The page that compares the seeds, from the reports of all of them."""
    argv: Words = ("study", "compare-seeds", "--output-dir", f"{ROOT}/comparison")
    return (*argv, *options("--report", reports), "--overwrite")


def comparison_job(seeds: Sequence[Seed], attributions: Sequence[str]) -> Job:
    """The same as a job."""
    needed = [path for s in seeds for path in (s.selected_heads, s.selected_paths)]
    reports = (*needed, *attributions)
    made = (report_file(f"{ROOT}/comparison", COMPARISON),)
    return Job(TARGET, "compare_seeds", "all", comparison_words(reports), reports, made)
