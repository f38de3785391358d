"""Where numbers of a run go while it lasts: the trackers that people look at.

A sink is one of
- a function of a step and its numbers by name;
- an object with `log(numbers, step=step)`: what `wandb.init(...)` returns, or the module `trackio`;
- one with `add_scalar(name, value, step)`: TensorBoard's `SummaryWriter`.

On a command line it is a word, `KIND:WHERE` (`open_sinks`): `tensorboard:FOLDER`, `wandb:PROJECT`
or `trackio:PROJECT`. None of the trackers is imported before one is asked for, and what they do
with the numbers is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
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


def _tensorboard(where: str) -> tuple[Writer, Callable[[], Any]]:
    writer = _imported("torch.utils.tensorboard").SummaryWriter(where)
    return writer, writer.close


def _wandb(where: str) -> tuple[Log, Callable[[], Any]]:
    run = _imported("wandb").init(project=where)  # WANDB_MODE=offline is its own word for that
    return run, run.finish


def _trackio(where: str) -> tuple[Log, Callable[[], Any]]:
    trackio = _imported("trackio")
    trackio.init(project=where)
    return trackio, trackio.finish


KINDS: dict[str, Callable[[str], tuple[Sink, Callable[[], Any]]]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}
"""What a word may name: how it is opened, and closed."""


def check_word(word: str) -> tuple[str, str]:
    """Kind and place of a word.

    Raises:
        CircuitError: it names no sink.
    """
    kind, colon, where = word.partition(":")
    if kind not in KINDS or not colon or not where:
        raise CircuitError(
            f"'{word}'",
            where="`sinks`",
            expected="tensorboard:FOLDER, wandb:PROJECT or trackio:PROJECT",
        )
    return kind, where


@contextmanager
def open_sinks(words: Sequence[str]) -> Iterator[list[Sink]]:
    """The sinks that words name, closed at the end of the block.

    Raises:
        CircuitError: a word names none, or its tracker is not installed.
    """
    named = [check_word(word) for word in words]
    with ExitStack() as stack:
        sinks = []
        for kind, where in named:
            sink, close = KINDS[kind](where)
            stack.callback(close)
            sinks.append(sink)
        yield sinks


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise CircuitError(
            f"{module.rpartition('.')[2]} cannot be imported ({error})",
            where="`sinks`",
            fix="pip install 'circuit-formation[sinks]'",
        ) from None
