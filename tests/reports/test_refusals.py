"""What arguments, configs and headers tell is refused before torch is imported, by every command.

The law runs over all registered commands: each option of each command is given values that cannot
be right, derived from its declared range or listed here by its name, beside good values for the
rest. One process types them all; in it torch and whatever is as heavy cannot be imported.
"""

from __future__ import annotations

import inspect
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from circuit.cli.app import app
from command_line import type_in
from typer.models import ArgumentInfo

from circuit.options import Option
from circuit.reports.report import all_reports

PROBE = "runs/tiny/analysis/probe_set.jsonl"
CHECKPOINTS = "runs/tiny/checkpoints"
PAIR_ROWS = "diagnosis/answer_scalar_residual_diagnosis_pair_rows.jsonl"
ROUTE_ROWS = "closure/route_to_margin_closure_rows.jsonl"
ROUTE = "label=r,stage=embedding,position_role=prediction"

GOOD = {
    "anchor_every": "4",
    "benchmark_dir": "data/tiny",
    "checkpoint": f"{CHECKPOINTS}/step_000003.pt",
    "checkpoint_dir": CHECKPOINTS,
    "component": "L0MLP",
    "config": "runs/tiny/run_config.json",
    "edits": "less,scale=weight_decay*0",
    "end_step": "12",
    "examples_per_split": "4",
    "files": f"{CHECKPOINTS}/step_000003.pt",
    "folder": "trace",
    "module": "module.py:made",
    "operation": "remove",
    "optimizer_trace_dir": "trace",
    "output": "out/it.jsonl",
    "output_dir": "out",
    "overrides": "seed=3",
    "parts": "shard",
    "probe_set": PROBE,
    "reference_step": "4",
    "replays": "out",
    "claims": "claims_paper.json",
    "reports": "shard/report.json",
    "routes": ROUTE,
    "route_closure_rows": ROUTE_ROWS,
    "run": "runs/tiny",
    "runs": "runs/tiny",
    "scalar_pair_rows": PAIR_ROWS,
    "scalars": "loss",
    "scale": "smoke",
    "separation_rows": "separation/bilinear_qk_match_separation_rows.jsonl",
    "series": CHECKPOINTS,
    "source_component": "L0H1",
    "source_stage": "embedding",
    "stage": "embedding",
    "stages": "embedding",
    "start_step": "3",
    "step": "3",
    "subspace": "full_residual",
    "target": "reference",
    "target_stage": "final_norm",
}
"""A value of each option that a command may require."""

NEEDED = {"checkpoint_dir", "config", "probe_set"}
"""Options that only some runs do without: those of a recipe, or of a module of any class."""

FROM_START = ("--from-initialization", "--end-step", "12")
FURTHER = {
    "bilinear-qk-rank-adam-state-attribution": ("--head", "L1H0"),
    "trace qk": ("--head", "L1H0"),
    "optimizer-update-trace": FROM_START,
    "trace record": FROM_START,
    "trace counterfactual": ("--edit", "less,scale=weight_decay*0"),
    "generate-benchmark": ("--set", "output_dir=out"),
    "train": ("--overwrite",),
    "mlp-input-functional-subspace-report": ("--subspace-rank", "1"),
    "reproduce": ("--scale", "smoke", "--dry-run"),
}
"""What a command needs that no single option requires."""

