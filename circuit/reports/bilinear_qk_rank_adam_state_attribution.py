"""bilinear-qk-rank-adam-state-attribution: which optimizer term moved a head's QK match."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from circuit.attribution.attribute import LossScope
from circuit.attribution.groups import Partition
from circuit.attribution.window import Job
from circuit.errors import CircuitError
from circuit.model.components import parse_component
from circuit.model.stages import stage_hook
from circuit.model.subspaces import check_rank
from circuit.reports.attribution_report import WindowOptions, report_attribution
from circuit.reports.base import ReportResult
from circuit.reports.inputs import Inputs, PairOptions, traced_inputs
from circuit.scalars.qk_match import (
    LayerNormMode,
    QKMatch,
    ReadMasks,
    check_layernorm_mode,
    qk_matches,
)
from circuit.tasks.groups import check_single
from circuit.tasks.pairs import check_side
from circuit.tasks.positions import Batch, check_roles
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig

COMMAND = "bilinear-qk-rank-adam-state-attribution"
_STEP_BASIS = re.compile(r"step:(\d+)")


@dataclass(frozen=True)
class QKOptions:
    """Whose match is followed, and on which reads (definitions.md section 5).

    Attributes:
        heads: addresses; empty takes every head of the model.
        ranks: of the bases `source` and `step:N`.
        bases: `source` (anew before each step), `step:N`, `full` (the whole matrix); one scalar
            each.
        by_lag: also one scalar for the reads of each lag.
        context_stage: where `x` is read; None is the stage that each head reads.
        layernorm_mode: `head_ln1` or `none`.
        query_role, support_role, distractor_role: positions that are scored and compared.
        side: of the pairs.
        pairs: which pairs are built.
        scored_type: the type that is scored; None takes all that are built.
    """

    heads: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (8,)
    bases: tuple[str, ...] = ("source",)
    by_lag: bool = False
    context_stage: str | None = None
    layernorm_mode: LayerNormMode = "head_ln1"
    query_role: str = "prediction"
    support_role: str = "support_value"
    distractor_role: str = "value_distractors"
    side: str = "clean"
    pairs: PairOptions = field(default_factory=PairOptions)
    scored_type: str | None = None

    def __post_init__(self) -> None:
        for basis in self.bases:
            if basis not in ("source", "full") and not _STEP_BASIS.fullmatch(basis):
                raise CircuitError(
                    f"unknown basis '{basis}'",
                    expected="source, full, or step:N such as step:3000",
                )
            if not self.ranks and basis != "full":
                raise CircuitError(f"basis '{basis}' needs a rank", fix="pass --rank")
        if self.scored_type is not None and self.scored_type not in self.pairs.types:
            raise CircuitError(
                f"pairs of type {self.scored_type} are scored but not built",
                expected=f"one of {', '.join(self.pairs.types)}",
            )
        check_layernorm_mode(self.layernorm_mode)
        check_single(self.query_role)
        check_roles(self.support_role, self.distractor_role)
        check_side(self.side)

    def to_json(self) -> dict[str, Any]:
        """The parameters as JSON."""
        return asdict(self)

    def batch(self, inputs: Inputs) -> Batch:
        """The scored side of the scored pairs."""
        pairs = [
            pair
            for pair in inputs.pairs(self.pairs)
            if self.scored_type is None or pair.type == self.scored_type
        ]
        return inputs.side(pairs, self.side)

    def reads(self, batch: Batch) -> dict[str, ReadMasks]:
        """The scored reads by suffix of their scalars' names: all, and those of each lag."""
        reads = ReadMasks.of(
            batch,
            query_role=self.query_role,
            support_role=self.support_role,
            distractor_role=self.distractor_role,
        )
        if not self.by_lag:
            return {"": reads}
        lags = batch.reads.lag[reads.chosen]
        by_lag = {f".lag{lag}": reads.where(lags == lag) for lag in sorted(set(lags.tolist()))}
        return {"": reads, **by_lag}


@dataclass(frozen=True)
class QKScalars:
    """Makes the scalars of an attribution of QK matches (a `ScalarSource`)."""

    config: TrainConfig
    probe_set: Path
    options: QKOptions

    def inputs(self, run: ReplayedRun) -> Inputs:
        """Of the trace; first refuses what its model or its steps do not have.

        Raises:
            CircuitError: names the head, rank, stage or step.
        """
        options, model = self.options, run.config.model
        for address in options.heads:
            parse_component(address, shape=(model.layers, model.heads), kind="head")
        for rank in options.ranks if set(options.bases) != {"full"} else ():
            check_rank("a head", rank, model.d_model // model.heads)
        if options.context_stage is not None:
            stage_hook(options.context_stage, model.layers)
        for step in filter(None, map(_STEP_BASIS.fullmatch, options.bases)):
            run.check_addressable(int(step[1]))
        return traced_inputs(self.config, self.probe_set, run)

    def scalars(self, inputs: Inputs) -> list[QKMatch]:
        """The scalars on a trace."""
        options = self.options
        layers, heads = inputs.config.model.layers, inputs.config.model.heads
        chosen = list(options.heads) or [f"L{n}H{h}" for n in range(layers) for h in range(heads)]
        found: list[QKMatch] = []
        reads_by_suffix = options.reads(options.batch(inputs))
        for basis in options.bases:
            step = _STEP_BASIS.fullmatch(basis)
            model = None
            if step is not None:
                model = inputs.point(int(step[1])).model
            for suffix, reads in reads_by_suffix.items():
                found += qk_matches(
                    chosen,
                    reads,
                    layers=layers,
                    ranks=[None] if basis == "full" else options.ranks,
                    basis=model,
                    layernorm_mode=options.layernorm_mode,
                    context_stage=options.context_stage,
                    suffix=(f"_of_step{step[1]}" if step else "") + suffix,
                )
        return found


def bilinear_qk_rank_adam_state_attribution(
    config: TrainConfig,
    probe_set: Path,
    trace: Path,
    output_dir: str | Path,
    options: QKOptions,
    *,
    window: WindowOptions = WindowOptions(),  # noqa: B008  frozen
    path: str = "simpson",
    partitions: tuple[Partition, ...] = ("circuit",),
    loss_scope: LossScope = "full_lm",
    overwrite: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> ReportResult:
    """Attribute the QK match of heads over a window of a trace.

    Raises:
        CircuitError: as `report_attribution`.
    """
    scalars = QKScalars(config, probe_set, options)

    def provenance(inputs: Inputs) -> dict[str, Any]:
        return {"scored_reads": len(options.reads(options.batch(inputs))[""])}

    return report_attribution(
        COMMAND,
        Job(trace, scalars, path, partitions, loss_scope),
        window,
        output_dir,
        parameters={"probe_set": str(probe_set), "optimizer_trace_dir": str(trace)}
        | options.to_json(),
        provenance=provenance,
        overwrite=overwrite,
        progress=progress,
    )
