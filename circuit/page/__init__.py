"""The formation page: one HTML file that tells a run's story from whatever reports exist.

A *panel* asks one question; its *data* are rows of one report (or of the run's metrics), column
for column; its *charts* are Vega-Lite specs over these data, which follow one parameter, `step`.
One invariant: no number is computed here that a report could have written, but for sums of rows
(attribution up to a step) and the attention over one example, which is read from the checkpoints.

Vega, because its whole runtime is 0.9 MB (Plotly's is 4.6 MB, nearly all that a page may weigh), it
draws SVG whose colours are CSS variables, so that light and dark need no second drawing, and a
chart is a declaration that Altair checks while the page is written.
"""

from __future__ import annotations

from circuit.page.compare import comparison_page
from circuit.page.formation import PageResult, formation_page

__all__ = ["PageResult", "comparison_page", "formation_page"]
