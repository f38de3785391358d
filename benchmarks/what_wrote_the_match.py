"""Which reads wrote a head's match, and would it have formed without them? The quickstart by seed.

    python benchmarks/what_wrote_the_match.py FOLDER [FIRST:LAST]    # seeds 1:5, six minutes each

What a seed gave stays in FOLDER; another start does what is missing, and one of several processes
may do some of the seeds.

Fixed before the runs: the window is the 100 steps up to the first evaluation (every 10 steps) at
which 60 % of the validation reads of lag 2 are right; the head is the one of layer 1 with the
largest match (rank 8, basis of the window's end) at the window's end on even reads of the
validation split, and its match is measured on odd ones.

The first table divides what the window did to the match among the predicted tokens
(`circuit trace data --by position`). The second trains on, to 100 steps behind the window, without
the tenth of the lag-2 reads with the most credit, and without as many random ones, 20 times. The
third takes the window from the same state with another optimizer. Changes are shares of the
match's change over the window in the run; means over seeds with 95 % bootstrap intervals.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from circuit.reading import read_json
from circuit.reports.data_facts import by_fact
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.qk_match import QKMatch, ReadMasks
from circuit.tasks.benchmark import write_benchmark
from circuit.tasks.examples import Examples
from circuit.trace.replay import ReplayedRun
from circuit.trace.while_training import DEFAULT_FOLDER, TraceRecorder
from circuit.train_config import TrainConfig
from circuit.training.loop import train
from circuit.training.session import TrainingSession

EVERY, LENGTH, BEHIND = 10, 100, 100
FORMED, LAG, RANK = 0.6, 2, 8
RANDOM, SHARE = 20, 0.1
OPTIMIZERS: dict[str, dict[str, dict[str, float]]] = {
    "AdamW, as it was": {},
    "without history": {"terms": {"adam_historical_momentum": 0.0}},
    "against the gradient, at Adam's norm": {"direction": {"gradient": 1.0}},
    "against the momentum, at Adam's norm": {"direction": {"momentum": 1.0}},
    "without decay": {"terms": {"weight_decay": 0.0}},
}


class Course(NamedTuple):
    """A training from the window's start on.

    Attributes:
        match: at the window's end.
        formed: first evaluated step with lag 2 right; None: not until the end.
    """

    match: float
    formed: int | None


class Seed(NamedTuple):
    """What is measured of one; shares of the match's change over the window."""

    lags: dict[str, float]
    closure: float
    top: Course
    random: list[Course]
    optimizers: dict[str, Course]
    run: Course
    change: float
    removed: int

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Seed:
        """As it was written."""
        courses = {
            "top": Course(*told["top"]),
            "run": Course(*told["run"]),
            "random": [Course(*one) for one in told["random"]],
            "optimizers": {name: Course(*one) for name, one in told["optimizers"].items()},
        }
        return cls(**{**told, **courses})


def main(folder: Path, first: int, last: int) -> None:
    """Print the tables as Markdown."""
    benchmark, config = quickstart_configs("symbolic_kv")
    data = folder / "data"
    if not (data / "metadata.json").exists():
        write_benchmark(benchmark.model_copy(update={"output_dir": str(data)}))
    every = []
    for seed in range(first, last + 1):
        path = folder / f"seed_{seed}.json"
        if not path.exists():
            out = folder / f"seed_{seed}"
            chosen = config.replace(seed=seed, output_dir=str(out), benchmark_dir=str(data))
            told = studied(chosen.replace(eval_every=EVERY))
            atomic_write_text(path, dump_json(told))
        every.append(read_json(path))
    formed = [Seed.read(told) for told in every if told is not None]
    print(f"{len(formed)} of {len(every)} seeds have lag {LAG} within {config.steps} steps\n")
    print_tables(formed)


def studied(config: TrainConfig) -> dict[str, Any] | None:
    """Train one seed, and ask; None: lag 2 is not learned, or later than a window can be."""
    train(config, overwrite=True, recorder=TraceRecorder())
    run = circuit.open_run(Path(config.output_dir) / DEFAULT_FOLDER)
    assert isinstance(run, ReplayedRun)
    reads = run.setup.split("validation_iid").batch()
    late = reads.facts["lag"] == LAG
    course_of_run = accuracies(run, reads.select(late))
    formed = next((step for step, share in course_of_run if share >= FORMED), None)
    if formed is None or formed < LENGTH:
        return None
    start = formed - LENGTH
    match = best_match(run, reads, formed)
    attributor = attributor_of(run, [match], averages=True)
    passed = CreditPass(run, attributor, start, formed, "position")
    lags: dict[str, float] = defaultdict(float)
    tokens: dict[str, float] = defaultdict(float)  # credit of each lag-2 read
    for step in passed:
        examples = step.objective.examples()
        assert isinstance(examples, Examples)
        facts = by_fact(step.credit, examples)
        for kind, share in facts["predicted"].items():
            lags[kind] += float(share)
        for lag, share in facts["lag"].items():
            lags[f"answer, lag {lag}"] += float(share)
        for read in (examples.facts["lag"] == LAG).nonzero().flatten().tolist():
            row, at = int(examples.row[read]), int(examples.at[read])
            tokens[f"{examples.sample_ids[row]}@{at}"] += float(step.credit[0, row, at])
    change = float(passed.totals.actual)
    end = min(formed + BEHIND, config.steps)

    def course(**parts: dict[str, float]) -> Course:
        return trained(run, Edit(start, formed, **parts), end, match, reads.select(late))

    def without(reads: list[str]) -> Course:
        return course(examples=dict.fromkeys(reads, 0.0))

    ranked = sorted(tokens, key=lambda token: -tokens[token])
    count = round(SHARE * len(ranked))
    random = np.random.default_rng(config.seed)
    told = Seed(
        lags={name: share / change for name, share in lags.items()},
        closure=float(passed.totals.closure),
        top=without(ranked[:count]),
        random=[
            course(
                examples=dict.fromkeys(random.choice(ranked, count, replace=False).tolist(), 0.0)
            )
            for _ in range(RANDOM)
        ],
        optimizers={name: course(**parts) for name, parts in OPTIMIZERS.items()},
        run=course(),
        change=change,
        removed=count,
    )
    return told._asdict()


