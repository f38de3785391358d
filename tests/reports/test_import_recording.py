"""A recording that is imported is a run: every report of it is that of the run that it copies."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Done
from each_report import KINDS, MADE, options_of, sources_of
from own_loop import own_loop
from sums_module import sums_module
from tiny_run import RUN
from torch import Tensor, nn

import circuit as library
from circuit.artifacts import read_jsonl
from circuit.errors import CircuitError
from circuit.page import formation_page
from circuit.reports.import_recording import import_recording
from circuit.reports.report import ReportResult, run_report
from circuit.runs.opening import open_run
from circuit.tasks.benchmark import write_benchmark
from circuit.train_config import TrainConfig, load_run_config
from circuit.training.own_module import named_module

RECORDED = Path("recorded")
OF_RECORDING = {
    RUN / "checkpoints": RECORDED / "checkpoints",
    MADE: Path("also_made"),
    Path("trace"): RECORDED,
}
REFUSED = {
    **dict.fromkeys(
        ("counterfactual-training", "data-attribution", "data-credit", "data-influence"),
        "no batch here",
    ),
    "cross-seed-comparison": "names its seed",
    "optimizer-comparison": "no summary.json",
    "seed-spread": "'seed' is not known",
}
"""What compares trainings, or asks for the examples of a step; and the reason that it is given."""
COMPARED = ("path-logit-decomposition", "ov-write-progress-report", "weight-svd-trace")
BUILD = """
from circuit.train_config import load_run_config
from circuit.training.setup import Setup


def build():
    return Setup(load_run_config("runs/tiny")).initial_model()
"""


def of_recording(value: Any) -> Any:
    """The same file, folder, or option of files, of the recording."""
    if isinstance(value, tuple):
        return tuple(map(of_recording, value))
    if not isinstance(value, Path):
        return value
    for ours, theirs in OF_RECORDING.items():
        if value.is_relative_to(ours):
            return theirs / value.relative_to(ours)
    return RECORDED if value == RUN else value


def unchanged(value: Any) -> Any:
    return value


def make(command: str, run: TrainConfig, of: Callable[[Any], Any]) -> ReportResult:
    """A report, and first those that it reads."""
    kind, options = KINDS[command], options_of(command)
    for source in sources_of(options):
        if not of(MADE / source).exists():
            make(source, run, of)
    given = {name: of(value) for name, value in dict(options).items() if value is not None}
    folder = of(MADE / command)
    return run_report(
        kind, run if kind.reads_run else None, kind.Options(**given), folder, overwrite=True
    )


@pytest.mark.filterwarnings("ignore")  # of statistics over few reads
def test_every_report_of_a_recorded_copy_is_that_of_the_run(trained: Path, traced: Path) -> None:
    Path("mine.py").write_text(BUILD)
    own_loop(load_run_config(trained), RECORDED)
    import_recording(RECORDED, "mine.py:build", benchmark_dir="data/tiny", checkpoint_every=3)
    recorded, trained_here = load_run_config(RECORDED), load_run_config(RUN)
    assert recorded.shape == trained_here.model
    for command in sorted(KINDS):
        if command in REFUSED:
            with pytest.raises(CircuitError, match=re.escape(REFUSED[command])):
                make(command, recorded, of_recording)
            continue
        ours = make(command, recorded, of_recording)
        if command in COMPARED:
            theirs = make(command, trained_here, unchanged)
            assert len(ours.rows) == len(theirs.rows)
            for one, other in zip(ours.rows, theirs.rows, strict=True):
                assert one.read_bytes() == other.read_bytes(), one
    theirs = make("scalar-attribution", trained_here, unchanged).rows[0]
    ours = of_recording(MADE / "scalar-attribution") / theirs.name
    for one, other in zip(read_jsonl(ours), read_jsonl(theirs), strict=True):
        for column in ("before", "after", "path", "groups"):  # the raw gradient is not recorded
            assert one[column] == other[column]
    page = formation_page(RECORDED)
    assert not any(panel.missing and panel.sources for panel in page.panels)
    assert all("circuit train " not in one.command for one in page.missing)
    import_recording(RECORDED, "mine.py:build", checkpoint_every=3, overwrite=True)  # no task
    svd = make("weight-svd-trace", load_run_config(RECORDED), of_recording)
    assert svd.rows[0].read_bytes() == (MADE / "weight-svd-trace" / svd.rows[0].name).read_bytes()


# --- a module of one's own class ------------------------------------------------------------------

MINE = (
    sums_module(5, 8, 16)
    + """

def losses(inputs):
    return [loss, lambda module: loss(module)]


def train(overwrite=False):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with circuit.watch(model, optimizer, "mine", overwrite=overwrite, anchor_every=4):
        for _ in range(10):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()


if __name__ == "__main__":
    train()
