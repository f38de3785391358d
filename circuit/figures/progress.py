"""Figures of how heads come to match and to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.figures.style import COLOURS, panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (
    ("qk_separation", "QK separation\n(score, support − distractors)"),
    ("attention_support", "attention on the support"),
    ("head_value_margin_dla", "value margin of the output\nthrough $W_U$ (logits)"),
)
_DASHES = ("-", "--", ":", "-.")


@styled
def heads_over_steps(means: Sequence[Mapping[str, Any]]) -> Figure:
    """QK separation, attention on the support and OV progress of each head over steps.

    Colour is the layer, dashes the head; the head with the largest last value is thick and named.

    Args:
        means: rows of `ov_write_progress_means.jsonl`.
    """
    heads = list(dict.fromkeys(row["head"] for row in means))
    layers = list(dict.fromkeys(_layer(head) for head in heads))
    figure, axes = panels(len(_PANELS), height=2.3)
    axes[0].set_title("Who matches, who looks, who writes; means over pairs")
    for axis, (column, label) in zip(axes, _PANELS, strict=True):
        last = {head: _course(means, head, column)[-1][1] for head in heads}
        known = {head: value for head, value in last.items() if value is not None}
        best = max(known, key=lambda head: known[head], default=None)
        for head in heads:
            course = _course(means, head, column)
            steps, values = [step for step, _ in course], [value for _, value in course]
            number = int(head.partition("H")[2])
            (line,) = axis.plot(
                steps,
                [float("nan") if value is None else value for value in values],
                color=COLOURS[layers.index(_layer(head)) % len(COLOURS)],
                linestyle=_DASHES[number % len(_DASHES)],
                linewidth=2.6 if head == best else 1.0,
                alpha=1.0 if head == best else 0.75,
                label=head,
            )
            if head == best:
                axis.annotate(
                    head,
                    (steps[-1], values[-1]),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    weight="bold",
                    color=line.get_color(),
                )
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("optimizer step")
    figure.align_ylabels()
    legend = figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(layers)
    )
    for line in legend.get_lines():
        line.set_linewidth(1.3)
    return figure


def _course(
    means: Sequence[Mapping[str, Any]], head: str, column: str
) -> list[tuple[int, float | None]]:
    return [(row["step"], row[column]) for row in means if row["head"] == head]


def _layer(head: str) -> str:
    return head.partition("H")[0]
