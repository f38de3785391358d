"""What one call of an optimizer's `step` reads and writes, by parameter name, and its terms.

Everything is read from torch's own objects: groups with their settings, the state of every
parameter, the gradients that the call finds. Groups may differ in any setting, parameters may be
frozen or have no gradient, and counts of steps may differ: each part of the parameters that shares
settings and count follows a rule of its own (`circuit.core.update`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from circuit.core.flat import ParameterLayout
from circuit.core.update import (
    AdamWRule,
    AnyRule,
    Hyper,
    OptimizerStep,
    SGDRule,
    UpdateRule,
    UpdateTerms,
    joined,
)
from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

Past: TypeAlias = "dict[str, dict[str, Any]]"
"""What an optimizer remembers: parameter name -> key -> tensor, number or None."""

_ADAM = ("torch.optim.adam.Adam", "torch.optim.adamw.AdamW")
_SGD = "torch.optim.sgd.SGD"
_DECOUPLED = ("torch.optim.Muon", "torch.optim.Adafactor")
"""torch's other optimizers that multiply the weights by `1 - lr * weight_decay`, unasked."""
_COUNTS = ("step", "mu_product", "eta", "mu")
"""What torch's optimizers remember as numbers, which a parameter of no axes is shaped like, too."""


@dataclass(frozen=True)
class Group:
    """A parameter group: names of its parameters, and its settings as a step reads them."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class TakenStep:
    """What one call of `step` read and wrote.

    Attributes:
        kind: the optimizer's class, `torch.optim.adamw.AdamW`.
        decoupled: whether the weight decay of an optimizer that is not torch's is decoupled.
        groups: with the settings of the call.
        before, after: all parameters of the module.
        gradient: as the optimizer read it, of the parameters that had one.
        past, memory: what the optimizer remembered before and after.
        outside: parameters as they were left by the step before, where something other than an
            optimizer has changed them since.
        raw: the gradient before it was clipped, where that is known.
    """

    kind: str
    decoupled: bool
    groups: tuple[Group, ...]
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    past: Past
    memory: Past
    outside: Mapping[str, Tensor]
    raw: Mapping[str, Tensor] = field(default_factory=dict)

    def terms(self, layout: ParameterLayout, columns: Sequence[str] = ()) -> UpdateTerms:
        """The update and its terms; they sum to what has changed since the step before.

        Args:
            layout: of the flat vectors; of some parameters alone it is of theirs.
            columns: terms that are told, zero if need be, beside those that there are.

        Raises:
            CircuitError: a flag of a group is one with which the update cannot be split.
        """
        parts = [part for group in self.groups for part in self._parts(layout, group)]
        update = joined(layout.size, parts)
        change = torch.zeros(layout.size, dtype=torch.float64)
        if not parts:  # no parameter had a gradient, of which there is a reference otherwise
            update = replace(update, plain_sgd={"clipped_sgd": torch.zeros_like(change)})
        for name, value in self.outside.items():
            if name not in layout.names:
                continue
            start, stop = layout.range(name)
            moved = self.before[name].double() - value.double()
            change[start:stop] = moved.reshape(-1).cpu()
        if self.outside:
            update = update.with_outside(change)
        absent = {name: torch.zeros_like(change) for name in columns if name not in update.terms}
        return replace(update, terms={**update.terms, **absent})

    def _parts(self, layout: ParameterLayout, group: Group) -> Iterator[tuple[Tensor, UpdateTerms]]:
        """Of a group: parameters with a gradient, apart by their count and whether it begins."""
        alike: dict[tuple[int, bool], list[str]] = {}
        for name in group.names:
            if name in self.gradient and name in layout.names:
                count = int(self.memory.get(name, {}).get("step", 1))
                fresh = not any(isinstance(x, torch.Tensor) for x in self.past[name].values())
                alike.setdefault((count, fresh), []).append(name)
        rule, hyper = rule_of(self.kind, group.settings, self.decoupled), hyper_of(group.settings)
        for (count, fresh), names in alike.items():
            part = ParameterLayout.of_shapes({name: self.before[name].shape for name in names})
            gradient = part.flatten(self.gradient)
            yield (
                torch.cat([torch.arange(*layout.range(name)) for name in names]),
                rule.terms(
                    OptimizerStep(
                        before=part.flatten(self.before),
                        after=part.flatten(self.after),
                        gradient=part.flatten(self.raw) if self.raw else None,
                        clipped=gradient,
                        moments_before={} if fresh else moments_of(self.past, part),
                        moments_after=moments_of(self.memory, part),
                        step=count,
                        hyper=hyper,
                    )
                ),
            )


def moments_of(past: Past, layout: ParameterLayout) -> dict[str, Tensor]:
    """The tensors of the parameters' shapes that are remembered of any of them, as flat vectors.

    A parameter of which nothing is remembered yet has zeros, as torch starts from.
    """
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    held: dict[str, dict[str, Tensor]] = {}
    for name in shapes:
        for key, value in past.get(name, {}).items():
            if isinstance(value, torch.Tensor):
                held.setdefault(key, {})[name] = value
    keys = [key for key, tensors in held.items() if is_moment(key, tensors, shapes)]

    def vector(name: str, key: str) -> Tensor:
        value = past.get(name, {}).get(key)
        if not isinstance(value, torch.Tensor):
            return torch.zeros(shapes[name]).reshape(-1)
        return value.detach().reshape(-1).cpu()

    return {key: torch.cat([vector(name, key) for name in layout.names]) for key in keys}


def is_moment(
    key: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether what is remembered under a key has the shape of every parameter that it is of.

    Factored moments have it of some parameters by chance.
    """
    fits = (tuple(tensor.shape) == shapes.get(name) for name, tensor in tensors.items())
    return key not in _COUNTS and all(fits)


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """The class of an optimizer, as a name from which it can be imported."""
    return class_name(type(optimizer))


