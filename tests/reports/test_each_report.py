"""Laws of every report: files, JSON, rows, bytes, options, refusals, the line that repeats it."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import altair as alt
import pytest
from command_line import type_and_read
from each_report import GOOD, KINDS, MADE, make, options_of, sources_of
from tiny_run import RUN

from circuit import CircuitError, read_rows
from circuit.artifacts import read_jsonl
from circuit.config import digest_of
from circuit.figures.charts import Chart, chart, colour, equals
from circuit.options import CheckpointOptions, Option
from circuit.reports.intervals import ENDS, interval_file, with_intervals
from circuit.reports.report import ReportResult, run_report
from circuit.reports.written import read_report
from circuit.runs.opening import open_run
from circuit.tasks.symbolic_kv.task import SymbolicKV
from circuit.trace.record import RecordOptions, record_trace
from circuit.train_config import load_run_config
from circuit.training.checkpoints import load_checkpoint, save_checkpoint
from circuit.training.loop import train

DRAW = Chart.svg
"""As it is, before `_sketches` of all tests takes its place."""
DRAWN: dict[str, str] = {}
"""Every drawing that this module has made, by all that it was made from."""
KEYS = {"schema_version", "command", "parameters", "law", "summary", "paths", "provenance"}
KEYS |= {"sha256"}
RENAMED = ["name=renamed"]
every_report = pytest.mark.parametrize("command", sorted(KINDS))
Written = Callable[[str], ReportResult]


def essence(chart: Chart) -> str:
    """All that a chart is drawn from."""
    return json.dumps([chart.name, chart.title, chart.spec, chart.data, chart.follows])


@pytest.fixture(scope="module")
def remembered(drawn: None) -> Iterator[None]:
    """Charts are drawn, each once."""

    def remember(chart: Chart) -> str:
        made_from = essence(chart)
        if made_from not in DRAWN:
            DRAWN[made_from] = DRAW(chart)
        return DRAWN[made_from]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chart, "svg", remember)
        yield


@pytest.fixture(scope="module")
def desk(
    trained_once: Path, remembered: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A working directory with the tiny run, a trace of three steps, and no report yet."""
    folder = tmp_path_factory.mktemp("laws")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("CIRCUIT_DEVICE", raising=False)
        record_trace(open_run(RUN).config, "trace", RecordOptions(end_step=3))
        yield folder


@pytest.fixture(scope="module")
def written(desk: Path) -> Written:
    """A report, made when it is first asked for."""
    results: dict[str, ReportResult] = {}

    def result(command: str) -> ReportResult:
        if command not in results:
            results[command] = make(command, overrides=RENAMED, overwrite=True)
        return results[command]

    return result


def files_of(result: ReportResult) -> dict[str, bytes]:
    """Its files, without what marks the folder as the command's."""
    own = (path for path in result.report.parent.iterdir() if path.is_file())
    return {p.name: p.read_bytes() for p in own if not p.name.endswith((".manifest.json", ".lock"))}


@every_report
def test_files_and_json_have_one_shape(written: Written, command: str) -> None:
    result = written(command)
    payload = json.loads(result.report.read_text())
    assert set(payload) == KEYS | {"digest"}
    assert payload["command"] == command
    assert payload["law"]
    assert re.search(r"\d", payload["law"]), "a law has a number"
    assert payload["summary"]
    assert {"environment", "started_unix", "seconds"} <= set(payload["provenance"])
    assert set(files_of(result)) == {*payload["paths"], result.report.name}
    assert {path.name for path in result.paths} == set(files_of(result))


@every_report
def test_no_absolute_path_and_no_clock_stands_outside_provenance(
    written: Written, desk: Path, command: str
) -> None:
    result = written(command)
    texts = {name: data.decode() for name, data in files_of(result).items()}
    payload = json.loads(texts[result.report.name])
    del payload["provenance"]
    for name, text in (texts | {result.report.name: json.dumps(payload)}).items():
        assert str(desk) not in text, name
        assert not re.search(r"\b20\d\d-\d\d-\d\d[T ]\d\d:", text), name
        assert not re.search(r'"[a-z_]*(seconds|unix|timestamp|hostname)"', text), name


