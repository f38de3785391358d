"""(seed, step) -> example indices: a pure function, with no sampler state anywhere.

The examples of epoch `e` are one permutation of `range(size)`, drawn from NumPy's legacy
`RandomState([seed, e])`, whose stream NumPy has frozen for good (NEP 19). The epochs follow each
other in one endless stream; step `t` (from 1) takes the examples `(t-1)*batch ... t*batch - 1` of
it, so a batch may cross from one epoch into the next.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from circuit.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Indices: TypeAlias = "NDArray[np.int64]"


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Indices:
    order = np.random.RandomState([seed, epoch]).permutation(size).astype(np.int64)
    order.setflags(write=False)
    return order


def batch_indices(seed: int, step: int, *, size: int | None, batch_size: int) -> Indices:
    """The examples of one step.

    Args:
        seed: the run's seed.
        step: counted from 1.
        size: number of examples in the split; None: it has no end, and every example is new.
        batch_size: examples a step; may exceed `size`.

    Returns:
        Int64 `[batch]`, indices into the split.

    Raises:
        ValueError: the step is below 1, or a size is below 1.
    """
    if step < 1 or batch_size < 1 or (size is not None and size < 1):
        raise ValueError(f"step {step}, size {size} and batch_size {batch_size} must be >= 1")
    start, stop = (step - 1) * batch_size, step * batch_size
    if size is None:
        return np.arange(start, stop)
    parts = []
    for epoch in range(start // size, (stop - 1) // size + 1):
        first = max(start - epoch * size, 0)
        last = min(stop - epoch * size, size)
        parts.append(_permutation(seed, epoch, size)[first:last])
    return np.concatenate(parts)
