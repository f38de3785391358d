"""What stands in a run's folder before it goes on: whose it is, and the states to go on from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuit.artifacts import OutputFolder, Row, read_jsonl
from circuit.environment import changed_facts, recorded_facts
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.reading import values_of
from circuit.train_config import Bookkeeping, RecipeConfig, TrainConfig, load_run_config
from circuit.training.checkpoints import (
    TrainState,
    checkpoint_name,
    encode_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_description,
    read_header,
)

ENVIRONMENT, METRICS, SUMMARY = "environment.json", "metrics.jsonl", "summary.json"
BEST = "checkpoints/best.pt"
METRICS_ROWS = "metrics_rows"
"""Note of a state: rows that `metrics.jsonl` held when it was saved."""
_ANEW = "start anew with `overwrite`"


def saved_states(run: Path) -> dict[int, Path]:
    """The full states of a run, by step, ascending: step checkpoints, and the best one.

    A best state that is damaged is left out where there are others.

    Raises:
        CircuitError: it is the only one, and damaged.
    """
    states = list_checkpoints(run / "checkpoints")
    best = run / BEST
    if best.exists():
        try:
            states.setdefault(read_header(best).step, best)
        except CircuitError:
            if not states:
                raise
    return dict(sorted(states.items()))


def read_metrics(run: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`.

    Args:
        whole: refuse that there is none, and a torn last line, which a writer leaves that was
            killed in it.

    Raises:
        CircuitError: it is damaged, or does not hold the rows that the last checkpoint has counted.
    """
    path, saved = run / METRICS, list_checkpoints(run / "checkpoints")
    there = whole or os.path.lexists(path)
    rows = read_jsonl(path, tolerate_torn_tail=not whole) if there else []
    if saved:
        last = read_description(saved[max(saved)])
        _count(rows, path, last.step, last.notes.metrics_rows)
    return rows


def _count(rows: Sequence[Row], path: Path, step: int, expected: int | None) -> int:
    """How many rows are of steps up to one; None was expected by version 0.1.0."""
    with values_of(path, fix=_ANEW):
        there = int(sum(row["step"] <= step for row in rows))
    if there != (there if expected is None else expected):
        raise CircuitError(
            f"holds {there} rows up to step {step}",
            where=path,
            expected=str(expected),
            fix="rows were lost; train on from an earlier checkpoint with `resume_from`, or anew"
            " with `overwrite`",
        )
    return there


@dataclass(frozen=True)
class Identity:
    """Which run it is, wherever it lies: its recipe, and the benchmark that its states tell."""

    recipe: str
    benchmark: str | None
    """None where no state is left to tell."""

    @classmethod
    def of(cls, run: Path) -> Identity:
        """That of the run in a folder.

        Raises:
            CircuitError: there is no config, or a damaged one.
        """
        saved = list_checkpoints(run / "checkpoints")
        benchmark = read_header(saved[max(saved)]).benchmark_digest if saved else None
        return cls(load_run_config(run / RUN_CONFIG).recipe_digest(), benchmark)

    def denies(self, provenance: Mapping[str, Any]) -> bool:
        """Whether a report tells that it is of another run; version 0.1.0 did not tell."""
        recipe = provenance.get("recipe_digest", self.recipe)
        benchmark = provenance.get("benchmark_digest", self.benchmark)
        return recipe != self.recipe or self.benchmark not in (None, benchmark)


def run_above(path: Path) -> Path | None:
    """The folder of the run that a file stands in, if it stands in one."""
    return next((f for f in path.absolute().parents if (f / RUN_CONFIG).is_file()), None)


def refuse_another_runs(report: Path, provenance: Mapping[str, Any]) -> None:
    """Refuse a report that stands in the folder of a run and is of another one.

    Raises:
        CircuitError: the run was trained anew, with other settings, after the report was made.
    """
    run = run_above(report)
    if run is not None and Identity.of(run).denies(provenance):
        raise CircuitError(
            "is a report of another run than the one that it stands in",
            where=report,
            fix="make it again, or move it away",
        )


def earlier_run(config: TrainConfig, folder: OutputFolder) -> EarlierRun | None:
    """The run that stands in a folder; None where nothing of one does.

    Raises:
        CircuitError: as `EarlierRun`.
    """
    if (folder.root / RUN_CONFIG).exists() or saved_states(folder.root):
        return EarlierRun(config, folder)
    return None


