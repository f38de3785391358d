"""Functional write: how much of what a component writes is read by the answer (definitions.md 5).

`δ` is a stage of the residual stream with a source component minus the same with it ablated. A
*readout gradient* `g` says how an answer scalar depends on that stage: the gradient with respect to
the stage, held at its ablated value at all positions, with the rest of the network running on from
it. Frozen at a reference step it gives the scalar `mean over pairs of g_ref . δ(theta)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

from circuit import options
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.components import Component, parse_component
from circuit.model.readout import read_answers
from circuit.model.stages import run_from, stage_hook
from circuit.reading import file_digest
from circuit.scalars.answers import (
    ANSWER_SCALARS,
    FIXED_SOURCE,
    OF_THE_TARGET,
    Competitors,
    answer_scalars,
)
from circuit.scalars.base import Cache, Needs, forward_activations
from circuit.scalars.family import ScalarFamily
from circuit.schemas import ScalarPairRow, read_typed_rows
from circuit.tasks.examples import Examples
from circuit.tasks.pairs import Pair

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer
    from transformer_lens.hook_points import HookPoint

    from circuit.reports.inputs import Checkpointed, Inputs
    from circuit.runs.base import Replayable
    from circuit.train_config import ModelConfig

Target = Literal["post_mlp_total_delta", "mlp_output_delta", "input_delta"]
Reference = Literal["post_mlp_gradient", "input_gradient"]
TARGETS: tuple[Target, ...] = get_args(Target)
REFERENCES: tuple[Reference, ...] = get_args(Reference)

ReadScalar: TypeAlias = "Callable[[Float[Tensor, 'read vocab']], Float[Tensor, ' read']]"
"""An answer scalar of the logits at the prediction positions."""


@dataclass(frozen=True)
class WritePath:
    """A source component and an MLP of the same or a later layer."""

    source: Component
    mlp: Component

    @classmethod
    def parse(
        cls,
        source: str,
        mlp: str,
        model: HookedTransformer | None = None,
        *,
        shape: ModelConfig | None = None,
    ) -> WritePath:
        """A path from two addresses, such as `L1H3` and `L1MLP`.

        Args:
            model, shape: that the addresses must exist in; see `parse_component`.

        Raises:
            CircuitError: an address is malformed or not in the model, the second is no MLP, or the
                source does not write before it.
        """
        path = cls(*(parse_component(address, model, shape=shape) for address in (source, mlp)))
        if path.mlp.head is not None:
            raise CircuitError(f"component '{mlp}' is a head", expected="an MLP, such as L1MLP")
        before = path.source.layer < path.mlp.layer or (
            path.source.layer == path.mlp.layer and path.source.head is not None
        )
        if not before:
            raise CircuitError(
                f"'{source}' does not write before '{mlp}'",
                expected="a head of the same or an earlier layer, or an earlier MLP",
            )
        return path

    @property
    def input_stage(self) -> str:
        """The stage that the MLP reads."""
        return f"layer_{self.mlp.layer}_post_attn"

    @property
    def output_stage(self) -> str:
        """The stage behind the MLP."""
        return f"layer_{self.mlp.layer}_post_mlp"

    def __str__(self) -> str:
        return f"{self.source}_to_{self.mlp}"


@dataclass(frozen=True)
class WriteReads:
    """Reads whose writes are followed, and the positions of a role.

    Attributes:
        sequences: distinct token sequences.
        row: sequence of each read.
        prediction: its prediction position.
        positions, real: positions of the role, padded with 0, and which of them are real.
    """

    sequences: tuple[tuple[int, ...], ...]
    tokens: Int[Tensor, "sequence pos"]
    row: Int[Tensor, " read"]
    prediction: Int[Tensor, " read"]
    positions: Int[Tensor, "read slot"]
    real: Bool[Tensor, "read slot"]

    @classmethod
    def of(cls, batch: Examples, role: str) -> WriteReads:
        """The reads of a batch.

        Raises:
            CircuitError: there is no such role.
        """
        positions, real = batch.positions(role)
        return cls(batch.sequences(), batch.tokens, batch.row, batch.at, positions, real)

    def gather(
        self, activations: Float[Tensor, "sequence pos d_model"]
    ) -> Float[Tensor, "read slot d_model"]:
        """The vectors at the role's positions, zero where a slot is not real."""
        return activations[self.row[:, None], self.positions] * self.real[..., None]

    def gather_own(
        self, vectors: Float[Tensor, "read pos d_model"]
    ) -> Float[Tensor, "read slot d_model"]:
        """The same of vectors that stand in one row a read."""
        every = torch.arange(len(self.row), device=vectors.device)
        return vectors[every[:, None], self.positions] * self.real[..., None]

    def to(self, device: torch.device | str) -> WriteReads:
        """The same reads with every tensor on `device`."""
        tensors = (self.tokens, self.row, self.prediction, self.positions, self.real)
        return WriteReads(self.sequences, *(tensor.to(device) for tensor in tensors))


