"""Grokking over seeds: trained, measured, and attributed to the terms of AdamW phase by phase.

    python benchmarks/grokking_seeds.py FOLDER [--device cuda] [--workers 16] [--minutes 8]
    python benchmarks/grokking_seeds.py FOLDER --plans grokking_p59:0,1    # of these seeds alone
    python benchmarks/grokking_seeds.py FOLDER --pieces 0:200 4000:4100    # of these steps alone
    python benchmarks/grokking_tables.py FOLDER docs/data    # JSON of what lies in FOLDER

The runs are those of PLANS, each in a process of its own, with a full state every STRIDE steps. A
run ends SETTLE steps after the evaluation at which 99 % of its test sums are right, or at its
config's last step. Then come `modular-addition-progress-report` over its checkpoints, and the
attribution of every step, in pieces from one checkpoint to the next, in an order drawn once: where
time runs out, the pieces that are done lie evenly over the run. A piece executes the steps again
from its first state, and has to end in the run's next state, bit for bit.

A call on the same FOLDER goes on: a run from its last state, and with the pieces that are missing.

Attributed are the mean log-odds of the right answer over fixed test sums and over fixed training
sums, and with them their difference: what the model knows of sums because it has seen them.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from circuit.artifacts import atomic_write_text, dump_json, read_jsonl
from circuit.attribution.attribute import Attributor
from circuit.config import load_config
from circuit.environment import end_with_parent
from circuit.model.readout import LOGITS
from circuit.reading import read_json
from circuit.reports.modular_addition_progress import ModularAdditionProgress, ProgressOptions
from circuit.reports.report import run_report
from circuit.scalars.base import BoundScalar, Cache, Needs
from circuit.tasks.benchmark import write_benchmark
from circuit.tasks.modular_addition.task import TEST, TRAIN, ModularAdditionConfig
from circuit.trace.compare import state_difference
from circuit.trace.step import Tracer
from circuit.train_config import TrainConfig, load_run_config
from circuit.training.checkpoints import checkpoint_name, list_checkpoints, load_checkpoint
from circuit.training.loop import Progress, train
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformer_lens import HookedTransformer

    from circuit.tasks.examples import Examples

CONFIGS = Path(__file__).parent.parent / "configs"
REPORT = "modular_addition_progress"
STRIDE, EVALUATED, SETTLE = 100, 500, 2000
PROBED = 512
"""Sums of each split that are attributed."""
LEARNED = 0.99
"""Accuracy of the test sums from which on a run settles."""


@dataclass(frozen=True)
class Plan:
    """Runs of one recipe; the first plan is trained first, and attributed last."""

    config: str
    benchmark: str
    seeds: tuple[int, ...]
    attributed: bool = True


PLANS = (
    Plan("grokking_p113", "modular_addition_p113", (0, 1, 2)),
    Plan("grokking_p113_no_decay", "modular_addition_p113", (0,), attributed=False),
    Plan("grokking_p59", "modular_addition_p59", (0, 1, 2, 3, 4)),
)
TINY = Plan("modular_addition_small", "modular_addition_small", (0, 1))
"""A small task, which is done where it is asked for: does the script work?"""


@dataclass(frozen=True)
class Settings:
    """Of one call; every process has them."""

    folder: Path
    device: str
    rule: str
    steps: int | None
    stride: int
    deadline: float
    windows: Sequence[tuple[int, ...]] = ()
    """Whose pieces alone are attributed; all without any."""

    def asked(self, start: int, end: int) -> bool:
        """Whether a piece is one of those that are attributed."""
        within = (first <= start and end <= last for first, last in self.windows)
        return not self.windows or any(within)

    def late(self) -> bool:
        """Whether the time is up."""
        return time.time() > self.deadline

    def run(self, plan: Plan, seed: int) -> Path:
        """Where a run stands."""
        return self.folder / "runs" / f"{plan.config}_seed{seed}"

    def piece(self, plan: Plan, seed: int, start: int, end: int) -> Path:
        """Where the attribution of the steps from one checkpoint to another stands."""
        return self.run(plan, seed) / "pieces" / f"{start:06d}_{end:06d}.npz"

    def claim(self) -> None:
        """Refuse a folder of another device, rule, last step or stride; else say whose it is."""
        path = self.folder / "settings.json"
        told = {"device": self.device, "rule": self.rule}
        told |= {"steps": self.steps, "stride": self.stride}
        if path.exists() and (earlier := read_json(path)) != told:
            raise SystemExit(f"{path}: {earlier}, not {told}; pass the same, or another FOLDER")
        atomic_write_text(path, dump_json(told))


# --- what a process does --------------------------------------------------------------------------


def last_step(run: Path) -> int:
    """Of the saved states; 0 where there is none."""
    return max(list_checkpoints(run / "checkpoints"), default=0)


def settled(run: Path, steps: int, stride: int) -> int:
    """The step at which a run ends, as far as its evaluations tell."""
    metrics = run / "metrics.jsonl"
    rows = read_jsonl(metrics, tolerate_torn_tail=True) if metrics.exists() else ()
    of_test = (row for row in rows if row["kind"] == "evaluation" and row["split"] == TEST)
    learned = (row["step"] for row in of_test if row["answer_accuracy"] >= LEARNED)
    return min(steps, next(learned, steps) + SETTLE // STRIDE * stride)


def train_run(settings: Settings, plan: Plan, seed: int) -> int:
    """Train one run, or go on, until it has settled or the time is up; its last step."""
    run = settings.run(plan, seed)
    config = load_config(CONFIGS / f"train/{plan.config}.json", TrainConfig)
    every = max(settings.stride, EVALUATED // STRIDE * settings.stride)
    config = config.replace(
        seed=seed,
        device=settings.device,
        output_dir=str(run),
        benchmark_dir=str(settings.folder / "data" / plan.benchmark),
        steps=settings.steps or config.steps,
        log_every=every,
        eval_every=every,
        checkpoint_every=settings.stride,
        tracked_splits=[TRAIN, TEST],
    )
    seen = {"step": last_step(run), "end": settled(run, config.steps, settings.stride)}
    if seen["step"] >= seen["end"] or settings.late():
        return seen["step"]

    def look(at: Progress) -> None:
        seen["step"] = at.step
        one = at.evaluation
        if one is not None and one.split == TEST and one.answer_accuracy >= LEARNED:
            settle = SETTLE // STRIDE * settings.stride
            seen["end"] = min(seen["end"], at.step + settle)

    began = time.process_time()
    result = train(
        config,
        resume=True,
        progress=look,
        stop=lambda: seen["step"] >= seen["end"] or settings.late(),
    )
    spent = {"seconds": result.seconds, "processor_seconds": time.process_time() - began}
    told = run / "spent.json"
    earlier = read_json(told) if told.exists() else {}
    spent = {name: value + earlier.get(name, 0.0) for name, value in spent.items()}
    atomic_write_text(told, dump_json({"step": result.step, **spent}))
    return result.step


def report_run(settings: Settings, plan: Plan, seed: int) -> None:
    """The progress of one run at all of its checkpoints, if that is yet to do."""
    run = settings.run(plan, seed)
    report = run / REPORT / f"{REPORT}_report.json"
    if report.exists():
        digests = read_json(report)["provenance"]["parameters_sha256"]
        if str(last_step(run)) in digests:
            return
    options = ProgressOptions(checkpoint_dir=run / "checkpoints")
    config = load_run_config(run)
    config = config.replace(benchmark_dir=str(settings.folder / "data" / plan.benchmark))
    run_report(ModularAdditionProgress, config, options, run / REPORT, overwrite=True)


class LogOdds:
    """`logit of the answer - logsumexp of the other numbers' logits`, a value a sum, float64.

    It is smooth, telescopes, and lies within log(p - 1) below the margin to the best wrong answer.
    """

    constant = True

    def __init__(self, name: str, sums: Examples, device: str) -> None:
        self.name = name
        prompts = (row[: at + 1] for row, at in zip(sums.sequences(), sums.at, strict=True))
        self.needs = Needs(tuple(prompts), (LOGITS,))
        choices = torch.arange(len(sums.task.choices))
        self._right = (sums.answer[:, None] == choices).to(device)  # [example, number]

    def bind(self, model: HookedTransformer) -> LogOdds:
        """Nothing depends on the step."""
        return self

    def values(self, model: HookedTransformer, cache: Cache) -> Float[Tensor, " example"]:
        """The log-odds of each sum."""
        logits = cache[LOGITS][:, -1, : self._right.shape[1]].double()
        right = (logits * self._right).sum(-1)  # a gather's gradient is slower on a GPU
        return right - logits.masked_fill(self._right, -math.inf).logsumexp(-1)


def probed(size: int) -> list[int]:
    """Which sums of a split of some size are attributed."""
    return random.Random(0).sample(range(size), min(PROBED, size))


class CapturedAttributor(Attributor):
    """Of scalars that are constant, on a GPU: a node is one CUDA graph, not a thousand launches.

    The kernels are those of `Attributor`, and so are the bits.
    """

    _graph: torch.cuda.CUDAGraph | None = None

    def evaluate(
        self, theta: Tensor, bound: Sequence[BoundScalar], chosen: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        if self._graph is None:
            self._theta = theta.to(self.model.W_E.device)
            stream = torch.cuda.Stream()  # capture asks for a stream of its own, and warm kernels
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run(bound)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._means, self._gradients = self._run(bound)
            self._graph = graph
        self._theta.copy_(theta)
        self._graph.replay()
        return self._means.double().cpu(), self._gradients.cpu()

    def _run(self, bound: Sequence[BoundScalar]) -> tuple[Tensor, Tensor]:
        self._load(self._theta)
        means = self.batch.means(self.model, bound)
        gradients = []
        for mean in means:
            parts = torch.autograd.grad(mean, self._parameters, retain_graph=True)
            gradients.append(torch.cat([part.reshape(-1) for part in parts]))
        return torch.stack(means).detach(), torch.stack(gradients)


@cache
def opened(run: Path, rule: str) -> tuple[Setup, Attributor]:
    """A run's setup, and the attributor of its two scalars; once a process."""
    setup = Setup(load_run_config(run))
    setup.prepare()
    scalars = []
    for name in (TEST, TRAIN):
        split = setup.split(name)
        scalars.append(LogOdds(name, split.batch(probed(len(split))), setup.config.device))
    kind = CapturedAttributor if setup.config.device == "cuda" else Attributor
    return setup, kind(setup.initial_model(), scalars, rule=rule)


