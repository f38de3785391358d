"""Writes a recording: its manifest, a state every so many steps, and the steps between."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from circuit.artifacts import OutputFolder, RowLog, dump_json, read_jsonl
from circuit.core.flat import Flat
from circuit.errors import CircuitError
from circuit.journal import Journal, check_journal, cut_behind
from circuit.reading import values_of
from circuit.runs.recording import (
    COMMAND,
    ENDED,
    FILES,
    JOURNAL,
    MANIFEST,
    ROWS,
    Keep,
    Recording,
    RecordingManifest,
    journals,
)
from circuit.runs.records import StoredState, StoredStep, state_record, step_record
from circuit.sealed import sealed
from circuit.sizes import require_disk

STATES_A_FILE = 50
"""Where states alone are stored."""


class Storage:
    """The folder of a recording, while it is written; a context manager.

    Attributes:
        keep: what is stored of the steps.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: Keep,
        every: int,
        anchor_every: int,
        overwrite: bool,
        resume: bool = False,
    ) -> None:
        """Describe it; entering it does the rest."""
        self._resume = resume
        self.keep, self._every, self._anchor_every = keep, every, anchor_every
        self._folder = OutputFolder(
            folder,
            COMMAND,
            writes=FILES,
            overwrite=overwrite,
            resume=resume,
            resumable=True,
            appended={JOURNAL: check_journal},
        )
        self._journal: Journal | None = None
        self._states = 0
        self._rows: RowLog | None = None

    @property
    def root(self) -> Path:
        """The folder."""
        return self._folder.root

    def __enter__(self) -> Self:
        self._folder.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._journal is not None:
            self._journal.close()
            if error[0] is None:
                self._folder.write_text(ENDED, dump_json(sealed({"last_step": self._last})))
        if self._rows is not None:
            self._rows.sync()
            self._rows.close()
        self._folder.__exit__(*error)

    def prepare(self, manifest: RecordingManifest, need: Mapping[str, int]) -> Recording | None:
        """Drop an earlier recording, and say what this one is; or give the one that is to go on.

        Args:
            manifest: what is watched; of rows alone none is written.
            need: bytes that it is going to take, as far as that is known.

        Raises:
            CircuitError: a file is not ours; or the disk cannot hold it.
        """
        require_disk(need, self.root, freed=self._folder.owned_bytes(), where="circuit.watch")
        if self._resume and (self.root / MANIFEST).exists():
            return Recording(self.root)
        self._folder.clear()
        if self.keep != "rows":
            payload = sealed(manifest.model_dump(mode="json"))
            self._folder.write_text(MANIFEST, dump_json(payload))
        return None

    def go_on(self, step: int) -> None:
        """Drop what an earlier recording holds of later steps: it is going to be written again.

        Killed at any point, it is a recording up to that step or a later one.

        Raises:
            CircuitError: its rows do not reach that step.
        """
        if ROWS in self._folder.owned:
            self._refuse_lost_rows(step)
        self._folder.remove([ENDED] if ENDED in self._folder.owned else [])
        for start, path in reversed(journals(self.root).items()):
            if start > step:
                self._folder.remove([path.relative_to(self.root).as_posix()])
            elif start < step:
                cut_behind(path, step)
        if ROWS in self._folder.owned:
            self._rows = RowLog(self._folder.path(ROWS), last_step=step)

    def _refuse_lost_rows(self, step: int) -> None:
        path, due = self._folder.path(ROWS), step - step % self._every
        if not due:
            return
        with values_of(path, fix="record the loop again with `overwrite`"):
            steps = [row["step"] for row in read_jsonl(path, tolerate_torn_tail=True)]
            last = max((one for one in steps if one <= step), default=0)
        if last != due:
            raise CircuitError(
                f"holds no row between steps {last} and {step}",
                where=path,
                expected=f"that of step {due}",
                fix="rows were lost; go on from an earlier state, or record the loop again with"
                " `overwrite`",
            )

    def is_anchor(self, step: int) -> bool:
        """Whether a state is stored behind a step, beside its gradient."""
        return step % self._anchor_every == 0

    def is_due(self, step: int) -> bool:
        """Whether the state behind a step is stored, where states alone are."""
        return self.keep == "states" and step % self._every == 0

    def begin(self, state: StoredState, *, anew: bool = False) -> None:
        """Store a state, behind which steps or states follow; see `state_record`."""
        if self.keep == "rows":
            return
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        name = f"steps/from_{state.step:06d}{JOURNAL}"
        self._folder.claim([name])
        self._journal = Journal(self._folder.path(name), *state_record(state, anew=anew))
        self._states, self._last = 1, state.step

    def add_state(self, state: StoredState) -> None:
        """Store a state, in a file of its own every so often."""
        if self._journal is None or self._states >= STATES_A_FILE:
            self.begin(state)
            return
        self._journal.append(*state_record(state))
        self._states, self._last = self._states + 1, state.step

    def add_step(self, step: StoredStep, absent: Iterable[str], gradient: Flat) -> None:
        """Store a step; see `circuit.runs.records.step_record`."""
        assert self._journal is not None, "a state comes first"
        self._journal.append(*step_record(step, absent, gradient))
        self._last = step.step

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a step; null where one is not finite, as of a loop that diverges."""
        if self._rows is None:
            self._folder.claim([ROWS])
            self._rows = RowLog(self._folder.path(ROWS))
        self._rows.append(_finite(row))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
