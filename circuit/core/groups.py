"""Parameter groups: layer, head, q/k/v/o, MLP, as index ranges of the flat vector.

The flat vector is cut into *atoms*, the finest ranges that any partition speaks of; a partition
maps every atom to one group, so it is listed in full and adds up to the whole. Heads and MLPs are
told by TransformerLens's names, those of a HookedTransformer or of a bridge; of any other module,
groups are its submodules, and its parameters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from circuit.core.flat import ParameterLayout
from circuit.core.parameter_names import hooked_name
from circuit.errors import CircuitError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

Partition = Literal["layer", "component", "circuit", "parameter"]
PARTITIONS: tuple[Partition, ...] = get_args(Partition)
"""`layer`: embed, pos_embed, L0, ..., norms. `component`: heads and MLPs. `circuit`: q, k, v, o.
`parameter`: each tensor by its name."""

_BLOCK = re.compile(r"blocks\.(\d+)\.(attn\.[Wb]_[QKVO]|mlp\.[Wb]_\w+|ln\d\.[wb])")
_NUMBERED = re.compile(r".*?(?:^|\.)\d+(?=\.)")


@dataclass(frozen=True)
class Atom:
    """A part of the flat vector that belongs to one group in every partition."""

    start: int
    stop: int
    tensor: str
    """Its name; of a bridge's parameter, a HookedTransformer's name for it."""
    head: int | None
    """The head that the range belongs to, where a tensor holds several."""
    columns: tuple[int, int, int] | None = None
    """How many rows the range has, and which columns of each the atom is; None is all of them."""

    def of(self, vectors: Float[Tensor, "vector parameter"]) -> Float[Tensor, "vector own"]:
        """The atom's part of flat vectors; a view where it is one range."""
        part = vectors[:, self.start : self.stop]
        if self.columns is None:
            return part
        rows, first, last = self.columns
        chosen: Tensor = part.unflatten(1, (rows, -1))[:, :, first:last]
        return chosen.flatten(1)

    def choose(self, mask: Bool[Tensor, " parameter"]) -> None:
        """Set the atom's places in a mask."""
        part = mask[self.start : self.stop]
        if self.columns is None:
            part[:] = True
        else:
            rows, first, last = self.columns
            part.unflatten(0, (rows, -1))[:, first:last] = True

    def group(self, partition: Partition) -> str:
        """The atom's group: `embed`, `L2`, `L2H1`, `L2H1.q`, `L2.b_O`, `L0.mlp`, `norms`, ..."""
        if partition == "parameter":
            return self.tensor
        match = _BLOCK.fullmatch(self.tensor)
        if match is None and self.tensor.startswith("ln_final"):
            return "norms"
        if match is None:  # the submodule; of layers the one that is counted
            submodule = self.tensor.rpartition(".")[0] or self.tensor
            numbered = _NUMBERED.match(self.tensor) if partition == "layer" else None
            return submodule if numbered is None else numbered[0]
        assert match is not None
        layer, rest = f"L{match[1]}", match[2]
        if rest.startswith("ln"):
            return "norms"
        if partition == "layer":
            return layer
        if rest.startswith("mlp."):
            return f"{layer}.mlp"
        if self.head is None:
            return f"{layer}.b_O"
        kind = rest.rsplit("_", 1)[-1].lower()
        return f"{layer}H{self.head}" + (f".{kind}" if partition == "circuit" else "")


def atoms(layout: ParameterLayout) -> list[Atom]:
    """The finest ranges of a layout, in order; together they are the whole vector.

    Args:
        layout: of the model's parameters; a bridge's are those of any other module where its
            number of heads is not known.
    """
    heads = layout.heads
    cut: list[Atom] = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        start, stop = layout.range(name)
        tensor = name if heads is None else hooked_name(name)
        by_head = bool(_BLOCK.fullmatch(tensor)) and ".attn." in tensor
        if not by_head or tensor.endswith("b_O"):
            cut.append(Atom(start, stop, tensor, None))
            continue
        count = shape[0] if tensor == name else heads or 1
        if tensor != name and tensor.endswith("W_O"):  # [d_model, head d_head]: columns
            width = shape[1] // count
            columns = [(shape[0], h * width, (h + 1) * width) for h in range(count)]
            cut += [Atom(start, stop, tensor, h, columns[h]) for h in range(count)]
            continue
        width = (stop - start) // count
        cut += [Atom(start + h * width, start + (h + 1) * width, tensor, h) for h in range(count)]
    return cut


def check_partition(name: str) -> Partition:
    """A partition from its name.

    Raises:
        CircuitError: there is no such partition.
    """
    for partition in PARTITIONS:
        if name == partition:
            return partition
    raise CircuitError(f"unknown partition '{name}'", expected=f"one of {', '.join(PARTITIONS)}")
