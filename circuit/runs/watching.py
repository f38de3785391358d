"""Hooks on an optimizer that record what a training loop does, and change nothing of it.

Before a call of `step` the watcher reads the gradient as the optimizer is about to read it (that is
after accumulation, unscaling and clipping), after it the parameters. Where something other than the
optimizer has changed parameters or buffers in between, that is recorded beside the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from circuit.core.digests import identical, same_bits, tensor_digest
from circuit.core.flat import Flat, ParameterLayout
from circuit.core.optimizers import (
    Group,
    Past,
    TakenStep,
    groups_of,
    kind_of,
    names_by_id,
    past_of,
    rule_of,
)
from circuit.environment import environment_facts
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.runs.recorded_step import RecordedStep
from circuit.runs.recording import Keep, Recording, RecordingManifest, WatchedOptimizer
from circuit.runs.records import StoredState, StoredStep
from circuit.runs.rerun import Rerun
from circuit.runs.resuming import check_manifest, step_of
from circuit.runs.storing import Storage

if TYPE_CHECKING:
    from torch import Tensor, nn

Observer = Callable[[int, RecordedStep | None], None]
"""Is told the number of a step, and all of the step where it asked for that."""


@dataclass
class _Call:
    """A call of `step` that has begun.

    Attributes:
        optimizer: which one.
        whole: all of it is going to be looked at.
        outside, entering: parameters that have changed since the step before, as it left them and
            as this one found them.
        before, past: parameters, and what the optimizer remembers; where all is looked at.
        buffers: that have changed since the step before.
        gradient: of the parameters `names`, one behind the other.
        groups: with the settings that the call reads; hooks behind it may set those of the next.
    """

    optimizer: int
    whole: bool
    outside: Mapping[str, Tensor] = field(default_factory=dict)
    entering: Mapping[str, Tensor] = field(default_factory=dict)
    before: Mapping[str, Tensor] = field(default_factory=dict)
    past: Past = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    gradient: Flat | None = None
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class _Buffer:
    """A buffer as it was: a copy, the tensor itself, and how often that had been written to.

    The tensor is held: the `id` of one that is let go may be that of the next.
    """

    value: Tensor
    tensor: Tensor
    version: int

    @classmethod
    def of(cls, buffer: Tensor) -> _Buffer:
        return cls(buffer.detach().clone(), buffer, buffer._version)

    def is_of(self, buffer: Tensor) -> bool:
        """Whether nothing has changed; running statistics are written without being counted."""
        if not buffer.is_floating_point():  # masks are large, and change by counted writes alone
            return self.tensor is buffer and self.version == buffer._version
        return same_bits(self.value, buffer)


class Watcher:
    """Watches the steps of some optimizers over the parameters of a module; a context manager.

    With several optimizers every call of any of them is a step.

    Attributes:
        step: calls of `step` so far.
        layout: of the module's parameters.
        watched: the optimizers, as a recording names them.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        decoupled_decay: bool = False,
    ) -> None:
        """Check what can be known; nothing is hooked yet.

        Args:
            decoupled_decay: whether the weight decay of optimizers that are not torch's is
                decoupled.

        Raises:
            CircuitError: an optimizer holds parameters that are not the module's; or its update is
                not split with one of its flags; or parameters are neither float32 nor float64.
        """
        self.module, self.optimizers = module, tuple(optimizers)
        self.step = 0
        self.layout = ParameterLayout.of_model(module)
        self._names = names_by_id(module)
        self._parameters = dict(module.named_parameters())
        self.dtype = _dtype_of(self._parameters)
        self.device = str(next(iter(self._parameters.values())).device)
        self.watched = [
            WatchedOptimizer(kind=kind_of(one), decoupled_decay=decoupled_decay)
            for one in self.optimizers
        ]
        for one, watched in zip(self.optimizers, self.watched, strict=True):
            for group in groups_of(one, self._names):
                rule_of(watched.kind, group.settings, decoupled_decay)
        self._storage: Storage | None = None
        self._observer: Observer | None = None
        self._every, self._whole = 1, False
        self._members: list[list[tuple[str, ...]]] = []
        self._last: Flat | None = None
        self._buffers: dict[str, _Buffer] = {}
        self._changed_buffers: set[str] = set()
        self._not_saved: tuple[str, ...] = ()
        self._not_told: tuple[str, ...] = ()
        self._call: _Call | None = None
        self._anew = False
        self._begins_anew = False
        self._first: StoredState | None = None
        self._hooks: list[Any] = []

    def go_on(self, recording: Recording, manifest: RecordingManifest) -> int:
        """Go on behind the recorded step at which module and optimizers stand; see `step_of`.

        Raises:
            CircuitError: there is none, or the recording was begun otherwise.
        """
        check_manifest(manifest, recording)
        now = self.state()  # with all buffers
        step = step_of(now, recording, [type(one) for one in self.optimizers])
        first = recording.state(0).buffers
        self._changed_buffers = {
            name
            for name, value in now.buffers.items()
            if name not in first or not identical(value, first[name])
        }
        self._begins_anew = recording.begins_anew(step)
        self.step = step
        return step

    def store(self, storage: Storage) -> None:
        """Store what is watched, once it is entered."""
        self._storage = storage

    def observe(self, observer: Observer, *, every: int, whole: bool) -> None:
        """Have somebody told of every so many steps.

        Args:
            whole: of all of a step, which is copied for it, or of its number alone.
        """
        self._observer, self._every, self._whole = observer, every, whole

    def __enter__(self) -> Self:
        if self._storage is not None:
            state = self.state()
            self._storage.begin(state, anew=self._begins_anew)
            if self._gradients:
                self._first, self._last = state, self._flat()
        for place, optimizer in enumerate(self.optimizers):
            self._hooks += [
                optimizer.register_step_pre_hook(self._before(place)),
                optimizer.register_step_post_hook(self._after),
                optimizer.register_load_state_dict_post_hook(self._loaded),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def _gradients(self) -> bool:
        return self._storage is not None and self._storage.keep == "gradients"

    def manifest(self, keep: Keep, every: int, anchor_every: int) -> RecordingManifest:
        """What is watched."""
        saved = self.module.state_dict(keep_vars=True)
        buffers = dict(self.module.named_buffers())
        first = {id(tensor): name for name, tensor in (*self._parameters.items(), *buffers.items())}
        return RecordingManifest(
            keep="states" if keep == "states" else "gradients",
            every=every,
            anchor_every=anchor_every,
            module=type(self.module).__qualname__,
            parameters=self.layout.to_json(),
            dtype="torch.float64" if self.dtype == "torch.float64" else "torch.float32",
            optimizers=self.watched,
            environment=environment_facts(torch.device(self.device).type),
            tied={
                name: first[id(tensor)]
                for name, tensor in saved.items()
                if first.get(id(tensor), name) != name
            },
            not_saved=[name for name in buffers if name not in saved],
        )

    def state(self) -> StoredState:
        """All that the next step depends on but its gradient."""
        buffers = dict(self.module.named_buffers())
        if self.step == 0:
            self._changed_buffers.clear()
            self._buffers = {name: _Buffer.of(buffer) for name, buffer in buffers.items()}
        changed = {n: b for n, b in buffers.items() if n in self._changed_buffers or not self.step}
        groups = tuple(groups_of(one, self._names) for one in self.optimizers)
        self._members = [[group.names for group in several] for several in groups]
        return StoredState(
            self.step,
            {name: p.detach().clone() for name, p in self._parameters.items()},
            {name: buffer.detach().clone() for name, buffer in changed.items()},
            groups,
            tuple(past_of(one, self._names) for one in self.optimizers),
            self._not_saved,
        )

    # --- before a step ----------------------------------------------------------------------------

    def _loaded(self, _: torch.optim.Optimizer) -> None:
        """An optimizer has another past now, of which no gradient tells."""
        self._anew = True

    def _before(self, place: int) -> Callable[..., Any]:
        def begin(optimizer: torch.optim.Optimizer, args: Any, words: Any) -> Any:
            self._begin(place)
            closure = words.get("closure", args[1] if len(args) > 1 else None)
            if closure is None:
                self._read_gradient(place)
                return None

            def closed() -> Any:  # backward runs inside of it, as Lightning has it
                loss = closure()
                self._read_gradient(place)
                return loss

            if "closure" in words:
                return args, {**words, "closure": closed}
            return (args[0], closed, *args[2:]), words

        return begin

    def _begin(self, place: int) -> None:
        """What stands before the call."""
        due = self._observer is not None and (self.step + 1) % self._every == 0
        call = self._call = _Call(place, whole=due and self._whole)
        if self._gradients:
            assert self._storage is not None
            groups = [group.names for group in groups_of(self.optimizers[place], self._names)]
            if self._anew or groups != self._members[place]:
                state = self.state()
                self._storage.begin(state, anew=True)
                self._anew = False
                if self._first is not None:  # no step has been taken yet
                    self._first = state
            else:
                call.outside = self._changed_outside()
                call.entering = {n: self._parameters[n].detach().clone() for n in call.outside}
        if call.whole:
            call.before = {name: p.detach().clone() for name, p in self._parameters.items()}
            call.past = past_of(self.optimizers[place], self._names)

    def _changed_outside(self) -> dict[str, Tensor]:
        """Parameters as the last step left them, where they are others now."""
        assert self._last is not None
        left = self.layout.unflatten(self._last)
        outside = {}
        for name, parameter in self._parameters.items():
            before = left[name].to(parameter.device)
            if not same_bits(before, parameter):
                outside[name] = before.clone()
        return outside

    def _read_gradient(self, place: int) -> None:
        """The gradient that the call is about to use."""
        optimizer, call = self.optimizers[place], self._call
        if call is None or call.gradient is not None:
            raise CircuitError(
                f"{type(optimizer).__name__} takes several gradients a step",
                expected="an optimizer whose step reads one gradient",
                fix="watch another optimizer; LBFGS and its kin cannot be watched",
            )
        _refuse_fused_scaling(optimizer)
        if not self._gradients and not call.whole:
            call.gradient = torch.empty(0)
            return
        call.groups = groups_of(optimizer, self._names)
        call.buffers = self._moved_buffers()
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gradients = {
            name: _gradient_of(name, parameter)
            for name, parameter in self._parameters.items()
            if id(parameter) in trained and parameter.grad is not None
        }
        call.names = tuple(gradients)
        # a copy, in one vector: some optimizers change the gradient in place
        flat = [gradient.reshape(-1) for gradient in gradients.values()]
        call.gradient = torch.cat(flat).cpu() if flat else torch.empty(0)

    def _moved_buffers(self) -> dict[str, Tensor]:
        """Buffers that are others than when they were last looked at."""
        moved, made = {}, []
        for name, buffer in self.module.named_buffers():
            known = self._buffers.get(name)
            if known is None or not known.is_of(buffer):
                self._buffers[name] = _Buffer.of(buffer)
                self._changed_buffers.add(name)
                moved[name] = self._buffers[name].value
                made += [name] if known is None else []
        if made:
            saved = self.module.state_dict(keep_vars=True)
            self._not_told = tuple(name for name in made if name not in saved)
            self._not_saved += self._not_told
        return moved

    # --- behind it --------------------------------------------------------------------------------

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        call, self._call = self._call, None
        if call is None or call.gradient is None:
            raise CircuitError(
                f"{type(optimizer).__name__} took a step without the closure that it was given",
                expected="an optimizer that calls it once",
            )
        self.step += 1
        if self._gradients:
            self._store(call)
        elif self._storage is not None and self._storage.is_due(self.step):
            self._moved_buffers()  # those that have ever changed are part of every state
            self._storage.add_state(self.state())
        if self._observer is not None and self.step % self._every == 0:
            step = None
            if call.whole:
                buffers = dict(self.module.named_buffers())
                step = RecordedStep(self.step, self.layout, self._taken(call), buffers)
            self._observer(self.step, step)

    def _store(self, call: _Call) -> None:
        assert self._storage is not None
        assert call.gradient is not None
        assert self._last is not None
        self._last = self._flat()
        step = StoredStep(
            self.step,
            call.optimizer,
            tuple(group.settings for group in call.groups),
            call.entering,
            call.buffers,
            {},
            tensor_digest(self._last),
            self._not_told,
        )
        self._not_told = ()
        members = {name for group in call.groups for name in group.names}
        self._storage.add_step(step, sorted(members - set(call.names)), call.gradient)
        if self._first is not None:
            self._prove(replace(step, gradient=self._by_name(call)))
        if self._storage.is_anchor(self.step):
            self._storage.begin(self.state())

    def _prove(self, step: StoredStep) -> None:
        """Take the first step again at once: what cannot be taken again is refused now."""
        assert self._first is not None
        first, self._first = self._first, None
        kinds = [type(one) for one in self.optimizers]
        Rerun(self.watched, first, classes=kinds, device=self.device).advance(step)

    def _taken(self, call: _Call) -> TakenStep:
        watched = self.watched[call.optimizer]
        return TakenStep(
            kind=watched.kind,
            decoupled=watched.decoupled_decay,
            groups=call.groups,
            before=call.before,
            after={name: p.detach().clone() for name, p in self._parameters.items()},
            gradient=self._by_name(call),
            past=call.past,
            memory=past_of(self.optimizers[call.optimizer], self._names),
            outside=call.outside,
        )

    def _by_name(self, call: _Call) -> dict[str, Tensor]:
        assert call.gradient is not None
        shapes = {name: self._parameters[name].shape for name in call.names}
        return ParameterLayout.of_shapes(shapes).unflatten(call.gradient)

    def _flat(self) -> Flat:
        return self.layout.flatten(self._parameters)


def _dtype_of(parameters: Mapping[str, Tensor]) -> str:
    """The one dtype of all parameters.

    Raises:
        CircuitError: there are none; they have several, or another than float32 and float64; they
            are on several devices.
    """
    if not parameters:
        raise CircuitError("the module has no parameters", expected="a module that is trained")
    one = next(iter(parameters.values()))
    first = one.dtype
    for name, parameter in parameters.items():
        if parameter.device != one.device:
            raise CircuitError(
                f"parameter {name} is on {parameter.device}, others on {one.device}",
                expected="all parameters on one device",
            )
        if parameter.dtype != first or first not in (torch.float32, torch.float64):
            raise CircuitError(
                f"parameter {name} is {parameter.dtype}",
                expected="parameters of float32 or float64, all of one dtype",
                fix="train with float32 weights under torch.autocast",
            )
    return str(first)


def _gradient_of(name: str, parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse or gradient.dtype != parameter.dtype:
        raise CircuitError(
            f"the gradient of {name} is {'sparse' if gradient.is_sparse else gradient.dtype}",
            expected=f"a dense one of {parameter.dtype}",
            fix="embeddings take sparse=False",
        )
    return gradient


def _refuse_fused_scaling(optimizer: torch.optim.Optimizer) -> None:
    """A GradScaler leaves unscaling, and steps without finite gradients, to fused kernels."""
    name = type(optimizer).__name__
    if getattr(optimizer, "grad_scale", None) is not None:
        raise CircuitError(
            f"{name} with fused=True unscales the gradient itself, where it cannot be read",
            expected="a gradient that is unscaled before the step",
            fix="call scaler.unscale_(optimizer) before scaler.step(optimizer), or fused=False",
        )
    left_out = getattr(optimizer, "found_inf", None)
    if left_out is not None and float(left_out):
        raise CircuitError(
            f"{name} with fused=True leaves a step without finite gradients out itself",
            expected="an optimizer of which the GradScaler leaves it out",
            fix="pass fused=False",
        )
