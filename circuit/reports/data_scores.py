"""Scores of training examples by each method: whose files `circuit.attribution.scores` describes.

Credit, influence and leave-one-out are three questions with three answers (definitions.md section
7); TracIn and the gradient dot are what is often taken in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, RootModel

from circuit.artifacts import atomic_write_text, dump_json
from circuit.attribution.credit import CreditPass
from circuit.attribution.influence import InfluencePass
from circuit.attribution.losses import Losses
from circuit.attribution.replays import Replays, key
from circuit.attribution.window import attributor_of
from circuit.core.edit import Edit
from circuit.core.state import FlatState
from circuit.documents import validated
from circuit.lazy import np, torch
from circuit.reading import MissingFileError, read_json
from circuit.sealed import sealed, unsealed
from circuit.tasks.examples import UNPREDICTED
from circuit.trace.replay import ReplayedRun
from circuit.trace.step import BatchLoss
from circuit.training.optimizers import learning_rate
from circuit.training.recipe import TaskRecipe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

    from circuit.attribution.attribute import Attributor
    from circuit.core.flat import Flat
    from circuit.scalars.base import Scalar

COSTS, TRAINING = "costs.json", "training"
CHECKPOINTS = 5
"""States of the window that TracIn looks at."""
PROJECTED = 64
"""Dimensions of TRAK's projection; at most half as many as examples."""


class Costs(RootModel[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]]):
    """Seconds of a processor, by what took them."""


@dataclass(frozen=True)
class Seen:
    """The examples of a window's batches.

    Attributes:
        numbers: in the training split, by sample id.
        first: the first step of the window that reads each.
    """

    numbers: dict[str, int]
    first: dict[str, int]

    @classmethod
    def within(cls, recipe: TaskRecipe, start: int, end: int) -> Seen:
        """Those of the steps that take state `start` to state `end`."""
        numbers: dict[str, int] = {}
        first: dict[str, int] = {}
        for step in range(start + 1, end + 1):
            indices = recipe.indices(step).tolist()
            for name, number in zip(recipe.sample_ids(step), indices, strict=True):
                numbers.setdefault(name, number)
                first.setdefault(name, step)
        return cls(numbers, first)


@dataclass(frozen=True)
class Window:
    """What scores are of.

    Attributes:
        start, end: the states that its steps take one to the other.
        seen: the examples of its batches.
        names: those that are scored.
    """

    run: ReplayedRun
    scalars: Sequence[Scalar]
    start: int
    end: int
    seen: Seen
    names: Sequence[str]

    @property
    def pair(self) -> tuple[int, int]:
        """Its states."""
        return self.start, self.end

    @property
    def scalar_names(self) -> tuple[str, ...]:
        """Of the scalars, in order."""
        return tuple(scalar.name for scalar in self.scalars)

    def attributor(self, *, averages: bool = False) -> Attributor:
        """Of the scalars, on a model of its own."""
        return attributor_of(self.run, self.scalars, averages=averages)


@dataclass
class Studied:
    """One window, and what is known of it.

    Attributes:
        window: what is scored.
        loo: the trainings without one example, by its name.
        sets: by share, which examples each set takes away, Bool `[set, example]`.
        kept: the trainings that are done.
        actual: values of the scalars at the end of the run.
    """

    window: Window
    folder: Path
    loo: dict[str, Edit]
    sets: dict[float, NDArray[np.bool_]]
    kept: Replays
    actual: tuple[float, ...]

    @property
    def label(self) -> str:
        """Its steps."""
        return f"{self.window.start}:{self.window.end}"

    def edit(self, names: list[str]) -> Edit:
        """Without some examples, from the first step on that reads one of them."""
        first = min(self.window.seen.first[name] for name in names)
        return Edit(first - 1, self.window.end, examples=dict.fromkeys(names, 0.0))

    def spent(self, what: str | None = None, seconds: float = math.inf) -> dict[str, float]:
        """Processor time of each method, as it last scored, and the least of a training there.

        Args:
            what, seconds: one more that was measured, which is kept beside what it made.
        """
        if what is None:
            return self._costs()
        with self.kept.lock():  # other workers measure, too
            costs = self._costs()
            least = costs.get(what, math.inf) if what == TRAINING else math.inf
            costs[what] = min(seconds, least)
            atomic_write_text(self.folder / COSTS, dump_json(sealed(costs)))
        return costs

    def _costs(self) -> dict[str, float]:
        path, fix = self.folder / COSTS, "remove it; costs are then unknown"
        try:
            payload = read_json(path, fix=fix)
        except MissingFileError:
            return {}
        if isinstance(payload, dict):
            payload = unsealed(payload, where=path, fix=fix)
        return dict(validated(payload, Costs, where=path, fix=fix).root)

    def costs(self) -> dict[str, float]:
        """Of each method, in trainings over the window; as far as they are known."""
        costs = self.spent()
        training = costs.pop(TRAINING, 0.0)
        if not training:
            return {}
        length = self.window.end - self.window.start
        alone = sum(edit.end - edit.start for edit in self.loo.values()) / length
        of = {name: seconds / training for name, seconds in costs.items()}
        of |= {"leave_one_out": alone} if self.loo else {}
        return {name: round(cost, 2) for name, cost in of.items()} | {"seconds": training}

    def every(self) -> dict[str, Edit]:
        """All trainings, each once, by their keys."""
        sets = (edit for part in self.sets for edit in self.edits(part))
        return {key(edit): edit for edit in (*self.loo.values(), *sets)}

    def edits(self, of: float) -> list[Edit]:
        """Of the sets of a share."""
        names = np.array(self.window.names)
        return [self.edit(names[removed].tolist()) for removed in self.sets[of]]


