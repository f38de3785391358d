"""The panel of what was written down live: its numbers are the rows'."""

from __future__ import annotations

from typing import Any

import pytest

from circuit.page.watched import SCALARS, watched_panel

TERMS = {"weight_decay": -0.5, "momentum": 1.5}


def watch_row(step: int, scalars: int, rates: dict[str, float], *, finite: bool) -> dict[str, Any]:
    values = {f"s{at}": step + at if finite else None for at in range(scalars)}
    row: dict[str, Any] = {"step": step}
    if rates:
        norms = {f"{of}_norm": 0.1 * step for of in ("gradient", "parameter", "update")}
        row |= {"lr": rates["0"], **norms}
    if len(rates) > 1:
        row["lr_by_group"] = rates
    if scalars:
        row["scalars"] = values
        row["attribution"] = {name: {"actual": 1.0, "terms": TERMS} for name in values}
    return row


@pytest.mark.parametrize(
    ("scalars", "rates"),
    [(0, {"0": 0.1}), (1, {}), (1, {"0": 0.1, "1": 0.1}), (SCALARS + 2, {"0": 0.1, "1": 0.3})],
)
def test_every_scalar_and_every_rate_that_differs_is_drawn(
    scalars: int, rates: dict[str, float]
) -> None:
    rows = [watch_row(step, scalars, rates, finite=step != 4) for step in range(0, 10, 2)]
    (panel,) = watched_panel(rows)
    drawn = {one.name: one.data[one.name] for one in panel.charts}
    for at in range(min(scalars, SCALARS)):
        assert [record["value"] for record in drawn[f"watched_{at}"]] == [
            row["scalars"][f"s{at}"] for row in rows
        ]
    assert bool(panel.notes) == (scalars > SCALARS)
    groups = {(record["group"], record["rate"]) for record in drawn.get("watched_rates", ())}
    assert len(groups) == len(set(rates.values()))
    assert all(record["norm"] > 0 for record in drawn.get("watched_norms", ()))
    changes = panel.data.get("watched_changes", ())
    assert len(changes) == len(rows) * min(scalars, SCALARS)
    assert all(record.items() >= TERMS.items() for record in changes)


def test_nothing_is_said_where_nothing_was_written() -> None:
    assert watched_panel([]) == []
