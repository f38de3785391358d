"""scalar-attribution: which optimizer term moved a scalar, of any family or one's own."""

from __future__ import annotations

from typing import Annotated, Any

from circuit.options import Option
from circuit.reports.attribution import Attribution, AttributionOptions, Scalars
from circuit.reports.inputs import Inputs
from circuit.scalars.family import parse_scalars


class ScalarAttributionOptions(AttributionOptions):
    """Scalars by their words (circuit/scalars/family.py)."""

    scalars: Annotated[
        tuple[str, ...],
        Option(
            "name[,key=value...]: qk_match, functional_write, answer_scalar, loss, induction,"
            " modular_addition, or module:name of your own.",
            flag="--scalar",
            kind="scalar",
        ),
    ]

    def check(self) -> None:
        """Also refuses a word that says nothing."""
        super().check()
        for word in self.scalars:
            parse_scalars(word)


class ScalarAttribution(Attribution[ScalarAttributionOptions]):
    """Which optimizer term moved any number of the weights: contributions that add up."""

    command = "scalar-attribution"
    names = ("trace attribute",)
    Options = ScalarAttributionOptions

    def families(self) -> tuple[Scalars, ...]:
        return tuple(map(parse_scalars, self.options.scalars))

    def scalar_facts(self, inputs: Inputs) -> dict[str, Any]:
        facts = [family.provenance(inputs) for family in self.followed]
        return {"scalars": facts}
