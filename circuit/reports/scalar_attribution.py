"""scalar-attribution: which optimizer term moved a scalar, of any family or one's own."""

from __future__ import annotations

from typing import Any

from circuit.reports.attribution import Attribution, AttributionOptions
from circuit.reports.traced import Scalars, WordOptions, parse_words


class ScalarAttributionOptions(WordOptions, AttributionOptions):
    """Scalars by their words, and every attribution's options."""


class ScalarAttribution(Attribution[ScalarAttributionOptions]):
    """Which optimizer term moved any number of the weights: contributions that add up."""

    command = "scalar-attribution"
    names = ("trace attribute",)
    Options = ScalarAttributionOptions
    any_module = True
    of_recipes = True

    def families(self) -> tuple[Scalars, ...]:
        return parse_words(self.options.scalars)

    def scalar_facts(self, inputs: Any) -> dict[str, Any]:
        facts = [family.provenance(inputs) for family in self.followed]
        return {"scalars": facts}
