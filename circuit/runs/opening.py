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

from pathlib import Path

from circuit.reading import checked_path
from circuit.runs.checkpointed import CheckpointedRun, open_folder
from circuit.trace.replay import ReplayedRun
from circuit.trace.store import MANIFEST
from circuit.train_config import RUN_CONFIG
from circuit.training.checkpoints import list_checkpoints, read_header


def open_run(where: str | Path, *, allow_drift: bool = False) -> CheckpointedRun | ReplayedRun:
    """Open a run: its folder or `run_config.json`, a trace, or a folder of checkpoints.

    Nothing but descriptions is read yet.

    Args:
        where: as said; a trace's folder of checkpoints is the trace.
        allow_drift: of a trace: go on where a replayed step differs.

    Raises:
        CircuitError: there is nothing of a run, or its description is damaged.
    """
    path = checked_path(where)
    holder = path.parent if path.name in (MANIFEST, RUN_CONFIG, "checkpoints") else path
    if (holder / MANIFEST).is_file():
        return ReplayedRun.open(holder, allow_drift=allow_drift)
    if (holder / RUN_CONFIG).is_file():
        return open_folder(holder)
    saved = list_checkpoints(path) if path.is_dir() else {}
    if saved:
        return CheckpointedRun(path, read_header(saved[max(saved)]).config, path)
    return open_folder(path)  # which says what is missing
