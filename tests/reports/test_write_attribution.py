"""The attribution of a functional write, as it is typed: whose, read by what, against whom."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from circuit.artifacts import dump_row, read_jsonl
from circuit.attribution.window import Job, ScalarSource, attribute_window
from circuit.config import load_config
from circuit.model.readout import read_answers
from circuit.reports.inputs import PairOptions, traced_inputs
from circuit.reports.mlp_functional_write_adam_state_attribution import WriteOptions, WriteScalars
from circuit.scalars.answers import Competitors, answer_scalars
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.functional_write import readout_gradient
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig

NAME = "mlp_functional_write_adam_state_attribution"
RUN = Path("runs/tiny")
PROBES = RUN / "analysis/probe_set.jsonl"
CONFIG = RUN / "run_config.json"
STUDY = ("--config", str(CONFIG), "--probe-set", str(PROBES))
PAIRS = ("--pair-type", "support_value", "--min-pairs-per-type", "4")
ROWS = "answers/answer_scalar_residual_diagnosis_pair_rows.jsonl"
FIXED = ("fixed_source_competitor_margin", "fixed_target_competitor_margin")
Circuit = Callable[..., Any]


def scalars_of(source: ScalarSource, run: ReplayedRun) -> Sequence[Any]:
    return source.scalars(source.inputs(run))


@pytest.fixture
def write(circuit: Circuit, traced: Path) -> Circuit:
    """Types `circuit trace write` for a path, with the folder and further words."""

    def run(folder: str, *words: str, source: str = "L0H1", mlp: str = "L0MLP") -> Any:
        path = ("--source-component", source, "--component", mlp, "--reference-step", "6")
        out = ("--optimizer-trace-dir", str(traced), "--output-dir", folder)
        return circuit("trace", "write", *STUDY, *path, *PAIRS, *out, *words)

    return run


@pytest.fixture
def diagnosed(write: Circuit, diagnose_once: Callable[..., Path]) -> None:
    """Answer scalars over 3:6 and 6:9, so that step 6 is the end of one and the start of one."""
    pairs = PairOptions(("support_value",), min_per_type=4)
    shutil.copytree(diagnose_once("diagnosed_all", pairs, (3, 6, 9)), Path(ROWS).parent)


def options(**changes: Any) -> WriteOptions:
    return WriteOptions("L0H1", "L0MLP", 6, pairs=PairOptions(min_per_type=4), **changes)


def rows_of(folder: str) -> list[dict[str, Any]]:
    return read_jsonl(Path(folder) / f"{NAME}_rows.jsonl")


def report_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / f"{NAME}_report.json").read_text())
    return found


def test_every_option_is_taken_and_the_change_telescopes(write: Circuit) -> None:
    words = ("--device", "cpu", "--position-role", "prediction", "--endpoint-role", "source")
    words += ("--scalar", "correct_value_logit", "--scalar", "fixed_source_competitor_margin")
    words += ("--reference-vector", "post_mlp_gradient", "--target-vector", "post_mlp_total_delta")
    words += ("--record-side", "clean", "--max-pairs-per-type", "64", "--loss-scope", "full_lm")
    words += ("--start-step", "2", "--end-step", "9", "--window", "2:5", "--window", "5:9")
    done = write("out", *words, "--json")
    assert (done.code, done.err) == (0, "")
    assert all(Path(path).is_file() for path in done.payload["paths"])
    rows, report = rows_of("out"), report_of("out")
    names = [f"functional_write.L0H1_to_L0MLP.{s}.source" for s in (words[7], words[9])]
    assert [row["scalar"] for row in rows] == names * 7
    for name in names:
        own = [s for s in report["summary"]["windows"] if s["scalar"] == name]
        whole, first, second = own
        assert whole["telescopes"]
        change = whole["value_at_end"] - whole["value_at_start"]
        assert whole["actual"] == pytest.approx(change, abs=1e-12)
        assert first["actual"] + second["actual"] == pytest.approx(change, abs=1e-12)
        assert (first["value_at_end"], whole["value_at_end"]) == (
            second["value_at_start"],
            second["value_at_end"],
        )
        assert whole["closure"]["path"] < 0.1 * whole["closure"]["first_order"]
    assert report["parameters"]["scalar_pair_rows"] is None


@pytest.mark.parametrize("vector", ["post_mlp_gradient", "input_gradient"])
def test_the_parts_of_a_write_add_up(traced: Path, vector: str) -> None:
    """With one reference vector, total = input + the MLP's own, in value and in every share."""
    config = load_config(CONFIG, TrainConfig)

    def rows(target: str) -> list[dict[str, Any]]:
        chosen = options(target_vector=target, reference_vector=vector)
        job = Job(traced, WriteScalars(config, PROBES, chosen))
        return [row for (row,) in attribute_window(job, 0, 2)]

    total, given, own = map(rows, ("post_mlp_total_delta", "input_delta", "mlp_output_delta"))
    assert total[0]["before"] != 0
    for whole, one, other in zip(total, given, own, strict=True):
        assert whole["before"] == pytest.approx(one["before"] + other["before"], abs=1e-7)
        for kind in ("first_order", "path"):
            for term, share in whole[kind].items():
                assert one[kind][term] + other[kind][term] == pytest.approx(share, abs=1e-7)


