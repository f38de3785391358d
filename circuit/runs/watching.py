"""Hooks on an optimizer that record what a training loop does, and change nothing of it.

Before a call of `step` the watcher reads the gradient as the optimizer is about to read it (that is
after accumulation, unscaling and clipping), after it the parameters. Where something other than the
optimizer has changed parameters or buffers in between, that is recorded beside the gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from circuit.core.digests import identical, same_bits, tensor_digest
from circuit.core.flat import Flat, ParameterLayout
from circuit.core.optimizers import (
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
from circuit.runs.calls import Call, SeenBuffer, dtype_of, gradient_of, refuse_fused_scaling
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
        self.dtype = dtype_of(self._parameters)
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
        self._buffers: dict[str, SeenBuffer] = {}
        self._changed_buffers: set[str] = set()
        self._not_saved: tuple[str, ...] = ()
        self._call: Call | None = None
        self._anew = False
        self._begins_anew = False
        self._unproven = set(range(len(self.optimizers)))
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
        made = recording.not_saved.difference(recording.manifest.not_saved)
        self._not_saved = tuple(name for name in now.buffers if name in made)
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
        self._buffers = self._buffers_now()
        if self._storage is not None:
            state = self.state()
            self._storage.begin(state, anew=self._begins_anew)
        self._last = self._left()
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
        self._call = None

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
        bare = self._bare()
        self._members = [[group.names for group in several] for several in bare.groups]
        buffers = {
            name: buffer.detach().clone()
            for name, buffer in self.module.named_buffers()
            if name in self._changed_buffers or not self.step
        }
        return replace(bare, buffers=buffers, not_saved=self._not_saved)

    def _buffers_now(self) -> dict[str, SeenBuffer]:
        return {name: SeenBuffer.of(buffer) for name, buffer in self.module.named_buffers()}

    def _bare(self) -> StoredState:
        """A state without buffers, which no optimizer reads."""
        return StoredState(
            self.step,
            {name: p.detach().clone() for name, p in self._parameters.items()},
            {},
            tuple(groups_of(one, self._names) for one in self.optimizers),
            tuple(past_of(one, self._names) for one in self.optimizers),
        )

    # --- before a step ----------------------------------------------------------------------------

    def _loaded(self, _: torch.optim.Optimizer) -> None:
        """An optimizer has another past now, of which no gradient tells."""
        self._anew = True

    def _before(self, place: int) -> Callable[..., Any]:
        def begin(optimizer: torch.optim.Optimizer, args: Any, words: Any) -> Any:
            frame = sys._getframe(1)
            if self._call is not None and self._call.goes_on(frame):
                return None  # a class of somebody's own calls the `step` above it: one step
            self._begin(place, frame)
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

    def _begin(self, place: int, frame: FrameType) -> None:
        """What stands before the call."""
        raised = self._call is not None  # in the call before: what it has done is not known
        call = self._call = Call(place, frame, self._whole and self._is_due(self.step + 1))
        if self._gradients:
            groups = [group.names for group in groups_of(self.optimizers[place], self._names)]
            if self._anew or raised or groups != self._members[place]:
                self._begin_anew()
        if self._last is not None:
            call.outside = self._changed_outside(self._last)
        if self._gradients:
            call.entering = {n: self._parameters[n].detach().clone() for n in call.outside}
            if place in self._unproven:
                self._first = self._bare()
        if call.whole:
            call.before = {name: p.detach().clone() for name, p in self._parameters.items()}
            call.past = past_of(self.optimizers[place], self._names)

    def _begin_anew(self) -> None:
        """Store what the optimizers remember now, with all else as the last step left it."""
        assert self._storage is not None
        assert self._last is not None
        state = self.state()
        if self.step:  # what has changed since is told of the next step
            left = {name: self._buffers[name].value for name in state.buffers}
            state = replace(state, parameters=self.layout.unflatten(self._last), buffers=left)
        else:
            self._last, self._buffers = self._flat(), self._buffers_now()
        self._storage.begin(state, anew=True)
        self._anew = False

    def _changed_outside(self, last: Flat) -> dict[str, Tensor]:
        """Parameters as the last step left them, where they are others now."""
        left = self.layout.unflatten(last)
        outside = {}
        for name, parameter in self._parameters.items():
            before = left[name].to(parameter.device)
            if before.dtype != parameter.dtype or before.shape != parameter.shape:
                raise CircuitError(
                    f"parameter {name} has become {list(parameter.shape)} {parameter.dtype}",
                    expected=f"{list(before.shape)} {before.dtype}, as it was when watching began",
                    fix="watch from behind the change on, into another folder",
                )
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
        refuse_fused_scaling(optimizer)
        if not self._gradients and not call.whole:
            call.gradient = torch.empty(0)
            return
        call.groups = groups_of(optimizer, self._names)
        if self._gradients:
            call.buffers = self._moved_buffers()
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gradients = {
            name: gradient_of(name, parameter)
            for name, parameter in self._parameters.items()
            if id(parameter) in trained and parameter.grad is not None
        }
        call.names = tuple(gradients)
        # a copy, in one vector: some optimizers change the gradient in place
        flat = [gradient.reshape(-1) for gradient in gradients.values()]
        call.gradient = torch.cat(flat).cpu() if flat else torch.empty(0)

    def _moved_buffers(self) -> dict[str, SeenBuffer]:
        """Buffers that are others than the last step that was taken has found."""
        return {
            name: SeenBuffer.of(buffer)
            for name, buffer in self.module.named_buffers()
            if name not in self._buffers or not self._buffers[name].is_of(buffer)
        }

    def _not_in_state_dict(self, moved: Mapping[str, SeenBuffer]) -> tuple[str, ...]:
        """Those that the loop has made since, and that no `state_dict` holds."""
        new = [name for name in moved if name not in self._buffers]
        saved = self.module.state_dict(keep_vars=True) if new else {}
        return tuple(name for name in new if name not in saved)

    def _remember(self, moved: Mapping[str, SeenBuffer]) -> None:
        """Buffers as a step that was taken has found them."""
        self._not_saved += self._not_in_state_dict(moved)
        self._changed_buffers |= moved.keys()
        self._buffers |= moved

    # --- behind it --------------------------------------------------------------------------------

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        call = self._call
        if call is not None and call.frame is not sys._getframe(1):
            return
        if call is None or call.gradient is None:
            raise CircuitError(
                f"{type(optimizer).__name__} took a step without the closure that it was given",
                expected="an optimizer that calls it once",
            )
        if self._gradients:
            self._store(call)
        else:
            self.step += 1
            self._last = self._left()
            if self._storage is not None and self._storage.is_due(self.step):
                # those that have ever changed are part of every state
                self._remember(self._moved_buffers())
                self._storage.add_state(self.state())
        self._call = None
        if self._is_due(self.step) and self._observer is not None:
            step = None
            if call.whole:
                buffers = dict(self.module.named_buffers())
                step = RecordedStep(self.step, self.layout, self._taken(call), buffers)
            self._observer(self.step, step)

    def _is_due(self, step: int) -> bool:
        """Whether somebody is told of a step."""
        return self._observer is not None and step % self._every == 0

    def _left(self) -> Flat | None:
        """The parameters as they are, where the next step asks for what has changed since."""
        asked = self._gradients or (self._whole and self._is_due(self.step + 1))
        return self._flat() if asked else None

    def _store(self, call: Call) -> None:
        """Count the step once it is written: one that cannot be is no step, and leaves no gap."""
        assert self._storage is not None
        assert call.gradient is not None
        left = self._flat()
        step = StoredStep(
            self.step + 1,
            call.optimizer,
            tuple(group.settings for group in call.groups),
            call.entering,
            {name: buffer.value for name, buffer in call.buffers.items()},
            {},
            tensor_digest(left),
            self._not_in_state_dict(call.buffers),
        )
        members = {name for group in call.groups for name in group.names}
        self._storage.add_step(step, sorted(members - set(call.names)), call.gradient)
        self.step, self._last = step.step, left
        self._remember(call.buffers)
        if self._first is not None:
            self._prove(replace(step, gradient=self._by_name(call)))
        if self._storage.is_anchor(self.step):
            self._storage.begin(self.state())

    def _prove(self, step: StoredStep) -> None:
        """Take an optimizer's first step again: what cannot be taken again is refused now."""
        assert self._first is not None
        first, self._first = self._first, None
        self._unproven.discard(step.optimizer)
        kinds = [type(one) for one in self.optimizers]
        Rerun(self.watched, first, classes=kinds, device=self.device).advance(step)

    def _taken(self, call: Call) -> TakenStep:
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

    def _by_name(self, call: Call) -> dict[str, Tensor]:
        assert call.gradient is not None
        shapes = {name: self._parameters[name].shape for name in call.names}
        return ParameterLayout.of_shapes(shapes).unflatten(call.gradient)

    def _flat(self) -> Flat:
        return self.layout.flatten(self._parameters)
