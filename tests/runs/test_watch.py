"""circuit.watch records an untouched loop, and every step of it is there again, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import type_and_read
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from killed import calls_of, killed_at
from torch import Tensor, nn
from torch.nn import functional

import circuit
from circuit.artifacts import read_jsonl
from circuit.core.digests import tensors_digest
from circuit.core.update import OUTSIDE
from circuit.errors import CircuitError
from circuit.runs.recording import JOURNAL, ROWS, Recording

WORST_ULPS = 8.0
"""See tests/trace/test_terms.py."""


@dataclass
class Loop:
    """Somebody's own training loop: everything that a loop may do, as its fields say."""

    module: Callable[[], nn.Module] = lambda: nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    optimizer: Callable[[nn.Module], Any] = lambda m: torch.optim.AdamW(m.parameters(), lr=0.02)
    accumulate: int = 1
    clip: float | None = None
    scaler: bool = False
    schedule: bool = False
    closure: bool = False
    first: Callable[[nn.Module, Any], None] = lambda module, optimizer: None
    between: Callable[[int, nn.Module, Any], None] = lambda t, module, optimizer: None
    steps: int = 12
    seen: list[dict[str, Tensor]] = field(default_factory=list)
    buffers: list[dict[str, Tensor]] = field(default_factory=list)

    def build(self) -> tuple[nn.Module, Any]:
        torch.manual_seed(1)
        module = self.module()
        return module, self.optimizer(module)

    def run(self, module: nn.Module, optimizer: Any) -> None:
        """Trains; `seen` and `buffers` are those before the first step and after each."""
        optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        scaler = torch.amp.GradScaler("cpu", enabled=self.scaler, init_scale=1024.0)
        schedules = [
            torch.optim.lr_scheduler.CosineAnnealingLR(one, self.steps) for one in optimizers
        ]
        inputs, targets = torch.randn(16, 6), torch.randint(0, 3, (16,))
        self.first(module, optimizer)
        self.seen, self.buffers = [weights(module)], [buffers(module)]

        def backward() -> Tensor:
            for part in torch.arange(16).chunk(self.accumulate):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.scaler):
                    logits = module(inputs[part])
                    loss = functional.cross_entropy(logits, targets[part]) / self.accumulate
                scaler.scale(loss).backward()
            return loss.detach()

        for t in range(self.steps):
            if not self.closure:
                backward()
            for one in optimizers:
                if self.clip is not None:
                    scaler.unscale_(one)
                    torch.nn.utils.clip_grad_norm_(module.parameters(), self.clip)
                if self.closure:
                    one.step(closure=backward)
                else:
                    scaler.step(one)
                self.seen.append(weights(module))
                self.buffers.append(buffers(module))
            scaler.update()
            for one, schedule in zip(optimizers, schedules, strict=True):
                one.zero_grad()
                if self.schedule:
                    schedule.step()
            self.between(t, module, optimizer)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in module.named_buffers()}


