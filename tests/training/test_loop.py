"""Training: the same bits again, after any interruption, at any frequency of anything else."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed import calls_of, killed_at

from circuit.artifacts import OutputFolder, read_jsonl
from circuit.config import parse_config
from circuit.core.digests import tensors_digest
from circuit.environment import BIT_FACTS, recorded_facts
from circuit.errors import CircuitError
from circuit.reports.evaluation import evaluate_checkpoint
from circuit.runs.checkpointed import CheckpointedRun
from circuit.runs.opening import open_run
from circuit.sealed import sealed
from circuit.tasks.benchmark import load_benchmark, write_benchmark
from circuit.tasks.probes import draw_probe_set
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.train_config import TrainConfig
from circuit.training.checkpoints import checkpoint_name, list_checkpoints, load_checkpoint
from circuit.training.loop import Progress, train
from circuit.training.run_folder import saved_states

MakeConfig = Callable[..., TrainConfig]

RUN = Path("runs/tiny")
ADAMW = {"name": "adamw", "learning_rate": 0.01}
MOMENTUM = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}


class Killed(BaseException):
    """Stands for a signal: nothing in the program catches it."""


def outputs(root: Path = RUN) -> dict[str, bytes]:
    """The bytes that equal runs share: weights, optimizer states, metrics, config."""
    names = [path.relative_to(root).as_posix() for path in (root / "checkpoints").glob("*.pt")]
    names += ["metrics.jsonl", "run_config.json"]
    return {name: (root / name).read_bytes() for name in names}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return sorted(name for name, payload in expected.items() if found.get(name) != payload)


def weights_and_moments(path: Path) -> str:
    state = load_checkpoint(path)
    return tensors_digest(
        {
            f"{group} {name}": tensor
            for group, tensors in {"parameters": state.parameters, **state.moments}.items()
            for name, tensor in tensors.items()
        }
    )


@pytest.fixture
def straight(workplace: Path, make_config: MakeConfig) -> dict[str, bytes]:
    """What a run that was never interrupted leaves; its folder is gone again."""
    train(make_config())
    found = outputs()
    shutil.rmtree(workplace / "runs")
    return found


@pytest.mark.parametrize("optimizer", [ADAMW, MOMENTUM])
def test_the_same_config_gives_the_same_bytes(
    workplace: Path, make_config: MakeConfig, optimizer: dict[str, Any]
) -> None:
    train(make_config(optimizer=optimizer))
    first = outputs()
    assert set(first) == {
        "metrics.jsonl",
        "run_config.json",
        "checkpoints/best.pt",
        *(f"checkpoints/{checkpoint_name(step)}" for step in (3, 6, 9, 12)),
    }
    train(make_config(optimizer=optimizer), overwrite=True)
    assert outputs() == first
    train(make_config(optimizer=optimizer, seed=12), overwrite=True)
    assert differing(outputs(), first) == sorted(first)


def test_rows_say_what_the_steps_were(workplace: Path, make_config: MakeConfig) -> None:
    """Whole steps in order, each once; evaluations at 0, every `eval_every` and the end."""
    result = train(make_config(log_every=2, eval_every=5))
    rows = read_jsonl(RUN / "metrics.jsonl")
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == [2, 4, 6, 8, 10, 12]
    evaluated = [(row["step"], row["split"]) for row in rows if row["kind"] == "evaluation"]
    splits = ["validation_iid", "heldout_pairs"]
    assert evaluated == [(step, split) for step in (0, 5, 10, 12) for split in splits]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    summary = json.loads((RUN / "summary.json").read_text())
    assert summary["steps"] == result.step == 12
    last = {row["split"]: row for row in rows if row.get("step") == 12 and "split" in row}
    for split, evaluation in summary["evaluations"].items():
        assert evaluation == {k: v for k, v in last[split].items() if k not in ("kind", "step")}


def test_stopping_and_resuming_at_every_step_changes_nothing(
    straight: dict[str, bytes], make_config: MakeConfig
) -> None:
    stops = (1, 2, 3, 4, 5, 8, 11)  # at a checkpoint, an evaluation, and neither
    equal = 0
    for stop in stops:
        stopped = train(make_config(), stop_at=stop, overwrite=stop > 1)
        assert (stopped.step, stopped.first_step) == (stop, 0)
        assert not (RUN / "summary.json").exists()
        resumed = train(make_config(), resume=True)
        assert (resumed.step, resumed.first_step) == (12, stop)
        equal += not differing(outputs(), straight)
    print(f"stopped and resumed: equal {equal} of {len(stops)}")
    assert equal == len(stops)


def test_an_interruption_after_any_step_changes_nothing(
    straight: dict[str, bytes], make_config: MakeConfig
) -> None:
    """Between a step and its rows: the rows beyond the checkpoint are written again, once."""
    ends = (1, 2, 3, 4, 5, 8, 12)
    equal = 0
    for at in ends:

        def interrupt(progress: Progress, at: int = at) -> None:
            if progress.step == at and progress.loss is not None:
                raise Killed

        with pytest.raises(Killed):
            train(make_config(), overwrite=at > 1, progress=interrupt)
        last = max(saved_states(RUN), default=0)
        assert last >= (at - 1) // 3 * 3
        assert train(make_config(), resume=True).first_step == last
        equal += outputs() == straight
    print(f"interrupted and resumed: equal {equal} of {len(ends)}")
    assert equal == len(ends)


def test_an_interruption_after_any_write_changes_nothing(
    workplace: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = make_config(steps=4, eval_every=2, checkpoint_every=2), OutputFolder.write_bytes
    train(config)
    straight = outputs()
    shutil.rmtree("runs")
    total = equal = 0
    while True:
        left = total

        def interrupted(folder: OutputFolder, name: str, payload: bytes) -> Path:
            nonlocal left
            path = write(folder, name, payload)
            left -= 1
            if left < 0:
                raise Killed
            return path

        monkeypatch.setattr(OutputFolder, "write_bytes", interrupted)
        try:
            train(config, overwrite=total > 0)
        except Killed:
            monkeypatch.setattr(OutputFolder, "write_bytes", write)
        else:
            break
        train(config, resume=True)
        equal += outputs() == straight
        total += 1
    print(f"interrupted after a write and resumed: equal {equal} of {total}")
    assert total >= 2 + 1 + 2 + 1  # config, facts, best, checkpoints, summary
    assert equal == total


def test_a_run_killed_again_and_again_is_the_straight_run(
    workplace: Path, make_config: MakeConfig
) -> None:
    def go_on() -> None:
        train(make_config(steps=20, checkpoint_every=2, eval_every=10), resume=True)

    go_on()  # first once, uncounted: it imports what nothing before has used
    expected = outputs()
    shutil.rmtree(workplace / "runs")
    whole = calls_of(go_on)
    shutil.rmtree(workplace / "runs")
    rng = random.Random(3)
    killed = sum(killed_at(whole * rng.uniform(0.15, 0.35), go_on) for _ in range(5))
    go_on()
    wrong = differing(outputs(), expected)
    print(f"killed {killed} times while training: files that differ {len(wrong)}")
    assert killed >= 2
    assert wrong == []
    assert len(outputs()) == len(expected) == 13


def test_frequencies_do_not_change_the_training(workplace: Path, make_config: MakeConfig) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"log_every": 5},
        {"eval_every": 1},
        {"eval_every": 12, "log_every": 12},
        {"checkpoint_every": 1},
        {"checkpoint_every": 5, "tracked_splits": ["validation_iid"]},
        {"checkpoint_every": 12, "best": {"split": "heldout_pairs"}, "name": "other"},
    ]
    digests = set()
    for number, changes in enumerate(variants):
        train(make_config(**changes), overwrite=number > 0)
        digests.add(weights_and_moments(RUN / "checkpoints" / checkpoint_name(12)))
    print(f"logging, evaluation, checkpoint frequencies: distinct digests {len(digests)}")
    assert len(digests) == 1


def test_best_is_the_best_by_the_configs_metric(workplace: Path, make_config: MakeConfig) -> None:
    for best in (
        {"split": "validation_iid", "metric": "token_accuracy"},
        {"split": "heldout_pairs", "metric": "value_accuracy"},
    ):
        config = make_config(eval_every=2, checkpoint_every=2, best=best, steps=20)
        result = train(config, overwrite=True)
        values = {
            row["step"]: row[best["metric"]]
            for row in read_jsonl(RUN / "metrics.jsonl")
            if row["kind"] == "evaluation" and row["split"] == best["split"] and row["step"]
        }
        assert len(values) == 10
        assert len(set(values.values())) > 2
        step = max(values, key=lambda s: (values[s], -s))  # the first of the largest
        assert result.best == {**best, "step": step, "value": values[step]}
        kept = RUN / "checkpoints" / "best.pt"
        assert load_checkpoint(kept).step == step
        assert weights_and_moments(kept) == weights_and_moments(
            RUN / "checkpoints" / checkpoint_name(step)
        )


def test_overwrite_keeps_what_training_did_not_write(
    workplace: Path, make_config: MakeConfig
) -> None:
    train(make_config(checkpoint_every=2))
    analysis = RUN / "analysis"
    analysis.mkdir()
    probes = draw_probe_set(load_benchmark("data/tiny"), ["validation_iid"], 5)
    probes.save("probe_set.jsonl", lambda name, text: (analysis / name).write_text(text) and None)
    (RUN / "notes.txt").write_text("mine")
    (RUN / "checkpoints" / "step_000001.pt").write_bytes(b"kept by hand")
    evaluate_checkpoint(make_config(), RUN / "checkpoints" / "best.pt")
    foreign = ["notes.txt", "checkpoints/step_000001.pt", "evaluation/best.json"]
    foreign += ["analysis/probe_set.jsonl", "analysis/probe_set.metadata.json"]
    before = {name: (RUN / name).read_bytes() for name in foreign}
    with pytest.raises(CircuitError, match=r"holds .* files of an earlier `circuit train`"):
        train(make_config())
    train(make_config(checkpoint_every=6), overwrite=True)
    lost = [name for name, payload in before.items() if (RUN / name).read_bytes() != payload]
    print(f"files lost {len(lost)} of {len(before)}")
    assert lost == []
    assert list(list_checkpoints(RUN / "checkpoints")) == [1, 6, 12]


def read_all(run: CheckpointedRun) -> None:
    run.model(6)
    for split in ("train", "validation_iid"):  # read when they are asked for
        run.batch(split)


@pytest.mark.parametrize("how", ["edited train", "edited tracked", "edited config", "regenerated"])
def test_a_benchmark_changed_under_a_run_is_refused(
    workplace: Path,
    make_config: MakeConfig,
    benchmark_payload: Callable[[], dict[str, Any]],
    how: str,
) -> None:
    train(make_config(), stop_at=6)
    before = outputs()
    folder = Path("data/tiny")
    if how == "regenerated":
        shutil.rmtree(folder)
        write_benchmark(
            parse_config({**benchmark_payload(), "seed": 6}, BenchmarkConfig, where="test")
        )
        said = "trained on another benchmark: digest"
    else:
        name, old, new, said = {
            "edited train": ("train.jsonl", "W K", "W  K", r"train\.jsonl:1"),
            "edited tracked": (
                "validation_iid.jsonl",
                "validation_iid",
                "validation_iie",
                r"validation_iid\.jsonl: sha256",
            ),
            "edited config": (
                "metadata.json",
                '"seed": 5',
                '"seed": 6',
                r"metadata\.json: .*digest",
            ),
        }[how]
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))
    checkpoint = RUN / "checkpoints" / checkpoint_name(6)
    for use in (
        lambda: train(make_config(), resume=True),
        lambda: evaluate_checkpoint(make_config(), checkpoint, splits=["train", "validation_iid"]),
        lambda: read_all(open_run(RUN)),
    ):
        with pytest.raises(CircuitError, match=said):
            use()
    assert outputs() == before
    assert not (RUN / "evaluation").exists()


def record(**facts: Any) -> None:
    """Lets the run have been started with other facts."""
    path = RUN / "environment.json"
    path.write_text(json.dumps(sealed(recorded_facts(path) | facts)))


@pytest.mark.parametrize("name", ["environment.json", "evaluation/step_000003.json"])
def test_a_changed_digit_of_a_record_is_refused(
    workplace: Path, make_config: MakeConfig, name: str
) -> None:
    train(make_config(threads=None), stop_at=3)
    checkpoint = RUN / "checkpoints" / checkpoint_name(3)
    uses: dict[str, Callable[[], Any]] = {
        "environment.json": lambda: train(make_config(threads=None), resume=True),
        "evaluation/step_000003.json": lambda: evaluate_checkpoint(make_config(), checkpoint),
    }
    uses["evaluation/step_000003.json"]()
    text = (RUN / name).read_text()
    (RUN / name).write_text(re.sub(r'("(threads|reads)": )1', r"\g<1>2", text))
    assert (RUN / name).read_text() != text
    with pytest.raises(CircuitError, match=rf"{name}: was changed after it was written"):
        uses[name]()


def test_a_changed_environment_refuses_a_resume_and_names_the_fact(
    workplace: Path, make_config: MakeConfig
) -> None:
    train(make_config(), stop_at=3)
    kept, before = (RUN / "environment.json").read_bytes(), outputs()
    recorded, others = json.loads(kept), {}
    for fact in BIT_FACTS:
        now = recorded.get(fact)
        kinds = {bool: not now, int: 3, dict: {"MKL_SOMETHING": "else"}}
        others[fact] = kinds.get(type(now), "something else")
        record(**{fact: others[fact]})
        said = re.escape(f"environment has changed ({fact}: {others[fact]!r} -> ")
        with pytest.raises(CircuitError, match=rf"{said}[^;]*\), so"):
            train(make_config(), resume=True)
        assert outputs() == before
        (RUN / "environment.json").write_bytes(kept)
    record(**others)
    assert train(make_config(), resume=True, allow_drift=True, stop_at=4).step == 4


def test_other_facts_may_change(workplace: Path, make_config: MakeConfig) -> None:
    train(make_config(), stop_at=3)
    record(python="3.99", platform="elsewhere")
    assert train(make_config(), resume=True).step == 12


def test_a_resume_uses_the_recorded_number_of_threads(
    workplace: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    train(make_config(threads=1), stop_at=3)
    monkeypatch.setattr(torch, "get_num_threads", torch.get_num_threads)
    torch.set_num_threads(2)
    try:
        with pytest.raises(CircuitError, match="threads: 1 -> 2"):
            train(make_config(threads=2), resume=True)
        assert train(make_config(threads=None), resume=True).step == 12
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_a_resume_with_another_recipe_is_refused_by_the_field(
    workplace: Path, make_config: MakeConfig
) -> None:
    train(make_config(), stop_at=3)
    before = outputs()
    with pytest.raises(
        CircuitError, match="cannot resume with another config: seed is 11 there and 12"
    ):
        train(make_config(seed=12), resume=True)
    assert outputs() == before


def test_a_resume_from_a_damaged_checkpoint_is_refused_by_file(
    workplace: Path, make_config: MakeConfig
) -> None:
    train(make_config(), stop_at=6)
    path = RUN / "checkpoints" / checkpoint_name(6)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(CircuitError, match=r"step_000006\.pt: digest mismatch"):
        train(make_config(), resume=True)


def test_a_resume_of_nothing_starts_and_a_finished_run_stays(
    straight: dict[str, bytes], make_config: MakeConfig
) -> None:
    assert train(make_config(), resume=True).first_step == 0
    assert outputs() == straight
    again = train(make_config(), resume=True)
    assert (again.first_step, again.step) == (12, 12)
    assert outputs() == straight
    assert set(again.evaluations) == {"validation_iid", "heldout_pairs"}


def test_impossible_requests_are_refused(
    workplace: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stop in (0, 13):
        with pytest.raises(CircuitError, match=f"cannot stop at step {stop}; expected 1 to 12"):
            train(make_config(), stop_at=stop)
    with pytest.raises(CircuitError, match="exclude each other"):
        train(make_config(), overwrite=True, resume=True)
    train(make_config(), stop_at=6)
    with pytest.raises(CircuitError, match="already at step 6, beyond 3"):
        train(make_config(), resume=True, stop_at=3)
    with pytest.raises(CircuitError, match=r"unknown split 'nowhere'.*expected train, "):
        train(make_config(train_split="nowhere", output_dir="runs/other"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # also where there is one
    with pytest.raises(CircuitError, match="device 'cuda' is not available here"):
        train(make_config(device="cuda", output_dir="runs/other"))


def test_records_longer_than_the_model_are_refused(
    workplace: Path, make_config: MakeConfig
) -> None:
    train(make_config(), stop_at=3)
    before = outputs()
    longest = max(len(r.tokens) for r in load_benchmark("data/tiny").records("train"))
    shape = make_config().model.model_dump()
    short = make_config(model={**shape, "max_sequence_length": longest - 1})
    with pytest.raises(
        CircuitError, match=f"split '.*' has {longest} tokens, .* max_sequence_length"
    ):
        train(short, overwrite=True)
    assert outputs() == before


def test_a_refused_overwrite_keeps_the_earlier_run(
    workplace: Path, make_config: MakeConfig
) -> None:
    train(make_config(), stop_at=3)
    before = outputs()
    (RUN / "checkpoints" / checkpoint_name(10)).write_bytes(b"kept by hand")
    with pytest.raises(CircuitError, match=r"step_000010\.pt: exists and was not written by"):
        train(make_config(checkpoint_every=5), overwrite=True)
    (RUN / "checkpoints" / checkpoint_name(10)).unlink()
    assert outputs() == before


def test_a_second_writer_of_a_run_is_refused(workplace: Path, make_config: MakeConfig) -> None:
    refused = []

    def start_another(progress: Progress) -> None:
        if progress.step == 5 and progress.loss is not None:
            for how in ("overwrite", "resume"):
                with pytest.raises(CircuitError, match="another `circuit train` is writing here"):
                    train(make_config(), **{how: True})
                refused.append(how)

    train(make_config(), progress=start_another)
    assert refused == ["overwrite", "resume"]
    assert [row["step"] for row in read_jsonl(RUN / "metrics.jsonl") if row["kind"] == "train"] == [
        *range(1, 13)
    ]


@pytest.mark.parametrize(
    ("optimizer", "stop_at", "eval_every"),
    [
        ({"name": "adamw", "learning_rate": 3e37}, 1, 1),
        ({"name": "sgd", "learning_rate": 1e38}, 1, 1),
        ({"name": "sgd", "learning_rate": 1e38}, 1, 4),
        ({"name": "sgd", "learning_rate": 1e38}, 4, 1),
    ],
)
def test_a_state_that_is_not_finite_is_never_saved(
    workplace: Path,
    make_config: MakeConfig,
    optimizer: dict[str, Any],
    stop_at: int,
    eval_every: int,
) -> None:
    config = make_config(
        optimizer=optimizer, gradient_clip=None, eval_every=eval_every, checkpoint_every=1
    )
    with pytest.raises(CircuitError, match="diverged") as refused:
        train(config, stop_at=stop_at)
    assert "nan" in str(refused.value)
    assert list((RUN / "checkpoints").glob("*.pt")) == []  # step 1 is finite, and its loss is not
