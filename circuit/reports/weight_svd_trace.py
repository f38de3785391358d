"""weight-svd-trace: the spectra of every head's and MLP's matrices along training.

Per checkpoint the float64 SVD of `W_QK = W_Q W_K^T` and `W_OV = W_V W_O` of each head, and of
`W_in` and `W_out` of each layer (definitions.md section 6). Effective rank is
`(sum σ)² / sum σ²`, from 1 (one direction) to the rank of the matrix (all alike); top-3 mass is
`(σ1 + σ2 + σ3) / sum σ`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.artifacts import Row, dump_rows
from circuit.core.digests import tensors_digest
from circuit.errors import CircuitError
from circuit.figures.weights import svd_birth
from circuit.lazy import torch
from circuit.model.components import Component
from circuit.model.subspaces import svd_of_product
from circuit.model.weights import layer_weights
from circuit.reports.base import ReportResult, open_report
from circuit.reports.inputs import states_at
from circuit.trace.states import States
from circuit.train_config import ModelConfig, TrainConfig
from circuit.training.setup import Setup

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

COMMAND = "weight-svd-trace"
VALUES = "weight_svd_singular_values"
VECTORS = "weight_svd_top_singular_vectors.jsonl"
HEAD_MATRICES = ("W_QK", "W_OV")
MLP_MATRICES = ("W_in", "W_out")

_DECIMALS = 6
"""Of the entries of the written vectors, which have unit norm."""


@dataclass(frozen=True)
class SvdOptions:
    """How much of each spectrum is written.

    A matrix of lower rank (a head's has d_head) gives all that it has.

    Attributes:
        max_singular_values: per matrix, the largest first.
        top_vector_ranks: pairs of left and right vectors per matrix.
    """

    max_singular_values: int = 16
    top_vector_ranks: int = 4


@dataclass(frozen=True)
class Spectra:
    """The SVD of one kind of matrix over its components, at one checkpoint; float64.

    Signs are set so that the entry of a left vector that is largest in size is positive.
    """

    matrix: str
    components: tuple[Component, ...]
    left: Float[Tensor, "component m rank"]
    values: Float[Tensor, "component rank"]
    right: Float[Tensor, "component n rank"]

    @property
    def effective_rank(self) -> Float[Tensor, " component"]:
        """`(sum σ)² / sum σ²`."""
        return self.values.sum(-1) ** 2 / (self.values**2).sum(-1)

    @property
    def top3_mass(self) -> Float[Tensor, " component"]:
        """`(σ1 + σ2 + σ3) / sum σ`."""
        return self.values[:, :3].sum(-1) / self.values.sum(-1)

    def top(self, count: int) -> Spectra:
        """Without the vectors beyond the first `count`."""
        left, right = self.left[..., :count].clone(), self.right[..., :count].clone()
        return replace(self, left=left, right=right)

    def names(self, step: int) -> list[dict[str, Any]]:
        """The columns that every row begins with, one a component."""
        return [
            {"step": step, "matrix": self.matrix, "component": str(component)}
            for component in self.components
        ]


@dataclass(frozen=True)
class Point:
    """All spectra of one checkpoint."""

    step: int
    digest: str
    spectra: list[Spectra]


def weight_spectra(tensors: Mapping[str, Tensor], shape: ModelConfig) -> list[Spectra]:
    """The SVDs of all `W_QK`, `W_OV`, `W_in` and `W_out`.

    Args:
        tensors: the parameters by name.
        shape: of the model.

    Raises:
        CircuitError: a weight is missing.
    """
    heads = tuple(Component(n, h) for n in range(shape.layers) for h in range(shape.heads))
    mlps = tuple(Component(layer, None) for layer in range(shape.layers))

    def weights(name: str) -> Tensor:
        return layer_weights(tensors, name, shape.layers)

    def of_heads(name: str) -> Tensor:  # [head of any layer, ., .]
        return weights(f"attn.{name}").flatten(0, 1)

    products = {
        "W_QK": (of_heads("W_Q"), of_heads("W_K").mT),
        "W_OV": (of_heads("W_V"), of_heads("W_O")),
    }
    found = []
    for matrix, (left, right) in products.items():
        u, s, v = svd_of_product(left, right)
        found.append(_signed(matrix, heads, u, s, v))
    for matrix in MLP_MATRICES:
        u, s, vh = torch.linalg.svd(weights(f"mlp.{matrix}").double(), full_matrices=False)
        found.append(_signed(matrix, mlps, u, s, vh.mT))
    return found


def weight_svd_trace(
    config: TrainConfig,
    checkpoints: Sequence[Path],
    output_dir: str | Path,
    options: SvdOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReportResult:
    """Write the spectra of every head's and MLP's matrices at each checkpoint.

    The rows are one a checkpoint and matrix. Each singular value has a row of its own in
    `weight_svd_singular_values.jsonl` and `.csv`, each pair of top vectors one in
    `weight_svd_top_singular_vectors.jsonl`, all with `rank` from 1. Effective rank and top-3 mass
    are null for a matrix of zeros.

    Args:
        checkpoints: ascending by step; cosines are taken to the last one.
        progress: called with the checkpoints done and their number.

    Raises:
        CircuitError: an option is out of range, or a checkpoint is missing, damaged, or of another
            config or benchmark.
    """
    options = options or SvdOptions()
    _check(options, config, checkpoints)
    setup = Setup(config, checkpoints[0])
    points: list[Point] = []
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        for _, state in states_at(setup, States(setup), checkpoints):
            every = weight_spectra(state.parameters, config.model)
            spectra = [found.top(options.top_vector_ranks) for found in every]
            points.append(Point(state.step, tensors_digest(state.parameters), spectra))
            if progress:
                progress(len(points), len(checkpoints))
        last = points[-1].spectra
        rows = [row for point in points for row in _matrix_rows(point, last)]
        values = [row for p in points for row in _value_rows(p, options.max_singular_values)]
        growth = _growth(rows)
        return writer.write(
            parameters={**asdict(options), "checkpoints": [str(path) for path in checkpoints]},
            summary={"steps": [point.step for point in points], "growth": growth},
            rows=rows,
            further={
                f"{VALUES}.jsonl": dump_rows(values),
                f"{VALUES}.csv": _csv(values),
                VECTORS: dump_rows(row for point in points for row in _vector_rows(point, last)),
            },
            page=_page(growth, points),
            figures={
                "weight_svd_birth": svd_birth(
                    rows, {matrix: growth[matrix][0]["component"] for matrix in HEAD_MATRICES}
                )
            },
            provenance={
                **config.provenance(setup.benchmark.digest),
                "parameters_sha256": {str(point.step): point.digest for point in points},
            },
            device=config.device,
        )


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _check(options: SvdOptions, config: TrainConfig, checkpoints: Sequence[Path]) -> None:
    most = min(config.model.d_model, config.model.d_ff)
    for name, value in asdict(options).items():
        if not 1 <= value <= most:
            raise CircuitError(
                f"{value}",
                where=f"--{name.replace('_', '-')}",
                expected=f"1 to {most}, the most that a matrix of this model has",
            )
    if not checkpoints:
        raise CircuitError("no checkpoints", expected="at least one")


def _signed(
    matrix: str, components: tuple[Component, ...], u: Tensor, s: Tensor, v: Tensor
) -> Spectra:
    sign = u.gather(-2, u.abs().argmax(-2, keepdim=True)).sign()
    return Spectra(matrix, components, u * sign, s, v * sign)


def _cosines(one: Spectra, other: Spectra) -> tuple[list[list[float]], list[list[float]]]:
    """|cosine| of each left and each right vector with the other's of the same rank."""
    left = (one.left * other.left).sum(-2).abs()
    right = (one.right * other.right).sum(-2).abs()
    return left.tolist(), right.tolist()


def _matrix_rows(point: Point, last: list[Spectra]) -> Iterator[Row]:
    for spectra, final in zip(point.spectra, last, strict=True):
        left, right = _cosines(spectra, final)
        effective_rank, top3_mass = spectra.effective_rank.tolist(), spectra.top3_mass.tolist()
        for i, name in enumerate(spectra.names(point.step)):
            zero = not spectra.values[i, 0]
            yield {
                **name,
                "top_singular_value": float(spectra.values[i, 0]),
                "effective_rank": None if zero else effective_rank[i],
                "top3_mass": None if zero else top3_mass[i],
                "left_cosine_to_last": left[i][0],
                "right_cosine_to_last": right[i][0],
            }


def _value_rows(point: Point, count: int) -> Iterator[Row]:
    for spectra in point.spectra:
        for name, values in zip(spectra.names(point.step), spectra.values.tolist(), strict=True):
            for rank, value in enumerate(values[:count], 1):
                yield {**name, "rank": rank, "singular_value": value}


def _vector_rows(point: Point, last: list[Spectra]) -> Iterator[Row]:
    for spectra, final in zip(point.spectra, last, strict=True):
        left, right = _cosines(spectra, final)
        u, v = (x.mT.numpy().round(_DECIMALS).tolist() for x in (spectra.left, spectra.right))
        for i, name in enumerate(spectra.names(point.step)):
            for rank in range(len(u[i])):
                yield {
                    **name,
                    "rank": rank + 1,
                    "left_cosine_to_last": left[i][rank],
                    "right_cosine_to_last": right[i][rank],
                    "left": u[i][rank],
                    "right": v[i][rank],
                }


def _growth(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Per matrix, its components by growth of the top singular value from first to last step."""
    courses: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        courses.setdefault((row["matrix"], row["component"]), []).append(row)
    found: dict[str, list[dict[str, Any]]] = {}
    for (matrix, component), course in courses.items():
        top = [row["top_singular_value"] for row in course]
        growth = top[-1] - top[0]
        half = (row["step"] for row in course if row["top_singular_value"] >= top[0] + growth / 2)
        found.setdefault(matrix, []).append(
            {
                "component": component,
                "first": top[0],
                "last": top[-1],
                "growth": growth,
                "half_growth_step": next(half) if growth > 0 else None,
                "effective_rank_first": course[0]["effective_rank"],
                "effective_rank_last": course[-1]["effective_rank"],
            }
        )
    return {
        matrix: sorted(courses, key=lambda course: -course["growth"])
        for matrix, courses in found.items()
    }


def _page(growth: dict[str, list[dict[str, Any]]], points: Sequence[Point]) -> list[str]:
    first, last = points[0].step, points[-1].step
    lines = [
        f"{len(points)} checkpoints, steps {first} to {last}. Growth is that of the top singular"
        " value; half of it is passed at the step named. Effective rank is `(sum σ)² / sum σ²`.",
        "",
        "![SVD birth](weight_svd_birth.svg)",
    ]
    for matrix, courses in growth.items():
        lines += [
            "",
            f"## {matrix}",
            "",
            f"| component | σ1 at {first} | σ1 at {last} | growth | half at |"
            f" effective rank at {first} | at {last} |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {c['component']} | {c['first']:.3f} | {c['last']:.3f} | {c['growth']:.3f} |"
            f" {'-' if c['half_growth_step'] is None else c['half_growth_step']} |"
            f" {c['effective_rank_first']:.1f} | {c['effective_rank_last']:.1f} |"
            for c in courses
        ]
    return lines
