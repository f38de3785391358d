"""A training with nothing otherwise is the run; one with something otherwise starts at the edit,
and is a run of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import RUN, traced_once, trained, trained_once

from circuit.attribution.counterfactual import counterfactual
from circuit.attribution.credit import credit
from circuit.core.edit import Edit, selected
from circuit.core.flat import ParameterLayout
from circuit.core.state import FlatState
from circuit.core.update import OUTSIDE
from circuit.errors import CircuitError
from circuit.folders import RUN_CONFIG
from circuit.runs.opening import open_run
from circuit.scalars.loss import LossScalar
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import UNPREDICTED
from circuit.trace.counterfactual import record_counterfactual
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

__all__ = ["traced_once", "trained", "trained_once"]
START, END = 5, 9
TERMS = ("weight_decay", "adam_current_gradient", "adam_historical_momentum", "rounding")
ONE, OTHER, TOKEN = "ONE", "OTHER", "TOKEN"
"""Stand for examples of the run's, and for a token of the first."""
NEUTRAL: dict[str, Any] = {
    "examples": {ONE: 1.0, TOKEN: 1.0},
    "terms": dict.fromkeys(TERMS, 1.0),
    "replaced": {ONE: ONE},
    "swapped": ((6, 6), (8, 8)),
    "patterns": {"L0H1": 0.0},
    "settings": {"rate": 1.0, "decay": 1.0, "clip": 1.0},
    "direction": {"gradient": 0.0, "momentum": 0.0},
    "parameters": {"L0": 1.0},
    "bounds": {"*": 1e30},
}
EDITS: list[tuple[str, Any]] = [
    ("examples", {ONE: 0.0}),
    ("examples", {ONE: 1.5}),
    ("examples", {TOKEN: 0.0}),
    ("examples", {ONE: 1.5, TOKEN: 0.5}),
    *(("terms", {name: 0.0}) for name in TERMS),
    ("terms", {"weight_decay": 2.0}),
    ("replaced", {ONE: OTHER}),
    ("swapped", ((6, 8),)),
    ("patterns", {"L0H1": 1.0}),
    ("patterns", {"L0H1": 0.5, "L1H0": 1.0}),
    *(("settings", {name: 0.5}) for name in ("rate", "decay", "clip")),
    *(("direction", {name: 1.0}) for name in ("gradient", "momentum")),
    ("parameters", {"L0H1.q": 0.0}),
    ("parameters", {"blocks.*.mlp.W_in": 0.5}),
    ("bounds", {"embed.W_E": 0.01}),
]


@pytest.fixture(scope="module")
def run(traced_once: Path) -> ReplayedRun:
    return ReplayedRun.open(traced_once)


@pytest.fixture(scope="module")
def names(run: ReplayedRun) -> dict[str, str]:
    (step,) = run.replay(START, START + 1)
    (later,) = run.replay(END, END + 1)
    one = step.objective.ids[0]
    return {ONE: one, OTHER: later.objective.ids[0], TOKEN: f"{one}@2"}


def edit_of(names: dict[str, str], part: str, value: Any, start: int = START) -> Edit:
    if isinstance(value, dict):
        value = {names.get(key, key): names.get(one, one) for key, one in value.items()}
    return Edit(start, END, **{part: value})


def test_every_part_has_a_neutral_value() -> None:
    assert [one.name for one in fields(Edit)][2:] == list(NEUTRAL)
    assert {part for part, _ in EDITS} == set(NEUTRAL)


@pytest.mark.parametrize("part", NEUTRAL)
def test_an_edit_that_changes_nothing_is_the_run(
    run: ReplayedRun, names: dict[str, str], part: str
) -> None:
    end = run.counterfactual(edit_of(names, part, NEUTRAL[part]), END)
    assert end.stages() == FlatState.of(run.state(END)).stages()


def test_every_edit_changes_the_end(run: ReplayedRun, names: dict[str, str]) -> None:
    ends = [FlatState.of(run.state(END)).stages()["parameters"]]
    for part, value in EDITS:
        edit = edit_of(names, part, value)
        ends.append(run.counterfactual(edit, END).stages()["parameters"])
        assert edit.holds(6)
        assert not edit.holds(5)
    assert len(set(ends)) == len(ends)