class EarlierRun:
    """A run that stands in a folder, and that a config is to go on with.

    Attributes:
        config: with which it was trained so far.
        facts: of the environment, as recorded.
        states: the saved ones, by step.
    """

    def __init__(self, config: TrainConfig, folder: OutputFolder) -> None:
        """Read what it is.

        Raises:
            CircuitError: it is another one, or its config or its states are gone.
        """
        self.root, self.folder, self.asked_for = folder.root, folder, config
        path = self.root / RUN_CONFIG
        self.config = load_run_config(path)
        if config.edit is not None and RUN_CONFIG not in folder.owned:
            raise CircuitError(
                f"is a counterfactual training, which goes on from step {config.edit.start} of"
                " another run",
                where=path,
                fix="the command that began it goes on with it, where it was cut off: trace"
                " counterfactual with the same edit and `runs_dir`",
            )
        difference = config.recipe_difference(self.config)
        if difference is not None:
            of_recipe = isinstance(config, RecipeConfig)
            with_it = (
                "the recipe's file as it was" if of_recipe else "the run's own run_config.json"
            )
            raise CircuitError(
                f"cannot resume with another config: {difference}",
                where=path,
                fix=f"resume with {with_it}, or start anew with `overwrite`",
            )
        self.facts = recorded_facts(self.root / ENVIRONMENT)
        self.states = saved_states(self.root)
        if not self.states and self._had_states():
            raise CircuitError(
                "the run's checkpoints are gone, so it cannot be resumed",
                where=self.root / "checkpoints",
                fix="bring one back, or start anew with `overwrite`",
            )

    def refuse_changed_facts(self, now: Mapping[str, Any], allow_drift: bool) -> None:
        """Refuse an environment with other bits.

        Raises:
            CircuitError: names what has changed since the run's states were made.
        """
        changed = changed_facts(self.facts, now) if self.states else []
        if changed and not allow_drift:
            raise CircuitError(
                f"the environment has changed ({'; '.join(changed)}), so the bits would",
                where=self.root,
                fix="resume where the run was started, or pass `allow_drift`",
            )

    def state(self, step: int | None, *, drop_later: bool) -> TrainState | None:
        """The state to go on from: the last one, or that of a step; None if none was saved yet.

        Args:
            step: whose checkpoint is asked for.
            drop_later: states of later steps may be removed.

        Raises:
            CircuitError: there is no such checkpoint, it is damaged, or there are later ones.
        """
        if step is None:
            return self._load(max(self.states)) if self.states else None
        if step not in self.states:
            raise CircuitError(
                f"no checkpoint of step {step} to resume from",
                where=self.root / "checkpoints",
                expected=f"one of {', '.join(map(str, self.states)) or '(none)'}",
            )
        later = [other for other in self.states if other > step]
        if later and not drop_later:
            raise CircuitError(
                f"{len(later)} later checkpoint{'s' if len(later) > 1 else ''}, up to step"
                f" {later[-1]}, would no longer be of this run",
                where=self.root / "checkpoints",
                fix="pass `overwrite`, too, to drop them; or copy the run and go on with the copy",
            )
        return self._load(step)

    def _load(self, step: int) -> TrainState:
        state = load_checkpoint(self.states[step])
        state.past_moments(self.states[step])
        return state

    def notes(self, state: TrainState) -> dict[str, Any]:
        """The loop's notes, without a best evaluation that is no longer asked for."""
        best = state.notes.get("best")
        if best is None:
            return {}
        asked = self.asked_for.best
        if (best["split"], best["metric"]) != (asked.split, asked.metric):
            return {}
        return {"best": best}

    def rows(self, state: TrainState) -> int:
        """How many rows `metrics.jsonl` holds up to a state.

        Raises:
            CircuitError: not as many as when the state was saved (version 0.1.0 did not count).
        """
        path = self.root / METRICS
        rows = read_jsonl(path, tolerate_torn_tail=True)
        return _count(rows, path, state.step, state.notes.get(METRICS_ROWS))

    def go_on(self, state: TrainState) -> None:
        """Drop what is of later steps, and record the config that is in use from now on."""
        self._drop_later(state)
        self._restore_best(state)
        kept = {"steps", "benchmark_dir", *Bookkeeping.model_fields}
        ours, theirs = (c.model_dump(include=kept) for c in (self.asked_for, self.config))
        if ours != theirs:
            machine = {"device": self.config.device, "threads": self.config.threads}
            used = self.asked_for.replace(**machine)
            self.folder.write_text(RUN_CONFIG, used.to_json(origin=True))

    def _drop_later(self, state: TrainState) -> None:
        """In this order a run that is killed in between still goes on from its last state."""
        step_of = {f"checkpoints/{checkpoint_name(step)}": step for step in self.states}
        if (self.root / BEST).exists():
            step_of[BEST] = read_header(self.root / BEST).step
        if state.step < self.asked_for.steps:
            step_of[SUMMARY] = 1 + max(step_of.values())
        later = [name for name, step in step_of.items() if step > state.step]
        later.sort(key=lambda name: -step_of[name])
        self.folder.remove([name for name in later if name in self.folder.owned])

    def _restore_best(self, state: TrainState) -> None:
        """Let `best.pt` be what the state's notes say, as far as its checkpoint is left."""
        best, step = self.root / BEST, self.notes(state).get("best", {}).get("step")
        best_step = read_header(best).step if best.exists() else None
        checkpoint = self.root / "checkpoints" / checkpoint_name(step or 0)
        if best_step != step and step is not None and checkpoint.exists():
            self.folder.write_bytes(BEST, encode_checkpoint(load_checkpoint(checkpoint)))
        elif best_step is not None and step is None:
            # the best by a measure that is no longer asked for, unless it is the only state
            last = self.root / "checkpoints" / checkpoint_name(state.step)
            self.folder.remove([BEST] if last.exists() else [])

    def _had_states(self) -> bool:
        """Whether rows or a summary tell of steps after which a state was saved."""
        if (self.root / SUMMARY).exists():
            return True
        metrics = self.root / METRICS
        rows = read_jsonl(metrics, tolerate_torn_tail=True) if metrics.exists() else []
        with values_of(metrics, fix=_ANEW):
            return any(row["step"] > self.config.checkpoint_every for row in rows)