@every_report
def test_rows_are_tables_with_steps_as_integers(written: Written, command: str) -> None:
    result = written(command)
    for path in (path for path in result.rows if path.suffix == ".jsonl"):
        rows = read_jsonl(path)
        assert len(read_rows(path)) == len(rows) > 0, path.name
        for key, value in (item for row in rows for item in row.items()):
            if key == "step" or key.endswith("_step"):
                assert value is None or type(value) is int, (path.name, key)


def objects_of(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within a JSON value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from objects_of(inner)


@every_report
def test_intervals_stand_around_the_numbers_that_they_are_of(
    written: Written, command: str
) -> None:
    """Those of means hold the mean; a fraction or R² may lie outside of its percentiles."""
    result = written(command)
    results, rows = read_report(result.report).results, []
    for file in ("", *(p.name for p in result.rows if p.suffix == ".jsonl")):
        of_file = list(results.rows(file))
        if interval_file(result.kind, file) in (path.name for path in result.rows):
            of_rows = read_jsonl(result.report.with_name(interval_file(result.kind, file)))
            for row, of_row in zip(of_file, of_rows, strict=True):
                assert [row[key] for key in of_row if not key.endswith(ENDS)] == [
                    of_row[key] for key in of_row if not key.endswith(ENDS)
                ]
            of_file = with_intervals(result.kind, results, file)
        rows += [] if file.endswith("_intervals.jsonl") else of_file
    for one in objects_of([dict(result.summary), *rows]):
        for name in (key.removesuffix("_low") for key in one if key.endswith("_low")):
            value, low, high = (one[f"{name}{end}"] for end in ("", "_low", "_high"))
            if None not in (low, high):
                assert low <= high, name
                if not name.startswith(("rescue", "r_squared")):
                    assert low - 1e-6 <= value <= high + 1e-6, name


def without_ends(value: Any) -> Any:
    """A JSON value as it was before there were intervals."""
    if isinstance(value, list):
        return [without_ends(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {n: of for n, of in value.items() if n != "bootstrap" and not n.endswith(ENDS)}
    return {name: without_ends(of) for name, of in kept.items()}


# whose rows have had them from the first
@pytest.mark.parametrize("command", sorted(KINDS.keys() - {"value-code-transfer-rescue"}))
def test_a_report_without_intervals_is_shown(
    written: Written, tmp_path: Path, command: str
) -> None:
    result = written(command)
    for path in result.rows:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in tmp_path.glob("*_intervals.jsonl"):
        path.unlink()
    payload = json.loads(result.report.read_text())
    del payload["digest"]
    old = payload | {"summary": without_ends(payload["summary"])}
    path = tmp_path / result.report.name
    path.write_text(json.dumps({**old, "digest": digest_of(old)}))
    results = read_report(path).results
    assert len(result.kind.notes(results)) <= len(result.notes)
    tables = result.kind.tables(results)
    assert [table.title for table in tables] == [table.title for table in result.tables]
    assert all(table.markdown() for table in tables)
    charts = result.kind.charts(results)
    assert {f"{one.name}.svg" for one in charts} == {path.name for path in result.figures}


@pytest.mark.parametrize(
    "command",
    [
        "bilinear-qk-match-separation",
        "geometry-subspace-intervention",
        "path-logit-decomposition",
    ],
)
def test_one_record_has_no_interval(written: Written, tmp_path: Path, command: str) -> None:
    written(command)
    options = options_of(command).model_copy(update={"max_records": 1})
    result = run_report(KINDS[command], open_run(RUN), options, tmp_path / "out")
    assert result.summary["bootstrap"]["records"] == 1
    assert "One record: there is no interval." in result.notes
    rows = [*objects_of(dict(result.summary)), *(r for p in result.rows for r in read_jsonl(p))]
    found = [v for row in rows for name, v in row.items() if name.endswith(ENDS)]
    assert found
    assert set(found) == {None}


@every_report
def test_its_markdown_shows_every_chart_and_table(written: Written, command: str) -> None:
    result = written(command)
    page = result.page.read_text()
    assert page.startswith(f"# {command}\n")
    assert set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)) == {p.name for p in result.figures}
    for path in result.figures:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert "var(--" not in path.read_text(), "a colour that the page does not have"
    for table in result.tables:
        assert len({len(table.cells(row)) for row in table.rows} | {len(table.columns)}) == 1
    assert any(table.console for table in result.tables)


def test_a_chart_leaves_the_texts_of_its_data_and_has_no_point_for_a_null() -> None:
    runs = {"var(--x)": 1.0, "of var(--ink)": 2.0, "c": None}
    rows = [{"a": a, "b": 1.5, "run": run} for run, a in runs.items()]
    layers = equals("of", ("a", "a"), ("b", "b"), colour("run", list(runs)), rows)
    one = chart("name", "title", {"of": rows}, *layers)
    svg = DRAW(one)
    assert svg == DRAW(one), "equal charts have equal bytes"
    assert re.findall(r'aria-label="a: [^"]*; run: ([^"]*)"', svg) == list(runs)[:2]
    assert all(f">{run}</text>" in svg for run in runs)


@every_report
def test_what_is_shown_is_made_from_what_is_written(
    written: Written, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from nothing else: where it is read, no file of its options stands."""
    result = written(command)
    report = result.report.absolute()
    files = {path.name: path.read_text() for path in result.figures}
    monkeypatch.chdir(tmp_path)
    results = read_report(report).results
    kind = result.kind
    assert kind.notes(results) == list(result.notes)
    assert [t.markdown() for t in kind.tables(results)] == [t.markdown() for t in result.tables]
    charts = kind.charts(results)
    drawn = {f"{one.name}.svg": DRAWN[essence(one)] for one in charts}
    assert drawn == files
    assert len(drawn) == len(charts), "two charts share a name"
    for one in charts:
        alt.LayerChart.validate(dict(one.spec))  # which refuses what is no Vega-Lite


@every_report
def test_equal_inputs_give_equal_bytes_and_nothing_is_replaced_unasked(
    written: Written, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line that the page prints makes the same bytes: all but the JSON, which tells times.

    What was set in the run's config is remembered, and stands in the line.
    """
    result = written(command)
    if sources_of(options_of(command)):  # of the reports that it reads, as they are now
        result = make(command, overrides=RENAMED, overwrite=True)
    before = files_of(result)
    report = read_report(result.report)
    line = report.command_line(load_run_config(RUN), str(MADE / command))
    if result.kind.reads_run:
        path = f"{RUN}/run_config.json"
        assert report.overrides == {"config": path, "set": RENAMED}
        assert f"--config {path} --set {RENAMED[0]}" in line
    program, *words, last = shlex.split(line)
    assert (program, last) == ("circuit", "--overwrite")
    refused = type_and_read(words, capsys)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert files_of(result) == before
    again = type_and_read([*words, last], capsys)
    assert again.code == 0, again.err
    assert " ".join(result.law.split())[:40] in " ".join(again.out.split())
    after = files_of(result)
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} <= {result.report.name}
    first, second = (json.loads(files[result.report.name]) for files in (before, after))
    for payload in (first, second):
        del payload["provenance"], payload["digest"]
    assert first == second


@every_report
def test_options_are_read_back(command: str) -> None:
    options = options_of(command)
    read = type(options).from_json(json.loads(json.dumps(options.to_json())))
    assert read == options
    for name, info in type(options).model_fields.items():
        if not info.is_required():
            assert getattr(read.model_copy(update={name: info.default}), name) == info.default


@every_report
def test_a_changed_digit_is_refused_by_whoever_reads_it(written: Written, command: str) -> None:
    result = written(command)
    whole = result.report.read_text()
    payload = json.loads(whole)
    for key in ("summary", "law"):
        text = json.dumps(payload[key])
        digit = re.search(r"\d", text)
        assert digit is not None
        changed = text[: digit.start()] + str((int(digit[0]) + 1) % 10) + text[digit.end() :]
        result.report.write_text(json.dumps({**payload, key: json.loads(changed)}))
        with pytest.raises(CircuitError, match="digest"):
            read_report(result.report)
    result.report.write_text(json.dumps({**payload, "schema_version": 1, "law": "to 0"}))
    with pytest.raises(CircuitError, match="digest"):
        read_report(result.report)
    for key in ("parameters", "provenance", "sha256", "summary"):
        forged = {k: v for k, v in payload.items() if k != "digest"} | {key: 1.5}
        result.report.write_text(json.dumps({**forged, "digest": digest_of(forged)}))
        with pytest.raises(CircuitError, match="is no report of this program"):
            read_report(result.report)
    result.report.write_text(whole)
    read = read_report(result.report)
    assert read.payload == {k: v for k, v in payload.items() if k != "digest"}
    for rows in result.rows:
        before = read.file(rows.name).read_bytes()
        rows.write_bytes(b"".join(before.splitlines(keepends=True)[1:]))
        with pytest.raises(CircuitError, match="was changed after it was written"):
            read.file(rows.name)
        rows.write_bytes(before)
    with pytest.raises(CircuitError, match="says nothing of 'no such number'"):
        _ = read.summary["no such number"]


def bad_values(field: str, option: Option, command: str) -> Iterator[Any]:
    """Values of a field that its declaration rules out."""
    if option.choices:
        yield "nonsense"
    for bound, step in ((option.least, -1), (option.above, 0), (option.most, 1), (option.below, 0)):
        if bound is not None:
            yield type(bound)(bound + step)
    if isinstance(GOOD.get(field), float):
        yield from (float("nan"), float("inf"))
    if type(GOOD.get(field)) is int:
        yield 2**63
    if isinstance(GOOD.get(field), Path):
        yield Path("\udce9")


@every_report
def test_bad_options_are_refused_in_one_line_that_names_the_field(command: str) -> None:
    options = options_of(command)
    given = dict(options)
    kind = type(options)
    with pytest.raises(CircuitError, match="unknown option 'no_such_field'"):
        kind(**given, no_such_field=1)
    for field, option in kind.declared().items():
        several = isinstance(getattr(options, field), tuple)
        bad = [(one,) if several else one for one in bad_values(field, option, command)]
        bad += [getattr(options, field) * 2] if several and getattr(options, field) else []
        for value in bad:
            with pytest.raises(CircuitError) as refused:
                kind(**given | {field: value})
            assert "\n" not in str(refused.value)
            assert f"`{field}`" in str(refused.value)
        if kind.model_fields[field].is_required():
            with pytest.raises(CircuitError, match=f"`{field}`"):
                kind(**{name: one for name, one in given.items() if name != field})


@pytest.mark.parametrize(
    "command", [name for name in sorted(KINDS) if "slice" in KINDS[name].Options.model_fields]
)
def test_figures_are_given_apart_by_any_slice_of_the_task(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Those over all reads are the same, and each value has its own reads."""
    monkeypatch.setattr(Chart, "svg", lambda _: "<svg/>")
    usual, by = written(command), "writes_before"
    options = options_of(command).model_copy(update={"slice": by})
    result = run_report(KINDS[command], open_run(RUN), options, tmp_path / "out")
    assert read_report(result.report).payload["provenance"]["slice"] == by

    def over_all(rows: Sequence[Any], name: str) -> list[Any]:
        """Rows without those of one value, and without what names the value."""
        kept = [row for row in rows if not isinstance(row.get(name), str) or row[name] == "all"]
        return [{k: v for k, v in row.items() if k not in (name, f"by_{name}")} for row in kept]

    values = set()
    for before, after in zip(usual.rows, result.rows, strict=True):
        one, other = read_jsonl(before), read_jsonl(after)
        assert over_all(one, "lag") == over_all(other, by)
        values |= {str(row[by]) for row in other if by in row}
        values |= {value for row in other for value in row.get(f"by_{by}", {})}
    assert len(values - {"all"}) > 2


SINGLE = SymbolicKV.single_roles()
OF_TASK: dict[str, tuple[str, Sequence[str]]] = {
    "role": ("nonsense", tuple(SymbolicKV.roles)),
    "single_role": ("causal_prefix", SINGLE),
    "pair_type": ("nonsense", tuple(SymbolicKV.pair_types)),
    "group_by": ("causal_prefix", SINGLE),
    "subspace": ("embedding_op_identity", ("embedding_key_identity", "full_residual")),
    "task_slice": ("nonsense", tuple(SymbolicKV.slices)),
}
"""By kind of an option: a value that the run's task does not have, and names that it has."""
NARROWER = {
    ("bilinear-qk-rank-adam-state-attribution", "route_pair_type"),  # one of its `pair_types`
    ("mlp-input-functional-subspace-report", "pair_types"),  # those of its `scalar_pair_rows`
}
"""Options that take fewer than the task has, and are held against these first."""


@pytest.mark.parametrize("command", [name for name in sorted(KINDS) if KINDS[name].reads_run])
def test_what_the_task_does_not_have_is_refused_in_one_line_that_lists_what_it_has(
    written: Written, tmp_path: Path, command: str
) -> None:
    written(command)
    options, kind = options_of(command), KINDS[command]
    for field, option in kind.Options.declared().items():
        if not option.of_task:
            continue
        wrong, known = OF_TASK[option.kind]
        several = isinstance(getattr(options, field), tuple)
        given = {**dict(options), field: (wrong,) if several else wrong}
        with pytest.raises(CircuitError) as refused:
            run_report(kind, open_run(RUN), type(options)(**given), tmp_path / "out")
        said = str(refused.value)
        assert "\n" not in said
        assert wrong in said
        assert "; expected " in said
        if (command, field) not in NARROWER:
            assert said.startswith(f"`{field}`: ")
            assert all(name in said for name in known), said


@pytest.mark.parametrize(
    "command",
    [
        name
        for name in sorted(KINDS)
        if {"checkpoint", "checkpoints"} & KINDS[name].Options.declared().keys()
    ],
)
def test_finite_weights_whose_logits_overflow_are_no_crash(
    written: Written, tmp_path: Path, command: str
) -> None:
    """A report of them is one that says so, or there is none and one line says why."""
    written(command)
    kept = {path: path.read_bytes() for path in (RUN / "checkpoints").glob("step_*.pt")}
    try:
        for path in kept:
            state = load_checkpoint(path)
            large = {
                name: tensor * (1e25 if "W_E" in name or "ln_final.w" in name else 1)
                for name, tensor in state.parameters.items()
            }
            save_checkpoint(path, replace(state, parameters=large))
        with contextlib.suppress(CircuitError):
            run_report(KINDS[command], open_run(RUN), options_of(command), tmp_path / "out")
    finally:
        for path, payload in kept.items():
            path.write_bytes(payload)


@every_report
def test_a_folder_that_is_not_its_own_is_left_alone(
    written: Written, tmp_path: Path, command: str
) -> None:
    result = written(command)
    for name in (result.report.name, result.page.name, "some_other_report.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(CircuitError):
            make(command, folder, overwrite=True)
        assert [path.read_text() for path in folder.iterdir() if path.suffix != ".lock"] == ["mine"]
    result.page.rename(tmp_path / "page")
    result.page.mkdir()  # where a file of its own stood
    before = files_of(result)
    with pytest.raises(CircuitError, match="is a folder now"):
        make(command, result.report.parent, overwrite=True)
    assert files_of(result) == before
    result.page.rmdir()
    (tmp_path / "page").rename(result.page)


@pytest.fixture(scope="module")
def another(desk: Path) -> Path:
    """Another run on the same benchmark, with a benchmark's probe set that is not of it."""
    config = load_run_config(RUN)
    train(config.replace(output_dir="runs/another", seed=config.seed + 1))
    probes = (RUN / "analysis/probe_set.jsonl").read_text()
    Path("another").mkdir()
    Path("another/probe_set.jsonl").write_text(probes)
    metadata = json.loads((RUN / "analysis/probe_set.metadata.json").read_text())
    metadata["benchmark_digest"] = "0" * 64
    Path("another/probe_set.metadata.json").write_text(json.dumps(metadata))
    return Path("runs/another")


@every_report
def test_what_belongs_to_another_run_is_refused(
    written: Written, another: Path, tmp_path: Path, command: str
) -> None:
    options, kind = options_of(command), KINDS[command]
    foreign: list[dict[str, Any]] = []
    if "probe_set" in kind.Options.declared():
        foreign.append({"probe_set": Path("another/probe_set.jsonl")})
    if isinstance(options, CheckpointOptions):
        paths = tuple(another / path.relative_to(RUN) for path in options.checkpoints)
        foreign.append({"checkpoints": paths})
    written(command)
    for changes in foreign:
        with pytest.raises(CircuitError):
            run_report(kind, open_run(RUN), options.model_copy(update=changes), tmp_path / "out")
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*report*"))
