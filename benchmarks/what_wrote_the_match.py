"""Which reads wrote a head's match, and would it have formed without them? The quickstart by seed.

    python benchmarks/what_wrote_the_match.py FOLDER [FIRST:LAST]    # seeds 1:5, eight minutes each
    python benchmarks/what_wrote_the_match.py FOLDER --trace TRACE START:END

What a training gave stays in FOLDER; another start does what is missing, and one of several
processes may do some of the seeds.

Fixed before the runs: the window is the 100 steps up to the first evaluation (every 10 steps) at
which 60 % of the validation reads of lag 2 are right; the head is the one of layer 1 with the
largest match (rank 8, basis of the window's end) at the window's end on even reads of the
validation split, and its match is measured on odd ones. Of a trace that is named, the window is
named, too; the rank is a head's half width, and reads are those of 128 records.

The first table divides what the window did to the match among the predicted tokens
(`circuit trace data --by position`). The second trains on, to 100 steps behind the window, without
the tenth of the lag-2 reads with the most credit, and without as many random ones, 20 times (of a
trace that is named, to the window's end). The third takes the window from the same state with
another optimizer. Changes are the match's own units (definitions.md, section 2), beside the run's;
means over seeds with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from over_seeds import interval
from transformer_lens import HookedTransformer

import circuit
from circuit.artifacts import atomic_write_text, dump_json
from circuit.attribution.credit import CreditPass
from circuit.attribution.window import attributor_of
from circuit.core.edit import Edit
from circuit.quickstart import quickstart_configs
from circuit.reports.data_facts import by_fact
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.qk_match import QKMatch, ReadMasks
from circuit.tasks.benchmark import write_benchmark
from circuit.tasks.examples import Examples
from circuit.trace.replay import ReplayedRun
from circuit.trace.while_training import DEFAULT_FOLDER, TraceRecorder
from circuit.training.loop import train
from circuit.training.session import TrainingSession

EVERY, LENGTH, BEHIND = 10, 100, 100
FORMED, LAG, RANK = 0.6, 2, 8
RECORDS = 128
"""Whose reads are looked at, of a trace that is named."""
RANDOM, SHARE = 20, 0.1
AS_IT_WAS = "AdamW, as it was"
OPTIMIZERS: dict[str, dict[str, dict[str, float]]] = {
    "without history": {"terms": {"adam_historical_momentum": 0.0}},
    "against the gradient, at Adam's norm": {"direction": {"gradient": 1.0}},
    "against the momentum, at Adam's norm": {"direction": {"momentum": 1.0}},
    "without decay": {"terms": {"weight_decay": 0.0}},
}
TOP = "most credit"


class Course(NamedTuple):
    """A training from the window's start on.

    Attributes:
        match: at the window's end.
        formed: first evaluated step with lag 2 right; None: not until the end.
    """

    match: float
    formed: int | None


@dataclass(frozen=True)
class Window:
    """What is asked of a trace.

    Attributes:
        start, end: the states that the window takes one to the other.
        last: the step up to which trainings go on.
        reads: of the validation split.
        rank: of the match.
    """

    run: ReplayedRun
    start: int
    end: int
    last: int
    reads: Examples
    rank: int

    @property
    def late(self) -> Examples:
        """The reads of lag 2."""
        return self.reads.select(self.reads.facts["lag"] == LAG)


class Answer:
    """What is measured of one training, kept in a file as it is known.

    Attributes:
        told: `formed` (null: lag 2 is not learned in time), `credit` (units of the match by what is
            predicted), `closure`, `ranked` (the reads of lag 2, those with most credit first),
            `before` (the match at the window's start), `courses` (by name: `Course`); of a trace
            that is named, `weights` (the digest of its last state's).
    """

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path = path
        self.told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, **values: Any) -> None:
        """Write some more of it down."""
        self.told.update(values)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.path, dump_json(self.told))

    @property
    def courses(self) -> dict[str, Course]:
        """By name."""
        return {name: Course(*course) for name, course in self.told.get("courses", {}).items()}

    @property
    def removed(self) -> int:
        """Reads that a training goes without."""
        return round(SHARE * len(self.told["ranked"]))

    def change(self, name: str) -> float:
        """Of the match over the window, in a training."""
        return self.courses[name].match - float(self.told["before"])

    def delay(self, name: str) -> float:
        """Steps after the run's own; at least those that were trained."""
        own, formed = self.courses[AS_IT_WAS].formed, self.courses[name].formed
        assert own is not None
        return float((formed or own + BEHIND) - own)

    def random(self) -> list[str]:
        """Names of the trainings without random reads that there are."""
        return [name for name in self.courses if name.startswith("random")]


def main() -> None:
    """Do what is missing, and print the tables as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("range", nargs="?", default="1:5", help="seeds, or the steps of --trace")
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()
    first, last = map(int, args.range.split(":"))
    if args.trace is not None:
        answer = Answer(args.folder / f"steps_{first}_{last}.json")
        run = circuit.open_run(args.trace)
        assert isinstance(run, ReplayedRun)
        weights = run.state_digests(last)["parameters"]
        if answer.told.setdefault("weights", weights) != weights:
            parser.error(f"{answer.path} is of another trace: choose another folder")
        reads = run.setup.split("validation_iid").batch(range(RECORDS))
        shape = run.config.model
        ask(Window(run, first, last, last, reads, shape.d_model // shape.heads // 2), answer)
        print_tables([answer])
        return
    answers = [of_seed(args.folder, seed) for seed in range(first, last + 1)]
    formed = [answer for answer in answers if answer.told["formed"] is not None]
    print(f"{len(formed)} of {len(answers)} seeds learn lag {LAG}\n")
    print_tables(formed)


def of_seed(folder: Path, seed: int) -> Answer:
    """Train the quickstart with a seed, and ask."""
    answer = Answer(folder / f"seed_{seed}.json")
    courses = 2 + RANDOM + len(OPTIMIZERS)
    if len(answer.courses) == courses or answer.told.get("formed", 0) is None:
        return answer
    benchmark, config = quickstart_configs("symbolic_kv")
    data = folder / "data"
    if not (data / "metadata.json").exists():
        write_benchmark(benchmark.model_copy(update={"output_dir": str(data)}))
    out = folder / f"seed_{seed}"
    chosen = config.replace(seed=seed, output_dir=str(out), benchmark_dir=str(data))
    train(chosen.replace(eval_every=EVERY), overwrite=True, recorder=TraceRecorder())
    run = circuit.open_run(out / DEFAULT_FOLDER)
    assert isinstance(run, ReplayedRun)
    reads = run.setup.split("validation_iid").batch()
    late = reads.select(reads.facts["lag"] == LAG)
    steps = range(0, config.steps + 1, EVERY)
    formed = next((step for step in steps if right(run.model(step), late) >= FORMED), None)
    if formed is not None and formed < LENGTH:
        formed = None  # earlier than a window can be
    answer.keep(formed=formed)
    if formed is not None:
        last = min(formed + BEHIND, config.steps)
        ask(Window(run, formed - LENGTH, formed, last, reads, RANK), answer)
    return answer


def ask(window: Window, answer: Answer) -> None:
    """Credit, and the trainings that are missing."""
    match = best_match(window)
    if "ranked" not in answer.told:
        credit(window, match, answer)
    ranked = answer.told["ranked"]
    draws = np.random.default_rng(window.run.config.seed)
    chosen = {TOP: ranked[: answer.removed]}
    for at in range(1, RANDOM + 1):
        chosen[f"random {at}"] = draws.choice(ranked, answer.removed, replace=False).tolist()
    without = {
        name: {"examples": dict.fromkeys(reads, 0.0)} for name, reads in sorted(chosen.items())
    }
    edits: dict[str, dict[str, dict[str, float]]] = {AS_IT_WAS: {}, **OPTIMIZERS, **without}
    for name, parts in edits.items():
        if name not in answer.courses:
            course = trained(window, Edit(window.start, window.end, **parts), match)
            answer.keep(courses={**answer.courses, name: course})


def credit(window: Window, match: QKMatch, answer: Answer) -> None:
    """Divide the match's change among the tokens that the window predicts."""
    attributor = attributor_of(window.run, [match], averages=True)
    passed = CreditPass(window.run, attributor, window.start, window.end, "position")
    by_token: dict[str, float] = defaultdict(float)
    reads: dict[str, float] = defaultdict(float)  # of lag 2
    for step in passed:
        examples = step.objective.examples()
        assert isinstance(examples, Examples)
        facts = by_fact(step.credit, examples)
        for kind, share in facts["predicted"].items():
            by_token[kind] += float(share)
        for lag, share in facts["lag"].items():
            by_token[f"answer, lag {lag}"] += float(share)
        for read in (examples.facts["lag"] == LAG).nonzero().flatten().tolist():
            row, at = int(examples.row[read]), int(examples.at[read])
            reads[f"{examples.sample_ids[row]}@{at}"] += float(step.credit[0, row, at])
    answer.keep(
        before=mean(match, window.run.model(window.start)),
        credit=dict(by_token),
        closure=float(passed.totals.closure),
        ranked=sorted(reads, key=lambda read: -reads[read]),
    )


def right(model: torch.nn.Module, reads: Examples) -> float:
    """Share of the reads whose answer is the likeliest token."""
    with torch.no_grad():
        logits = model(reads.tokens[:, :-1])[reads.row, reads.at]
    return float((logits.argmax(-1) == reads.answer).double().mean())


def best_match(window: Window) -> QKMatch:
    """That of the best head of layer 1 on even reads, over odd ones."""
    model, shape, reads = window.run.model(window.end), window.run.config.model, window.reads
    even = torch.arange(len(reads)) % 2 == 0

    def of(head: str, chosen: torch.Tensor) -> QKMatch:
        masks = ReadMasks.of(reads.select(chosen))
        return QKMatch(head, masks, layers=shape.layers, rank=window.rank, basis=model)

    names = [f"L1H{head}" for head in range(shape.heads)]
    values = [mean(of(name, even), model) for name in names]
    return of(names[int(np.argmax(values))], ~even)


@torch.no_grad()
def mean(match: QKMatch, model: HookedTransformer) -> float:
    """Over its reads."""
    return float(evaluate_scalar(match, model).mean())


def trained(window: Window, edit: Edit, match: QKMatch) -> Course:
    """From the window's start on, looked at every few steps."""
    run = window.run
    config = run.otherwise(edit, window.last)
    state = replace(run.state(edit.start), config=config)
    run.prepare()
    session = TrainingSession(run.setup.with_config(config), state=state)
    formed, value, late = None, 0.0, window.late
    while session.step < window.last:
        session.advance()
        if session.step == window.end:
            value = mean(match, session.model)
        looked = session.step % EVERY == 0 and formed is None
        if looked and right(session.model, late) >= FORMED:
            formed = session.step
    return Course(value, formed)


def print_tables(answers: Sequence[Answer]) -> None:
    """Means over seeds."""
    print("| predicted token | what it did to the match |\n|---|---|")
    for name in answers[0].told["credit"]:
        units = [answer.told["credit"].get(name, 0.0) for answer in answers]
        print(f"| {name} | {interval(units, '.2f')} |")
    closure = max(answer.told["closure"] for answer in answers)
    own = [answer.change(AS_IT_WAS) for answer in answers]
    print(f"\nThe match changes by {interval(own, '.2f')}; closure at most {closure:.1e}\n")
    print("| removed in the window | change of the match | lag 2 later by steps |")
    print("|---|---|---|")
    counts = f"{min(a.removed for a in answers)} to {max(a.removed for a in answers)} reads"
    print(f"| {TOP}, {counts} | {cells(answers, [[TOP]] * len(answers))} |")
    drawn = [answer.random() for answer in answers]
    print(f"| as many random ones, {min(map(len, drawn))} times | {cells(answers, drawn)} |\n")
    for answer, names in zip(answers, drawn, strict=True):
        lower = sum(answer.change(TOP) < answer.change(name) for name in names)
        own_change = answer.change(AS_IT_WAS)
        print(
            f"- {answer.path.stem}: {answer.change(TOP):.2f} of {own_change:.2f} without them, less"
            f" than in {lower} of {len(names)} without random ones"
        )
    print(
        "\n| the window's optimizer | change of the match | lag 2 later by steps |\n|---|---|---|"
    )
    for name in [AS_IT_WAS, *OPTIMIZERS]:
        print(f"| {name} | {cells(answers, [[name]] * len(answers))} |")


def cells(answers: Sequence[Answer], names: Sequence[Sequence[str]]) -> str:
    """Change of the match and delay, each the mean over an answer's trainings of some names."""
    pairs = list(zip(answers, names, strict=True))
    change = interval([float(np.mean([a.change(n) for n in ns])) for a, ns in pairs], ".2f")
    if any(answer.courses[AS_IT_WAS].formed is None for answer in answers):
        return f"{change} | not in the window"
    delays = [float(np.mean([a.delay(n) for n in ns])) for a, ns in pairs]
    return f"{change} | {interval(delays, '.0f')}"


if __name__ == "__main__":
    main()
