"""benchmarks/grokking_seeds.py and grokking_tables.py on a small task, in this process."""

from __future__ import annotations

import importlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuit.artifacts import dump_rows
from circuit.config import load_config
from circuit.reading import read_json
from circuit.scalars.base import evaluate_scalar
from circuit.tasks.benchmark import write_benchmark
from circuit.tasks.modular_addition.task import ModularAdditionConfig
from circuit.trace.compare import state_difference
from circuit.training.checkpoints import load_checkpoint

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCALARS = ("test", "train", "memory")


@pytest.fixture(scope="module")
def scripts() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("grokking_seeds"), importlib.import_module("grokking_tables")


@pytest.fixture(scope="module")
def measured(scripts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Twenty steps of one seed, attributed in two pieces."""
    seeds, _ = scripts
    folder, plan = tmp_path_factory.mktemp("grokking"), seeds.TINY
    settings = seeds.Settings(folder, "cpu", "auto:1e-2", 20, 10, math.inf)
    config = load_config(
        seeds.CONFIGS / f"benchmark/{plan.benchmark}.json", ModularAdditionConfig
    ).model_copy(update={"output_dir": str(folder / "data" / plan.benchmark)})
    write_benchmark(config)
    assert seeds.train_run(settings, plan, 0) == 20
    seeds.report_run(settings, plan, 0)
    for start, end in seeds.pieces(20, settings.stride):
        assert seeds.attribute_piece(settings, plan, 0, start, end)
    return settings, plan


def test_pieces_end_in_the_states_of_the_run_and_their_terms_add_up(
    scripts: Any, measured: Any, tmp_path: Path
) -> None:
    _, tables = scripts
    settings, plan = measured
    tables.main(settings.folder, tmp_path)
    (run,) = read_json(tmp_path / f"{plan.config}.json")["runs"]
    assert run["executed_again"] == {"pieces": 2, "that_differ": []}
    of = run["attribution"]["memorization"]
    assert (of["steps"], of["share"]) == (20, 1.0)
    for scalar in SCALARS:
        assert of[scalar]["closure"]["path"] < 1e-3
        assert sum(of[scalar]["path"].values()) == pytest.approx(of[scalar]["actual"], rel=1e-3)
    assert of["memory"]["actual"] == pytest.approx(
        of["train"]["actual"] - of["test"]["actual"], rel=1e-3
    )


def test_what_each_part_of_the_model_did_sums_to_the_terms(scripts: Any, measured: Any) -> None:
    _, tables = scripts
    settings, plan = measured
    pieces = tables.read_pieces(settings.run(plan, 0))
    grouped, series = tables.by_group(pieces), tables.series_of(pieces)
    for scalar in SCALARS:
        for term, values in series[scalar].path.items():
            parts = sum(group[term] for group in grouped[scalar].values())
            assert parts == pytest.approx(values.sum(), abs=1e-9)


def test_log_odds_lie_within_log_of_the_others_below_the_margin(
    scripts: Any, measured: Any
) -> None:
    seeds, _ = scripts
    settings, plan = measured
    setup, attributor = seeds.opened(settings.run(plan, 0), settings.rule)
    model = setup.initial_model()
    for scalar, name in zip(attributor.scalars, ("test", "train"), strict=True):
        odds = evaluate_scalar(scalar, model).detach().numpy()
        split = setup.split(name)
        batch = split.batch(seeds.probed(len(split)))
        logits = model(batch.tokens)[batch.row, batch.at][:, : len(batch.task.choices)].double()
        others = logits.scatter(1, batch.answer[:, None], -math.inf).amax(1)
        margin = (logits.gather(1, batch.answer[:, None])[:, 0] - others).detach().numpy()
        assert np.all(odds <= margin + 1e-9)
        assert np.all(margin - math.log(len(batch.task.choices) - 1) <= odds + 1e-9)


def test_a_piece_is_not_begun_when_the_time_is_up(scripts: Any, measured: Any) -> None:
    seeds, _ = scripts
    settings, plan = measured
    late = seeds.Settings(settings.folder, "cpu", settings.rule, 20, 10, 0.0)
    before = sorted((settings.run(plan, 0) / "pieces").iterdir())
    assert not seeds.attribute_piece(late, plan, 0, 0, 10)
    assert sorted((settings.run(plan, 0) / "pieces").iterdir()) == before


def test_a_later_sitting_does_what_is_missing_and_nothing_twice(
    scripts: Any, measured: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds, _ = scripts
    settings, plan = measured
    monkeypatch.setattr(seeds, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    run, plans = settings.run(plan, 0), seeds.planned([f"{plan.config}:0"])

    def sitting() -> tuple[str, dict[str, int]]:
        seeds.measure(settings, plans, 1)
        files = (path for path in run.rglob("*") if path.suffix != ".lock")
        return capsys.readouterr().out, {str(path): path.stat().st_mtime_ns for path in files}

    _, before = sitting()
    told, after = sitting()
    assert before == after
    assert "0 pieces, 0 not in time, 2 done before" in told
    lost = settings.piece(plan, 0, 0, 10)
    contents = dict(np.load(lost))
    lost.unlink()
    assert "1 pieces, 0 not in time, 1 done before" in sitting()[0]
    again = dict(np.load(lost))
    assert all(np.array_equal(contents[name], again[name]) for name in contents)
    for other in ({"rule": "simpson"}, {"device": "cuda"}, {"stride": 5}, {"steps": 30}):
        with pytest.raises(SystemExit, match=r"settings\.json.*another FOLDER"):
            seeds.measure(replace(settings, **other), plans, 1)


def test_a_run_that_was_cut_off_goes_on(scripts: Any, measured: Any, tmp_path: Path) -> None:
    seeds, _ = scripts
    settings, plan = measured

    class Cut(seeds.Settings):  # type: ignore[misc]
        def late(self) -> bool:
            return seeds.last_step(self.run(plan, 0)) >= 10

    (tmp_path / "data").symlink_to(settings.folder / "data")
    here = replace(settings, folder=tmp_path)
    assert 10 <= seeds.train_run(Cut(**vars(here)), plan, 0) < 20
    assert seeds.train_run(here, plan, 0) == 20
    last = "checkpoints/step_000020.pt"
    straight, resumed = (load_checkpoint(s.run(plan, 0) / last) for s in (settings, here))
    assert state_difference(straight, resumed) is None


def test_a_run_ends_a_while_after_its_test_sums_are_right(scripts: Any, tmp_path: Path) -> None:
    seeds, _ = scripts
    assert seeds.settled(tmp_path, 300, 1) == 300
    rows = [
        {"kind": "evaluation", "step": step, "split": split, "answer_accuracy": accuracy}
        for step, split, accuracy in ((5, "train", 1.0), (5, "test", 0.5), (10, "test", 0.99))
    ]
    (tmp_path / "metrics.jsonl").write_text(dump_rows(rows))
    settle = seeds.SETTLE // seeds.STRIDE
    assert seeds.settled(tmp_path, 300, 1) == 10 + settle
    assert seeds.settled(tmp_path, 15, 1) == 15


def test_plans_are_named_with_their_seeds(scripts: Any) -> None:
    seeds, _ = scripts
    one, other = seeds.planned(["grokking_p59:1,7", "grokking_p113"])
    assert (one.config, one.seeds, other) == ("grokking_p59", (1, 7), seeds.PLANS[0])
    for words in (["grokking_p60"], ["grokking_p59:x"], ["grokking_p59", "grokking_p59:4"]):
        with pytest.raises(ValueError, match=r"no plan 'grokking_p60'|literal|named twice"):
            seeds.planned(words)


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([0.5, 0.6], [0.0, 0.1], {"memorization": (0, 20)}),
        ([0.5, 1.0, 1.0], [0.0, 0.1, 0.2], {"memorization": (0, 20), "formation": (20, 30)}),
        (
            [1.0, 1.0, 1.0, 1.0],
            [0.1, 0.6, 0.995, 1.0],
            {
                "memorization": (0, 10),
                "formation": (10, 20),
                "cleanup": (20, 30),
                "after": (30, 40),
            },
        ),
        (
            [1.0, 1.0, 1.0],
            [0.1, 1.0, 1.0],
            {"memorization": (0, 10), "formation": (10, 20), "after": (20, 30)},
        ),
    ],
)
def test_phases_follow_each_other_and_cover_the_run(
    scripts: Any, train: list[float], test: list[float], expected: dict[str, tuple[int, int]]
) -> None:
    _, tables = scripts
    rows = [
        {"step": 10 * number, "train_accuracy": one, "test_accuracy": other}
        for number, (one, other) in enumerate(zip(train, test, strict=True), 1)
    ]
    assert tables.phases(rows) == expected
