"""Attribution: scalars x traced steps -> what each term of each update did to each scalar.

For each step: (1) bind every scalar to the model before the step; (2) evaluate all scalars, and
their gradients with respect to all weights, at the nodes of the path rule, from one shared forward
pass a node; (3) take the dot products of these gradients with every term `u_k`, by atom of the flat
vector, in float64; (4) average them over the nodes to `G . u_k`. A group's share is the sum of its
atoms', so that every partition adds up.

An adaptive rule goes on, for each scalar by itself, until two rules agree, or differ by no more
than the rounding of the scalar itself: the forward passes are shared, but which nodes a scalar's
row is made of does not depend on who is followed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from circuit.attribution.losses import LOSS_SCOPES, LossScope
from circuit.core.flat import Flat, ParameterLayout
from circuit.core.groups import Atom, Partition, atoms
from circuit.core.module import load_buffers
from circuit.core.paths import PathRule, Quadrature, path_rule
from circuit.core.step import Step
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.scalars.base import BoundScalar, Measure, Scalar, SharedBatch, measured

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn
    from transformer_lens import HookedTransformer

AnyStep = TypeVar("AnyStep", bound=Step)
Shares: TypeAlias = "Float[Tensor, 'scalar term atom']"


@dataclass(frozen=True)
class StepAttribution:
    """What one step did to every scalar.

    Attributes:
        step: `t`.
        lr, clip: of the step.
        scalars, terms: names, along the first two axes of the shares.
        before, after: each scalar at `theta_{t-1}` and `theta_t`, both with this step's constants.
        constant: whether each scalar's constants are those of every step.
        first_order, path: contributions by scalar, term and atom, float64.
        references: first-order contributions of the vectors that are not in the sum.
        atom_list: the atoms.
        nodes: of the path rule, for each scalar.
        agrees: of an adaptive rule, whether two of its levels agree for each scalar; else None.
        rounded: of an adaptive rule, whether they differ by no more than the scalar's own rounding,
            where its tolerance asks for less; else None.
        average: `G`, the gradients averaged along the step, float64, where they were asked for.
    """

    step: int
    lr: float
    clip: float
    scalars: tuple[str, ...]
    terms: tuple[str, ...]
    reference_terms: tuple[str, ...]
    before: Float[Tensor, " scalar"]
    after: Float[Tensor, " scalar"]
    constant: tuple[bool, ...]
    first_order: Shares
    path: Shares
    references: Shares
    atom_list: list[Atom]
    nodes: tuple[int, ...]
    agrees: tuple[bool, ...] | None
    rounded: tuple[bool, ...] | None
    average: Float[Tensor, "scalar parameter"] | None = None

    @property
    def actual(self) -> Float[Tensor, " scalar"]:
        """The actual change of each scalar."""
        return self.after - self.before

    def rows(self, partitions: Sequence[Partition] = ()) -> list[dict[str, Any]]:
        """One JSON row a scalar."""
        return [self._row(index, partitions) for index in range(len(self.scalars))]

    def _row(self, index: int, partitions: Sequence[Partition]) -> dict[str, Any]:
        first, path = self.first_order[index], self.path[index]
        adapted = {}
        if self.agrees is not None and self.rounded is not None:
            adapted = {
                "nodes": self.nodes[index],
                "agrees": self.agrees[index],
                "rounded": self.rounded[index],
            }
        return {
            "step": self.step,
            "scalar": self.scalars[index],
            "lr": self.lr,
            "clip_factor": self.clip,
            "telescopes": self.constant[index],
            "before": float(self.before[index]),
            "after": float(self.after[index]),
            "actual": float(self.actual[index]),
            **adapted,
            "first_order": self._named(first),
            "path": self._named(path),
            "references": {
                name: float(share)
                for name, share in zip(
                    self.reference_terms, self.references[index].sum(1), strict=True
                )
            },
            "groups": {
                partition: self._grouped(first, path, partition) for partition in partitions
            },
        }

    def _named(self, shares: Float[Tensor, "term atom"]) -> dict[str, float]:
        by_term = zip(self.terms, shares.sum(1), strict=True)
        return {name: float(share) for name, share in by_term}

    def _grouped(
        self, first: Tensor, path: Tensor, partition: Partition
    ) -> dict[str, dict[str, dict[str, float]]]:
        members: dict[str, list[int]] = {}
        for place, atom in enumerate(self.atom_list):
            members.setdefault(atom.group(partition), []).append(place)
        return {
            group: {
                "first_order": self._named(first[:, places]),
                "path": self._named(path[:, places]),
            }
            for group, places in members.items()
        }


@dataclass(frozen=True)
class Way:
    """Some scalars along the straight way of a step.

    Attributes:
        before, after: values at its ends, float64.
        first: gradients at its start, of the model's dtype.
        first_order, path: contributions of the vectors that the step is the sum of.
        nodes, agrees, rounded, average: as in `StepAttribution`.
    """

    before: Float[Tensor, " scalar"]
    after: Float[Tensor, " scalar"]
    first: Float[Tensor, "scalar parameter"]
    first_order: Shares
    path: Shares
    nodes: tuple[int, ...]
    agrees: tuple[bool, ...] | None
    rounded: tuple[bool, ...] | None
    average: Float[Tensor, "scalar parameter"] | None


def check_loss_scope(scope: str) -> None:
    """Refuse a scope that does not exist.

    Raises:
        CircuitError: lists those that do.
    """
    if scope not in LOSS_SCOPES:
        raise CircuitError(f"unknown loss scope '{scope}'", expected=" or ".join(LOSS_SCOPES))


class Attributor:
    """Attributes the changes of scalars, step by step."""

    def __init__(
        self,
        model: nn.Module,
        scalars: Sequence[Scalar | Measure],
        *,
        rule: str = "simpson",
        loss_scope: LossScope = "full_lm",
        averages: bool = False,
    ) -> None:
        """Prepare the shared batch.

        Args:
            model: a module of the run's shape, all of whose parameters have gradients; its
                weights are overwritten at every node. In float64 the values are limited by the
                path rule alone.
            scalars: plain functions of the module count, too (`circuit.scalars.base.measured`).
            rule: of `circuit.core.paths.path_rule`.
            loss_scope: `answer` adds the reference `answer_raw_sgd`: what plain SGD on the loss
                at the answers alone would have done. The terms are always those of the update.
            averages: give the averaged gradients, too; those of all nodes are held for it.

        Raises:
            CircuitError: there is no such rule or scope.
        """
        check_loss_scope(loss_scope)
        self.model = cast("HookedTransformer", model)  # which scalars with activations need
        self.scalars = tuple(measured(scalar) for scalar in scalars)
        self.rule: PathRule = path_rule(rule)
        self.loss_scope = loss_scope
        self.averages = averages
        self.layout = ParameterLayout.of_model(model)
        self.atoms = atoms(self.layout)
        self._parameters = list(model.parameters())
        self._device, self._dtype = self._parameters[0].device, self._parameters[0].dtype
        self.batch = SharedBatch.merge(self.scalars, device=str(self._device))
        self._last: tuple[Flat, Tensor, Tensor] | None = None

    def step(self, traced: Step) -> StepAttribution:
        """Attribute one step."""
        theta, end = traced.before.parameters, traced.after.parameters
        self._load_buffers(traced.before.buffers)
        bound = self.bind(theta)
        terms, references = traced.update.named(), traced.update.references()
        vectors = torch.stack(list(terms.values()))
        if self.loss_scope == "answer":
            references["answer_raw_sgd"] = self._answer_gradient(traced).double() * -traced.lr
        way = self.along(theta, end, bound, vectors)
        return StepAttribution(
            step=traced.step,
            lr=traced.lr,
            clip=traced.clip,
            scalars=tuple(scalar.name for scalar in self.scalars),
            terms=tuple(terms),
            reference_terms=tuple(references),
            before=way.before,
            after=way.after,
            constant=tuple(b.constant for b in bound),
            first_order=way.first_order,
            path=way.path,
            references=_stacked(self._products(way.first, torch.stack(list(references.values())))),
            atom_list=self.atoms,
            nodes=way.nodes,
            agrees=way.agrees,
            rounded=way.rounded,
            average=way.average,
        )

    def along(
        self,
        theta: Flat,
        end: Flat,
        bound: Sequence[BoundScalar],
        vectors: Float[Tensor, "term parameter"],
    ) -> Way:
        """What vectors contribute to bound scalars on the straight way of their sum.

        Args:
            vectors: float64; `end` is `theta` and their sum.
        """
        delta, dtype = end.double() - theta.double(), self._dtype
        values: dict[float, Tensor] = {}
        ends: dict[float, Tensor] = {}  # gradients; of the nodes between, only products are kept
        between: dict[float, Tensor] = {}  # but for their average
        products: dict[float, list[Tensor]] = {}
        constant = all(b.constant for b in bound)
        if constant and self._last is not None and torch.equal(self._last[0], theta):
            _, values[0.0], ends[0.0] = self._last

        def take(node: float, chosen: Sequence[int]) -> None:
            gradients = ends.get(node)
            if gradients is None:
                exact = end if node == 1.0 else (theta.double() + node * delta).to(dtype)
                values[node], gradients = self.evaluate(exact, bound, chosen)
            if node in (0.0, 1.0):
                ends[node] = gradients
            if self.averages:
                between[node] = gradients
            products[node] = self._products(gradients, vectors)

        level, *finer = self.rule.levels
        chosen = list(range(len(bound)))
        for node in sorted({0.0, *level.nodes}):
            take(node, chosen)
        if 1.0 not in values:
            values[1.0] = self.values(end, bound)
        self._last = (end, values[1.0], ends[1.0]) if 1.0 in ends else None
        path, nodes = self._averaged(level, products), [len(level.nodes)] * len(bound)
        actual = values[1.0] - values[0.0]
        tolerated = (self.rule.tolerance or 0.0) * actual.abs()
        # of two values in the model's dtype, the difference is known to a unit in the last place
        last_place = torch.maximum(values[0.0].abs(), values[1.0].abs()) * torch.finfo(dtype).eps
        off = torch.full_like(actual, torch.inf)
        average = _mean(level, between) if self.averages else None
        for level in finer:
            for node in level.nodes:
                if node not in products:
                    take(node, chosen)
            better = self._averaged(level, products)
            off[chosen] = _off(path, better, actual)[chosen]
            path[chosen] = better[chosen]
            if average is not None:
                average[chosen] = _mean(level, between)[chosen]
            for scalar in chosen:
                nodes[scalar] = len(level.nodes)
            within = off <= torch.maximum(tolerated, last_place)
            chosen = (~within).nonzero().flatten().tolist()
            if not chosen:
                break
        agrees = off <= tolerated
        rounded = ~agrees & (off <= last_place)
        return Way(
            values[0.0],
            values[1.0],
            ends[0.0],
            _stacked(products[0.0]),
            path,
            tuple(nodes),
            tuple(agrees.tolist()) if finer else None,
            tuple(rounded.tolist()) if finer else None,
            average,
        )

    def bind(self, theta: Flat) -> list[BoundScalar]:
        """The scalars, bound to the model with these weights."""
        self._load(theta)
        return [scalar.bind(self.model) for scalar in self.scalars]

    def _answer_gradient(self, traced: Step) -> Flat:
        """Gradient of the mean loss at the answers of the step's batch, at the loaded weights."""
        tokens = traced.tokens.to(self._device)
        logits = self.model(tokens[:, :-1])
        at = traced.answers[:, 1:].to(tokens.device)
        loss = torch.nn.functional.cross_entropy(logits[at], tokens[:, 1:][at])
        parts = torch.autograd.grad(loss, self._parameters)
        return torch.cat([part.reshape(-1) for part in parts]).cpu()

    def _load(self, theta: Flat) -> None:
        named = self.layout.unflatten(theta.to(self._device))  # one transfer to a GPU
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(named[name])

    def _load_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """A step's change is that of its parameters, at the buffers that it found."""
        if buffers and load_buffers(self.model, buffers):
            self._last = None

    def values(self, theta: Flat, bound: Sequence[BoundScalar]) -> Float[Tensor, " scalar"]:
        """Values of bound scalars at some weights, in float64."""
        self._load(theta)
        with torch.no_grad():
            return torch.stack(self.batch.means(self.model, bound)).double().cpu()

    def evaluate(
        self, theta: Flat, bound: Sequence[BoundScalar], chosen: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Values `[scalar]` in float64 and gradients `[scalar, parameter]` at some weights.

        Args:
            chosen: scalars whose gradients are taken, all by default; those of others are zero.
        """
        self._load(theta)
        means = self.batch.means(self.model, bound)
        asked = range(len(means)) if chosen is None else chosen
        gradients = torch.zeros(len(means), len(theta), dtype=self._dtype)
        for scalar in asked:
            self._refuse_constant(scalar, means[scalar])
            parts = torch.autograd.grad(
                means[scalar],
                self._parameters,
                retain_graph=scalar != asked[-1],
                materialize_grads=True,  # a scalar of an early layer leaves the later ones at zero
            )
            gradients[scalar] = torch.cat([part.reshape(-1) for part in parts])  # one transfer
        return torch.stack(means).detach().double().cpu(), gradients

    def _refuse_constant(self, scalar: int, mean: Tensor) -> None:
        """Refuse a scalar that tells nothing of how it depends on the weights."""
        if not mean.requires_grad:
            raise CircuitError(
                f"scalar {self.scalars[scalar].name} gives a number that has no gradient",
                expected="a tensor that was computed from the module's parameters",
                fix="leave out no_grad, detach and item",
            )

    def _products(self, gradients: Tensor, vectors: Tensor) -> list[Float[Tensor, "scalar term"]]:
        """`gradient . vector` by atom."""
        # to float64 atom by atom, in the cache: all at once it is a step's largest tensor
        return [atom.of(gradients).double() @ atom.of(vectors).T for atom in self.atoms]

    def _averaged(self, level: Quadrature, products: Mapping[float, list[Tensor]]) -> Shares:
        """The products of a quadrature's nodes, weighted, by scalar, vector and atom."""
        shape = (*products[level.nodes[0]][0].shape, len(self.atoms))
        total = torch.zeros(shape, dtype=torch.float64)
        for node, weight in zip(level.nodes, level.weights, strict=True):
            for place, product in enumerate(products[node]):
                total[..., place].add_(product, alpha=weight)
        return total


def _mean(
    level: Quadrature, gradients: Mapping[float, Tensor]
) -> Float[Tensor, "scalar parameter"]:
    """The gradients at a quadrature's nodes, weighted, in float64."""
    total = torch.zeros_like(gradients[level.nodes[0]], dtype=torch.float64)
    for node, weight in zip(level.nodes, level.weights, strict=True):
        total.add_(gradients[node], alpha=weight)
    return total


def _off(coarse: Shares, fine: Shares, actual: Tensor) -> Float[Tensor, " scalar"]:
    """How far two levels are apart in the term in which they are furthest, or from closing.

    Both can miss the same kink: that they do not close tells.
    """
    apart = (fine - coarse).sum(2).abs().amax(1)
    return torch.maximum(apart, (fine.sum((1, 2)) - actual).abs())


def _stacked(products: list[Tensor]) -> Shares:
    """The products of one node by scalar, vector and atom."""
    return torch.stack(products, -1) + 0.0  # no zero is negative


def attribute(
    steps: Iterable[AnyStep],
    attributor: Attributor,
    *,
    progress: Callable[[AnyStep], None] | None = None,
) -> Iterator[StepAttribution]:
    """Attribute every step of a replay (`trace.steps(a, b)`), in one pass."""
    for traced in steps:
        yield attributor.step(traced)
        if progress is not None:
            progress(traced)
