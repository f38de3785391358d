"""The commands of the contract on its two reference runs (docs/reproducibility.txt)."""

from __future__ import annotations

from circuit.studies.commands import (
    BENCHMARK_FILE,
    DATA,
    DONE,
    MATCH_ROLES,
    PROBE,
    RUN,
    RUN_CONFIG,
    SPARSE,
    evaluate_job,
    progress_words,
    routes,
    shard_edges,
    sharded,
    trace_job,
    train_job,
)
from circuit.studies.configs import BENCHMARK, FORMATION, GENERALIZATION, HORIZON
from circuit.studies.jobs import Job, Words, checkpoints, options, report_file
from circuit.studies.scales import Scale

TARGET = "reference"
DIAGNOSIS = "answer-scalar-residual-diagnosis"
INTERVENTION = "geometry-subspace-intervention"
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
        command: str,
        folder: str,
        words: Words,
        *,
        name: str = "",
        inputs: Words = (),
        probed: bool = True,
        units: float = 1,
    ) -> Job:
        """A report of the reference run: config, probe set and folder stand in every one."""
        out = f"{RUN}/analysis/{folder}"
        argv: Words = (command, "--config", RUN_CONFIG)
        argv += ("--probe-set", PROBE) if probed else ()
        argv += (*words, "--output-dir", out, "--overwrite")
        needed = (DONE, PROBE, *inputs) if probed else (DONE, *inputs)
        kind = command.removesuffix("-report").replace("-", "_")
        made = (report_file(out, command),)
        return Job(TARGET, kind, name or kind, argv, needed, made, units=units)

    def _at(self, steps: range | tuple[int, ...], *, traced: bool = False) -> Words:
        """Checkpoints of the run, or of its trace."""
        folder = f"{self.trace if traced else RUN}/checkpoints"
        return checkpoints(folder, map(self.scale.step, steps))

    def _runs(self) -> list[Job]:
        steps = self.scale.long_steps
        runs = [
            train_job(TARGET, config, run, steps)
            for config, run in ((FORMATION, RUN), (GENERALIZATION, SPARSE))
        ]
        evaluations = [evaluate_job(TARGET, run, "best", "heldout_pairs") for run in (RUN, SPARSE)]
        return runs + evaluations

    def _trace(self) -> Job:
        return trace_job(TARGET, RUN, self.trace, self.scale.step(HORIZON), self.scale)

    def _attribution(self) -> list[Job]:
        name = f"from_init_l2h1_rank8_support_value_{self.scale.name_of(0, HORIZON)}_stepwise"
        words: Words = (
            *("bilinear-qk-rank-adam-state-attribution", "--config", RUN_CONFIG),
            *("--probe-set", PROBE, "--optimizer-trace-dir", self.trace),
            *("--head-layer", "2", "--head", "1", "--rank", "8"),
            *("--context-stage", "layer_1_post_mlp", "--layernorm-mode", "head_ln1"),
            *MATCH_ROLES,
            *("--record-side", "clean", "--route-pair-type", "support_value"),
            *("--route-pair-source-type", "support_value", "--max-route-pairs-per-type", "64"),
            *("--min-route-pairs-per-type", "16", "--loss-scope", "full_lm"),
        )
        folder = f"{RUN}/analysis/bilinear_qk_rank_adam_state_attribution/{name}"
        inputs = (self.trace_report, PROBE)
        edges = shard_edges(0, self.scale.step(HORIZON), self.scale.qk_shards)
        return sharded(TARGET, "reference_L2H1", words, folder, inputs, edges)

    def _separation(self) -> Job:
        words = (*self._at(range(250, HORIZON + 1, 250)), "--rank", "8")
        name = f"all_heads_{self.scale.name_of(250, HORIZON)}"
        return self._report(
            "bilinear-qk-match-separation", f"bilinear_qk_match_separation/{name}", words, units=24
        )

    def _progress(self) -> Job:
        name = f"all_heads_{self.scale.name_of(750, HORIZON)}"
        words = progress_words(self.scale, f"{RUN}/checkpoints")
        return self._report(
            "ov-write-progress-report", f"ov_write_progress/{name}", words, units=16
        )

    def _weights(self) -> Job:
        name = f"phase1_{self.scale.name_of(250, digits=6)}_{self.scale.name_of(5500)}_top16"
        words: Words = (
            *self._at(SVD_STEPS),
            *("--device", "cpu", "--max-singular-values", "16", "--top-vector-ranks", "16"),
        )
        return self._report(
            "weight-svd-trace", f"weight_svd_trace/{name}", words, probed=False, units=14
        )

    def _scalars(self, which: str) -> str:
        """Folder name of a diagnosis."""
        scale = self.scale
        if which == "routes":
            return f"qk_ov_output_routes_{scale.name_of(1500, 2500)}_formation"
        stride = scale.step(250)
        return f"functional_subspace_trajectory_{scale.name_of(750, 3500)}_stride{stride}"

    def _diagnoses(self) -> list[Job]:
        found = []
        for which, steps in (("trajectory", FORMATION_STEPS), ("routes", ROUTE_STEPS)):
            words = (*self._at(steps), "--pair-type", "support_value")
            words += ("--max-pairs-per-type", "128", "--min-pairs-per-type", "16")
            folder = f"answer_scalar_residual_diagnosis/{self._scalars(which)}"
            job = self._report(DIAGNOSIS, folder, words, name=which, units=len(steps))
            found.append(job)
        return found

    def _pair_rows(self, which: str) -> tuple[str, str]:
        """The rows of a diagnosis, and the report that stands for them."""
        folder = f"{RUN}/analysis/answer_scalar_residual_diagnosis/{self._scalars(which)}"
        return f"{folder}/answer_scalar_residual_diagnosis_pair_rows.jsonl", report_file(
            folder, DIAGNOSIS
        )

    def _functional(self) -> Job:
        rows, made = self._pair_rows("trajectory")
        words: Words = (
            *("--scalar-pair-rows", rows, "--pair-type", "support_value"),
            *("--source-component", "L0H0", "--component", "L0MLP"),
            *("--position-role", "prediction", "--position-role", "support_value"),
            *("--group-by", "answer_value", "--group-by", "support_value"),
            *("--scalar", "fixed_source_competitor_margin"),
            *("--scalar", "fixed_target_competitor_margin"),
            *("--endpoint-role", "source", "--endpoint-role", "target", "--subspace-rank", "4"),
        )
        name = f"l0h0_to_l0mlp_support_prediction_{self.scale.name_of(1500, 2500)}"
        return self._report(
            "mlp-input-functional-subspace-report",
            f"mlp_input_functional_subspace/{name}",
            words,
            inputs=(made,),
            units=12,
        )

    def _value_code(self) -> Job:
        stages = ("layer_0_post_mlp", "layer_1_post_mlp", "layer_2_post_mlp", "final_norm")
        words: Words = (
            *self._at(FORMATION_STEPS, traced=True),
            *options("--stage", stages),
            *options("--position-role", ("prediction", "support_value")),
            *options("--group-by", ("answer_value", "support_value")),
            *("--split", "validation_iid", "--max-records", str(self.scale.reads)),
            *("--pca-rank", "4"),
        )
        return self._report(
            "value-code-subspace-report",
            f"value_code_subspace/prediction_answer_value_{self.scale.name_of(750, 3500)}",
            words,
            inputs=(self.trace_report,),
            units=12,
        )

    def _interventions(self) -> list[Job]:
        scale = self.scale
        narrow, wide, most = scale.key_rank(KEY_RANK), scale.value_rank(16), scale.value_rank(127)
        wanted = (
            ("value", wide, "remove", CAUSAL_STEPS),
            ("key", narrow, "remove", CAUSAL_STEPS),
            ("value", narrow, "remove", CAUSAL_STEPS),
            ("value", most, "keep", CAUSAL_STEPS[2:]),
        )
        found = []
        for what, rank, operation, steps in wanted:
            name = (
                f"embedding_{what}_identity_prediction_layer2_{operation}_rank{rank}"
                f"_{scale.name_of(steps[0], steps[-1])}"
            )
            words: Words = (
                *self._at(steps, traced=True),
                *("--stage", "layer_2_post_mlp", "--subspace", f"embedding_{what}_identity"),
                *("--rank", str(rank), "--operation", operation),
                *("--position-role", "prediction", "--query-mode", "single_query"),
            )
            found.append(
                self._report(
                    INTERVENTION,
                    f"value_code_causal_intervention/{name}",
                    words,
                    name=f"{what}_{operation}_{rank}",
                    inputs=(self.trace_report,),
                    units=len(steps),
                )
            )
        return found

    def _rescue(self) -> Job:
        controls = ("shuffled_answer_value", "wrong_support_value", "random_subspace")
        words: Words = (
            *self._at((1750, 2000, 2500, 3000, 3500), traced=True),
            *("--source-stage", "layer_1_post_mlp", "--target-stage", "layer_2_post_mlp"),
            *("--source-position-role", "support_value"),
            *("--target-position-role", "prediction", "--context-stage", "layer_1_post_mlp"),
            *("--context-position-role", "prediction", "--context-rank", "16"),
            *("--group-by", "answer_value", "--split", "validation_iid"),
            *("--max-records", str(self.scale.reads), "--batch-size", "32", "--basis-rank", "16"),
            *options("--control", controls),
            *("--fit-fraction", "0.75"),
        )
        name = f"support_to_prediction_context_rank16_{self.scale.name_of(1750, 3500)}"
        return self._report(
            "value-code-transfer-rescue",
            f"value_code_transfer_rescue/{name}",
            words,
            inputs=(self.trace_report,),
            units=5,
        )

    def _routes(self) -> Job:
        words: Words = (
            *self._at(ROUTE_STEPS),
            *("--pair-type", "support_value", "--margin-side", "clean"),
            *("--margin-side", "corrupted"),
            *("--max-pairs-per-type", "128", "--min-pairs-per-type", "16"),
            *options("--route", routes(self.scale)),
        )
        return self._report(
            "route-to-margin-closure",
            f"route_to_margin_closure/{self._scalars('routes')}",
            words,
            units=5,
        )

    def _closure(self) -> Job:
        rows, made = self._pair_rows("routes")
        folder = f"{RUN}/analysis/route_to_margin_closure/{self._scalars('routes')}"
        scalars: Words = ("moving_answer_margin", "fixed_source_competitor_margin")
        scalars += ("fixed_target_competitor_margin", "correct_value_logit")
        out = f"{RUN}/analysis/route_to_scalar_closure/{self._scalars('routes')}"
        argv: Words = (
            "route-to-scalar-closure",
            *("--route-closure-rows", f"{folder}/route_to_margin_closure_rows.jsonl"),
            *("--scalar-pair-rows", rows, "--output-dir", out),
            *options("--scalar", (*scalars, "negative_answer_loss")),
            *("--switch-bucket", "all", "--overwrite"),
        )
        inputs = (report_file(folder, "route-to-margin-closure"), made)
        kind = "route_to_scalar_closure"
        return Job(TARGET, kind, kind, argv, inputs, (report_file(out, kind),))
