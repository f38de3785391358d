"""Thin a trace: keep fewer anchors. Every step stays addressable."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from pathlib import Path

from circuit.artifacts import OutputFolder
from circuit.errors import CircuitError
from circuit.trace.store import COMMAND, FILES, MANIFEST, TraceStore
from circuit.training.checkpoints import checkpoint_name


@dataclass(frozen=True)
class PruneResult:
    """What a pruning removed."""

    removed: int
    freed_bytes: int
    anchors: int
    """Anchors that are left."""


def prune_trace(path: str | Path, anchor_every: int) -> PruneResult:
    """Keep the anchors at multiples of `anchor_every`, the first and the last, and no other state.

    The manifest is rewritten before a file goes, so an interrupted pruning leaves a whole trace.

    Raises:
        CircuitError: the recording is not finished, or the new grid is not within the old one.
    """
    store = TraceStore(path)
    manifest = store.manifest
    if not store.complete:
        raise CircuitError(
            f"recording stopped at step {store.last_step} of {manifest.end_step}",
            where=store.root,
            fix="finish it with `circuit trace record --resume` before pruning",
        )
    if anchor_every < 1 or anchor_every % manifest.anchor_every:
        raise CircuitError(
            f"`anchor_every` {anchor_every}",
            where=store.root,
            expected=f"a multiple of the trace's {manifest.anchor_every}",
        )
    thinned = manifest.model_copy(update={"anchor_every": anchor_every, "storage": "anchors"})
    steps = range(manifest.start_step, manifest.end_step + 1)
    gone = [s for s in steps if manifest.is_addressable(s) and not thinned.is_addressable(s)]
    if gone:  # the old anchors lay off the grid of addressable steps: widen it to hold them
        thinned = thinned.model_copy(
            update={
                "checkpoint_every": gcd(manifest.checkpoint_every, manifest.anchor_every),
                "checkpoint_start_step": min(manifest.checkpoint_start_step, gone[0]),
            }
        )
    keep = {f"checkpoints/{checkpoint_name(step)}" for step in thinned.anchors()}
    with OutputFolder(store.root, COMMAND, writes=FILES, resume=True) as folder:
        folder.write_text(MANIFEST, thinned.to_json())
        going = [n for n in folder.owned if n.startswith("checkpoints/") and n not in keep]
        freed = sum((store.root / n).stat().st_size for n in going if (store.root / n).exists())
        folder.remove(going)
    return PruneResult(len(going), freed, len(keep))
