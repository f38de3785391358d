"""Writes a trace: its manifest, then a row a step and full states at its anchors.

Within a step the order is row, anchor; the rows are on the disk before an anchor is.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Self

from circuit.artifacts import OutputFolder, RowLog
from circuit.core.flat import norm
from circuit.trace.step import TracedStep, Tracer
from circuit.trace.store import MANIFEST, ROWS, TraceManifest
from circuit.training.checkpoints import checkpoint_name, encode_checkpoint


class TraceWriter:
    """Writes the steps of a tracer into a folder; a context manager that closes the row file.

    Entering it writes what stands before the first step, and drops the rows beyond the tracer's
    step: a recording that was cut off writes them again.
    """

    def __init__(self, folder: OutputFolder, manifest: TraceManifest, tracer: Tracer) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tracer = tracer

    def __enter__(self) -> Self:
        first = self.tracer.session.step
        if first == self.manifest.start_step:
            if not (self.folder.root / MANIFEST).exists():
                self.folder.write_text(MANIFEST, self.manifest.to_json())
            self._save_anchor()
        self.folder.claim([ROWS])
        self._log = RowLog(self.folder.path(ROWS), last_step=first)
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    def advance(self) -> TracedStep:
        """Take the tracer's next step, and write it."""
        step = self.tracer.advance()
        self._log.append(trace_row(step, self.manifest.top_k_parameters))
        if self.manifest.is_anchor(step.step):
            self.sync()
            self._save_anchor()
        return step

    def sync(self) -> None:
        """Force the rows to the disk."""
        self._log.sync()

    def _save_anchor(self) -> None:
        state = self.tracer.train_state()
        self.folder.write_bytes(anchor_name(state.step), encode_checkpoint(state))


def anchor_name(step: int) -> str:
    """Where the state of an anchor stands in the trace's folder."""
    return f"checkpoints/{checkpoint_name(step)}"


def planned_files(manifest: TraceManifest) -> list[str]:
    """Every file that a trace is going to hold."""
    return [MANIFEST, ROWS, *(anchor_name(step) for step in manifest.anchors())]


@lru_cache(maxsize=1)
def _digesting(process: int) -> ThreadPoolExecutor:
    """Digests a step while its terms are computed: sha256 leaves the interpreter's lock."""
    return ThreadPoolExecutor(max_workers=1)


def trace_row(step: TracedStep, top_k: int) -> dict[str, Any]:
    """The row of a step (definitions.md section 6, optimizer-update-trace)."""
    digests = _digesting(os.getpid()).submit(step.digests)
    update = step.update
    moved = step.layout.norms(update.total)
    top = sorted(moved, key=lambda name: (-moved[name], name))[:top_k]
    weights = step.layout.norms(step.before.parameters, top)
    return {
        "step": step.step,
        "loss": step.loss,
        "token_accuracy": step.token_accuracy,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        "clip_factor": step.clip,
        "update_norm": norm(update.total),
        "term_norms": {
            name: norm(v) for name, v in {**update.named(), **update.references()}.items()
        },
        "rounding_ulps": update.rounding_ulps(),
        "top_parameters": [
            {
                "name": name,
                "update_norm": moved[name],
                "relative": moved[name] / weights[name] if weights[name] else None,
            }
            for name in top
        ],
        "batch_shape": list(step.tokens.shape),
        "batch_indices": step.indices.tolist(),
        "digests": digests.result(),
    }
