"""How well the contributions of an attribution add up, and by which rule: in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from circuit.attribution.series import Series
from circuit.core.paths import PathRule
from circuit.lazy import np


def closing_law(summaries: Sequence[Mapping[str, Any]], lead: str) -> str:
    """How well the contributions add up over the whole window, in one sentence."""
    of_lead = next(s for s in summaries if s["scalar"] == lead)
    closure, rounding = of_lead["closure"], of_lead["path"]["rounding"]
    shown = {name: "-" if v is None else f"{percent(v):.2g} %" for name, v in closure.items()}
    law = (
        f"the contributions to {lead} over steps {of_lead['start_step']}:{of_lead['end_step']}"
        f" close to {shown['path']} of the actual change {of_lead['actual']:+.4g} (first order:"
        f" {shown['first_order']}), step by step to {shown['path_absolute']} (first order:"
        f" {shown['first_order_absolute']}); the rounding residual carries {rounding:+.1g}"
    )
    others = [s for s in summaries if s["closure"]["path_absolute"] is not None]
    if len(summaries) > 1 and others:
        worst = max(others, key=lambda s: s["closure"]["path_absolute"])
        law += (
            f"; the worst of {len(summaries)} scalars, {worst['scalar']}, closes step by step to"
            f" {percent(worst['closure']['path_absolute']):.2g} %"
        )
    return law


def path_words(rule: PathRule, series: Sequence[Series]) -> str:
    """The rule, its nodes, and, of an adaptive one, where they did not suffice."""
    named = f"path rule {rule.name}"
    if rule.tolerance is None:
        count = len(rule.levels[0].nodes)
        return f"{named}, {count} node{'s' * (count > 1)} a step"
    nodes, agrees, rounded = (
        np.concatenate([column for one in series if (column := getattr(one, name)) is not None])
        for name in ("nodes", "agrees", "rounded")
    )
    words = f"{named}, {nodes.mean():.1f} nodes a step on average, {nodes.max()} at most"
    within = f"two levels agree within {rule.tolerance:g} of the step's change"
    if agrees.all():
        return f"{words}: in every row {within}"
    law = f"{words}: in {agrees.sum()} of {len(agrees)} rows {within}"
    if rounded.any():
        law += (
            f"; in {rounded.sum()} within one unit in the last place of the scalar, which more"
            " nodes cannot better"
        )
    if not (agrees | rounded).all():
        law += (
            f"; the others have the finest level, {len(rule.levels[-1].nodes)} nodes, which was"
            " not fine enough"
        )
    return law


def percent(share: float | None) -> float | None:
    """A share in percent; null stays."""
    return None if share is None else 100 * share