def test_the_reference_vector_is_taken_at_its_end_of_the_mlp(traced: Path) -> None:
    config = load_config(CONFIG, TrainConfig)
    study = traced_inputs(config, PROBES, ReplayedRun.open(traced))
    answer = study.side(study.pairs(options().pairs), "clean").reads.answer
    model = study.setup.model(ReplayedRun.open(traced).state(6))

    def scalar(logits: torch.Tensor) -> torch.Tensor:
        return logits.gather(-1, answer[:, None])[:, 0]

    for vector, stage in (
        ("post_mlp_gradient", "layer_0_post_mlp"),
        ("input_gradient", "layer_0_post_attn"),
    ):
        wanted = options(reference_vector=vector, scalars=("correct_value_logit",))
        (write,) = scalars_of(WriteScalars(config, PROBES, wanted), ReplayedRun.open(traced))
        expected = readout_gradient(model, write.reads, write.path, stage, scalar)
        torch.testing.assert_close(write.reference, expected)


def competitors_at(step: int, traced: Path) -> torch.Tensor:
    config = load_config(CONFIG, TrainConfig)
    study = traced_inputs(config, PROBES, ReplayedRun.open(traced))
    batch = study.side(study.pairs(options().pairs), "clean")
    model = study.setup.model(ReplayedRun.open(traced).state(step))
    with torch.no_grad():
        logits = model(batch.tokens)[batch.reads.row, batch.reads.key_pos]
    return read_answers(logits, batch.reads.answer, study.vocabulary.value_ids).competitor


@pytest.mark.usefixtures("diagnosed")
def test_the_competitors_are_those_of_the_interval_that_the_endpoint_names(traced: Path) -> None:
    """Step 6 as source: the interval 6:9; as target: 3:6."""
    config = load_config(CONFIG, TrainConfig)
    wanted = options(endpoints=("source", "target"), scalars=FIXED)
    found = scalars_of(WriteScalars(config, PROBES, wanted, Path(ROWS)), ReplayedRun.open(traced))
    study = traced_inputs(config, PROBES, ReplayedRun.open(traced))
    batch = study.side(study.pairs(wanted.pairs), "clean")
    model = study.setup.model(ReplayedRun.open(traced).state(6))
    at = {step: competitors_at(step, traced) for step in (3, 6, 9)}
    assert all((at[step] != at[6]).any() for step in (3, 9))
    expected = {"source": Competitors(at[6], at[9]), "target": Competitors(at[3], at[6])}
    names = [(end, scalar) for end in ("source", "target") for scalar in FIXED]
    for write, (end, name) in zip(found, names, strict=True):
        assert write.name == f"functional_write.L0H1_to_L0MLP.{name}.{end}"

        def scalar(logits: torch.Tensor, end: str = end, name: str = name) -> torch.Tensor:
            values = study.vocabulary.value_ids
            return answer_scalars(logits, batch.reads.answer, expected[end], values)[name]

        stage = write.path.output_stage
        reference = readout_gradient(model, write.reads, write.path, stage, scalar)
        torch.testing.assert_close(write.reference, reference)
    # the source of one interval is the target of the other, and the model's own at that step
    own = scalars_of(WriteScalars(config, PROBES, options()), ReplayedRun.open(traced))[0]
    for write in (found[0], found[3], own):
        torch.testing.assert_close(write.reference, found[0].reference)
    for write in (found[1], found[2]):
        assert not torch.allclose(write.reference, found[0].reference)


