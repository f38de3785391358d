"""write-path-selection: the final functional write of every path from a head through an MLP.

Every head with every MLP of the same or a later layer is a candidate path; its score is the mean
over pairs of `g_out . δ_total` at the checkpoint itself (definitions.md section 5). All heads are
ablated in one batch, and all readout gradients of one MLP are taken in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from circuit.figures.comparison import ranked_bars
from circuit.lazy import torch
from circuit.model.components import Component, all_heads, parse_component
from circuit.model.readout import read_answers
from circuit.model.stages import run_from, stage_hook
from circuit.reports.base import ReportResult, open_report
from circuit.reports.inputs import PairOptions, open_inputs
from circuit.scalars.answers import FIXED_SOURCE, Competitors, fixed_scalars
from circuit.scalars.functional_write import WritePath, WriteReads
from circuit.studies.selection import name_roles, rank_candidates
from circuit.tasks.pairs import check_side
from circuit.tasks.positions import Batch, check_roles
from circuit.train_config import TrainConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformer_lens import HookedTransformer
    from transformer_lens.hook_points import HookPoint

COMMAND = "write-path-selection"
_ROWS = 512
"""Sequences of one forward or backward pass, at most."""


@dataclass(frozen=True)
class ScanOptions:
    """Which writes are compared.

    Attributes:
        role: positions that are summed over.
        side: of the pairs.
        pairs: which pairs are built.
    """

    role: str = "prediction"
    side: str = "clean"
    pairs: PairOptions = field(default_factory=PairOptions)

    def __post_init__(self) -> None:
        check_roles(self.role)
        check_side(self.side)


def write_paths(model: HookedTransformer) -> list[WritePath]:
    """Every head with every MLP of its own or a later layer."""
    mlps = [parse_component(f"L{layer}MLP", model) for layer in range(model.cfg.n_layers)]
    return [
        WritePath(head, mlp) for mlp in mlps for head in all_heads(model) if head.layer <= mlp.layer
    ]


def final_writes(
    model: HookedTransformer, batch: Batch, role: str, values: range
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
        competitor = read_answers(at, batch.reads.answer, values).competitor
        heads = all_heads(model)
        ablated = dict(_without(model, reads.tokens, heads))
    found = {}
    for path in write_paths(model):
        found[str(path)] = torch.zeros(len(reads.row), dtype=torch.float64)
    for layer in range(model.cfg.n_layers):
        stage = f"layer_{layer}_post_mlp"
        before = [head for head in heads if head.layer <= layer]
        held = torch.stack([ablated[str(head)][stage] for head in before])
        delta = (stages[stage] - held)[:, reads.row]
        gradient = _readouts(model, stage, held, batch, reads, competitor)
        for index, head in enumerate(before):
            products = reads.gather_own(gradient[index]) * reads.gather_own(delta[index])
            path = WritePath(head, parse_component(f"L{layer}MLP", model))
            found[str(path)] = products.sum((1, 2)).double().cpu()
    return found


def _stages(model: HookedTransformer, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    names = [f"layer_{layer}_post_mlp" for layer in range(model.cfg.n_layers)]
    hooks = {name: stage_hook(name, model.cfg.n_layers) for name in names}
    logits, cache = model.run_with_cache(
        tokens, names_filter=list(hooks.values()), return_cache_object=False
    )
    return cast("Tensor", logits), {name: cache[hook] for name, hook in hooks.items()}


def _without(
    model: HookedTransformer, tokens: Tensor, heads: Sequence[Component]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The stages with each head ablated; several heads share a pass, each in rows of its own."""
    several = max(1, _ROWS // len(tokens))
    for start in range(0, len(heads), several):
        chosen = heads[start : start + several]

        def zero(value: Tensor, hook: HookPoint, chosen: Sequence[Component] = chosen) -> Tensor:
            changed = value.clone()
            for place, head in enumerate(chosen):
                if head.hook_name == hook.name:
                    rows = slice(place * len(tokens), (place + 1) * len(tokens))
                    changed[rows, :, head.head] = 0
            return changed

        hooks = {head.hook_name for head in chosen}
        with model.hooks(fwd_hooks=[(name, zero) for name in sorted(hooks)]):
            _, stages = _stages(model, tokens.repeat(len(chosen), 1))
        for place, head in enumerate(chosen):
            rows = slice(place * len(tokens), (place + 1) * len(tokens))
            yield str(head), {name: value[rows] for name, value in stages.items()}


def _readouts(
    model: HookedTransformer,
    stage: str,
    held: Float[Tensor, "head sequence pos d_model"],
    batch: Batch,
    reads: WriteReads,
    competitor: Tensor,
) -> Float[Tensor, "head read pos d_model"]:
    """Gradient of the fixed margin at a held stage, for every head; each read in its own row."""
    heads, count = len(held), len(reads.row)
    rows = held[:, reads.row].flatten(0, 1)
    row = torch.arange(count, device=rows.device).repeat(heads)
    found = []
    for some, which in zip(torch.split(rows, _ROWS), torch.split(row, _ROWS), strict=True):
        leaf = some.detach().requires_grad_()
        logits = run_from(model, stage, leaf)
        at = logits[torch.arange(len(leaf), device=leaf.device), reads.prediction[which]]
        rivals = Competitors(competitor[which], competitor[which])
        scalar = fixed_scalars(at, batch.reads.answer[which], rivals)[FIXED_SOURCE]
        found.append(torch.autograd.grad(scalar.sum(), leaf)[0])
    return torch.cat(found).reshape(heads, count, *held.shape[2:])


def select_write_paths(
    config: TrainConfig,
    probe_set: Path,
    checkpoint: Path,
    output_dir: str | Path,
    options: ScanOptions,
    *,
    overwrite: bool = False,
) -> ReportResult:
    """Measure every path's write at a checkpoint, rank them, and name the winner.

    Raises:
        CircuitError: a checkpoint or probe set of another config, or too few pairs.
    """
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        inputs = open_inputs(config, probe_set, checkpoints=[checkpoint])
        pairs = inputs.pairs(options.pairs)
        batch = inputs.side(pairs, options.side)
        (point,) = inputs.models([checkpoint])
        writes = final_writes(point.model, batch, options.role, inputs.vocabulary.value_ids)
        means = {path: float(values.mean()) for path, values in writes.items()}
        ranked = rank_candidates(means)
        roles = name_roles(ranked)
        role_of = {path: role for role, path in reversed(roles.items())}
        table = [
            {
                "place": place,
                "path": path,
                "role": role_of.get(path),
                "final_write": means[path],
                "positive_share": float((writes[path] > 0).double().mean()),
            }
            for place, path in enumerate(ranked, start=1)
        ]
        selected = {
            role: {"path": path, "final_write": means[path]} for role, path in roles.items()
        }
        return writer.write(
            parameters={
                "probe_set": str(probe_set),
                "checkpoint": str(checkpoint),
                "scalar": FIXED_SOURCE,
                **asdict(options),
            },
            summary={
                "step": point.step,
                "pairs": len(pairs),
                "candidates": len(ranked),
                "selected": selected,
            },
            rows=table,
            page=_page(table, point.step, len(pairs)),
            figures={
                "final_writes": ranked_bars(
                    means,
                    title=f"final functional write of every path, step {point.step}",
                    label="mean of g_out . δ_total (logits)",
                )
            },
            provenance=inputs.provenance() | {"weights_sha256": point.digest},
        )


def _page(table: Sequence[Mapping[str, Any]], step: int, pairs: int) -> list[str]:
    lines = [
        f"{len(table)} paths, {pairs} pairs, step {step}. The write of **{table[0]['path']}** is"
        f" read out most: {table[0]['final_write']:+.4g} logits of margin.",
        "",
        "![final writes](final_writes.svg)",
        "",
        "| place | path | role | final write | positive in |",
        "|---:|---|---|---:|---:|",
    ]
    lines += [
        f"| {row['place']} | {row['path']} | {row['role'] or ''} | {row['final_write']:+.4g}"
        f" | {100 * row['positive_share']:.0f} % |"
        for row in table
    ]
    return lines
