"""The study as jobs and rules: nothing of the contract is missing, nothing contradicts itself."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from circuit.cli.program import program
from typer.main import get_command

from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.reports.report import find_report
from circuit.studies.configs import BENCHMARK, contract_configs, scaled
from circuit.studies.costs import cost_of, rates
from circuit.studies.jobs import report_file, split_commands
from circuit.studies.reproduce import Request, make_plan
from circuit.studies.scales import SCALES, find_scale
from circuit.studies.study import PAPER, TARGETS, Study
from circuit.studies.workflow import read_dry_run
from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.train_config import TrainConfig

PROJECT = Path(__file__).parents[2]
CONTRACT = (PROJECT / "docs" / "reproducibility.txt").read_text(encoding="utf-8")
RUN = "artifacts/runs/symbolic_kv_reference_formation"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the project's configs and nothing else."""
    for config in (PROJECT / "configs").rglob("*.json"):
        copy = tmp_path / config.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(config.read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contract_outputs() -> set[str]:
    """Folders and reports that the contract expects of the reference run."""
    text = CONTRACT.replace("$RUN", RUN)
    named = re.findall(rf"--output-dir ({RUN}\S+)", text)
    named += re.findall(rf"^({RUN}/analysis/\S+?)(?:/|/\w+_report\.json)?$", text, re.MULTILINE)
    return {name.rstrip("/") for name in named}


def test_full_ends_with_every_path_of_the_contract(project: Path) -> None:
    outputs = Study(SCALES["full"]).outputs("paper")
    folders = {str(Path(path).parent) for path in outputs} | set(outputs)
    expected = contract_outputs()
    assert len(expected) >= 12
    assert expected <= folders, sorted(expected - folders)


def test_full_lists_fifteen_audits_and_five_write_attributions(project: Path) -> None:
    plan = make_plan(Request("paper", SCALES["full"]))
    audits = [p for p in plan.outputs if "optimizer_ablation" in p and "ov_write_progress_rep" in p]
    wanted = re.compile(
        r".*cross_seed_adam/seed_00\d\d/.*/winner_SELECTED_to_SELECTED"
        r"_prediction_ref2500_postgrad_total_1500_2500/mlp_functional_write_adam_state_"
        r"attribution_report\.json"
    )
    writes = [path for path in plan.outputs if wanted.fullmatch(path)]
    assert (len(audits), len(writes)) == (15, 5)
    trained = sum(job.kind == "train" for job in plan.jobs)
    assert trained == 2 + 15 + 5


def options_of(words: Sequence[str]) -> tuple[str, Any] | None:
    """Command and options of a report's command line, as the program reads it; None for others."""
    kind = find_report(words[0])
    if kind is None:
        return None
    whole = get_command(program(words))
    with whole.make_context("circuit", list(words), resilient_parsing=True) as context:
        name, command, rest = whole.resolve_command(context, list(words))
        read = command.make_context(name, rest, parent=context).params
    given = {field: read[field] for field in kind.Options.declared() if read[field]}
    chosen = kind.Options(**given).to_json()
    for end in ("start_step", "end_step"):  # shards have some
        chosen.pop(end, None)
    return kind.command, chosen


VARIABLES = {
    "$TRACE_CKPTS": "$RUN/analysis/optimizer_update_trace/from_init_seed7_0000_6000_stepwise"
    "/checkpoints",
    **{"$PROBE": "$RUN/analysis/probe_set.jsonl", "$CKPT_DIR": "$RUN/checkpoints"},
    **{"$CIRCUIT_DEVICE": "cpu", "$CONFIG": "$RUN/run_config.json", "$OUT": "out"},
}


def test_commands_of_the_contract_are_the_study_s() -> None:
    """A report that the contract runs on the reference run has the same options in the study."""
    jobs = [options_of(job.argv) for job in Study(SCALES["full"]).of("reference")]
    ours = [options for options in jobs if options is not None]
    text = CONTRACT.replace("\\\n", " ")
    for variable, value in [*VARIABLES.items(), ("$RUN", RUN)]:
        text = text.replace(variable, value)
    blocks = (shlex.split(b) for b in re.findall(r"^\s*\$CIRCUIT (\S.*)$", text, re.MULTILINE))
    theirs = [options_of(words) for words in blocks if words[0] in {c for c, _ in ours}]
    assert len(theirs) == 8
    for options in theirs:
        assert options in ours


@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
def test_jobs_agree(scale, project: Path) -> None:
    """No output is made twice, and what a job reads some job makes or the project holds."""
    jobs = Study(scale).everything("paper") + Study(scale).of("sgd-wide")
    made = Counter(path for job in jobs for path in job.outputs)
    assert {path: n for path, n in made.items() if n > 1} == {}
    needed = {path for job in jobs for path in job.inputs}
    absent = {path for path in needed - set(made) if not Path(path).exists()}
    assert absent == set()


@pytest.mark.parametrize("scale", sorted({*SCALES} - {"full"}))
def test_smaller_scales_have_the_kinds_and_targets_of_the_full_one(scale: str) -> None:
    full, small = (Study(SCALES[name]) for name in ("full", scale))
    for target in PAPER:
        kinds = {job.kind for job in full.everything(target)}
        assert {job.kind for job in small.everything(target)} == kinds | {"configs"}


@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
def test_a_trace_that_the_contract_asks_for_is_a_second_execution_and_no_other_is(scale) -> None:
    study = Study(scale)
    traces = [job for job in study.jobs if job.kind == "optimizer_update_trace"]
    assert [job.target for job in traces] == ["reference"]
    assert "--require-historical-replay" in traces[0].argv
    together = [job for job in study.jobs if job.traced]
    assert [job.outputs for job in together] == [
        (seed.summary, report_file(seed.trace, "optimizer-update-trace")) for seed in study.seeds
    ]
    assert all("--trace" in job.argv and 0 < job.traced < job.units for job in together)


def test_every_kind_has_its_resources() -> None:
    table = json.loads((PROJECT / "circuit/studies/resources.json").read_text())["rules"]
    for scale in SCALES.values():
        study = Study(scale)
        kinds = {job.kind for target in TARGETS for job in study.everything(target)}
        assert kinds <= set(table)


def test_batched_rules_run_all_instances_in_one_process() -> None:
    study = Study(SCALES["smoke"])
    kinds = Counter((batch.target, batch.kind) for batch in study.batches)
    assert set(kinds.values()) == {1}
    batch = next(b for b in study.batches if b.kind == "geometry_subspace_intervention")
    commands = split_commands(shlex.split(batch.command))
    assert commands == [list(job.argv) for job in batch.jobs]
    assert len(commands) == 4


def test_a_batch_needs_nothing_that_it_makes_itself() -> None:
    for batch in Study(SCALES["smoke"]).batches:
        assert not set(batch.inputs) & set(batch.outputs)


def test_rules_are_as_many_for_any_number_of_seeds() -> None:
    one, many = (Study(find_scale("full", seeds)) for seeds in (range(7, 8), range(1, 13)))
    assert [batch.name for batch in one.batches] == [batch.name for batch in many.batches]
    assert {seed.name for seed in many.seeds} == {f"seed_{seed:04}" for seed in range(1, 13)}
    assert len(many.of_seeds) == 12 * len(one.of_seeds)
    assert set(many.targets("cross-seed")) <= set(many.outputs("cross-seed"))


@pytest.mark.parametrize("scale", sorted({*SCALES} - {"full"}))
def test_scaled_configs_are_valid_and_keep_their_folders(scale: str, project: Path) -> None:
    for path in contract_configs(SCALES[scale]):
        kind = BenchmarkConfig if path == BENCHMARK else TrainConfig
        before = load_config(path, kind)
        Path(path).write_text(scaled(path, SCALES[scale]))
        after = load_config(path, kind)
        assert (after.name, after.output_dir) == (before.name, before.output_dir)
        if isinstance(after, TrainConfig):
            assert after.steps < load_config(PROJECT / path, TrainConfig).steps


@pytest.mark.parametrize("name", SCALES)
def test_a_study_of_another_seed_differs_in_it_alone(name: str, project: Path) -> None:
    contract, other = SCALES[name], find_scale(name, seed=11)
    assert not other.is_contract
    assert other.folder == Path(f"artifacts/scale/{name}_seed0011")
    assert other.seeds == (11,)
    assert find_scale(name, (13, 17), seed=11).seeds == (13, 17)
    for path in contract_configs(contract):
        before, after = (json.loads(scaled(path, scale)) for scale in (contract, other))
        if path != BENCHMARK:
            assert (before.pop("seed"), after.pop("seed")) == (7, 11)
        assert after == before
    if name == "full":  # the contract's own, to the letter of what they say
        assert scaled(BENCHMARK, contract) == load_config(BENCHMARK, BenchmarkConfig).to_json()
    words = next(job.argv for job in Study(other).jobs if job.kind == "configs")
    assert words[-2:] == ("--base-seed", "11")
    assert "base=11" in Request("paper", other).settings
    with pytest.raises(CircuitError, match="`base_seed`: 7 is the contract's own seed"):
        find_scale(name, seed=7)


def test_a_plan_costs_what_its_jobs_cost() -> None:
    scale = SCALES["full"]
    job = next(job for job in Study(scale).jobs if job.kind == "train")
    assert (job.units, job.taken) == (16000, 6000)
    entry = rates("train")
    cost = cost_of([job], scale)
    assert cost.seconds == pytest.approx(entry["start"] + entry["unit"] * 10000)
    traced = cost_of([replace(job, traced=1000)], scale)
    assert cost.seconds < traced.seconds < cost.seconds + entry["unit"] * 1000
    states = rates("optimizer_update_trace")["mb"] * 1000
    assert traced.megabytes == pytest.approx(cost.megabytes + states)
    assert cost_of([job, job], scale).seconds == pytest.approx(2 * cost.seconds)
    assert cost.wall(64) == pytest.approx(cost.longest)


def test_a_dry_run_is_read_rule_by_rule() -> None:
    text = """
rule train__one:
    input: a
    output: b
    reason: Params have changed since last execution: before: x now: y
checkpoint select_heads:
    output: c
    reason: Missing output files: c
    wildcards: seed=0011
Job stats:
"""
    first, second = read_dry_run(text.splitlines())
    assert (first.name, first.wildcards) == ("train__one", {})
    assert first.reason.startswith("Params have changed")
    assert (second.name, second.wildcards) == ("select_heads", {"seed": "0011"})
    assert (first.again, second.again) == (True, False)
