"""A recording that goes on where its loop was restarted: the one of a loop that was never cut."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import type_and_read
from torch import nn

import circuit
from circuit.artifacts import read_jsonl
from circuit.errors import CircuitError
from circuit.runs.recording import ROWS, Recording

STEPS = 12


class Loop:
    """Sums of two numbers, with running statistics; a step is a function of its number."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.01)
        self.step = 0

    def state(self) -> dict[str, Any]:
        """As the loop saves it."""
        parts = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy({**parts, "step": self.step})

    @classmethod
    def at(cls, state: dict[str, Any]) -> Loop:
        """Restarted."""
        loop, state = cls(), copy.deepcopy(state)
        loop.module.load_state_dict(state["module"])
        loop.optimizer.load_state_dict(state["optimizer"])
        loop.step = state["step"]
        return loop

    def take(self) -> None:
        self.step += 1
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(self.step))
        self.optimizer.zero_grad()
        self.module(inputs).square().mean().backward()
        self.optimizer.step()


def norm(module: nn.Module) -> torch.Tensor:
    """A number of the weights."""
    return next(module.parameters()).square().sum()


def recorded(loop: Loop, folder: str, until: int, **switches: Any) -> dict[int, dict[str, Any]]:
    """Record up to a step; the states that the loop has saved."""
    switches = {"anchor_every": 5, "scalars": [norm], "attribute": False, **switches}
    saved = {loop.step: loop.state()}
    with circuit.watch(loop.module, loop.optimizer, folder, **switches):
        while loop.step < until:
            loop.take()
            saved[loop.step] = loop.state()
    return saved


def _until(loop: Loop, at: int, saved: dict[int, dict[str, Any]]) -> None:
    while loop.step < at:
        loop.take()
        saved[loop.step] = loop.state()
    raise KeyboardInterrupt


def cut_off(folder: str, at: int, **switches: Any) -> dict[int, dict[str, Any]]:
    """The states that a loop has saved that ends in the step behind one."""
    loop, saved = Loop(), {}
    switches = {"anchor_every": 5, "scalars": [norm], "attribute": False, **switches}
    watched = circuit.watch(loop.module, loop.optimizer, folder, **switches)
    with pytest.raises(KeyboardInterrupt), watched:
        _until(loop, at, saved)
    return saved


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def states_of(folder: str) -> list[dict[str, torch.Tensor]]:
    """Weights, buffers and moments of every step."""
    run = circuit.open_run(folder, module=Loop().module)
    return [
        {**state.parameters, **state.buffers}
        | {f"{k} {n}": x for k, of in (state.moments or {}).items() for n, x in of.items()}
        for state in map(run.state, run.steps)
    ]


