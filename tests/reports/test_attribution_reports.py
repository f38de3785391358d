"""The attribution commands, as they are typed: files, shards, options, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import type_in
from tiny_run import MadeOnce

from circuit.artifacts import read_jsonl
from circuit.attribution.window import ScalarSource
from circuit.config import load_config
from circuit.reports.bilinear_qk_rank_adam_state_attribution import QKOptions, QKScalars
from circuit.reports.inputs import PairOptions, traced_inputs
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.qk_match import QKMatch
from circuit.trace.record import RecordOptions, record_trace
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig

QK = "bilinear_qk_rank_adam_state_attribution"
RUN = Path("runs/tiny")
PROBES = RUN / "analysis/probe_set.jsonl"
CONFIG = RUN / "run_config.json"
BASE = ("--config", str(CONFIG), "--probe-set", str(PROBES))
BASE += ("--optimizer-trace-dir", "trace", "--min-route-pairs-per-type", "4")
HEAD = ("--head-layer", "1", "--head", "1", "--rank", "3")
CONTRACT = (
    *("--device", "cpu", "--head-layer", "1", "--head", "1", "--rank", "8"),
    *("--context-stage", "layer_0_post_mlp", "--layernorm-mode", "head_ln1"),
    *("--score-query-role", "prediction", "--support-key-role", "support_value"),
    *("--distractor-key-role", "value_distractors", "--record-side", "clean"),
    *("--route-pair-type", "support_value", "--route-pair-source-type", "support_value"),
    *("--max-route-pairs-per-type", "64", "--min-route-pairs-per-type", "4"),
    *("--loss-scope", "full_lm", "--overwrite"),
)
Circuit = Callable[..., Any]


def scalars_of(source: ScalarSource, run: ReplayedRun) -> Sequence[Any]:
    return source.scalars(source.inputs(run))


@pytest.fixture
def qk(circuit: Circuit, traced: Path) -> Circuit:
    """Types `circuit trace qk`, with the folder that it writes to and further words."""

    def run(folder: str, *words: str, base: tuple[str, ...] = BASE) -> Any:
        return circuit("trace", "qk", *base, "--output-dir", folder, *words)

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


def test_the_contracts_command_leaves_its_outputs(qk: Circuit, circuit: Circuit) -> None:
    words = (QK.replace("_", "-"), *BASE[:6], "--output-dir", "out", *CONTRACT)
    done = circuit(*words)
    assert (done.code, done.err) == (0, "")
    names = [f"{QK}_report.json", f"{QK}_report.md", f"{QK}_rows.jsonl"]
    assert sorted(files_of("out")) == [*names, "groups_circuit.svg", "terms.svg"]
    rows, report = rows_of("out"), report_of("out")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {row["scalar"] for row in rows} == {"qk_match.L1H1.rank8"}
    assert report["law"].startswith("the contributions to qk_match.L1H1.rank8 over steps 0:12")
    (summary,) = report["summary"]["windows"]
    assert summary["actual"] == pytest.approx(sum(row["actual"] for row in rows))
    given = report["parameters"]
    assert (given["heads"], given["ranks"], given["path"]) == (["L1H1"], [8], "simpson")
    assert report["provenance"]["trace"]["state_at_start"] == ReplayedRun.open(
        "trace"
    ).store.state_digests(0)
    assert str(Path.cwd()) not in "".join(
        body.decode() for name, body in files_of("out").items() if name != names[0]
    )
    # under its other name: the same bytes
    assert qk("short", *CONTRACT[:-1]).code == 0
    first, short = (files_of(folder, but=("report.json",)) for folder in ("out", "short"))
    assert first == short


def test_an_earlier_report_is_kept_unless_told(qk: Circuit) -> None:
    assert qk("out", *HEAD, "--end-step", "2").code == 0
    before = files_of("out")
    again = qk("out", *HEAD, "--end-step", "3")
    assert (again.code, again.out) == (2, "")
    assert "pass --overwrite" in again.err
    assert files_of("out") == before
    bad = qk("out", *HEAD[:-1], "9", "--overwrite")  # refused input leaves the earlier report
    assert (bad.code, files_of("out")) == (2, before)
    assert qk("out", *HEAD, "--end-step", "3", "--overwrite").code == 0
    assert len(rows_of("out")) == 3


def test_json_is_one_object_whose_paths_exist(qk: Circuit) -> None:
    done = qk("out", *HEAD, "--end-step", "2", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.payload["law"] == report_of("out")["law"]
    assert all(Path(path).is_file() for path in done.payload["paths"])


def test_every_window_is_the_sum_of_its_rows(qk: Circuit) -> None:
    windows = ("--window", "0:5", "--window", "5:12", "--window", "3:4")
    assert qk("out", *HEAD, *windows, "--partition", "layer", "--partition", "circuit").code == 0
    rows, report = rows_of("out"), report_of("out")
    page = (Path("out") / f"{QK}_report.md").read_text()
    for summary, (a, b) in zip(
        report["summary"]["windows"], [(0, 12), (0, 5), (5, 12), (3, 4)], strict=True
    ):
        assert (summary["start_step"], summary["end_step"]) == (a, b)
        for term, share in summary["path"].items():
            own = sum(row["path"][term] for row in rows[a:b])
            assert share == pytest.approx(own, rel=1e-9, abs=1e-12)
            for groups in summary["groups"].values():
                total = sum(kinds["path"][term] for kinds in groups.values())
                assert total == pytest.approx(own, rel=1e-7, abs=1e-9)
        assert f"| {a}:{b} | {summary['actual']:+.4g} |" in page
    assert {"groups_layer.svg", "groups_circuit.svg"} <= set(files_of("out"))


def test_all_heads_bases_and_lags_in_one_pass(qk: Circuit) -> None:
    words = ("--heads", "all", "--rank", "2", "--rank", "3", "--end-step", "3", "--by-lag")
    bases = ("--basis", "source", "--basis", "step:6", "--basis", "full")
    assert qk("all", *words, *bases).code == 0
    rows = rows_of("all")
    kinds = ["rank2", "rank3", "rank2_of_step6", "rank3_of_step6", "full", "full_with_biases"]
    heads = ["L0H0", "L0H1", "L1H0", "L1H1"]
    names = {f"qk_match.{head}.{kind}" for head in heads for kind in kinds}
    lags = ("", ".lag1", ".lag2")
    assert {row["scalar"] for row in rows} == {name + lag for name in names for lag in lags}
    assert len(rows) == 3 * 24 * 3
    for row in rows:
        assert row["telescopes"] == any(kind in row["scalar"] for kind in ("full", "step6"))
    # alone, a scalar is what it is among many
    assert qk("one", *HEAD, "--end-step", "3").code == 0
    among = [row for row in rows if row["scalar"] == "qk_match.L1H1.rank3"]
    for ours, theirs in zip(rows_of("one"), among, strict=True):
        assert ours["actual"] == pytest.approx(theirs["actual"], rel=1e-4, abs=1e-7)
    # the whole is the mean of the lags, weighted by their reads
    config = load_config(CONFIG, TrainConfig)
    study = traced_inputs(config, PROBES, ReplayedRun.open("trace"))
    options = QKOptions(pairs=PairOptions(min_per_type=4), by_lag=True)
    reads = options.reads(options.batch(study))
    for step in (1, 3):
        own = {row["scalar"]: row["path"] for row in rows if row["step"] == step}
        for name in names:
            for term, share in own[name].items():
                parts = sum(len(reads[lag]) * own[name + lag][term] for lag in lags[1:])
                assert parts / len(reads[""]) == pytest.approx(share, rel=1e-4, abs=1e-8)


def test_options_choose_what_is_scored(qk: Circuit, traced: Path) -> None:
    """Each of them is another choice of reads, positions or states; together, the library's."""
    changes: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "side": (("--record-side", "corrupted"), {"side": "corrupted"}),
        "support": (("--support-key-role", "support_key"), {"support_role": "support_key"}),
        "far": (
            ("--distractor-key-role", "key_distractors"),
            {"distractor_role": "key_distractors"},
        ),
        "query": (
            (
                *("--score-query-role", "support_value", "--support-key-role", "support_key"),
                *("--distractor-key-role", "support_op"),
            ),
            {
                "query_role": "support_value",
                "support_role": "support_key",
                "distractor_role": "support_op",
            },
        ),
        "norm": (("--layernorm-mode", "none"), {"layernorm_mode": "none"}),
        "stage": (("--context-stage", "embedding"), {"context_stage": "embedding"}),
        "type": (("--route-pair-type", "query_key"), {"scored_type": "query_key"}),
    }
    config, trace = load_config(CONFIG, TrainConfig), ReplayedRun.open(traced)
    study = traced_inputs(config, PROBES, trace)
    model = study.setup.model(trace.state(4))

    def scalar_of(**changed: Any) -> QKMatch:
        types = ("query_key", "support_value")
        pairs = PairOptions(types, max_per_type=9, min_per_type=4)
        options = QKOptions(**{"heads": ("L1H1",), "ranks": (3,), "pairs": pairs, **changed})
        (scalar,) = scalars_of(QKScalars(config, PROBES, options), trace)
        return scalar

    def chosen(scalar: QKMatch) -> tuple[Any, ...]:
        reads = scalar.reads
        positions = (reads.query, reads.support, reads.distractors)
        read = (reads.row.tolist(), *(where.tolist() for where in positions))
        return reads.sequences, str(read), scalar.hook, scalar.layernorm_mode

    plain = scalar_of()
    choices = {name: chosen(scalar_of(**changed)) for name, (_, changed) in changes.items()}
    assert len({chosen(plain), *choices.values()}) == 8
    assert len(scalar_of(scored_type="query_key").reads) < len(plain.reads)
    words = [word for typed, _ in changes.values() for word in typed]
    words += ["--route-pair-source-type", "query_key", "--route-pair-source-type", "support_value"]
    words += ["--max-route-pairs-per-type", "9", "--start-step", "4", "--end-step", "5"]
    assert qk("out", *HEAD, *words).code == 0
    everything = {name: one for _, changed in changes.values() for name, one in changed.items()}
    with torch.no_grad():
        value = float(evaluate_scalar(scalar_of(**everything), model).mean())
    assert rows_of("out")[0]["before"] == pytest.approx(value, rel=1e-4, abs=1e-6)


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
def shards(qk: Circuit, shards_once: Path) -> Circuit:
    """Copies of them in the working directory."""
    for name in (*SHARDS, "whole"):
        shutil.copytree(shards_once / name, name)
    return qk


