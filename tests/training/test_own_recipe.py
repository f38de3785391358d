"""Recipes of somebody's own: trained, resumed, traced, replayed, attributed as any other run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import type_and_read

import circuit
from circuit.artifacts import dump_rows, read_jsonl
from circuit.attribution import influence
from circuit.attribution.losses import Losses
from circuit.core.edit import Edit
from circuit.core.flat import ParameterLayout
from circuit.errors import CircuitError
from circuit.model.weights import load_tensors
from circuit.plugins import code_digests, import_named_file
from circuit.trace.compare import state_difference
from circuit.trace.record import RecordOptions, record_trace
from circuit.trace.replay import ReplayedRun
from circuit.trace.store import MANIFEST
from circuit.trace.while_training import DEFAULT_FOLDER, TraceRecorder
from circuit.train_config import RecipeConfig, TrainConfig, load_run_config
from circuit.training.loop import train
from circuit.training.own_recipe import check_code, recipe_config

RECIPE = """
import torch
from torch import nn

import circuit

torch.manual_seed(0)
pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
sums = pairs.sum(1) % 5


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"], state["taken"] = torch.zeros_like(p), 0
                state["taken"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((0.9 * state["mean"] + 0.1 * p.grad).sign(), alpha=-group["lr"])
                state["mean"].mul_(0.99).add_(p.grad, alpha=0.01)


class Sums(circuit.Recipe):
    steps, checkpoint_every, log_every, clip = 8, 4, 1, 0.5
    decoupled_decay = True

    def module(self):
        module = nn.Sequential(
            nn.Embedding(5, 4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 6), nn.Tanh(),
            nn.Linear(6, 5),
        )
        module[5].bias.requires_grad_(False)  # frozen
        return module

    def batch(self, step):
        rows = torch.randint(len(pairs), (6,))
        return circuit.Batch(pairs[rows], sums[rows], rows)

    def losses(self, outputs, batch):
        each = nn.functional.cross_entropy(outputs, batch.targets, reduction="none")
        return each / batch.size

    def optimizer(self, module):
        weights = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim < 2 and p.requires_grad]
        return OPTIMIZER
"""
RATES = """
    def rates(self, step):
        return [0.01 * step, 0.02]

    def decays(self, step):
        return [0.1 / step, 0.2]
