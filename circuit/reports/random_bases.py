"""Random subspaces beside the one that is removed or kept: is it this subspace, or any?

Each draw is a uniformly random subspace of the same rank, and does its harm in two ways:

- `equal_rank`: the same operation with its basis, whatever it takes away;
- `equal_energy`: the change that the real basis makes to each vector, turned into the random
  subspace (`turned`): what is taken away has the real one's squared norm, and so has what is left.

Further row file: `geometry_subspace_intervention_random_bases.jsonl`, a row a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from circuit.artifacts import Row
from circuit.figures.charts import INK, exact, named
from circuit.lazy import alt, np
from circuit.model.ablation import Operation, turned
from circuit.model.readout import Answers
from circuit.model.rescue import random_basis
from circuit.model.subspaces import Basis
from circuit.reports.tables import Columns, Table
from circuit.scalars.nulls import beside

if TYPE_CHECKING:
    from torch import Tensor

ROWS = "geometry_subspace_intervention_random_bases.jsonl"
CONTROLS = ("equal_rank", "equal_energy")
_DRAWN = ("margin_drop", "answer_accuracy")
_TIE = 1e-4
"""Logits, or share of reads, that equal changes differ by: LayerNorm enlarges rounding."""


class RandomBases:
    """Draws at every checkpoint and rank; the same ones at each checkpoint.

    Attributes:
        rows: one a draw and control.
        means: one a checkpoint, rank and control, with what the real basis does.
    """

    def __init__(self, draws: int, seed: int, operation: Operation) -> None:
        self.draws, self.seed, self.operation = draws, seed, operation
        self.rows: list[Row] = []
        self.means: list[dict[str, Any]] = []
        self._gap = 0.0

    def measure(
        self,
        place: Row,
        x: Tensor,
        basis: Basis,
        change: Callable[[Tensor, Basis], Tensor],
        clean: Answers,
        after: Answers,
        run_on: Callable[[Tensor], Answers],
    ) -> None:
        """All draws at one checkpoint and rank.

        Args:
            place: step and rank.
            x: vectors of the changed places.
            change: takes vectors and a basis to their replacements.
            clean, after: answers with nothing changed, and with the real basis.
            run_on: the answers with these replacements.
        """
        changed, margin = change(x, basis), float(clean.margin.double().mean())
        taken = _energy(x, changed)

        def row(replaced: Tensor, answers: Answers) -> Row:
            energy = _energy(x, replaced)
            return {
                "margin_drop": margin - float(answers.margin.double().mean()),
                "answer_accuracy": float(answers.is_answer.double().mean()),
                "energy_share": float((energy / x.double().square().sum(-1)).mean()),
            }

        drawn: dict[str, list[Row]] = {control: [] for control in CONTROLS}
        for draw in range(self.draws):
            other = random_basis(basis.shape[0], basis.shape[1], self.seed + draw).to(basis)
            equal_rank = change(x, other)
            equal_energy = turned(x, changed, equal_rank)
            gap = (_energy(x, equal_energy) - taken) / x.double().square().sum(-1)
            self._gap = max(self._gap, float(gap.abs().max()))
            for control, replaced in zip(CONTROLS, (equal_rank, equal_energy), strict=True):
                found = {**place, "control": control, "draw": draw}
                drawn[control].append({**found, **row(replaced, run_on(replaced))})
        real = row(changed, after)
        for control, rows in drawn.items():
            self.rows += rows
            mean = {**place, "control": control, "draws": self.draws, "baseline_margin": margin}
            mean |= {"energy_share": float(np.mean([r["energy_share"] for r in rows]))}
            for column in _DRAWN:
                # reached by as much harm, or, where the subspace is kept, by as little
                least = (column == "margin_drop") == (self.operation == "keep")
                values = np.array([r[column] for r in rows])
                told = beside(values, real[column], least=least, tie=_TIE)
                mean |= {f"real_{column}": real[column]}
                mean |= {f"{column}_{name}": value for name, value in told.items()}
            self.means.append(mean)

    def law(self) -> str:
        """What was checked of every draw."""
        return (
            f"draws of equal energy take away the squared norm that the real basis does, to"
            f" {self._gap:.1g} of the vector's"
        )


def _energy(x: Tensor, replaced: Tensor) -> Tensor:
    """Squared norm of the change of each vector."""
    return (replaced.double() - x.double()).square().sum(-1)


def how_random(draws: int, operation: Operation) -> str:
    """How to read table and charts."""
    reach = {"remove": "do at least as much harm", "keep": "leave at least as much"}[operation]
    return (
        f"Random bases: {draws} seeded draws of the same rank. `equal_rank` does the same with"
        " theirs; `equal_energy` makes the real change to each vector, of equal norm and"
        " leaving as much, in the direction of theirs. p: share of the draws that"
        f" {reach}, (1 + those) / (1 + draws), {1 / (1 + draws):.2g} at least. From, to, and pale"
        " bars in the charts: 95 % of the draws, a stroke their mean; left of the point equal rank,"
        " right of it equal energy. Energy: what they take of the vectors' squared norm."
    )


def random_table(means: Sequence[Row]) -> Table:
    """The real basis beside the draws."""
    columns: Columns = {
        "step": "step",
        "rank": "rank",
        "control": "control",
        "energy_share": ("energy", ".1%"),
        "real_margin_drop": ("drop", ".3f"),
        "margin_drop_mean": ("random", ".3f"),
        "margin_drop_low": ("from", ".3f"),
        "margin_drop_high": ("to", ".3f"),
        "margin_drop_p": ("p drop", ".3f"),
        "real_answer_accuracy": ("acc. after", ".1%"),
        "answer_accuracy_mean": ("random", ".1%"),
        "answer_accuracy_low": ("from", ".1%"),
        "answer_accuracy_high": ("to", ".1%"),
        "answer_accuracy_p": ("p acc.", ".3f"),
    }
    title = f"Against {means[0]['draws']} random bases, all reads"
    return Table(title, columns, means, console=len(means))


def whiskers(
    means: Sequence[Row], column: str, *, x: alt.X, shade: alt.Color | None = None, where: str = ""
) -> list[alt.Chart]:
    """95 % of the draws as pale bars, with a stroke at their mean, behind the real basis's point.

    Args:
        column: that is drawn, `margin` or `answer_accuracy`.
        shade: of the rank, where it tells ranks apart.
        where: filter.
    """
    layers: list[alt.Chart] = []
    if not means:
        return layers
    told = "margin_drop" if column == "margin" else column
    of_end = "datum.baseline_margin - datum." if column == "margin" else "datum."
    ends = {end: f"{told}_{end}" for end in ("mean", "low", "high")}
    for control, aside in zip(CONTROLS, (-5, 5), strict=True):
        place = named("random_bases").transform_filter(f"datum.control === '{control}'")
        place = place.transform_calculate(**{end: of_end + name for end, name in ends.items()})
        if where:
            place = place.transform_filter(where)
        if shade is not None:
            place = place.transform_calculate(rank="'rank ' + datum.rank").encode(color=shade)
        shown = exact("step", "rank", "control", "draws", *ends.values())
        place = place.encode(x=x, tooltip=shown)
        look: dict[str, Any] = {"xOffset": aside} | ({} if shade is not None else {"color": INK})
        bar = place.mark_rule(strokeWidth=6, opacity=0.3, **look).encode(y="low:Q", y2="high:Q")
        mean = place.mark_tick(orient="horizontal", width=9, thickness=2, **look)
        layers += [bar, mean.encode(y="mean:Q")]
    return layers
