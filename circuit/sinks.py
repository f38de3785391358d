"""Where numbers of a run go while it lasts: the trackers that people look at.

A sink is one of
- a function of a step and its numbers by name;
- an object with `log(numbers, step=step)`: what `wandb.init(...)` returns, or the module `trackio`;
- one with `add_scalar(name, value, step)`: TensorBoard's `SummaryWriter`.

None of them is imported here, and what they do with the numbers is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from circuit.errors import CircuitError

Numbers: TypeAlias = dict[str, float]


class Log(Protocol):
    """As Weights & Biases and trackio take numbers."""

    def log(self, numbers: Numbers, /, *, step: int) -> Any:
        """Take the numbers of a step."""


class Writer(Protocol):
    """As TensorBoard takes numbers."""

    def add_scalar(self, name: str, value: float, step: int, /) -> Any:
        """Take one number of a step."""


Sink: TypeAlias = Callable[[int, Numbers], Any] | Log | Writer


def as_function(sink: Any) -> Callable[[int, Numbers], Any]:
    """A sink as a function of a step and its numbers.

    Raises:
        CircuitError: it is none.
    """
    log, add_scalar = getattr(sink, "log", None), getattr(sink, "add_scalar", None)
    if callable(log):
        return lambda step, numbers: log(numbers, step=step)
    if callable(add_scalar):

        def write(step: int, numbers: Numbers) -> None:
            for name, value in numbers.items():
                add_scalar(name, value, step)

        return write
    if callable(sink):
        return lambda step, numbers: sink(step, numbers)
    raise CircuitError(
        f"{type(sink).__name__} is no sink",
        where="`sinks`",
        expected="a function of step and numbers, or an object with log or add_scalar",
    )


def flattened(row: Mapping[str, Any], prefix: str = "") -> Numbers:
    """The numbers of a row under one name each: `attribution/margin/terms/weight_decay`."""
    numbers: Numbers = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            numbers |= flattened(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            numbers[prefix + name] = float(value)
    return numbers
