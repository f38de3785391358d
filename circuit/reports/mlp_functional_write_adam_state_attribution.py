"""mlp-functional-write-adam-state-attribution: which optimizer term moved a functional write."""

from __future__ import annotations

from circuit.reports.attribution import Attribution, AttributionOptions
from circuit.scalars.functional_write import FunctionalWrites


class WriteAttributionOptions(FunctionalWrites, AttributionOptions):
    """A family's options beside those of every attribution."""


class WriteAttribution(Attribution[WriteAttributionOptions]):
    """Which optimizer term moved what a component writes for the answer, through an MLP."""

    command = "mlp-functional-write-adam-state-attribution"
    names = ("mlp-functional-write-adam-state-attribution", "trace write")
    Options = WriteAttributionOptions
    family = FunctionalWrites