@pytest.mark.parametrize(
    "parts",
    [
        ("examples", "swapped", "settings"),
        ("terms", "direction", "parameters", "bounds"),
        ("replaced", "patterns"),
    ],
)
def test_a_training_with_an_edit_is_a_run_of_its_own(
    run: ReplayedRun, names: dict[str, str], parts: tuple[str, ...], tmp_path: Path
) -> None:
    """One that is opened, replayed from its own anchors, and told apart; with all of the parts."""
    chosen = {part: value for part, value in EDITS if part in parts}
    each = [edit_of(names, part, value) for part, value in chosen.items()]
    edit = Edit(
        START, END, **{part: getattr(one, part) for part, one in zip(chosen, each, strict=True)}
    )
    end = run.counterfactual(edit, END).stages()
    assert record_counterfactual(run, edit, END, tmp_path, anchor_every=2).stages() == end
    other = open_run(tmp_path)
    assert other.config.edit == edit
    assert other.trace.verify().equal
    assert FlatState.of(other.state(END)).stages() == end
    assert FlatState.of(other.state(START)).stages() == run.store.state_digests(START)
    assert run.config.recipe_difference(other.config) is not None
    assert other.config.replace(edit=None).recipe_digest() == run.config.recipe_digest()
    for step in other.replay(START + 2, START + 3):  # from an anchor in the midst of the edit
        update = step.update
        torch.testing.assert_close(sum(update.named().values()), update.total, rtol=0, atol=1e-12)
        assert (OUTSIDE in update.terms) == edit.moves


def test_a_recording_that_was_cut_off_goes_on(
    run: ReplayedRun, names: dict[str, str], tmp_path: Path
) -> None:
    edit = edit_of(names, "patterns", {"L1H0": 1.0})

    class CutOffError(Exception):
        pass

    def cut(step: Any) -> None:
        if step.step == START + 3:
            raise CutOffError

    with pytest.raises(CutOffError):
        record_counterfactual(run, edit, END, tmp_path / "run", anchor_every=1, progress=cut)
    (tmp_path / "run" / RUN_CONFIG).unlink()  # as a kill between its name and its bytes leaves it
    end = record_counterfactual(run, edit, END, tmp_path / "run", anchor_every=1)
    assert end.stages() == run.counterfactual(edit, END).stages()
    with pytest.raises(CircuitError, match="holds a run with another edit"):
        record_counterfactual(run, Edit(START, END), END, tmp_path / "run")
    with pytest.raises(CircuitError, match="is a counterfactual training itself"):
        open_run(tmp_path / "run").counterfactual(Edit(START, END), END)


def test_trained_from_the_start_it_is_the_same(run: ReplayedRun, names: dict[str, str]) -> None:
    edit = edit_of(names, "terms", {"weight_decay": 0.0})
    session = TrainingSession(run.setup.with_config(run.config.replace(edit=edit)))
    for _ in range(END):
        session.advance()
    assert FlatState.of(session.state()).stages() == run.counterfactual(edit, END).stages()


def test_without_a_term_the_step_is_the_sum_of_the_others(run: ReplayedRun) -> None:
    (traced,) = run.replay(5, 6)
    terms = traced.update.named()
    for term in terms:
        otherwise = run.counterfactual(Edit(5, 6, terms={term: 0.0}), 6).parameters
        rest = sum(vector for name, vector in terms.items() if name != term)
        expected = (traced.before.parameters.double() + rest).float()
        torch.testing.assert_close(otherwise, expected, rtol=1e-6, atol=1e-7)


def test_another_direction_has_the_norm_of_the_optimizers(run: ReplayedRun) -> None:
    (traced,) = run.replay(5, 6)
    decay, current, history, _ = traced.update.named().values()
    against = {"gradient": traced.clipped, "momentum": traced.after.moments["exp_avg"]}
    for name, vector in against.items():
        end = run.counterfactual(Edit(5, 6, direction={name: 1.0}), 6)
        moved = end.parameters.double() - traced.before.parameters.double() - decay
        assert float(moved.norm() / (current + history).norm()) == pytest.approx(1, rel=1e-4)
        cosine = torch.cosine_similarity(moved, -vector.double(), 0)
        assert float(cosine) == pytest.approx(1, rel=1e-6)


def test_a_gradient_that_is_zero_has_no_direction(run: ReplayedRun) -> None:
    (traced,) = run.replay(5, 6)
    edit = Edit(5, 6, dict.fromkeys(traced.objective.ids, 0.0), direction={"gradient": 1.0})
    with pytest.raises(CircuitError, match="the gradient is zero, which has no direction"):
        run.counterfactual(edit, 6)