def deltas(cache: Cache, path: WritePath, layers: int) -> dict[Target, Tensor]:
    """`δ_in`, `δ_mlp` and `δ_total` `[sequence, pos, d_model]` at every position."""
    ablated = cache.without(str(path.source))
    entering, leaving = (stage_hook(s, layers) for s in (path.input_stage, path.output_stage))
    total = cache[leaving] - ablated[leaving]
    into = cache[entering] - ablated[entering]
    return {
        "post_mlp_total_delta": total,
        "mlp_output_delta": total - into,
        "input_delta": into,
    }


def readout_gradient(
    model: HookedTransformer,
    reads: WriteReads,
    path: WritePath,
    stage: str,
    scalar: ReadScalar,
) -> Float[Tensor, "read slot d_model"]:
    """Gradient of an answer scalar with respect to a stage, at the role's positions of each read.

    The stage is held at its value with the source ablated; each read runs in its own row, so that
    reads of one sequence do not mix.
    """
    hook, tokens = stage_hook(stage, model.cfg.n_layers), reads.tokens[reads.row]
    with torch.no_grad():
        held = forward_activations(
            model, reads.tokens, frozenset([hook]), ablated=str(path.source)
        )[hook]
    leaf = held[reads.row].detach().requires_grad_()

    def replace(value: Tensor, hook: HookPoint) -> Tensor:
        return leaf

    logits = model.run_with_hooks(tokens, fwd_hooks=[(hook, replace)])
    every = torch.arange(len(reads.row), device=tokens.device)
    # rows do not mix, so that the sum's gradient [read, pos, d_model] is each read's own
    (gradient,) = torch.autograd.grad(scalar(logits[every, reads.prediction]).sum(), leaf)
    return gradient[every[:, None], reads.positions] * reads.real[..., None]


@dataclass(frozen=True)
class ReadoutGradients:
    """One answer scalar with the source ablated, and its gradients at every position of each read.

    Attributes:
        value: of the scalar, one a read.
        into: `g_in`, with respect to the MLP's input stage.
        out: `g_out`, with respect to its output stage.
    """

    value: Float[Tensor, " read"]
    into: Float[Tensor, "read pos d_model"]
    out: Float[Tensor, "read pos d_model"]