OF_KIND: dict[str, tuple[str, ...]] = {
    "checkpoint": ("nowhere/step_000003.pt", "other/step_000003.pt", PROBE),
    "claims": ("nowhere.json", PROBE, "tiny.json"),
    "checkpoint_dir": ("nowhere", "data/tiny"),
    "component": ("nonsense", "L9H0"),
    "group_by": ("nonsense", "value_distractors"),
    "head": ("nonsense", "L9H0", "L0H9"),
    "mlp": ("nonsense", "L9MLP", "L0H1"),
    "pair_type": ("nonsense",),
    "probe_set": ("nowhere.jsonl", "data/tiny/train.jsonl"),
    "report": ("nowhere.json",),
    "role": ("nonsense",),
    "route": (
        "nonsense",
        "label=r,stage=layer_9_post_mlp,position_role=prediction",
        "label=r,stage=embedding,position_role=nonsense",
        f"{ROUTE},subspace=embedding_nonsense_identity,rank=2",
    ),
    "route_closure_rows": ("nowhere.jsonl", PROBE, PAIR_ROWS),
    "run": ("nowhere",),
    "scalar_pair_rows": ("nowhere.jsonl", PROBE, ROUTE_ROWS),
    "separation_rows": ("nowhere.jsonl", PROBE),
    "single_role": ("nonsense", "value_distractors"),
    "split": ("nonsense",),
    "stage": ("nonsense", "layer_9_post_mlp"),
    "subspace": ("nonsense", "embedding_nonsense_identity"),
    "trace": ("nowhere", "data/tiny"),
}
"""Values that an option of a report refuses, by what it names."""

BAD: dict[str, tuple[str, ...]] = {
    "anchor_every": ("0", "x"),
    "base_seed": ("-1", "x"),
    "bases": ("nonsense", "step:x"),
    "benchmark_dir": ("nowhere",),
    "checkpoint": OF_KIND["checkpoint"],
    "config": ("nowhere.json", PROBE),
    "device": ("nonsense",),
    "edits": ("nonsense", "x,scale=weight_decay*nonsense", "x,steps=5:3"),
    "edits_file": ("nowhere.jsonl", "data/tiny"),
    "end_step": ("9999",),
    "files": ("nowhere", "data/tiny"),
    "folder": ("nowhere", "data/tiny"),
    "head_layer": ("9",),
    "kind": ("nonsense",),
    "module": ("nonsense", "nowhere.py:made"),
    "optimizer": ("nonsense", "nowhere.py:Lion"),
    "output_dir": ("foreign", PROBE),
    "overrides": ("no_such_field=1", "seed=x"),
    "part": ("nonsense", "2/1"),
    "parts": ("nowhere",),
    "path": ("nonsense", "gauss:0"),
    "recipe": ("nonsense", "nowhere.py:Sums"),
    "reference_step": ("9999",),
    "replays": (PROBE,),
    "resume_checkpoint": ("nowhere/step_000003.pt",),
    "route_labels": ("nonsense",),
    "run": ("nowhere",),
    "runs_dir": (PROBE,),
    "scalars": (
        *("nonsense", "qk_match,head=L9H0", "loss,nonsense=3"),
        *("qk_match,head=L0H0,pair_type=nonsense", "qk_match,head=L0H0,score_query_role=nonsense"),
    ),
    "same_as": ("nowhere", "data/tiny"),
    "scale": ("nonsense",),
    "score": ("nonsense",),
    "scores": ("nowhere.npz",),
    "series": ("nowhere", "data/tiny"),
    "shares": ("0", "1.5"),
    "sinks": ("nonsense", "nowhere:here"),
    "slice": ("nonsense",),
    "slices": ("nonsense",),
    "split": ("nonsense",),
    "start_step": ("9999",),
    "step": ("9999",),
    "steps": ("nonsense", "5:3", "0:9999"),
    "storage": ("nonsense",),
    "task": ("nonsense",),
    "target": ("nonsense",),
    "trace": ("foreign", PROBE),
    "train_split": ("nonsense",),
    "window": ("nonsense", "5:3"),
    "windows": ("nonsense", "5:3", "0:9999"),
}
"""Values that an option of this name refuses wherever it stands."""

REPORTS = {name: kind for kind in all_reports() for name in kind.names or (kind.command,)}

INCOMPLETE = {"trace merge", "trace arrays", "study compare-seeds", "import-recording trace"}
INCOMPLETE |= {name for name, kind in REPORTS.items() if kind.task}
"""Commands that read what other commands take long to make, or a run of another task; even their
good values are refused."""

