"""Attributions: windows, heads and lags that add up, shards that join, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import type_in
from tiny_run import MadeOnce

from circuit.artifacts import read_jsonl
from circuit.attribution.series import Series
from circuit.config import digest_of, load_config
from circuit.core.paths import path_rule
from circuit.errors import CircuitError
from circuit.reports.attribution_law import path_words
from circuit.reports.bilinear_qk_rank_adam_state_attribution import (
    QKAttribution,
    QKAttributionOptions,
)
from circuit.reports.inputs import traced_inputs
from circuit.reports.report import ReportResult, run_report
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.family import parse_scalars
from circuit.scalars.qk_match import QKMatch, QKMatches
from circuit.tasks.pairs import build_pairs
from circuit.trace.record import RecordOptions, record_trace
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig

QK = "bilinear_qk_rank_adam_state_attribution"
RUN = Path("runs/tiny")
PROBES = RUN / "analysis/probe_set.jsonl"
CONFIG = RUN / "run_config.json"
BASE = ("--config", str(CONFIG), "--probe-set", str(PROBES))
BASE += ("--optimizer-trace-dir", "trace", "--min-route-pairs-per-type", "4")
CONTRACT = (
    *("--device", "cpu", "--head-layer", "1", "--head", "1", "--rank", "8"),
    *("--context-stage", "layer_0_post_mlp", "--layernorm-mode", "head_ln1"),
    *("--score-query-role", "prediction", "--support-key-role", "support_value"),
    *("--distractor-key-role", "value_distractors", "--record-side", "clean"),
    *("--route-pair-type", "support_value", "--route-pair-source-type", "support_value"),
    *("--max-route-pairs-per-type", "64", "--min-route-pairs-per-type", "4"),
    *("--loss-scope", "full_lm", "--end-step", "4", "--overwrite"),
)
Circuit = Callable[..., Any]
Attribute = Callable[..., ReportResult]


def options(**changes: Any) -> QKAttributionOptions:
    base = {"probe_set": PROBES, "optimizer_trace_dir": Path("trace"), "min_pairs_per_type": 4}
    return QKAttributionOptions(**{**base, "heads": ("L1H1",), "ranks": (3,), **changes})


@pytest.fixture
def qk(traced: Path, trained: Path) -> Attribute:
    """Attributes one head's match, with other options, into a folder."""

    def run(folder: str, **changes: Any) -> ReportResult:
        config = load_config(CONFIG, TrainConfig)
        return run_report(QKAttribution, config, options(**changes), folder)

    return run


def rows_of(folder: str | Path, name: str = QK) -> list[dict[str, Any]]:
    return read_jsonl(Path(folder) / f"{name}_rows.jsonl")


def report_of(folder: str | Path, name: str = QK) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / f"{name}_report.json").read_text())
    return found


