"""Figures of the cross-seed study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.figures.style import COLOURS, TERM_NAMES, styled
from circuit.lazy import mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROLES = {"winner": COLOURS[0], "runner_up": COLOURS[5], "median": "#808080", "bottom": "#C8C8C8"}


@styled
def roles_by_seed(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Growth of the selected heads of every seed, each bar with its address.

    Args:
        rows: of `cross-seed-comparison`.
    """
    figure = mpl.figure.Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(_ROLES)
    for place, (role, colour) in enumerate(_ROLES.items()):
        at = [seed + (place - 1.5) * width for seed in range(len(rows))]
        heights = [row[f"{role}_growth"] for row in rows]
        bars = axes.bar(at, heights, width, color=colour, label=role.replace("_", "-"))
        addresses = [row[f"{role}_head"] for row in rows]
        axes.bar_label(bars, addresses, fontsize=7, padding=2, rotation=90)
    axes.set_xticks(range(len(rows)), [f"seed {row['seed']}" for row in rows])
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylabel("growth of separation")
    axes.set_title(f"selected heads of every seed ({rows[0]['score']})")
    axes.margins(y=0.18)
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


@styled
def terms_by_seed(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What each optimizer term contributed to the winner's match and to the winner path's write."""
    figure = mpl.figure.Figure(figsize=(7.2, 2.8), layout="constrained")
    titles = {"match": "QK match of the winner head", "write": "write of the winner path"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        terms = list(rows[0][f"{name}_terms"])
        width = 0.8 / len(terms)
        for place, term in enumerate(terms):
            at = [seed + (place - (len(terms) - 1) / 2) * width for seed in range(len(rows))]
            values = [row[f"{name}_terms"][term] for row in rows]
            label = TERM_NAMES.get(term, term) if name == "match" else None
            axes.bar(at, values, width, color=COLOURS[place], label=label)
        axes.plot(
            range(len(rows)),
            [row[f"{name}_actual"] for row in rows],
            "k_",
            markersize=16,
            label="actual change" if name == "match" else None,
        )
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_xticks(range(len(rows)), [str(row["seed"]) for row in rows])
        axes.set_xlabel("seed")
        axes.set_title(title)
        axes.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure
