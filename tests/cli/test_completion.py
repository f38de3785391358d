"""What completion offers: every closed set, as the library knows it, and what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from circuit.cli import complete as offers
from circuit.cli import reproduce
from circuit.cli.app import app
from typer.main import get_command

from circuit.attribution.losses import LossScope
from circuit.core.groups import Partition
from circuit.model.ablation import Operation
from circuit.model.stages import stage_names
from circuit.reports.changed_places import QueryMode
from circuit.scalars.answers import ANSWER_SCALARS
from circuit.scalars.family import family_names
from circuit.scalars.functional_write import Reference, Target
from circuit.scalars.qk_match import LayerNormMode
from circuit.schemas import SIDES
from circuit.studies.scales import SCALES
from circuit.studies.study import TARGETS
from circuit.tasks.symbolic_kv.task import SymbolicKV
from circuit.train_config import Device

Run = Callable[..., Any]
Complete = Callable[[str], list[str]]
RUN = "artifacts/runs/tiny"
FREE = {
    "output": "a file to be written",
    "output_dir": "a folder to be written",
    "outcome": "a file to be written",
    "replays": "a folder to be written",
    "runs_dir": "a folder to be written",
    "part": "any part of the work",
    "windows": "any two steps",
    "steps": "any two steps",
    "route_labels": "whatever the user has called a route",
}
"""Parameters with text that nothing can be offered for, and what it is."""


def parameters(group: typer.Typer = app, prefix: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """Every parameter of every command: command, name, type, and what Typer was told of it."""
    for info in group.registered_commands:
        assert info.callback is not None
        for name, hint in typing.get_type_hints(info.callback, include_extras=True).items():
            if typing.get_origin(hint) is typing.Annotated:
                kind, told = get_args(hint)
                yield f"{prefix}{info.name}", name, kind, told
    for sub in group.registered_groups:
        assert sub.typer_instance is not None
        yield from parameters(sub.typer_instance, f"{sub.typer_instance.info.name} ")


def takes_text(kind: Any) -> bool:
    parts = [inner for part in (kind, *get_args(kind)) for inner in (part, *get_args(part))]
    return str in parts or Path in parts


def test_every_parameter_that_takes_text_completes() -> None:
    found = list(parameters())
    assert len({command for command, *_ in found}) > 25
    asked = [(c, n) for c, n, kind, told in found if takes_text(kind) and not told.autocompletion]
    assert [(command, name) for command, name in asked if name not in FREE] == []
    assert {name for _, name in asked} == FREE.keys()


def options(group: Any, prefix: str = "") -> Iterator[tuple[str, set[str]]]:
    """The options of every command as they are typed."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from options(command, f"{prefix}{name} ")
        else:
            yield prefix + name, {option for param in command.params for option in param.opts}


def test_every_command_that_takes_a_config_takes_set() -> None:
    taking = {name: found for name, found in options(get_command(app)) if "--config" in found}
    assert len(taking) > 15
    assert [name for name, found in taking.items() if "--set" not in found] == []
    completers = {(c, n): told.autocompletion for c, n, _, told in parameters()}
    fields = {
        offers.train_config: offers.train_field,
        offers.benchmark_config: offers.benchmark_field,
    }
    for command in taking:
        assert completers[command, "overrides"] is fields[completers[command, "config"]], command


@pytest.mark.parametrize(
    ("offered", "known"),
    [
        (offers.DEVICES, get_args(Device)),
        (offers.SCALES, tuple(SCALES)),
        (reproduce.TARGETS, TARGETS),
    ],
)
def test_the_sets_offered_are_those_of_the_library(
    offered: tuple[str, ...], known: tuple[str, ...]
) -> None:
    assert offered == known


@pytest.fixture
def complete(circuit: Run, monkeypatch: pytest.MonkeyPatch) -> Complete:
    """Presses the tab key behind a line, as the scripts of cli/shells.py do."""

    def offered(line: str) -> list[str]:
        monkeypatch.setenv("_CIRCUIT_COMPLETE", "complete_fish")
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("COLUMNS", "40")  # narrower than any help
        found = [item.partition("\t")[0] for item in circuit().out.splitlines()]
        monkeypatch.delenv("_CIRCUIT_COMPLETE")
        return [item for item in found if item]

    return offered


