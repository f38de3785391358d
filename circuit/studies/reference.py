"""The commands of the contract on its two reference runs (docs/reproducibility.txt)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from circuit.options import Options
from circuit.reports.answer_scalar_residual_diagnosis import (
    AnswerScalarDiagnosis,
    DiagnosisOptions,
)
from circuit.reports.bilinear_qk_match_separation import MatchSeparation, SeparationOptions
from circuit.reports.bilinear_qk_rank_adam_state_attribution import (
    QKAttribution,
    QKAttributionOptions,
)
from circuit.reports.geometry_subspace_intervention import (
    GeometrySubspaceIntervention,
    InterventionOptions,
)
from circuit.reports.mlp_input_functional_subspace import FunctionalSubspace
from circuit.reports.mlp_input_functional_subspace import SubspaceOptions as FunctionalOptions
from circuit.reports.ov_write_progress import OvWriteProgress
from circuit.reports.report import Report
from circuit.reports.route_to_margin_closure import MarginClosure, MarginClosureOptions
from circuit.reports.route_to_scalar_closure import ScalarClosure, ScalarClosureOptions
from circuit.reports.value_code_subspace import SubspaceOptions as ValueCodeOptions
from circuit.reports.value_code_subspace import ValueCodeSubspace
from circuit.reports.value_code_transfer_rescue import RescueOptions, ValueCodeTransferRescue
from circuit.reports.weight_svd_trace import SvdOptions, WeightSvdTrace
from circuit.studies.ablation import run_of
from circuit.studies.commands import (
    BENCHMARK_FILE,
    DATA,
    DONE,
    PROBE,
    READS,
    RUN,
    RUN_CONFIG,
    SPARSE,
    evaluate_job,
    progress_options,
    routes,
    shard_edges,
    sharded,
    trace_job,
    train_job,
)
from circuit.studies.configs import BENCHMARK, FORMATION, GENERALIZATION, HORIZON
from circuit.studies.jobs import Job, Words, checkpoints, report_file, report_job
from circuit.studies.scales import PILOTS, Scale

if TYPE_CHECKING:
    from circuit.model.ablation import Operation

TARGET = "reference"
BASELINE = run_of(PILOTS[0])
"""The ablation's AdamW: its 6000 steps are the first of the reference run."""
FORMATION_STEPS = range(750, 3501, 250)
ROUTE_STEPS = range(1500, 2501, 250)
SVD_STEPS = (250, 500, 750, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500, 5000, 5250, 5500)
KEY_RANK = 7
"""Of key identity, and of the value identity that is removed beside it."""
CAUSAL_STEPS = (1500, 1750, 2000, 2500, 3000, 3500)