class Tied(nn.Module):
    """One weight under two names, one that is frozen, one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.out.weight = self.embed.weight
        self.frozen, self.unused = nn.Linear(6, 6), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.frozen(self.embed(x))))


def groups(kind: Any, **settings: Any) -> Callable[[nn.Module], Any]:
    """Two groups: matrices decay, the rest does not and has another rate."""

    def build(module: nn.Module) -> Any:
        matrices = [p for p in module.parameters() if p.ndim > 1]
        rest = [p for p in module.parameters() if p.ndim < 2]
        decayed = {"params": matrices, "weight_decay": 0.1}
        return kind([decayed, {"params": rest, "weight_decay": 0.0, "lr": 0.05}], **settings)

    return build


def two(module: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon over the matrices, AdamW over the rest: as Muon is used."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim < 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


@torch.no_grad()
def unit_rows(t: int, module: nn.Module, _: Any) -> None:
    """As decoders of sparse autoencoders are kept, past the optimizer."""
    module[0].weight.data.div_(module[0].weight.data.norm(dim=1, keepdim=True))


def load_past(t: int, _: nn.Module, optimizer: Any) -> None:
    if t == 5:
        state = optimizer.state_dict()
        for remembered in state["state"].values():
            remembered["exp_avg"].zero_()
        optimizer.load_state_dict(state)


def load_all(t: int, module: nn.Module, optimizer: Any) -> None:
    """Back to an earlier checkpoint, as after a spike of the loss."""
    if t == 2:
        module.saved = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    if t == 6:
        module.load_state_dict(module.saved[0])
        optimizer.load_state_dict(module.saved[1])


class Halved(torch.optim.AdamW):
    """Somebody's own way around torch's step, which is hooked too where an AdamW has been made."""

    def __init__(self, parameters: Any, **settings: Any) -> None:
        torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
        super().__init__(parameters, **settings)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
        return super().step(closure)


class Raising(torch.optim.SGD):
    """A step without gradients is begun, and raises."""

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        if parameters[0].grad is None:
            with torch.no_grad():
                parameters[0].mul_(0.9)
            self.state[parameters[0]]["momentum_buffer"].mul_(0.9)
            raise MemoryError
        return super().step(closure)


def raise_once(t: int, module: nn.Module, optimizer: Any) -> None:
    if t == 6:
        module(torch.randn(16, 6))  # its buffers change
        with contextlib.suppress(MemoryError):
            optimizer.step()


def unfreeze(t: int, module: nn.Module, optimizer: Any) -> None:
    if t == 4:
        optimizer.add_param_group({"params": list(module[2].parameters()), "lr": 0.001})


def resume(module: nn.Module, optimizer: Any) -> None:
    """As Lightning does, inside of its `fit`."""
    other = torch.optim.AdamW(copy.deepcopy(list(module.parameters())), lr=0.01)
    for parameter in other.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    other.step()
    optimizer.load_state_dict(other.state_dict())


def halving(module: nn.Module) -> torch.optim.Optimizer:
    """A rate that a hook sets behind a step, for the next one."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)

    def halve(*_: Any) -> None:
        optimizer.param_groups[0]["lr"] *= 0.5

    optimizer.register_step_post_hook(halve)
    return optimizer


class Counted(nn.Module):
    """Its scale is a number; its counts are other tensors after every pass, and a list grows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("passes", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count = self.count + 1
            self.passes = self.count.double().repeat(int(self.count))
        return self.inner(x) * self.scale


class Kinds(nn.Module):
    """Counts past torch's counter of writes, and under inference_mode; of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        for name in ("passes", "seen", "kind"):
            self.register_buffer(name, torch.zeros(3, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes.data.add_(1)
            with torch.inference_mode():
                self.seen = torch.full((3,), int(self.passes[0]))
            self.kind = torch.ones(3, dtype=(torch.bfloat16, torch.float64)[int(self.seen[0]) % 2])
        return self.inner(x)


def with_buffers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))


ADAMW, SGD = torch.optim.AdamW, torch.optim.SGD
LOOPS: dict[str, Callable[[], Loop]] = {
    "plain": Loop,
    "everything": lambda: Loop(
        optimizer=groups(ADAMW, lr=0.02),
        accumulate=4,
        clip=0.5,
        scaler=True,
        schedule=True,
    ),
    "a closure, as Lightning": lambda: Loop(closure=True, optimizer=groups(ADAMW, lr=0.02)),
    "sgd, nesterov": lambda: Loop(optimizer=groups(SGD, lr=0.1, momentum=0.9, nesterov=True)),
    "adam, fused": lambda: Loop(optimizer=groups(torch.optim.Adam, lr=0.02, fused=True)),
    "amsgrad, foreach": lambda: Loop(
        optimizer=groups(ADAMW, lr=0.02, foreach=True, amsgrad=True, maximize=True)
    ),
    "tied, frozen, unused": lambda: Loop(module=Tied),
    "buffers and dropout": lambda: Loop(module=with_buffers),
    "two optimizers": lambda: Loop(optimizer=two),
    "changed between steps": lambda: Loop(between=unit_rows),
    "a state that is loaded": lambda: Loop(between=load_past),
    "weights, buffers and a state that are loaded": lambda: Loop(
        module=with_buffers, between=load_all
    ),
    "a step around another": lambda: Loop(optimizer=lambda m: Halved(m.parameters(), lr=0.02)),
    "a step that raises": lambda: Loop(
        module=with_buffers,
        optimizer=lambda m: Raising(m.parameters(), lr=0.1, momentum=0.9),
        between=raise_once,
    ),
    "a group that is added": lambda: Loop(
        optimizer=lambda m: ADAMW(m[0].parameters(), lr=0.02), between=unfreeze
    ),
    "a state that is loaded before the first step": lambda: Loop(first=resume),
    "a group that is added before the first step": lambda: Loop(
        optimizer=lambda m: ADAMW(m[0].parameters(), lr=0.02),
        first=lambda module, optimizer: unfreeze(4, module, optimizer),
    ),
    "a rate that a hook sets": lambda: Loop(optimizer=halving),
    "a number, a buffer that is replaced, an order of its own": lambda: Loop(
        module=Counted,
        accumulate=2,
        optimizer=lambda m: ADAMW(list(m.parameters())[::-1], lr=0.02),
    ),
    "buffers of any kind": lambda: Loop(module=Kinds),
    "rprop": lambda: Loop(optimizer=lambda m: torch.optim.Rprop(m.parameters())),
    "double precision": lambda: Loop(
        module=lambda: nn.Sequential(Cast(), nn.Linear(6, 3, dtype=torch.float64))
    ),
}


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


