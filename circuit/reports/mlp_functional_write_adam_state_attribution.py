"""mlp-functional-write-adam-state-attribution: which optimizer term moved a functional write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.attribution.attribute import LossScope
from circuit.attribution.groups import Partition
from circuit.attribution.window import Job
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.readout import read_answers
from circuit.reports.attribution_report import WindowOptions, report_attribution
from circuit.reports.base import ReportResult
from circuit.reports.inputs import Checkpointed, Inputs, PairOptions, traced_inputs
from circuit.reports.interval_ends import ENDPOINTS, read_interval_at
from circuit.scalars.answers import OF_THE_TARGET, Competitors, answer_scalars, check_scalar_names
from circuit.scalars.functional_write import (
    REFERENCES,
    TARGETS,
    FunctionalWrite,
    Reference,
    Target,
    WritePath,
    WriteReads,
    readout_gradient,
)
from circuit.schemas import ScalarPairRow, read_typed_rows
from circuit.tasks.pairs import Pair, check_side
from circuit.tasks.positions import Batch, check_roles
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

COMMAND = "mlp-functional-write-adam-state-attribution"


@dataclass(frozen=True)
class WriteOptions:
    """Which write is followed, and through which readout (definitions.md section 5).

    Attributes:
        source, mlp: the write path, such as `L1H3` and `L1MLP`.
        reference_step: step at which the readout gradients are frozen.
        role: positions that are summed over.
        scalars: answer scalars that are read out.
        endpoints: with scalar rows, the end of an interval that the reference step is.
        reference_vector, target_vector: the gradient, and the delta that it is multiplied with.
        side: of the pairs.
        pairs: which pairs are built.
    """

    source: str
    mlp: str
    reference_step: int
    role: str = "prediction"
    scalars: tuple[str, ...] = ("fixed_source_competitor_margin",)
    endpoints: tuple[str, ...] = ("source",)
    reference_vector: Reference = "post_mlp_gradient"
    target_vector: Target = "post_mlp_total_delta"
    side: str = "clean"
    pairs: PairOptions = field(default_factory=PairOptions)

    def __post_init__(self) -> None:
        WritePath.parse(self.source, self.mlp)
        check_scalar_names(self.scalars)
        for name, given, valid in (
            ("reference vector", [self.reference_vector], REFERENCES),
            ("target vector", [self.target_vector], TARGETS),
            ("endpoint role", self.endpoints, ENDPOINTS),
        ):
            for value in given:
                if value not in valid:
                    raise CircuitError(f"unknown {name} '{value}'", expected=", ".join(valid))
        check_roles(self.role)
        check_side(self.side)

    def to_json(self) -> dict[str, Any]:
        """The parameters as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class WriteScalars:
    """Makes the scalars of an attribution of functional writes (a `ScalarSource`).

    Without scalar rows the reference step is all that is known of an interval: its source.
    """

    config: TrainConfig
    probe_set: Path
    options: WriteOptions
    scalar_pair_rows: Path | None = None

    def __post_init__(self) -> None:
        if self.scalar_pair_rows is not None:
            return
        of_both = [f"endpoint role '{end}'" for end in self.options.endpoints if end == "target"]
        of_both += [f"scalar '{name}'" for name in self.options.scalars if name in OF_THE_TARGET]
        if of_both:
            raise CircuitError(
                f"{of_both[0]} needs the other end of an interval",
                fix="pass --scalar-pair-rows of answer-scalar-residual-diagnosis",
            )

    def inputs(self, run: ReplayedRun) -> Inputs:
        """Of the trace; first refuses what its model or its steps do not have.

        Raises:
            CircuitError: names the component or the step.
        """
        model = run.config.model
        shape = (model.layers, model.heads)
        WritePath.parse(self.options.source, self.options.mlp, shape=shape)
        run.check_addressable(self.options.reference_step)
        return traced_inputs(self.config, self.probe_set, run)

    def scalars(self, inputs: Inputs) -> list[FunctionalWrite]:
        """The scalars on a trace: readout gradients at the reference step, then frozen."""
        options = self.options
        point = inputs.point(options.reference_step)
        model = point.model
        path = WritePath.parse(options.source, options.mlp, model)
        pairs = inputs.pairs(options.pairs)
        batch = inputs.side(pairs, options.side)
        reads = WriteReads.of(batch, options.role)
        values = inputs.vocabulary.value_ids
        output = options.reference_vector == "post_mlp_gradient"
        stage = path.output_stage if output else path.input_stage
        found = []
        for endpoint in options.endpoints:
            competitors = self._competitors(point, batch, pairs, endpoint, values)
            for name in options.scalars:
                readout = partial(
                    _scalar,
                    answer=batch.reads.answer,
                    competitors=competitors,
                    values=values,
                    name=name,
                )
                reference = readout_gradient(model, reads, path, stage, readout)
                found.append(
                    FunctionalWrite(
                        path,
                        reads,
                        reference,
                        layers=inputs.config.model.layers,
                        target=options.target_vector,
                        name=f"functional_write.{path}.{name}.{endpoint}",
                    )
                )
        return found

    def _competitors(
        self,
        point: Checkpointed,
        batch: Batch,
        pairs: Sequence[Pair],
        endpoint: str,
        values: range,
    ) -> Competitors:
        """Of each pair: from the scalar rows if given, else the model's at the reference step."""
        if self.scalar_pair_rows is None:
            with torch.no_grad():
                logits = point.model(batch.tokens)[batch.reads.row, batch.reads.key_pos]
            own = read_answers(logits, batch.reads.answer, values).competitor
            return Competitors(own, own)
        intervals = read_interval_at(
            self.scalar_pair_rows,
            pairs,
            side=self.options.side,
            endpoint=endpoint,
            step=point.step,
        )
        intervals.weights([endpoint])[point.step].check(point, self.scalar_pair_rows)
        intervals.check_tokens(batch, values)
        source, target = (
            torch.tensor(
                [getattr(row, f"{end}_competitor") for row in intervals.first],
                device=batch.tokens.device,
            )
            for end in ENDPOINTS
        )
        return Competitors(source, target)


