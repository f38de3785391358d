"""The commands that a page prints take what the model has, however narrow it is, of every task."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import type_in
from small_benchmarks import HELD, SETTINGS

from circuit.config import parse_config
from circuit.page import formation_page
from circuit.tasks.benchmark import write_benchmark
from circuit.tasks.registry import find_task

LOOKUP, *OTHERS = SETTINGS
RUN = "runs/tiny"
CHECKED = ["--check", "3", "--check-share", "0.1"]
JUDGED = ["--replays", "replays", "--subsets", "3", "--examples", "3", "--random-vectors", "1"]
OF_A_TRACE = {
    "trace attribute": [],
    "trace data": [],
    "trace influence": CHECKED,
    "trace counterfactual": ["--edit", "no decay,scale=weight_decay*0,steps=1:2"],
    "study data-attribution": [*JUDGED, "--share", "0.3"],
}
"""What no page asks for, and each draws with the command that makes it again."""


@pytest.mark.parametrize(
    ("task", "d_model", "heads", "d_ff"),
    [
        (LOOKUP, 1, 1, 1),
        *(
            pytest.param(LOOKUP, *shape, marks=pytest.mark.slow)
            for shape in ((6, 3, 3), (16, 16, 40))
        ),
        *((task, 1, 1, 1) for task in OTHERS),
    ],
)
def test_every_command_of_the_page_runs(
    task: str,
    d_model: int,
    heads: int,
    d_ff: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_payload: Callable[..., dict[str, Any]],
) -> None:
    monkeypatch.chdir(tmp_path)
    benchmark = {"name": "tiny", "benchmark_type": task, "output_dir": "data/tiny", "seed": 3}
    kind = find_task(task).Config
    write_benchmark(parse_config(benchmark | SETTINGS[task], kind, where="tiny"))
    best = {"split": HELD[task], "metric": "token_accuracy"}
    payload = train_payload(steps=2, checkpoint_every=1, tracked_splits=[HELD[task]], best=best)
    shape = {"layers": 1, "d_model": d_model, "heads": heads, "d_ff": d_ff}
    payload["model"] |= {**shape, "max_sequence_length": 64}
    Path("narrow.json").write_text(json.dumps(payload))
    assert type_in(["train", "--config", "narrow.json"]) == 0
    asked = formation_page(RUN, "page.html")
    assert len(asked.missing) > 4
    for missing in asked.missing:
        assert type_in(shlex.split(missing.command)[1:]) == 0, missing.command
    trace = f"{RUN}/analysis/optimizer_update_trace"
    if not Path(trace).exists():  # no report of the task that is asked for reads one
        recorded = ["trace", "record", "--config", RUN, "--from-initialization", "--end-step", "2"]
        assert type_in([*recorded, "--output-dir", trace]) == 0
    read = ["--config", RUN, "--probe-set", f"{RUN}/analysis/probe_set.jsonl", "--scalar", "loss"]
    read += ["--optimizer-trace-dir", trace]
    for at, (words, own) in enumerate(OF_A_TRACE.items()):
        output = ["--output-dir", f"{RUN}/analysis/of_a_trace_{at}"]
        assert type_in([*words.split(), *read, *own, *output]) == 0, words
    drawn = formation_page(RUN, "page.html", overwrite=True)
    assert drawn.missing == []
    drawn_with = {source.command for panel in drawn.panels for source in panel.sources}
    for words in OF_A_TRACE:
        (command,) = (one for one in drawn_with if words in one and "of_a_trace" in one)
        assert type_in([*shlex.split(command)[1:], "--overwrite"]) == 0, command
