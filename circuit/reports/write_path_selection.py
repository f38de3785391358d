"""write-path-selection: the final functional write of every path from a head through an MLP.

Every head with every MLP of the same or a later layer is a candidate path; its score is the mean
over pairs of `g_out . δ_total` at the checkpoint itself (definitions.md section 5). All heads are
ablated in one batch, and all readout gradients of one MLP are taken in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from circuit import options
from circuit.artifacts import Row
from circuit.core.intervals import RecordDraws
from circuit.errors import CircuitError
from circuit.figures.charts import Chart
from circuit.lazy import torch
from circuit.model.components import Component, Hook, all_heads, parse_component
from circuit.model.readout import read_answers
from circuit.model.stages import run_from, stage_hook
from circuit.reports.inputs import Checkpointed, open_inputs
from circuit.reports.intervals import (
    apart,
    ends,
    ends_of,
    how_drawn,
    note,
    said_between,
)
from circuit.reports.ranking import ranked_bars, ranked_rows, selected, selection_tables
from circuit.reports.report import Findings, Report, Results
from circuit.reports.tables import Columns, Table
from circuit.scalars.answers import FIXED_SOURCE, Competitors, fixed_scalars
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.functional_write import (
    FunctionalWrite,
    WritePath,
    WriteReads,
    readout_gradient,
)
from circuit.tasks.examples import Examples
from circuit.tasks.pairs import record_of
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformer_lens import HookedTransformer
    from transformer_lens.hook_points import HookPoint

_ROWS = 512
"""Sequences of one forward or backward pass, at most."""


class WritePathOptions(options.ProbeOptions, options.PairOptions):
    """At which checkpoint writes are compared, and over which positions of which pairs."""

    checkpoint: Annotated[
        Path,
        options.Option("Checkpoint, also any addressable step of a trace.", kind="checkpoint"),
    ]
    position_role: Annotated[
        str,
        options.Option("Positions that are summed over.", kind="role", earlier="role"),
    ] = "prediction"
    record_side: options.RecordSide = "clean"

    def check_model(self, shape: ModelConfig) -> None:
        """Also refuses a model without MLPs."""
        super().check_model(shape)
        if shape.attention_only:
            raise CircuitError(
                "no path writes to an MLP, for the model has none",
                where="`model.d_ff`",
                expected="more than 0",
            )


class WritePathSelection(Report[WritePathOptions]):
    """Which path from a head through an MLP writes most for the answer at a checkpoint."""

    command = "write-path-selection"
    Options = WritePathOptions
    names = ("study select-write-paths",)
    panel = "Study"
    title = "Write paths"
    question = "Which head's write, through which MLP, does the answer read most?"

    def prepare(self) -> None:
        options = self.options
        self.inputs = open_inputs(
            self.config,
            options.probe_set,
            splits=options.splits or None,
            half=options.half,
            checkpoints=[options.checkpoint],
        )
        options.check_task(self.inputs.task)
        self.pairs = self.inputs.pairs(options)

    def points(self) -> Iterator[Checkpointed]:
        for point in self.inputs.models([self.options.checkpoint]):
            self.step, self.digest = point.step, point.digest
            yield point

    @property
    def total(self) -> int:
        return 1

    def measure(self, point: Checkpointed) -> list[Row]:
        model, role = point.model, self.options.position_role
        batch = self.inputs.side(self.pairs, self.options.record_side)
        values = self.inputs.task.choices
        writes = final_writes(model, batch, role, values)
        self.draws = RecordDraws([record_of(pair.pair_id) for pair in self.pairs])
        intervals = self.draws.means(torch.stack(list(writes.values()), 1))
        columns = {
            path: {
                "final_write": float(write.mean()),
                "positive_share": float((write > 0).double().mean()),
                **ends({"final_write": interval}),
            }
            for (path, write), interval in zip(writes.items(), intervals, strict=True)
        }
        scores = {path: float(write.mean()) for path, write in writes.items()}
        rows = ranked_rows("path", scores, columns)
        (winner,) = (path for path in write_paths(model) if str(path) == rows[0]["path"])
        alone = write_alone(model, batch, role, values, winner)
        together = writes[str(winner)]
        self.gap = float((together - alone).abs().max())
        self.largest = float(together.abs().max())
        return rows

    def conclude(self, rows: list[Row]) -> Findings:
        summary = {
            "step": self.step,
            "pairs": len(self.pairs),
            "candidates": len(rows),
            "selected": selected("path", rows, "final_write", *ends_of("final_write")),
            "bootstrap": how_drawn(self.draws.records),
        }
        law = (
            f"the write of {rows[0]['path']}, all heads ablated in one batch, is that of this path"
            f" alone, to {self.gap:.1g} of writes up to {self.largest:.3g}, in every pair"
        )
        rows, further = apart(self, rows, "path")
        return Findings(rows, summary, law, further, {"weights_sha256": self.digest})

    def provenance(self) -> dict[str, str]:
        return self.inputs.provenance()

    @classmethod
    def notes(cls, results: Results[WritePathOptions]) -> list[str]:
        summary, winner = results.summary, results.summary["selected"]["winner"]
        return [
            f"{summary['candidates']} paths, {summary['pairs']} pairs, step {summary['step']}. The"
            f" write of **{winner['path']}** is read out most: {winner['final_write']:+.4g}"
            f"{said_between(winner, 'final_write', '+.4g')} logits of margin.",
            *note(results),
        ]

    @classmethod
    def tables(cls, results: Results[WritePathOptions]) -> list[Table]:
        columns: Columns = {
            "place": "place",
            "path": "path",
            "role": "role",
            "final_write": ("final write", "+.4g"),
            "positive_share": ("positive in", ".0%"),
        }
        return selection_tables("path", "final_write", columns, results)

    @classmethod
    def charts(cls, results: Results[WritePathOptions]) -> list[Chart]:
        title = f"final functional write of every path, step {results.summary['step']}"
        label = "mean of g_out . δ_total (logits)"
        rows = list(results.rows())
        return [ranked_bars("final_writes", title, rows, "path", "final_write", label)]


def write_paths(model: HookedTransformer) -> list[WritePath]:
    """Every head with every MLP of its own or a later layer."""
    mlps = [parse_component(f"L{layer}MLP", model) for layer in range(model.cfg.n_layers)]
    return [
        WritePath(head, mlp) for mlp in mlps for head in all_heads(model) if head.layer <= mlp.layer
    ]


def final_writes(
    model: HookedTransformer, batch: Examples, role: str, values: range
) -> dict[str, Float[Tensor, " read"]]:
    """`g_out . δ_total` of every path for each read, the readout being the fixed margin.

    The competitor of a read is the model's own; `g_out` is the gradient with the output stage held
    at its value without the head.

    Args:
        values: the value tokens.
    """
    reads = WriteReads.of(batch, role)
    with torch.no_grad():
        logits, stages = _stages(model, reads.tokens)
        at = logits[reads.row, reads.prediction]
        competitor = read_answers(at, batch.answer, values).competitor
        heads = all_heads(model)
        ablated = dict(_without(model, reads.tokens, heads))
    writes = {}
    for path in write_paths(model):
        writes[str(path)] = torch.zeros(len(reads.row), dtype=torch.float64)
    for layer in range(model.cfg.n_layers):
        stage = f"layer_{layer}_post_mlp"
        before = [head for head in heads if head.layer <= layer]
        held = torch.stack([ablated[str(head)][stage] for head in before])
        delta = (stages[stage] - held)[:, reads.row]
        gradient = _readouts(model, stage, held, batch, reads, competitor)
        for index, head in enumerate(before):
            products = reads.gather_own(gradient[index]) * reads.gather_own(delta[index])
            path = WritePath(head, parse_component(f"L{layer}MLP", model))
            writes[str(path)] = products.sum((1, 2)).double().cpu()
    return writes


def _stages(model: HookedTransformer, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    names = [f"layer_{layer}_post_mlp" for layer in range(model.cfg.n_layers)]
    hooks = {name: stage_hook(name, model.cfg.n_layers) for name in names}
    logits, cache = model.run_with_cache(
        tokens, names_filter=list(hooks.values()), return_cache_object=False
    )
    return cast("Tensor", logits), {name: cache[hook] for name, hook in hooks.items()}


def _zeroed(head: Component, rows: slice) -> Hook:
    """The hook that ablates a head in some rows of the batch."""

    def zero(value: Tensor, hook: HookPoint) -> Tensor:
        changed = value.clone()
        changed[rows, :, head.head] = 0
        return changed

    return head.hook_name, zero


def _without(
    model: HookedTransformer, tokens: Tensor, heads: Sequence[Component]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The stages with each head ablated; several heads share a pass, each in rows of its own."""
    several = max(1, _ROWS // len(tokens))
    for start in range(0, len(heads), several):
        chosen = heads[start : start + several]
        width = len(tokens)
        hooks = [_zeroed(h, slice(i * width, (i + 1) * width)) for i, h in enumerate(chosen)]
        with model.hooks(fwd_hooks=hooks):
            _, stages = _stages(model, tokens.repeat(len(chosen), 1))
        for place, head in enumerate(chosen):
            rows = slice(place * len(tokens), (place + 1) * len(tokens))
            yield str(head), {name: value[rows] for name, value in stages.items()}


def _readouts(
    model: HookedTransformer,
    stage: str,
    held: Float[Tensor, "head sequence pos d_model"],
    batch: Examples,
    reads: WriteReads,
    competitor: Tensor,
) -> Float[Tensor, "head read pos d_model"]:
    """Gradient of the fixed margin at a held stage, for every head; each read in its own row."""
    heads, count = len(held), len(reads.row)
    rows = held[:, reads.row].flatten(0, 1)
    row = torch.arange(count, device=rows.device).repeat(heads)
    gradients = []
    for some, which in zip(torch.split(rows, _ROWS), torch.split(row, _ROWS), strict=True):
        leaf = some.detach().requires_grad_()
        logits = run_from(model, stage, leaf)
        at = logits[torch.arange(len(leaf), device=leaf.device), reads.prediction[which]]
        margin = _fixed_margin(at, answer=batch.answer[which], competitor=competitor[which])
        gradients.append(torch.autograd.grad(margin.sum(), leaf)[0])
    return torch.cat(gradients).reshape(heads, count, *held.shape[2:])


def write_alone(
    model: HookedTransformer, batch: Examples, role: str, values: range, path: WritePath
) -> Float[Tensor, " read"]:
    """The same of one path, its head ablated in a pass of its own."""
    reads = WriteReads.of(batch, role)
    with torch.no_grad():
        at = model(reads.tokens)[reads.row, reads.prediction]
        competitor = read_answers(at, batch.answer, values).competitor
    margin = partial(_fixed_margin, answer=batch.answer, competitor=competitor)
    gradient = readout_gradient(model, reads, path, path.output_stage, margin)
    scalar = FunctionalWrite(path, reads, gradient, layers=model.cfg.n_layers)
    return evaluate_scalar(scalar, model).detach().double().cpu()


def _fixed_margin(logits: Tensor, *, answer: Tensor, competitor: Tensor) -> Tensor:
    """The margin over a competitor that stays the one it was."""
    return fixed_scalars(logits, answer, Competitors(competitor, competitor))[FIXED_SOURCE]