def _scalar(
    logits: Tensor, *, answer: Tensor, competitors: Competitors, values: range, name: str
) -> Tensor:
    return answer_scalars(logits, answer, competitors, values)[name]


def _digest(scalar_pair_rows: Path) -> str:
    read_typed_rows(scalar_pair_rows, ScalarPairRow)  # says what is wrong with the file
    return hashlib.sha256(scalar_pair_rows.read_bytes()).hexdigest()


def mlp_functional_write_adam_state_attribution(
    config: TrainConfig,
    probe_set: Path,
    trace: Path,
    output_dir: str | Path,
    options: WriteOptions,
    *,
    scalar_pair_rows: Path | None = None,
    window: WindowOptions = WindowOptions(),  # noqa: B008  frozen
    path: str = "simpson",
    partitions: tuple[Partition, ...] = ("circuit",),
    loss_scope: LossScope = "full_lm",
    overwrite: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> ReportResult:
    """Attribute a functional write over a window of a trace.

    Args:
        scalar_pair_rows: rows of `answer-scalar-residual-diagnosis`, for the competitors; None
            computes them at the reference step.

    Raises:
        CircuitError: as `report_attribution`.
    """
    source = WriteScalars(config, probe_set, options, scalar_pair_rows)
    rows = None if scalar_pair_rows is None else str(scalar_pair_rows)

    def provenance(inputs: Inputs) -> dict[str, Any]:
        found: dict[str, Any] = {"pairs": len(inputs.pairs(options.pairs))}
        if scalar_pair_rows is not None:  # shards that took competitors from others do not merge
            found["scalar_pair_rows_sha256"] = _digest(scalar_pair_rows)
        return found

    return report_attribution(
        COMMAND,
        Job(trace, source, path, partitions, loss_scope),
        window,
        output_dir,
        parameters={
            "probe_set": str(probe_set),
            "optimizer_trace_dir": str(trace),
            "scalar_pair_rows": rows,
            **options.to_json(),
        },
        provenance=provenance,
        overwrite=overwrite,
        progress=progress,
    )
