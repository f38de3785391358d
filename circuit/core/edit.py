"""What is to be otherwise in a counterfactual training: one algebra of edits.

Every part of an edit maps names to numbers (or names, or steps) and has a neutral value, with which
it changes nothing; the step is then the run's own, by the same operations. In the order in which
they act on a step (definitions.md section 7):

- what it reads: `swapped` batches, `replaced` examples, factors of the losses of `examples`;
- what it computes: `patterns` of heads as the weights at `start` have them;
- how the optimizer is set: factors of its `settings`;
- where the weights go: factors of the `terms` of the update, a `direction` of the same norm,
  factors of the update of `parameters`, and `bounds` of their magnitude.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.numerals import WHOLE

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from circuit.core.flat import Flat, ParameterLayout
    from circuit.core.optimizers import Group, TakenStep

SETTINGS = ("rate", "decay", "clip")
DIRECTIONS = ("gradient", "momentum")
DECAYS = ("weight_decay", "decoupled_decay")
"""Terms that are the weights' own, whatever the gradient."""

_TOKEN = re.compile(f"(.+)@({WHOLE})")

Factors = Mapping[str, float]


@dataclass(frozen=True)
class Edit:
    """What some steps do otherwise.

    Attributes:
        start, end: the edit holds for the steps that take state `start` to the next ones, up to
            `end`.
        examples: factor of the loss of an example, by its name, or of one token of it, by the
            position that predicts it, counted from 0 (`train-00017@12`); 0 removes it. The number
            of targets by which the batch's loss is divided stays.
        terms: factor of a term of the update, by its name; 0 removes it.
        replaced: example that is read instead of one, wherever that occurs.
        swapped: pairs of steps, each of which reads the other's batch.
        patterns: share, from 0 to 1, of a head's attention pattern (`L1H0`) that is the pattern of
            the weights at `start`, through which no gradient goes; 1 freezes it.
        settings: factor of the learning `rate`, of weight `decay`, and of the `clip` threshold.
        direction: share, from 0 to 1, of what the optimizer adds besides decay that is replaced by
            a vector of the same norm against the clipped `gradient`, or against the `momentum`: the
            optimizer without its division.
        parameters: factor of the update of parameters: of a tensor by its name, or of a group
            (`L1`, `L1H0`, `L1H0.q`, `L0.mlp`), `*` standing for anything; 0 freezes. What the
            optimizer remembers goes on.
        bounds: largest magnitude of parameters, by the same names.

    Raises:
        CircuitError: the window holds no step, or a value is none.
    """

    start: int
    end: int
    examples: Factors = field(default_factory=dict)
    terms: Factors = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    swapped: tuple[tuple[int, int], ...] = ()
    patterns: Factors = field(default_factory=dict)
    settings: Factors = field(default_factory=dict)
    direction: Factors = field(default_factory=dict)
    parameters: Factors = field(default_factory=dict)
    bounds: Factors = field(default_factory=dict)

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # part of a run's config

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise CircuitError(
                f"an edit of steps {self.start}:{self.end}", expected="start < end, from 0 on"
            )
        for part in (self.examples, self.terms, self.parameters):
            _refuse_values(part, float("-inf"), "a finite number")
        for part in (self.settings, self.bounds):
            _refuse_values(part, 0, "a finite number, at least 0")
        for part in (self.patterns, self.direction):
            _refuse_values(part, 0, "a share from 0 to 1", most=1)
        for name, known in (("settings", SETTINGS), ("direction", DIRECTIONS)):
            unknown = next((one for one in getattr(self, name) if one not in known), None)
            if unknown is not None:
                raise CircuitError(
                    f"an edit of '{unknown}'",
                    where=f"`{name}`",
                    expected=f"one of {', '.join(known)}",
                )
        if sum(self.direction.values()) > 1:
            raise CircuitError(
                f"directions {dict(self.direction)}", expected="shares that are 1 together at most"
            )
        swapped = [step for pair in self.swapped for step in dict.fromkeys(pair)]
        for step in swapped:
            if swapped.count(step) > 1:
                raise CircuitError(
                    f"the batch of step {step} is swapped twice", expected="each step in one pair"
                )
            if not self.holds(step):
                raise CircuitError(
                    f"the batch of step {step} is swapped",
                    expected=f"a step of the edit, {self.start + 1} to {self.end}",
                )

    def holds(self, step: int) -> bool:
        """Whether a step (from 1) is otherwise."""
        return self.start < step <= self.end

    def batch_of(self, step: int) -> int:
        """The step whose batch a step reads."""
        return next((sum(pair) - step for pair in self.swapped if step in pair), step)

    @cached_property
    def weighed(self) -> dict[str, dict[int | None, float]]:
        """Factors of the examples by name and position; None: of all of its positions."""
        factors: dict[str, dict[int | None, float]] = {}
        for name, factor in self.examples.items():
            match = _TOKEN.fullmatch(name)
            example, position = (match[1], int(match[2])) if match else (name, None)
            factors.setdefault(example, {})[position] = factor
        return factors

    @cached_property
    def _last(self) -> int | None:
        """The last position that is named."""
        named = (at for of in self.weighed.values() for at in of if at is not None)
        return max(named, default=None)

    def weights(
        self, names: Sequence[str]
    ) -> Float[Tensor, " example"] | Float[Tensor, "example pos"] | None:
        """Factors of the losses of a batch; None where all are 1, which is the step as it was.

        Of its examples, or, where the edit names positions, of these; the last column is of all
        positions behind them.
        """
        factors = [self.weighed.get(name, {}) for name in names]
        if not any(factors):
            return None
        weights = torch.tensor([of.get(None, 1.0) for of in factors], dtype=torch.float64)
        if self._last is not None:
            weights = weights[:, None].repeat(1, self._last + 2)
            for row, of in enumerate(factors):
                for at, factor in of.items():
                    if at is not None:
                        weights[row, at] *= factor
        return None if bool((weights == 1).all()) else weights

    @property
    def moves(self) -> bool:
        """Whether weights go elsewhere than where the optimizer takes them."""
        factors = (*self.terms.values(), *self.parameters.values())
        return bool(
            any(factor != 1 for factor in factors) or any(self.direction.values()) or self.bounds
        )

    def moved(self, taken: TakenStep, layout: ParameterLayout) -> Flat:
        """Where the weights go, of the dtype of the parameters.

        Args:
            taken: what the optimizer read and wrote.
        """
        from circuit.core.optimizers import term_names

        before, after = layout.flatten(taken.before), layout.flatten(taken.after)
        scaled = {name: factor for name, factor in self.terms.items() if factor != 1}
        steered = {name: share for name, share in self.direction.items() if share}
        if scaled or steered:
            columns = term_names(taken.kind, taken.groups, taken.decoupled)
            terms, moved = taken.terms(layout, columns).named(), after.double()
            for name, factor in scaled.items():
                moved += (factor - 1) * terms[name]
            # what the optimizer adds besides decay, as far as the factors have left it
            added = torch.zeros_like(moved)
            for name in columns:
                if name not in DECAYS:
                    added += self.terms.get(name, 1) * terms[name]
            for name, share in steered.items():
                steer = -_against(name, taken, layout).double()
                if not steer.any():
                    raise CircuitError(f"the {name} is zero, which has no direction")
                moved += share * (steer * (added.norm() / steer.norm()) - added)
            after = moved.to(after.dtype)
        for name, factor in self.parameters.items():
            if factor != 1:
                update = (after - before) * factor
                part = before + update if factor else before  # frozen, to the sign of a zero
                after = torch.where(selected(layout, name), part, after)
        for name, bound in self.bounds.items():
            after = torch.where(selected(layout, name), after.clamp(-bound, bound), after)
        return after

    def check(self, kind: str, groups: Sequence[Group], decoupled: bool, module: nn.Module) -> None:
        """Refuse terms and parameters that a training does not have.

        Args:
            kind: the optimizer's class.
            groups: its groups.
            decoupled: see `TakenStep`.

        Raises:
            CircuitError: names what there is not, and what there is.
        """
        from circuit.core.flat import ParameterLayout
        from circuit.core.optimizers import term_names

        if self.terms:
            names = (*term_names(kind, groups, decoupled), "rounding")
            unknown = next((name for name in self.terms if name not in names), None)
            if unknown is not None:
                raise CircuitError(
                    f"the update has no term '{unknown}'", expected=f"one of {', '.join(names)}"
                )
        layout = ParameterLayout.of_model(module)
        for name in (*self.parameters, *self.bounds):
            selected(layout, name)

    def to_json(self) -> dict[str, Any]:
        """The window, and the parts that say something."""
        return dict(self._said())

    def _said(self) -> Iterator[tuple[str, Any]]:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in ("start", "end"):
                yield one.name, value
            elif value:
                said = isinstance(value, Mapping)
                yield one.name, dict(value) if said else [list(pair) for pair in value]