RIGHT = {
    ("mlp-input-functional-subspace-report", "end_step", "9999"),
    ("import-checkpoints", "step", "9999"),
}
"""Values of `BAD` that are right for a command."""

ANY = {"outcome", "output", "profile", "seed"}
"""Options to which no single value is wrong before the command begins."""

TYPE_ALL = """
import json, os, shutil, sys
HEAVY = {"torch", "transformer_lens", "transformers", "pandas", "matplotlib", "sklearn", "scipy"}
class Blocked(Exception):
    pass
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise Blocked(name)
sys.meta_path.insert(0, Blocker())
import typer
from circuit import CircuitError
from circuit.cli.app import app
command = typer.main.get_command(app)
answers = os.fdopen(os.dup(1), "w")
for stream in (1, 2):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
for line in sys.stdin:
    words = json.loads(line)
    shutil.rmtree("out", ignore_errors=True)
    said = "exit code 0"
    try:
        command.main(words, prog_name="circuit")
    except CircuitError:
        said = "refused"
    except SystemExit as end:
        said = "refused" if end.code == 2 else f"exit code {end.code}"
    except Blocked as error:
        said = f"imports {error}"
    print(json.dumps([said, words]), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Parameter:
    """An option or argument of a command, as its function declares it."""

    name: str
    words: tuple[str, ...]
    """That stand before its value."""
    required: bool
    takes_value: bool
    is_integer: bool
    least: float | None
    option: Option | None
    """Of a report: its declaration."""

    def typed(self, value: str) -> tuple[str, ...]:
        """The parameter with a value, on a command line."""
        return (*self.words, value)

    @property
    def bad(self) -> tuple[str, ...] | None:
        """Values that it has to refuse; None if nothing is known of it."""
        values = [*BAD.get(self.name, ()), *(["x"] if self.is_integer else [])]
        values += [] if self.least is None else [str(int(self.least) - 1)]
        if self.option is not None:
            values += [
                *OF_KIND.get(self.option.kind, ()),
                *(["nonsense"] * bool(self.option.choices)),
            ]
            open_ends = [b for b in (self.option.above, self.option.below) if b is not None]
            values += [*map(str, open_ends), *(["nan"] if open_ends else [])]
        return tuple(values) or (() if self.name in ANY else None)


def parameters(function: Callable[..., Any], declared_by: Any) -> Iterator[Parameter]:
    """What a command's function declares, and its report, if it is one's."""
    options = declared_by.Options.declared() if declared_by else {}
    for name, declared in inspect.signature(function, eval_str=True).parameters.items():
        if get_origin(declared.annotation) is not Annotated:
            continue  # the context
        kind, info = get_args(declared.annotation)[:2]
        words = () if isinstance(info, ArgumentInfo) else (f"--{name.replace('_', '-')}",)
        long = [word for word in (info.default, *(info.param_decls or ())) if str(word)[:2] == "--"]
        required = declared.default is inspect.Parameter.empty
        inner = get_args(kind)
        integer = int in (kind, *inner, *itertools.chain(*map(get_args, inner)))
        option = options.get(name)
        least = option.least if option else info.min
        yield Parameter(
            name, tuple(long[:1]) or words, required, kind is not bool, integer, least, option
        )


def commands() -> Iterator[tuple[str, tuple[Parameter, ...]]]:
    """Every registered command under its words."""
    groups = [group.typer_instance for group in app.registered_groups]
    for of in (app, *(group for group in groups if group is not None)):
        prefix = "" if of is app else f"{of.info.name} "
        for command in of.registered_commands:
            assert command.callback is not None
            name = f"{prefix}{command.name}"
            yield name, tuple(parameters(command.callback, REPORTS.get(name)))


def good_values(name: str, declared: tuple[Parameter, ...]) -> dict[str, tuple[str, ...]]:
    """What a command needs, each with a value that is right."""
    return {
        one.name: one.typed(
            "tiny_benchmark.json" if name == "generate-benchmark" else GOOD[one.name]
        )
        for one in declared
        if one.required or one.name in NEEDED
    }


def right_lines() -> Iterator[list[str]]:
    """Command lines with nothing wrong."""
    for name, declared in commands():
        words = good_values(name, declared).values()
        yield [*name.split(), *FURTHER.get(name, ()), *itertools.chain(*words)]


def wrong_lines() -> Iterator[list[str]]:
    """Command lines with one wrong value each, of every option of every command.

    Options of one name that refuse the same values share them out: each is given one at least.
    """
    alike = defaultdict(list)
    for name, declared in commands():
        for one in declared:
            values = tuple(v for v in one.bad or () if (name, one.name, v) not in RIGHT)
            if one.takes_value and values:
                alike[one.name, values].append((name, good_values(name, declared), one))
    for (_, values), members in alike.items():
        for at, (name, good, one) in enumerate(members):
            for value in values[at % len(values) :: len(members)]:
                words = {**good, one.name: one.typed(value)}.values()
                yield [*name.split(), *FURTHER.get(name, ()), *itertools.chain(*words)]


def test_every_option_says_what_it_refuses() -> None:
    unsaid = {
        f"{name}: {one.name}"
        for name, declared in commands()
        for one in declared
        if one.takes_value and one.bad is None
    }
    assert unsaid == set()


@pytest.fixture
def desk(trained: Path, traced: Path, benchmark_payload: Callable[[], dict[str, Any]]) -> None:
    """The tiny run, its trace, row files made from it, and what is not of it."""
    Path("tiny_benchmark.json").write_text(json.dumps(benchmark_payload()))
    common = ("--config", str(trained), "--probe-set", PROBE, "--checkpoint-dir", CHECKPOINTS)
    few = ("--max-pairs-per-type", "4", "--min-pairs-per-type", "1")
    made = (
        ("answer-scalar-residual-diagnosis", *few, "--output-dir", "diagnosis"),
        ("route-to-margin-closure", *few, "--route", ROUTE, "--output-dir", "closure"),
        ("bilinear-qk-match-separation", "--output-dir", "separation"),
    )
    for command, *rest in made:
        assert type_in((command, *common, *rest)) == 0
    changed = ("--set", "seed=12", "--set", "output_dir=other", "--set", "steps=3")
    assert type_in(("train", "--config", str(trained), *changed)) == 0
    shutil.move("other/checkpoints", "elsewhere")
    shutil.rmtree("other")
    shutil.move("elsewhere", "other")
    Path("foreign").mkdir()
    Path("foreign/some_report.json").write_text("{}")
    names = ["a_report.json", "trace.json", "optimizer_update_trace_rows.jsonl"]
    for name in (*names, "run_config.json", "model.safetensors"):
        Path("foreign", name).write_text("{}")


def outcomes(lines: Iterator[list[str]]) -> list[tuple[str, list[str]]]:
    """How each command line ends where nothing heavy can be imported: a word, and the line."""
    text = "".join(json.dumps(words) + "\n" for words in lines)
    done = subprocess.run(
        [sys.executable, "-c", TYPE_ALL], input=text, capture_output=True, text=True, check=True
    )
    found = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert [words for _, words in found] == [json.loads(line) for line in text.splitlines()]
    return found


def test_refusals_come_before_torch_and_only_what_is_wrong_is_refused(desk: None) -> None:
    late = [(said, *words) for said, words in outcomes(wrong_lines()) if said != "refused"]
    assert not late, "\n".join(map(shlex.join, late))
    refused = {
        " ".join(words[: 1 if words[1].startswith("-") else 2])
        for said, words in outcomes(right_lines())
        if said == "refused"
    }
    assert refused <= INCOMPLETE