loops = pytest.mark.parametrize("make", LOOPS.values(), ids=list(LOOPS))


@loops
def test_the_loop_stays_as_it_is_and_every_state_is_there_again(
    make: Callable[[], Loop], tmp_path: Path
) -> None:
    plain, loop = make(), make()
    built = plain.build()
    torch.manual_seed(2)
    plain.run(*built)
    before = random.getstate(), np.random.get_state()[1].tolist()
    module, optimizer = loop.build()
    probe = torch.randn(4, 6)

    def margin(module: nn.Module) -> Tensor:
        logits = module(probe)
        drawn = torch.rand(()) + random.random() + float(np.random.rand())
        return logits[:, 0] - logits[:, 1] + drawn  # whatever it draws, the loop does not

    with circuit.watch(
        module, optimizer, tmp_path / "mine", scalars=[margin], every=5, anchor_every=5
    ) as watching:
        torch.manual_seed(2)
        loop.run(module, optimizer)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert watching.step == len(loop.seen) - 1
    for ours, theirs in zip(loop.seen, plain.seen, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    kinds = [type(one) for one in (optimizer if isinstance(optimizer, list) else [optimizer])]
    run = circuit.open_run(tmp_path / "mine", module=module, optimizers=kinds)
    assert run.steps == list(range(len(loop.seen)))
    for step in (*run.steps, 7, 3):
        state = run.state(step)
        assert all(torch.equal(state.parameters[n], loop.seen[step][n]) for n in loop.seen[step])
        found = state.buffers
        assert all(torch.equal(found[n], b) for n, b in loop.buffers[step].items())
    model = run.model(3)
    assert all(torch.equal(p, loop.seen[3][n]) for n, p in model.named_parameters())
    assert all(torch.equal(b, loop.buffers[3][n]) for n, b in model.named_buffers())
    assert "0 bits differ" in run.verify().law
    worst = 0.0
    for step in run.replay(0, watching.step):
        before, after = step.before.parameters.double(), step.after.parameters.double()
        assert torch.equal(before, run.layout.flatten(loop.seen[step.step - 1]).double())
        terms = torch.stack(list(step.update.named().values()))
        torch.testing.assert_close(terms.sum(0), after - before, rtol=0, atol=1e-12)
        worst = max(worst, step.update.rounding_ulps())
    print(f"rounding residual: {worst:.2f} ulps")
    assert worst <= WORST_ULPS


@pytest.mark.parametrize("attribute", [True, False])
def test_a_step_under_autocast_is_measured_as_any(attribute: bool) -> None:
    rows = []
    for under in (False, True):
        module, optimizer = Loop().build()

        def norm(module: nn.Module) -> Tensor:
            return module(torch.ones(2, 6)).square().sum()

        with circuit.watch(module, optimizer, scalars=[norm], attribute=attribute) as watching:
            for _ in range(3):
                module(torch.ones(2, 6)).sum().backward()
                with torch.autocast("cpu", torch.bfloat16, enabled=under):
                    optimizer.step()
        rows.append(watching.rows)
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["plain", "buffers and dropout", "changed between steps"])
def test_an_attribution_adds_up(name: str, tmp_path: Path) -> None:
    loop = LOOPS[name]()
    module, optimizer = loop.build()
    probe = torch.randn(4, 6)

    def margin(module: nn.Module) -> Tensor:
        logits = module(probe.to(module[0].weight.dtype))
        return logits[:, 0] - logits[:, 1]

    with circuit.watch(module, optimizer, tmp_path, scalars=[margin], every=4) as watching:
        loop.run(module, optimizer)
    run = circuit.open_run(tmp_path, module=module)
    told: dict[int, dict[str, float]] = {}
    series = circuit.attribute(run, [margin], 0, 12, dtype=torch.float64, sinks=[told.__setitem__])[
        "margin"
    ]
    assert [told[step]["margin/actual"] for step in range(1, 13)] == list(series.actual)
    assert series.closure().path_absolute < 1e-3
    assert (OUTSIDE in series.path) == (name == "changed between steps")
    assert set(series.groups["circuit"]) == {n.rpartition(".")[0] for n in loop.seen[0]}
    live = circuit.attribute(run, [margin], 0, 12)["margin"]
    for row in watching.rows:  # while the loop ran it was the same, number for number
        told = row["attribution"]["margin"]
        at = row["step"] - 1
        assert told["actual"] == live.actual[at]
        assert told["terms"] == {
            name: shares[at] for name, shares in live.path.items() if name in told["terms"]
        }
        (step,) = run.replay(at, at + 1)
        norms = {name: float(vector.norm()) for name, vector in step.update.named().items()}
        assert row["term_norms"] == pytest.approx({n: norms[n] for n in row["term_norms"]})
        assert row["update_norm"] == pytest.approx(float(step.update.total.norm()))
        assert row["gradient_norm"] == pytest.approx(float(step.gradient.norm()))
        assert row["rounding_ulps"] == step.update.rounding_ulps()
    assert read_jsonl(tmp_path / ROWS) == watching.rows


