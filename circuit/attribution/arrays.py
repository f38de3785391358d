"""An attribution as arrays with coordinates: a netCDF file, which `xarray.open_dataset` opens.

    step     [step]                            numbers of the steps
    scalar   [scalar]                          names
    term     [term]                            optimizer terms
    before, after, clip  [scalar, step]
    first_order, path    [scalar, term, step]  contributions, which sum over `term` to the change
    <kind>_by_<partition>  [scalar, <partition>, term, step]; <partition> names the groups
    reference  [scalar, reference_term, step]  first order, of what is not in the sum

netCDF 3 (classic), because SciPy, which is needed anyway, writes it, and everything reads it. It
has no 64-bit integers and no text: steps are Int32, names are characters with `_Encoding`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from circuit.attribution.series import Series
from circuit.errors import CircuitError
from circuit.lazy import np

Names = dict[str, list[str]]


def as_netcdf(series: Mapping[str, Series]) -> bytes:
    """The series of one attribution as the bytes of a netCDF file; equal series give equal bytes.

    Args:
        series: as `circuit.attribute` gives them, all over the same steps.

    Raises:
        CircuitError: there are none, or they are of different steps, terms or partitions.
    """
    every = list(series.values())
    if not every:
        raise CircuitError("no series", expected="those of an attribution")
    first = every[0]
    for one in every:
        same = np.array_equal(one.steps, first.steps) and _names(one) == _names(first)
        if not same:
            raise CircuitError(
                f"{one.scalar} has other steps, terms or groups than {first.scalar}",
                expected="the series of one attribution",
            )
    return _written(every)


def _names(series: Series) -> Names:
    """The names along each axis but the step's."""
    groups = {partition: list(of) for partition, of in series.groups.items()}
    return {"term": list(series.path), "reference_term": list(series.references), **groups}


def _written(every: Sequence[Series]) -> bytes:
    from scipy.io import netcdf_file

    file = io.BytesIO()
    names: Names = {"scalar": [one.scalar for one in every], **_names(every[0])}
    content = netcdf_file(file, "w")
    content.createDimension("step", len(every[0].steps))
    steps = content.createVariable("step", "i4", ("step",))
    steps[:] = every[0].steps
    for axis, texts in names.items():
        if texts:
            _write_names(content, axis, texts)

    def write(name: str, axes: tuple[str, ...], values: object) -> None:
        variable = content.createVariable(name, "f8", axes)
        variable[:] = np.asarray(values, dtype=np.float64)

    for name in ("before", "after", "clip"):
        write(name, ("scalar", "step"), [getattr(one, name) for one in every])
    for kind in ("first_order", "path"):
        by_term = [list(getattr(one, kind).values()) for one in every]
        write(kind, ("scalar", "term", "step"), by_term)
        for partition in every[0].groups:
            grouped = [
                [list(of[kind].values()) for of in one.groups[partition].values()] for one in every
            ]
            write(f"{kind}_by_{partition}", ("scalar", partition, "term", "step"), grouped)
    if names["reference_term"]:
        references = [list(one.references.values()) for one in every]
        write("reference", ("scalar", "reference_term", "step"), references)
    content.flush()
    return file.getvalue()


def _write_names(content: object, axis: str, texts: Sequence[str]) -> None:
    """Texts as rows of characters, filled up with zeros."""
    encoded = [text.encode() for text in texts]
    width = max(1, *map(len, encoded))
    content.createDimension(axis, len(texts))  # type: ignore[attr-defined]
    content.createDimension(f"{axis}_characters", width)  # type: ignore[attr-defined]
    axes = (axis, f"{axis}_characters")
    variable = content.createVariable(axis, "S1", axes)  # type: ignore[attr-defined]
    rows = [text.ljust(width, b"\0") for text in encoded]
    variable[:] = np.array([[bytes([c]) for c in row] for row in rows], dtype="S1")
    variable._Encoding = "utf-8"