@pytest.mark.usefixtures("diagnosed")
def test_rows_that_do_not_cover_the_pairs_are_refused(
    write: Circuit, circuit: Circuit, traced: Path
) -> None:
    lines = Path(ROWS).read_text().splitlines(keepends=True)
    Path("few.jsonl").write_text("".join(lines[1:]))
    Path("none.jsonl").write_text("")
    cases = [
        (("--scalar-pair-rows", "few.jsonl"), "few.jsonl: no row of pair support_value:"),
        (("--scalar-pair-rows", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--scalar-pair-rows", ROWS, "--reference-step", "3", "--endpoint-role", "target"), "3"),
        (("--scalar-pair-rows", ROWS, "--reference-step", "7"), "whose source is step 7"),
    ]
    for number, (words, message) in enumerate(cases):
        if number == 0:  # the first row is of the interval 3:6, clean side
            words += ("--reference-step", "3")
        done = write("out", *words)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert message in done.err
        assert not Path("out").exists() or not list(Path("out").glob("mlp*"))
    # shards whose competitors come from other rows do not merge, wherever the rows stand
    Path("copy.jsonl").write_text("".join(lines))
    rows = read_jsonl(Path(ROWS))
    rows[0]["answer"] += 1
    Path("other.jsonl").write_text("".join(dump_row(row) + "\n" for row in rows))
    for name, given, a, b in (
        ("one", ROWS, 0, 2),
        ("same", "copy.jsonl", 2, 4),
        ("other", "other.jsonl", 2, 4),
        ("own", None, 2, 4),
    ):
        words = ("--start-step", str(a), "--end-step", str(b))
        words += () if given is None else ("--scalar-pair-rows", given)
        assert write(name, *words).code == 0
    assert circuit("trace", "merge", "merged", "one", "same").code == 0
    for part in ("other", "own"):
        refused = circuit("trace", "merge", "bad", "one", part)
        assert refused.code == 2
        assert "the shards differ in scalar_pair_rows_sha256" in refused.err


def test_the_value_at_the_reference_step_is_the_scalars_own(write: Circuit, traced: Path) -> None:
    assert write("out", "--start-step", "5", "--end-step", "7").code == 0
    config = load_config(CONFIG, TrainConfig)
    (scalar,) = scalars_of(WriteScalars(config, PROBES, options()), ReplayedRun.open(traced))
    study = traced_inputs(config, PROBES, ReplayedRun.open(traced))
    model = study.setup.model(ReplayedRun.open(traced).state(6))
    with torch.no_grad():
        mean = float(evaluate_scalar(scalar, model).mean())
    five, six = rows_of("out")
    assert five["after"] == six["before"] == pytest.approx(mean, rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("diagnosed")
def test_rows_of_another_run_are_refused_by_row(write: Circuit) -> None:
    """Other weights, other answers, a competitor that is no value, two intervals of one end."""
    rows = read_jsonl(Path(ROWS))
    mine = [i for i, r in enumerate(rows) if (r["source_step"], r["margin_side"]) == (6, "clean")]
    last = mine[-1]
    name = f"6 -> 9, {rows[last]['pair_id']}, clean"
    first = f"6 -> 9, {rows[mine[0]]['pair_id']}, clean"
    everywhere = {i: {"source_digest": "0" * 64} for i in mine}
    for changes, message in (
        (everywhere, f"the row of {first} was made from other weights than"),
        ({last: {"source_digest": "0" * 64}}, f"and {name} name different weights for step 6"),
        ({last: {"answer": rows[last]["answer"] + 1}}, f"row {name} has answer"),
        ({last: {"target_competitor": 3, "switched": True}}, f"row {name} has competitor 3, which"),
        ({last: {"target_step": 12}}, "several intervals whose source is step 6: 6 -> 9, 6 -> 12"),
    ):
        changed = [row | changes.get(i, {}) for i, row in enumerate(rows)]
        Path("changed.jsonl").write_text("".join(dump_row(row) + "\n" for row in changed))
        done = write("out", "--scalar-pair-rows", "changed.jsonl", "--end-step", "2")
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert "changed.jsonl" in done.err
        assert message in done.err
        assert not list(Path("out").glob("mlp*"))


WRONG: dict[str, tuple[dict[str, str], tuple[str, ...], str]] = {
    "source after": ({"source": "L1H0"}, (), "'L1H0' does not write before 'L0MLP'"),
    "itself": ({"source": "L0MLP"}, (), "'L0MLP' does not write before 'L0MLP'"),
    "no MLP": ({"mlp": "L0H0"}, (), "component 'L0H0' is a head; expected an MLP"),
    "source": ({"source": "L0H5"}, (), "no component 'L0H5'"),
    "layer": ({"mlp": "L2MLP"}, (), "no component 'L2MLP'"),
    "scalar": ({}, ("--scalar", "margin"), "unknown answer scalar 'margin'; expected one of"),
    "endpoint": ({}, ("--endpoint-role", "end"), "unknown endpoint role 'end'; expected source"),
    "reference": ({}, ("--reference-vector", "g"), "unknown reference vector 'g'"),
    "target": ({}, ("--target-vector", "d"), "unknown target vector 'd'; expected post_mlp_total"),
    "role": ({}, ("--position-role", "nowhere"), "unknown role 'nowhere'"),
    "other end": ({}, ("--endpoint-role", "target"), "'target' needs the other end of an interval"),
    "fixed target": ({}, ("--scalar", FIXED[1]), f"'{FIXED[1]}' needs the other end"),
    "target's best": ({}, ("--scalar", "target_best_wrong_logit"), "pass --scalar-pair-rows"),
    "step": ({}, ("--reference-step", "13"), "step 13 of the trace is not addressable"),
    "path": ({}, ("--path", "euler"), "unknown path rule 'euler'"),
    "twice": ({}, ("--scalar", FIXED[0], "--scalar", FIXED[0]), "expected each once"),
    "pairs": ({}, ("--min-pairs-per-type", "60"), "expected at least 60"),
    "window": ({}, ("--end-step", "14"), "window 0:14; expected start < end within 0:12"),
}


@pytest.mark.parametrize(("path", "words", "message"), WRONG.values(), ids=list(WRONG))
def test_bad_input_is_one_line_and_writes_nothing(
    write: Circuit, path: dict[str, str], words: tuple[str, ...], message: str
) -> None:
    done = write("out", *words, **path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert message in done.err
    assert not Path("out").exists() or not list(Path("out").glob("mlp*_*"))