class Reference:
    """The jobs of `reference` and those that every other target needs."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        name = scale.name_of(0, HORIZON)
        self.trace = f"{RUN}/analysis/optimizer_update_trace/from_init_seed7_{name}_stepwise"
        self.trace_report = report_file(self.trace, "optimizer-update-trace")

    def common(self) -> list[Job]:
        """Data and probe set."""
        probes: Words = (
            *("generate-probe-set", "--benchmark-dir", DATA, "--output", PROBE),
            *("--examples-per-split", str(self.scale.probes), "--split", "validation_iid"),
            "--overwrite",
        )
        data: Words = ("generate-benchmark", "--config", BENCHMARK, "--overwrite")
        return [
            Job("common", "generate_benchmark", "base", data, (BENCHMARK,), (BENCHMARK_FILE,)),
            Job("common", "generate_probe_set", "paper", probes, (BENCHMARK_FILE,), (PROBE,)),
        ]

    def jobs(self) -> list[Job]:
        """Everything that the contract runs on the two runs."""
        return [
            *self._runs(),
            self._trace(),
            *self._attribution(),
            self._separation(),
            self._progress(),
            self._weights(),
            *self._diagnoses(),
            self._functional(),
            self._value_code(),
            *self._interventions(),
            self._rescue(),
            self._routes(),
            self._closure(),
        ]

    def _report(
        self,
        kind: type[Report[Any]],
        options: Options,
        leaf: str,
        *,
        folder: str = "",
        name: str = "",
        inputs: Words = (),
        more: Words = (),
        units: float = 1,
    ) -> Job:
        """A report of the reference run, in `leaf` of its kind's folder, or of another."""
        return report_job(
            TARGET,
            kind,
            options,
            f"{RUN}/analysis/{folder or kind.stem()}/{leaf}",
            run=RUN_CONFIG if kind.reads_run else "",
            name=name,
            inputs=(DONE, *inputs),
            more=more,
            units=units,
        )

    def _at(self, steps: range | tuple[int, ...], *, traced: bool = False) -> dict[str, Any]:
        """Checkpoints of the run, or of its trace."""
        folder = f"{self.trace if traced else RUN}/checkpoints"
        return checkpoints(folder, map(self.scale.step, steps))

    def _runs(self) -> list[Job]:
        steps = self.scale.long_steps
        # the baseline of the ablation, the reference run and this one are one recipe
        runs = [
            train_job(TARGET, config, run, steps, same_as=shorter, taken=taken)
            for config, run, shorter, taken in (
                (FORMATION, RUN, BASELINE, self.scale.step(HORIZON)),
                (GENERALIZATION, SPARSE, RUN, steps),
            )
        ]
        evaluations = [evaluate_job(TARGET, run, "best", "heldout_pairs") for run in (RUN, SPARSE)]
        return runs + evaluations

    def _trace(self) -> Job:
        return trace_job(TARGET, RUN, self.trace, self.scale.step(HORIZON), self.scale)

    def _attribution(self) -> list[Job]:
        name = f"from_init_l2h1_rank8_support_value_{self.scale.name_of(0, HORIZON)}_stepwise"
        options = QKAttributionOptions(
            **READS,
            optimizer_trace_dir=Path(self.trace),
            head_layer=2,
            heads=("1",),
            context_stage="layer_1_post_mlp",
            route_pair_type="support_value",
        )
        return sharded(
            TARGET,
            "reference_L2H1",
            QKAttribution,
            options,
            f"{RUN}/analysis/{QKAttribution.stem()}/{name}",
            run=RUN_CONFIG,
            inputs=(self.trace_report,),
            edges=shard_edges(0, self.scale.step(HORIZON), self.scale.qk_shards),
        )

    def _separation(self) -> Job:
        options = SeparationOptions(**READS, **self._at(range(250, HORIZON + 1, 250)))
        leaf = f"all_heads_{self.scale.name_of(250, HORIZON)}"
        return self._report(MatchSeparation, options, leaf, units=24)

    def _progress(self) -> Job:
        options = progress_options(self.scale, f"{RUN}/checkpoints")
        leaf = f"all_heads_{self.scale.name_of(750, HORIZON)}"
        return self._report(OvWriteProgress, options, leaf, units=16)

    def _weights(self) -> Job:
        options = SvdOptions(**self._at(SVD_STEPS), max_singular_values=16, top_vector_ranks=16)
        leaf = f"phase1_{self.scale.name_of(250, digits=6)}_{self.scale.name_of(5500)}_top16"
        return self._report(WeightSvdTrace, options, leaf, more=("--device", "cpu"), units=14)

    def _scalars(self, which: str) -> str:
        """Folder name of a diagnosis."""
        scale = self.scale
        if which == "routes":
            return f"qk_ov_output_routes_{scale.name_of(1500, 2500)}_formation"
        stride = scale.step(250)
        return f"functional_subspace_trajectory_{scale.name_of(750, 3500)}_stride{stride}"

    def _diagnoses(self) -> list[Job]:
        return [
            self._report(
                AnswerScalarDiagnosis,
                DiagnosisOptions(**READS, **self._at(steps), max_pairs_per_type=128),
                self._scalars(which),
                name=which,
                units=len(steps),
            )
            for which, steps in (("trajectory", FORMATION_STEPS), ("routes", ROUTE_STEPS))
        ]

    def _pair_rows(self, which: str) -> tuple[Path, str]:
        """The rows of a diagnosis, and the report that stands for them."""
        kind = AnswerScalarDiagnosis
        folder = f"{RUN}/analysis/{kind.stem()}/{self._scalars(which)}"
        return Path(folder, f"{kind.stem()}_pair_rows.jsonl"), report_file(folder, kind.command)

    def _functional(self) -> Job:
        rows, diagnosis = self._pair_rows("trajectory")
        options = FunctionalOptions(
            **READS,
            scalar_pair_rows=rows,
            source_component="L0H0",
            component="L0MLP",
            position_roles=("prediction", "support_value"),
            group_by=("answer_value", "support_value"),
            scalars=("fixed_source_competitor_margin", "fixed_target_competitor_margin"),
        )
        leaf = f"l0h0_to_l0mlp_support_prediction_{self.scale.name_of(1500, 2500)}"
        return self._report(FunctionalSubspace, options, leaf, inputs=(diagnosis,), units=12)

    def _value_code(self) -> Job:
        options = ValueCodeOptions(
            **READS,
            **self._at(FORMATION_STEPS, traced=True),
            stages=("layer_0_post_mlp", "layer_1_post_mlp", "layer_2_post_mlp", "final_norm"),
            position_roles=("prediction", "support_value"),
            group_by=("answer_value", "support_value"),
            splits=("validation_iid",),
            max_records=self.scale.reads,
        )
        leaf = f"prediction_answer_value_{self.scale.name_of(750, 3500)}"
        inputs = (self.trace_report,)
        return self._report(ValueCodeSubspace, options, leaf, inputs=inputs, units=12)

    def _interventions(self) -> list[Job]:
        scale = self.scale
        narrow, wide, most = scale.key_rank(KEY_RANK), scale.value_rank(16), scale.value_rank(127)
        jobs = []
        for what, rank, operation, steps in (
            ("value", wide, "remove", CAUSAL_STEPS),
            ("key", narrow, "remove", CAUSAL_STEPS),
            ("value", narrow, "remove", CAUSAL_STEPS),
            ("value", most, "keep", CAUSAL_STEPS[2:]),
        ):
            options = InterventionOptions(
                **READS,
                **self._at(steps, traced=True),
                stage="layer_2_post_mlp",
                subspace=f"embedding_{what}_identity",
                ranks=(rank,),
                operation=cast("Operation", operation),
            )
            span = scale.name_of(steps[0], steps[-1])
            jobs.append(
                self._report(
                    GeometrySubspaceIntervention,
                    options,
                    f"embedding_{what}_identity_prediction_layer2_{operation}_rank{rank}_{span}",
                    folder="value_code_causal_intervention",
                    name=f"{what}_{operation}_{rank}",
                    inputs=(self.trace_report,),
                    units=len(steps),
                )
            )
        return jobs

    def _rescue(self) -> Job:
        options = RescueOptions(
            **READS,
            **self._at((1750, 2000, 2500, 3000, 3500), traced=True),
            source_stage="layer_1_post_mlp",
            target_stage="layer_2_post_mlp",
            context_stage="layer_1_post_mlp",
            context_rank=16,
            splits=("validation_iid",),
            max_records=self.scale.reads,
            controls=("shuffled_answer_value", "wrong_support_value", "random_subspace"),
        )
        leaf = f"support_to_prediction_context_rank16_{self.scale.name_of(1750, 3500)}"
        inputs = (self.trace_report,)
        return self._report(ValueCodeTransferRescue, options, leaf, inputs=inputs, units=5)

    def _routes(self) -> Job:
        options = MarginClosureOptions(
            **READS, **self._at(ROUTE_STEPS), **routes(self.scale), max_pairs_per_type=128
        )
        return self._report(MarginClosure, options, self._scalars("routes"), units=5)

    def _closure(self) -> Job:
        rows, diagnosis = self._pair_rows("routes")
        leaf, stem = self._scalars("routes"), MarginClosure.stem()
        folder = f"{RUN}/analysis/{stem}/{leaf}"
        options = ScalarClosureOptions(
            route_closure_rows=Path(folder, f"{stem}_rows.jsonl"),
            scalar_pair_rows=rows,
            scalars=(
                "moving_answer_margin",
                "fixed_source_competitor_margin",
                "fixed_target_competitor_margin",
                "correct_value_logit",
                "negative_answer_loss",
            ),
            switch_buckets=("all",),
        )
        inputs = (report_file(folder, MarginClosure.command), diagnosis)
        return self._report(ScalarClosure, options, leaf, inputs=inputs)