def accuracies(run: ReplayedRun, reads: Examples) -> Iterator[tuple[int, float]]:
    """Of reads, every few steps of the run."""
    for step in range(0, run.config.steps + 1, EVERY):
        yield step, right(run.model(step), reads)


def right(model: torch.nn.Module, reads: Examples) -> float:
    """Share of the reads whose answer is the likeliest token."""
    with torch.no_grad():
        logits = model(reads.tokens[:, :-1])[reads.row, reads.at]
    return float((logits.argmax(-1) == reads.answer).double().mean())


def best_match(run: ReplayedRun, reads: Examples, step: int) -> QKMatch:
    """That of the best head of layer 1 on even reads, over odd ones."""
    model = run.model(step)
    layers = run.config.model.layers
    even = torch.arange(len(reads)) % 2 == 0

    def of(head: str, chosen: torch.Tensor) -> QKMatch:
        masks = ReadMasks.of(reads.select(chosen))
        return QKMatch(head, masks, layers=layers, rank=RANK, basis=model)

    names = [f"L1H{head}" for head in range(run.config.model.heads)]
    values = [mean(of(name, even), model) for name in names]
    return of(names[int(np.argmax(values))], ~even)


@torch.no_grad()
def mean(match: QKMatch, model: HookedTransformer) -> float:
    """Over its reads."""
    return float(evaluate_scalar(match, model).mean())


def trained(run: ReplayedRun, edit: Edit, end: int, match: QKMatch, reads: Examples) -> Course:
    """From the edit's start to `end`, looked at every few steps."""
    config = run.otherwise(edit, end)
    state = replace(run.state(edit.start), config=config)
    run.prepare()
    session = TrainingSession(run.setup.with_config(config), state=state)
    formed, value = None, 0.0
    while session.step < end:
        session.advance()
        if session.step == edit.end:
            value = mean(match, session.model)
        looked = session.step % EVERY == 0 and formed is None
        if looked and right(session.model, reads) >= FORMED:
            formed = session.step
    return Course(value, formed)


def print_tables(seeds: Sequence[Seed]) -> None:
    """Means over seeds."""
    print("| predicted token | share of the match's change |\n|---|---|")
    for name in seeds[0].lags:
        print(f"| {name} | {interval([seed.lags.get(name, 0.0) for seed in seeds], '.1%')} |")
    print(f"\nclosure: at most {max(seed.closure for seed in seeds):.1e}\n")
    print("| removed in the window | match lost | lag 2 later by steps | seeds beyond all random |")
    print("|---|---|---|---:|")
    top = [lost(seed, seed.top) for seed in seeds]
    random = [[lost(seed, one) for one in seed.random] for seed in seeds]
    beyond = sum(one > max(them) for one, them in zip(top, random, strict=True))
    counts = f"{min(seed.removed for seed in seeds)} to {max(seed.removed for seed in seeds)}"
    later = [delay(seed, seed.top) for seed in seeds]
    cells = [f"most credit, {counts} reads", interval(top, ".1%"), interval(later, ".0f")]
    print(f"| {' | '.join(cells)} | {beyond} of {len(seeds)} |")
    means = [float(np.mean(them)) for them in random]
    later = [float(np.mean([delay(seed, one) for one in seed.random])) for seed in seeds]
    cells = [f"as many random ones, {RANDOM} times", interval(means, ".1%"), interval(later, ".0f")]
    print(f"| {' | '.join(cells)} | |\n")
    print("| the window's optimizer | change of the match | lag 2 later by steps |\n|---|---|---|")
    for name in OPTIMIZERS:
        courses = [(seed, seed.optimizers[name]) for seed in seeds]
        changed = interval([1 - lost(*one) for one in courses], ".1%")
        print(f"| {name} | {changed} | {interval([delay(*one) for one in courses], '.0f')} |")


def lost(seed: Seed, course: Course) -> float:
    """Of the match's change over the window."""
    return (seed.run.match - course.match) / seed.change


def delay(seed: Seed, course: Course) -> float:
    """Steps after the run's own; at least those that were trained."""
    assert seed.run.formed is not None
    return float((course.formed or seed.run.formed + BEHIND) - seed.run.formed)


if __name__ == "__main__":
    begin, _, end = (sys.argv[2] if len(sys.argv) > 2 else "1:5").partition(":")
    main(Path(sys.argv[1]), int(begin), int(end))