@pytest.mark.parametrize(
    ("line", "known"),
    [
        ("circuit trace qk --loss-scope ", get_args(LossScope)),
        ("circuit trace qk --partition ", get_args(Partition)),
        ("circuit trace qk --layernorm-mode ", get_args(LayerNormMode)),
        ("circuit trace write --reference-vector ", get_args(Reference)),
        ("circuit trace write --target-vector ", get_args(Target)),
        ("circuit geometry-subspace-intervention --operation ", get_args(Operation)),
        ("circuit geometry-subspace-intervention --query-mode ", get_args(QueryMode)),
        ("circuit trace write --record-side ", SIDES),
        ("circuit trace write --scalar ", ANSWER_SCALARS),
        ("circuit value-code-subspace-report --stage ", tuple(stage_names(3))),
        ("circuit value-code-subspace-report --position-role ", tuple(SymbolicKV.roles)),
        ("circuit study configs --scale s", ("short", "smoke")),
        ("circuit reproduce ", TARGETS),
        ("circuit trace qk --head L2", ("L2H0", "L2H1", "L2H2", "L2H3")),
        ("circuit trace attribute --scalar ", tuple(family_names())),
        ("circuit trace attribute --scalar loss,sc", ("loss,scope=",)),
        (
            "circuit trace attribute --scalar qk_match,rank=2,head=L2",
            tuple(f"qk_match,rank=2,head=L2H{n}" for n in range(4)),
        ),
        (
            "circuit trace attribute --scalar loss,scope=",
            ("loss,scope=full_lm", "loss,scope=answer"),
        ),
    ],
)
def test_an_option_offers_what_its_command_takes(
    complete: Complete, line: str, known: tuple[str, ...]
) -> None:
    assert tuple(complete(line)) == known


@pytest.fixture
def trained(circuit: Run) -> None:
    """A run under artifacts/, with a trace and a probe set whose contents do not matter here."""
    config = Path("configs/train/tiny.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "output_dir": RUN}))
    assert circuit("train", "--config", str(config)).code == 0
    for name in ("trace/trace.json", "trace/checkpoints/step_000000.pt", "probe_set.jsonl"):
        path = Path(RUN, "analysis", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.usefixtures("trained")
def test_completion_offers_what_is_there(complete: Complete) -> None:
    own = f"--config {RUN}/run_config.json"
    saved = [f"{RUN}/checkpoints/{name}.pt" for name in ("best", "step_000003", "step_000004")]
    for line, offered in {
        "circuit train --config ": [f"{RUN}/run_config.json", "configs/train/tiny.json"],
        "circuit train --config configs": ["configs/train/tiny.json"],
        "circuit generate-benchmark --config ": ["configs/benchmark/tiny.json"],
        f"circuit evaluate {own} --checkpoint ": saved,
        f"circuit evaluate {own} --checkpoint {RUN}/checkpoints/step": saved[1:],
        f"circuit evaluate --config {RUN} --checkpoint ": saved,
        "circuit evaluate --checkpoint artifacts/runs/tiny/c": saved,
        f"circuit weight-svd-trace {own} --checkpoint-dir ": [
            f"{RUN}/analysis/trace/checkpoints",
            f"{RUN}/checkpoints",
        ],
        f"circuit evaluate {own} --split ": ["train", "validation_iid", "heldout_pairs"],
        "circuit generate-probe-set --benchmark-dir ": ["data/tiny"],
        "circuit generate-probe-set --benchmark-dir data/tiny --split v": ["validation_iid"],
        "circuit trace show ": [f"{RUN}/analysis/trace"],
        "circuit trace qk --probe-set ": [f"{RUN}/analysis/probe_set.jsonl"],
        "circuit page ": [RUN],
        "circuit study compare-optimizers --run ": [RUN],
        f"circuit trace qk {own} --head ": ["L0H0", "L0H1"],
        f"circuit trace write {own} --component ": ["L0MLP"],
        f"circuit value-code-subspace-report {own} --stage layer": [
            "layer_0_post_attn",
            "layer_0_post_mlp",
        ],
        "circuit train --device c": ["cpu", "cuda"],
        "circuit train --trace ": [f"{RUN}/analysis/trace"],
        "circuit train --trace --device c": ["cpu", "cuda"],
        "circuit train --trace --over": ["--overwrite"],
    }.items():
        found = complete(line)
        if line.endswith("--split "):
            assert found == offered
        else:
            assert sorted(found) == offered, line
    assert "structural_ood" in complete("circuit evaluate --split ")  # none is named: the usual
    assert {"train", "evaluate", "quickstart"} <= set(complete("circuit "))


def test_no_line_of_a_long_help_is_offered(complete: Complete) -> None:
    offered = complete("circuit train --")
    assert len(offered) > 15
    assert [word for word in offered if not word.startswith("--")] == []


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize(
    "option", ["train --recipe", "trace attribute --scalar", "import-recording . --module"]
)
def test_what_a_file_defines_is_offered_and_nothing_is_executed(
    complete: Complete, option: str
) -> None:
    called = "net = nn.Linear(1 / 0)\nother = Sums()\nsize = lambda module: 1 / 0\n"
    values = "P = 1 / 0\na = torch.arange(P)\n"  # which are neither a scalar nor a module
    Path("mine.py").write_text(f"def loss(module): ...\nclass Sums: ...\n{called}{values}")
    names = [f"mine.py:{name}" for name in ("loss", "Sums", "net", "other", "size")]
    assert complete(f"circuit {option} mine.py:") == names


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("--set optimizer.l", ["optimizer.learning_rate="]),
        ("--set schedule.name=c", ["schedule.name=constant", "schedule.name=cosine"]),
        ("--set optimizer.learning_rate=", ["optimizer.learning_rate=0.01"]),
        ("--set schedule.", [f"schedule.{name}=" for name in ("name", "warmup_steps", "floor")]),
        ("--set seed=3 --set se", []),
        ("--set=model.la", ["model.layers="]),
        ("--set zzz", []),
    ],
)
def test_set_offers_the_fields_of_the_config(
    complete: Complete, line: str, offered: list[str]
) -> None:
    assert complete(f"circuit train --config configs/train/tiny.json {line}") == offered