def test_steps_without_gradients_and_parameters_without_numbers(tmp_path: Path) -> None:
    module = nn.Linear(6, 2)
    module.register_parameter("none", nn.Parameter(torch.zeros(0, 3)))
    optimizer = ADAMW(module.parameters())

    def norm(module: nn.Module) -> Tensor:
        return module.weight.square().sum() + module.none.sum()

    with circuit.watch(module, optimizer, tmp_path, scalars=[norm]) as watching:
        optimizer.step()
        norm(module).backward()
        optimizer.step()
    assert watching.rows[0]["attribution"]["norm"]["actual"] == 0.0
    series = circuit.attribute(circuit.open_run(tmp_path, module=module), [norm], 0, 2)["norm"]
    assert series.path["adam_current_gradient"][0] == 0.0 != series.path["adam_current_gradient"][1]


FRESH = """
import json, sys
import circuit
from circuit.core.digests import tensors_digest
run = circuit.open_run(sys.argv[1])
steps = json.loads(sys.argv[2])
print(json.dumps({step: tensors_digest(run.state(step).parameters) for step in sorted(steps)}))
"""


def test_forty_steps_in_a_fresh_process_without_the_module(tmp_path: Path) -> None:
    loop = LOOPS["everything"]()
    loop.steps = 60
    module, optimizer = loop.build()
    with circuit.watch(module, optimizer, tmp_path):
        loop.run(module, optimizer)
    steps = random.Random(0).sample(range(61), 40)
    words = [sys.executable, "-c", FRESH, str(tmp_path), json.dumps(steps)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    expected = {str(step): tensors_digest(loop.seen[step]) for step in steps}
    equal = sum(found[step] == expected[step] for step in expected)
    print(f"{equal} of {len(steps)} equal")
    assert equal == len(expected) == 40


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Loop]:
    folder, loop = tmp_path_factory.mktemp("recorded") / "mine", Loop()
    module, optimizer = loop.build()
    with circuit.watch(module, optimizer, folder, anchor_every=5, scalars=[first]):
        loop.run(module, optimizer)
    return folder, loop


def first(module: nn.Module) -> Tensor:
    return module[0].weight[0, 0]


