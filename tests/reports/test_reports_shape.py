"""Laws that hold for every report command: one shape of files, JSON and rows; equal bytes again.

A command with an `--output-dir` is a report; a new one needs a line in `WORDS`.
"""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import typer.main
from circuit.cli.app import app
from command_line import Done, type_and_read

from circuit import read_rows
from circuit.artifacts import read_jsonl
from circuit.reports.base import report_name
from circuit.runs.opening import open_run
from circuit.trace.record import RecordOptions, record_trace

RUN = "runs/tiny"
ANALYSIS = f"{RUN}/analysis"
CONFIG = f"--config {RUN}/run_config.json"
PROBE = f"{CONFIG} --probe-set {ANALYSIS}/probe_set.jsonl"
POINTS = " ".join(f"--checkpoint {RUN}/checkpoints/step_{step:06d}.pt" for step in (3, 12))
ROWS_OF = "reports/{0}/{1}_rows.jsonl"
FEW = "--max-pairs-per-type 4 --min-pairs-per-type 2"
TRACE = f"--optimizer-trace-dir {ANALYSIS}/trace"
ROUTE = "--route label=all,stage=final_norm,subspace=full_residual,position_role=prediction"

WORDS = {
    "optimizer-update-trace": f"{CONFIG} --from-initialization --end-step 3",
    "bilinear-qk-rank-adam-state-attribution": f"{PROBE} {TRACE} --head-layer 1 --head 0 --rank 2"
    " --max-route-pairs-per-type 4 --min-route-pairs-per-type 2 --end-step 2",
    "mlp-functional-write-adam-state-attribution": f"{PROBE} {TRACE} --source-component L0H0"
    f" --component L0MLP --reference-step 2 --end-step 2 {FEW}",
    "bilinear-qk-match-separation": f"{PROBE} {POINTS} --rank 2",
    "weight-svd-trace": f"{CONFIG} {POINTS}",
    "geometry-subspace-intervention": f"{PROBE} {POINTS} --stage layer_1_post_mlp --subspace"
    " embedding_value_identity --rank 2 --operation remove",
    "ov-write-progress-report": f"{PROBE} {POINTS} {FEW}",
    "answer-scalar-residual-diagnosis": f"{PROBE} {POINTS} {FEW}",
    "route-to-margin-closure": f"{PROBE} {POINTS} {FEW} {ROUTE}",
    "route-to-scalar-closure": "--route-closure-rows "
    + ROWS_OF.format("route-to-margin-closure", "route_to_margin_closure")
    + " --scalar-pair-rows "
    + ROWS_OF.format("answer-scalar-residual-diagnosis", "answer_scalar_residual_diagnosis_pair"),
    "mlp-input-functional-subspace-report": f"{PROBE} --source-component L0H0 --component L0MLP"
    " --subspace-rank 2 --scalar-pair-rows "
    + ROWS_OF.format("answer-scalar-residual-diagnosis", "answer_scalar_residual_diagnosis_pair"),
    "value-code-subspace-report": f"{PROBE} {POINTS} --stage layer_1_post_mlp --pca-rank 2",
    "value-code-transfer-rescue": f"{PROBE} {POINTS} --source-stage layer_0_post_mlp --target-stage"
    " layer_1_post_mlp --basis-rank 2 --split validation_iid",
}
"""Command -> its words without `--output-dir`; later ones may read what earlier ones wrote."""

KEYS = {"schema_version", "command", "parameters", "law", "summary", "paths", "provenance"}


def commands() -> dict[str, set[str]]:
    """Every command of the program and its options."""
    group: Any = typer.main.get_command(app)
    return {
        name: {option.opts[0] for option in getattr(command, "params", [])}
        for name, command in group.commands.items()
    }


@dataclass(frozen=True)
class Written:
    """What a report left in its folder, and what `--json` printed."""

    command: str
    folder: Path
    printed: dict[str, Any]

    @cached_property
    def json(self) -> dict[str, Any]:
        """The report."""
        path = self.folder / f"{report_name(self.command)}_report.json"
        found = json.loads(path.read_text("utf-8"))
        assert isinstance(found, dict)
        return found

    @property
    def files(self) -> list[str]:
        """Names of its files, without what marks the folder as the command's."""
        own = (path.name for path in self.folder.iterdir() if path.is_file())
        return sorted(n for n in own if not n.endswith((".manifest.json", ".lock")))


