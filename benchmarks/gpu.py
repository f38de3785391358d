"""Everything that is promised of a GPU, done on one, beside the CPU: one table.

    python benchmarks/gpu.py [--device cuda|cpu] [--steps N] [--tiny]

The reference recipe on its benchmark, which is generated in a temporary folder: trained with a
trace, executed again and verified in fresh processes, a step checked out, a head attributed. The
device is `--device`, else CIRCUIT_DEVICE, else cuda. Meant for ten minutes; `--tiny` is
a smaller model, and shows that the script works. Exit code 1 if a law does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from circuit.attribution.series import Series
from circuit.attribution.window import attributor_of
from circuit.config import load_config, parse_config
from circuit.core.state import FlatState
from circuit.environment import CUBLAS_WORKSPACE, prepare_process
from circuit.reports.inputs import traced_inputs
from circuit.scalars.qk_match import QKMatches
from circuit.tasks.benchmark import load_benchmark, write_benchmark
from circuit.tasks.probes import write_probe_set
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.trace.record import RecordOptions
from circuit.trace.replay import ReplayedRun
from circuit.trace.store import ROWS
from circuit.trace.while_training import TraceRecorder
from circuit.train_config import Kernels, TrainConfig
from circuit.training.loop import train
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

CONFIGS = Path(__file__).parent.parent / "configs"
HEAD = "L1H1"
Run = Callable[[Sequence[str]], str]
"""Types `circuit ...` in another process; what it printed."""


@dataclass(frozen=True)
class Figure:
    """One cell of the table.

    Attributes:
        text: what is shown.
        holds: whether the law holds; None is a figure without one.
    """

    text: str
    holds: bool | None = None


Column = dict[str, Figure]


def prepare(folder: Path, *, tiny: bool, steps: int) -> TrainConfig:
    """Generate the benchmark and a probe set; the recipe that trains on them."""
    payload = json.loads((CONFIGS / "benchmark/symbolic_kv_base.json").read_text("utf-8"))
    payload |= {"output_dir": str(folder / "data")}
    names = ("train", "validation_iid", "heldout_pairs")
    payload["splits"] = {name: payload["splits"][name] for name in names}
    if tiny:
        for split in payload["splits"].values():
            split["samples"] = 32
    write_benchmark(parse_config(payload, BenchmarkConfig, where="benchmark"))
    write_probe_set(folder / "data", folder / "probe_set.jsonl", ["validation_iid"], 11)
    config = load_config(CONFIGS / "train/symbolic_kv_formation.json", TrainConfig)
    changes: dict[str, Any] = {"benchmark_dir": str(folder / "data"), "steps": steps}
    changes |= {"checkpoint_every": steps // 2}
    changes |= {"schedule": {"name": "constant", "warmup_steps": steps // 4}}
    if tiny:
        shape = {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32}
        changes |= {"model": {**config.model.model_dump(), **shape}, "batch_size": 8}
    return config.replace(**changes)


def measure(config: TrainConfig, folder: Path, run: Run) -> tuple[Column, ReplayedRun]:
    """Train, trace, execute again, verify, check out and attribute on the config's device."""
    config = config.replace(output_dir=str(folder / config.device))
    prepare_process(threads=config.threads, device=config.device)
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    root = Path(config.output_dir)
    options = RecordOptions(anchor_every=config.steps // 4)
    rates = _rates(config)  # before `train` is timed, so that every import and kernel is warm
    began = time.perf_counter()
    train(config, recorder=TraceRecorder(root / "trace", options))
    seconds = time.perf_counter() - began
    trace = ReplayedRun.open(root / "trace")
    column = _facts(trace) | rates
    column["steps a second, traced, evaluations included"] = Figure(f"{config.steps / seconds:.1f}")
    column |= _again(config, trace, options, run)
    column |= _checkout(trace)
    column |= _attribution(trace, folder / "probe_set.jsonl")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if config.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e6
    column["peak memory, MB (CPU: of the process)"] = Figure(f"{peak:.0f}")
    return column, trace


def _facts(trace: ReplayedRun) -> Column:
    """The facts that decide bits, as the trace has recorded them."""
    facts, on_gpu = trace.manifest.environment, trace.manifest.config.device == "cuda"
    workspace = facts["variables"].get(CUBLAS_WORKSPACE, "")
    deterministic = facts["deterministic"]
    return {
        "device": Figure(facts["device_name"], bool(facts["device_name"])),
        f"{CUBLAS_WORKSPACE}, recorded": Figure(workspace or "none", bool(workspace) or not on_gpu),
        "deterministic algorithms, recorded": Figure(str(deterministic), deterministic),
        "threads": Figure(str(facts["threads"])),
    }


def _rates(config: TrainConfig) -> Column:
    """Steps a second without a trace, by kernels; the two take turns."""
    benchmark = load_benchmark(config.benchmark_dir)
    kinds = get_args(Kernels)
    sessions = [
        TrainingSession(Setup(config.replace(kernels=kind), benchmark=benchmark)) for kind in kinds
    ]
    seconds: list[list[float]] = [[] for _ in kinds]
    for _ in range(min(20, config.steps)):
        for session, times in zip(sessions, seconds, strict=True):
            began = time.perf_counter()
            session.advance()  # it reads the loss, for which the device has to be done
            times.append(time.perf_counter() - began)
    return {
        f"steps a second, {kind} kernels": Figure(f"{1 / statistics.median(times):.1f}")
        for kind, times in zip(kinds, seconds, strict=True)
    }


def _again(config: TrainConfig, trace: ReplayedRun, options: RecordOptions, run: Run) -> Column:
    """A second execution and a verification, each in a process of its own."""
    root = Path(config.output_dir)
    words: tuple[str, ...] = ("--config", str(root / "run_config.json"), "--from-initialization")
    words += ("--end-step", str(config.steps), "--anchor-every", str(options.anchor_every))
    words += ("--require-historical-replay", "--output-dir", str(root / "again"), "--json")
    again = json.loads(run(("optimizer-update-trace", *words)))
    rows = (root / "again" / ROWS).read_bytes() == (trace.path / ROWS).read_bytes()
    verified = json.loads(run(("trace", "verify", str(trace.path), "--json")))
    return {
        "executed again, required to be the run": Figure(again["law"], "0 bits" in again["law"]),
        "rows of both executions": Figure("equal bytes" if rows else "DIFFER", rows),
        "verified": Figure(verified["law"], verified["equal"]),
    }


def _checkout(trace: ReplayedRun) -> Column:
    """A random step between two anchors, against its row."""
    anchors, steps = trace.manifest.anchors(), range(1, trace.store.last_step)
    step = random.Random(0).choice([step for step in steps if step not in anchors])
    began = time.perf_counter()
    stages = FlatState.of(trace.state(step)).stages()
    seconds = time.perf_counter() - began
    equal = stages == trace.store.state_digests(step)
    text = f"step {step}, {'0 bits differ' if equal else 'DIFFERS'}"
    return {"checked out": Figure(text, equal), "seconds of it": Figure(f"{seconds:.2f}")}


def _attribution(trace: ReplayedRun, probe_set: Path) -> Column:
    """One head's QK match over the last steps: do the contributions add up?"""
    config, end = trace.manifest.config, trace.store.last_step
    start = end - config.steps // 4
    matches = QKMatches(heads=(HEAD,), ranks=(4,), min_pairs_per_type=4)
    attributor = attributor_of(trace, matches.build(traced_inputs(config, probe_set, trace)))
    rows, seconds = [], []
    steps = trace.replay(start, end)
    for _ in range(start, end):
        began = time.perf_counter()
        rows += attributor.step(next(steps)).rows(("circuit",))
        seconds.append(time.perf_counter() - began)
    closures = [series.closure() for series in Series.collect(rows).values()]
    path = max(closure.path_absolute or 0.0 for closure in closures)
    first = max(closure.first_order_absolute or 0.0 for closure in closures)
    text = f"{path:.1e} (first order {first:.1e})"
    return {
        f"closure error of {HEAD}, steps {start}:{end}": Figure(text, path <= max(first, 1e-2)),
        "steps a second, replayed and attributed": Figure(f"{1 / statistics.median(seconds):.1f}"),
    }


def compare(one: ReplayedRun, other: ReplayedRun) -> Column:
    """What two devices must share: initial weights and batches; and how near their losses are."""
    ours, theirs = one.store.read_rows(), other.store.read_rows()
    pairs = list(zip(ours, theirs, strict=True))
    start = one.manifest.start_digests["parameters"] == other.manifest.start_digests["parameters"]
    batches = all(a["digests"]["batch"] == b["digests"]["batch"] for a, b in pairs)
    apart = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs]
    return {
        "initial weights as on the CPU": Figure("equal" if start else "DIFFER", start),
        "batches as on the CPU": Figure("equal" if batches else "DIFFER", batches),
        "loss of step 1 beside the CPU's": Figure(f"{apart[0]:.1e} apart", apart[0] < 1e-4),
        "loss of the last step": Figure(f"{apart[-1]:.1e} apart"),
    }