def test_set_offers_the_splits_of_a_benchmark_and_fields_without_a_config(
    complete: Complete,
) -> None:
    line = "circuit generate-benchmark --config configs/benchmark/tiny.json --set splits.t"
    assert "splits.train.query_lag.max=" in complete(line)
    assert complete("circuit generate-benchmark --set num_k") == ["num_keys="]
    for config in ("", "--config nope.json", "--config data/tiny/train.jsonl", "--config data"):
        assert "model.layers=" in complete(f"circuit train {config} --set model.l")


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def shaped(layers: str, heads: str = "2") -> str:
    return f'{{"model": {{"layers": {layers}, "heads": {heads}}}}}'


ODD = {
    "empty": "",
    "no_object": "3",
    "deep": deep(100_000),
    "deep_inside": f'{{"name": "x", "model": {deep(400)}, "optimizer": {{"name": {deep(900)}}}}}',
    "infinite": shaped("1e400"),
    "no_number": shaped("NaN"),
    "long_number": shaped("1" * 5000),
    "float": shaped("1e9"),
    "many_layers": shaped("65"),
    "many_heads": shaped("2", "100000"),
    "text": shaped('"many"'),
    "list": '{"model": [], "optimizer": [], "benchmark_dir": []}',
    "no_text": '{"name": "\\ud800", "benchmark_dir": "\\u0000", "output_dir": "a\\nb"}',
    "long_name": json.dumps({"benchmark_dir": "x" * 5000}),
    "large": '{"model": {"layers": 1, "heads": 1}, "name": "' + "x" * 2**20 + '"}',
}
ASKED = [
    "evaluate --checkpoint",
    "evaluate --split",
    "value-code-subspace-report --stage",
    "trace qk --head",
    "train --set",
    *[f"train --set {name}=" for name in ("name", "optimizer.name", "output_dir")],
]


@pytest.mark.parametrize("asked", ASKED)
def test_a_config_that_is_none_is_no_error(complete: Complete, asked: str) -> None:
    command, option = asked.split(" --")
    Path("bytes.json").write_bytes(b"\xff\xfe")
    for name, text in ODD.items():
        Path(f"{name}.json").write_text(text)
    for name in (*ODD, "bytes", "x" * 300, f"{'x' * 300}/y"):
        space = "" if "=" in option else " "
        found = complete(f"circuit {command} --config {name}.json --{option}{space}")
        assert all(one.isprintable() for one in found)
        if option == "head":  # those of the reference
            assert found == [f"L{x}H{y}" for x in range(3) for y in range(4)], name