def test_a_kill_at_any_moment_loses_the_step_in_flight(tmp_path: Path) -> None:
    def record(name: str) -> Callable[[], None]:
        def work() -> None:
            loop = Loop(steps=7)
            module, optimizer = loop.build()
            begun = os.open(tmp_path / f"{name}.steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            optimizer.register_step_pre_hook(lambda *_: os.write(begun, b"x") and None)
            with circuit.watch(module, optimizer, tmp_path / name, anchor_every=3):
                loop.run(module, optimizer)

        return work

    record("warm")()  # imports what a fork has not to
    calls = calls_of(record("counted"))
    (tmp_path / "whole").mkdir()
    loop = Loop(steps=7)
    loop.run(*loop.build())
    draw, lost = random.Random(1), []
    for number in range(25):
        name = f"killed_{number}"
        killed_at(draw.randrange(calls), record(name))
        steps = tmp_path / f"{name}.steps"
        begun = steps.stat().st_size if steps.exists() else 0
        if begun == 0:
            continue
        recording = circuit.open_run(tmp_path / name)
        assert recording.steps[-1] >= begun - 1
        lost.append(begun - recording.steps[-1])
        state = recording.state(recording.steps[-1])
        seen = loop.seen[recording.steps[-1]]
        assert all(torch.equal(state.parameters[n], seen[n]) for n in seen)
    assert len(lost) > 5
    assert set(lost) <= {0, 1}


@laws(max_examples=40)
@given(cut=st.floats(0, 1))
def test_whatever_is_cut_off_the_last_file_the_rest_opens(
    recorded: tuple[Path, Loop], cut: float
) -> None:
    folder, loop = recorded
    last = sorted(folder.glob(f"steps/*{JOURNAL}"))[-1]
    whole = last.read_bytes()
    try:
        last.write_bytes(whole[: int(cut * len(whole))])
        run = circuit.open_run(folder)
        assert 10 <= run.steps[-1] <= 12
        state = run.state(run.steps[-1])
        assert all(torch.equal(t, loop.seen[state.step][n]) for n, t in state.parameters.items())
    finally:
        last.write_bytes(whole)


@laws(max_examples=60)
@given(where=st.integers(0, 2**31), bit=st.integers(0, 7), data=st.data())
def test_a_flipped_bit_is_refused(
    recorded: tuple[Path, Loop], where: int, bit: int, data: st.DataObject
) -> None:
    folder, loop = recorded
    files = sorted(path for path in folder.rglob("*") if path.suffix in (JOURNAL, ".json"))
    path = data.draw(st.sampled_from([p for p in files if "manifest" not in p.name]))
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[where % len(whole)] ^= 1 << bit
    try:
        path.write_bytes(changed)
        with contextlib.suppress(CircuitError):
            run = circuit.open_run(folder)
            states = [run.state(step) for step in run.steps]
            # what is left may end earlier, never be another
            for state in states:
                seen = loop.seen[state.step]
                assert all(torch.equal(t, seen[n]) for n, t in state.parameters.items())
    finally:
        path.write_bytes(whole)


class Noisy(torch.optim.SGD):
    """Draws in its step: cannot be taken again."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.add_(torch.randn_like(p))
        return super().step(closure)


class Signed(torch.optim.Optimizer):
    """A user's own."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign_(), alpha=group["lr"])  # changes the gradient in place, too


def test_a_class_that_is_not_torchs_is_passed_not_imported(tmp_path: Path) -> None:
    loop = Loop(optimizer=lambda m: Signed(m.parameters()))
    module, optimizer = loop.build()
    with circuit.watch(module, optimizer, tmp_path):
        loop.run(module, optimizer)
    with pytest.raises(CircuitError, match=r"none of torch's.*optimizers=\[Signed\]"):
        circuit.open_run(tmp_path).state(3)
    run = circuit.open_run(tmp_path, module=module, optimizers=[Signed])
    assert all(torch.equal(t, loop.seen[3][n]) for n, t in run.state(3).parameters.items())
    assert list(next(run.replay(2, 3)).update.terms) == ["rest"]


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "half precision": (
        lambda out: watched(out, module=lambda: Loop().module().bfloat16()),
        r"parameter 0.weight is torch.bfloat16; expected parameters of float32",
    ),
    "another module's": (
        lambda out: watched(out, optimizer=lambda m: ADAMW(nn.Linear(2, 2).parameters())),
        "is none of the module's",
    ),
    "capturable": (
        lambda out: watched(out, optimizer=lambda m: ADAMW(m.parameters(), capturable=True)),
        "AdamW has capturable=True",
    ),
    "several gradients a step": (
        lambda out: watched(
            out, closure=True, optimizer=lambda m: torch.optim.LBFGS(m.parameters())
        ),
        "LBFGS takes several gradients a step",
    ),
    "a draw in the step": (
        lambda out: watched(out, optimizer=lambda m: Noisy(m.parameters(), lr=0.1)),
        "did not take step 1 again",
    ),
    "a draw in the step of the second": (
        lambda out: watched(
            out,
            optimizer=lambda m: [SGD(m[0].parameters()), Noisy(m[2].parameters(), lr=0.1)],
        ),
        "did not take step 2 again",
    ),
    "fused unscaling": (
        lambda out: watched(
            out, scaler=True, optimizer=lambda m: ADAMW(m.parameters(), fused=True)
        ),
        r"fused=True unscales the gradient itself.*scaler.unscale_",
    ),
    "what is kept": (lambda out: watched(out, {"keep": "all"}), "'all'; expected gradients or"),
    "every": (lambda out: watched(out, {"every": 0}), "`every`: 0; expected at least 1"),
    "a wrapper": (
        lambda out: watched(out, optimizer=lambda m: [object()]),
        "object as optimizer",
    ),
    "a scalar without gradient": (
        lambda out: watched(out, {"scalars": [lambda m: m[0].weight.detach().sum()]}),
        "scalar lambda gives a number that has no gradient",
    ),
    "a scalar that is no tensor": (
        lambda out: watched(out, {"scalars": [lambda m: m[0].weight.sum().item()]}),
        "scalar lambda gives float; expected a tensor",
    ),
    "a scalar without numbers": (
        lambda out: watched(
            out, {"scalars": [lambda m: m[0].weight[:0].sum(1)], "attribute": False}
        ),
        "scalar lambda gives no number; expected a tensor",
    ),
    "no scalar": (lambda out: watched(out, {"scalars": [3]}), "3 is no scalar"),
    "no sink": (lambda out: watched(out, {"sinks": [3]}), "int is no sink"),
    "one optimizer twice": (
        lambda out: watched(out, optimizer=lambda m: [SGD(m.parameters())] * 2),
        "`optimizer`: one optimizer twice",
    ),
    "a parameter of another dtype": (
        lambda out: watched(out, module=Tied, first=lambda m, _: m.unused.double()),
        "parameter unused.weight has become .* torch.float64; expected .* torch.float32",
    ),
    "one name twice": (lambda out: watched(out, {"scalars": [first, first]}), "each once"),
    "a scalar alone": (
        lambda out: watched(out, {"scalars": first}),
        "first alone; expected several",
    ),
    "a sink alone": (lambda out: watched(out, {"sinks": print}), "print alone; expected several"),
    "module and optimizer the other way round": (
        lambda out: circuit.watch(ADAMW([nn.Parameter()]), nn.Tanh(), out).__enter__(),  # type: ignore[arg-type]
        "AdamW as module; expected an nn.Module",
    ),
    "a module as optimizer": (
        lambda out: watched(out, optimizer=lambda m: torch.nn.Bilinear(1, 1, 1)),
        "Bilinear as optimizer",
    ),
    "anew and on": (
        lambda out: watched(out, {"resume": True, "overwrite": True}),
        "`resume` and `overwrite` exclude each other",
    ),
    "on with numbers alone": (
        lambda out: watched(out, {"resume": True, "keep": "rows"}),
        "`resume` with `keep` rows, which holds no state; expected the folder of a recording",
    ),
    "a folder in use": (
        lambda out: (watched(out), watched(out)),
        "holds 3 files of an earlier `circuit watch`",
    ),
}


