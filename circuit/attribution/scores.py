"""Scores of training examples, anybody's: a plain file of named arrays, and how they are judged.

A file is NumPy's `.npz`, without pickles, of these arrays:

    scores     float64 [scalar, example]   what the example's presence in the window is said to do
                                           to the scalar at its end: above 0, it raises it
    scalars    text    [scalar]            names, as reports have them
    examples   text    [example]           sample ids
    window     int64   [2]                 the states that the window takes one to the other
    method     text    []                  what made them

The linear datamodeling score is the Spearman correlation, over sets of removed examples, between
`- sum of scores over the set` and what happens to the scalar without it (definitions.md section 7;
Park et al. 2023, TRAK, eq. 5).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from circuit.artifacts import atomic_write_bytes
from circuit.errors import CircuitError
from circuit.lazy import np
from circuit.reading import read_bytes
from circuit.sizes import require_memory

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy.typing import NDArray

ARRAYS = ("scores", "scalars", "examples", "window", "method")


@dataclass(frozen=True)
class Scores:
    """What a method says of training examples.

    Attributes:
        method: its name.
        scalars, examples: names of the rows and columns.
        window: the states that the steps take one to the other.
        scores: float64; see the module.
    """

    method: str
    scalars: tuple[str, ...]
    examples: tuple[str, ...]
    window: tuple[int, int]
    scores: Float[NDArray[np.float64], "scalar example"]

    def of(
        self, scalars: Sequence[str], examples: Sequence[str]
    ) -> Float[NDArray[np.float64], "scalar example"]:
        """Those of some scalars and examples, in this order.

        Raises:
            CircuitError: one of them has no score.
        """
        places = []
        for name, there, asked in (
            ("scalar", self.scalars, scalars),
            ("example", self.examples, examples),
        ):
            place = {one: at for at, one in enumerate(there)}
            missing = next((one for one in asked if one not in place), None)
            if missing is not None:
                raise CircuitError(f"{self.method} has no score of {name} '{missing}'")
            places.append([place[one] for one in asked])
        return self.scores[np.ix_(*places)]


def write_scores(path: str | Path, scores: Scores) -> None:
    """Write a file of scores; equal scores give equal bytes."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        scores=np.asarray(scores.scores, dtype=np.float64),
        scalars=np.array(scores.scalars, dtype=np.str_),
        examples=np.array(scores.examples, dtype=np.str_),
        window=np.array(scores.window, dtype=np.int64),
        method=np.array(scores.method, dtype=np.str_),
    )
    atomic_write_bytes(Path(path), buffer.getvalue())


def read_scores(path: str | Path) -> Scores:
    """Read a file of scores; nothing in it is executed.

    Raises:
        CircuitError: it is missing, is no such file, or holds what is no score.
    """
    payload = read_bytes(path)
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as file:
            unfolded = sum(member.file_size for member in file.zip.infolist())
            require_memory({"the arrays, unfolded": 2 * unfolded}, where=path)
            arrays = {name: file[name] for name in ARRAYS}
    except CircuitError:
        raise
    except Exception as error:  # noqa: BLE001 - of a damaged zip archive anything may follow
        raise CircuitError(
            f"no scores ({error})", where=path, expected=f"arrays {', '.join(ARRAYS)} in .npz"
        ) from None
    scores, scalars, examples = (arrays[name] for name in ARRAYS[:3])
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    expected = {"scores": [scalars.size, examples.size], "window": [2], "method": []}
    expected |= {"scalars": [scalars.size], "examples": [examples.size]}
    if shapes != expected:
        raise CircuitError(
            f"arrays of shapes {shapes}",
            where=path,
            expected="scores [scalar, example], scalars [scalar], examples [example], window [2],"
            " method []",
        )
    if scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise CircuitError("scores that are no finite floats", where=path)
    texts = [tuple(str(one) for one in array) for array in (scalars, examples)]
    if any(len(set(names)) < len(names) for names in texts):
        raise CircuitError("a scalar or an example twice", where=path)
    first, last = arrays["window"].tolist()
    return Scores(str(arrays["method"]), texts[0], texts[1], (first, last), scores.astype(float))


@dataclass(frozen=True)
class Lds:
    """A linear datamodeling score; null where nothing varies.

    Attributes:
        value: the Spearman correlation over all sets.
        low, high: ends of its interval over resampled sets, of 95 %.
        spread: predicted over actual standard deviation.
    """

    value: float | None
    low: float | None
    high: float | None
    spread: float | None


def lds(
    scores: Float[NDArray[np.float64], " example"],
    removed: Bool[NDArray[np.bool_], "set example"],
    changes: Float[NDArray[np.float64], " set"],
    *,
    resamples: int = 1000,
    seed: int = 17,
) -> Lds:
    """How well scores order what happens without sets of examples.

    Args:
        scores: of one scalar.
        removed: which examples each set takes away.
        changes: of the scalar, without each set.
        resamples: of the sets with replacement, for the interval.
        seed: of the resampling.
    """
    # rounded once, so that sets of equal scores are tied
    predicted = -np.array([math.fsum(scores[out]) for out in removed])
    if len(changes) < 3 or not np.ptp(predicted) or not np.ptp(changes):
        return Lds(None, None, None, None)
    draws = np.random.default_rng(seed).integers(len(changes), size=(resamples, len(changes)))
    resampled = _spearman(predicted[draws], changes[draws])
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    (value,) = _spearman(predicted[None], changes[None])
    return Lds(float(value), float(low), float(high), float(predicted.std() / changes.std()))


def _spearman(
    one: Float[NDArray[np.float64], "draw set"], other: Float[NDArray[np.float64], "draw set"]
) -> Float[NDArray[np.float64], " draw"]:
    """Of each row: the correlation of ranks, ties sharing theirs."""
    from scipy import stats

    ranks = [stats.rankdata(values, axis=1) for values in (one, other)]
    x, y = (of - of.mean(1, keepdims=True) for of in ranks)
    with np.errstate(invalid="ignore"):  # a draw of one set alone
        values: NDArray[np.float64] = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
        return values
