"""Parameter groups: layer, head, q/k/v/o, MLP, as index ranges of the flat vector.

The flat vector is cut into *atoms*, the finest ranges that any partition speaks of; a partition
maps every atom to one group, so it is listed in full and adds up to the whole. Heads and MLPs are
told by TransformerLens's names; of any other module, groups are its submodules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from circuit.core.flat import ParameterLayout
from circuit.errors import CircuitError

Partition = Literal["layer", "component", "circuit"]
PARTITIONS: tuple[Partition, ...] = ("layer", "component", "circuit")
"""`layer`: embed, pos_embed, L0, ..., norms. `component`: heads and MLPs. `circuit`: q, k, v, o."""

_BLOCK = re.compile(r"blocks\.(\d+)\.(attn\.[Wb]_[QKVO]|mlp\.[Wb]_\w+|ln\d\.[wb])")
_NUMBERED = re.compile(r".*?(?:^|\.)\d+(?=\.)")


@dataclass(frozen=True)
class Atom:
    """A range of the flat vector that belongs to one group in every partition."""

    start: int
    stop: int
    tensor: str
    head: int | None
    """The head that the range belongs to, where a tensor holds several."""

    def group(self, partition: Partition) -> str:
        """The atom's group: `embed`, `L2`, `L2H1`, `L2H1.q`, `L2.b_O`, `L0.mlp`, `norms`, ..."""
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
    """The finest ranges of a layout, in order; together they are the whole vector."""
    found = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        start, stop = layout.range(name)
        by_head = bool(_BLOCK.fullmatch(name)) and ".attn." in name and not name.endswith("b_O")
        count = shape[0] if by_head else 1
        width = (stop - start) // count
        found += [
            Atom(start + i * width, start + (i + 1) * width, name, i if by_head else None)
            for i in range(count)
        ]
    return found


def check_partition(name: str) -> Partition:
    """A partition from its name.

    Raises:
        CircuitError: there is no such partition.
    """
    for partition in PARTITIONS:
        if name == partition:
            return partition
    raise CircuitError(f"unknown partition '{name}'", expected=f"one of {', '.join(PARTITIONS)}")