def test_what_is_frozen_stays_and_what_is_bounded_is_within(run: ReplayedRun) -> None:
    before, after = run.counterfactual(Edit(0, 1), 5), FlatState.of(run.state(END))
    layout = ParameterLayout.of_model(run.module())
    of = selected(layout, "L0H1.q")
    assert 0 < int(of.sum()) < layout.size
    frozen = run.counterfactual(Edit(5, END, parameters={"L0H1.q": 0.0}), END).parameters
    assert torch.equal(frozen[of], before.parameters[of])
    assert not torch.equal(after.parameters[of], before.parameters[of])
    bounded = run.counterfactual(Edit(5, END, bounds={"L0H1.q": 0.01}), END).parameters
    assert float(bounded[of].abs().max()) <= 0.01 < float(after.parameters[of].abs().max())


def test_a_held_pattern_is_that_of_the_start(run: ReplayedRun) -> None:
    """So no gradient reaches what makes it, and the first step reads the same loss."""
    held = Edit(5, END, patterns={"L1H0": 1.0}, settings={"decay": 0.0})
    layout = ParameterLayout.of_model(run.module())
    of = selected(layout, "L1H0.q") | selected(layout, "L1H0.k")
    edited = run.setup.with_config(run.config.replace(edit=held))
    session = TrainingSession(edited)
    gradients = []
    for step in range(1, END + 1):
        outcome = session.advance()
        gradient = layout.flatten_gradient(dict(session.model.named_parameters()))
        gradients.append(bool(gradient[of].any()))
        if step == 6:
            (traced,) = run.replay(5, 6)
            assert float(outcome.loss) == pytest.approx(traced.loss, rel=1e-5)
    assert gradients == [True] * 5 + [False] * 4


def test_swapped_batches_and_replaced_examples_are_what_is_read(
    run: ReplayedRun, names: dict[str, str]
) -> None:
    edit = Edit(START, END, swapped=((6, 8),), replaced={names[ONE]: names[OTHER]})
    session = TrainingSession(run.setup.with_config(run.config.replace(edit=edit)))
    read = {step: session.recipe.at(step).examples(step).sample_ids for step in (6, 7, 8, 9)}
    plain = TrainingSession(run.setup).recipe

    def expected(step: int) -> tuple[str, ...]:
        ids = plain.examples(step).sample_ids
        return tuple(names[OTHER] if one == names[ONE] else one for one in ids)

    assert read == {6: expected(8), 7: expected(7), 8: expected(6), 9: expected(9)}