def files_of(folder: str | Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """What a reader sees in a folder: not the program's own files."""
    found = (path for path in Path(folder).glob("*") if path.name[0] != ".")
    own = (".manifest.json", *but)
    return {path.name: path.read_bytes() for path in found if not path.name.endswith(own)}


def test_the_contracts_command_leaves_its_outputs(circuit: Circuit, traced: Path) -> None:
    done = circuit(QK.replace("_", "-"), *BASE[:6], "--output-dir", "out", *CONTRACT)
    assert (done.code, done.err) == (0, "")
    names = [f"{QK}_report.json", f"{QK}_report.md", f"{QK}_rows.jsonl"]
    figures = ["closure.svg", "groups_circuit.svg", "terms.svg", "terms_first_order.svg"]
    assert sorted(files_of("out")) == sorted([*names, *figures])
    rows, report = rows_of("out"), report_of("out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {row["scalar"] for row in rows} == {"qk_match.L1H1.rank8"}
    assert report["law"].startswith("the contributions to qk_match.L1H1.rank8 over steps 0:4")
    assert (report["parameters"]["heads"], report["parameters"]["head_layer"]) == (["L1H1"], None)
    assert report["provenance"]["trace"]["state_at_start"] == ReplayedRun.open(
        "trace"
    ).store.state_digests(0)
    # under its other name, and as a scalar of its family: the same bytes
    assert circuit("trace", "qk", *BASE[:6], "--output-dir", "short", *CONTRACT[:-1]).code == 0
    first, short = (files_of(folder, but=("report.json",)) for folder in ("out", "short"))
    assert first == short
    word = "qk_match,head_layer=1,head=1,rank=8,min_route_pairs_per_type=4"
    words = (*BASE[:6], "--scalar", word, "--end-step", "4", "--output-dir", "any")
    assert circuit("trace", "attribute", *words).code == 0
    any_rows = Path("any/scalar_attribution_rows.jsonl").read_bytes()
    assert any_rows == (Path("out") / names[2]).read_bytes()


def test_every_window_is_the_sum_of_its_rows(qk: Attribute) -> None:
    windows = ((0, 12), (0, 5), (5, 12), (3, 4))
    texts = tuple(f"{a}:{b}" for a, b in windows[1:])
    result = qk("out", windows=texts, partitions=("layer", "circuit"))
    rows = rows_of("out")
    for summary, (a, b) in zip(result.summary["windows"], windows, strict=True):
        assert (summary["start_step"], summary["end_step"]) == (a, b)
        for term, share in summary["path"].items():
            own = sum(row["path"][term] for row in rows[a:b])
            assert share == pytest.approx(own, rel=1e-9, abs=1e-12)
            for groups in summary["groups"].values():
                total = sum(kinds["path"][term] for kinds in groups.values())
                assert total == pytest.approx(own, rel=1e-7, abs=1e-9)
    drawn = {path.name for path in result.figures}
    assert {"groups_layer.svg", "groups_circuit.svg"} <= drawn


def test_all_heads_bases_and_lags_in_one_pass(qk: Attribute) -> None:
    bases = ("source", "step:6", "full")
    result = qk("all", heads=(), ranks=(2, 3), end_step=2, by_lag=True, bases=bases)
    assert "(a basis, a competitor) is taken anew at each step" in result.notes[0]
    rows = rows_of("all")
    kinds = ["rank2", "rank3", "rank2_of_step6", "rank3_of_step6", "full", "full_with_biases"]
    heads = ["L0H0", "L0H1", "L1H0", "L1H1"]
    names = {f"qk_match.{head}.{kind}" for head in heads for kind in kinds}
    lags = ("", ".lag1", ".lag2")
    assert {row["scalar"] for row in rows} == {name + lag for name in names for lag in lags}
    assert len(rows) == 2 * 24 * 3
    for row in rows:
        assert row["telescopes"] == any(kind in row["scalar"] for kind in ("full", "step6"))
    # alone, a scalar is what it is among many
    qk("one", end_step=2)
    among = [row for row in rows if row["scalar"] == "qk_match.L1H1.rank3"]
    for ours, theirs in zip(rows_of("one"), among, strict=True):
        assert ours["actual"] == pytest.approx(theirs["actual"], rel=1e-4, abs=1e-7)
    # the whole is the mean of the lags, weighted by their reads
    config = load_config(CONFIG, TrainConfig)
    inputs = traced_inputs(config, PROBES, ReplayedRun.open("trace"))
    family = QKMatches(min_pairs_per_type=4, by_lag=True, slices=("lag", "active_keys"))
    reads = family.reads(inputs)
    parts = {by: [len(reads[name]) for name in reads if by in name] for by in family.slices}
    assert {by: sum(counts) for by, counts in parts.items()} == dict.fromkeys(
        family.slices, len(reads[""])
    )
    for step in (1, 2):
        own = {row["scalar"]: row["path"] for row in rows if row["step"] == step}
        for name in names:
            for term, share in own[name].items():
                parts = sum(len(reads[lag]) * own[name + lag][term] for lag in lags[1:])
                assert parts / len(reads[""]) == pytest.approx(share, rel=1e-4, abs=1e-8)


def test_options_choose_what_is_scored(qk: Attribute, traced: Path) -> None:
    """Each of them is another choice of reads, positions or states; together, the report's."""
    changes: list[dict[str, Any]] = [
        {"record_side": "corrupted"},
        {"support_key_role": "support_key"},
        {"distractor_key_role": "key_distractors"},
        {
            "score_query_role": "support_value",
            "support_key_role": "support_key",
            "distractor_key_role": "support_op",
        },
        {"layernorm_mode": "none"},
        {"context_stage": "embedding"},
        {"route_pair_type": "query_key"},
    ]
    trace = ReplayedRun.open(traced)
    inputs = traced_inputs(load_config(CONFIG, TrainConfig), PROBES, trace)
    model = inputs.setup.model(trace.state(4))
    types = {"pair_types": ("query_key", "support_value"), "max_pairs_per_type": 9}
    own = {"heads": ("L1H1",), "ranks": (3,), "min_pairs_per_type": 4, **types}

    def scalar_of(**changed: Any) -> QKMatch:
        (scalar,) = QKMatches(**own, **changed).build(inputs)
        return scalar

    def chosen(scalar: QKMatch) -> tuple[Any, ...]:
        reads = scalar.reads
        positions = (reads.query, reads.support, reads.distractors)
        read = (reads.row.tolist(), *(where.tolist() for where in positions))
        return reads.sequences, str(read), scalar.hook, scalar.layernorm_mode

    plain = scalar_of()
    assert len({chosen(plain), *(chosen(scalar_of(**changed)) for changed in changes)}) == 8
    assert len(scalar_of(route_pair_type="query_key").reads) < len(plain.reads)
    everything = {name: one for changed in changes for name, one in changed.items()}
    qk("out", **types, **everything, start_step=4, end_step=5)
    with torch.no_grad():
        value = float(evaluate_scalar(scalar_of(**everything), model).mean())
    assert rows_of("out")[0]["before"] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_all_reads_are_those_that_make_a_pair_and_no_number_stands_beside_it(qk: Attribute) -> None:
    types = {"pair_types": ("query_key", "support_value"), "start_step": 4, "end_step": 5}
    some, every = (
        qk(name, **types, **more)
        for name, more in (
            ("some", {"max_pairs_per_type": 5}),
            ("every", {"all_reads": True}),
        )
    )
    inputs = traced_inputs(load_config(CONFIG, TrainConfig), PROBES, ReplayedRun.open("trace"))
    built = build_pairs(inputs.task, inputs.records, types=types["pair_types"], max_per_type=999)
    assert (some.summary["pairs"], every.summary["pairs"]) == ([10], [len(built.pairs)])
    assert every.notes[0].startswith(f"Means over {len(built.pairs)} pairs. ")
    typed = parse_scalars("qk_match,all_reads=true,min_route_pairs_per_type=99")
    assert isinstance(typed, QKMatches)
    assert typed.most_pairs_per_type is None
    said = "5 beside `all_reads`; give one of the two"
    with pytest.raises(CircuitError, match=f"`max_pairs_per_type`: {said}"):
        options(**types, all_reads=True, max_pairs_per_type=5)


SHARDS = {"one": (0, 5), "two": (5, 8), "three": (8, 12)}


@pytest.fixture(scope="session")
def shards_once(trained_once: Path, traced_once: Path, made_once: MadeOnce) -> Path:
    """Three shards, and the unsharded report, of two scalars."""

    def fill() -> None:
        shutil.copytree(trained_once, ".", dirs_exist_ok=True)
        shutil.copytree(traced_once, "trace")
        for name, (start, end) in {**SHARDS, "whole": (0, 12)}.items():
            window = ("--window", "2:9" if name == "whole" else f"{start}:{end}")
            steps = ("--start-step", str(start), "--end-step", str(end))
            words = ("--head", "L1H1", "--basis", "full", *window, *steps)
            assert type_in(("trace", "qk", *BASE, "--output-dir", name, *words)) == 0

    return made_once("shards", fill)


@pytest.fixture
def shards(qk: Attribute, shards_once: Path) -> Attribute:
    """Copies of them in the working directory."""
    for name in (*SHARDS, "whole"):
        shutil.copytree(shards_once / name, name)
    return qk


def rewritten(folder: str, change: Callable[[dict[str, Any]], None]) -> None:
    """A report whose JSON was changed before its digest was taken."""
    path = Path(folder) / f"{QK}_report.json"
    payload = json.loads(path.read_text())
    claimed = payload.pop("digest")
    assert claimed == digest_of(payload)
    change(payload)
    if payload["schema_version"] > 1:
        payload["digest"] = digest_of(payload)
    path.write_text(json.dumps(payload))


@pytest.mark.usefixtures("shards")
def test_merged_shards_are_the_unsharded_report(circuit: Circuit) -> None:
    for out, parts in (("a", ["one", "two", "three"]), ("b", ["three", "one", "two"])):
        done = circuit("trace", "merge", out, *parts, "--window", "2:9")
        assert (done.code, done.err) == (0, "")
        assert files_of(out, but=("report.json",)) == files_of("whole", but=("report.json",))
        merged, whole = report_of(out), report_of("whole")
        for part in ("parameters", "summary", "law", "paths", "sha256"):
            assert merged[part] == whole[part]
        assert merged["provenance"]["trace"] == whole["provenance"]["trace"]
        assert set(merged["provenance"]) == {*whole["provenance"], "merged_from"}
        assert merged["provenance"]["merged_from"] == [[0, 5], [5, 8], [8, 12]]
    # merged ones merge again, and one alone is a whole
    assert circuit("trace", "merge", "ab", "one", "two").code == 0
    done = circuit("trace", "merge", "abc", "three", "ab", "--window", "2:9", "--json")
    assert (done.code, done.payload["law"]) == (0, report_of("whole")["law"])
    assert files_of("abc", but=("report.json",)) == files_of("whole", but=("report.json",))
    refused = circuit("trace", "merge", "abc", "one")
    assert (refused.code, "pass --overwrite" in refused.err) == (2, True)


def test_an_adaptive_rule_says_what_it_took_and_its_shards_merge(
    qk: Attribute, circuit: Circuit
) -> None:
    for name, (start, end) in {"one": (0, 2), "two": (2, 5), "whole": (0, 5)}.items():
        qk(name, start_step=start, end_step=end, bases=("full",), path="auto:1e-3")
    assert circuit("trace", "merge", "merged", "two", "one").code == 0
    assert files_of("merged", but=("report.json",)) == files_of("whole", but=("report.json",))
    assert report_of("merged")["law"] == report_of("whole")["law"]
    rows = [row for row in rows_of("whole") if row["scalar"] == "qk_match.L1H1.full"]
    nodes = [row["nodes"] for row in rows]
    (of_one,) = (
        s["nodes"]
        for s in report_of("whole")["summary"]["windows"]
        if s["scalar"] == "qk_match.L1H1.full"
    )
    missed = sum(not (row["agrees"] or row["rounded"]) for row in rows)
    assert of_one == {
        "mean": sum(nodes) / len(nodes),
        "most": max(nodes),
        "steps_within_rounding": sum(row["rounded"] for row in rows),
        "steps_without_agreement": missed,
    }
    every = rows_of("whole")
    said = f"path rule auto:1e-3, {sum(r['nodes'] for r in every) / len(every):.1f} nodes a step on"
    assert (
        f"{said} average, {max(r['nodes'] for r in every)} at most: in "
        in report_of("whole")["law"]
    )
    result = qk("hard", end_step=2, path="auto:1e-15")
    assert "in 0 of 2 rows two levels agree within 1e-15 of the step's change; " in result.law
    assert qk("easy", end_step=2, path="simpson").law.endswith("path rule simpson, 3 nodes a step")


def test_the_law_says_in_how_many_rows_more_nodes_would_not_have_helped() -> None:
    """Rows of before, which do not tell `rounded`, are read as they were."""
    told = {"telescopes": True, "before": 0.0, "after": 1.0, "clip_factor": 1.0}
    told |= {"first_order": {"a": 1.0}, "path": {"a": 1.0}, "references": {}, "groups": {}}
    ends = ((5, True, False), (9, False, True), (65, False, None))
    rows = [
        {"step": step, "scalar": "c", **told, "nodes": nodes, "agrees": agrees}
        | ({} if rounded is None else {"rounded": rounded})
        for step, (nodes, agrees, rounded) in enumerate(ends, 1)
    ]
    series = Series.collect(rows)["c"]
    law = path_words(path_rule("auto:1e-3"), [series])
    assert "26.3 nodes a step on average, 65 at most: in 1 of 3 rows two levels agree" in law
    assert "; in 1 within one unit in the last place of the scalar" in law
    assert law.endswith("the others have the finest level, 65 nodes, which was not fine enough")
    assert series.summary()["nodes"]["steps_within_rounding"] == 1
    assert series.summary()["nodes"]["steps_without_agreement"] == 1
    assert path_words(path_rule("auto:1e-3"), [series.window(1, 2)]).endswith("cannot better")


@pytest.mark.usefixtures("shards")
def test_shards_of_schema_1_merge_too(circuit: Circuit) -> None:
    """Parameters under their names of then, without a digest."""

    def earlier(payload: dict[str, Any]) -> None:
        new, pairs = payload["parameters"], {"types": ["support_value"]}
        same = ("probe_set", "optimizer_trace_dir", "heads", "ranks", "bases", "by_lag", "path")
        same += ("partitions", "loss_scope", "start_step", "end_step", "context_stage")
        payload["schema_version"] = 1
        payload["parameters"] = {name: new[name] for name in same} | {
            "layernorm_mode": "head_ln1",
            "query_role": "prediction",
            "support_role": "support_value",
            "distractor_role": "value_distractors",
            "side": "clean",
            "pairs": {**pairs, "max_per_type": 64, "min_per_type": 4},
            "scored_type": None,
            "windows": [[new["start_step"], new["end_step"]]],
        }

    for name in SHARDS:
        rewritten(name, earlier)
    assert circuit("trace", "merge", "out", *SHARDS, "--window", "2:9").code == 0
    assert files_of("out", but=("report.json",)) == files_of("whole", but=("report.json",))
    assert report_of("out")["parameters"] == report_of("whole")["parameters"]


def test_shards_that_do_not_fit_are_refused(shards: Attribute, circuit: Circuit) -> None:
    def shard(folder: str, **changes: Any) -> str:
        own = {"ranks": (8,), "bases": ("full",), "start_step": 5, "end_step": 8}
        shards(folder, **own, **changes)
        return folder

    def copied(folder: str) -> Path:
        shutil.copytree("two", folder)
        return Path(folder) / f"{QK}_rows.jsonl"

    def edited(folder: str, change: Callable[[dict[str, Any]], None]) -> str:
        copied(folder)
        rewritten(folder, change)
        return folder

    def another_state(payload: dict[str, Any]) -> None:
        payload["provenance"]["trace"]["state_at_start"]["parameters"] = "0" * 64

    def another_run(payload: dict[str, Any]) -> None:
        payload["provenance"]["config_digest"] = "0" * 64

    def without(payload: dict[str, Any]) -> None:
        del payload["provenance"]["trace"]

    rows = copied("none").read_text()
    Path("none", f"{QK}_rows.jsonl").write_text("")
    copied("fewer").write_text("".join(rows.splitlines(keepends=True)[:-1]))
    copied("damaged").write_text(rows.replace('"step": 6', '"step": 7'))
    copied("changed")
    digits = Path("changed", f"{QK}_report.json")
    digits.write_text(digits.read_text().replace('"start_step": 5', '"start_step": 4', 1))
    cases = [
        (["one", "three"], "three: a gap between 0:5 and 8:12; expected a shard that starts at 5"),
        (["one", "two", "two"], "two: an overlap between 5:8 and 5:8"),
        (["one", "whole"], "an overlap between 0:5 and 0:12"),
        (["one", shard("rule", path="midpoint")], "differ in path: 'simpson' and 'midpoint'"),
        (["one", shard("side", record_side="corrupted")], "differ in record_side: 'clean'"),
        (["one", edited("state", another_state)], "states at step 5 are not the same in both"),
        (["one", edited("run", another_run)], "differ in config_digest"),
        (["one", "fewer"], "was changed after it was written"),
        (["none"], "was changed after it was written"),
        (["one", "damaged"], "damaged/"),
        (["one", "changed"], "was changed after it was written: its digest is another"),
        (["one", edited("without", without)], "_report.json: says nothing of 'trace'"),
        (["one", "trace"], "trace: holds no attribution; expected the output folder of"),
        (["one", "nowhere"], "nowhere: holds no attribution"),
        (["one", "two", "--window", "4:6", "--window", "4:6"], "4:6, 4:6; expected each once"),
        (["one", "two", "--window", "4:9"], "--window: window 4:9; expected start < end"),
    ]
    for parts, message in cases:
        done = circuit("trace", "merge", "out", *parts)
        assert (done.code, done.out) == (2, ""), message
        assert message in done.err
        assert done.err.count("\n") == 1
        assert not Path("out").exists() or not files_of("out")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"head_layer": 2, "heads": ("0",)}, "no component 'L2H0'"),
    "both": ({"head_layer": 1}, "L1H1 with `head_layer` 1; expected a number, or an address"),
    "rank": ({"ranks": (9,)}, "rank 9 of a head; expected 1 to 8"),
    "basis": ({"bases": ("step",)}, "unknown basis 'step'; expected source, full, or step:N"),
    "basis later": ({"bases": ("step:13",)}, "step 13 of the trace is not addressable"),
    "path": ({"path": "gauss"}, "unknown path rule 'gauss'; expected midpoint, simpson"),
    "end": ({"end_step": 13}, "window 0:13; expected start < end within 0:12"),
    "empty": ({"start_step": 4, "end_step": 4}, "window 4:4"),
    "window": ({"end_step": 6, "windows": ("2:7",)}, "`windows`: window 2:7; expected start < end"),
    "no window": ({"windows": ("7:2",)}, "window '7:2'; expected a:b with a < b"),
    "unbuilt": (
        {"route_pair_type": "recency", "pair_types": ("support_value",)},
        "pairs of type recency are scored but not built",
    ),
    "few pairs": ({"min_pairs_per_type": 60}, "expected at least 60"),
    "trace": ({"optimizer_trace_dir": Path("runs")}, "there is no trace here"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=list(WRONG))