"""
)
FLAGS = ("--config", "mine", "--optimizer-trace-dir", "mine")


@pytest.fixture
def mine(circuit: Callable[..., Done]) -> Callable[..., Done]:
    """Types `circuit ...` beside a script that has been run."""
    Path("mine.py").write_text(MINE)
    exec(compile(MINE, "mine.py", "exec"), {"__name__": "__main__"})
    return circuit


def test_from_an_own_loop_to_an_attribution_page(mine: Callable[..., Done]) -> None:
    def done(*words: str) -> Done:
        ended = mine(*words)
        assert ended.code == 0, ended.err
        return ended

    done("import-recording", "mine", "--module", "mine.py:build")
    asked = done("page", "mine").out
    assert "circuit trace attribute --config mine" in asked
    scalars = ("--scalar", "mine.py:loss", "--scalar", "mine.py:loss,factor=2")
    out = done("trace", "attribute", *FLAGS, *scalars, "--output-dir", "mine/analysis/loss").out
    assert "over steps 0:10 close to" in out
    rows = read_jsonl(Path("mine/analysis/loss/scalar_attribution_rows.jsonl"))
    assert {row["scalar"] for row in rows} == {"loss", "loss.factor=2"}
    assert set(rows[0]["groups"]["circuit"]) == {"0", "2", "4"}
    assert Path("mine/analysis/loss/course_1_terms.svg").exists()  # of the other scalar
    page = done("page", "mine", "--overwrite").out
    assert "mine/analysis/loss" in page or "analysis/loss" in page
    again = open_run("mine")
    namespace: dict[str, Any] = {"__name__": "again"}
    exec(compile(MINE, "mine.py", "exec"), namespace)
    series = library.attribute(again, [namespace["loss"]], 0, 10)["loss"]
    assert [float(x) for x in series.actual] == [
        row["actual"] for row in rows if row["scalar"] == "loss"
    ]


def test_with_a_task_its_numbers_are_those_of_the_module(mine: Callable[..., Done]) -> None:
    assert (
        mine(
            "import-recording", "mine", "--module", "mine.py:build", "--task", "mine.py:Pairs"
        ).code
        == 0
    )
    last = "mine/checkpoints/step_000010.pt"
    shown = mine("evaluate", "--config", "mine", "--checkpoint", last, "--json").payload
    figures = shown["evaluations"]["all"]
    assert figures["r"] is None
    probe = "mine/analysis/probe_set.jsonl"
    words = ("--split", "all", "--examples-per-split", "25", "--output", probe)
    assert mine("generate-probe-set", "--benchmark-dir", "mine/benchmark", *words).code == 0
    words = ("--probe-set", probe, "--scalar", "loss", "--scalar", "mine.py:loss")
    ended = mine("trace", "attribute", *FLAGS, *words, "--output-dir", "out")
    assert ended.code == 0, ended.err
    rows = read_jsonl(Path("out/scalar_attribution_rows.jsonl"))
    ours, theirs = ([r for r in rows if r["scalar"] == name] for name in ("loss", "loss.full_lm"))
    for one, other in zip(ours, theirs, strict=True):
        for share, same in zip(one["path"].values(), other["path"].values(), strict=True):
            assert share == pytest.approx(same, rel=1e-3, abs=1e-7)
    assert figures["loss"] == pytest.approx(theirs[-1]["after"], rel=1e-6)


def test_what_has_changed_since_the_import_is_refused(
    mine: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The named file, what it imports from beside itself, the task's benchmark."""
    Path("mine.py").write_text(f"import beside\n{MINE}")
    Path("beside.py").write_text("")
    words = ("--module", "mine.py:build", "--task", "mine.py:Pairs")
    assert mine("import-recording", "mine", *words).code == 0
    assert open_run("mine").module() is not None
    monkeypatch.delitem(sys.modules, "beside", raising=False)  # as in a new process
    for name in ("beside.py", "mine.py"):
        text = Path(name).read_text()
        Path(name).write_text(f"{text}# changed\n")
        with pytest.raises(CircuitError, match=f"{name}: has changed since the import of the"):
            open_run("mine").module()
        Path(name).write_text(text)
    config = open_run("mine").setup.benchmark.task.config
    write_benchmark(config.model_copy(update={"seed": 1}), overwrite=True)
    with pytest.raises(CircuitError, match="the benchmark is not the recorded one: digest"):
        _ = open_run("mine").setup.benchmark


