"""Whole-process time of commands, and what each imports; against another checkout if one is given.

python benchmarks/commands.py RUN [--against OTHER_PYTHON] [--runs 5] [--only refused]

RUN is the folder of a run with a probe set and a trace (`circuit quickstart` makes one). Each
command runs in a process of its own, in turn with the bare import of Typer, rich and pydantic and
the other interpreter's (I A B I A B ...); times are processor seconds of the whole process, medians
of the runs, ratios the medians of those within a turn.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTS = "import typer, rich, pydantic"
SMALLEST = f"""
{IMPORTS}
from pathlib import Path
class Config(pydantic.BaseModel):
    steps: int
app = typer.Typer()
@app.command()
def one(config: Path = typer.Option(Path("x")), steps: int = 3) -> None:
    raise typer.Exit(2)
@app.command()
def other() -> None:
    pass
app()
"""
"""Two commands, one of them with two options and a model, which refuses at once."""


def commands(run: Path, out: str) -> dict[str, list[str]]:
    """What is timed, by a short name; OUT is written anew by each."""
    probe, trace = run / "analysis/probe_set.jsonl", run / "analysis/optimizer_update_trace"
    config, to = ("--config", str(run)), ("--output-dir", out)
    steps = sorted((run / "checkpoints").glob("step_*.pt"))
    two = [w for p in (steps[len(steps) // 2], steps[-1]) for w in ("--checkpoint", str(p))]
    probes = ("--probe-set", str(probe))
    stage = ("--stage", "embedding")
    qk = ("trace", "qk", *config, *probes, "--optimizer-trace-dir", str(trace), *to)
    code = ("value-code-subspace-report", *config, *probes, *to, *two)
    lines = {
        "help": ("--help",),
        "trace show": ("trace", "show", str(trace)),
        "weight-svd-trace, 2 checkpoints": ("weight-svd-trace", *config, *two, *to),
        "refused: one run to compare": (
            "page",
            str(run),
            "--compare",
            "--output",
            f"{out}/page.html",
        ),
        "study compare-optimizers": ("study", "compare-optimizers", "--run", str(run), *to),
        "answer-scalar-residual-diagnosis": (
            *("answer-scalar-residual-diagnosis", *config, *probes, *two, *to),
        ),
        "refused: unknown command": ("trian",),
        "refused: unknown option": ("train", "--nowhere"),
        "refused: no such config": ("train", "--config", "nowhere.json"),
        "refused: no folder of a run": ("page", out),
        "refused: no folder of a trace": ("trace", "show", out),
        "refused: unknown field": ("train", *config, "--set", "nowhere=1"),
        "refused: field out of bounds": ("train", *config, "--set", "steps=0"),
        "refused: option out of bounds": (
            *("weight-svd-trace", *config, *two, *to, "--max-singular-values", "0"),
        ),
        "refused: no such probe set": (*code[:4], "nowhere.jsonl", *code[5:], *stage),
        "refused: unknown head": (*qk, "--head", "L9H9"),
        "refused: unknown stage": (*code, "--stage", "layer_9_post_mlp"),
        "refused: window outside": (*qk, "--head", "L0H0", "--end-step", "999999"),
        "refused: no such checkpoint": (*code[:-1], "nowhere/step_000001.pt", *stage),
    }
    return {name: list(words) for name, words in lines.items()}


def seconds(words: list[str], code: int = 0) -> float:
    """Processor seconds of a process and its children, which has to end with that code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != code:
        raise SystemExit(
            f"{' '.join(words)}: exit code {done.returncode}, not {code}\n{done.stderr}"
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def timed(python: str, name: str, run: Path) -> float:
    """Seconds of a command, which writes into a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = commands(run, f"{folder}/out")[name]
        code = 2 if name.startswith("refused") else 0
        return seconds([python, "-m", "circuit.cli", *words], code)


def main() -> None:
    """Time every command and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--against", help="another interpreter, with a circuit of its own")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="what begins with this")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # compiled modules are kept, as they usually are
    pythons = [sys.executable, *([asked.against] if asked.against else [])]
    smallest = [sys.executable, "-c", SMALLEST, "one"]
    names = [one for one in commands(asked.run, "out") if one.startswith(asked.only)]
    for name in ("refused by the smallest Typer program", *names):
        times = []
        for _ in range(asked.runs):
            floor = seconds([sys.executable, "-c", IMPORTS])
            if name in names:
                times.append((floor, *(timed(python, name, asked.run) for python in pythons)))
            else:
                times.append((floor, seconds(smallest, 2)))
        _, here, *other = (statistics.median(column) for column in zip(*times, strict=True))
        over = statistics.median(now / floor for floor, now, *_ in times)
        line = f"| {name} | {here:.2f} s | {over:.1f} |"
        if other:
            ratio = statistics.median(now / before for _, now, before in times)
            line += f" {other[0]:.2f} s | {ratio:.2f} |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
