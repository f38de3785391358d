"""A command opens its run, benchmark, probe set and trace once, and builds its model once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from each_report import KINDS, MADE, options_of, sources_of
from tiny_run import RUN
from watched import opens

from circuit.runs.opening import open_run
from circuit.trace.step import Tracer

COUNTED = {
    "benchmark": "circuit.training.setup.load_benchmark",
    "model": "circuit.model.build.build_model",
    "trace": "circuit.trace.replay.TraceStore",
    "pairs": "circuit.tasks.pairs.build_pairs",
    "probe set": "circuit.tasks.probes.read_probe_set",
    "config": "circuit.train_config.load_run_config",
}
CONFIG = f"--config {RUN}/run_config.json"
STATES = [f"trace/checkpoints/step_{step:06d}.pt" for step in (5, 6, 7, 9)]
ON_THE_RUN = {
    "evaluate": f"{CONFIG} --checkpoint runs/tiny/checkpoints/step_000003.pt --output e.json",
    "export": f"{CONFIG} --checkpoint trace/checkpoints/step_000005.pt --output-dir exported",
    "optimizer-update-trace": f"{CONFIG} --from-initialization --end-step 3 --output-dir anew",
    "page": "runs/tiny --output page.html",
    "train": f"{CONFIG} --resume --allow-drift",
    "trace verify": "trace",
    "trace checkout": "trace --step 5",
    "trace qk": f"{CONFIG} --probe-set {RUN}/analysis/probe_set.jsonl --optimizer-trace-dir trace"
    " --head L1H0 --rank 2 --end-step 2 --basis source --basis step:1 --min-route-pairs-per-type 2"
    " --output-dir qk",
}
"""Further commands that read a run."""


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each of `COUNTED` is called within the block; and steps that are executed."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name, place in COUNTED.items():
            module, _, attribute = place.rpartition(".")
            found = __import__(module, fromlist=[attribute])
            patch.setattr(found, attribute, counted(name, getattr(found, attribute)))
        patch.setattr(Tracer, "advance", counted("steps", Tracer.advance))
        yield calls


def words_of(command: str, states: Sequence[str]) -> list[str]:
    """A report, with these states for checkpoints."""
    kind, options = KINDS[command], options_of(command)
    if "checkpoints" in kind.Options.declared():
        options = options.model_copy(update={"checkpoints": tuple(map(Path, states))})
    elif "separation_rows" in kind.Options.declared():  # which are of these steps
        start, end = (int(Path(states[at]).stem[-6:]) for at in (0, -1))
        options = options.model_copy(update={"start_step": start, "end_step": end})
    name = (kind.names or (command,))[0].split()
    config = CONFIG.split() if kind.reads_run else []
    return [*name, *config, *options.words(), "--output-dir", str(MADE / command)]


def lines_of(states: Sequence[str] = STATES) -> dict[str, list[str]]:
    """Every command that reads a run; later ones read what earlier ones wrote."""
    ordered: dict[str, None] = {}

    def add(command: str) -> None:
        for source in sources_of(options_of(command)):
            add(source)
        ordered[command] = None

    for command in sorted(KINDS):
        add(command)
    lines = {command: words_of(command, states) for command in ordered}
    return lines | {name: [*name.split(), *words.split()] for name, words in ON_THE_RUN.items()}


@dataclass(frozen=True)
class Watched:
    """Every command, one after the other, on a copy of the run.

    Attributes:
        lines: what was typed, by command.
        code: how the fork ended that typed them (`watched.opens`).
        calls: what each of them called, of `COUNTED` and "steps".
    """

    lines: dict[str, list[str]]
    code: int
    calls: dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def watched(
    trained_once: Path, traced_once: Path, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    shutil.copytree(traced_once, folder / "trace")
    shutil.copytree(folder / RUN, folder / "runs/copy")

    def counted(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        calls: dict[str, dict[str, int]] = {}
        for command, words in lines.items():
            with counting(patch) as counts:
                yield words
            calls[command] = dict(counts)
        Path("calls.json").write_text(json.dumps(calls))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("CIRCUIT_DEVICE", raising=False)
        lines = {
            command: [word.replace("runs/tiny", "runs/copy") for word in words]
            for command, words in lines_of().items()
        }
        lines["train again"] = ["train", "--config", "runs/copy", "--overwrite"]
        code = opens(RUN, counted(patch))
        calls = json.loads(Path("calls.json").read_text()) if code == 0 else {}
    return Watched(lines, code, calls)


def test_no_command_on_a_copy_opens_the_original(watched: Watched) -> None:
    """Config, checkpoints, probe set, trace and reports are the copy's: the folder is named."""
    assert watched.code == 0


def test_every_command_that_reads_a_run_opens_everything_once(watched: Watched) -> None:
    found = {command: watched.calls[command] for command in lines_of()}
    print(*(f"{command}: {calls}" for command, calls in found.items()), sep="\n")
    opened = {c: {n: k for n, k in calls.items() if n != "steps"} for c, calls in found.items()}
    more = {c: {n: k for n, k in calls.items() if k > 1} for c, calls in opened.items()}
    # files of a series need not be of one run, nor of one shape
    several = {"series-scan": {"model": 4}}
    assert {command: calls for command, calls in more.items() if calls} == several
    # states 5, 6, 7 and 9 of anchors 4 and 8: 3 steps and 1, not 1 + 2 + 3 + 1
    passes = {command: calls["steps"] for command, calls in found.items() if "steps" in calls}
    over = {c: n for c, n in passes.items() if set(STATES) <= set(watched.lines[c]) and n != 4}
    assert over == {}


def test_states_of_a_trace_in_ascending_order_are_one_pass(
    traced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(traced)
    with counting(monkeypatch) as calls:
        states = [run.state(step) for step in (1, 2, 3, 7, 6)]
    assert [state.step for state in states] == [1, 2, 3, 7, 6]
    assert calls["steps"] == 3 + 3 + 2  # 7 is beyond an anchor, and 6 lies behind 7
    again = open_run(traced)
    for state in states:
        fresh = open_run(traced).state(state.step)
        assert all(fresh.parameters[n].equal(p) for n, p in state.parameters.items())
    assert again.steps == list(range(13))