def attribute_piece(settings: Settings, plan: Plan, seed: int, start: int, end: int) -> bool:
    """Attribute the steps from one checkpoint to another; False if the time was up before."""
    run = settings.run(plan, seed)
    if settings.late():
        return False
    setup, attributor = opened(run, settings.rule)
    states = run / "checkpoints"
    state = load_checkpoint(states / checkpoint_name(start)) if start else None
    tracer = Tracer(TrainingSession(setup, state=state))
    rows, by_atom = [], 0.0
    for _ in range(start, end):
        one = attributor.step(tracer.advance())
        by_atom = by_atom + one.path
        rows.append((one.before, one.after, one.first_order.sum(-1), one.path.sum(-1), one.nodes))
        if settings.late():
            return False
    reached = load_checkpoint(states / checkpoint_name(end))
    differs = state_difference(reached, tracer.train_state())
    columns = [
        np.stack([np.asarray(value) for value in column]) for column in zip(*rows, strict=True)
    ]
    arrays = dict(zip(("before", "after", "first_order", "path", "nodes"), columns, strict=True))
    path = settings.piece(plan, seed, start, end)
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".part").open("wb") as file:
        np.savez_compressed(
            file,
            **arrays,
            by_atom=np.asarray(by_atom),
            terms=np.array(one.terms),
            groups=np.array([atom.group("component") for atom in one.atom_list]),
            differs=np.array("" if differs is None else str(differs)),
        )
    path.with_suffix(".part").rename(path)
    return True


