"""Methods that score examples are held against trainings, from files that anybody can write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import RUN

from circuit.attribution.replays import Replays
from circuit.attribution.scores import Scores, lds, read_scores, write_scores
from circuit.core.edit import Edit
from circuit.core.flat import ParameterLayout
from circuit.errors import CircuitError
from circuit.reports.data_attribution import ALL, AttributionOptions, DataAttribution
from circuit.reports.data_scores import TRAINING, Seen, Studied, Window, trak
from circuit.reports.report import ReportResult, run_report
from circuit.runs.opening import open_run
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.loss import LossScalar
from circuit.tasks.examples import UNPREDICTED
from circuit.trace.replay import ReplayedRun
from circuit.training.recipe import TaskRecipe


def options(traced: Path, replays: Path, **given: Any) -> AttributionOptions:
    asked: dict[str, Any] = {
        "optimizer_trace_dir": traced,
        "probe_set": RUN / "analysis/probe_set.jsonl",
        "scalars": ("loss", "loss,scope=answer"),
        "replays": replays,
        "windows": ("4:7",),
        "subsets": 4,
        "shares": (0.2, 0.5),
        "examples": 6,
        "random_vectors": 2,
    }
    return AttributionOptions(**{**asked, **given})


def made(asked: AttributionOptions, folder: Path, **more: Any) -> ReportResult:
    return run_report(DataAttribution, open_run(RUN), asked, folder, **more)


def test_it_judges_methods_by_trainings(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers share them; scores of somebody else count as those of the methods do."""
    trained: list[Edit] = []
    train = ReplayedRun.counterfactual

    def counted(run: ReplayedRun, edit: Edit, end: int) -> Any:
        trained.append(edit)
        return train(run, edit, end)

    monkeypatch.setattr(ReplayedRun, "counterfactual", counted)
    folder = tmp_path / "replays"
    first = made(options(traced, folder, part="1/2"), tmp_path / "worker")
    assert "a start without `part`" in first.law
    assert 6 < first.summary["trainings"] <= 6 + 2 * 4  # equal ones are one
    by_worker = len(trained)
    assert 0 < by_worker < first.summary["trainings"]
    result = made(options(traced, folder), tmp_path / "out")
    assert len(trained) == len({str(edit) for edit in trained}) == first.summary["trainings"]
    assert result.summary["missing"] == 0
    rows = _rows(tmp_path / "out")
    assert {row["method"] for row in rows} == set(ALL)
    assert len(rows) == 2 * 2 * (len(ALL) - 1 + 2)
    for row in rows:
        assert row["lds"] is None or row["low"] <= row["lds"] <= row["high"]
        assert row["removed"] == round(row["share"] * 6)

    # the truth of one share, as scores that anybody writes
    alone = read_scores(folder / "4_7/leave_one_out.npz")
    mine = tmp_path / "mine.npz"
    write_scores(mine, Scores("mine", alone.scalars, alone.examples, (4, 7), alone.scores))
    before = len(trained)
    made(options(traced, folder, scores=(mine,)), tmp_path / "again")
    assert len(trained) == before
    judged = _rows(tmp_path / "again")
    for name in ("mine", "leave_one_out"):
        of = [{**row, "method": ""} for row in judged if row["method"] == name]
        assert len(of) == 4
        truth = of if name == "mine" else truth
        assert of == truth
    with pytest.raises(CircuitError, match="scores of mine are of window 4:7; expected one of 8:1"):
        made(options(traced, folder, scores=(mine,), windows=("8:10",)), tmp_path / "no")
    other = tmp_path / "other.npz"
    other.write_bytes(mine.read_bytes())
    for more, said in (
        ({"scores": (mine, other)}, "'mine of 4:7' twice"),
        ({"scores": (folder / "4_7/credit.npz",)}, "'credit of 4:7' twice"),
    ):
        with pytest.raises(CircuitError, match=said):
            made(options(traced, folder, **more), tmp_path / "no")


def _rows(folder: Path) -> list[dict[str, Any]]:
    from circuit.artifacts import read_jsonl

    return read_jsonl(folder / "data_attribution_rows.jsonl")


