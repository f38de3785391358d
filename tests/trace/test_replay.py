"""Replay is training, bit for bit: in order, out of order, from a name, and where it cannot be."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from new_shapes import NEW_SHAPES
from torch import Tensor
from transformer_lens import HookedTransformer

import circuit
from circuit.errors import CircuitError
from circuit.reports.evaluation import evaluate_checkpoint
from circuit.reports.optimizer_update_trace import summarize
from circuit.tasks.benchmark import Benchmark
from circuit.trace.record import RecordOptions, RecordResult
from circuit.trace.replay import Drift, ReplayedRun
from circuit.trace.states import States
from circuit.trace.while_training import TraceRecorder
from circuit.train_config import TrainConfig
from circuit.training import recipe as recipe_module
from circuit.training import step as step_module
from circuit.training.checkpoints import TrainState, save_checkpoint
from circuit.training.loop import train
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

MakeConfig = Callable[..., TrainConfig]
Recording = Callable[..., RecordResult]
Same = Callable[[Any, Any], bool]
BytesOf = Callable[[Path | str], dict[str, bytes]]

ADAMW = {"name": "adamw", "learning_rate": 0.01}
SGD = {"name": "sgd", "learning_rate": 0.1}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": ADAMW,
    "adamw beta1=0": {**ADAMW, "beta1": 0.0},
    "sgd": SGD,
    "sgd momentum": {**SGD, "momentum": 0.9},
}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_replay_is_training(
    workplace: Path,
    make_config: MakeConfig,
    tiny: Benchmark,
    recording: Recording,
    same: Same,
    optimizer: dict[str, Any],
    clip: float | None,
    schedule: str,
) -> None:
    """To the last step, at which cosine and linear schedules stand at rate zero."""
    config = make_config(
        optimizer=optimizer,
        gradient_clip=clip,
        schedule={"name": schedule, "warmup_steps": 2},
        steps=6,
    )
    session = TrainingSession(Setup(config, benchmark=tiny))
    trained = [session.state()]
    norms, losses = [], []
    for _ in range(6):
        outcome = session.advance()
        trained.append(session.state())
        losses.append(float(outcome.loss))
        norms.append(float(outcome.grad_norm))
    summary = summarize(recording(config).store, [])
    assert 0 < summary["max_relative_rounding"] < 1e-3
    replayed = list(ReplayedRun.open("trace").replay(0, 6))
    assert [step.step for step in replayed] == [1, 2, 3, 4, 5, 6]
    assert [step.loss for step in replayed] == losses
    assert [step.grad_norm for step in replayed] == norms
    for step in replayed:
        assert same(step.before, trained[step.step - 1])
        assert same(step.after, trained[step.step])
        assert torch.equal(step.gradient, step.clipped) == (step.clip == 1)
    assert any(step.clip < 1 for step in replayed) == (clip is not None)
    still = [torch.equal(s.before.parameters, s.after.parameters) for s in replayed]
    assert still == [False] * 5 + [schedule != "constant"]


@pytest.mark.parametrize("fields", NEW_SHAPES.values(), ids=list(NEW_SHAPES))
def test_every_shape_of_model_replays(
    workplace: Path, make_config: MakeConfig, same: Same, fields: dict[str, Any]
) -> None:
    """A trace that was recorded while training: what it has not kept is what was trained."""
    shape = {**make_config().model.model_dump(mode="json"), "layers": 2, **fields}
    optimizer = {"name": "adamw", "learning_rate": 0.01, "beta2": 0.98, "weight_decay": 1.0}
    config = make_config(model=shape, optimizer=optimizer)
    train(config, recorder=TraceRecorder("trace", RecordOptions(end_step=12, anchor_every=4)))
    verified = ReplayedRun.open("trace").verify()
    assert verified.equal
    assert (verified.steps, verified.compared_anchors) == (12, 3)
    session = TrainingSession(ReplayedRun.open("trace").setup)
    for step in ReplayedRun.open("trace").replay(0, 3):
        session.advance()
        assert same(step.after, session.state())


@pytest.fixture
def states(trace_folder: Path) -> list[TrainState]:
    """What training passes through, step by step, 0 to 12."""
    trace = ReplayedRun.open(trace_folder)
    session = TrainingSession(trace.setup)
    found = [session.state()]
    while session.step < 12:
        session.advance()
        found.append(session.state())
    return found


def test_random_access_is_sequential(
    trace_folder: Path, states: list[TrainState], same: Same
) -> None:
    trace = ReplayedRun.open(trace_folder)
    order = list(range(13))
    random.Random(0).shuffle(order)
    reached = sum(same(trace.state(step), states[step]) for step in order)
    windows = [(a, b) for a in range(12) for b in (a + 1, min(a + 5, 12))]
    right = sum(
        all(same(s.before, states[s.step - 1]) and same(s.after, states[s.step]) for s in found)
        and [s.step for s in found] == list(range(a + 1, b + 1))
        for a, b in windows
        if (found := list(trace.replay(a, b)))
    )
    print(f"states {reached} of 13, windows {right} of {len(windows)} equal")
    assert (reached, right) == (13, len(windows))


def test_a_kept_state_is_the_replayed_one(
    trace_folder: Path, states: list[TrainState], same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trace_folder / "checkpoints" / "step_000007.pt"
    trace = ReplayedRun.open(trace_folder)
    trace.state(7)
    assert not path.exists()
    trace.state(7, cache=True)
    monkeypatch.setattr(TrainingSession, "advance", None)  # from here nothing is replayed
    assert same(trace.state(7), states[7])
    assert same(States().state(path), states[7])
    path.unlink()
    with pytest.raises(TypeError):
        trace.state(7)


def test_a_kept_state_that_is_another_steps_is_refused(trace_folder: Path) -> None:
    trace = ReplayedRun.open(trace_folder)
    path = trace_folder / "checkpoints" / "step_000007.pt"
    save_checkpoint(path, trace.state(6))
    with pytest.raises(CircuitError, match=r"step_000007\.pt: is not the state of step 7"):
        trace.state(7)


def test_dense_storage_holds_every_addressable_step(
    workplace: Path,
    make_config: MakeConfig,
    recording: Recording,
    states: list[TrainState],
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recording(make_config(), "dense", storage="dense", checkpoint_every=3, anchor_every=10)
    steps = [0, 3, 6, 9, 10, 12]
    names = [f"step_{step:06d}.pt" for step in steps]
    assert sorted(p.name for p in Path("dense/checkpoints").iterdir()) == names
    trace = ReplayedRun.open("dense")
    assert trace.verify().compared_anchors == 5
    monkeypatch.setattr(TrainingSession, "advance", None)
    assert all(same(trace.state(step), states[step]) for step in steps)


def test_a_name_without_a_file_is_replayed_and_evaluated(
    trace_folder: Path, states: list[TrainState], same: Same, make_config: MakeConfig
) -> None:
    folder = trace_folder / "checkpoints"
    for step in range(13):
        path = folder / f"step_{step:06d}.pt"
        assert path.exists() == (step % 4 == 0)
        assert same(States().state(path), states[step])
    missing = evaluate_checkpoint(make_config(), folder / "step_000006.pt", splits=["train"])
    assert missing.step == 6
    save_checkpoint(Path("six.pt"), states[6])
    stored = evaluate_checkpoint(make_config(), Path("six.pt"), splits=["train"])
    assert [e.to_row() for e in missing.evaluations] == [e.to_row() for e in stored.evaluations]
    assert not (folder / "step_000006.pt").exists()
    ReplayedRun.open(trace_folder).state(6, cache=True)
    assert (folder / "step_000006.pt").exists()


def test_a_name_beyond_the_trace_is_refused(trace_folder: Path) -> None:
    with pytest.raises(CircuitError, match="step 13 of the trace is not addressable; expected"):
        States().state(trace_folder / "checkpoints" / "step_000013.pt")
    with pytest.raises(CircuitError, match="no such checkpoint"):
        States().state(trace_folder / "checkpoints" / "best.pt")
    with pytest.raises(CircuitError, match="no such checkpoint"):
        States().state(Path("elsewhere") / "checkpoints" / "step_000004.pt")


def test_only_the_chosen_steps_are_addressable(
    workplace: Path, make_config: MakeConfig, recording: Recording
) -> None:
    recording(make_config(), anchor_every=5, checkpoint_every=2, checkpoint_start_step=4)
    trace = ReplayedRun.open("trace")
    reached, refused = set(), {}
    for step in range(14):
        try:
            reached.add(trace.state(step).step)
        except CircuitError as error:
            refused[step] = str(error)
    assert reached == {0, 4, 5, 6, 8, 10, 12}
    for step, message in refused.items():
        assert f"trace: step {step} of the trace is not addressable" in message
        assert "every 2 steps from 4 to 12, or an anchor" in message
    assert [step.step for step in trace.replay(1, 3)] == [2, 3]  # windows are not bound to the grid


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (3, 3), (5, 4), (0, 13), (12, 13)])
def test_windows_that_are_not_recorded_are_refused(
    trace_folder: Path, start: int, end: int
) -> None:
    trace = ReplayedRun.open(trace_folder)
    for execute in (lambda: list(trace.replay(start, end)), lambda: trace.verify(start, end)):
        with pytest.raises(CircuitError, match=f"window {start}:{end}; expected .* within 0:12"):
            execute()


def test_a_recording_starts_at_any_state_of_another_trace(
    trace_folder: Path, states: list[TrainState], recording: Recording, same: Same
) -> None:
    config = ReplayedRun.open(trace_folder).manifest.config
    start = trace_folder / "checkpoints" / "step_000006.pt"
    assert not start.exists()
    found = recording(config, "late", resume_checkpoint=start, num_steps=5)
    assert (found.first_step, found.steps) == (6, 5)
    late = ReplayedRun.open("late")
    assert late.manifest.anchors() == [6, 8, 11]
    assert all(same(late.state(step), states[step]) for step in range(6, 12))
    whole = ReplayedRun.open(trace_folder).store.rows
    assert late.store.rows == whole[6:11]
    with pytest.raises(CircuitError, match="expected start < end within 6:11"):
        list(late.replay(5, 7))


def test_traces_open_from_the_package(trace_folder: Path) -> None:
    trace = circuit.open_run(trace_folder)
    assert isinstance(trace, ReplayedRun)
    assert repr(trace) == "ReplayedRun(trace: steps 0 to 12 of 12, 4 anchors, adamw)"
    assert circuit.open_run(trace_folder / "trace.json").store.root == trace_folder
    with pytest.raises(CircuitError, match=r"nowhere: there is no trace here; .*trace\.json"):
        ReplayedRun.open("nowhere")


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("recorded", "then"), [(1, 2), (2, 1)])
def test_replay_uses_the_recorded_thread_count(
    workplace: Path, make_config: MakeConfig, recording: Recording, recorded: int, then: int
) -> None:
    recording(make_config(threads=recorded, steps=4))
    assert ReplayedRun.open("trace").manifest.environment["threads"] == recorded
    torch.set_num_threads(then)
    assert ReplayedRun.open("trace").verify().law == "replayed 4 steps, 0 bits differ"
    assert torch.get_num_threads() == recorded
    torch.set_num_threads(then)
    assert ReplayedRun.open("trace").changed_facts() == []


@pytest.mark.usefixtures("_threads")
def test_a_run_is_traced_with_the_threads_that_it_was_trained_with(
    workplace: Path, make_config: MakeConfig, recording: Recording
) -> None:
    torch.set_num_threads(2)
    config = make_config(threads=None, steps=4, checkpoint_every=2, eval_every=4)
    train(config)
    torch.set_num_threads(1)
    found = recording(config, require_historical_replay=True)
    assert found.history == [2, 4]
    assert found.store.manifest.environment["threads"] == 2


Patch = Callable[[pytest.MonkeyPatch], None]
SLIGHTLY = 1 + 1e-6


def other_batches(patch: pytest.MonkeyPatch) -> None:
    real = recipe_module.batch_indices
    patch.setattr(
        recipe_module, "batch_indices", lambda seed, step, **sizes: real(seed + 1, step, **sizes)
    )


def other_logits(patch: pytest.MonkeyPatch) -> None:
    real = HookedTransformer.forward
    patch.setattr(HookedTransformer, "forward", lambda self, tokens: real(self, tokens) * SLIGHTLY)


def other_loss(patch: pytest.MonkeyPatch) -> None:
    real = step_module.next_token_loss
    patch.setattr(step_module, "next_token_loss", lambda *args: real(*args) * SLIGHTLY)


def other_gradient(patch: pytest.MonkeyPatch) -> None:
    real = step_module.next_token_loss

    def same_value(*args: Any) -> Tensor:
        loss = real(*args)
        return loss.detach() + SLIGHTLY * (loss - loss.detach())

    patch.setattr(step_module, "next_token_loss", same_value)


def other_norm(patch: pytest.MonkeyPatch) -> None:
    real = torch.nn.utils.clip_grad_norm_
    patch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *args, **kw: real(*args, **kw) * SLIGHTLY
    )


def optimizer_with(**flags: Any) -> Patch:
    def patch_optimizer(patch: pytest.MonkeyPatch) -> None:
        real = recipe_module.build_optimizer
        patch.setattr(
            recipe_module,
            "build_optimizer",
            lambda model, config: real(model, config.model_copy(update=flags)),
        )

    return patch_optimizer


def other_decay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe_module.TaskRecipe, "decays", lambda *_: [0.011])


CHANGES: dict[str, tuple[Patch, str, str]] = {
    "data order": (other_batches, "batch", "the data"),
    "forward": (other_logits, "logits", "the CPU"),
    "loss": (other_loss, "loss", "the CPU"),
    "backward": (other_gradient, "gradient", "the thread count"),
    "norm": (other_norm, "grad_norm", "the order of sums in the norm"),
    "eps": (optimizer_with(eps=1e-6), "parameters", "the optimizer's flags"),
    "decay": (other_decay, "parameters", "the optimizer's flags"),
}


@pytest.mark.parametrize(("change", "stage", "cause"), CHANGES.values(), ids=list(CHANGES))
def test_the_first_stage_that_differs_is_named(
    trace_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Patch,
    stage: str,
    cause: str,
) -> None:
    change(monkeypatch)
    trace = ReplayedRun.open(trace_folder)
    named = rf"trace: step 5 does not replay: it first differs in {stage} \({cause}.*no recorded"
    with pytest.raises(CircuitError, match=named):
        list(trace.replay(5, 7))
    with pytest.raises(CircuitError, match=r"step 9 .* first differs in"):
        trace.state(10, cache=True)
    found = trace.verify(4, 6)
    assert not found.equal
    assert found.drifts[0] == Drift(5, stage)
    assert trace.drifts == []


def test_the_changed_fact_is_named(trace_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_logits(monkeypatch)
    monkeypatch.setenv("MKL_LAW_UNDER_TEST", "1")
    with pytest.raises(CircuitError, match=r"variables: {.*} -> {.*'MKL_LAW_UNDER_TEST': '1'"):
        list(ReplayedRun.open(trace_folder).replay(0, 1))
    monkeypatch.undo()


def moved_at(patch: pytest.MonkeyPatch, at: int) -> None:
    """After one step three elements of one tensor are not what they should be."""
    real = step_module.training_step

    def step_aside(recipe: Any, model: Any, optimizer: Any, step: int, **kw: Any) -> Any:
        outcome = real(recipe, model, optimizer, step, **kw)
        if step == at:
            with torch.no_grad():
                model.ln_final.b[:3] += 1e-3
        return outcome

    patch.setattr(step_module, "training_step", step_aside)


def drifted(trace: ReplayedRun, same: Same, states: list[TrainState]) -> dict[int, bool]:
    return {s.step: not same(s.after, states[s.step]) for s in trace.replay(0, 12)}


def test_drift_that_is_allowed_is_recorded_and_ends_at_anchors(
    trace_folder: Path, states: list[TrainState], same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved_at(monkeypatch, 6)
    trace = ReplayedRun.open(trace_folder, allow_drift=True)
    apart = drifted(trace, same, states)
    assert [step for step, differs in apart.items() if differs] == [6, 7, 8]
    assert len(apart) == 12
    assert trace.drifts == [Drift(6, "parameters"), Drift(7, "logits"), Drift(8, "logits")]
    with pytest.raises(CircuitError, match="step 6 does not replay"):
        drifted(ReplayedRun.open(trace_folder), same, states)


def test_a_drifted_state_is_never_kept(
    trace_folder: Path, states: list[TrainState], same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        moved_at(patch, 6)
        assert not same(
            ReplayedRun.open(trace_folder, allow_drift=True).state(7, cache=True), states[7]
        )
    assert same(ReplayedRun.open(trace_folder).state(7), states[7])


def test_verify_says_where_the_first_bits_differ(
    trace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ReplayedRun.open(trace_folder).verify()
    assert whole.equal
    assert whole.law == "replayed 12 steps, 0 bits differ"
    assert whole.compared_anchors == 3
    seen: list[int] = []
    part = ReplayedRun.open(trace_folder).verify(5, 9, progress=lambda step: seen.append(step.step))
    assert part.law == "replayed 4 steps, 0 bits differ"
    assert seen == [5, 6, 7, 8, 9]
    moved_at(monkeypatch, 8)
    found = ReplayedRun.open(trace_folder).verify()
    assert not found.equal
    assert found.law == "replayed 12 steps, 1 differ, first at step 8 in parameters"
    ((step, difference),) = found.anchors
    assert step == 8
    assert (difference.stage, difference.tensor) == ("parameters", "ln_final.b")
    assert (difference.elements, difference.size) == (3, 16)
    assert str(difference).startswith("parameters ln_final.b: 3 of 16 elements differ, by at most")


def test_nothing_is_written_by_looking(trace_folder: Path, bytes_of: BytesOf) -> None:
    before = bytes_of(trace_folder)
    files = set(trace_folder.rglob("*"))
    trace = ReplayedRun.open(trace_folder)
    trace.verify()
    list(trace.replay(1, 3))
    trace.state(11)
    assert bytes_of(trace_folder) == before
    assert set(trace_folder.rglob("*")) == files


def test_a_trace_may_be_moved(trace_folder: Path, states: list[TrainState], same: Same) -> None:
    shutil.move(trace_folder, "archive")
    assert same(States().state(Path("archive/checkpoints/step_000003.pt")), states[3])


def test_a_file_of_another_step_is_refused(trace_folder: Path) -> None:
    folder = trace_folder / "checkpoints"
    (folder / "step_000005.pt").write_bytes((folder / "step_000004.pt").read_bytes())
    with pytest.raises(CircuitError, match=r"step_000005\.pt: holds the state of step 4"):
        States().state(folder / "step_000005.pt")


def test_verify_names_the_tensor_beyond_its_window(
    trace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = recipe_module.read_moments
    calls = []

    def perturbed(*args: Any) -> Any:
        moments = real(*args)
        calls.append(1)
        if len(calls) == 3:  # the state that step 2 reads at its end
            args[0].ln_final.w.data[0] += 1e-3
        return moments

    monkeypatch.setattr(recipe_module, "read_moments", perturbed)
    found = ReplayedRun.open(trace_folder).verify(0, 3)
    assert found.steps == 3
    assert [drift.step for drift in found.drifts] == [2, 3]
    ((at, difference),) = found.anchors
    assert at == 4
    assert difference.elements > 0
