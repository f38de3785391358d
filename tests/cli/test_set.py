"""--set as it is typed: a variant without a new file, and every command remembers it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from circuit.cli.app import app
from typer.main import get_command

import circuit as library
from circuit.config import parse_config
from circuit.reports.report import all_reports
from circuit.train_config import TrainConfig

Run = Callable[..., Any]
TRAIN = ("train", "--config", "configs/train/tiny.json")
VARIANT = ("--set", "output_dir=runs/b", "--set", "optimizer.learning_rate=0.02", "--set", "seed=5")
TEXTS = list(VARIANT[1::2])
RUN = "runs/tiny"
OWN = ("--config", f"{RUN}/run_config.json")


def files(root: str) -> dict[str, bytes]:
    """Every file but those that tell the speed or the order of writing, and locks."""
    aside = (".lock", ".manifest.json", "summary.json")
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in Path(root).rglob("*")
        if path.is_file() and not path.name.endswith(aside)
    }


def records(payload: Any) -> Iterator[Any]:
    """Every value under the key `overrides` in a JSON document."""
    for key, value in payload.items() if isinstance(payload, dict) else ():
        if key == "overrides":
            yield value
        else:
            yield from records(value)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_variant_is_the_run_of_a_file_with_these_values(circuit: Run) -> None:
    assert circuit(*TRAIN, *VARIANT).code == 0
    found = files("runs/b")
    payload = read(Path("configs/train/tiny.json"))
    payload["optimizer"]["learning_rate"] = 0.02
    Path("configs/train/b.json").write_text(
        json.dumps({**payload, "output_dir": "runs/b", "seed": 5})
    )
    assert circuit("train", "--config", "configs/train/b.json", "--overwrite").code == 0
    by_file = files("runs/b")
    assert found.keys() == by_file.keys()
    assert [name for name in found if found[name] != by_file[name]] == ["run_config.json"]
    config = json.loads(found["run_config.json"])
    assert config.pop("overrides") == {"config": "configs/train/tiny.json", "set": TEXTS}
    assert config == json.loads(by_file["run_config.json"])
    assert not Path(RUN).exists()


def test_a_run_with_overrides_goes_on_with_them_or_from_its_own_config(circuit: Run) -> None:
    assert circuit(*TRAIN, *VARIANT).code == 0
    whole = files("runs/b")
    for again in ((*TRAIN, *VARIANT), ("train", "--config", "runs/b/run_config.json")):
        assert circuit(*TRAIN, *VARIANT, "--overwrite", "--stop-at-step", "2").code == 0
        done = circuit(*again, "--resume")
        assert "step 4 of 4; 2 steps in" in done.out, done.err
        resumed = files("runs/b")
        assert {name: resumed[name] for name in whole} == whole
    refused = circuit(*TRAIN, *VARIANT[:-1], "seed=6", "--resume")
    assert refused.code == 2
    assert "cannot resume with another config: seed is 5 there and 6 here" in refused.err


def test_the_study_goes_on_with_a_run_with_overrides(circuit: Run) -> None:
    assert circuit(*TRAIN, *VARIANT, "--stop-at-step", "3").code == 0
    assert "step 4, from 3" in circuit("study", *TRAIN, *VARIANT).out


def test_a_run_tells_python_what_was_set(circuit: Run) -> None:
    assert circuit(*TRAIN, *VARIANT).code == 0
    overrides = library.open_run("runs/b").config.overrides
    assert overrides is not None
    assert (overrides.config, overrides.set) == ("configs/train/tiny.json", TEXTS)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["steps"], "--set steps: not a pair"),
        (["stpes=3"], "--set stpes=3: unknown field 'stpes'; did you mean steps?"),
        (["steps=many"], "configs/train/tiny.json with --set steps=many: field 'steps'"),
        (["seed=1", "seed=2"], "--set seed=2: 'seed' is set already"),
        (['best={"split":"a","split":"b"}'], "'split' stands twice in an object"),
        (["device=tpu"], "with --set device=tpu: field 'device'"),
    ],
)
def test_a_mistake_in_set_is_one_line_and_exit_code_2(
    circuit: Run, texts: list[str], said: str
) -> None:
    before = files(".")
    done = circuit(*TRAIN, *(word for text in texts for word in ("--set", text)))
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert said in line
    assert files(".") == before


def test_an_option_and_set_each_beat_the_variable(
    circuit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUIT_DEVICE", "mps")
    assert circuit(*TRAIN, "--set", "device=cpu").code == 0
    assert circuit(*TRAIN, "--overwrite", "--device", "cpu").code == 0


START = ("trace", "record", *TRAIN[1:], "--from-initialization", "--end-step", "2")


@pytest.mark.parametrize(
    ("words", "option", "text"),
    [
        (TRAIN, ("--threads", "1"), "threads=2"),
        (TRAIN, ("--threads", "1"), "threads=1"),
        (TRAIN, ("--device", "cpu"), "device=mps"),
        ((*START, "--output-dir", "runs/x"), ("--train-split", "train"), "train_split=heldout"),
    ],
)
def test_a_field_is_set_by_its_option_or_by_set(
    circuit: Run, words: tuple[str, ...], option: tuple[str, ...], text: str
) -> None:
    before = files(".")
    done = circuit(*words, *option, "--set", text)
    assert (done.code, done.out) == (2, "")
    assert f"--set {text}: '{text.partition('=')[0]}' is set by {' '.join(option)}, too" in done.err
    assert done.err.count("\n") == 1
    assert files(".") == before


# --- every command remembers ----------------------------------------------------------------------

PROBES = ("--probe-set", "runs/probe_set.jsonl")
LAST = ("--checkpoint", f"{RUN}/checkpoints/step_000004.pt")
TRACE = ("--optimizer-trace-dir", "runs/trace")
RENAMED = "name=renamed"
ASKED = {"config": OWN[1], "set": [RENAMED]}
COMMANDS: dict[str, tuple[str, ...]] = {
    "evaluate": LAST,
    "trace qk": (
        *(*PROBES, *TRACE, "--head", "L0H0", "--rank", "2"),
        *("--min-route-pairs-per-type", "2"),
    ),
    "trace record": ("--from-initialization", "--end-step", "2"),
    "study trace": ("--end-step", "2"),
    "study train": (),  # the last, since it trains the run anew
}
"""Those that take a training config, and what else they need but --config and --output-dir."""
REPORTS = {name for kind in all_reports() for name in kind.names or (kind.command,)}
"""Of these it is a law that they remember: tests/reports/test_each_report.py."""
OTHERS = {
    "train": "test_a_variant_is_the_run_of_a_file_with_these_values",
    "generate-benchmark": "test_a_benchmark_remembers_what_was_set",
    "study derive-config": "test_a_derived_config_is_a_plain_file",
    "export": "it writes weights, and no record of how they were asked for",
    "optimizer-update-trace": "trace record",
}
"""Where the others are tested, or what they are another name of."""
NO_OUTPUT = ("evaluate", "study train")


def commands(group: Any = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in (group or get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def test_no_command_with_a_config_is_left_out() -> None:
    taking = {n for n, c in commands() if any("--config" in param.opts for param in c.params)}
    assert taking - REPORTS == (COMMANDS.keys() | OTHERS.keys()) - REPORTS


def prepare(circuit: Run) -> None:
    """A run, its trace, and a probe set; no record in any of them."""
    for words in (
        TRAIN,
        (*f"trace record --from-initialization --end-step 4 --output-dir {TRACE[1]}".split(), *OWN),
        f"generate-probe-set --benchmark-dir data/tiny --output {PROBES[1]}"
        " --examples-per-split 24".split(),
    ):
        done = circuit(*words)
        assert done.code == 0, done.err
    assert [name for name, data in files("runs").items() if b'"overrides"' in data] == []


def test_every_other_command_remembers_what_was_set(circuit: Run) -> None:
    prepare(circuit)
    for command, more in COMMANDS.items():
        before = files("runs")
        folder = () if command in NO_OUTPUT else ("--output-dir", f"runs/of/{command}")
        done = circuit(*command.split(), *OWN, "--set", RENAMED, *more, *folder)
        assert done.code == 0, (command, done.err)
        changed = [name for name, data in files("runs").items() if before.get(name) != data]
        payloads = [read(Path("runs", name)) for name in changed if name.endswith(".json")]
        found = [record for payload in payloads for record in records(payload)]
        assert found, command
        assert all(record == ASKED for record in found), command


def test_a_report_of_a_run_with_overrides_tells_those_of_the_run(circuit: Run) -> None:
    assert circuit(*TRAIN, *VARIANT).code == 0
    words = ("evaluate", "--config", "runs/b/run_config.json")
    last = ("--checkpoint", "runs/b/checkpoints/step_000004.pt")
    assert circuit(*words, *last, "--set", RENAMED).code == 0
    of_run = {"config": "configs/train/tiny.json", "set": TEXTS}
    asked = {"config": "runs/b/run_config.json", "set": [RENAMED], "earlier": of_run}
    path = Path("runs/b/evaluation/step_000004.json")
    assert list(records(read(path))) == [asked, asked]  # of each split


def test_each_split_keeps_the_overrides_of_its_own_evaluation(circuit: Run) -> None:
    assert circuit(*TRAIN).code == 0
    path = Path(RUN, "evaluation/step_000004.json")
    words = ("evaluate", *OWN, *LAST, "--split")
    assert circuit(*words, "validation_iid").code == 0
    plain = read(path)
    assert list(records(plain)) == []
    assert circuit(*words, "heldout_pairs", "--set", RENAMED).code == 0
    both = read(path)["evaluations"]
    assert both["validation_iid"] == plain["evaluations"]["validation_iid"]
    assert both["heldout_pairs"].pop("overrides") == ASKED
    assert both["heldout_pairs"].keys() == both["validation_iid"].keys()
    assert circuit(*words, "train").code == 0  # and a third keeps both
    assert list(records(read(path))) == [ASKED]
    assert circuit(*words, "heldout_pairs").code == 0
    assert list(records(read(path))) == []


def test_a_trace_that_is_resumed_keeps_the_overrides_that_made_it(circuit: Run) -> None:
    assert circuit(*TRAIN).code == 0
    rate, seed = (["optimizer.learning_rate=0.01"], ["seed=11"])  # what the file says

    def recorded(end: int, *words: str) -> dict[str, Any]:
        command = ("trace", "record", *OWN, "--from-initialization", "--output-dir", "runs/trace")
        done = circuit(*command, "--end-step", str(end), *words)
        assert done.code == 0, done.err
        report = read(Path("runs/trace/optimizer_update_trace_report.json"))
        return {n: v for n, v in report["provenance"].items() if n.endswith("overrides")}

    first = {"config": OWN[1], "set": rate}
    other = {"config": OWN[1], "set": seed}
    assert recorded(1) == {}
    assert recorded(2, "--resume", "--set", *rate) == {"overrides": first}
    assert recorded(3, "--resume") == {"overrides": first}
    both = {"overrides": first, "further_overrides": [other]}
    assert recorded(4, "--resume", "--set", *seed) == both
    assert recorded(4, "--resume", "--set", *rate) == both
    assert recorded(4, "--overwrite", "--set", *seed) == {"overrides": other}


def test_shards_merge_whatever_the_logs_and_keep_the_overrides(circuit: Run) -> None:
    """What a config says beside the recipe is no part of what is attributed."""
    prepare(circuit)
    Path("logs.json").write_text(json.dumps({**read(Path(OWN[1])), "log_every": 7, "name": "x"}))
    sets = [("--set", RENAMED), (), ("--set", "log_every=2", "--set", "eval_every=3")]
    configs = [OWN, ("--config", "logs.json"), OWN]
    for start, (config, more) in enumerate(zip(configs, sets, strict=True)):
        window = ("--start-step", str(start), "--end-step", str(start + 1))
        words = (*COMMANDS["trace qk"], *window, "--output-dir", f"runs/{start}")
        done = circuit("trace", "qk", *config, *more, *words)
        assert done.code == 0, done.err
    name = "bilinear_qk_rank_adam_state_attribution_report.json"
    asked = [
        {"steps": [0, 1], "overrides": ASKED},
        {"steps": [2, 3], "overrides": {"config": OWN[1], "set": list(sets[2][1::2])}},
    ]
    assert circuit("trace", "merge", "runs/a", "runs/0", "runs/1").code == 0
    assert circuit("trace", "merge", "runs/b", "runs/a", "runs/2").code == 0  # one merged already
    assert circuit("trace", "merge", "runs/c", "runs/1").code == 0
    found = [read(Path(f"runs/{out}", name))["provenance"] for out in "abc1"]
    assert [one.get("shard_overrides") for one in found] == [asked[:1], asked, None, None]
    # the config of the digest is the trace's, with the recording's threads
    traced = read(Path(TRACE[1], "trace.json"))
    own = parse_config(traced["config"], TrainConfig, where="trace")
    digest = own.replace(threads=traced["environment"]["threads"]).digest()
    assert [one["config_digest"] for one in found] == [digest] * 4


def test_what_the_run_did_not_do_is_refused(circuit: Run) -> None:
    """An override of the recipe meets the refusals of another config."""
    prepare(circuit)
    of_another = "belongs to another config: optimizer.learning_rate is 0.01 there and 0.1 here"
    rate = ("--set", "optimizer.learning_rate=0.1")
    start = ("--resume-checkpoint", LAST[1].replace("4.pt", "3.pt"), "--num-steps", "1")
    words = ("generate-benchmark", "--config", "configs/benchmark/tiny.json")
    assert circuit(*words, "--set", "seed=8", "--set", "output_dir=data/other").code == 0
    elsewhere = ("--set", "benchmark_dir=data/other")
    before = files(".")
    for words, said in (
        (("evaluate", *OWN, *rate, *LAST), of_another),
        (("trace", "record", *OWN, *rate, *start, "--output-dir", "runs/x"), of_another),
        (
            (*("trace", "qk", *OWN, *rate), *COMMANDS["trace qk"], "--output-dir", "runs/x"),
            "is not that of the trace",
        ),
        (
            (*("trace", "qk", *OWN, *elsewhere), *COMMANDS["trace qk"], "--output-dir", "runs/x"),
            "the benchmark in data/other is not the one that was traced",
        ),
    ):
        done = circuit(*words)
        assert done.code == 2
        assert said in done.err
        assert files(".") == before


def test_a_benchmark_remembers_what_was_set(circuit: Run) -> None:
    words = ("generate-benchmark", "--config", "configs/benchmark/tiny.json", "--overwrite")
    texts = ["splits.train.samples=30", "output_dir=data/small"]
    done = circuit(*words, "--set", texts[0], "--set", texts[1], "--json")
    assert done.code == 0
    metadata = read(Path("data/small/metadata.json"))
    assert metadata["overrides"] == {"config": "configs/benchmark/tiny.json", "set": texts}
    assert metadata["splits"]["train"]["records"] == 30
    assert circuit(*TRAIN, "--set", "benchmark_dir=data/small").code == 0  # and it is a benchmark
    payload = read(Path("configs/benchmark/tiny.json"))
    payload["splits"]["train"]["samples"] = 30
    Path("configs/benchmark/small.json").write_text(
        json.dumps({**payload, "output_dir": "data/small"})
    )
    by_file = circuit(*words[:2], "configs/benchmark/small.json", "--overwrite", "--json")
    assert by_file.payload["digest"] == done.payload["digest"]
    del metadata["overrides"]
    assert read(Path("data/small/metadata.json")) == metadata


def test_a_derived_config_is_a_plain_file(circuit: Run) -> None:
    words = ("study", "derive-config", *TRAIN[1:], "--output", "configs/train/b.json")
    assert circuit(*words, *VARIANT).code == 0
    payload = read(Path("configs/train/b.json"))
    assert (payload["seed"], payload["optimizer"]["learning_rate"]) == (5, 0.02)
    assert list(records(payload)) == []
    assert circuit(*words, "--overwrite").code == 2  # nothing to derive
