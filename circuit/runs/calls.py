"""A call of an optimizer's `step` that is watched, and what is refused of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from circuit.core.digests import same_bits
from circuit.core.flat import Flat
from circuit.core.optimizers import Group, Past
from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


MASK = 1 << 14
"""Numbers of a buffer from which on it counts as a mask."""


@dataclass
class Call:
    """A call of `step` that has begun.

    Attributes:
        optimizer: which one.
        frame: torch's own, around the call.
        whole: all of it is going to be looked at.
        outside, entering: parameters that have changed since the step before, as it left them and
            as this one found them.
        before, past: parameters, and what the optimizer remembers; where all is looked at.
        buffers: that have changed since the step before.
        gradient: of the parameters `names`, one behind the other.
        groups: with the settings that the call reads; hooks behind it may set those of the next.
    """

    optimizer: int
    frame: FrameType
    whole: bool
    outside: Mapping[str, Tensor] = field(default_factory=dict)
    entering: Mapping[str, Tensor] = field(default_factory=dict)
    before: Mapping[str, Tensor] = field(default_factory=dict)
    past: Past = field(default_factory=dict)
    buffers: Mapping[str, SeenBuffer] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    gradient: Flat | None = None
    groups: tuple[Group, ...] = ()

    def goes_on(self, frame: FrameType | None) -> bool:
        """Whether it has not returned or raised where a frame is executed."""
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


@dataclass(frozen=True)
class SeenBuffer:
    """A buffer as it was: a copy, the tensor itself, and how often that had been written to.

    The tensor is held: the `id` of one that is let go may be that of the next.
    """

    value: Tensor
    tensor: Tensor
    version: int | None

    @classmethod
    def of(cls, buffer: Tensor) -> SeenBuffer:
        # of a tensor of inference_mode writes are not counted
        version = None if buffer.is_inference() else buffer._version
        return cls(buffer.detach().clone(), buffer, version)

    def is_of(self, buffer: Tensor) -> bool:
        """Whether nothing has changed; running statistics are written without being counted."""
        if self.tensor is buffer and self.version is not None and _is_mask(buffer):
            return self.version == buffer._version
        kept = self.value
        alike = kept.dtype == buffer.dtype and kept.device == buffer.device
        return alike and same_bits(kept, buffer)


def _is_mask(buffer: Tensor) -> bool:
    """Large whole numbers, which would take long to compare: they change by counted writes."""
    return not buffer.is_floating_point() and buffer.numel() > MASK


def dtype_of(parameters: Mapping[str, Tensor]) -> str:
    """The one dtype of all parameters.

    Raises:
        CircuitError: there are none; they have several, or another than float32 and float64; they
            are on several devices.
    """
    if not parameters:
        raise CircuitError("the module has no parameters", expected="a module that is trained")
    one = next(iter(parameters.values()))
    first = one.dtype
    for name, parameter in parameters.items():
        if parameter.device != one.device:
            raise CircuitError(
                f"parameter {name} is on {parameter.device}, others on {one.device}",
                expected="all parameters on one device",
            )
        if parameter.dtype != first or first not in (torch.float32, torch.float64):
            raise CircuitError(
                f"parameter {name} is {parameter.dtype}",
                expected="parameters of float32 or float64, all of one dtype",
                fix="train with float32 weights under torch.autocast",
            )
    return str(first)


def gradient_of(name: str, parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter that has one.

    Raises:
        CircuitError: it is sparse, or of another dtype.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse or gradient.dtype != parameter.dtype:
        raise CircuitError(
            f"the gradient of {name} is {'sparse' if gradient.is_sparse else gradient.dtype}",
            expected=f"a dense one of {parameter.dtype}",
            fix="embeddings take sparse=False",
        )
    return gradient


def refuse_fused_scaling(optimizer: torch.optim.Optimizer) -> None:
    """A GradScaler leaves unscaling, and steps without finite gradients, to fused kernels.

    Raises:
        CircuitError: it has done so with the step that begins.
    """
    name = type(optimizer).__name__
    if getattr(optimizer, "grad_scale", None) is not None:
        raise CircuitError(
            f"{name} with fused=True unscales the gradient itself, where it cannot be read",
            expected="a gradient that is unscaled before the step",
            fix="call scaler.unscale_(optimizer) before scaler.step(optimizer), or fused=False",
        )
    left_out = getattr(optimizer, "found_inf", None)
    if left_out is not None and float(left_out):
        raise CircuitError(
            f"{name} with fused=True leaves a step without finite gradients out itself",
            expected="an optimizer of which the GradScaler leaves it out",
            fix="pass fused=False",
        )