"""
GROUPS = '[{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 0.02}]'
SHARED = {
    "adamw": f"torch.optim.AdamW({GROUPS}, lr=0.01, weight_decay=0)",
    "sgd": f"torch.optim.SGD({GROUPS}, lr=0.1, momentum=0.9)",
}
"""One rule with rates and decays by group: through these data can be credited."""
SPLIT = {
    **SHARED,
    "adam": f"torch.optim.Adam({GROUPS}, lr=0.01, amsgrad=True)",
    "nesterov": "torch.optim.SGD(others, lr=0.1, momentum=0.9, dampening=0.1)",
}
OTHERS = {
    "lion": "Lion(weights + others, 0.01)",
    "adafactor": "torch.optim.Adafactor(weights + others, lr=0.01)",
    "rmsprop": "torch.optim.RMSprop(weights + others, lr=0.01, momentum=0.5)",
}
OPTIMIZERS = SPLIT | OTHERS


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An own folder; what is imported is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_run", "my_scalars"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("my_run", "scalars_of_sums", "parts") or name.startswith(
            "circuit_file_"
        ):
            del sys.modules[name]


def written(optimizer: str = SHARED["adamw"], *changes: tuple[str, str], more: str = "") -> str:
    """A recipe file, and the word that names it."""
    text = RECIPE.replace("OPTIMIZER", optimizer) + more
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Path("my_run.py").write_text(text)
    return "my_run.py:Sums"


def trained(code: str, folder: str = "run", **switches: Any) -> RecipeConfig:
    """A run of a recipe, traced in the same pass."""
    config = recipe_config(code, folder, seed=3)
    train(config, recorder=TraceRecorder(None, RecordOptions(anchor_every=3)), **switches)
    return config


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Of what equal runs share."""
    kinds = ("*.pt", "*.jsonl", MANIFEST, "run_config.json")
    files = [path for kind in kinds for path in folder.rglob(kind)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_of_a_recipe_is_exact(name: str) -> None:
    """Resumed: the bytes of the straight run; traced after it: those of the trace in the pass.

    Every step replays, and the terms sum to the update.
    """
    rates = RATES if GROUPS in OPTIMIZERS[name] else ""
    code = written(OPTIMIZERS[name], more=rates)
    config = trained(code)
    straight = bytes_below(Path("run"))
    assert len(straight) == 2 + 4 + 2 + 2  # checkpoints, anchors, rows, documents
    trained(code, overwrite=True, stop_at=5)
    trained(code, resume=True)
    again = bytes_below(Path("run"))
    del again["checkpoints/step_000005.pt"]  # where it stopped
    assert again == straight
    record_trace(config, "trace", RecordOptions(end_step=8, anchor_every=3))
    assert bytes_below(Path("trace")) == bytes_below(Path("run") / DEFAULT_FOLDER)
    trace = ReplayedRun.open("trace", recipe=code)
    found = trace.verify()
    assert found.equal
    assert found.compared_anchors == 3
    assert all(row["rounding_ulps"] <= 8 for row in trace.store.rows)
    assert trace.store.rows[0]["token_accuracy"] is None
    assert [step.step for step in circuit.open_run("run", recipe=code).replay(2, 4)] == [3, 4]
    states = circuit.open_run("run")
    assert state_difference(states.state(4), trace.state(4)) is None
    for step in trace.replay(0, 8):
        total = sum(step.update.named().values())
        torch.testing.assert_close(total, step.update.total, rtol=0, atol=1e-12)
        settings = [group.settings for group in step.moved.groups]
        if rates:
            assert [of["lr"] for of in settings] == [0.01 * step.step, 0.02]
            assert [of["weight_decay"] for of in settings] == [0.1 / step.step, 0.2]


def shift(module: torch.nn.Module) -> torch.Tensor:
    """A number of the weights, without a kink."""
    outputs: torch.Tensor = module(torch.tensor([[1, 2], [3, 4], [0, 2]]))
    return outputs[:, 0] - outputs[:, 1]


@pytest.mark.parametrize("name", SHARED)
def test_terms_and_examples_add_up(name: str) -> None:
    """Without dropout, which the loss of one example cannot draw again."""
    code = written(SHARED[name], ("nn.Dropout(0.2)", "nn.Identity()"))
    trained(code)
    run = circuit.open_run("run", recipe=code)
    whole = circuit.attribute(run, [shift], 0, 8, dtype=torch.float64)["shift"]
    assert whole.closure().path < 1e-4
    parts = [circuit.attribute(run, [shift], *w, dtype=torch.float64) for w in ((0, 4), (4, 8))]
    assert torch.equal(
        torch.as_tensor(whole.actual),
        torch.cat([torch.as_tensor(part["shift"].actual) for part in parts]),
    )
    credit = circuit.credit(run, [shift], 0, 8, dtype=torch.float64)["shift"]
    assert credit.totals["closure"] is not None
    assert credit.totals["closure"] < 1e-4
    assert credit.totals["examples_error"] is not None
    assert credit.totals["examples_error"] < 1e-5
    assert set(credit.by_example()) <= set(map(str, range(25)))


def test_what_draws_in_training_has_no_influence_and_no_credit() -> None:
    """A gradient that cannot be computed again would be another's: its slope, and its parts."""
    code = written()
    trained(code)
    with pytest.raises(CircuitError, match="gradient of step 8 is another when it is computed aga"):
        circuit.influence(circuit.open_run("run", recipe=code), [shift], 0, 8)
    with pytest.raises(CircuitError, match="have other gradients than those that were taken"):
        circuit.credit(circuit.open_run("run", recipe=code), [shift], 0, 8)


def test_momentum_that_rests_is_refused() -> None:
    """A parameter without a gradient at a step keeps all of its momentum there."""
    last = "module[-1](module[:-1](batch.inputs).detach())"
    code = written(
        SHARED["sgd"],
        ("nn.Dropout(0.2)", "nn.Identity()"),
        ("(6,)", "(5 + step % 2,)"),
        more=f"""
    def outputs(self, module, batch):
        return {last} if batch.size == 5 else module(batch.inputs)
""",
    )
    trained(code)
    run = circuit.open_run("run", recipe=code)
    assert circuit.attribute(run, [shift], 0, 4)["shift"].closure().path < 1e-2
    with pytest.raises(CircuitError, match=r"momentum that rests: 0.weight has no gradient at ste"):
        circuit.credit(run, [shift], 0, 4)


def test_a_token_whose_loss_is_masked_cannot_be_left_out() -> None:
    masked = ("return each / batch.size", "return torch.stack([each, each * 0], 1) / batch.size")
    code = written(SHARED["sgd"], masked)
    trained(code)
    run = ReplayedRun.open(f"run/{DEFAULT_FOLDER}", recipe=code)
    (step,) = run.replay(4, 5)
    name = step.objective.ids[0]
    assert run.counterfactual(Edit(4, 5, {f"{name}@0": 0.0}), 5).step == 5
    for at in (1, 2):
        with pytest.raises(CircuitError, match=f"nothing at position {at}; expected .* such as 0$"):
            run.counterfactual(Edit(4, 5, {f"{name}@{at}": 0.0}), 5)


def test_a_penalty_is_no_examples() -> None:
    """It would be left out with the first of them."""
    summed = "return super().loss(outputs, batch) + 0.01"
    code = written(more=f"\n    def loss(self, outputs, batch):\n        {summed}\n")
    trained(code)
    run = ReplayedRun.open(f"run/{DEFAULT_FOLDER}", recipe=code)
    assert run.counterfactual(Edit(4, 5, settings={"clip": 0.5}), 6).step == 6
    (step,) = run.replay(4, 5)
    with pytest.raises(CircuitError, match=r"losses of the examples sum to .*, and the loss is"):
        run.counterfactual(Edit(4, 5, {step.objective.ids[0]: 0.0}), 6)
    with pytest.raises(CircuitError, match=r"at position 1; expected losses\(\) by example and"):
        run.counterfactual(Edit(4, 5, {f"{step.objective.ids[0]}@1": 0.0}), 6)


def test_influence_is_the_slope_where_parameters_are_frozen() -> None:
    """Of whole trainings, by central differences; the gradient is clipped without the frozen."""
    doubled = ("        return module\n", "        return module.double()\n")
    code = written(SHARED["sgd"], ("nn.Dropout(0.2)", "nn.Identity()"), doubled)
    trained(code)
    run = ReplayedRun.open(f"run/{DEFAULT_FOLDER}", recipe=code)
    assert all(step.clip < 1 for step in run.replay(0, 4))
    found = circuit.influence(run, [shift], 0, 4)["shift"].by_example()
    module, layout = run.module(), ParameterLayout.of_model(run.module())
    for name in list(found)[:2]:
        values = []
        for weight in (1 + 1e-4, 1 - 1e-4):
            end = run.counterfactual(Edit(0, 4, {name: weight}), 4).parameters
            load_tensors(module, layout.unflatten(end))
            values.append(float(shift(module).detach().mean()))
        slope = (values[0] - values[1]) / 2e-4
        assert found[name] == pytest.approx(slope, rel=1e-5)


OTHER_BITS = """
    def loss(self, outputs, batch):
        return -outputs.softmax(1).log()[range(batch.size), batch.targets].mean()
"""


@pytest.mark.parametrize(("loss", "again"), [("", 1), (OTHER_BITS, 8)])
@pytest.mark.parametrize("name", SHARED)
def test_held_graphs_change_no_bit_of_influence(
    name: str, loss: str, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is held where the losses have another gradient than the loss, in its last bits."""
    code = written(SHARED[name], ("nn.Dropout(0.2)", "nn.Identity()"), more=loss)
    trained(code)
    run, gradient, taken = circuit.open_run("run", recipe=code), Losses.gradient, []

    def counted(*args: Any) -> Any:
        taken.append(args)
        return gradient(*args)

    monkeypatch.setattr(Losses, "gradient", counted)
    held = circuit.influence(run, [shift], 0, 8)["shift"]
    assert len(taken) == again
    monkeypatch.setattr(influence, "memory_limit", lambda: 0)
    anew = circuit.influence(run, [shift], 0, 8)["shift"]
    assert len(taken) == again + 8
    assert torch.equal(held.influence, anew.influence)
    assert held.growth == anew.growth


@pytest.mark.parametrize("name", [*OTHERS, "adam"])
def test_data_are_credited_through_no_other_optimizer(name: str) -> None:
    code = written(OPTIMIZERS[name], ("nn.Dropout(0.2)", "nn.Identity()"))
    trained(code)
    run = circuit.open_run("run", recipe=code)
    with pytest.raises(CircuitError, match="data cannot be credited through"):
        circuit.credit(run, [shift], 0, 4)


def test_code_is_executed_only_where_it_is_named() -> None:
    """Opening, showing and reading states execute nothing; a changed file is never executed."""
    trained(written())
    mark = "\nopen('executed', 'w').close()\n"
    Path("my_run.py").write_text(Path("my_run.py").read_text() + mark)
    run = circuit.open_run("run")
    assert run.state(4).step == 4
    assert "my_run.py:Sums" in repr(run)
    trace = circuit.open_run(Path("run") / DEFAULT_FOLDER)
    assert trace.state(3).step == 3
    for ask in (
        lambda: trace.state(4),
        lambda: run.model(4),
        lambda: list(run.replay(0, 2)),
        lambda: train(load_run_config("run"), resume=True),
    ):
        with pytest.raises(CircuitError, match=r"executed only where it is named.*`recipe`"):
            ask()
    named = circuit.open_run("run", recipe="my_run.py:Sums")
    with pytest.raises(CircuitError, match=r"my_run\.py: has changed since the run: sha256"):
        named.model(4)
    with pytest.raises(CircuitError, match="of another class, Sums"):
        circuit.open_run("run", recipe="my_run.py:Other").model(4)
    assert not Path("executed").exists()
    Path("kept.py").write_text(Path("my_run.py").read_text().removesuffix(mark))
    assert circuit.open_run("run", recipe="kept.py:Sums").model(4) is not None


def test_what_it_imports_from_beside_itself_is_held_against_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Directly or in turn; nothing of another folder, and nothing that is not imported."""
    code = written(more="\nfrom parts import sizes\n\n\ndef later():\n    import parts.deep\n")
    beside = {
        "parts/__init__.py": "",
        "parts/sizes.py": "from .also import two\nimport json\n",
        "parts/also.py": "two = 2\n",
        "parts/deep.py": "",
    }
    Path("parts").mkdir()
    for name, text in {**beside, "parts/unused.py": "", "json": ""}.items():
        Path(name).write_text(text)
    train(recipe_config(code, "run", steps=1))
    assert set(load_run_config("run").recipe.imports) == set(beside)
    Path("parts/unused.py").write_text("changed = True\n")
    check_code(load_run_config("run").executing(code))
    Path("parts/also.py").write_text("two = 3\n")
    with pytest.raises(CircuitError, match=r"also\.py: has changed since this process imported it"):
        check_code(load_run_config("run").executing(code))
    for name in ("parts", "parts.sizes", "parts.also"):  # as in a new process
        monkeypatch.delitem(sys.modules, name)
    for name, text in beside.items():
        Path(name).write_text(f"{text}\nnew = 1\n")
        with pytest.raises(CircuitError, match=rf"{name}: has changed since the run: sha256"):
            circuit.open_run("run", recipe=code).model(1)
        with pytest.raises(CircuitError, match="cannot resume with another config: recipe"):
            train(recipe_config(code, "run", steps=1), resume=True)
        Path(name).write_text(text)
    Path("parts/deep.py").unlink()
    with pytest.raises(CircuitError, match=r"deep\.py: is gone or no longer imported"):
        circuit.open_run("run", recipe=code).model(1)
    Path("elsewhere").mkdir()
    Path("parts").rename("elsewhere/parts")
    Path("parts").symlink_to("elsewhere/parts")
    assert "parts/sizes.py" in recipe_config(code, "linked").recipe.imports
    Path("json.py").write_text("")
    with pytest.raises(CircuitError, match=r"imports json, which stands beside it, and gets ano"):
        recipe_config(code, "other")


def test_equal_files_are_executed_where_they_stand() -> None:
    for folder in ("one", "other"):
        Path(folder).mkdir()
        Path(folder, "mine.py").write_text(
            "from pathlib import Path\nat = Path(__file__).parent.name"
        )
        assert import_named_file(f"{folder}/mine.py", what="it").at == folder


def test_a_recipe_that_is_edited_is_what_other_files_import() -> None:
    for number in (1, 2):
        recipe_config(written(more=f"\nnumber = {number}\n"), "run", steps=1)
        assert import_module("my_run").number == number


def test_a_folder_of_the_same_name_on_the_path_is_no_other_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("above/helping").mkdir(parents=True)
    monkeypatch.syspath_prepend(Path("above").absolute())
    Path("helping.py").write_text("")
    Path("mine.py").write_text("import helping")
    assert set(code_digests("mine.py")) == {"mine.py", "helping.py"}


COUNT = "self.n = getattr(self, 'n', 0) + 1"
BUFFER = "module.register_buffer('b', torch.tensor(self.n))"
NAMED = "module.register_parameter(f'b{self.n}', nn.Parameter(torch.ones(1)))"
BATCH = "    def batch("


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("nn.Tanh()", "nn.BatchNorm1d(6)"), r"step 1 has changed the buffer 4\.running_mean"),
        (("rows = torch", "pairs.add_(1).remainder_(5); rows = torch"), "batch.1. gives other inp"),
        (("return module\n", "module[3].bias.data += id(module) % 7e5; return module\n"), "module"),
        (('reduction="none"', 'reduction="sum"'), r"losses\(\) gives \[\].*\[6, \.\.\.\]"),
        (("batch.targets, red", "batch.targts, red"), r"my_run\.py:\d+: losses\(\) raised Attrib"),
        (("def module", "def modul"), "'Sums' does not define module"),
        (("pairs[rows], sums", "pairs[rows][:2], sums"), "gives 2 inputs, 6 targets and 6"),
        (("class Sums(circuit.Recipe)", "class Sums"), "'Sums' is no recipe"),
        (("import torch\n", "import torch, nowhere\n"), "the file raised ModuleNotFoundError"),
        (("nn.Embedding(5, 4)", "nn.Embedding(5, 4).half()"), "module.. has torch.float16"),
        (("steps, ch", "steps, seed, ch"), "raised"),
        (("return module\n", f"{COUNT}; {BUFFER}; return module\n"), "module.. gives another b at"),
        (
            ("return module\n", f"{COUNT}; {NAMED}; return module\n"),
            r"module.. gives another b\d at",
        ),
        (
            (BATCH, RATES.replace("0.02]", "0.02] if step < 2 else None") + BATCH),
            r"rates\(2\) gives",
        ),
        ((BATCH, RATES.replace("0.02]", "-0.02]") + BATCH), r"rates\(1\) gives \[0\.01, -0\.02\]"),
        (
            (BATCH, RATES.replace(", 0.02]", "]") + BATCH),
            r"rates\(1\) gives \[0\.01\]; expected .* each of the 2 parameter groups",
        ),
        (
            (BATCH, RATES.replace("[0.01 * step, 0.02]", "1e-3") + BATCH),
            r"rates\(1\) gives 0\.001; expected a list with one number for each",
        ),
        (("1, 0.5", "1, -0.5"), "clip is -0.5; expected None, or a finite number above 0"),
        (("sums[rows], rows)", "sums[rows], rows + 0.5)"), "and 6 numbers of examples of float32"),
        (("sums[rows], rows)", "sums[rows], rows[:, None])"), "and 6 x 1 numbers of examples"),
        (("return module\n", "return module.to('meta')\n"), r"module\(\) raised NotImplementedErr"),
        (("return module\n", "raise GeneratorExit\n"), r"module\(\) raised GeneratorExit"),
        (("return module\n", "raise SystemExit\n"), r"module\(\) raised SystemExit"),
        ((BATCH, "    def update(self, *_):\n        pass\n\n" + BATCH), "'Sums' defines update"),
    ],
)
def test_what_cannot_be_taken_again_is_refused(changes: tuple[str, str], says: str) -> None:
    """In one line; where the first step tells, before there is a folder of a run."""
    code = written(SHARED["adamw"], changes)
    with pytest.raises(CircuitError, match=says) as refusal:
        train(recipe_config(code, "run"))
    assert "\n" not in str(refusal.value)
    assert Path("run/run_config.json").exists() == (says == r"rates\(2\) gives")