SHORT = MINE.replace(
    MINE[MINE.index("    hidden =") : MINE.index("def loss(")],
    """    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "d_mlp": 8, "n_ctx": 2}
    settings = {"act_fn": "relu", "normalization_type": None, "device": "cpu", "d_vocab": p}
    return HookedTransformer(HookedTransformerConfig(**sizes, **settings))


""",
).replace("module(pairs)", "module(pairs)[:, -1]")


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_a_hooked_transformer_that_reads_all_but_the_answer(circuit: Callable[..., Done]) -> None:
    Path("mine.py").write_text(SHORT)
    exec(compile(SHORT, "mine.py", "exec"), {"__name__": "__main__"})
    words = ("--module", "mine.py:build", "--task", "mine.py:Pairs")
    assert circuit("import-recording", "mine", *words).code == 0
    assert load_run_config("mine").shape is None
    last = "mine/checkpoints/step_000010.pt"
    figures = circuit("evaluate", "--config", "mine", "--checkpoint", last, "--json").payload
    assert 0 < figures["evaluations"]["all"]["r"] <= 1
    probe = "mine/analysis/probe_set.jsonl"
    words = ("--split", "all", "--examples-per-split", "25", "--output", probe)
    assert circuit("generate-probe-set", "--benchmark-dir", "mine/benchmark", *words).code == 0
    words = ("--probe-set", probe, "--scalar", "loss", "--start-step", "9")
    assert circuit("trace", "attribute", *FLAGS, *words, "--output-dir", "out").code == 0
    (row,) = read_jsonl(Path("out/scalar_attribution_rows.jsonl"))
    assert row["after"] == pytest.approx(figures["evaluations"]["all"]["loss"], rel=1e-6)


def test_what_such_a_run_cannot_be_asked_is_one_line(mine: Callable[..., Done]) -> None:
    def refused(*words: str) -> str:
        ended = mine(*words)
        assert ended.code == 2, ended.out
        return ended.err

    where = ("--output-dir", "out")
    attribute = ("trace", "attribute", *FLAGS, *where, "--scalar")
    assert "import-recording" in refused(*attribute, "mine.py:loss")
    assert "has no 'nothing'" in refused("import-recording", "mine", "--module", "mine.py:nothing")
    assert "did you mean build?" in refused("import-recording", "mine", "--module", "mine.py:biuld")
    assert "'mine:build'; expected FILE.py" in refused(
        "import-recording", "mine", "--module", "mine:build"
    )
    wrong = "wrong.py:build"
    Path("wrong.py").write_text("from torch import nn\nbuild = lambda: nn.Linear(2, 2)\n")
    assert "parameter" in refused("import-recording", "mine", "--module", wrong)
    assert mine("import-recording", "mine", "--module", "mine.py:build").code == 0
    assert "no HookedTransformer" in refused(*attribute, "qk_match")
    assert "has no task" in refused(*attribute, "loss")
    assert "did you mean loss?" in refused(*attribute, "mine.py:lost")
    without = ("trace", "counterfactual", *FLAGS, *where, "--scalar", "mine.py:loss", "--edit")
    assert "which has no batch here" in refused(*without, "less,scale=weight_decay*0")
    svd = ("weight-svd-trace", "--config", "mine", "--checkpoint-dir", "mine/checkpoints")
    assert "no HookedTransformer" in refused(*svd, *where)
    namespace: dict[str, Any] = {"__name__": "again"}
    exec(compile(MINE.replace("range(10)", "range(9)"), "mine.py", "exec"), namespace)
    namespace["train"](overwrite=True)
    assert "was made after it" in refused(*attribute, "mine.py:loss")


def test_a_loop_that_diverged_is_told_where_its_numbers_end(circuit: Callable[..., Done]) -> None:
    build = "import torch\n\n\ndef build():\n    return torch.nn.Linear(2, 1)\n\n\n"
    size = "def size(module):\n    return module.weight.square().sum()\n"
    Path("line.py").write_text(build + size)
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e38)
    with library.watch(module, optimizer, "mine"):
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.ones(3, 2)).pow(4).sum().backward()
            optimizer.step()
    assert circuit("import-recording", "mine", "--module", "line.py:build").code == 0
    words = ("--scalar", "line.py:size", "--output-dir", "out")
    ended = circuit("trace", "attribute", *FLAGS, *words)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert "has diverged" in ended.err


def test_a_script_that_trains_when_it_is_imported_is_refused(mine: Callable[..., Done]) -> None:
    before = {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}
    Path("loop.py").write_text(
        MINE.replace("    train()", "    pass") + "\ntrain(overwrite=True)\n"
    )
    ended = mine("import-recording", "mine", "--module", "loop.py:build")
    assert ended.code == 2
    assert "trains under circuit.watch when it is imported" in ended.err
    assert before == {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["class Net:\n    def __init__(self, width):", "def Net():"])
def test_a_module_that_cannot_be_made_is_told(what: str, tmp_path: Path) -> None:
    path = tmp_path / "made.py"
    path.write_text(f"{what}\n        raise ValueError('no width')\n")
    with pytest.raises(CircuitError, match=r"made\.py:Net: raised \w+Error.*a function that makes"):
        named_module(f"{path}:Net")