@pytest.mark.parametrize("keep", ["gradients", "states"])
@pytest.mark.parametrize("restart", [3, 5, 9, 10])
def test_a_recording_goes_on(keep: str, restart: int, capsys: pytest.CaptureFixture[str]) -> None:
    """From any state that the loop has saved, up to the last; verified, and equal to the whole."""
    recorded(Loop(), "whole", STEPS, keep=keep)
    saved = cut_off("cut", 10, keep=keep)
    assert not Recording("cut").ended
    assert "cut off" in type_and_read(["trace", "show", "cut"], capsys).out
    recorded(Loop.at(saved[restart]), "cut", STEPS, keep=keep, resume=True)
    assert Recording("cut").ended
    assert "cut off" not in type_and_read(["trace", "show", "cut"], capsys).out
    whole, cut = states_of("whole"), states_of("cut")
    assert len(whole) == len(cut) == STEPS + 1
    for one, other in zip(whole, cut, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_jsonl(Path("cut") / ROWS) == read_jsonl(Path("whole") / ROWS)
    if keep == "gradients":
        run = circuit.open_run("cut", module=Loop().module)
        assert run.verify().law == f"executed {STEPS} steps from their gradients, 0 bits differ"


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("left", ["nothing", "deep", "cut", "fewer", "loop"])
def test_rows_up_to_the_state_that_are_gone_are_told(every: int, left: str) -> None:
    """Nothing is written before; rows of later steps may be torn, for they come again."""
    saved = cut_off("cut", 10, every=every)
    rows = Path("cut") / ROWS
    lines = rows.read_text().splitlines(keepends=True)
    due = [line for line in lines if json.loads(line)["step"] <= 7]
    text = {"cut": "".join(due)[:-9], "fewer": "".join(due[:-1]), "deep": "[" * 99}.get(left, "")
    rows.unlink()
    _ = rows.symlink_to(rows.name) if left == "loop" else rows.write_text(text)
    before = {p: p.read_bytes() for p in Path("cut").rglob("*") if p.is_file()}
    says = (
        "symbolic links"
        if left == "loop"
        else f"expected that of step {7 - 7 % every}; rows were lost"
    )
    with pytest.raises(CircuitError, match=says):
        recorded(Loop.at(saved[7]), "cut", STEPS, every=every, resume=True)
    assert {p: p.read_bytes() for p in Path("cut").rglob("*") if p.is_file()} == before
    rows.unlink()
    rows.write_text("".join(due) + lines[-1][:-9])
    recorded(Loop.at(saved[7]), "cut", STEPS, every=every, resume=True)
    assert [row["step"] for row in read_jsonl(rows)] == list(range(every, STEPS + 1, every))


def test_where_there_is_none_it_begins() -> None:
    recorded(Loop(), "new", 3, resume=True)
    assert circuit.open_run("new", module=Loop().module).steps == [0, 1, 2, 3]


def test_a_loop_that_starts_over_is_recorded_over() -> None:
    """At its first state, too, it stands at a recorded step."""
    cut_off("cut", 4)
    recorded(Loop(), "cut", 2, resume=True)
    assert Recording("cut").last_step == 2
    assert [row["step"] for row in Recording("cut").rows] == [1, 2]
    recorded(Loop(), "cut", 0, resume=True)  # no step is taken, and none measured
    assert Recording("cut").last_step == 0
    assert Recording("cut").rows == []


def test_another_state_is_refused() -> None:
    """Weights, moments, buffers and settings have to be those of one step; nothing is lost."""
    saved = cut_off("cut", 6)

    def changed(part: str, key: Any) -> Loop:
        loop = Loop.at(saved[4])
        if part == "weights":
            loop.module[0].weight.data[0, 0] += 1e-7
        elif part == "moments":
            loop.optimizer.state[loop.module[0].weight]["exp_avg"][0, 0] += 1e-9
        elif part == "fresh":
            loop.optimizer.state.clear()
        else:
            loop.module[1].running_mean[0] += 1e-6
        return loop

    for part, says in {
        "weights": "the module's weights are those of no recorded step",
        "moments": r"are those of step 4, but what an optimizer remembers of 0.weight \(exp_avg\)",
        "fresh": "are those of step 4, but what an optimizer remembers of",
        "buffers": r"are those of step 4, but the buffer 1.running_mean is not",
    }.items():
        with pytest.raises(CircuitError, match=says):
            recorded(changed(part, None), "cut", 8, resume=True)
    with pytest.raises(CircuitError, match="begun otherwise: keep was 'gradients'"):
        recorded(Loop.at(saved[4]), "cut", 8, resume=True, keep="states")
    with pytest.raises(CircuitError, match="`resume` and `overwrite` exclude"):
        recorded(Loop.at(saved[4]), "cut", 8, resume=True, overwrite=True)
    assert Recording("cut").last_step == 6
    assert len(states_of("cut")) == 7


class Plain(Loop):
    """Without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 2))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.01)


class Lazy(nn.Linear):
    """Makes a buffer when it is first called."""

    saved = True

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(2), persistent=self.saved)
        return super().forward(inputs) * self.scale


@pytest.mark.parametrize("saved", [True, False])
def test_a_buffer_that_the_loop_has_made_is_there(
    saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lazy, "saved", saved)
    loop = Loop()
    loop.module = nn.Sequential(Lazy(3, 2))
    loop.optimizer = torch.optim.AdamW(loop.module.parameters())
    recorded(loop, "lazy", 3)
    recorded(loop, "lazy", 5, resume=True)
    run = circuit.open_run("lazy", module=nn.Sequential(Lazy(3, 2)))
    assert run.verify().law == "executed 5 steps from their gradients, 0 bits differ"
    assert run.recording.not_saved == (set() if saved else {"0.scale"})


def test_where_an_optimizer_was_loaded_it_still_begins_anew() -> None:
    loop = Plain()
    with circuit.watch(loop.module, loop.optimizer, "anew", anchor_every=5):
        loop.take()
        loop.take()
        state = loop.state()
        for of in state["optimizer"]["state"].values():
            of["exp_avg"].zero_()
        loop.optimizer.load_state_dict(state["optimizer"])
        saved = loop.state()
        loop.take()
    recorded(Plain.at(saved), "anew", 4, resume=True)
    run = circuit.open_run("anew", module=Plain().module)
    assert run.verify().law == "executed 4 steps from their gradients, 0 bits differ"
