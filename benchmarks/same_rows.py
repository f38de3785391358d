"""Whether two checkouts compute the same numbers: all that both write, compared to the last bit.

python benchmarks/same_rows.py --against PYTHON [--keep FOLDER] [--reference RUN] [--skip smoke]

Each interpreter runs its own `circuit`, with its own configs, in folders of its own: the study at
scale `smoke`, the quickstart, and one report of each kind on the quickstart's run (or on RUN, a run
with a probe set and a trace). Row files, CSVs, figures and pages are compared byte for byte,
checkpoints by their tensors' digests, other JSON key by key, without its clocks.

What the other interpreter makes stays in FOLDER and is taken from there the next time; what this
one makes is left where it is if anything differs. Exit code 1: a row file, a CSV or a checkpoint
differs, or is there on one side only.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from string import Template
from typing import Any

from circuit.core.digests import tensors_digest
from circuit.errors import CircuitError
from circuit.training.checkpoints import checkpoint_step, load_checkpoint

SMOKE = "reproduce paper --scale smoke --cores 1"
PARTS = {"smoke": SMOKE, "quickstart": "quickstart", "reports": ""}
QUICKSTART = Path("../quickstart/artifacts/runs/quickstart")
IDENTITY = """
import hashlib, json, pathlib, torch, circuit, circuit.cli, circuit.configs
roots = [next(iter(package.__path__)) for package in (circuit, circuit.cli, circuit.configs)]
files = sorted(p for r in roots for p in pathlib.Path(r).rglob("*") if p.is_file())
digests = [hashlib.sha256(p.read_bytes()).digest() for p in files if p.suffix != ".pyc"]
print(json.dumps({"code": hashlib.sha256(b"".join(digests)).hexdigest(),
    "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}))
"""
"""What decides an interpreter's outputs, besides the commands."""

PROBED = "--config $run --probe-set $run/analysis/probe_set.jsonl"
FEW = f"{PROBED} $checkpoints --max-records 96"
FEW_PAIRS = "--max-pairs-per-type 16 --min-pairs-per-type 4"
PAIRS = f"{PROBED} $checkpoints {FEW_PAIRS}"
ANSWERS = "--scalar-pair-rows answers/answer_scalar_residual_diagnosis_pair_rows.jsonl"
WINDOW = f"{PROBED} --optimizer-trace-dir $trace --start-step $start --end-step $end"
BOTH = "--partition layer --partition circuit --loss-scope answer"
THROUGH = "--source-component $head --component $mlp"
ROUTE = "--route position_role=prediction,label"
QUERY = "subspace=head_qk_query,rank=4,head_layer=0,head=1"
REMOVED = "--subspace head_ov_output --head $head --operation remove --rank 2 --rank 8"
REPORTS = f"""
evaluate --config $run --checkpoint $last --output evaluation.json
trace verify $trace --steps $start:$end
trace checkout $trace --step $end --output checked_out.pt
weight-svd-trace --config $run $checkpoints --output-dir svd
bilinear-qk-match-separation {PROBED} $checkpoints --output-dir separation
ov-write-progress-report {PAIRS} --output-dir progress
geometry-subspace-intervention {FEW} --stage $after {REMOVED} --output-dir intervention
value-code-subspace-report {FEW} --stage embedding --stage $after --output-dir code
value-code-transfer-rescue {FEW} --source-stage embedding --target-stage $after --output-dir rescue
answer-scalar-residual-diagnosis {PAIRS} --output-dir answers
route-to-margin-closure {PAIRS} {ROUTE}=whole,stage=$after,subspace=full_residual
 {ROUTE}=value,stage=embedding,subspace=embedding_value_identity,rank=8
 {ROUTE}=query,stage=embedding,{QUERY} --output-dir margin
route-to-scalar-closure --route-closure-rows margin/route_to_margin_closure_rows.jsonl {ANSWERS}
 --output-dir scalar
mlp-input-functional-subspace-report {PROBED} {ANSWERS} {THROUGH} --output-dir functional
bilinear-qk-rank-adam-state-attribution {WINDOW} {BOTH} $heads --by-lag
 --basis source --basis full --output-dir qk
mlp-functional-write-adam-state-attribution {WINDOW} {BOTH} {THROUGH} {FEW_PAIRS}
 --reference-step $start --output-dir write
study select-heads --separation-rows separation/bilinear_qk_match_separation_rows.jsonl
 --start-step $first_step --end-step $last_step --output-dir heads
study select-write-paths {PROBED} --checkpoint $last --output-dir paths
study compare-optimizers --run $run --output-dir optimizers
page $run --output page.html
"""
"""One report of each kind, small; a line that starts with a space goes on with the one before."""

DECIDING = ("rows", "rows of traces", "CSVs", "checkpoints")
CLOCKS = {"started_unix", "seconds", "seconds_of_last_call", "steps_per_second"}
CLOCKS |= {"sha256"}  # of a file, clocks included; every file is compared itself
KINDS = {".jsonl": "rows", ".csv": "CSVs", ".pt": "checkpoints", ".json": "JSON"}


def report_commands(run: Path, named: Path) -> list[list[str]]:
    """The reports' commands on a run, which has another path in the folder where they run."""
    trace_file = min(run.rglob("trace.json"))
    trace = json.loads(trace_file.read_text())
    start = (trace["start_step"] + trace["end_step"]) // 2
    layer = trace["config"]["model"]["layers"] - 1
    found = sorted((run / "checkpoints").glob("step_*.pt"))
    chosen = [found[len(found) * third // 3 - 1] for third in (1, 2, 3)]
    paths = [shlex.quote(str(named / "checkpoints" / path.name)) for path in chosen]
    filled = Template(REPORTS.replace("\n ", " ")).substitute(
        run=shlex.quote(str(named)),
        trace=shlex.quote(str(named / trace_file.parent.relative_to(run))),
        start=start,
        end=start + 4,
        head=f"L{layer}H1",
        heads=" ".join(
            f"--head L{n}H{h}"
            for n in range(layer + 1)
            for h in range(trace["config"]["model"]["heads"])
        ),
        mlp=f"L{layer}MLP",
        after=f"layer_{layer}_post_mlp",
        checkpoints=" ".join(f"--checkpoint {path}" for path in paths),
        last=paths[-1],
        first_step=checkpoint_step(chosen[0]),
        last_step=checkpoint_step(chosen[-1]),
    )
    return [shlex.split(line) for line in filled.strip().splitlines()]


class Side:
    """An interpreter and the folder of what its `circuit` makes."""

    def __init__(self, python: str, folder: Path) -> None:
        self.python, self.folder = python, folder.absolute()
        asked = subprocess.run([python, "-P", "-c", IDENTITY], check=True, stdout=subprocess.PIPE)
        self.identity = json.loads(asked.stdout)

    def make(self, part: str, reference: Path | None) -> None:
        """Run a part's commands in a folder of its own, in one process, if that is yet to do.

        Raises:
            SystemExit: a command failed, or the folder holds what other code or commands made.
        """
        folder, stamp, log = (self.folder / name for name in (part, f"{part}.json", f"{part}.log"))
        named = reference or QUICKSTART
        run = Path(os.path.normpath(folder / named))
        words = PARTS[part].split()
        commands = [words] if words else report_commands(run, named)
        made_by = self.identity | {"commands": commands}
        if stamp.exists():
            if json.loads(stamp.read_text()) == made_by:
                return
            raise SystemExit(f"{folder} was made by other code or commands; keep it elsewhere")
        if folder.exists():  # of a run that was cut off, or somebody's own: not ours to delete
            raise SystemExit(f"{folder} holds no finished outputs; move it away, or keep elsewhere")
        folder.mkdir(parents=True)
        print(f"{part} by {self.python} in {folder}", flush=True)
        joined = [word for command in commands for word in ("+", *command)][1:]
        with log.open("w") as said:
            job = [self.python, "-m", "circuit.cli.job", *joined]
            done = subprocess.run(job, cwd=folder, stdout=said, stderr=said, check=False)
        if done.returncode:
            raise SystemExit(f"exit code {done.returncode}; its last words are in {log}")
        stamp.write_text(json.dumps(made_by))


def outputs(side: Path, part: str) -> set[str]:
    """Every file that a part wrote, but for locks, logs and what Snakemake keeps."""
    found = set()
    for folder, inside, names in os.walk(side / part):
        inside[:] = [name for name in inside if name != ".snakemake"]
        paths = [Path(folder, name) for name in names]
        found |= {str(p.relative_to(side)) for p in paths if p.suffix not in (".lock", ".log")}
    return found


def differences(one: Path, other: Path) -> Iterator[str]:
    """Where two files differ, in words; nothing if they do not."""
    if not (one.exists() and other.exists()):
        yield "is there on one side only"
    elif one.read_bytes() == other.read_bytes():
        return
    elif one.suffix == ".pt":
        yield from different_tensors(one, other)
    elif one.suffix == ".json":
        yield from different_keys(json.loads(one.read_text()), json.loads(other.read_text()))
    else:
        lines = zip_longest(*(path.read_bytes().split(b"\n") for path in (one, other)))
        number, pair = next((n, pair) for n, pair in enumerate(lines, 1) if pair[0] != pair[1])
        yield f"line {number}"
        if one.suffix == ".jsonl" and all(pair):
            yield from different_keys(*map(json.loads, pair))


def different_tensors(one: Path, other: Path) -> Iterator[str]:
    """The groups of two checkpoints whose tensors differ."""
    try:
        here, there = load_checkpoint(one), load_checkpoint(other)
    except CircuitError as error:
        yield str(error)
        return
    if here.step != there.step:
        yield f"step: {here.step}, not {there.step}"
    ours, theirs = (
        {"parameters": state.parameters, **(state.moments or {})} for state in (here, there)
    )
    for name in {**ours, **theirs}:
        if tensors_digest(ours.get(name, {})) != tensors_digest(theirs.get(name, {})):
            yield f"tensors of {name}"


def different_keys(here: Any, there: Any, where: str = "") -> Iterator[str]:
    """The keys under which two JSON values differ, clocks aside."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in [key for key in {**here, **there} if key not in CLOCKS]:
            one, other = here.get(key, "absent"), there.get(key, "absent")
            yield from different_keys(one, other, f"{where}.{key}".lstrip("."))
    elif isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        for index, (one, other) in enumerate(zip(here, there, strict=True)):
            yield from different_keys(one, other, f"{where}[{index}]")
    elif here != there:
        yield f"{where}: {str(here)[:40]}, not {str(there)[:40]}"


def kind_of(name: str) -> str:
    """What the table calls such a file."""
    kind = KINDS.get(Path(name).suffix, "figures, pages and others")
    return f"{kind} of traces" if kind == "rows" and "optimizer_update_trace" in name else kind


def main() -> None:
    """Make both sides, compare them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", required=True, help="the other interpreter")
    parser.add_argument("--keep", type=Path, help="where the other's outputs stay")
    parser.add_argument("--reference", type=Path, help="run of the reports")
    parser.add_argument("--skip", choices=PARTS, action="append", default=[])
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("PYTHONPATH", None)  # each interpreter has a circuit of its own
    work = Path(tempfile.mkdtemp(prefix="same_rows_"))
    sides = Side(sys.executable, work / "here"), Side(asked.against, asked.keep or work / "there")
    here, there = (side.folder for side in sides)
    names: set[str] = set()
    for part in [part for part in PARTS if part not in asked.skip]:
        for side in reversed(sides):
            side.make(part, asked.reference and asked.reference.resolve())
            names |= outputs(side.folder, part)
    found = {name: list(differences(here / name, there / name)) for name in sorted(names)}
    differing = {name: words for name, words in found.items() if words}
    count, unequal = Counter(map(kind_of, found)), Counter(map(kind_of, differing))
    print("| files | number | equal |\n|---|---:|---:|")
    for kind in sorted(count):
        print(f"| {kind} | {count[kind]} | {count[kind] - unequal[kind]} |")
    for name, words in differing.items():
        print(f"{name}: {'; '.join(words[:4])}{' ...' if words[4:] else ''}")
    print(f"{len(differing)} of {len(found)} files differ" + f": {here}, {there}" * bool(differing))
    if not differing:
        shutil.rmtree(work)
    sys.exit(any(unequal[kind] for kind in DECIDING))


if __name__ == "__main__":
    main()