@pytest.mark.usefixtures("shards")
def test_merged_shards_are_the_unsharded_report(circuit: Circuit) -> None:
    for out, parts in (("a", ["one", "two", "three"]), ("b", ["three", "one", "two"])):
        done = circuit("trace", "merge", out, *parts, "--window", "2:9")
        assert (done.code, done.err) == (0, "")
        assert files_of(out, but=("report.json",)) == files_of("whole", but=("report.json",))
        merged, whole = report_of(out), report_of("whole")
        for part in ("parameters", "summary", "law", "paths"):
            assert merged[part] == whole[part]
        assert merged["provenance"]["trace"] == whole["provenance"]["trace"]
        assert merged["provenance"]["merged_from"] == [[0, 5], [5, 8], [8, 12]]
    # merged ones merge again, and one alone is a whole
    assert circuit("trace", "merge", "ab", "one", "two").code == 0
    done = circuit("trace", "merge", "abc", "three", "ab", "--window", "2:9", "--json")
    assert (done.code, done.payload["law"]) == (0, report_of("whole")["law"])
    assert files_of("abc", but=("report.json",)) == files_of("whole", but=("report.json",))
    refused = circuit("trace", "merge", "abc", "one")
    assert (refused.code, "pass --overwrite" in refused.err) == (2, True)