ADAMW_TERMS = ("weight_decay", "adam_current_gradient", "adam_historical_momentum")


def watched(out: Path, words: dict[str, Any] | None = None, **fields: Any) -> Loop:
    loop = Loop(**{"steps": 2, **fields})
    module, optimizer = loop.build()
    with circuit.watch(module, optimizer, out / "mine", **(words or {})):
        loop.run(module, optimizer)
    return loop


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_is_one_line(
    call: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CircuitError, match=message):
        call(tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUIT_DISK", "1MB")
    watched(tmp_path / "short", {"steps": 2})
    with pytest.raises(CircuitError, match=r"circuit.watch: would need .* of disk below"):
        watched(tmp_path / "long", {"steps": 5000})


def test_an_earlier_recording_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    watched(tmp_path)
    (tmp_path / "mine/steps/from_000099.journal").write_bytes(b"somebody's")
    watched(tmp_path, {"overwrite": True}, steps=3)
    assert (tmp_path / "mine/steps/from_000099.journal").read_bytes() == b"somebody's"
    (tmp_path / "mine/steps/from_000099.journal").unlink()
    with pytest.raises(CircuitError, match="3 is no scalar"):
        watched(tmp_path, {"overwrite": True, "scalars": [3]})
    assert circuit.open_run(tmp_path / "mine").steps == [0, 1, 2, 3]
    journal = tmp_path / "mine/steps/from_000000.journal"
    changed = bytearray(journal.read_bytes())
    changed[-1] ^= 1
    journal.write_bytes(changed)
    with pytest.raises(CircuitError, match="was changed since"):
        watched(tmp_path, {"overwrite": True})


def test_states_alone_and_rows_alone(tmp_path: Path) -> None:
    loop = LOOPS["buffers and dropout"]()
    loop = watched(
        tmp_path / "states", {"keep": "states", "every": 3}, steps=10, module=loop.module
    )
    run = circuit.open_run(tmp_path / "states/mine")
    assert run.steps == [0, 3, 6, 9]
    for step in run.steps:
        state = run.state(step)
        assert all(torch.equal(t, loop.seen[step][n]) for n, t in state.parameters.items())
        assert all(torch.equal(t, loop.buffers[step][n]) for n, t in state.buffers.items())
    with pytest.raises(CircuitError, match="holds states alone"):
        next(run.replay(0, 3))
    with pytest.raises(CircuitError, match="every 3 steps from 0 to 9"):
        run.state(4)
    for keep in ("rows", "gradients"):
        told = {"keep": keep, "scalars": [first], "every": 2}
        watched(tmp_path / keep, told, steps=8, between=unit_rows)
    rows, whole = (read_jsonl(tmp_path / keep / "mine" / ROWS) for keep in ("rows", "gradients"))
    assert rows == whole
    assert all(OUTSIDE in row["attribution"]["first"]["terms"] for row in rows)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(row["rounding_ulps"] <= WORST_ULPS for row in rows)
    for row in rows:
        told = row["attribution"]["first"]
        assert sum(told["terms"].values()) == pytest.approx(told["actual"], rel=1e-5)
    for words in ({}, {"module": first}):
        with pytest.raises(CircuitError, match=r"keep='rows', and no state.*circuit\.read_rows"):
            circuit.open_run(tmp_path / "rows/mine", **words)


def test_a_loop_that_diverges_goes_on_and_is_there_again(tmp_path: Path) -> None:
    """What is not a number is equal to itself, and null on the disk."""
    told: list[float] = []

    def spoil(t: int, module: nn.Module, optimizer: Any) -> None:
        if t == 3:
            optimizer.param_groups[0]["lr"] = float("inf")

    loop = watched(
        tmp_path,
        {
            "scalars": [first],
            "anchor_every": 2,
            "sinks": [lambda step, numbers: told.append(numbers["parameter_norm"])],
        },
        between=spoil,
        steps=9,
    )
    assert not torch.isfinite(loop.seen[9]["0.weight"]).any()
    assert [math.isfinite(norm) for norm in told] == [True] * 4 + [False] * 5
    run = circuit.open_run(tmp_path / "mine")
    assert "0 bits differ" in run.verify().law
    norms = [row["parameter_norm"] for row in run.recording.rows]
    assert norms == [*told[:4], *[None] * 5]
    assert all(row["rounding_ulps"] is None for row in run.recording.rows[4:])
    assert run.recording.columns == ADAMW_TERMS  # nothing has changed outside of the optimizer


def test_sinks_get_the_numbers_of_each_step(tmp_path: Path) -> None:
    class Log:
        def __init__(self) -> None:
            self.taken: list[tuple[int, dict[str, float]]] = []

        def log(self, numbers: dict[str, float], *, step: int) -> None:
            self.taken.append((step, numbers))

    class Writer:
        def __init__(self) -> None:
            self.taken: list[tuple[int, dict[str, float]]] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.taken.append((step, {name: value}))

    log, writer, called = Log(), Writer(), []
    loop = Loop(steps=4)
    module, optimizer = loop.build()
    with circuit.watch(
        module,
        optimizer,
        scalars=[first],
        attribute=False,
        every=2,
        sinks=[log, writer, lambda step, numbers: called.append((step, numbers))],
    ):
        loop.run(module, optimizer)
    values = [float(loop.seen[step]["0.weight"][0, 0]) for step in (2, 4)]
    expected = [
        (step, {"scalars/first": value}) for step, value in zip((2, 4), values, strict=True)
    ]
    assert log.taken == writer.taken == called == expected
    with circuit.watch(module, optimizer, sinks=[log]) as watching:
        optimizer.step()
    assert {"lr", "update_norm", "term_norms"} <= watching.rows[0].keys()
    assert log.taken[-1][1]["parameter_norm"] == watching.rows[0]["parameter_norm"]


def test_what_a_recording_has_not_is_said(recorded: tuple[Path, Loop]) -> None:
    folder, loop = recorded
    run = circuit.open_run(folder)
    for ask in (lambda: run.config, lambda: run.setup, lambda: run.header(1)):
        with pytest.raises(CircuitError, match="a loop of somebody's own, which has no"):
            ask()
    with pytest.raises(CircuitError, match="was opened without a module"):
        run.model(3)
    with pytest.raises(CircuitError, match=r"parameter 0.weight is \[2, 6\].*\[8, 6\]"):
        circuit.open_run(folder, module=nn.Sequential(nn.Linear(6, 2)))
    module, _ = loop.build()
    model = circuit.open_run(folder, module=lambda: module).model(7)
    assert all(torch.equal(p, loop.seen[7][n]) for n, p in model.named_parameters())


@pytest.fixture
def here(recorded: tuple[Path, Loop], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.chdir(tmp_path)
    return str(recorded[0])


def test_the_trace_commands_take_a_recording(
    here: str, recorded: tuple[Path, Loop], capsys: pytest.CaptureFixture[str]
) -> None:
    done = type_and_read(["trace", "show", here], capsys)
    assert (done.code, done.err) == (0, "")
    for fact in ("Sequential, 83 numbers in 4 parameters", "AdamW", "0 to 12", "3 stored"):
        assert fact in done.out
    assert type_and_read(["trace", "show", here, "--json"], capsys).payload["anchors"] == [0, 5, 10]
    done = type_and_read(["trace", "verify", here], capsys)
    assert "2 stored states compared; executed 12 steps" in done.out
    assert done.out.endswith("0 bits differ\n")
    done = type_and_read(["trace", "verify", here, "--steps", "3:9", "--json"], capsys)
    assert done.payload["steps"] == 6
    words = ["trace", "checkout", here, "--step", "7"]
    assert type_and_read([*words, "--output", "seven.safetensors"], capsys).code == 0
    from safetensors.torch import load_file

    seven = load_file("seven.safetensors")
    assert all(torch.equal(t, recorded[1].seen[7][n]) for n, t in seven.items())
    for more in ([], ["--output", "seven.pt"]):
        done = type_and_read([*words, *more], capsys)
        assert (done.code, "a .safetensors file" in done.err) == (2, True)
    beyond = ["trace", "checkout", here, "--step", "13", "--output", "x.safetensors"]
    assert type_and_read(beyond, capsys).code == 2
    assert type_and_read(["trace", "prune", here, "--anchor-every", "6"], capsys).code == 2
    done = type_and_read(["evaluate", "--config", here, "--checkpoint", "x.pt"], capsys)
    assert "is a recording of somebody's own loop, which has no config" in done.err


def test_a_step_that_differs_is_named(
    here: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.optim.AdamW.step

    def aside(self: Any, *words: Any) -> Any:
        taken = real(self, *words)
        if self.state[self.param_groups[0]["params"][0]]["step"] == 8:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] += 1e-3
        return taken

    monkeypatch.setattr(torch.optim.AdamW, "step", aside)
    done = type_and_read(["trace", "verify", here], capsys)
    assert done.code == 1
    assert "step 8 is not the recorded one: torch.optim.adamw.AdamW moved" in done.out
    assert type_and_read(["trace", "verify", here, "--json"], capsys).payload["equal"] is False
    with pytest.raises(CircuitError, match="step 8 is not the recorded one"):
        circuit.open_run(here).state(9)


def test_recordings_of_equal_loops_are_equal_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "a/mine", tmp_path / "b/mine"]
    for folder in folders:
        watched(folder.parent)
    one, other = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders
    )
    assert one == other
    assert Recording(folders[0]).size > 0