@pytest.mark.parametrize("positions", [False, True])
def test_removed_examples_leave_the_number_of_targets(
    make_config: Callable[..., TrainConfig], tiny: Benchmark, positions: bool
) -> None:
    """So the gradient of a batch is the sum of those of its examples, or of its tokens, alone."""
    config = make_config()
    recipe = TrainingSession(Setup(config, benchmark=tiny)).recipe
    ids = recipe.examples(4).sample_ids
    of = [[name] for name in ids]
    if positions:
        predicts = recipe.batch(4).targets != UNPREDICTED
        every = {
            name: [f"{name}@{at}" for at in row.nonzero().flatten().tolist()]
            for name, row in zip(ids, predicts, strict=True)
        }
        width = max(map(len, every.values()))
        of = [[token for tokens in every.values() for token in tokens[at::3]] for at in range(3)]
        assert width > 3

    def gradient(kept: list[str]) -> torch.Tensor:
        removed = {name for names in of for name in names} - set(kept)
        edit = Edit(3, 4, examples=dict.fromkeys(removed, 0.0))
        session = TrainingSession(Setup(config.replace(edit=edit), benchmark=tiny))
        for _ in range(3):
            session.advance()
        parameters, parts = dict(session.model.named_parameters()), []
        layout = ParameterLayout.of_model(session.model)
        session.advance(on_gradient=lambda: parts.append(layout.flatten_gradient(parameters)))
        return parts[0]

    alone = [gradient(names) for names in of]
    whole = gradient([name for names in of for name in names])
    torch.testing.assert_close(torch.stack(alone).sum(0), whole, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def scalar(run: ReplayedRun) -> LossScalar:
    task = run.setup.benchmark.task
    return LossScalar(task.examples(run.setup.benchmark.records("validation_iid")[:4]))


def test_it_says_what_the_scalars_become(
    run: ReplayedRun, names: dict[str, str], scalar: LossScalar
) -> None:
    edits = [Edit(5, 6), edit_of(names, "examples", {ONE: 0.0})]
    null, edited = counterfactual(run, edits, [scalar], END)
    assert null.changes == {scalar.name: 0.0}
    assert edited.changes[scalar.name] != 0
    assert torch.equal(null.actual, edited.actual)


def test_its_examples_can_be_credited(
    run: ReplayedRun, names: dict[str, str], scalar: LossScalar, tmp_path: Path
) -> None:
    """Weights and all; not where weights went elsewhere than the optimizer took them."""
    edit = edit_of(names, "examples", {OTHER: 0.0, TOKEN: 0.0})
    record_counterfactual(run, edit, END, tmp_path / "run")
    other = open_run(tmp_path / "run")
    one = credit(other, [scalar], START, END, dtype=torch.float64)[scalar.name]
    assert one.by_example()[names[OTHER]] == 0.0
    assert one.by_example()[names[ONE]] != 0.0
    assert one.totals["closure"] < 1e-3
    assert one.totals["examples_error"] < 1e-4
    edit = edit_of(names, "parameters", {"L0": 0.0})
    record_counterfactual(run, edit, END, tmp_path / "frozen")
    with pytest.raises(CircuitError, match="an edit has taken the weights of step 6 elsewhere"):
        credit(open_run(tmp_path / "frozen"), [scalar], START, END)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"examples": {"nobody": 0.0}}, "'nobody' occurs in no step of 5:9"),
        ({"examples": {"nobody@2": 0.0}}, "'nobody' occurs in no step of 5:9; .*, such as train-"),
        ({"examples": {"train-00003@x": 0.0}}, "the position of a token, behind the @, is a numb"),
        (
            {"examples": {"train-00003@900": 0.0}},
            "nothing at position 900; expected a position that",
        ),
        ({"replaced": {"nobody": "x"}}, "no example 'nobody' in 'train'"),
        ({"terms": {"decay": 0.0}}, "no term 'decay'; expected one of weight_decay, adam_current"),
        ({"parameters": {"L7": 0.0}}, "no parameters 'L7'; expected one of embed.W_E, embed, "),
        ({"patterns": {"L7H0": 1.0}}, "no component 'L7H0'"),
        ({"patterns": {"L0H0": 2.0}}, "factor 2.0 of L0H0; expected a share from 0 to 1"),
        ({"settings": {"speed": 2.0}}, "`settings`: an edit of 'speed'; expected one of rate"),
        ({"settings": {"clip": 0.0}}, "clip\\*0 leaves no gradient"),
        ({"direction": {"gradient": 1.0, "momentum": 0.5}}, "shares that are 1 together at most"),
        ({"swapped": ((6, 10),)}, "the batch of step 10 is swapped; expected a step of the edit"),
        ({"swapped": ((6, 8), (8, 9))}, "batch of step 8 is swapped twice; expected each step in"),
        ({"end": 10}, "an edit of steps 5:10; expected steps up to 9, the end"),
        ({"end": 5}, "an edit of steps 5:5; expected start < end"),
        ({"examples": {"x": float("nan")}}, "factor nan of x; expected a finite number"),
    ],
)
def test_what_there_is_not_is_refused(run: ReplayedRun, edit: dict[str, object], said: str) -> None:
    with pytest.raises(CircuitError, match=said):
        run.counterfactual(Edit(**{"start": 5, "end": END, **edit}), END)  # type: ignore[arg-type]


def test_what_is_refused_leaves_no_folder(run: ReplayedRun, tmp_path: Path) -> None:
    """The right edit takes it, then."""
    with pytest.raises(CircuitError, match="'nobody' occurs in no step of 5:9"):
        record_counterfactual(run, Edit(5, END, {"nobody": 0.0}), END, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_earlier_one_is_replaced_whole(run: ReplayedRun, tmp_path: Path) -> None:
    """Its last state is none of the new one's."""
    for factor, end in ((0.0, 7), (2.0, 6)):
        edit = Edit(5, 6, terms={"weight_decay": factor})
        record_counterfactual(run, edit, end, tmp_path / "run", overwrite=True)
    assert open_run(tmp_path / "run").steps == [5, 6]


@pytest.mark.usefixtures("trained")
def test_checkpoints_alone_cannot() -> None:
    with pytest.raises(CircuitError, match="cannot be executed again from checkpoints alone"):
        open_run(RUN).counterfactual(Edit(3, 6), 9)


@pytest.mark.usefixtures("trained")
def test_a_run_is_left_by_its_trace_alone(tmp_path: Path) -> None:
    run: Any = open_run(RUN)
    with pytest.raises(CircuitError, match="`run`: a CheckpointedRun; expected the trace of a run"):
        record_counterfactual(run, Edit(3, 6), 9, tmp_path / "out")
    assert not (tmp_path / "out").exists()
