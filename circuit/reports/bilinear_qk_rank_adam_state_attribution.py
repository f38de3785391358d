"""bilinear-qk-rank-adam-state-attribution: which optimizer term moved a head's QK match."""

from __future__ import annotations

from circuit.reports.attribution import Attribution, AttributionOptions
from circuit.reports.report import Place
from circuit.scalars.qk_match import QKMatches


class QKAttributionOptions(QKMatches, AttributionOptions):
    """A family's options beside those of every attribution."""


class QKAttribution(Attribution[QKAttributionOptions]):
    """Which optimizer term moved a head's QK match: contributions that add up, step by step."""

    command = "bilinear-qk-rank-adam-state-attribution"
    names = ("bilinear-qk-rank-adam-state-attribution", "trace qk")
    Options = QKAttributionOptions
    family = QKMatches
    place = 5

    @classmethod
    def usual(cls, place: Place) -> QKAttributionOptions:
        rank = min(8, place.model.d_model // place.model.heads)
        probe_set, trace = (place.given[name] for name in ("probe_set", "optimizer_trace_dir"))
        return QKAttributionOptions(
            probe_set=probe_set, optimizer_trace_dir=trace, heads=(place.head,), ranks=(rank,)
        )