@lru_cache(maxsize=64)
def selected(layout: ParameterLayout, name: str) -> Tensor:
    """Mask `[parameter]` of a tensor or a group of parameters, `*` standing for anything.

    Raises:
        CircuitError: there is none of that name.
    """
    from circuit.core.groups import PARTITIONS, atoms

    mask = torch.zeros(layout.size, dtype=torch.bool)
    known: dict[str, None] = {}
    for atom in atoms(layout):
        names = (atom.tensor, *(atom.group(partition) for partition in PARTITIONS))
        known |= dict.fromkeys(names)
        if any(fnmatchcase(one, name) for one in names):
            atom.choose(mask)
    if not mask.any():
        raise CircuitError(f"no parameters '{name}'", expected=f"one of {', '.join(known)}")
    return mask


def _against(name: str, taken: TakenStep, layout: ParameterLayout) -> Flat:
    """What the weights are to go against: the gradient as the optimizer read it, or its mean."""
    if name == "gradient":
        sign = {
            name: -1 if group.settings.get("maximize") else 1
            for group in taken.groups
            for name in group.names
        }
        read = {name: gradient * sign[name] for name, gradient in taken.gradient.items()}
        zeros = {name: torch.zeros_like(p) for name, p in taken.before.items()}
        return layout.flatten({**zeros, **read})
    from circuit.core.optimizers import moments_of

    moments = moments_of(taken.memory, layout)
    for moment in ("exp_avg", "momentum_buffer"):
        if moment in moments:
            return moments[moment]
    raise CircuitError("the optimizer keeps no momentum", expected="direction 'gradient'")


def _refuse_values(
    part: Mapping[str, float], least: float, expected: str, most: float = float("inf")
) -> None:
    for name, value in part.items():
        if not (abs(value) < float("inf") and least <= value <= most):
            raise CircuitError(f"factor {value} of {name}", expected=expected)