@pytest.fixture(scope="module")
def desk(
    trained_once: Path, drawn: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A working directory with the tiny run, a trace of three steps, and no report yet."""
    folder = tmp_path_factory.mktemp("shape")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        record_trace(open_run(RUN).config, f"{ANALYSIS}/trace", RecordOptions(end_step=3))
        yield folder


@pytest.fixture(scope="module")
def done() -> dict[str, Written]:
    return {}


@pytest.fixture
def written(
    desk: Path,
    done: dict[str, Written],
    request: pytest.FixtureRequest,
    type_words: Callable[[str], Done],
) -> Written:
    """The report of the test's command, made when it is first asked for."""
    wanted = list(WORDS)[: list(WORDS).index(request.param) + 1]
    sources = [name for name in wanted[:-1] if name in WORDS[request.param]]
    for command in (*sources, request.param):
        if command not in done:
            made = type_words(f"{typed(command)} --json")
            assert made.code == 0, made.err
            done[command] = Written(command, desk / "reports" / command, made.payload)
    return done[request.param]


def typed(command: str) -> str:
    return f"{command} {WORDS[command]} --output-dir reports/{command}"


@pytest.fixture
def type_words(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    """Types `circuit ...`."""
    return lambda words: type_and_read(words.split(), capsys)


every_report = pytest.mark.parametrize("written", list(WORDS), indirect=True)


def test_every_command_with_an_output_folder_is_under_these_laws() -> None:
    """Of those that report; the two others make weights."""
    writing = {name for name, found in commands().items() if "--output-dir" in found}
    assert writing - set(WORDS) == {"export", "import-checkpoints"}
    assert set(WORDS) <= writing


@pytest.mark.parametrize("command", list(WORDS))
def test_every_report_takes_the_shared_options(command: str) -> None:
    assert {"--output-dir", "--overwrite", "--json"} <= commands()[command]


@every_report
def test_the_json_has_the_one_set_of_keys(written: Written) -> None:
    found = written.json
    assert set(found) == KEYS
    assert found["schema_version"] == 1
    assert found["command"] == written.command
    assert {"environment", "started_unix", "seconds"} <= set(found["provenance"])
    assert isinstance(found["law"], str)
    assert found["summary"]


@every_report
def test_the_report_names_every_file_that_it_wrote_and_no_other(written: Written) -> None:
    report = f"{report_name(written.command)}_report.json"
    assert sorted({*written.json["paths"], report}) == written.files
    printed = [Path(path) for path in written.printed["paths"]]
    here = {path.name for path in printed if path.parent.name == written.command}
    assert sorted(here) == written.files  # the states of a trace stand in a folder below
    assert all(path.is_file() for path in printed)


@every_report
def test_what_is_printed_is_what_was_written(written: Written) -> None:
    assert written.printed["law"] == written.json["law"]
    assert written.printed["summary"] == written.json["summary"]


@every_report
def test_no_absolute_path_and_no_clock_stands_outside_provenance(
    written: Written, desk: Path
) -> None:
    payload = {key: value for key, value in written.json.items() if key != "provenance"}
    texts = {"json": json.dumps(payload)}
    own_provenance = (f"{report_name(written.command)}_report.json", "trace.json")
    for name in set(written.files) - set(own_provenance):
        texts[name] = (written.folder / name).read_text("utf-8")
    for name, text in texts.items():
        assert str(desk) not in text, name
        assert not re.search(r"\b20\d\d-\d\d-\d\d[T ]\d\d:", text), name
        assert not re.search(r'"[a-z_]*(seconds|unix|timestamp|hostname)"', text), name


@every_report
def test_its_rows_are_read_as_a_table_with_steps_as_integers(written: Written) -> None:
    names = [name for name in written.files if name.endswith(".jsonl")]
    assert f"{report_name(written.command)}_rows.jsonl" in names
    for name in names:
        rows = read_jsonl(written.folder / name)
        assert len(read_rows(written.folder / name)) == len(rows) > 0, name
        for key, value in (item for row in rows for item in row.items()):
            if key == "step" or key.endswith("_step"):
                assert value is None or type(value) is int, (name, key)


@every_report
def test_its_page_shows_figures_that_exist_and_parse(written: Written) -> None:
    page = (written.folder / f"{report_name(written.command)}_report.md").read_text("utf-8")
    assert page.startswith("# ")
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert set(shown) <= set(written.files)
    for name in written.files:
        if name.endswith(".svg"):
            assert name in shown
            assert ElementTree.parse(written.folder / name).getroot().tag.endswith("svg")


@every_report
def test_equal_inputs_give_equal_bytes_and_nothing_is_replaced_unasked(
    written: Written, type_words: Callable[[str], Done]
) -> None:
    """All bytes but those of the JSON report, which tells times."""

    def bytes_of() -> dict[str, bytes]:
        return {name: (written.folder / name).read_bytes() for name in written.files}

    before = bytes_of()
    refused = type_words(typed(written.command))
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "--overwrite" in refused.err
    assert bytes_of() == before
    done = type_words(f"{typed(written.command)} --overwrite")
    assert (done.code, written.json["law"][:40] in " ".join(done.out.split())) == (0, True)
    again = bytes_of()
    differing = {name for name, data in before.items() if again.get(name) != data}
    assert again.keys() == before.keys()
    assert differing <= {f"{report_name(written.command)}_report.json"}
