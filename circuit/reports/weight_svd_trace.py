"""weight-svd-trace: the spectra of every head's and MLP's matrices along training.

Per checkpoint the float64 SVD of `W_QK = W_Q W_K^T` and `W_OV = W_V W_O` of each head, and of
`W_in` and `W_out` of each layer (definitions.md section 6). Effective rank is
`(sum σ)² / sum σ²`, from 1 (one direction) to the rank of the matrix (all alike); top-3 mass is
`(σ1 + σ2 + σ3) / sum σ`.

Each singular value has a row of its own in `weight_svd_singular_values.jsonl` and `.csv`, a pair
of top vectors one in `weight_svd_top_singular_vectors.jsonl`, all with `rank` from 1. Effective
rank and top-3 mass are null for a matrix of zeros. Cosines are taken to the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from circuit.artifacts import Row, dump_csv, in_row
from circuit.core.digests import tensors_digest
from circuit.errors import CircuitError
from circuit.figures.charts import (
    CATEGORY,
    Chart,
    at_step,
    chart,
    chosen,
    colour,
    exact,
    lines,
    named,
)
from circuit.lazy import alt, torch
from circuit.model.components import Component
from circuit.model.layout import hooked_tensors
from circuit.model.subspaces import svd_of_product
from circuit.model.weights import layer_weights
from circuit.options import CheckpointOptions, Option
from circuit.reports.inputs import check_headers, states_at
from circuit.reports.report import Findings, OfCheckpoints, Place, Results
from circuit.reports.tables import Table
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from circuit.training.checkpoints import TrainState

VALUES = "weight_svd_singular_values"
VECTORS = "weight_svd_top_singular_vectors.jsonl"
HEAD_MATRICES = ("W_QK", "W_OV")
MLP_MATRICES = ("W_in", "W_out")

_DECIMALS = 6
"""Of the entries of the written vectors, which have unit norm."""


class SvdOptions(CheckpointOptions):
    """How much of each spectrum is written.

    A matrix of lower rank (a head's has d_head) gives all that it has.
    """

    max_singular_values: Annotated[
        int, Option("Singular values written per matrix, at most.", least=1)
    ] = 16
    top_vector_ranks: Annotated[
        int, Option("Pairs of singular vectors written per matrix, at most.", least=1)
    ] = 4

    def check_model(self, shape: ModelConfig) -> None:
        """Also refuses more than a matrix of the model has."""
        super().check_model(shape)
        most = min(shape.d_model, shape.d_ff or shape.d_model)
        for name in ("max_singular_values", "top_vector_ranks"):
            if getattr(self, name) > most:
                raise CircuitError(
                    f"{getattr(self, name)}",
                    where=f"`{name}`",
                    expected=f"1 to {most}, the most that a matrix of this model has",
                )


class WeightSvdTrace(OfCheckpoints[SvdOptions]):
    """SVD of W_QK and W_OV of every head, and of W_in and W_out, at each checkpoint."""

    command = "weight-svd-trace"
    Options = SvdOptions
    further = ("weight_svd_*",)
    title = "Singular values of the weights"
    place = 3
    question = "Do QK and OV maps grow a few directions, or all of them?"

    @classmethod
    def usual(cls, place: Place) -> SvdOptions:
        most = min(place.model.d_model, place.model.d_ff or place.model.d_model)
        return SvdOptions(
            checkpoint_dir=place.given["checkpoint_dir"],
            max_singular_values=min(16, most),
            top_vector_ranks=min(4, most),
        )

    def prepare(self) -> None:
        from circuit.trace.states import States
        from circuit.training.recipe_setup import setup_of

        self.setup = setup_of(self.config, self.options.checkpoints[0])
        self.states = States(self.setup)
        check_headers(self.setup, self.states, self.options.checkpoints)
        self.spectra: list[Point] = []
        self.gaps: list[float] = []

    def points(self) -> Iterator[TrainState]:
        for _, state in states_at(self.setup, self.states, self.options.checkpoints):
            self.digests[str(state.step)] = tensors_digest(state.parameters)
            yield state

    def measure(self, point: TrainState) -> list[Row]:
        tensors = hooked_tensors(point.parameters, self.config.model)
        every = weight_spectra(tensors, self.config.model)
        self.gaps.append(max(reconstruction_gap(spectra, tensors) for spectra in every))
        top = [spectra.top(self.options.top_vector_ranks) for spectra in every]
        self.spectra.append(Point(point.step, top))
        return []  # cosines are to the last one

    def conclude(self, rows: list[Row]) -> Findings:
        points, last = self.spectra, self.spectra[-1].spectra
        rows = [row for point in points for row in _matrix_rows(point, last)]
        values = [r for p in points for r in _value_rows(p, self.options.max_singular_values)]
        return Findings(
            rows,
            {"steps": [point.step for point in points], "growth": _growth(rows)},
            "U S V^T is the matrix again, and the sum of the squared singular values its squared"
            f" Frobenius norm: both to {max(self.gaps):.1g} of the norm, at every checkpoint",
            further={
                f"{VALUES}.jsonl": values,
                f"{VALUES}.csv": dump_csv(values),
                VECTORS: [row for point in points for row in _vector_rows(point, last)],
            },
        )

    def provenance(self) -> dict[str, Any]:
        provenance = self.config.provenance(self.setup.benchmark_digest)
        return {**provenance, "parameters_sha256": self.digests}

    @classmethod
    def size(cls, results: Results[SvdOptions]) -> tuple[float, ...]:
        return len(results.summary["steps"]), results.options.max_singular_values

    @classmethod
    def notes(cls, results: Results[SvdOptions]) -> list[str]:
        steps = results.summary["steps"]
        return [
            f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}. Growth is that of the top"
            " singular value; half of it is passed at the step named. Effective rank is"
            " (sum σ)² / sum σ²."
        ]

    @classmethod
    def tables(cls, results: Results[SvdOptions]) -> list[Table]:
        first, *_, last = (results.summary["steps"] * 2)[: 2 * len(results.summary["steps"])]
        columns = {
            "component": "component",
            "first": (f"σ1 at {first}", ".3f"),
            "last": (f"σ1 at {last}", ".3f"),
            "growth": ("growth", ".3f"),
            "half_growth_step": "half at",
            "effective_rank_first": (f"effective rank at {first}", ".1f"),
            "effective_rank_last": (f"at {last}", ".1f"),
        }
        growth = results.summary["growth"].items()
        return [Table(matrix, columns, courses, console=3) for matrix, courses in growth]

    @classmethod
    def charts(cls, results: Results[SvdOptions]) -> list[Chart]:
        """Top singular value and effective rank of every head; the spectrum of one."""
        growth = results.summary["growth"]
        rows = [{name: row[name] for name in _SHOWN} for row in results.rows()]
        drawn = []
        for matrix in HEAD_MATRICES:
            winner = growth[matrix][0]["component"]
            of_matrix = [row for row in rows if row["matrix"] == matrix]
            heads = list(dict.fromkeys(row["component"] for row in of_matrix))
            shade = colour("component", [winner, *(h for h in heads if h != winner)], first=True)
            drawn += [
                chart(
                    f"weight_svd_{matrix}_{column}",
                    f"{matrix}: {words} ({winner} grew most)",
                    {f"weights_{matrix}": of_matrix},
                    lines(f"weights_{matrix}", column, words, shade, _SHOWN),
                    at_step(),
                )
                for column, words in _QUANTITIES.items()
            ]
            name = f"spectrum_{matrix}"
            holding = in_row("component", winner)
            spectrum = [
                {key: row[key] for key in ("step", "matrix", "component", "rank", "singular_value")}
                for row in results.rows(f"{VALUES}.jsonl", holding=holding)
                if (row["matrix"], row["component"]) == (matrix, winner)
            ]
            curve = (
                named(name)
                .transform_filter(chosen())
                .mark_line(color=CATEGORY[0], point=alt.OverlayMarkDef(size=28, color=CATEGORY[0]))
                .encode(
                    x=alt.X("rank:O").title("rank").axis(labelAngle=0),
                    y=alt.Y("singular_value:Q").title("singular value").scale(zero=True),
                    tooltip=exact(*(spectrum[0] if spectrum else ())),
                )
            )
            drawn.append(
                chart(
                    f"weight_svd_{name}",
                    f"{winner} {matrix}: singular values at the step",
                    {name: spectrum},
                    curve,
                )
            )
        return drawn


_SHOWN = ("step", "matrix", "component", "top_singular_value", "effective_rank", "top3_mass")
_QUANTITIES = {"top_singular_value": "top singular value", "effective_rank": "effective rank"}


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
    spectra: list[Spectra]


def weight_spectra(tensors: Mapping[str, Tensor], shape: ModelConfig) -> list[Spectra]:
    """The SVDs of all `W_QK`, `W_OV` and, where there are MLPs, `W_in` and `W_out`.

    Args:
        tensors: the parameters by a HookedTransformer's names.
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
    spectra = []
    for matrix, (left, right) in products.items():
        u, s, v = svd_of_product(left, right)
        spectra.append(_signed(matrix, heads, u, s, v))
    for matrix in () if shape.attention_only else MLP_MATRICES:
        u, s, vh = torch.linalg.svd(weights(f"mlp.{matrix}").double(), full_matrices=False)
        spectra.append(_signed(matrix, mlps, u, s, vh.mT))
    return spectra


def reconstruction_gap(spectra: Spectra, tensors: Mapping[str, Tensor]) -> float:
    """Largest |U S V^T - matrix| and | |σ| - |matrix| | of the components, over |matrix|.

    The matrix is multiplied out here, where the SVD is taken of its factors; 0 for zeros.
    """
    matrices = torch.stack([_matrix(spectra.matrix, tensors, one) for one in spectra.components])
    norm = torch.linalg.matrix_norm(matrices)
    rebuilt = (spectra.left * spectra.values[:, None]) @ spectra.right.mT
    off = torch.linalg.matrix_norm(rebuilt - matrices).maximum(
        (spectra.values.norm(dim=1) - norm).abs()
    )
    return float((off / norm).nan_to_num(0.0).max())


def _matrix(name: str, tensors: Mapping[str, Tensor], component: Component) -> Tensor:
    """A component's matrix in float64."""
    if component.head is None:
        return tensors[f"blocks.{component.layer}.mlp.{name}"].double()
    q, k, v, o = (
        tensors[f"blocks.{component.layer}.attn.W_{x}"][component.head].double() for x in "QKVO"
    )
    return q @ k.mT if name == "W_QK" else v @ o


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
    by_matrix: dict[str, list[dict[str, Any]]] = {}
    for (matrix, component), course in courses.items():
        top = [row["top_singular_value"] for row in course]
        growth = top[-1] - top[0]
        half = (row["step"] for row in course if row["top_singular_value"] >= top[0] + growth / 2)
        by_matrix.setdefault(matrix, []).append(
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
        for matrix, courses in by_matrix.items()
    }