def test_the_module_is_the_file_that_is_meant_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that stands above the recording, nor one of another folder later."""
    text = "import torch\n\n\ndef build():\n    return torch.nn.Linear(2, 1)\n"
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there, here / "below"):
        folder.mkdir()
        (folder / "made.py").write_text(text if folder == here else "raise SystemExit('another')")
    monkeypatch.chdir(here)
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for folder in (there / "recording", here / "below" / "recording", here / "recording"):
        with library.watch(module, optimizer, folder):
            module(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        made = import_recording(folder, "made.py:build").config.recorded.module
        assert made == ("made.py:build" if folder.parent == here else f"{here / 'made.py'}:build")
        monkeypatch.chdir(there)
        assert open_run(folder).model(1) is not None
        monkeypatch.chdir(here)


def test_a_scripts_own_optimizer_is_named_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class was `__main__`'s when the script was run, and is another module's now."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(
        "import torch\n\n\n"
        "class Mine(torch.optim.SGD):\n    pass\n\n\n"
        "def build():\n    return torch.nn.Linear(2, 1)\n"
    )
    script: dict[str, Any] = {"__name__": "__main__"}
    exec(Path("script.py").read_text(), script)
    module = script["build"]()
    optimizer = script["Mine"](module.parameters(), lr=0.1)
    with library.watch(module, optimizer, "mine"):
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    import_recording("mine", "script.py:build", optimizers=["script.py:Mine"])
    assert open_run("mine").verify().difference is None


# --- weights for the module, strictly -------------------------------------------------------------


class Tied(nn.Module):
    """Tied weights, a buffer that is not saved, one that is, and one that the loop makes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.unembed = nn.Linear(4, 5, bias=False)
        self.unembed.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("mask", torch.ones(4), persistent=False)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.cache is None:
            self.register_buffer("cache", torch.arange(4.0), persistent=False)
        logits: Tensor = self.unembed(self.embed(tokens) * self.mask * self.scale + self.cache)
        return logits


@pytest.fixture
def tied(circuit: Callable[..., Done]) -> tuple[Callable[..., Done], Tied]:
    module, tokens = Tied(), torch.arange(5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with library.watch(module, optimizer, "tied"):
        for _ in range(3):
            optimizer.zero_grad()
            module(tokens).logsumexp(-1).sum().backward()
            optimizer.step()
    return circuit, module


def test_a_checkout_loads_strictly(tied: tuple[Callable[..., Done], Tied]) -> None:
    from safetensors.torch import load_file

    circuit, module = tied
    ended = circuit("trace", "checkout", "tied", "--step", "3", "--output", "three.safetensors")
    assert ended.code == 0, ended.err
    weights, fresh = load_file("three.safetensors"), Tied()
    assert set(weights) == set(module.state_dict()) - {"cache"}
    fresh.load_state_dict(weights, strict=True)
    tokens = torch.arange(5)
    assert torch.equal(fresh(tokens), module(tokens))


def test_a_buffer_that_the_loop_has_made(tied: tuple[Callable[..., Done], Tied]) -> None:
    _, module = tied
    tokens = torch.arange(5)
    run = open_run("tied", module=Tied)
    assert run.model(0).cache is None
    assert torch.equal(run.model(3)(tokens), module(tokens))
    assert library.attribute(run, [lambda m: m(tokens)], 0, 3)["lambda"].steps[-1] == 3
    with pytest.raises(CircuitError, match=r"buffer cache .* did not have .*makes it anew"):
        open_run("tied", module=module).model(0)


def test_a_scalar_follows_buffers_that_come_and_go() -> None:
    module, tokens = Tied(), torch.arange(5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    expected = []

    def first(module: nn.Module) -> Tensor:
        return module(tokens)[0, 0]  # type: ignore[no-any-return]

    with library.watch(module, optimizer, scalars=[first], attribute=False) as watching:
        for step in range(4):
            optimizer.zero_grad()
            module(tokens).logsumexp(-1).sum().backward()
            if step % 2:
                module.cache = None
            optimizer.step()
            expected.append(first(module).item())
            module.cache = None if step % 2 else module.cache
    assert [row["scalars"]["first"] for row in watching.rows] == expected


def test_rows_tell_the_rate_of_every_group(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    groups = [{"params": [module.weight], "lr": 0.1}, {"params": [module.bias], "lr": 0.2}]
    optimizer, seen = torch.optim.SGD(groups), []
    with library.watch(
        module, optimizer, keep="rows", sinks=[lambda s, n: seen.append(n)]
    ) as watch:
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert watch.rows[0]["lr_by_group"] == {"0": 0.1, "1": 0.2}
    assert seen[0]["lr_by_group/1"] == 0.2