def test_trak_is_its_formula(traced: Path) -> None:
    """By the gradients of log odds, one example at a time."""
    run = ReplayedRun.open(traced)
    recipe = run.setup.recipe()
    assert isinstance(recipe, TaskRecipe)
    seen = Seen.within(recipe, 4, 7)
    names = sorted(seen.numbers)[:8]
    scalar = LossScalar(recipe.split.batch(np.array([seen.numbers[name] for name in names[:3]])))
    window = Window(run, [scalar], 4, 7, seen, names)
    model = run.model(7).double()
    layout, parameters = ParameterLayout.of_model(model), list(model.parameters())

    def gradient(value: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(value, parameters, retain_graph=True)
        named = zip(dict(model.named_parameters()), parts, strict=True)
        return layout.flatten(dict(named)).double()

    batch = recipe.read(np.array([seen.numbers[name] for name in names]))
    shares = recipe.losses(recipe.outputs(model, batch), batch).sum(1)
    targets = (batch.targets != UNPREDICTED).sum(1)
    mean = shares * targets.sum() / targets
    p = torch.exp(-mean)
    random = torch.Generator().manual_seed(0)
    projection = torch.randn(4, layout.size, generator=random).double()
    phi = torch.stack([projection @ gradient(one) for one in (p / (1 - p)).log()])
    asked = gradient(evaluate_scalar(scalar, model).mean())
    weighed = torch.stack([projection @ gradient(one) for one in shares])
    expected = -(projection @ asked) @ torch.linalg.inv(phi.T @ phi) @ weighed.T
    torch.testing.assert_close(torch.tensor(trak(window)[0]), expected, rtol=1e-3, atol=0)


def test_the_score_is_the_correlation_of_ranks() -> None:
    from scipy import stats

    random = np.random.default_rng(3)
    scores, removed = random.standard_normal(20), random.random((50, 20)) < 0.2
    exact = -(removed @ scores)
    assert lds(scores, removed, exact**3).value == pytest.approx(1)
    assert lds(-scores, removed, exact).value == pytest.approx(-1)
    noisy = np.round(exact + random.standard_normal(50))  # with ties
    judged = lds(scores, removed, noisy)
    assert judged.value == pytest.approx(stats.spearmanr(exact, noisy).statistic)
    assert judged.low is not None
    assert judged.high is not None
    assert judged.low < judged.value < judged.high
    assert lds(scores, removed, exact / 2).spread == pytest.approx(2)
    assert lds(scores * 0, removed, exact).value is None
    sevens = np.array([random.permutation(20) < 7 for _ in range(50)])
    assert lds(np.full(20, 0.1), sevens, exact).value is None  # though seven 0.1 sum as they stand


def test_a_method_costs_what_its_last_scores_did(tmp_path: Path) -> None:
    """Of other examples they cost otherwise; a training is the same whenever it is measured."""
    kept: Any = Replays(tmp_path, {"of": []})
    of = Studied(None, tmp_path, {}, {}, kept, ())  # type: ignore[arg-type]
    for what, seconds in (("trak", 1.0), (TRAINING, 3.0), ("trak", 2.0), (TRAINING, 4.0)):
        of.spent(what, seconds)
    assert of.spent() == {"trak": 2.0, TRAINING: 3.0}


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    scores = Scores("mine", ("a", "b"), ("e1", "é2", "e3"), (2, 5), np.arange(6.0).reshape(2, 3))
    write_scores(path, scores)
    again = read_scores(path)
    assert (again.method, again.scalars, again.examples, again.window) == (
        "mine",
        ("a", "b"),
        ("e1", "é2", "e3"),
        (2, 5),
    )
    assert np.array_equal(again.of(("b",), ("e3", "e1")), [[5, 3]])
    with pytest.raises(CircuitError, match="mine has no score of example 'e4'"):
        again.of(("a",), ("e4",))
    written = path.read_bytes()
    write_scores(path, again)
    assert path.read_bytes() == written
    for arrays, said in (
        ({"scores": np.zeros((2, 2))}, "arrays of shapes"),
        ({"scores": np.zeros((1, 3)), "scalars": np.array("a")}, "arrays of shapes"),
        ({"examples": np.array([["e1"], ["e2"], ["e3"]])}, "arrays of shapes"),
        ({"method": np.array(["m"])}, "arrays of shapes"),
        ({"scores": np.full((2, 3), np.nan)}, "no finite floats"),
        ({"scores": np.zeros((2, 3)), "examples": np.array(["a", "a", "b"])}, "twice"),
        ({"scores": np.array([[object()] * 3] * 2)}, "no scores"),
    ):
        named = {"scores": scores.scores, "scalars": np.array(["a", "b"]), "method": np.array("m")}
        named |= {"examples": np.array(["e1", "e2", "e3"]), "window": np.array([2, 5])}
        np.savez(path, **{**named, **arrays})  # type: ignore[arg-type]
        with pytest.raises(CircuitError, match=said):
            read_scores(path)
    path.write_bytes(written[:-30])
    with pytest.raises(CircuitError, match="no scores"):
        read_scores(path)