@pytest.mark.parametrize(
    "text", ["", "3", "[]", deep(100_000), '{"splits": 3}', '{"splits": [3, [4]]}']
)
def test_a_benchmark_that_is_none_has_the_usual_splits(complete: Complete, text: str) -> None:
    Path("odd").mkdir()
    Path("odd/metadata.json").write_text(text)
    found = complete("circuit generate-probe-set --benchmark-dir odd --split ")
    assert found == list(offers.DEFAULT_SPLITS)


def test_a_config_is_no_pipe_that_is_waited_for(
    complete: Complete, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo("pipe.json")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read"))
    assert len(complete("circuit trace qk --config pipe.json --head ")) == 12


def test_what_would_break_the_line_is_not_offered(complete: Complete) -> None:
    names = [b"a\nb", b"a\tb", b"a\x1b[31mb", b"\xff", "é b".encode()]
    for name in names:
        Path("artifacts/runs", os.fsdecode(name)).mkdir(parents=True)
        Path("artifacts/runs", os.fsdecode(name), "run_config.json").touch()
    assert complete("circuit page ") == ["artifacts/runs/é b"]


def test_a_record_of_overrides_in_a_config_is_no_field(complete: Complete) -> None:
    path = Path("configs/benchmark/tiny.json")
    record = {"overrides": {"config": "x.json", "set": ["seed=5"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | record))
    line = f"circuit generate-benchmark --config {path} --set "
    field = "splits.train.answer_pairs="
    assert complete(f"{line}{field}") == [f"{field}seen"]
    assert complete(f"{line}overr") == []


LIGHT = """
import json, sys
there = set(sys.modules)
sys.argv = ["circuit", *json.loads(sys.argv[1])]
from circuit.cli import main
try:
    main()
except SystemExit:
    pass
came = {name for name, module in sys.modules.items() if module} - there  # None: kept away
packages = {name.partition(".")[0] for name in came if name[0] != "_"}
print(*sorted(packages - sys.stdlib_module_names), file=sys.stderr)
"""
TERMINAL = {
    *("circuit", "typer", "shellingham", "rich", "markdown_it", "mdurl", "pygments", "pydantic"),
    *("pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
    *("annotated_doc", "attr", "click"),
}
"""This program, and what typer, rich and pydantic are made of or look for."""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (None, "generate-benchmark"),
        ("circuit train --config ", "configs/train/tiny.json"),
        ("circuit train --config configs/train/tiny.json --set ", "optimizer.learning_rate="),
    ],
)
def test_help_and_completion_import_nothing_but_what_draws_them(
    desk: Path, line: str | None, said: str
) -> None:
    """No torch, no numpy: what makes them quick on any machine, however busy."""
    asked = {
        "_CIRCUIT_COMPLETE": "complete_fish",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_ARGS": line or "",
    }
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps([] if line else ["--help"])],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | (asked if line else {}),
    )
    assert set(done.stderr.split()) <= TERMINAL
    assert said in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["trian"], ["trace", "nowhere"], ["train", "--no"]])
def test_words_that_name_nothing_are_refused_before_pydantic_is_imported(words: list[str]) -> None:
    """Before half of what else there is to import."""
    line = [sys.executable, "-c", LIGHT, json.dumps(words)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert ("error: circuit" in done.stderr) is (words != ["--help"])
    assert "pydantic" not in done.stderr.splitlines()[-1].split()


@pytest.mark.usefixtures("trained")
def test_a_model_without_mlps_is_offered_none(complete: Complete) -> None:
    config = Path("configs/train/tiny.json")
    payload = json.loads(config.read_text())
    config.write_text(json.dumps({**payload, "model": {**payload["model"], "d_ff": 0}}))
    given = f"--config {config}"
    assert complete(f"circuit trace write {given} --component L0M") == []
    offered = complete(f"circuit value-code-subspace-report {given} --stage layer")
    assert offered == ["layer_0_post_mlp"]
