"""The attribution of a functional write: whose, read by what, against whom."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from circuit.artifacts import dump_row, read_jsonl
from circuit.attribution.window import Job, attribute_window
from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.model.readout import read_answers
from circuit.options import PairOptions
from circuit.reports.inputs import Inputs, traced_inputs
from circuit.reports.mlp_functional_write_adam_state_attribution import (
    WriteAttribution,
    WriteAttributionOptions,
)
from circuit.reports.report import ReportResult, run_report
from circuit.reports.traced import TracedScalars
from circuit.scalars.answers import Competitors, answer_scalars
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.functional_write import FunctionalWrite, FunctionalWrites, readout_gradient
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig

NAME = "mlp_functional_write_adam_state_attribution"
RUN = Path("runs/tiny")
PROBES = RUN / "analysis/probe_set.jsonl"
CONFIG = RUN / "run_config.json"
ROWS = "answers/answer_scalar_residual_diagnosis_pair_rows.jsonl"
FIXED = ("fixed_source_competitor_margin", "fixed_target_competitor_margin")
Circuit = Callable[..., Any]


OWN = {"source_component": "L0H1", "component": "L0MLP", "reference_step": 6}
OWN |= {"min_pairs_per_type": 4}
Write = Callable[..., ReportResult]


@pytest.fixture
def write(traced: Path) -> Write:
    """Attributes a write, with other options, into a folder."""

    def run(folder: str, **changes: Any) -> ReportResult:
        given = {"probe_set": PROBES, "optimizer_trace_dir": traced, **OWN, **changes}
        config = load_config(CONFIG, TrainConfig)
        return run_report(WriteAttribution, config, WriteAttributionOptions(**given), folder)

    return run


@pytest.fixture
def inputs(traced: Path) -> Inputs:
    return traced_inputs(load_config(CONFIG, TrainConfig), PROBES, ReplayedRun.open(traced))


@pytest.fixture
def diagnosed(trained: Path, diagnose_once: Callable[..., Path]) -> None:
    """Answer scalars over 3:6 and 6:9, so that step 6 is the end of one and the start of one."""
    pairs = PairOptions(min_pairs_per_type=4)
    shutil.copytree(diagnose_once("diagnosed_all", pairs, (3, 6, 9)), Path(ROWS).parent)


def family(**changes: Any) -> FunctionalWrites:
    return FunctionalWrites(**{**OWN, **changes})


def rows_of(folder: str) -> list[dict[str, Any]]:
    return read_jsonl(Path(folder) / f"{NAME}_rows.jsonl")


def test_the_change_telescopes(write: Write) -> None:
    scalars = ("correct_value_logit", "fixed_source_competitor_margin")
    result = write("out", scalars=scalars, start_step=2, end_step=9, windows=("2:5", "5:9"))
    names = [f"functional_write.L0H1_to_L0MLP.{name}.source" for name in scalars]
    assert [row["scalar"] for row in rows_of("out")] == names * 7
    for name in names:
        own = [s for s in result.summary["windows"] if s["scalar"] == name]
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


@pytest.mark.parametrize("vector", ["post_mlp_gradient", "input_gradient"])
def test_the_parts_of_a_write_add_up(traced: Path, vector: str) -> None:
    """With one reference vector, total = input + the MLP's own, in value and in every share."""
    config = load_config(CONFIG, TrainConfig)

    def rows(target: str) -> list[dict[str, Any]]:
        chosen = family(target_vector=target, reference_vector=vector)
        job = Job(traced, TracedScalars(config, PROBES, (chosen,)))
        return [row for (row,) in attribute_window(job.prepare(), 0, 2)]

    total, given, own = map(rows, ("post_mlp_total_delta", "input_delta", "mlp_output_delta"))
    assert total[0]["before"] != 0
    for whole, one, other in zip(total, given, own, strict=True):
        assert whole["before"] == pytest.approx(one["before"] + other["before"], abs=1e-7)
        for kind in ("first_order", "path"):
            for term, share in whole[kind].items():
                assert one[kind][term] + other[kind][term] == pytest.approx(share, abs=1e-7)


def test_the_reference_vector_is_taken_at_its_end_of_the_mlp(inputs: Inputs) -> None:
    answer = inputs.side(inputs.pairs(family()), "clean").answer
    model = inputs.point(6).model

    def scalar(logits: torch.Tensor) -> torch.Tensor:
        return logits.gather(-1, answer[:, None])[:, 0]

    for vector, stage in (
        ("post_mlp_gradient", "layer_0_post_mlp"),
        ("input_gradient", "layer_0_post_attn"),
    ):
        own = family(reference_vector=vector, scalars=("correct_value_logit",))
        (write,) = own.build(inputs)
        expected = readout_gradient(model, write.reads, write.path, stage, scalar)
        torch.testing.assert_close(write.reference, expected)


