"""Rows of a window do not depend on how it was cut, nor on who worked."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker, spawn
from pathlib import Path
from typing import Any

import pytest
from warm import warm_python

from circuit.artifacts import dump_rows
from circuit.attribution.series import Series
from circuit.attribution.window import Job, Worker, attribute_window, cut_at_anchors
from circuit.core.update import SGDRule
from circuit.errors import CircuitError
from circuit.scalars.base import Scalar
from circuit.scalars.qk_match import ReadMasks, qk_matches
from circuit.trace.record import RecordOptions, record_trace
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig

SHAPE = {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32, "max_sequence_length": 40}


@dataclass(frozen=True)
class Matches:
    """QK matches of one head on records of the training split (a `ScalarSource`)."""

    basis: int | None = None
    """Step of a fixed basis."""
    repeated: int = 1

    def inputs(self, run: ReplayedRun) -> ReplayedRun:
        return run

    def scalars(self, inputs: ReplayedRun) -> Sequence[Scalar]:
        benchmark = inputs.setup.benchmark
        records = benchmark.records("train")[:5]
        reads = ReadMasks.of(benchmark.task.examples(records))
        model = None
        if self.basis is not None:
            model = inputs.model(self.basis)
        return qk_matches(["L1H1"] * self.repeated, reads, layers=2, ranks=[2], basis=model)


@dataclass(frozen=True)
class Nothing:
    """A source of no scalar."""

    def inputs(self, run: ReplayedRun) -> None:
        pass

    def scalars(self, inputs: None) -> Sequence[Scalar]:
        return ()


@pytest.fixture(scope="module")
def config(
    make_config: Callable[..., TrainConfig],
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainConfig:
    run = tmp_path_factory.mktemp("run")
    return make_config(
        model=SHAPE, benchmark_dir=str(tiny_folder), output_dir=str(run), gradient_clip=0.5
    )


@pytest.fixture(scope="module")
def trace(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps with anchors at 0, 4, 8 and 12."""
    return recorded(config, tmp_path_factory.mktemp("trace"))


def recorded(config: TrainConfig, folder: Path, **options: Any) -> Path:
    record_trace(config, folder, RecordOptions(**{"end_step": 12, "anchor_every": 4, **options}))
    return folder


def text(job: Job, *windows: tuple[int, int], workers: int = 1, anew: bool = True) -> str:
    """The rows of some windows, one after the other, each by a worker of its own if `anew`."""
    shared = job.prepare()
    found = (
        attribute_window(job.prepare() if anew else shared, *window, workers=workers)
        for window in windows
    )
    return "".join(dump_rows(rows) for window in found for rows in window)


@pytest.fixture(scope="module")
def jobs(trace: Path) -> dict[str, Job]:
    return {
        "source": Job(trace, Matches(), partitions=("layer", "circuit")),
        "fixed": Job(trace, Matches(basis=6)),  # reuses the end of a step as the next one's start
        "auto": Job(trace, Matches(basis=6), path="auto:1e-4"),
    }


@pytest.fixture(scope="module")
def whole(jobs: dict[str, Job]) -> dict[str, str]:
    return {name: text(job, (0, 12)) for name, job in jobs.items()}


CUTS = {
    "at anchors": [(0, 4), (4, 8), (8, 12)],
    "between anchors": [(0, 3), (3, 5), (5, 12)],
    "step by step": [(step, step + 1) for step in range(12)],
}


def cases() -> Iterator[Any]:
    """Every kind is cut between anchors; the one that costs least everywhere."""
    for kind in ("source", "fixed", "auto"):
        for cuts, windows in CUTS.items():
            for anew, who in ((True, "own workers"), (False, "one worker")):
                between = cuts == "between anchors" and (anew or kind == "fixed")
                marks = () if kind == "source" or between else pytest.mark.slow
                yield pytest.param(kind, windows, anew, id=f"{kind}-{cuts}-{who}", marks=marks)


