"""An attribution as a netCDF file holds the numbers of its series, by name."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import netcdf_file
from torch import Tensor, nn

import circuit
from circuit.attribution.arrays import as_netcdf
from circuit.attribution.series import Series
from circuit.errors import CircuitError


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Series]:
    torch.manual_seed(0)
    module, folder = nn.Linear(3, 2), tmp_path_factory.mktemp("watched") / "run"
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    with circuit.watch(module, optimizer, folder):
        for _ in range(4):
            optimizer.zero_grad()
            module(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()

    def größe(module: nn.Module) -> Tensor:
        return module.weight.square().sum()  # type: ignore[operator, union-attr]

    def bias(module: nn.Module) -> Tensor:
        return module.bias.sum()  # type: ignore[operator, union-attr]

    run = circuit.open_run(folder, module=module)
    return circuit.attribute(run, [größe, bias], 1, 4, partitions=["layer", "circuit"])


def names(content: Any, axis: str) -> list[str]:
    """A text coordinate, as xarray reads it."""
    variable = content.variables[axis]
    assert variable._Encoding == b"utf-8"
    return [b"".join(row).rstrip(b"\0").decode() for row in variable[:].copy()]


def test_every_number_stands_under_its_names(series: dict[str, Series]) -> None:
    payload = as_netcdf(series)
    assert payload == as_netcdf(series)
    with netcdf_file(io.BytesIO(payload), mmap=False) as content:
        assert names(content, "scalar") == list(series) == ["größe", "bias"]
        assert content.variables["step"][:].tolist() == [2, 3, 4]
        terms, groups = names(content, "term"), names(content, "layer")
        for row, one in enumerate(series.values()):
            assert terms == list(one.path)
            for name in ("before", "after", "clip"):
                assert np.array_equal(content.variables[name][row], getattr(one, name))
            for kind in ("path", "first_order"):
                for column, term in enumerate(terms):
                    expected = getattr(one, kind)[term]
                    assert np.array_equal(content.variables[kind][row, column], expected)
                    for place, group in enumerate(groups):
                        expected = one.groups["layer"][group][kind][term]
                        numbers = content.variables[f"{kind}_by_layer"][row, place, column]
                        assert np.array_equal(numbers, expected)
        for place, name in enumerate(names(content, "reference_term")):
            expected = [one.references[name] for one in series.values()]
            assert np.array_equal(content.variables["reference"][:, place], expected)


def test_only_one_attributions_series_go_together(series: dict[str, Series]) -> None:
    with pytest.raises(CircuitError, match="no series"):
        as_netcdf({})
    shorter = {**series, "bias": series["bias"].window(1, 3)}
    with pytest.raises(CircuitError, match="bias has other steps"):
        as_netcdf(shorter)