def test_what_does_not_exist_is_refused(
    qk: Attribute, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CircuitError) as refused:
        qk("out", **changes)
    assert message in str(refused.value)
    assert not Path("out").exists() or not files_of("out")


def test_another_run_than_the_traces_is_refused(circuit: Circuit, traced: Path) -> None:
    config = json.loads(CONFIG.read_text())
    Path("other.json").write_text(json.dumps({**config, "seed": 12}))
    done = circuit("trace", "qk", "--config", "other.json", *BASE[2:], "--output-dir", "out")
    assert done.code == 2
    assert "is not that of the trace: seed is 11 there and 12 here" in done.err


@pytest.mark.usefixtures("trained")
def test_a_window_in_which_nothing_moves_has_null_closures() -> None:
    """The rate ends at zero, and with it the last step."""
    config = json.loads(CONFIG.read_text())
    config["schedule"] = {"name": "linear"}
    Path("still.json").write_text(json.dumps(config))
    still = load_config(Path("still.json"), TrainConfig)
    record_trace(still, "still", RecordOptions(end_step=12, anchor_every=4))
    asked = options(optimizer_trace_dir=Path("still"), start_step=11)
    result = run_report(QKAttribution, still, asked, "out")
    (summary,) = result.summary["windows"]
    assert summary["actual"] == 0.0
    assert set(summary["closure"].values()) == {None}