@pytest.mark.parametrize(("kind", "windows", "anew"), [*cases()])
def test_rows_do_not_depend_on_the_cuts(
    jobs: dict[str, Job],
    whole: dict[str, str],
    kind: str,
    windows: list[tuple[int, int]],
    anew: bool,
) -> None:
    if anew and len(windows) > 3:
        windows = [(0, 7), *((step, step + 1) for step in range(7, 10)), (10, 12)]
    assert whole[kind].count("\n") == 12
    assert text(jobs[kind], *windows, anew=anew) == whole[kind]


def test_one_worker_may_go_backwards(jobs: dict[str, Job], whole: dict[str, str]) -> None:
    """Nothing of an earlier window is left in it."""
    worker = jobs["fixed"].prepare()
    pieces = [
        "".join(dump_rows(rows) for rows in worker.steps(*window))
        for window in ((8, 12), (4, 8), (0, 4))
    ]
    assert "".join(reversed(pieces)) == whole["fixed"]


@pytest.mark.parametrize("kind", ["source", pytest.param("auto", marks=pytest.mark.slow)])
def test_two_processes_make_the_rows_of_one(
    jobs: dict[str, Job], whole: dict[str, str], kind: str
) -> None:
    """They get all that they know through a pipe, as new interpreters, though they are forks."""
    real = spawn.get_executable()
    resource_tracker.ensure_running()  # outlives the pool, and so is the real one's
    with warm_python() as python:
        spawn.set_executable(python)
        try:
            rows = text(jobs[kind], (2, 12), workers=2)
        finally:
            spawn.set_executable(real)
    assert rows.splitlines() == whole[kind].splitlines()[2:]


def test_rows_of_an_adaptive_rule_say_what_they_took(whole: dict[str, str]) -> None:
    rows = {kind: list(map(json.loads, text.splitlines())) for kind, text in whole.items()}
    for fixed, adaptive in zip(rows["fixed"], rows["auto"], strict=True):
        assert set(adaptive) - set(fixed) == {"nodes", "agrees", "rounded"}
        assert adaptive["nodes"] in (5, 9, 17, 33, 65)
        assert adaptive["agrees"] or adaptive["rounded"] or adaptive["nodes"] == 65
        off = abs(sum(adaptive["path"].values()) - adaptive["actual"])
        assert not adaptive["agrees"] or off <= 1e-4 * abs(adaptive["actual"])


@pytest.mark.parametrize("at_least", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [(0, 12), (1, 11), (4, 8), (5, 7), (3, 9)], ids=str)
def test_pieces_are_the_window_cut_at_anchors(
    trace: Path, window: tuple[int, int], at_least: int
) -> None:
    pieces = cut_at_anchors(ReplayedRun.open(trace), *window, at_least=at_least)
    assert (pieces[0][0], pieces[-1][1]) == window
    assert all(start < stop for start, stop in pieces)
    for (_, stop), (start, _) in itertools.pairwise(pieces):
        assert stop == start
        assert start % 4 == 0
    inside = [step for step in (4, 8) if window[0] < step < window[1]]
    assert len(pieces) <= len(inside) + 1
    if at_least > len(inside):
        assert len(pieces) == len(inside) + 1


