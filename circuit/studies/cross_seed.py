"""The cross-seed study: which head matches in every seed, which path writes, and what moved them.

A candidate head's score is its separation (rank 8) at the end of the window minus at its start. The
attributions are known only when the winners are: they are made by rules with wildcards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuit.reports.bilinear_qk_match_separation import MatchSeparation, SeparationOptions
from circuit.reports.bilinear_qk_rank_adam_state_attribution import (
    QKAttribution,
    QKAttributionOptions,
)
from circuit.reports.cross_seed_comparison import CrossSeedComparison, CrossSeedOptions
from circuit.reports.head_selection import HeadSelection, HeadSelectionOptions
from circuit.reports.mlp_functional_write_adam_state_attribution import (
    WriteAttribution,
    WriteAttributionOptions,
)
from circuit.reports.write_path_selection import WritePathOptions, WritePathSelection
from circuit.reports.written import read_report
from circuit.studies.ablation import derive_job
from circuit.studies.commands import READS, shard_edges, sharded, train_job
from circuit.studies.configs import FORMATION, HORIZON
from circuit.studies.jobs import Job, Words, checkpoints, report_file, report_job
from circuit.studies.scales import Scale

TARGET = "cross-seed"
ROOT = "artifacts/runs/symbolic_kv_cross_seed_adam"
MATCH_WINDOW = (0, 2500)
WRITE_WINDOW = (1500, 2500)
CONTROLS = ("winner", "runner_up", "bottom")


class Seed:
    """The paths and jobs of one seed."""

    def __init__(self, seed: int, scale: Scale) -> None:
        self.seed, self.scale = seed, scale
        self.run = f"{ROOT}/seed_{seed:04}"
        self.name = f"seed_{seed:04}"
        self.run_config = f"{self.run}/run_config.json"
        self.summary = f"{self.run}/summary.json"  # written behind the trace beside it
        self.config = f"{ROOT}/configs/{self.name}.json"
        self.horizon = scale.step(MATCH_WINDOW[1])
        span = scale.name_of(*MATCH_WINDOW)
        analysis = f"{self.run}/analysis"
        self.trace = f"{analysis}/optimizer_update_trace/from_init_seed{seed}_{span}_stepwise"
        scanned = scale.name_of(0, HORIZON)
        self.scan = f"{analysis}/bilinear_qk_match_separation/all_heads_rank8_{scanned}"
        self.heads = f"{analysis}/head_selection/growth_{span}"
        self.paths = f"{analysis}/write_path_selection/ref{scale.step(WRITE_WINDOW[1])}"

    @property
    def selected_heads(self) -> str:
        """The report that names the heads."""
        return report_file(self.heads, HeadSelection.command)

    @property
    def selected_paths(self) -> str:
        """The report that names the write paths."""
        return report_file(self.paths, WritePathSelection.command)

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
        steps = map(self.scale.step, range(250, HORIZON + 1, 250))
        at = checkpoints(f"{self.run}/checkpoints", steps)
        at["checkpoints"] += (Path(self.trace, "checkpoints/step_000000.pt"),)
        return report_job(
            TARGET,
            MatchSeparation,
            SeparationOptions(**READS, **at),
            self.scan,
            run=self.run_config,
            name=self.name,
            inputs=(self.summary,),
            units=25,
        )

    def selections(self) -> list[Job]:
        """The two commands whose results name the winners."""
        scan = report_file(self.scan, MatchSeparation.command)
        heads = HeadSelectionOptions(
            separation_rows=Path(self.scan, f"{MatchSeparation.stem()}_rows.jsonl"),
            start_step=0,
            end_step=self.horizon,
        )
        paths = WritePathOptions(
            **READS, checkpoint=Path(self.run, f"checkpoints/step_{self.horizon:06}.pt")
        )
        return [
            report_job(TARGET, HeadSelection, heads, self.heads, name=self.name, inputs=(scan,)),
            report_job(
                TARGET,
                WritePathSelection,
                paths,
                self.paths,
                run=self.run_config,
                name=self.name,
                inputs=(self.summary,),
            ),
        ]

    def match_folder(self, address: str) -> str:
        """Folder of the QK attribution; `address` names the heads as `match_address` does."""
        span = self.scale.name_of(*MATCH_WINDOW)
        folder = f"{self.run}/analysis/{QKAttribution.stem()}"
        return f"{folder}/{address}_rank8_support_value_{span}"

    def write_folder(self, address: str) -> str:
        """Folder of the write attribution, as the contract names it."""
        scale, reference = self.scale, self.scale.step(WRITE_WINDOW[1])
        name = f"winner_{address}_prediction_ref{reference}_postgrad_total"
        folder = f"{self.run}/analysis/{WriteAttribution.stem()}"
        return f"{folder}/{name}_{scale.name_of(*WRITE_WINDOW)}"

    def match_jobs(self, address: str) -> list[Job]:
        """QK attribution of winner, runner-up and bottom in one pass: shards, then the merging."""
        heads = dict(part.rsplit("_", 1) for part in address.split("__"))
        options = QKAttributionOptions(
            **self._traced,
            heads=tuple(heads.values()),
            route_pair_type="support_value",
        )
        return sharded(
            TARGET,
            f"{self.name}_{address}",
            QKAttribution,
            options,
            self.match_folder(address),
            run=self.run_config,
            inputs=(self.summary, self.selected_heads),
            edges=shard_edges(0, self.horizon, self.scale.qk_shards),
        )

    def write_jobs(self, address: str) -> list[Job]:
        """Attribution of the winner path: shards, then the merging."""
        source, mlp = address.split("_to_")
        start, end = map(self.scale.step, WRITE_WINDOW)
        options = WriteAttributionOptions(
            **self._traced, source_component=source, component=mlp, reference_step=end
        )
        return sharded(
            TARGET,
            f"{self.name}_{address}",
            WriteAttribution,
            options,
            self.write_folder(address),
            run=self.run_config,
            inputs=(self.summary, self.selected_paths),
            edges=shard_edges(start, end, self.scale.write_shards),
        )

    @property
    def _traced(self) -> dict[str, Any]:
        """Options of every attribution on its trace."""
        return {**READS, "optimizer_trace_dir": Path(self.trace)}


def match_address(report: str | Path) -> str:
    """The selected heads as a folder names them: `winner_L1H3__runner_up_L1H1__bottom_L0H2`."""
    chosen = _selected(report)
    return "__".join(f"{role}_{chosen[role]['head']}" for role in CONTROLS)


def write_address(report: str | Path) -> str:
    """The selected write path as a folder names it: `L1H3_to_L1MLP`."""
    return str(_selected(report)["winner"]["path"])


def _selected(report: str | Path) -> dict[str, Any]:
    """The candidates that a selection names, by role.

    Raises:
        CircuitError: it is damaged, or of another run than the one that it stands in.
    """
    written = read_report(report)
    written.refuse_another_runs()
    return dict(written.summary["selected"])


def comparison_job(reports: Sequence[str]) -> Job:
    """The page that compares the seeds, from the reports of all of them."""
    options = CrossSeedOptions(reports=tuple(map(Path, reports)))
    folder, inputs = f"{ROOT}/comparison", tuple(reports)
    return report_job(TARGET, CrossSeedComparison, options, folder, name="all", inputs=inputs)
