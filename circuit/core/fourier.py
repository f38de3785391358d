"""Fourier analysis of functions on the integers modulo p, in real, orthonormal waves; float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuit.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor


def wave_frequencies(p: int, device: torch.device | str = "cpu") -> Int[Tensor, " wave"]:
    """The frequency of each row of `fourier_basis(p)`: 0, 1, 1, 2, 2, ... up to `p // 2`."""
    return (torch.arange(p, device=device) + 1) // 2


def fourier_basis(p: int, device: torch.device | str = "cpu") -> Float[Tensor, "wave p"]:
    """An orthonormal basis of the functions on 0 .. p-1, float64.

    Row 0 is constant; for each frequency `k` from 1 follow `cos(2 pi k n / p)` and
    `sin(2 pi k n / p)`, scaled to length 1. For even p the last frequency, p/2, has no sine.
    """
    number, k = torch.arange(p, device=device), wave_frequencies(p, device)
    # the product modulo p first: the argument keeps all of its digits
    angle = (2 * torch.pi / p) * ((k[:, None] * number) % p).double()
    is_sine = (torch.arange(p, device=device) % 2 == 0)[:, None]  # of row 0 it would be zero
    waves: Tensor = torch.where(is_sine, angle.sin(), angle.cos())
    waves[0] = 1.0
    unit: Tensor = waves / waves.norm(dim=1, keepdim=True)
    return unit


def waves_of(
    p: int, frequencies: Sequence[int], device: torch.device | str = "cpu"
) -> Float[Tensor, "wave p"]:
    """The rows of `fourier_basis(p)` of some frequencies."""
    of = torch.tensor(sorted(frequencies), dtype=torch.int64, device=device)
    return fourier_basis(p, device)[torch.isin(wave_frequencies(p, device), of)]


def power_by_frequency(functions: Float[Tensor, "p column"]) -> Float[Tensor, " frequency"]:
    """Sum over columns of the squared Fourier coefficients of each frequency, 0 .. p//2; float64.

    By Parseval's theorem they sum to the squared Frobenius norm. Differentiable.
    """
    p, device = len(functions), functions.device
    power = (fourier_basis(p, device) @ functions.double()).square().sum(1)
    frequencies = wave_frequencies(p, device)
    return power.new_zeros(p // 2 + 1).index_add(0, frequencies, power)


def power_shares(functions: Float[Tensor, "p column"]) -> Float[Tensor, " frequency-1"]:
    """Each frequency's share, from 1, of the power that is not constant; 0 of zeros.

    Differentiable.
    """
    power = power_by_frequency(functions)[1:]
    return power / power.sum().clamp_min(torch.finfo(power.dtype).tiny)