def _summed(
    window: Window, steps: Iterable[tuple[Sequence[str], Tensor]]
) -> Float[NDArray[np.float64], "scalar example"]:
    """The sum of each example's shares `[scalar, example]` over steps."""
    place = {name: at for at, name in enumerate(window.names)}
    sums = torch.zeros(len(window.names) + 1, len(window.scalars), dtype=torch.float64)
    for ids, shares in steps:  # the last row is for who is not asked about
        at = torch.tensor([place.get(name, len(place)) for name in ids])
        sums.index_add_(0, at, shares.T)
    return sums[:-1].T.numpy()


def credit(window: Window) -> Float[NDArray[np.float64], "scalar example"]:
    """What each example has done."""
    passed = CreditPass(window.run, window.attributor(averages=True), window.start, window.end)
    return _summed(window, ((one.objective.ids, one.credit.sum(2)) for one in passed))


def influence(window: Window) -> Float[NDArray[np.float64], "scalar example"]:
    """The derivative by each example's weight."""
    passed = InfluencePass(window.run, window.attributor(), window.start, window.end)
    return _summed(window, ((one.objective.ids, one.influence.sum(2)) for one in passed))


def gradient_dot(window: Window) -> Float[NDArray[np.float64], "scalar example"]:
    """`- grad C . g_e` at the end of the window."""
    return _Gradients(window).dots([(window.end, 1.0)])


def tracin(window: Window) -> Float[NDArray[np.float64], "scalar example"]:
    """`- sum of lr grad C . g_e` over states of the window (Pruthi et al. 2020, TracInCP)."""
    chosen = np.linspace(window.start, window.end, CHECKPOINTS, endpoint=False).astype(int)
    config = window.run.config
    steps = np.unique(chosen).tolist()  # a short window has fewer
    return _Gradients(window).dots([(step, learning_rate(config, step + 1)) for step in steps])


def trak(window: Window) -> Float[NDArray[np.float64], "scalar example"]:
    """`- grad C P (F^T F)^-1 P^T g_e` at the end of the window, over a random projection `P`.

    Park et al. 2023, TRAK, section 3, of one model, with `F` over the scored examples: its rows are
    `P^T grad f` of the log odds `f = log(p / (1 - p))` of an example, `p = exp(- mean loss)`, so
    that `grad f = - grad (mean loss) / (1 - p)`.
    """
    of = _Gradients(window)
    theta, gradients = of.at(window.end)
    dimension = max(1, min(PROJECTED, len(window.names) // 2))  # well-conditioned
    random = torch.Generator().manual_seed(0)
    projection = torch.randn(dimension, len(theta), generator=random)
    products = of.products(theta, projection)  # [dimension, example], P^T g_e
    mean, count = of.mean_losses(theta)
    odds = (-torch.expm1(-mean)).clamp(min=torch.finfo(torch.float32).eps)  # 1 - p
    # a share in the batch's mean is the mean over the example's own targets times `count / sum`
    features = -products * (count.sum() / count) / odds  # [dimension, example], F^T
    kernel = torch.linalg.pinv(features @ features.T, hermitian=True)
    scalars = gradients @ projection.double().T  # [scalar, dimension]
    return (-scalars @ kernel @ products).numpy()  # type: ignore[no-any-return]


METHODS: dict[str, Callable[[Window], NDArray[np.float64]]] = {
    "credit": credit,
    "influence": influence,
    "tracin": tracin,
    "gradient_dot": gradient_dot,
    "trak": trak,
}


class _Gradients:
    """Gradients at states of the run: of the scalars, and of the scored examples' losses."""

    def __init__(self, window: Window) -> None:
        self.run, self.attributor = window.run, window.attributor()
        recipe = self.run.setup.recipe()
        assert isinstance(recipe, TaskRecipe), "the report has refused any other"
        numbers = np.array([window.seen.numbers[name] for name in window.names])
        examples = recipe.split.batch(numbers)
        # one batch of them all, so that each loss is over the same number of targets
        self.batch = recipe.read(numbers)
        self.objective = BatchLoss(recipe, self.batch, lambda: examples)
        self.losses = Losses(self.attributor.model)
        self.bound = self.attributor.bind(FlatState.of(self.run.state(window.end)).parameters)

    def at(self, step: int) -> tuple[Flat, Float[Tensor, "scalar parameter"]]:
        """The weights, and the gradients of the scalars there; float64."""
        theta: Flat = FlatState.of(self.run.state(step)).parameters
        return theta, self.attributor.evaluate(theta, self.bound)[1].double()

    def products(
        self, theta: Flat, directions: Float[Tensor, "direction parameter"]
    ) -> Float[Tensor, "direction example"]:
        """Of directions with the gradient `g_e` of each example."""
        return self.losses.derivatives(self.objective, theta, directions, "example").sum(2)

    def mean_losses(
        self, theta: Flat
    ) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"]]:
        """The mean loss of each example's targets, in nats; and how many these are."""
        with torch.no_grad():
            shares = self.losses(
                self.losses.parameters(theta), self.objective, *self.objective.inputs
            )
        count = (self.batch.targets != UNPREDICTED).double().cpu().sum(1)
        return shares.double().cpu().sum(1) * count.sum() / count, count

    def dots(
        self, states: Sequence[tuple[int, float]]
    ) -> Float[NDArray[np.float64], "scalar example"]:
        """`- sum of weight grad C . g_e` over states, each with a weight."""
        total = torch.zeros(1, dtype=torch.float64)
        for step, weight in states:
            theta, gradients = self.at(step)
            total = total - weight * self.products(theta, gradients)
        return total.numpy()