def readout_gradients(
    model: HookedTransformer,
    reads: WriteReads,
    path: WritePath,
    held: Float[Tensor, "sequence pos d_model"],
    scalars: Sequence[ReadScalar],
) -> list[ReadoutGradients]:
    """`readout_gradient` at both stages for several scalars, from one forward pass.

    An input stage that is held at its ablated value at all positions makes the output stage take
    its ablated value, so that one run on from it has both gradients.

    Args:
        reads: of any role; all positions are returned.
        held: the input stage with the source ablated.
    """
    outs: list[Tensor] = []

    def keep(value: Tensor, hook: HookPoint) -> None:
        outs.append(value)

    leaf = held[reads.row].detach().requires_grad_()  # [read, pos, d_model]: a row for each read
    leaving = stage_hook(path.output_stage, model.cfg.n_layers)
    with model.hooks(fwd_hooks=[(leaving, keep)]):
        logits = run_from(model, path.input_stage, leaf)
    at_prediction = logits[torch.arange(len(leaf), device=leaf.device), reads.prediction]
    gradients = []
    for scalar in scalars:
        value = scalar(at_prediction)
        g_in, g_out = torch.autograd.grad(value.sum(), (leaf, outs[0]), retain_graph=True)
        gradients.append(ReadoutGradients(value.detach(), g_in, g_out))
    return gradients


class FunctionalWrite:
    """`g_ref . δ(theta)` of one write path, a number for each read; it telescopes."""

    constant = True

    def __init__(
        self,
        path: WritePath,
        reads: WriteReads,
        reference: Float[Tensor, "read slot d_model"],
        *,
        layers: int,
        target: Target = "post_mlp_total_delta",
        name: str | None = None,
    ) -> None:
        """Describe the scalar.

        Args:
            reference: frozen readout gradient at the role's positions.
            layers: of the model.
            target: which delta it is multiplied with.

        Raises:
            CircuitError: there is no such target.
        """
        if target not in TARGETS:
            raise CircuitError(f"unknown target vector '{target}'", expected=", ".join(TARGETS))
        self.path, self.reads, self.reference = path, reads, reference.detach()
        self.layers, self.target = layers, target
        self.name = name or f"functional_write.{path}.{target}"
        hooks = tuple(stage_hook(s, layers) for s in (path.input_stage, path.output_stage))
        self.needs = Needs(reads.sequences, hooks, ablations=(str(path.source),))

    def bind(self, model: HookedTransformer) -> FunctionalWrite:
        """Nothing depends on the step: the reference is frozen."""
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """`sum over the role's positions of g_ref . δ`, one per read."""
        delta = self.reads.gather(deltas(cache, self.path, self.layers)[self.target])
        return (self.reference.to(delta.dtype) * delta).sum((1, 2))


# --- the family -----------------------------------------------------------------------------------