def test_shards_that_do_not_fit_are_refused(shards: Circuit, circuit: Circuit) -> None:
    full = ("--head", "L1H1", "--basis", "full")

    def shard(folder: str, *words: str) -> str:
        assert shards(folder, *full, "--start-step", "5", "--end-step", "8", *words).code == 0
        return folder

    def edited(folder: str, change: Callable[[Path, dict[str, Any]], None]) -> str:
        shutil.copytree("two", folder)
        path = Path(folder) / f"{QK}_report.json"
        payload = json.loads(path.read_text())
        change(Path(folder) / f"{QK}_rows.jsonl", payload)
        path.write_text(json.dumps(payload))
        return folder

    def another_state(rows: Path, payload: dict[str, Any]) -> None:
        payload["provenance"]["trace"]["state_at_start"]["parameters"] = "0" * 64

    def another_run(rows: Path, payload: dict[str, Any]) -> None:
        payload["provenance"]["config_digest"] = "0" * 64

    def no_rows(rows: Path, payload: dict[str, Any]) -> None:
        rows.write_text("")

    def fewer_rows(rows: Path, payload: dict[str, Any]) -> None:
        rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))

    def damaged(rows: Path, payload: dict[str, Any]) -> None:
        rows.write_text(rows.read_text().replace('"step": 6', '"step": 7'))

    def without(rows: Path, payload: dict[str, Any]) -> None:
        del payload["provenance"]["trace"]

    cases = [
        (["one", "three"], "three: a gap between 0:5 and 8:12; expected a shard that starts at 5"),
        (["one", "two", "two"], "two: an overlap between 5:8 and 5:8"),
        (["one", "whole"], "an overlap between 0:5 and 0:12"),
        (["one", shard("rule", "--path", "midpoint")], "differ in path: 'simpson' and 'midpoint'"),
        (["one", shard("layer", "--partition", "layer")], "differ in partitions: ['circuit']"),
        (["one", shard("side", "--record-side", "corrupted")], "differ in side: 'clean'"),
        (["one", shard("ask", "--loss-scope", "answer")], "differ in loss_scope: 'full_lm'"),
        (["one", edited("state", another_state)], "states at step 5 are not the same in both"),
        (["one", edited("run", another_run)], "differ in config_digest"),
        (["one", edited("fewer", fewer_rows)], "cover 0:7; expected 0:8, as the reports say"),
        ([edited("none", no_rows)], "the shards hold no rows"),
        (["one", edited("damaged", damaged)], "damaged/"),
        (["one", edited("without", without)], "is no report of bilinear-qk-rank"),
        (["one", "trace"], "trace: holds no attribution; expected the output folder of"),
        (["one", "nowhere"], "nowhere: holds no attribution"),
        (["one", "two", "--window", "4:9"], "window 4:9; expected start < end within 0:8"),
    ]
    for parts, message in cases:
        done = circuit("trace", "merge", "out", *parts)
        assert (done.code, done.out) == (2, ""), message
        assert message in done.err
        assert done.err.count("\n") == 1
        assert not Path("out").exists() or not files_of("out")


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no head": ((), "no head is named; pass --head L2H1, or --heads all"),
    "head": (("--head", "L1H2"), "no component 'L1H2'; expected layers 0-1, heads 0-1"),
    "layer": (("--head-layer", "2", "--head", "0"), "no component 'L2H0'"),
    "MLP": (("--head", "L1MLP"), "'L1MLP' is no head; expected a head"),
    "address": (("--head", "one"), "unknown component 'one'"),
    "both": (("--head-layer", "1", "--head", "L1H1"), "--head L1H1 with --head-layer 1"),
    "all and one": (("--heads", "all", "--head", "L1H1"), "'all' alone"),
    "twice": (("--head", "L1H1", "--head", "L1H1"), "expected each once"),
    "rank": ((*HEAD[:-1], "9"), "rank 9 of a head; expected 1 to 8"),
    "basis": ((*HEAD, "--basis", "step"), "unknown basis 'step'; expected source, full, or step:N"),
    "basis later": ((*HEAD, "--basis", "step:13"), "step 13 of the trace is not addressable"),
    "partition": ((*HEAD, "--partition", "head"), "unknown partition 'head'; expected one of"),
    "path": ((*HEAD, "--path", "gauss"), "unknown path rule 'gauss'; expected midpoint, simpson"),
    "scope": ((*HEAD, "--loss-scope", "lm"), "unknown loss scope 'lm'; expected full_lm or answer"),
    "end": ((*HEAD, "--end-step", "13"), "window 0:13; expected start < end within 0:12"),
    "empty": ((*HEAD, "--start-step", "4", "--end-step", "4"), "window 4:4"),
    "window": ((*HEAD, "--end-step", "6", "--window", "2:7"), "--window: window 2:7"),
    "no window": ((*HEAD, "--window", "7:2"), "window '7:2'; expected a:b with a < b"),
    "stage": ((*HEAD, "--context-stage", "layer_2_post_mlp"), "unknown stage 'layer_2_post_mlp'"),
    "norm": ((*HEAD, "--layernorm-mode", "ln2"), "unknown layernorm mode 'ln2'"),
    "role": ((*HEAD, "--support-key-role", "nowhere"), "unknown role 'nowhere'"),
    "side": ((*HEAD, "--record-side", "left"), "unknown side 'left'"),
    "type": ((*HEAD, "--route-pair-type", "none"), "unknown pair type 'none'"),
    "unbuilt": (
        (*HEAD, "--route-pair-type", "recency", "--route-pair-source-type", "support_value"),
        "pairs of type recency are scored but not built",
    ),
    "few pairs": ((*HEAD, "--min-route-pairs-per-type", "60"), "expected at least 60"),
    "trace": ((*HEAD, "--optimizer-trace-dir", "runs"), "there is no trace here"),
    "probes": ((*HEAD, "--probe-set", "nowhere.jsonl"), "nowhere.jsonl"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=list(WRONG))