@pytest.mark.usefixtures("diagnosed")
def test_the_competitors_are_those_of_the_interval_that_the_endpoint_names(inputs: Inputs) -> None:
    """Step 6 as source: the interval 6:9; as target: 3:6."""
    ends = {"endpoint_roles": ("source", "target"), "scalars": FIXED}
    writes = family(scalar_pair_rows=Path(ROWS), **ends).build(inputs)
    batch = inputs.side(inputs.pairs(family()), "clean")
    values, model = inputs.vocabulary.value_ids, inputs.point(6).model

    def competitors_at(step: int) -> torch.Tensor:
        with torch.no_grad():
            logits = inputs.point(step).model(batch.tokens)[batch.row, batch.at]
        return read_answers(logits, batch.answer, values).competitor

    at = {step: competitors_at(step) for step in (3, 6, 9)}
    assert all((at[step] != at[6]).any() for step in (3, 9))
    expected = {"source": Competitors(at[6], at[9]), "target": Competitors(at[3], at[6])}
    names = [(end, scalar) for end in ("source", "target") for scalar in FIXED]
    for write, (end, name) in zip(writes, names, strict=True):
        assert write.name == f"functional_write.L0H1_to_L0MLP.{name}.{end}"

        def scalar(logits: torch.Tensor, end: str = end, name: str = name) -> torch.Tensor:
            return answer_scalars(logits, batch.answer, expected[end], values)[name]

        stage = write.path.output_stage
        reference = readout_gradient(model, write.reads, write.path, stage, scalar)
        torch.testing.assert_close(write.reference, reference)
    # the source of one interval is the target of the other, and the model's own at that step
    own: FunctionalWrite = family().build(inputs)[0]
    for write in (writes[0], writes[3], own):
        torch.testing.assert_close(write.reference, writes[0].reference)
    for write in (writes[1], writes[2]):
        assert not torch.allclose(write.reference, writes[0].reference)


@pytest.mark.usefixtures("diagnosed")
def test_rows_that_do_not_cover_the_pairs_are_refused(write: Write, circuit: Circuit) -> None:
    lines = Path(ROWS).read_text().splitlines(keepends=True)
    Path("few.jsonl").write_text("".join(lines[1:]))
    rows = {"scalar_pair_rows": Path(ROWS)}
    cases: list[tuple[dict[str, Any], str]] = [
        # the first row is of the interval 3:6, clean side
        (
            {"scalar_pair_rows": Path("few.jsonl"), "reference_step": 3},
            "few.jsonl: no row of pair support_value:",
        ),
        ({"scalar_pair_rows": Path("nowhere.jsonl")}, "nowhere.jsonl: no such file"),
        ({**rows, "reference_step": 3, "endpoint_roles": ("target",)}, "target is step 3"),
        ({**rows, "reference_step": 7}, "whose source is step 7"),
    ]
    for changes, message in cases:
        with pytest.raises(CircuitError) as refused:
            write("out", **changes)
        assert message in str(refused.value)
        assert not list(Path("out").glob("mlp*"))
    # shards whose competitors come from other rows do not merge, wherever the rows stand
    Path("copy.jsonl").write_text("".join(lines))
    held = read_jsonl(Path(ROWS))
    held[0]["answer"] += 1
    Path("other.jsonl").write_text("".join(dump_row(row) + "\n" for row in held))
    for name, given, a, b in (
        ("one", ROWS, 0, 2),
        ("same", "copy.jsonl", 2, 4),
        ("other", "other.jsonl", 2, 4),
        ("own", None, 2, 4),
    ):
        path = None if given is None else Path(given)
        write(name, start_step=a, end_step=b, scalar_pair_rows=path)
    assert circuit("trace", "merge", "merged", "one", "same").code == 0
    for part in ("other", "own"):
        refusal = circuit("trace", "merge", "bad", "one", part)
        assert refusal.code == 2
        assert "the shards differ in scalar_pair_rows_sha256" in refusal.err


def test_the_value_at_the_reference_step_is_the_scalars_own(write: Write, inputs: Inputs) -> None:
    write("out", start_step=5, end_step=7)
    (scalar,) = family().build(inputs)
    with torch.no_grad():
        mean = float(evaluate_scalar(scalar, inputs.point(6).model).mean())
    five, six = rows_of("out")
    assert five["after"] == six["before"] == pytest.approx(mean, rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("diagnosed")
def test_rows_of_another_run_are_refused_by_row(write: Write) -> None:
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
        with pytest.raises(CircuitError) as refused:
            write("out", scalar_pair_rows=Path("changed.jsonl"), end_step=2)
        assert "changed.jsonl" in str(refused.value)
        assert message in str(refused.value)
        assert not list(Path("out").glob("mlp*"))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "source after": ({"source_component": "L1H0"}, "'L1H0' does not write before 'L0MLP'"),
    "itself": ({"source_component": "L0MLP"}, "'L0MLP' does not write before 'L0MLP'"),
    "no MLP": ({"component": "L0H0"}, "component 'L0H0' is a head; expected an MLP"),
    "source": ({"source_component": "L0H5"}, "no component 'L0H5'"),
    "layer": ({"component": "L2MLP"}, "no component 'L2MLP'"),
    "other end": ({"endpoint_roles": ("target",)}, "target needs the other end of an interval"),
    "fixed target": ({"scalars": (FIXED[1],)}, f"{FIXED[1]} needs the other end"),
    "target's best": ({"scalars": ("target_best_wrong_logit",)}, "give `scalar_pair_rows`"),
    "step": ({"reference_step": 13}, "step 13 of the trace is not addressable"),
    "pairs": ({"min_pairs_per_type": 60}, "expected at least 60"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=list(WRONG))
def test_what_does_not_exist_is_refused(
    write: Write, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CircuitError) as refused:
        write("out", **changes)
    assert message in str(refused.value)
    assert not Path("out").exists() or not list(Path("out").glob("mlp*_*"))
