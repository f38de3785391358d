"""All parameters as one flat vector, in the order of `named_parameters()`.

Inside trace and attribution a term of an update is a vector, a parameter group is a list of index
ranges, and a projection is one dot product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from circuit.lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

Flat: TypeAlias = "Float[Tensor, ' parameter']"


@dataclass(frozen=True)
class ParameterLayout:
    """Where every named tensor stands in the flat vector.

    Attributes:
        names: in order.
        shapes: of each.
        starts: first index of each, and the total size last.
        heads: of a layer, where the model tells it; a bridge's shapes do not.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    heads: int | None = None

    @classmethod
    def of_model(cls, model: nn.Module) -> ParameterLayout:
        """The layout of a model's parameters."""
        cfg: Any = getattr(model, "cfg", None)
        grouped = getattr(cfg, "n_key_value_heads", None)  # fewer heads of keys than of queries
        heads = None if grouped else getattr(cfg, "n_heads", None)
        return cls.of_shapes({name: tuple(p.shape) for name, p in model.named_parameters()}, heads)

    @classmethod
    def of_shapes(
        cls, shapes: Mapping[str, Sequence[int]], heads: int | None = None
    ) -> ParameterLayout:
        """The layout of tensors with these shapes, in this order."""
        starts = [0]
        for shape in shapes.values():
            starts.append(starts[-1] + torch.Size(shape).numel())
        return cls(tuple(shapes), tuple(tuple(s) for s in shapes.values()), tuple(starts), heads)

    @property
    def size(self) -> int:
        """Number of scalar parameters."""
        return self.starts[-1]

    def range(self, name: str) -> tuple[int, int]:
        """First index of a tensor and the index after its last."""
        at = self.names.index(name)
        return self.starts[at], self.starts[at + 1]

    def flatten(self, tensors: Mapping[str, Tensor]) -> Flat:
        """Named tensors of one device as one new vector on the CPU, in one copy."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names]).cpu()

    def flatten_gradient(self, parameters: Mapping[str, nn.Parameter]) -> Flat:
        """The gradients that stand in parameters, by name; zero where there is none."""
        return self.flatten(
            {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
        )

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector, by name and in shape."""
        parts = vector.split([b - a for a, b in zip(self.starts, self.starts[1:], strict=False)])
        return {
            name: part.view(shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def norms(self, vector: Tensor, names: Sequence[str] | None = None) -> dict[str, float]:
        """Euclidean norm, in float64, of each tensor's part of a vector (of `names` only)."""
        parts = self.unflatten(vector)
        return {name: float(parts[name].double().norm()) for name in names or self.names}

    def to_json(self) -> dict[str, Any]:
        """Names and shapes, in order."""
        return {name: list(shape) for name, shape in zip(self.names, self.shapes, strict=True)}


def norm(vector: Tensor) -> float:
    """Euclidean norm in float64."""
    return float(vector.double().norm())
