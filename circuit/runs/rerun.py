"""An optimizer alone, over stored gradients: its steps again, without a model, a loss or data.

The optimizer is torch's own, built from the settings of its groups, with the memory of a stored
state. A class that is not torch's is never imported by a name in a file: whoever opens the
recording passes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from circuit.core.digests import tensor_digest
from circuit.core.flat import ParameterLayout
from circuit.core.optimizers import Group, Past, TakenStep, class_name, past_of, remember
from circuit.environment import changed_facts, environment_facts
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.runs.recording import WatchedOptimizer
from circuit.runs.records import StoredState, StoredStep

if TYPE_CHECKING:
    from torch import Tensor, nn


class ElsewhereError(CircuitError):
    """A step that was taken again left other parameters than the recorded one."""


class Rerun:
    """Some optimizers and the parameters that they move.

    Attributes:
        step: steps taken so far.
        parameters: by name, in the order of the layout.
        buffers: as the last step found them.
        optimizers: built anew.
    """

    def __init__(
        self,
        watched: Sequence[WatchedOptimizer],
        state: StoredState,
        *,
        classes: Sequence[type] = (),
        device: str = "cpu",
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        """Build them at a stored state.

        Args:
            watched: the optimizers.
            state: where they begin.
            classes: of those that are not torch's.
            device: on which they ran.
            environment: that of the recording: its threads are used, its facts named.

        Raises:
            CircuitError: an optimizer cannot be built; it is named.
        """
        self.step = state.step
        self.watched = tuple(watched)
        self._environment = environment
        self.parameters: dict[str, nn.Parameter] = {
            name: torch.nn.Parameter(tensor.to(device, copy=True), requires_grad=False)
            for name, tensor in state.parameters.items()
        }
        self.layout = ParameterLayout.of_shapes({n: p.shape for n, p in self.parameters.items()})
        self.buffers = dict(state.buffers)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._groups = state.groups
        self.optimizers = [
            self._built(_class_of(one.kind, classes), groups, past)
            for one, groups, past in zip(watched, state.groups, state.pasts, strict=True)
        ]

    def _built(
        self, kind: type[torch.optim.Optimizer], groups: Sequence[Group], past: Past
    ) -> torch.optim.Optimizer:
        known = inspect.signature(kind).parameters
        shared = {key: value for key, value in groups[0].settings.items() if key in known}
        members = [
            {**group.settings, "params": [self.parameters[name] for name in group.names]}
            for group in groups
        ]
        try:
            optimizer = kind(members, **shared)
            remember(optimizer, self.parameters, past)
        except Exception as error:  # it is anybody's code
            raise CircuitError(
                f"{kind.__name__} cannot be built from the settings of its groups ({error})",
                expected="an optimizer whose arguments stand in its groups",
                fix="keep states instead of gradients",
            ) from error
        return optimizer

    def advance(self, step: StoredStep) -> None:
        """Take one step.

        Raises:
            ElsewhereError: its parameters are not those that were recorded.
        """
        self._enter(step)
        self._execute(step)

    def take(self, step: StoredStep) -> TakenStep:
        """Take one step, and say what it read and wrote; raises as `advance`."""
        outside = {name: self.parameters[name].detach().clone() for name in step.parameters}
        self._enter(step)
        optimizer, watched = self.optimizers[step.optimizer], self.watched[step.optimizer]
        before, past = self._copies(), past_of(optimizer, self._names)
        self._execute(step)
        return TakenStep(
            kind=watched.kind,
            decoupled=watched.decoupled_decay,
            groups=tuple(
                Group(group.names, settings)
                for group, settings in zip(self._groups[step.optimizer], step.settings, strict=True)
            ),
            before=before,
            after=self._copies(),
            gradient=step.gradient,
            past=past,
            memory=past_of(optimizer, self._names),
            outside=outside,
        )

    def pasts(self) -> tuple[Past, ...]:
        """What every optimizer remembers now."""
        return tuple(past_of(optimizer, self._names) for optimizer in self.optimizers)

    def _copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def _enter(self, step: StoredStep) -> None:
        """What had changed before the step was taken."""
        for name, value in step.parameters.items():
            self.parameters[name].copy_(value)
        self.buffers.update(step.buffers)

    def _execute(self, step: StoredStep) -> None:
        optimizer = self.optimizers[step.optimizer]
        for name, parameter in self.parameters.items():
            gradient = step.gradient.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        try:
            for group, settings in zip(optimizer.param_groups, step.settings, strict=True):
                group.update(settings)
            with self._threads():
                optimizer.step()
        except Exception as error:  # it is anybody's code, and settings are what a file says
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CircuitError(
                f"{class_name(type(optimizer))} does not take step {step.step} ({told})",
                expected="the settings and gradients that it was recorded with",
            ) from error
        self.step = step.step
        if tensor_digest(self.layout.flatten(self.parameters)) != step.digest:
            raise self._elsewhere(optimizer)

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """torch's threads as they were: an optimizer may multiply matrices."""
        here = torch.get_num_threads()
        there = here if self._environment is None else self._environment["threads"]
        if here != there:
            torch.set_num_threads(there)
        try:
            yield
        finally:
            if here != there:
                torch.set_num_threads(here)

    def _elsewhere(self, optimizer: torch.optim.Optimizer) -> ElsewhereError:
        name = class_name(type(optimizer))
        if self._environment is None:
            return ElsewhereError(
                f"{name} did not take step {self.step} again: what it does depends on more than its"
                " groups, its state and the gradient",
                expected="an optimizer whose steps can be taken again",
                fix="keep states instead of gradients",
            )
        changed = changed_facts(self._environment, environment_facts(self._environment["device"]))
        return ElsewhereError(
            f"step {self.step} is not the recorded one: {name} moved the parameters elsewhere;"
            f" changed since the recording: {'; '.join(changed) or 'no recorded fact'}",
            fix="open it on a machine as that of the recording",
        )


def _class_of(kind: str, classes: Sequence[type]) -> type[torch.optim.Optimizer]:
    """The class of that name: one of those given, or torch's.

    A script's own is `__main__`'s where it was recorded, and another module's where it is opened.
    """
    names = {class_name(one): one for one in classes}
    kind_class: Any = names.get(kind)
    name = kind.rpartition(".")[2]
    if kind_class is None and not kind.startswith("torch.optim."):
        alike = (one for one in classes if kind.endswith(f".{one.__qualname__}"))
        kind_class = next(alike, None)
    elif kind_class is None:
        kind_class = getattr(torch.optim, name, None)
        if kind_class is not None and class_name(kind_class) != kind:
            kind_class = None
    if kind_class is None:
        raise CircuitError(
            f"the optimizer {kind} is none of torch's",
            expected="its class, which no file is trusted to name",
            fix=f"pass it: circuit.open_run(folder, optimizers=[{name}])",
        )
    return kind_class  # type: ignore[no-any-return]