# --- who does what when ---------------------------------------------------------------------------

Job = tuple[Callable[..., Any], Plan, tuple[Any, ...]]


class Queue:
    """Jobs by worth, as many at a time as there are workers."""

    def __init__(self, settings: Settings, workers: int) -> None:
        self.settings, self.workers = settings, workers
        self._waiting: list[tuple[tuple[int, ...], int, Job]] = []
        self._numbers = itertools.count()

    def add(self, worth: tuple[int, ...], work: Callable[..., Any], plan: Plan, *more: Any) -> None:
        """A job; those of the least `worth` are done first, then those that came first."""
        heapq.heappush(self._waiting, (worth, next(self._numbers), (work, plan, more)))

    def run(self, done: Callable[[Job, Any], None]) -> None:
        """Do all, those too that `done` adds; it is told each job and its result."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["circuit.model.build", "circuit.training.step"])  # seconds
        running: dict[Future[Any], Job] = {}
        with ProcessPoolExecutor(self.workers, context, end_with_parent) as pool:
            while self._waiting or running:
                while self._waiting and len(running) < self.workers:
                    job = heapq.heappop(self._waiting)[2]
                    work, plan, more = job
                    running[pool.submit(work, self.settings, plan, *more)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done(running.pop(future), future.result())


def pieces(last: int, stride: int) -> list[tuple[int, int]]:
    """From one checkpoint to the next, in an order drawn once."""
    cuts = [*range(0, last, stride), last]
    return random.Random(0).sample(list(itertools.pairwise(cuts)), len(cuts) - 1)


def measure(settings: Settings, plans: Sequence[Plan], workers: int) -> None:
    """Train, report and attribute what is yet to do, and say when each was done."""
    began = time.time()
    settings.claim()
    for name in {plan.benchmark for plan in plans}:
        config = load_config(CONFIGS / f"benchmark/{name}.json", ModularAdditionConfig)
        config = config.model_copy(update={"output_dir": str(settings.folder / "data" / name)})
        write_benchmark(config, overwrite=True)
    queue = Queue(settings, workers)
    for plan in plans:
        for seed in plan.seeds:
            queue.add((0,), train_run, plan, seed)
    counts: Counter[str] = Counter()

    def done(job: Job, result: Any) -> None:
        work, plan, (seed, *_) = job
        if work is attribute_piece:
            counts["done" if result else "late"] += 1
            return
        print(f"{time.time() - began:6.0f} s  {work.__name__} {plan.config} {seed}: {result}")
        if work is train_run:
            queue.add((1,), report_run, plan, seed)
            first = 2 + len(plans) - plans.index(plan)
            cuts = pieces(result, settings.stride) if plan.attributed else ()
            for rank, piece in enumerate(cuts):
                if not settings.asked(*piece):
                    continue
                if settings.piece(plan, seed, *piece).exists():
                    counts["earlier"] += 1
                else:
                    queue.add((first, rank), attribute_piece, plan, seed, *piece)

    queue.run(done)
    print(
        f"{time.time() - began:6.0f} s  {counts['done']} pieces, {counts['late']} not in time,"
        f" {counts['earlier']} done before"
    )


def planned(words: Sequence[str]) -> list[Plan]:
    """Plans by the names of their configs, each with its seeds or with others: `NAME:0,1`.

    Raises:
        ValueError: there is no such plan, a seed is no number, or a run is named twice.
    """
    known = {plan.config: plan for plan in (*PLANS, TINY)}
    plans = []
    for name, colon, seeds in (word.partition(":") for word in words):
        if name not in known:
            raise ValueError(f"no plan '{name}': one of {', '.join(known)}")
        plan = known[name]
        plans.append(replace(plan, seeds=tuple(map(int, seeds.split(",")))) if colon else plan)
    runs = Counter((plan.config, seed) for plan in plans for seed in plan.seeds)
    if max(runs.values(), default=0) > 1:
        raise ValueError(f"a run is named twice: {' '.join(words)}")
    return plans


def main() -> None:
    """Train, report and attribute."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default=os.environ.get("CIRCUIT_DEVICE") or "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="until no step is begun")
    parser.add_argument("--rule", default="auto:1e-2")
    parser.add_argument("--pieces", nargs="+", metavar="START:END", default=())
    parser.add_argument("--plans", nargs="+", metavar="NAME[:SEED,...]", help="all, by default")
    parser.add_argument("--steps", type=int, help="in place of the config's")
    parser.add_argument("--stride", type=int, default=STRIDE, help="steps between checkpoints")
    args = parser.parse_args()
    try:
        plans = planned(args.plans or [plan.config for plan in PLANS])
    except ValueError as error:
        parser.error(f"argument --plans: {error}")
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # of the processes to come
    deadline = time.time() + 60 * args.minutes
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    windows = [tuple(map(int, window.split(":"))) for window in args.pieces]
    settings = Settings(folder, args.device, args.rule, args.steps, args.stride, deadline, windows)
    measure(settings, plans, args.workers)


if __name__ == "__main__":
    main()
