"""Every report on runs of other shapes: it works, or says in one line which field is in its way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from each_report import KINDS, make
from new_shapes import NEW_SHAPES
from tiny_run import RUN

from circuit import CircuitError
from circuit.config import load_config
from circuit.page.formation import formation_page
from circuit.reports.report import Place
from circuit.reports.written import read_report
from circuit.tasks.probes import write_probe_set
from circuit.trace.record import RecordOptions, record_trace
from circuit.train_config import ModelConfig, TrainConfig
from circuit.training.loop import train

WITHOUT_MLPS = {
    "mlp-functional-write-adam-state-attribution": "`component`: the model has no component 'L1M",
    "mlp-input-functional-subspace-report": "`component`: the model has no component 'L1MLP'",
    "write-path-selection": "`model.d_ff`: no path writes to an MLP, for the model has none",
}
"""What asks for MLPs, and what it says where there are none."""


CHOSEN = (
    "grokking",
    "attention alone, nothing else",
    pytest.param("attention alone", marks=pytest.mark.slow),
)
"""Between them they lack and have everything that the others do."""


@pytest.fixture(scope="module", params=CHOSEN)
def shape(
    request: pytest.FixtureRequest,
    tiny_folder: Path,
    train_payload: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ModelConfig]:
    """A working directory with a run of the shape, its probe set and a trace of three steps."""
    folder = tmp_path_factory.mktemp("shape")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("CIRCUIT_DEVICE", raising=False)
        shutil.copytree(tiny_folder, "data/tiny")
        payload = train_payload()
        payload["model"] |= {"layers": 2, **NEW_SHAPES[request.param]}
        Path("tiny.json").write_text(json.dumps(payload))
        config = load_config(Path("tiny.json"), TrainConfig)
        train(config)
        splits = ["validation_iid", "heldout_pairs"]
        write_probe_set("data/tiny", RUN / "analysis" / "probe_set.jsonl", splits, 8)
        record_trace(config, "trace", RecordOptions(end_step=3))
        yield config.model


def test_the_page_asks_for_what_the_model_has(shape: ModelConfig) -> None:
    given = {name: Path(name) for name in ("probe_set", "checkpoint_dir", "optimizer_trace_dir")}
    for kind in KINDS.values():
        if kind.place is not None:
            kind.usual(Place(shape, given, "L0H0")).check_model(shape)
    assert formation_page(RUN, "page.html").missing


def test_every_report_works_or_names_the_field(shape: ModelConfig) -> None:
    refused = {}
    for command in sorted(name for name, kind in KINDS.items() if kind.reads_run):
        try:
            result = make(command, overwrite=True)
        except CircuitError as error:
            refused[command] = str(error)
            continue
        assert read_report(result.report).law
    expected = WITHOUT_MLPS if shape.attention_only else {}
    assert refused.keys() == expected.keys(), refused
    for command, said in expected.items():
        assert refused[command].startswith(said)
        assert "\n" not in refused[command]
