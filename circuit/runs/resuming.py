"""Going on with a recording: the recorded step at which a restarted loop stands, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.core.digests import identical, tensor_digest
from circuit.core.flat import ParameterLayout
from circuit.environment import changed_facts
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.runs.recorded import RecordedRun
from circuit.runs.recorded_step import RecordedState
from circuit.runs.recording import Recording, RecordingManifest
from circuit.runs.records import StoredState

if TYPE_CHECKING:
    from torch import Tensor


def check_manifest(now: RecordingManifest, recording: Recording) -> None:
    """Refuse to go on with a recording of another module or with other settings.

    Raises:
        CircuitError: names the first that differs.
    """
    ours, theirs = (m.model_dump(exclude={"environment"}) for m in (now, recording.manifest))
    later = recording.not_saved.difference(recording.manifest.not_saved)  # by the loop, since
    ours["not_saved"] = [name for name in now.not_saved if name not in later]
    odd = [f"{name} was {theirs[name]!r}" for name in ours if ours[name] != theirs[name]]
    odd += changed_facts(recording.manifest.environment, now.environment)
    if odd:
        raise CircuitError(
            f"the recording was begun otherwise: {odd[0]}",
            where=recording.root,
            fix="go on as it was begun, on the same machine, or record into another folder",
        )


def step_of(now: StoredState, recording: Recording, classes: Sequence[type]) -> int:
    """The last recorded step whose state a module and its optimizers are in.

    Args:
        now: the state, whose own step is not looked at; with all buffers.
        classes: of the optimizers.

    Raises:
        CircuitError: there is none; where the parameters are those of a step, what differs from it.
    """
    run = RecordedRun(recording, None, classes)
    first: str | None = None
    for step in _steps_with(now.parameters, recording):
        odd = _difference(now, run.state(step))
        if odd is None:
            return step
        first = first or f"the weights are those of step {step}, but {odd} is not"
    raise CircuitError(
        first or "the module's weights are those of no recorded step",
        where=recording.root,
        expected="module and optimizers as a step of the recording left them, bit for bit",
        fix="load the loop's checkpoint of both before circuit.watch; or record anew with"
        " overwrite=True",
    )


def _steps_with(parameters: Mapping[str, Tensor], recording: Recording) -> Iterator[int]:
    """The recorded steps that left these parameters, the last one first."""
    layout = ParameterLayout.of_shapes({name: p.shape for name, p in parameters.items()})
    digest = tensor_digest(layout.flatten(parameters))
    anchors = set(recording.anchors)
    for step in range(recording.last_step, -1, -1):
        recorded = recording.digest(step)
        if recorded is None and step in anchors:  # the first state, or of states alone
            recorded = tensor_digest(layout.flatten(recording.state(step).parameters))
        if recorded == digest:
            yield step


def _difference(now: StoredState, then: RecordedState) -> str | None:
    """What of optimizers or buffers is not the recorded state's, to the bit."""
    for past, recorded in zip(now.pasts, then.pasts, strict=True):
        for name in {**past, **recorded}:
            ours, theirs = past.get(name, {}), recorded.get(name, {})
            for key in {**ours, **theirs}:
                if not _same(ours.get(key), theirs.get(key)):
                    return f"what an optimizer remembers of {name} ({key})"
    for name, buffer in now.buffers.items():
        if not _same(buffer, then.buffers.get(name)):
            return f"the buffer {name}"
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return identical(one, other)
    return type(one) is type(other) and bool(one == other)
