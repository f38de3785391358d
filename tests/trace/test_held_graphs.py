"""Influence is the same to the bit, however many graphs of replayed gradients memory holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from circuit.attribution import influence
from circuit.attribution.influence import SHARE, InfluencePass
from circuit.attribution.losses import Losses
from circuit.attribution.window import attributor_of
from circuit.core.graphs import Graphs
from circuit.runs.base import Run
from circuit.scalars.base import Scalar
from circuit.scalars.loss import LossScalar
from circuit.tasks.benchmark import Benchmark
from circuit.trace.record import RecordResult
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig

START, END = 1, 11
STRETCHES = 3
"""Of that window, between anchors every four steps."""
RECIPES: dict[str, dict[str, Any]] = {
    "adamw, clipped": {"gradient_clip": 0.2},
    "adamw, plain kernels, two examples a batch": {"kernels": "plain", "batch_size": 2},
    "sgd, clipped": {
        "optimizer": {"name": "sgd", "learning_rate": 0.3, "momentum": 0.7, "weight_decay": 0.01},
        "gradient_clip": 0.2,
    },
}


class Pass:
    """What a pass has found, and what it took."""

    def __init__(
        self,
        run: Run,
        scalars: list[Scalar],
        patch: pytest.MonkeyPatch,
        *,
        memory: int = 2**40,
        window: tuple[int, int] = (START, END),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.sizes: dict[int, int] = {}
        """Of the graphs that were held, by step."""
        self.most = 0
        """Bytes of graphs that were held at once."""
        self.again = 0
        """Gradients that were taken once more."""
        hold, take = Graphs.outputs, Losses.gradient

        def counted(losses: Losses, *args: Any) -> Any:
            self.again += 1
            return take(losses, *args)

        def held(graphs: Graphs, *args: Any) -> Any:
            taken = hold(graphs, *args)
            now = {step: size for step, (_, size) in graphs._held.items()}
            self.sizes |= now
            self.most = max(self.most, sum(now.values()))
            return taken

        with patch.context() as patched:
            patched.setattr(Losses, "gradient", counted)
            patched.setattr(Graphs, "outputs", held)
            patched.setattr(influence, "memory_limit", lambda: memory)
            passed = InfluencePass(run, attributor_of(run, scalars, dtype=dtype), *window)
            self.found: list[Tensor] = []
            for one in passed:
                self.found += [torch.tensor(one.step), one.influence, one.growth]
            self.found.append(passed.value)
            assert not passed.graphs._held

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Pass)
        return all(torch.equal(*pair) for pair in zip(self.found, other.found, strict=True))


@pytest.fixture
def scalars(tiny: Benchmark) -> list[Scalar]:
    batch = tiny.task.examples(tiny.records("validation_iid")[:4])
    return [LossScalar(batch), LossScalar(batch, "answer")]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("name", RECIPES)
def test_memory_changes_no_bit(
    name: str,
    recording: Callable[..., RecordResult],
    make_config: Callable[..., TrainConfig],
    scalars: list[Scalar],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every graph but that of the window's last step is held, one a stretch, or none."""
    recording(make_config(**RECIPES[name]))
    trace = ReplayedRun.open("trace")
    every = Pass(trace, scalars, monkeypatch)
    room = max(every.sizes.values()) + 1
    one = Pass(trace, scalars, monkeypatch, memory=room * SHARE)
    small = Pass(trace, scalars, monkeypatch, memory=min(every.sizes.values()) * SHARE // 2)
    none = Pass(trace, scalars, monkeypatch, memory=0)
    assert every == one == small == none
    again = [each.again - (END - START) for each in (every, one, small, none)]
    assert again == [1 - (END - START), -STRETCHES, 0, 0]
    assert small.most == none.most == 0 < one.most < room < every.most


@pytest.mark.parametrize("allow_drift", [True, False])
def test_what_tells_whether_bits_are_equal_is_the_trace(
    allow_drift: bool, trace_folder: Path, scalars: list[Scalar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is not asked, nothing is held."""
    trace = ReplayedRun.open(trace_folder, allow_drift=allow_drift)
    taken = Pass(trace, scalars, monkeypatch)
    assert taken.again == (END - START if allow_drift else 1)
    assert taken == Pass(trace, scalars, monkeypatch, memory=0)
    assert trace.drifts == []


def test_other_digits_than_the_run_has_are_taken_anew(
    trace_folder: Path, scalars: list[Scalar], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = ReplayedRun.open(trace_folder)
    double = Pass(trace, scalars, monkeypatch, dtype=torch.float64)
    assert double.again == END - START
    assert double == Pass(trace, scalars, monkeypatch, dtype=torch.float64, memory=0)


@pytest.mark.parametrize("fails_at", [2, 7, 10])
@pytest.mark.parametrize("how", ["other bits", "an error"])
def test_a_step_that_a_graph_changes_is_taken_without(
    how: str,
    fails_at: int,
    trace_folder: Path,
    scalars: list[Scalar],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And all that are replayed after it; those before in its stretch stay held."""
    trace = ReplayedRun.open(trace_folder)
    whole, hold = Pass(trace, scalars, monkeypatch, memory=0), Graphs.outputs

    def otherwise(graphs: Graphs, step: int, module: Any, taken: Any) -> Any:
        outputs = hold(graphs, step, module, taken)
        if step == fails_at:
            if how == "an error":
                raise RuntimeError("no graph here")
            graph, _ = graphs._held[step]
            for parameter, part in zip(module.parameters(), graph.parts, strict=True):
                parameter.grad.mul_(1.5)
                part.data.mul_(1.5)
        return outputs

    monkeypatch.setattr(Graphs, "outputs", otherwise)
    found = Pass(trace, scalars, monkeypatch)
    assert found == whole
    replayed = [9, 10, 5, 6, 7, 8, 2, 3, 4]  # the last stretch first; the last step has no graph
    assert found.again == END - START - replayed.index(fails_at)