class FunctionalWrites(ScalarFamily, options.PairOptions):
    """Which write is followed, and through which readout (definitions.md section 5).

    Without scalar rows the reference step is all that is known of an interval: its source.
    """

    source_component: Annotated[
        str,
        options.Option("Component whose write is followed.", kind="component", earlier="source"),
    ]
    component: Annotated[str, options.Option("MLP that reads it.", kind="mlp", earlier="mlp")]
    reference_step: Annotated[
        int, options.Option("Step at which the readout gradients are frozen.", least=0)
    ]
    position_role: Annotated[
        str,
        options.Option("Role of the positions that are summed over.", kind="role", earlier="role"),
    ] = "prediction"
    scalars: Annotated[
        tuple[str, ...],
        options.Option("Answer scalar that is read out.", flag="--scalar", choices=ANSWER_SCALARS),
    ] = (FIXED_SOURCE,)
    endpoint_roles: Annotated[
        tuple[Literal["source", "target"], ...],
        options.Option(
            "End of an interval of the scalar rows.", flag="--endpoint-role", earlier="endpoints"
        ),
    ] = ("source",)
    reference_vector: Annotated[
        Reference, options.Option("post_mlp_gradient or input_gradient.")
    ] = "post_mlp_gradient"
    target_vector: Annotated[
        Target,
        options.Option("post_mlp_total_delta, mlp_output_delta or input_delta."),
    ] = "post_mlp_total_delta"
    record_side: options.RecordSide = "clean"
    scalar_pair_rows: Annotated[
        Path | None,
        options.Option(
            "Pair rows of answer-scalar-residual-diagnosis, for the competitors.",
            kind="scalar_pair_rows",
            unset="those of the reference step",
        ),
    ] = None

    def check(self) -> None:
        """The source writes before the MLP; only scalar rows know both ends of an interval."""
        super().check()
        WritePath.parse(self.source_component, self.component)
        if self.scalar_pair_rows is not None:
            return
        of_both: list[tuple[str, str]] = [
            ("endpoint_roles", end) for end in self.endpoint_roles if end == "target"
        ]
        of_both += [("scalars", name) for name in self.scalars if name in OF_THE_TARGET]
        for name, value in of_both:
            raise CircuitError(
                f"{value} needs the other end of an interval",
                where=f"`{name}`",
                fix="give `scalar_pair_rows` of answer-scalar-residual-diagnosis",
            )

    def check_run(self, run: Replayable) -> None:
        """The reference step has to be addressable."""
        run.check_addressable(self.reference_step)

    def build(self, inputs: Inputs) -> list[FunctionalWrite]:
        """One scalar an endpoint and answer scalar, with gradients of the reference step."""
        point = inputs.point(self.reference_step)
        path = WritePath.parse(self.source_component, self.component, point.model)
        pairs = inputs.pairs(self)
        batch = inputs.side(pairs, self.record_side)
        reads = WriteReads.of(batch, self.position_role)
        values = inputs.task.choices
        output = self.reference_vector == "post_mlp_gradient"
        stage = path.output_stage if output else path.input_stage
        writes = []
        for endpoint in self.endpoint_roles:
            competitors = self._competitors(point, batch, pairs, endpoint, values)
            for name in self.scalars:
                readout = partial(
                    _answer_scalar,
                    answer=batch.answer,
                    competitors=competitors,
                    values=values,
                    name=name,
                )
                writes.append(
                    FunctionalWrite(
                        path,
                        reads,
                        readout_gradient(point.model, reads, path, stage, readout),
                        layers=inputs.config.model.layers,
                        target=self.target_vector,
                        name=f"functional_write.{path}.{name}.{endpoint}",
                    )
                )
        return writes

    def _competitors(
        self,
        point: Checkpointed,
        batch: Examples,
        pairs: Sequence[Pair],
        endpoint: str,
        values: range,
    ) -> Competitors:
        """Of each pair: from the scalar rows if given, else the model's at the reference step."""
        # reads rows of writes, too, which are made of what stands above
        from circuit.scalars.interval_ends import ENDPOINTS, read_interval_at

        rows = self.scalar_pair_rows
        if rows is None:
            with torch.no_grad():
                logits = point.model(batch.tokens)[batch.row, batch.at]
            competitor = read_answers(logits, batch.answer, values).competitor
            return Competitors(competitor, competitor)
        intervals = read_interval_at(
            rows, pairs, side=self.record_side, endpoint=endpoint, step=point.step
        )
        intervals.weights([endpoint])[point.step].check(point, rows)
        intervals.check_tokens(batch, values)
        source, target = (
            torch.tensor(
                [getattr(row, f"{end}_competitor") for row in intervals.first],
                device=batch.tokens.device,
            )
            for end in ENDPOINTS
        )
        return Competitors(source, target)

    def provenance(self, inputs: Inputs) -> dict[str, Any]:
        """How many pairs there are; shards that took competitors from other rows do not merge."""
        facts: dict[str, Any] = {"pairs": len(inputs.pairs(self))}
        if self.scalar_pair_rows is not None:
            read_typed_rows(self.scalar_pair_rows, ScalarPairRow)  # says what is wrong with it
            facts["scalar_pair_rows_sha256"] = file_digest(self.scalar_pair_rows)
        return facts


def _answer_scalar(
    logits: Tensor, *, answer: Tensor, competitors: Competitors, values: range, name: str
) -> Tensor:
    return answer_scalars(logits, answer, competitors, values)[name]