def class_name(of: type) -> str:
    """Module and name of a class."""
    return f"{of.__module__}.{of.__qualname__}"


def groups_of(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> tuple[Group, ...]:
    """The groups of an optimizer as they are now.

    Args:
        names: of the module's parameters, by `id`.

    Raises:
        CircuitError: it holds a parameter that is none of the module's.
    """
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        members = [names.get(id(parameter)) for parameter in group["params"]]
        if None in members:
            place = members.index(None)
            raise CircuitError(
                f"parameter {place} {list(group['params'][place].shape)} of group {number} of"
                f" {type(optimizer).__name__} is none of the module's",
                expected="an optimizer of the parameters of the module that is watched",
                fix="pass the module that holds them all",
            )
        settings = {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key not in ("params", *_NAMES)
        }
        groups.append(Group(tuple(str(name) for name in members), settings))
    return tuple(groups)


_NAMES = ("param_names",)
"""Entries of a group that say what stands in `params`."""


def past_of(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> Past:
    """A copy of what an optimizer remembers of each of its parameters."""

    def copied(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    return {
        names[id(parameter)]: {
            key: copied(value) for key, value in optimizer.state.get(parameter, {}).items()
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def counts_of(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, int]:
    """The steps that are counted for each parameter of which something is remembered; else 1."""
    return {
        names[id(parameter)]: int(remembered.get("step", 1))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (remembered := optimizer.state.get(parameter))
    }


def remember(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], past: Past
) -> None:
    """Give an optimizer a copy of what one like it remembered of each parameter.

    Tensors stand as torch keeps them: beside their parameter; counts on the CPU, but for fused
    kernels.
    """
    fused = {
        id(p): bool(group.get("fused")) for group in optimizer.param_groups for p in group["params"]
    }
    for name, remembered in past.items():
        parameter = parameters[name]

        def placed(value: Any, parameter: nn.Parameter = parameter) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            beside = value.ndim or fused[id(parameter)]
            return value.to(parameter.device if beside else "cpu", copy=True)

        if remembered:
            optimizer.state[parameter] = {key: placed(value) for key, value in remembered.items()}


def term_names(kind: str, groups: Sequence[Group], decoupled: bool = False) -> tuple[str, ...]:
    """The columns of all groups' terms."""
    rules = (rule_of(kind, group.settings, decoupled) for group in groups)
    return tuple(dict.fromkeys(name for rule in rules for name in rule.names))


def shared_rule(
    kind: str,
    groups: Sequence[Group],
    moved: Mapping[str, int],
    step: int,
    layout: ParameterLayout,
    decoupled: bool = False,
) -> tuple[UpdateRule, Hyper] | None:
    """The one rule that all parameters followed in a step, with rate and decay of each.

    What has not moved has the rate 0. None where groups or counts differ, so that parts of the
    parameters follow rules of their own (`TakenStep.terms`).

    Args:
        moved: parameters that had a gradient, with the steps that are counted for them.
        step: the count of a parameter that has moved in every step.
    """
    rules = {rule_of(kind, group.settings, decoupled) for group in groups}
    counted = not isinstance(next(iter(rules)), SGDRule)
    if len(rules) > 1 or (counted and any(count != step for count in moved.values())):
        return None
    (rule,) = rules
    each = [hyper_of(group.settings) for group in groups]
    if len(moved) == len(layout.names) and all(hyper == each[0] for hyper in each):
        return rule, each[0]
    # a rate and decay for each number of the flat vector: the rule itself knows no groups
    rate, decay = torch.zeros(2, layout.size, dtype=torch.float64)
    for group, hyper in zip(groups, each, strict=True):
        for name in group.names:
            if name in moved:
                at = slice(*layout.range(name))
                rate[at], decay[at] = hyper.rate, hyper.decay
    return rule, Hyper(rate, decay)


def rule_of(kind: str, settings: Mapping[str, Any], decoupled: bool = False) -> UpdateRule:
    """What splits the update of a group.

    Args:
        kind: the optimizer's class.
        settings: of the group.
        decoupled: whether the weight decay of an optimizer that is not torch's is decoupled.

    Raises:
        CircuitError: with one of its flags the update cannot be split.
    """
    for flag in ("capturable", "differentiable"):
        if settings.get(flag):  # the step is a tensor: its corrections are rounded to float32
            raise CircuitError(
                f"{kind.rpartition('.')[2]} has {flag}=True, with which its update is not split",
                expected=f"{flag}=False",
                fix=f"build the optimizer without {flag}, or keep states alone",
            )
    if kind in _ADAM:
        beta1, beta2 = settings["betas"]
        return AdamWRule(
            float(beta1),
            float(beta2),
            float(settings["eps"]),
            amsgrad=bool(settings["amsgrad"]),
            maximize=bool(settings["maximize"]),
            coupled_decay=bool(settings["weight_decay"])
            and not settings.get("decoupled_weight_decay", kind == _ADAM[1]),
        )
    if kind == _SGD:
        return SGDRule(
            float(settings["momentum"]),
            nesterov=bool(settings["nesterov"]),
            dampening=float(settings["dampening"]),
            maximize=bool(settings["maximize"]),
        )
    told = kind in _DECOUPLED or bool(settings.get("decoupled_weight_decay"))
    return AnyRule(
        told or (decoupled and not kind.startswith("torch.optim.")),
        maximize=bool(settings.get("maximize")),
    )


def hyper_of(settings: Mapping[str, Any]) -> Hyper:
    """Rate and decay of a group; an optimizer that has none counts as 0."""
    return Hyper(float(settings.get("lr", 0.0)), float(settings.get("weight_decay", 0.0)))


def shared_rate(groups: tuple[Group, ...]) -> float:
    """The rate of the first group, which is all groups' where they share one."""
    return float(groups[0].settings.get("lr", 0.0))


def names_by_id(module: nn.Module) -> dict[int, str]:
    """The names of a module's parameters, tied ones once, by `id`."""
    return {id(parameter): name for name, parameter in module.named_parameters()}