def in_a_fresh_process(words: Sequence[str]) -> str:
    """Run `circuit ...`; its stdout, whatever its exit code."""
    command = [sys.executable, "-m", "circuit.cli", *words]
    environment = {k: v for k, v in os.environ.items() if k != "CIRCUIT_DEVICE"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if not done.stdout:
        raise SystemExit(f"`circuit {' '.join(words)}` ended with {done.returncode}")
    return done.stdout


def table(device: str, *, tiny: bool, steps: int, run: Run = in_a_fresh_process) -> list[Column]:
    """The columns of the device and of the CPU."""
    with tempfile.TemporaryDirectory() as name:
        config = prepare(Path(name), tiny=tiny, steps=steps)
        places = list(dict.fromkeys([device, "cpu"]))
        columns, traces = [], []
        for place in places:
            column, trace = measure(config.replace(device=place), Path(name), run)
            columns.append(column)
            traces.append(trace)
        columns[0] |= compare(traces[0], traces[-1])
        return columns


def main() -> None:
    """Measure, print the table, and say whether every law holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=os.environ.get("CIRCUIT_DEVICE") or "cuda")
    parser.add_argument("--steps", type=int, help="at least 8; default 100, tiny 8")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    steps = args.steps or (8 if args.tiny else 100)
    began = time.perf_counter()
    columns = table(args.device, tiny=args.tiny, steps=steps)
    heads = dict.fromkeys([args.device, "cpu"])
    print("| law or figure | " + " | ".join(heads) + " |")
    print("|---|" + "---|" * len(columns))
    for name in columns[0]:
        cells = [column.get(name, Figure("")) for column in columns]
        shown = (f"{'FAILS: ' if cell.holds is False else ''}{cell.text}" for cell in cells)
        print(f"| {name} | " + " | ".join(shown) + " |")
    failed = [name for column in columns for name, cell in column.items() if cell.holds is False]
    print(f"{steps} steps; {time.perf_counter() - began:.0f} s in all; {len(failed)} laws fail")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