def test_rates_may_be_tensors() -> None:
    """The trace tells them as numbers."""
    tensors = RATES.replace("[0.01 * step, 0.02]", "torch.tensor([0.01 * step, 0.5])")
    trained(written(SHARED["sgd"].replace("lr=0.1", "lr=torch.tensor(0.1)"), more=tensors))
    rows = read_jsonl(Path("run") / DEFAULT_FOLDER / "optimizer_update_trace_rows.jsonl")
    assert [row["lr"] for row in rows[:2]] == pytest.approx([0.01, 0.02])


def test_settings_that_an_optimizer_changes_are_refused() -> None:
    growing = (
        "for group in self.param_groups:\n",
        'for group in self.param_groups:\n            group["weight_decay"] *= 2\n',
    )
    code = written(OTHERS["lion"], growing)
    with pytest.raises(CircuitError, match="step 1 has changed 'weight_decay' of a parameter"):
        train(recipe_config(code, "run"))


TRACE = f"run/{DEFAULT_FOLDER}"
READING = f"--config run --recipe my_run.py:Sums --optimizer-trace-dir {TRACE}"
SCALAR = "--scalar scalars_of_sums:first,by=2"


def typed(words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """A command line that is taken."""
    done = type_and_read(words.split(), capsys)
    assert done.code == 0, done.err
    return done


def typed_run(capsys: pytest.CaptureFixture[str]) -> str:
    """A traced run, and a scalar that imports its file."""
    code = written(SHARED["adamw"], ("nn.Dropout(0.2)", "nn.Identity()"))
    Path("scalars_of_sums.py").write_text(
        "from my_run import pairs\n\n\ndef first(module, by: float = 1.0):\n"
        "    return by * module(pairs[:4])[:, 0]\n"
    )
    typed(f"train --recipe {code} --output-dir run --seed 2 --steps 6 --trace", capsys)
    return code


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """From a file to an attribution; what needs a task says so in one line."""
    code = typed_run(capsys)
    config = load_run_config("run")
    assert (config.seed, config.steps, config.name) == (2, 6, "Sums")
    assert code in typed(f"trace show {TRACE}", capsys).out
    assert "0 bits differ" in typed(f"trace verify {TRACE} --recipe {code}", capsys).out
    typed(f"trace checkout {TRACE} --step 5 --recipe {code}", capsys)
    typed(f"trace attribute {READING} {SCALAR} --output-dir whole", capsys)
    rows = read_jsonl(Path("whole/scalar_attribution_rows.jsonl"))
    assert {row["scalar"] for row in rows} == {"first.by=2"}
    asked = typed("page run", capsys).out
    line = next(line for line in asked.splitlines() if line.startswith("  circuit "))
    words = line.removeprefix("  circuit ").replace("FILE.py:NAME", SCALAR.split()[1])
    typed(words, capsys)
    assert " from analysis/NAME/scalar_attribution" in typed("page run --overwrite", capsys).out
    metrics = read_jsonl(Path("run/metrics.jsonl"))
    for wrong in (metrics[-1] | {"loss": "low"}, {"kind": "train"}):
        Path("run/metrics.jsonl").write_text(dump_rows([*metrics[:-1], wrong]))  # digests are right
        done = type_and_read(["page", "run", "--overwrite"], capsys)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert "run/metrics.jsonl: holds other values than this program writes" in done.err
    Path("run/metrics.jsonl").write_text(dump_rows(metrics))
    for words, says in (
        (f"trace verify {TRACE}", f"--recipe {code}"),
        ("train", "missing option '--config'"),
        (f"train --recipe {code}", "--output-dir: is missing"),
        (f"train --config run --recipe {code} --seed 3 --resume", "--seed goes with --recipe"),
        (f"trace attribute {READING} --scalar loss --output-dir x", "reads records of a task"),
        ("weight-svd-trace --config run --checkpoint-dir run/checkpoints --output-dir x", "model"),
        ("evaluate --config run --checkpoint run/checkpoints/step_000006.pt", "has no task"),
    ):
        done = type_and_read(words.split(), capsys)
        assert (done.code, done.err.count("\n")) == (2, 1), words
        assert says in done.err, done.err


def test_a_run_that_leaves_its_trace_behind_names_its_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = written(SHARED["adamw"])
    train = f"train --recipe {code} --output-dir run --steps 6"
    typed(f"{train} --stop-at-step 2 --trace", capsys)
    said = typed(f"{train} --resume", capsys).out.splitlines()[-1]
    typed(said.partition("finish it with: circuit ")[2], capsys)
    assert "0 bits differ" in typed(f"trace verify {TRACE} --recipe {code} --steps 0:6", capsys).out


@pytest.mark.system
def test_shards_examples_and_edits(capsys: pytest.CaptureFixture[str]) -> None:
    """Shards of traces that were recorded apart are merged into the rows of the whole."""
    code = typed_run(capsys)
    part = f"trace record --config run --recipe {code} --num-steps 4 --output-dir part"
    typed(f"{part} --resume-checkpoint {TRACE}/checkpoints/step_000002.pt", capsys)
    for trace, folder, window in (
        (TRACE, "whole", ""),
        (TRACE, "a", "--end-step 2"),
        ("part", "b", "--start-step 2"),
    ):
        reading = READING.replace(TRACE, trace)
        typed(f"trace attribute {reading} {SCALAR} {window} --output-dir {folder}", capsys)
    typed("trace merge merged a b", capsys)
    rows = "scalar_attribution_rows.jsonl"
    assert Path("merged", rows).read_bytes() == Path("whole", rows).read_bytes()
    typed(f"trace data {READING} {SCALAR} --output-dir credit --by position", capsys)
    typed(f"trace influence {READING} {SCALAR} --output-dir influence --check 1", capsys)
    edit = "--edit none,scale=weight_decay*0 --edit out,drop=3 --output-dir otherwise"
    done = typed(f"trace counterfactual {READING} {SCALAR} {edit}", capsys)
    assert "0 bits differ" in done.out


def test_a_config_of_a_recipe_has_no_task() -> None:
    """Whatever is asked of it that belongs to a task is refused; the digest is of the code."""
    config: TrainConfig = recipe_config(written(), "run")
    for name in ("model", "benchmark_dir", "optimizer", "train_split", "best"):
        with pytest.raises(CircuitError, match=r"of the recipe my_run\.py:Sums, and of no task"):
            getattr(config, name)
    other = recipe_config(written(OTHERS["lion"]), "run")
    assert "sha256" in str(config.recipe_difference(other))
    assert config.recipe_difference(config.replace(steps=3, log_every=2)) is None
    with pytest.raises(CircuitError, match="field 'model'"):
        recipe_config("my_run.py:Sums", "run", overrides=["model=1"])
