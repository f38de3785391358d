"""Progress measures of modular addition (Nanda et al. 2023, sections 5.1 and 5.2, appendix).

A model that adds modulo p writes `cos(w_k (a + b - c))` into the logit of `c`, for a few *key
frequencies* k with `w_k = 2 pi k / p`: of its inputs a function in the span of `cos w_k (a + b)`
and `sin w_k (a + b)`. The logits of all p * p inputs `a b =`, at `=`, are split into

    mean   the mean over all inputs, of each token's logit
    key    their projection on those waves of the key frequencies
    rest   what is left

Measures (definitions.md section 8):

    restricted_loss  the loss of mean + key, a value for each of the p * p inputs
    excluded_loss    the loss of mean + rest, a value for each input of the training split
    key_power        share of the key frequencies in the power of `W_E` over the numbers' tokens, of
                     that which is not constant; one value
    squared_weights  the sum of all squared parameters; one value

Losses are cross-entropies in nats over the whole vocabulary, as in training (the paper leaves the
logit of `=` out), in float64. Key frequencies are constants, so that every measure telescopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from circuit.core.fourier import power_shares, waves_of
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.readout import LOGITS
from circuit.options import Option
from circuit.scalars.base import Cache, Needs, Sequences
from circuit.scalars.family import ScalarFamily
from circuit.tasks.base import Task
from circuit.tasks.modular_addition.task import KINDS, ModularAddition

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformer_lens import HookedTransformer

    from circuit.reports.inputs import Inputs
    from circuit.scalars.base import Scalar

Measure = Literal["restricted_loss", "excluded_loss", "key_power", "squared_weights"]
RESTRICTED, EXCLUDED, KEY_POWER, SQUARED = get_args(Measure)
EQUALS = KINDS.index("equals")
"""The position that predicts."""


def check_sums(task: Task, key_frequencies: Sequence[int] = ()) -> None:
    """Refuse another task than modular addition, and frequencies that its modulus does not have.

    Raises:
        CircuitError: names the task, or the frequency.
    """
    if not isinstance(task, ModularAddition):
        raise CircuitError(
            f"the run's task is {task.config.benchmark_type}", expected="modular_addition"
        )
    most = task.modulus // 2
    for frequency in key_frequencies:
        if not 1 <= frequency <= most:
            raise CircuitError(
                f"frequency {frequency}",
                where="`key_frequencies`",
                expected=f"1 to {most}, half of the modulus {task.modulus}",
            )


# --- the logits of all inputs, and their parts ----------------------------------------------------


def every_input(p: int) -> Sequences:
    """`a b =` for all numbers, b the faster."""
    return tuple((a, b, p) for a in range(p) for b in range(p))


def sums(p: int) -> Int[Tensor, " input"]:
    """The answers of `every_input`, which are their token ids."""
    number = torch.arange(p)
    return ((number[:, None] + number) % p).flatten()


def mean_by_sum(logits: Float[Tensor, "input token"]) -> Float[Tensor, "sum token"]:
    """The mean over the p inputs that have the same sum."""
    p = round(len(logits) ** 0.5)
    first = torch.arange(p, device=logits.device)
    of_sum = first * p + (first[:, None] - first) % p  # [sum, first]
    return logits[of_sum].mean(1)


@dataclass(frozen=True)
class LogitParts:
    """The logits of all inputs `every_input(p)`, split; float64 and differentiable.

    Attributes:
        logits: as they are.
        by_sum: the key part, the same for all inputs of one sum.
    """

    logits: Float[Tensor, "input token"]
    by_sum: Float[Tensor, "sum token"]

    @classmethod
    def of(cls, logits: Float[Tensor, "input token"], key_frequencies: Sequence[int]) -> LogitParts:
        """Split logits. A wave of `a + b` is constant where the sum is: means come first."""
        logits = logits.double()
        means = mean_by_sum(logits)
        waves = waves_of(len(means), key_frequencies, logits.device)  # orthonormal [wave, sum]
        return cls(logits, waves.T @ (waves @ means))

    @cached_property
    def answers(self) -> Int[Tensor, " input"]:
        """Of the inputs."""
        return sums(len(self.by_sum)).to(self.logits.device)

    @property
    def mean(self) -> Float[Tensor, " token"]:
        """Over all inputs."""
        return self.logits.mean(0)

    @property
    def key(self) -> Float[Tensor, "input token"]:
        """The projection on the waves of the key frequencies."""
        return self.by_sum[self.answers]

    @property
    def rest(self) -> Float[Tensor, "input token"]:
        """Neither mean nor key."""
        return self.logits - self.mean - self.key

    def restricted_losses(self) -> Float[Tensor, " input"]:
        """Loss of mean + key (Nanda et al. 2023, 5.1): what the key frequencies alone achieve."""
        by_sum = self.mean + self.by_sum
        answers = torch.arange(len(by_sum), device=by_sum.device)  # a sum's token is its number
        loss = torch.nn.functional.cross_entropy(by_sum, answers, reduction="none")
        return loss[self.answers]

    def excluded_losses(self, chosen: Int[Tensor, " chosen"]) -> Float[Tensor, " chosen"]:
        """Loss of mean + rest (Nanda et al. 2023, 5.1) on some inputs: without key frequencies.

        Args:
            chosen: numbers of the inputs; the measure is that of the training split.
        """
        answers = self.answers[chosen]
        without = self.logits[chosen] - self.by_sum[answers]
        return torch.nn.functional.cross_entropy(without, answers, reduction="none")


# --- scalars --------------------------------------------------------------------------------------


class _Constant:
    """A scalar of which nothing depends on the step."""

    constant = True
    name: str
    needs: Needs

    def bind(self, model: HookedTransformer) -> _Constant:
        """Itself."""
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """See the module's docstring."""
        raise NotImplementedError


