"""One style for every figure, and the way to bytes: SVG without clock or random ids."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from cycler import cycler

from circuit.lazy import mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

TERM_NAMES = {
    "weight_decay": "weight decay",
    "adam_current_gradient": "current gradient",
    "adam_historical_momentum": "momentum history",
    "current_gradient": "current gradient",
    "historical_momentum": "momentum history",
    "rounding": "rounding residual",
}
"""Terms of an update as legends call them."""

_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=COLOURS),
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "svg.hashsalt": "circuit",
    "svg.fonttype": "path",
}


P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the program's one style, whatever the caller's settings are."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def panels(rows: int, *, width: float = 6.4, height: float = 2.4) -> tuple[Figure, Sequence[Any]]:
    """A figure of panels above each other that share their x axis.

    Args:
        width, height: inches; the height is one panel's.
    """
    figure = mpl.figure.Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def svg(figure: Figure) -> str:
    """The figure as SVG; equal figures give equal bytes."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
