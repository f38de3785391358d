"""A kill, or a full disk, at any call that touches the disk: nothing is lost for good."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults import PAGE, full, recording, small_disk
from law import SYSTEM, WHOLE, Ended, differing, files, renewed, typed
from wide import WRITTEN

Words = tuple[str, ...]
OUT = ("--output-dir", "out")
SHORT = ("--set", "steps=2", "--set", "checkpoint_every=2", "--set", "eval_every=2")
TRAIN = ("train", "--config", "tiny.json", "--set", "output_dir=out", *SHORT)
RECORD = ("trace", "record", "--config", "tiny.json", "--from-initialization", *OUT)
RECORD += ("--num-steps", "2", "--anchor-every", "1")
RUN = ("--config", "runs/tiny")
LAST = ("--checkpoint", "runs/tiny/checkpoints/step_000012.pt")
MATCH = "runs/tiny/analysis/bilinear_qk_match_separation/bilinear_qk_match_separation_rows.jsonl"
SELECT = ("study", "select-heads", "--separation-rows", MATCH, *OUT, "--start-step", "3")
SELECT += ("--end-step", "12")
NOTES = Path("out/notes.txt")
SHORT = {"train", "trace record", "report anew", "watch on", "influence"}
"""Jobs of `make test-system`."""


@dataclass(frozen=True)
class Job:
    """A command that writes.

    Attributes:
        words: of it.
        again: what is added to them where they were cut off.
        earlier: a command that has written there before.
    """

    words: Words
    again: Words = ("--overwrite",)
    earlier: Words = ()


JOBS = {
    "train": Job(TRAIN, ("--resume",)),
    "train anew": Job((*TRAIN, "--overwrite"), (), (*TRAIN, "--set", "seed=5")),
    "train on": Job((*TRAIN, "--resume"), (), (*TRAIN, "--stop-at-step", "1")),
    "train --trace": Job((*TRAIN, "--trace"), ("--resume",)),
    "trace record": Job(RECORD, ("--resume",)),
    "trace checkout": Job(("trace", "checkout", "trace", "--step", "3", "--output", "out/s.pt")),
    "trace prune": Job(("trace", "prune", "trace", "--anchor-every", "12"), ()),
    "report with CSV": Job(("weight-svd-trace", *RUN, *LAST, *OUT)),
    "report anew": Job(
        (*SELECT, "--score", "rank2", "--overwrite"), (), (*SELECT, "--score", "full")
    ),
    "evaluate": Job(("evaluate", *RUN, *LAST), ()),
    "page": Job(("page", "runs/tiny", "--output", "out/page.html")),
    "generate-benchmark": Job(
        ("generate-benchmark", "--config", "benchmark.json", "--set", "output_dir=out")
    ),
    "export": Job(("export", *RUN, *LAST, *OUT)),
}
WIDE = {name: Job(*of) for name, of in WRITTEN.items()}


class Cut:
    """A job, what stood there before it, and what it leaves when nothing happens.

    Attributes:
        states: of the disk at each call that touches it, as folders, in their order.
        calls: number of these calls.
        seen: what a job that failed has left; to go on from the same is the same.
    """

    def __init__(self, job: Job, world: Path, place: Path) -> None:
        self.job = job
        self.seen: set[int] = set()
        renewed(world, place)
        untouched = set(files())
        NOTES.parent.mkdir()
        NOTES.write_text("mine")
        assert not job.earlier or typed(job.earlier).code in (0, 130)  # a loop that is cut off
        self.before = shutil.copytree(place, place.with_name("before"))
        self.old = files()
        self.own = set(self.old) - untouched - {NOTES.as_posix()}
        renewed(self.before, place)
        recorded = place.with_name("states")
        done = typed(job.words, recording(recorded))
        assert done.code == 0, done.err
        order = (recorded / "order").read_text().split()
        self.calls, self.states = len(order), [recorded / n for n in dict.fromkeys(order)]
        self.new = files()

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.before)
        shutil.rmtree(self.before.with_name("states"))

    def lost(self) -> Iterator[str]:
        """Files that are neither as before nor as the job leaves them.

        A log may end early, as may what is known of costs; a manifest may list what is still to
        come, or a part of it.
        """
        here = files()
        for name in self.old | self.new | here:
            data, old, new = here.get(name), self.old.get(name), self.new.get(name)
            whole = data in (old, new) or (data is None and name in self.own)
            log = data is not None and name.endswith((".jsonl", ".journal", "costs.json"))
            log = log and any(one and one.startswith(data) for one in (old, new))
            manifest = False
            if name.endswith(".manifest.json") and data is not None:  # `files` gives its names
                told = {*json.loads(old or b"[]"), *json.loads(new or b"[]")}
                manifest = {*json.loads(data)} <= told
            if not (whole or log or manifest):
                yield name

    def refused(self, done: Ended) -> str:
        """What a job that a disk has stopped breaks of the law; it is then done again."""
        said = done.breach
        if done.code:
            state = hash(frozenset((p, p.read_bytes()) for p in Path().rglob("*") if p.is_file()))
            if state in self.seen:
                return said
            self.seen.add(state)
        elif differing(files(), self.new):
            said += f" done, but differs in {differing(files(), self.new)};"
        return said + self.left()

    def left(self) -> str:
        """What is wrong with what stands here; the job is then done again."""
        said = "".join(f" {name} is damaged or lost;" for name in self.lost())
        again = typed([*self.job.words, *self.job.again])
        if again.code:
            return f"{said} cannot be done again: {again.err[-500:]}"
        return said + "".join(f" {name} differs at last;" for name in differing(files(), self.new))


def each(names: Iterable[str], step: int) -> list[Any]:
    """Jobs one by one."""
    marks = {name: SYSTEM if name in SHORT else WHOLE for name in names}
    return [pytest.param((name,), step, marks=marks[name], id=name) for name in marks]


@pytest.mark.parametrize(("names", "step"), [(("train", "report anew"), 13), *each(JOBS | WIDE, 1)])
def test_cut_off_at_any_call_it_ends_as_if_nothing_had_happened(
    names: Words, step: int, place: Path, world: Path
) -> None:
    wrong, calls, states, tried, fulls = [], 0, 0, 0, 0
    for name in names:
        with Cut((JOBS | WIDE)[name], world, place) as cut:
            for number, state in enumerate(cut.states[::step]):
                renewed(state, place)
                broken = cut.left()
                wrong += [f"{name}, killed in state {number * step}: {broken}"] if broken else []
            for n in range(step // 2, cut.calls, 5 * step):
                renewed(cut.before, place)
                broken = cut.refused(typed(cut.job.words, full(n)))
                wrong += [f"{name}, full at call {n} of {cut.calls}: {broken}"] if broken else []
                fulls += 1
            calls += cut.calls
            states += len(cut.states)
            tried += len(cut.states[::step])
    print(
        f"{', '.join(names)}: killed before {calls} calls, which leaves {states} states,"
        f" {tried} tried; full at {fulls} of them; lost or unequal {len(wrong)}"
    )
    assert wrong == [], "\n".join(wrong[:40])


def on_a_small_disk(pages: int, words: Words) -> Ended:
    """Types a command with `out` on a disk of so many pages; what it held is there afterwards."""
    kept = Path("../kept")
    shutil.rmtree(kept, ignore_errors=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            small_disk(Path("out"), pages)
            shutil.copytree("../before/out", "out", dirs_exist_ok=True)
            done = typed(words)
            Path("../ended").write_text(f"{done.code} {done.err}")
            shutil.copytree("out", kept)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    shutil.rmtree("out")
    kept.rename("out")
    code, _, err = Path("../ended").read_text().partition(" ")
    return Ended(words, int(code), "", err)


def pages_of(contents: dict[str, bytes]) -> int:
    """What the files of `out` take on a disk."""
    return sum(-(-len(data) // PAGE) for name, data in contents.items() if name[:4] == "out/")


@pytest.mark.parametrize(("names", "step"), [(("train on",), 24), *each(tuple(JOBS)[:5], 3)])
def test_a_small_disk_is_a_refusal_and_no_loss(
    names: Words, step: int, place: Path, world: Path
) -> None:
    wrong, codes = [], []
    for name in names:
        with Cut(JOBS[name], world, place) as cut:
            small = range(pages_of(cut.old) + 4, pages_of(cut.new) + 8 + step, step)
            for pages in (*small, 8 * pages_of(cut.new)):  # the estimate before the work is larger
                renewed(cut.before, place)
                done = on_a_small_disk(pages, cut.job.words)
                broken = cut.refused(done)
                wrong += [f"{name} on {pages} pages: {broken}"] if broken else []
                codes.append(done.code)
    print(f"small disks: {len(codes)}, refused {codes.count(2)}; lost or unequal {len(wrong)}")
    assert wrong == [], "\n".join(wrong[:40])
    assert {0, 2} == set(codes)
