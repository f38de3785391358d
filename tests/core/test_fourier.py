"""Waves on the integers modulo p: orthonormal, and their powers in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from circuit.core.fourier import (
    fourier_basis,
    power_by_frequency,
    power_shares,
    wave_frequencies,
    waves_of,
)

MODULI = [2, 3, 5, 8, 12, 113]


@pytest.mark.parametrize("p", MODULI)
def test_waves_are_orthonormal_and_as_many_as_numbers(p: int) -> None:
    basis = fourier_basis(p)
    assert basis.dtype == torch.float64
    assert torch.allclose(basis @ basis.T, torch.eye(p).double(), atol=1e-13)
    assert int(wave_frequencies(p)[-1]) == p // 2


@pytest.mark.parametrize("p", MODULI)
def test_a_wave_of_one_frequency_has_its_power_alone(p: int) -> None:
    n = torch.arange(p).double()
    for k in range(1, p // 2 + 1):
        wave = torch.cos(2 * math.pi * k * n / p + 0.4)
        power = power_by_frequency(wave[:, None])
        assert float(power[k]) == pytest.approx(float(wave.square().sum()), rel=1e-11)
        assert float(power.sum() - power[k]) < 1e-18 * p**2
        assert len(waves_of(p, [k])) == (1 if 2 * k == p else 2)


@pytest.mark.parametrize("p", MODULI)
def test_powers_sum_to_the_squared_norm(p: int) -> None:
    functions = torch.randn(p, 3, generator=torch.Generator().manual_seed(p))
    power = power_by_frequency(functions)
    assert float(power.sum()) == pytest.approx(float(functions.double().square().sum()), rel=1e-13)
    transform = torch.fft.fft(functions.double(), dim=0, norm="ortho").abs().square().sum(1)
    folded = [
        float(transform[k] + (transform[-k] if 0 < k != p - k else 0)) for k in range(p // 2 + 1)
    ]
    assert power.tolist() == pytest.approx(folded, rel=1e-11)


def test_shares_leave_the_constant_out_and_are_zero_of_zeros() -> None:
    n = torch.arange(9).double()
    functions = torch.stack([7 + torch.cos(2 * math.pi * 2 * n / 9), torch.full((9,), 3.0)], 1)
    functions[:, 1] += 3 * torch.sin(2 * math.pi * 4 * n / 9)
    assert power_shares(functions).tolist() == pytest.approx([0, 0.1, 0, 0.9], abs=1e-15)
    assert power_shares(torch.zeros(9, 2)).tolist() == [0] * 4


def test_gradients_of_powers_are_differences() -> None:
    functions = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(power_by_frequency, functions.requires_grad_())
    assert torch.autograd.gradcheck(power_shares, functions)
