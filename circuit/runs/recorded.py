"""A recording of somebody's own training loop, opened: its states, and its steps again.

The steps are executed by the optimizer alone over the stored gradients, and every one of them is
held against the digest of the parameters that it left. How the gradients came about is not known:
there is no recipe and no batch; a task only where the recording was imported with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from circuit.core.digests import same_bits, tensor_digest
from circuit.core.edit import Edit
from circuit.core.flat import ParameterLayout
from circuit.core.module import evaluated, made_module
from circuit.core.optimizers import Past, moments_of
from circuit.environment import prepare_process, require_device
from circuit.errors import CircuitError, several
from circuit.folders import RUN_CONFIG
from circuit.lazy import no_grad, torch
from circuit.plugins import import_name
from circuit.runs.recorded_step import (
    RecordedState,
    RecordedStep,
    Verification,
    refused_without,
)
from circuit.runs.recording import Recording
from circuit.runs.records import StoredState
from circuit.runs.rerun import ElsewhereError, Rerun
from circuit.train_config import RecordedConfig, load_run_config
from circuit.training.checkpoints import StateHeader
from circuit.training.own_module import load_state, refuse_changed_files
from circuit.training.setup import NO_BENCHMARK, Setup

if TYPE_CHECKING:
    from torch import Tensor, nn

    from circuit.core.graphs import Graphs


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
        self._module = None if module is None else made_module(module)
        self._given_classes = tuple(several(optimizers, "optimizers"))
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

    @cached_property
    def setup(self) -> Setup:
        """Module and task, as `circuit import-recording` was told them.

        Raises:
            CircuitError: it was not, or it has been recorded anew since.
        """
        if not (self.path / RUN_CONFIG).is_file():
            raise refused_without("config", self.path)
        config = load_run_config(self.path)
        last = self.recording.last_step
        if not isinstance(config, RecordedConfig) or (
            (config.recorded.last_step, config.recorded.parameters_sha256)
            != (last, self.state_digests(last)["parameters"])
        ):
            raise CircuitError(
                f"{RUN_CONFIG} is not of this recording, which was made after it",
                where=self.path,
                fix="import it again: circuit import-recording, with --overwrite",
            )
        return Setup(config, self.path, module=self._module)

    @property
    def config(self) -> RecordedConfig:
        """What is known of it; raises as `setup`."""
        return cast("RecordedConfig", self.setup.config)

    @property
    def benchmark_digest(self) -> str | None:
        """Of its task's benchmark; None without a task. Raises as `setup`."""
        return self.setup.benchmark_digest

    @property
    def environment(self) -> Mapping[str, Any]:
        """Where it was recorded."""
        return self.recording.manifest.environment

    def share(self, setup: Setup) -> None:
        """Use what another setup of the same run has read and built."""
        self.setup = setup.with_config(self.config)

    def prepare(self) -> None:
        """Give this process the thread count of the recording."""
        prepare_process(threads=self.environment["threads"], device=self.environment["device"])

    def header(self, step: int) -> StateHeader:
        """Whose state that of a step is; raises as `setup`."""
        self.check_addressable(step)
        return StateHeader(step, self.config, self.benchmark_digest or NO_BENCHMARK)

    @property
    def first_step(self) -> int:
        """The first state."""
        return 0

    @property
    def last_step(self) -> int:
        """The last state."""
        return self.recording.last_step

    def state_digests(self, step: int) -> dict[str, str]:
        """Of the parameters after a step."""
        return {"parameters": tensor_digest(self.layout.flatten(self.state(step).parameters))}

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
        raise refused_without("batch", self.path)

    def state(self, step: int) -> RecordedState:
        """The state after a step: stored, or reached from the one before it and verified.

        States that are asked for in ascending order are made in one pass.

        Raises:
            CircuitError: there is none, it is damaged, or it cannot be reached.
        """
        self.check_addressable(step)
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
        if self._module is not None:
            return evaluated(self._module, dtype)
        if not (self.path / RUN_CONFIG).is_file():
            raise CircuitError(
                "was opened without a module",
                where=self.path,
                fix="circuit.open_run(folder, module=the_module), or circuit import-recording",
            )
        module = self.setup.module(dtype)
        _check_module(module, self.recording)
        return module

    def model(self, step: int) -> nn.Module:
        """The module with the weights and buffers of a step, in evaluation mode.

        Raises:
            CircuitError: as `state` and `module`.
        """
        state, module = self.state(step), self.module()
        load_state(module, state.parameters, state.buffers, self.path)
        return module

    @no_grad
    def replay(self, start: int, end: int, graphs: Graphs | None = None) -> Iterator[RecordedStep]:
        """The steps that take state `start` to state `end`, executed again by the optimizer alone.

        Args:
            graphs: stay empty, for gradients are read.

        Raises:
            CircuitError: the window is not recorded, or gradients were not stored; or a step does
                not leave the parameters that it left when it was recorded.
        """
        self.check_window(start, end)
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
        self.check_window(first, last)
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
            classes=self._classes(),
            device=device,
            environment=manifest.environment,
        )

    def _classes(self) -> tuple[type, ...]:
        """Of the optimizers that are not torch's: given, or as the recording was imported with."""
        if self._given_classes or not (self.path / RUN_CONFIG).is_file():
            return self._given_classes
        named = load_run_config(self.path)
        if not isinstance(named, RecordedConfig) or not named.recorded.optimizers:
            return ()
        refuse_changed_files(named.recorded, self.path)
        names = named.recorded.optimizers
        return tuple(import_name(n, self.path, what="the optimizer") for n in names)

    def check_addressable(self, step: int) -> None:
        """Refuse a step whose state the recording cannot give.

        Raises:
            CircuitError: says which it can.
        """
        if step not in self.steps:
            raise CircuitError(
                f"the recording has no state of step {step}",
                where=self.path,
                expected=f"a step from 0 to {self.recording.last_step}"
                if self.recording.manifest.keep == "gradients"
                else f"every {self.recording.manifest.every} steps from 0 to"
                f" {self.recording.last_step}",
            )

    def check_window(self, start: int, end: int) -> None:
        """Refuse steps that are not recorded.

        Raises:
            CircuitError: says which are.
        """
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


def weights_file(state: RecordedState, recording: Recording) -> bytes:
    """A state as a safetensors file that holds what `module.state_dict()` would, name for name."""
    from safetensors.torch import save

    tensors = {**state.parameters, **state.buffers}
    tensors |= {name: tensors[first] for name, first in recording.manifest.tied.items()}
    saved = {name: t for name, t in tensors.items() if name not in recording.not_saved}
    # each name stores numbers of its own: safetensors takes no tensors that share them
    return save({name: t.detach().cpu().contiguous().clone() for name, t in saved.items()})


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
