"""open_run: the one way to a run.

run = circuit.open_run("artifacts/runs/quickstart")
model = run.model(400)                       # a HookedTransformer
batch = run.batch("validation_iid")          # tokens and read indices
logits, cache = model.run_with_cache(batch.tokens)

for step in run.replay(300, 303):            # from its trace
    step.update.named()                      # weight decay, current gradient, history
series = circuit.attribute(run, [scalar], 300, 340)[scalar.name]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from circuit.errors import CircuitError
from circuit.folders import RECORDED_ROWS, RECORDING, RUN_CONFIG, TRACE
from circuit.reading import checked_path

if TYPE_CHECKING:
    from torch import nn

    from circuit.runs.base import Replayable
    from circuit.runs.checkpointed import CheckpointedRun
    from circuit.runs.recorded import RecordedRun
    from circuit.trace.replay import ReplayedRun


@overload
def open_run(
    where: str | Path, *, allow_drift: bool = False, recipe: str | None = None
) -> CheckpointedRun | ReplayedRun: ...


@overload
def open_run(
    where: str | Path,
    *,
    module: nn.Module | Callable[[], nn.Module],
    optimizers: Sequence[type] = (),
) -> RecordedRun: ...


def open_run(
    where: str | Path,
    *,
    allow_drift: bool = False,
    module: nn.Module | Callable[[], nn.Module] | None = None,
    optimizers: Sequence[type] = (),
    recipe: str | None = None,
) -> CheckpointedRun | ReplayedRun | RecordedRun:
    """Open a run: its folder or `run_config.json`, a trace, a folder of checkpoints, a recording.

    Nothing but descriptions is read yet.

    Args:
        where: as said; a trace's folder of checkpoints is the trace.
        allow_drift: of a trace: go on where a replayed step differs.
        module: of a recording by `circuit.watch`: the module that was trained, or a function that
            makes one like it.
        optimizers: of a recording: the classes of its optimizers, where they are not torch's.
        recipe: of a run of a recipe: `FILE:NAME`; its code is executed only if it is named, for
            modules and steps. States need none.

    Raises:
        CircuitError: there is nothing of a run, or its description is damaged.
    """
    from circuit.runs.checkpointed import CheckpointedRun, open_folder

    path = checked_path(where)
    names = (TRACE, RUN_CONFIG, RECORDING, "checkpoints")
    holder = path.parent if path.name in names else path
    if (holder / RECORDING).is_file():
        return _recorded(holder, module, optimizers)
    if module is not None and not (holder / RECORDED_ROWS).is_file():
        raise CircuitError(
            f"holds no {RECORDING}",
            where=holder,
            expected="the folder of a recording, where `module` is given",
            fix="record one with circuit.watch(module, optimizer, folder)",
        )
    if (holder / TRACE).is_file():
        from circuit.trace.replay import ReplayedRun

        return ReplayedRun.open(holder, allow_drift=allow_drift, recipe=recipe)
    if (holder / RUN_CONFIG).is_file():
        return open_folder(holder, recipe)
    from circuit.training.checkpoints import list_checkpoints, read_header

    saved = list_checkpoints(path) if path.is_dir() else {}
    if saved:
        config = read_header(saved[max(saved)]).config.executing(recipe)
        return CheckpointedRun(path, config, path)
    return open_folder(path)  # which says what is missing


def open_steps(where: str | Path) -> Replayable:
    """Steps that can be executed again: a trace, or a recording that was imported.

    Raises:
        CircuitError: there is neither, or its description is damaged.
    """
    path = checked_path(where)
    holder = path.parent if path.name in (TRACE, RECORDING) else path
    if (holder / RECORDING).is_file():
        return _recorded(holder)
    from circuit.trace.replay import ReplayedRun

    return ReplayedRun.open(path)


def _recorded(
    folder: Path,
    module: nn.Module | Callable[[], nn.Module] | None = None,
    optimizers: Sequence[type] = (),
) -> RecordedRun:
    from circuit.runs.recorded import RecordedRun
    from circuit.runs.recording import Recording

    return RecordedRun(Recording(folder), module, optimizers)