class SumLoss(_Constant):
    """`restricted_loss` or `excluded_loss`, a value an input (`LogitParts`)."""

    def __init__(
        self, measure: Measure, task: ModularAddition, key_frequencies: Sequence[int]
    ) -> None:
        """Describe the scalar.

        Raises:
            CircuitError: the modulus has no such frequency.
        """
        check_sums(task, key_frequencies)
        self.name, self._measure, self._key = measure, measure, tuple(key_frequencies)
        inputs = every_input(task.modulus)
        self.needs = Needs(inputs, (LOGITS,))
        self._trained = [i for i, (a, b, _) in enumerate(inputs) if task.is_trained(a, b)]

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """The loss of each input."""
        parts = LogitParts.of(cache[LOGITS][:, EQUALS], self._key)
        if self._measure == RESTRICTED:
            return parts.restricted_losses()
        return parts.excluded_losses(torch.tensor(self._trained, device=parts.logits.device))


class KeyPower(_Constant):
    """`sum over key k of P_k / sum over k > 0 of P_k`, `P_k` the power of `W_E` at frequency k.

    `P_k` is the squared length of the numbers' embeddings along the waves of frequency k (Nanda et
    al. 2023, section 4.1 and figure 3).
    """

    name = KEY_POWER
    needs = Needs((), ())

    def __init__(self, task: ModularAddition, key_frequencies: Sequence[int]) -> None:
        """Describe the scalar; raises as `SumLoss`."""
        check_sums(task, key_frequencies)
        self._p, self._key = task.modulus, tuple(key_frequencies)

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """The one value."""
        shares = power_shares(model.W_E[: self._p])
        return shares[[k - 1 for k in self._key]].sum()[None]


class SquaredWeights(_Constant):
    """`sum theta_i²` over all parameters, a tied one once (Nanda et al. 2023, section 5.2)."""

    name = SQUARED
    needs = Needs((), ())

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """The one value."""
        return torch.stack([one.double().square().sum() for one in model.parameters()]).sum()[None]


class ModularAdditionMeasures(ScalarFamily):
    """Which measures are followed (definitions.md section 8)."""

    measures: Annotated[tuple[Measure, ...], Option("Measure.", flag="--measure")] = (SQUARED,)
    key_frequencies: Annotated[
        tuple[int, ...],
        Option(
            "Key frequency; all measures but squared_weights need some.",
            flag="--key-frequency",
            least=1,
        ),
    ] = ()

    def check(self) -> None:
        """Most measures are of key frequencies."""
        super().check()
        for measure in self.measures:
            if measure != SQUARED and not self.key_frequencies:
                raise CircuitError(
                    f"{measure} needs key frequencies",
                    where="`measures`",
                    fix="give `key_frequencies`; modular-addition-progress-report says which",
                )

    def check_task(self, task: Task) -> None:
        """Also refuses another task, and frequencies that its modulus does not have."""
        super().check_task(task)
        check_sums(task, self.key_frequencies)

    def build(self, inputs: Inputs) -> list[Scalar]:
        """One scalar a measure."""
        task, key = inputs.task, self.key_frequencies
        assert isinstance(task, ModularAddition), "check_task has seen to it"
        kinds = {KEY_POWER: lambda: KeyPower(task, key), SQUARED: SquaredWeights}
        return [kinds[one]() if one in kinds else SumLoss(one, task, key) for one in self.measures]
