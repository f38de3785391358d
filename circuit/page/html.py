"""Panels to one self-contained HTML file: template, style, script, Vega's runtime and the data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

from circuit.figures.charts import STYLE
from circuit.page.panel import MOST, Panel, Source


def render(
    *,
    title: str,
    facts: Sequence[str],
    panels: Sequence[Panel],
    steps: Sequence[int],
    further: Sequence[Source],
) -> str:
    """The page as text; equal panels give equal bytes.

    Args:
        facts: shown under the title.
        steps: stops of the slider.
        further: reports that no panel draws.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    asked = [panel for panel in panels if not (panel.sources or panel.example or panel.charts)]
    payload = {
        "steps": list(steps),
        "style": STYLE,
        "panels": {panel.name: _payload(panel) for panel in panels if panel not in asked},
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_part("page.html")).render(
        title=title,
        facts=facts,
        panels=panels,
        asked=asked,  # of what is not there
        further=further,
        most=MOST,
        steps=steps,
        style=Markup(_part("page.css")),
        script=Markup(_part("page.js")),
        vega=Markup(_vega()),
        payload=Markup(_script_json(payload)),
    )


def _payload(panel: Panel) -> dict[str, Any]:
    return {
        "charts": [
            {"title": chart.title, "spec": chart.spec, "follows": chart.follows}
            for chart in panel.charts
        ],
        "tables": [  # pairs: JavaScript moves keys like 500 to the front of an object
            {**asdict(table), "columns": list(table.columns.items())} for table in panel.tables
        ],
        "data": {name: _columns(records) for name, records in panel.data.items()},
        "example": panel.example,
    }


def _columns(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Records column by column, which takes half the bytes."""
    names = list(records[0]) if records else []
    return {name: [record[name] for record in records] for name in names}


def _script_json(payload: Any) -> str:
    """JSON that can stand in a <script>: no `<` in it, so nothing can end the element."""
    text = json.dumps(payload, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


_SNIPPET = "window.vegaEmbed = vegaEmbed; window.vega = vega;"


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one module that needs nothing else."""
    import vl_convert

    return vl_convert.javascript_bundle(_SNIPPET).replace("</script", "<\\/script")


def _part(name: str) -> str:
    return (files("circuit.page") / name).read_text(encoding="utf-8")