def test_bad_input_is_one_line_and_writes_nothing(
    qk: Circuit, words: tuple[str, ...], message: str
) -> None:
    done = qk("out", *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert message in done.err
    assert not Path("out").exists() or not files_of("out")


def test_another_run_is_refused(qk: Circuit) -> None:
    config = json.loads(CONFIG.read_text())
    Path("other.json").write_text(json.dumps({**config, "seed": 12}))
    done = qk("out", *HEAD, base=("--config", "other.json", *BASE[2:]))
    assert done.code == 2
    assert "is not that of the trace: seed is 11 there and 12 here" in done.err


def test_a_window_in_which_nothing_moves_has_null_closures(qk: Circuit) -> None:
    """The rate ends at zero, and with it the last step."""
    config = json.loads(CONFIG.read_text())
    config["schedule"] = {"name": "linear"}
    Path("still.json").write_text(json.dumps(config))
    still = load_config(Path("still.json"), TrainConfig)
    record_trace(still, "still", RecordOptions(end_step=12, anchor_every=4))
    base = ("--config", "still.json", "--probe-set", str(PROBES), "--optimizer-trace-dir", "still")
    words = ("--min-route-pairs-per-type", "4", "--start-step", "11")
    done = qk("out", *HEAD, *words, base=base)
    assert (done.code, done.err) == (0, "")
    (summary,) = report_of("out")["summary"]["windows"]
    assert summary["actual"] == 0.0
    assert set(summary["closure"].values()) == {None}
    assert set(summary["path"].values()) == {0.0}