def test_a_trace_from_the_middle_is_attributed(
    config: TrainConfig, trace: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """With the rows of the trace from the start, for the states are the same."""
    start = trace / "checkpoints" / "step_000008.pt"
    folder = recorded(config, tmp_path / "later", resume_checkpoint=start, anchor_every=3)
    job = Job(folder, Matches(), partitions=("layer", "circuit"))
    assert text(job, (8, 12)).splitlines() == whole["source"].splitlines()[8:]
    with pytest.raises(CircuitError, match=r"window 4:12; expected start < end within 8:12"):
        text(job, (4, 12))


def test_how_a_trace_is_stored_changes_no_row(
    config: TrainConfig, whole: dict[str, str], tmp_path: Path
) -> None:
    folder = recorded(config, tmp_path / "dense", storage="dense", end_step=6)
    job = Job(folder, Matches(), partitions=("layer", "circuit"))
    pieces = cut_at_anchors(ReplayedRun.open(folder), 0, 6, at_least=8)
    assert len(pieces) == 6
    assert text(job, *pieces, anew=False).splitlines() == whole["source"].splitlines()[:6]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_terms_of_sgd_have_their_own_names(
    config: TrainConfig, tmp_path: Path, momentum: float
) -> None:
    optimizer = {"name": "sgd", "learning_rate": 0.5, "momentum": momentum, "weight_decay": 0.01}
    sgd = TrainConfig.model_validate(
        {**config.model_dump(), "optimizer": optimizer, "gradient_clip": None}
    )
    folder = recorded(sgd, tmp_path / "sgd", end_step=5)
    found = [row for (row,) in attribute_window(Job(folder, Matches()).prepare(), 0, 5)]
    for row in found:
        assert tuple(row["path"]) == (*SGDRule.names, "rounding")
        assert row["clip_factor"] == 1.0
        still = row["step"] == 1 or momentum == 0
        assert (row["path"]["historical_momentum"] == 0.0) == still
        # nothing is clipped: both references are the current gradient's term
        for name in ("raw_sgd", "clipped_sgd"):
            share = row["first_order"]["current_gradient"]
            assert row["references"][name] == pytest.approx(share, rel=1e-6)
    closure = Series.collect(found)["qk_match.L1H1.rank2"].closure()
    assert closure.path_absolute is not None
    assert closure.first_order_absolute is not None
    assert closure.path_absolute < 0.1 * closure.first_order_absolute


def test_a_scope_of_answers_adds_one_reference_and_changes_no_term(
    jobs: dict[str, Job], trace: Path
) -> None:
    plain = list(attribute_window(jobs["source"].prepare(), 3, 6))
    scoped = dataclasses.replace(jobs["source"], loss_scope="answer")
    for (one,), (other,) in zip(plain, attribute_window(scoped.prepare(), 3, 6), strict=True):
        added = set(other["references"]) - set(one["references"])
        assert added == {"answer_raw_sgd"}
        assert other["references"].pop("answer_raw_sgd") != one["references"]["raw_sgd"]
        assert one == other


def test_bad_jobs_are_refused_before_a_step_is_replayed(
    trace: Path, jobs: dict[str, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReplayedRun, "replay", None)
    with pytest.raises(CircuitError, match="unknown path rule 'gauss:0'"):
        Job(trace, Matches(), path="gauss:0")
    with pytest.raises(CircuitError, match="unknown partition 'head'"):
        Job(trace, Matches(), partitions=("head",))  # type: ignore[arg-type]
    with pytest.raises(CircuitError, match="unknown loss scope 'lm'"):
        Job(trace, Matches(), loss_scope="lm").prepare()  # type: ignore[arg-type]
    with pytest.raises(CircuitError, match=r"`scalars`: none; expected at least one"):
        Job(trace, Nothing()).prepare()
    with pytest.raises(CircuitError, match=r"rank2, qk_match.L1H1.rank2; expected each once"):
        Job(trace, Matches(repeated=2)).prepare()
    with pytest.raises(CircuitError, match="there is no trace here"):
        Job(trace / "nowhere", Matches()).prepare()
    worker = jobs["source"].prepare()
    with pytest.raises(CircuitError, match="0 workers; expected at least 1"):
        list(attribute_window(worker, 0, 4, workers=0))
    for window in ((0, 13), (4, 4), (6, 5), (-1, 3)):
        with pytest.raises(CircuitError, match=r"expected start < end within 0:12"):
            list(attribute_window(worker, *window, workers=2))


def test_a_step_that_does_not_replay_ends_the_attribution(
    jobs: dict[str, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker: Worker = jobs["source"].prepare()
    real = worker.run.store.row

    def other(step: int) -> dict[str, Any]:
        row = real(step)
        return {**row, "loss": 0.0} if step == 3 else row

    monkeypatch.setattr(worker.run.store, "row", other)
    steps = attribute_window(worker, 0, 6)
    assert [next(steps)[0]["step"], next(steps)[0]["step"]] == [1, 2]
    with pytest.raises(CircuitError, match="step 3 does not replay: it first differs in loss"):
        next(steps)
