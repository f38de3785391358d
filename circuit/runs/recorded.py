"""A recording of somebody's own training loop, opened: its states, and its steps again.

The steps are executed by the optimizer alone over the stored gradients, and every one of them is
held against the digest of the parameters that it left. How the gradients came about is not known:
there is no config, no batch and no task.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from circuit.core.digests import same_bits
from circuit.core.edit import Edit
from circuit.core.flat import Flat, ParameterLayout
from circuit.core.optimizers import Past, TakenStep, moments_of, shared_rate
from circuit.core.state import FlatState, State
from circuit.core.update import UpdateTerms
from circuit.environment import require_device
from circuit.errors import CircuitError
from circuit.lazy import no_grad, torch
from circuit.runs.recording import Recording, StoredState
from circuit.runs.rerun import ElsewhereError, Rerun

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class RecordedStep:
    """Step `t`, which took `before` to `after`; a `circuit.core.step.Step`.

    Attributes:
        step: `t`, counted from 1.
        layout: of the flat vectors.
        taken: what the optimizer read and wrote.
        buffers: of the module, as the step found them.
        columns: terms that are told of every step, zero or not.
    """

    step: int
    layout: ParameterLayout
    taken: TakenStep
    buffers: Mapping[str, Tensor]
    columns: tuple[str, ...] = ()

    @property
    def lr(self) -> float:
        """`lr_t`, of the first group."""
        return shared_rate(self.taken.groups)

    @property
    def clip(self) -> float:
        """1: the gradient is recorded as the optimizer read it, behind any clipping."""
        return 1.0

    @cached_property
    def before(self) -> FlatState:
        """As the step before left it."""
        left = {**self.taken.before, **self.taken.outside}
        moments = moments_of(self.taken.past, self.layout)
        return FlatState(self.step - 1, self.layout.flatten(left), moments, self.buffers)

    @cached_property
    def after(self) -> FlatState:
        """After the step."""
        moments = moments_of(self.taken.memory, self.layout)
        parameters = self.layout.flatten(self.taken.after)
        return FlatState(self.step, parameters, moments, self.buffers)

    @property
    def gradient(self) -> Flat:
        """As the optimizer read it; zero where a parameter had none."""
        parameters = self.taken.before
        return self.layout.flatten(
            {
                name: self.taken.gradient.get(name, torch.zeros_like(tensor, device="cpu"))
                for name, tensor in parameters.items()
            }
        )

    @cached_property
    def update(self) -> UpdateTerms:
        """The update and its terms; computed when first asked for."""
        return self.taken.terms(self.layout, self.columns)

    @property
    def tokens(self) -> NoReturn:
        """Refused: the batch is not known."""
        raise _without("batch", "the recording")

    answers = objective = rule = hyper = momentum = tokens


@dataclass(frozen=True)
class RecordedState(State):
    """A state of a recording, with what else the next step depends on.

    Attributes:
        buffers: of the module.
        pasts: what each optimizer remembers.
    """

    buffers: dict[str, Tensor]
    pasts: tuple[Past, ...]


class RecordedRun:
    """A recording (a `circuit.runs.base.Run`).

    Attributes:
        recording: the files.
    """

    def __init__(
        self,
        recording: Recording,
        module: nn.Module | Callable[[], nn.Module] | None = None,
        optimizers: Sequence[type] = (),
    ) -> None:
        """Read nothing but the manifest.

        Args:
            recording: the files.
            module: of the shape that was recorded, or what makes one; its own weights play no part
                and stay as they are. States and steps need none.
            optimizers: classes of the optimizers that are not torch's.

        Raises:
            CircuitError: the module has other parameters.
        """
        self.recording = recording
        self._module = _made(module)
        self._classes = tuple(optimizers)
        self._walk: Rerun | None = None
        if self._module is not None:
            _check_module(self._module, recording)

    def __repr__(self) -> str:
        m = self.recording.manifest
        kinds = ", ".join(one.kind.rpartition(".")[2] for one in m.optimizers)
        return (
            f"RecordedRun({self.path}: {m.module}, {self.layout.size} parameters, {kinds}, steps 0"
            f" to {self.recording.last_step}, {m.keep} kept)"
        )

    @property
    def path(self) -> Path:
        """The recording's folder."""
        return self.recording.root

    @property
    def layout(self) -> ParameterLayout:
        """Of the flat vectors."""
        return self.recording.layout

    @property
    def config(self) -> NoReturn:
        """Refused: the loop was somebody's own."""
        raise _without("config", self.path)

    @property
    def setup(self) -> NoReturn:
        """Refused as `config`."""
        raise _without("task", self.path)

    def header(self, step: int) -> NoReturn:
        """Refused as `config`."""
        raise _without("config", self.path)

    @property
    def steps(self) -> list[int]:
        """The steps whose state can be asked for, ascending."""
        if self.recording.manifest.keep == "states":
            return self.recording.anchors
        return list(range(self.recording.last_step + 1))

    @property
    def anchors(self) -> list[int]:
        """The steps whose state is stored, ascending."""
        return self.recording.anchors

    def counterfactual(self, edit: Edit, end: int) -> NoReturn:
        """Refused: what another step would have read is not known."""
        raise _without("batch", self.path)

    def state(self, step: int) -> RecordedState:
        """The state after a step: stored, or reached from the one before it and verified.

        States that are asked for in ascending order are made in one pass.

        Raises:
            CircuitError: there is none, it is damaged, or it cannot be reached.
        """
        self._check(step)
        if step in self.recording.anchors:
            stored = self.recording.state(step)
            return _named(step, stored.parameters, stored.buffers, stored.pasts, self.layout)
        rerun = self._walk_to(step)
        parameters = {name: p.detach().clone() for name, p in rerun.parameters.items()}
        return _named(step, parameters, rerun.buffers, rerun.pasts(), self.layout)

    def module(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A copy of the module for evaluation, whose weights may be overwritten.

        Raises:
            CircuitError: the recording was opened without one.
        """
        if self._module is None:
            raise CircuitError(
                "was opened without a module",
                where=self.path,
                fix="circuit.open_run(folder, module=the_module)",
            )
        return evaluated(self._module, dtype)

    def model(self, step: int) -> nn.Module:
        """The module with the weights and buffers of a step, in evaluation mode.

        Raises:
            CircuitError: as `state` and `module`.
        """
        state, module = self.state(step), self.module()
        with torch.no_grad():
            for named, values in (
                (dict(module.named_parameters()), state.parameters),
                (dict(module.named_buffers()), state.buffers),
            ):
                for name, tensor in named.items():
                    if tensor.shape != values[name].shape:  # a buffer that grows
                        tensor.resize_(values[name].shape)
                    tensor.copy_(values[name])
        return module

    @no_grad
    def replay(self, start: int, end: int) -> Iterator[RecordedStep]:
        """The steps that take state `start` to state `end`, executed again by the optimizer alone.

        Raises:
            CircuitError: the window is not recorded, or gradients were not stored; or a step does
                not leave the parameters that it left when it was recorded.
        """
        self._check_window(start, end)
        rerun = self._rerun_at(self.recording.anchor_before(start))
        while rerun.step < end:
            stored = self.recording.step(rerun.step + 1)
            if rerun.step < start:
                rerun.advance(stored)
            else:
                taken = rerun.take(stored)
                buffers, columns = dict(rerun.buffers), self.recording.columns
                yield RecordedStep(stored.step, self.layout, taken, buffers, columns)
            if self.recording.begins_anew(rerun.step):
                rerun = self._rerun_at(rerun.step)

    def verify(
        self,
        start: int | None = None,
        end: int | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Verification:
        """Execute the steps of a window (all by default), and compare every one and every state.

        It ends at the first that differs.

        Raises:
            CircuitError: the window is not recorded, gradients were not stored, a file is damaged.
        """
        first = 0 if start is None else start
        last = self.recording.last_step if end is None else end
        self._check_window(first, last)
        compared = 0
        try:
            rerun = self._rerun_at(self.recording.anchor_before(first))
            while rerun.step < last:
                rerun.advance(self.recording.step(rerun.step + 1))
                if rerun.step in self.recording.anchors:
                    rerun = self._compared(rerun)
                    compared += 1
                if progress is not None:
                    progress(rerun.step)
        except ElsewhereError as error:
            return Verification(first, rerun.step, compared, str(error))
        return Verification(first, last, compared)

    def _compared(self, rerun: Rerun) -> Rerun:
        """The optimizers after a step whose state is stored, which they have to have reached."""
        if self.recording.begins_anew(rerun.step):
            return self._rerun_at(rerun.step)
        odd = _difference(rerun, self.recording.state(rerun.step))
        if odd is not None:
            raise ElsewhereError(
                f"step {rerun.step} is not the recorded one: {odd} differs from the stored state"
            )
        return rerun

    def _walk_to(self, step: int) -> Rerun:
        """The optimizers after a step, going on from the last one that was asked for."""
        walk, anchor = self._walk, self.recording.anchor_before(step)
        if walk is None or not anchor <= walk.step <= step:
            walk = self._rerun_at(anchor)
        self._walk = None  # of one that fails nothing is left
        while walk.step < step:
            walk.advance(self.recording.step(walk.step + 1))
        self._walk = walk
        return walk

    def _rerun_at(self, anchor: int) -> Rerun:
        manifest = self.recording.manifest
        device = manifest.environment["device"]
        require_device(device)
        return Rerun(
            manifest.optimizers,
            self.recording.state(anchor),
            classes=self._classes,
            device=device,
            environment=manifest.environment,
        )

    def _check(self, step: int) -> None:
        if step not in self.steps:
            raise CircuitError(
                f"the recording has no state of step {step}",
                where=self.path,
                expected=f"a step from 0 to {self.recording.last_step}"
                if self.recording.manifest.keep == "gradients"
                else f"every {self.recording.manifest.every} steps from 0 to"
                f" {self.recording.last_step}",
            )

    def _check_window(self, start: int, end: int) -> None:
        if self.recording.manifest.keep == "states":
            raise CircuitError(
                "holds states alone, and none of the steps between them",
                where=self.path,
                fix="record with circuit.watch(..., keep='gradients')",
            )
        if not 0 <= start < end <= self.recording.last_step:
            raise CircuitError(
                f"window {start}:{end}",
                where=self.path,
                expected=f"start < end within 0:{self.recording.last_step}",
            )


@dataclass(frozen=True)
class Verification:
    """Steps that were executed again.

    Attributes:
        compared_anchors: stored states among them.
        difference: of the last of them, if it differs.
    """

    start: int
    end: int
    compared_anchors: int
    difference: str | None = None

    @property
    def law(self) -> str:
        """The closing sentence."""
        steps = f"executed {self.end - self.start} steps from their gradients"
        return (
            f"{steps}, 0 bits differ" if self.difference is None else f"{steps}; {self.difference}"
        )


def weights_file(state: RecordedState) -> bytes:
    """Parameters and buffers of a state as a safetensors file."""
    from safetensors.torch import save

    tensors = {**state.parameters, **state.buffers}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def evaluated(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a module, in evaluation mode, whose parameters all have gradients.

    Raises:
        CircuitError: it cannot be copied.
    """
    try:
        copied = copy.deepcopy(module).eval()
    except (RuntimeError, TypeError) as error:
        raise CircuitError(
            f"{type(module).__name__} cannot be copied ({error})",
            expected="a module that copy.deepcopy copies",
            fix="pass a function that makes one",
        ) from None
    for parameter in copied.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    return copied if dtype is None else torch.nn.Module.to(copied, dtype)


def _made(module: nn.Module | Callable[[], nn.Module] | None) -> nn.Module | None:
    """The module that was given, or is made."""
    return module if module is None or isinstance(module, torch.nn.Module) else module()


def _check_module(module: nn.Module, recording: Recording) -> None:
    shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    recorded = recording.manifest.parameters
    for name in {**recorded, **shapes}:
        if shapes.get(name) != recorded.get(name):
            raise CircuitError(
                f"the module's parameter {name} is {shapes.get(name, 'missing')}",
                where=recording.root,
                expected=f"{recorded.get(name, 'none of that name')}, as it was recorded",
            )
    if list(shapes) != list(recorded):
        raise CircuitError(
            "the module's parameters stand in another order",
            where=recording.root,
            expected="that in which they were recorded",
        )


def _named(
    step: int,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    pasts: Sequence[Past],
    layout: ParameterLayout,
) -> RecordedState:
    """A state with its moments by name, where the optimizers keep tensors of the same shapes."""
    merged = {name: values for past in pasts for name, values in past.items()}
    flat = moments_of(merged, layout)
    moments = {moment: layout.unflatten(vector) for moment, vector in flat.items()}
    return RecordedState(step, dict(parameters), moments, dict(buffers), tuple(pasts))


def _difference(rerun: Rerun, stored: StoredState) -> str | None:
    """The first tensor that is not the stored one."""
    for name, tensor in stored.parameters.items():
        if not same_bits(rerun.parameters[name].cpu(), tensor):
            return name
    for past, memory in zip(stored.pasts, rerun.pasts(), strict=True):
        for name, values in past.items():
            for key, value in values.items():
                now = memory[name][key]
                if isinstance(value, torch.Tensor):
                    same = same_bits(value, now.cpu())
                else:
                    same = value == now
                if not same:
                    return f"{key} of {name}"
    return None


def _without(what: str, where: object) -> CircuitError:
    return CircuitError(
        f"was recorded from a loop of somebody's own, which has no {what} here",
        where=where,
        expected="what states and steps can tell: states, replay, circuit.attribute",
        fix="trace a run of `circuit train` for the rest",
    )
