"""Figure of functional writes: what the readout uses of a write, by position and part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.figures.style import COLOURS, styled
from circuit.lazy import mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean_g_out_delta_in": ("g_out·δ_in (past the MLP)", {"color": COLOURS[0]}),
    "mean_g_out_delta_mlp": ("g_out·δ_mlp (through it)", {"color": COLOURS[1]}),
    "mean_g_out_delta_total": ("g_out·δ_total (both)", {"color": "black", "linewidth": 1.8}),
    "mean_g_in_delta_in": ("g_in·δ_in", {"color": COLOURS[2], "linestyle": "--"}),
    "mean_ablation_effect": ("effect of ablation, all positions", {"color": "0.6"}),
}


@styled
def written_deltas(means: Rows, scalar: str, path: str) -> Figure:
    """Mean products over steps; a row of panels a role (and pair type), a column an endpoint.

    Args:
        means: of mlp-input-functional-subspace-report's summary.
        scalar: the answer scalar that is drawn.
        path: the write path, for the title.
    """
    own = [row for row in means if row["scalar"] == scalar]
    lines = list(dict.fromkeys((row["position_role"], row["pair_type"]) for row in own))
    several = len({kind for _, kind in lines}) > 1
    ends = list(dict.fromkeys(row["endpoint_role"] for row in own))
    figure = mpl.figure.Figure(
        figsize=(max(4.6, 3.7 * len(ends)), 1.3 + 2.1 * len(lines)), layout="constrained"
    )
    grid = figure.subplots(len(lines), len(ends), sharex=True, sharey="row", squeeze=False)
    for axes_of_role, (role, kind) in zip(grid, lines, strict=True):
        for axes, end in zip(axes_of_role, ends, strict=True):
            shown = [
                row
                for row in own
                if (row["position_role"], row["pair_type"], row["endpoint_role"])
                == (role, kind, end)
            ]
            steps = [row["step"] for row in shown]
            axes.axhline(0, color="black", linewidth=0.6)
            for column, (label, style) in _PARTS.items():
                axes.plot(steps, [r[column] for r in shown], marker=".", label=label, **style)
        axes_of_role[0].set_ylabel(f"at {role}" + (f"\n{kind} pairs" if several else ""))
    for axes, end in zip(grid[0], ends, strict=True):
        axes.set_title(f"at the {end} of each interval")
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    figure.suptitle(f"{path}, read by {scalar.replace('_', ' ')}", fontsize="large")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
