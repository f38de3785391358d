"""The scalar that docs/scalars.md teaches works as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import circuit
from circuit.trace.record import RecordOptions, record_trace
from circuit.train_config import TrainConfig
from circuit.training.loop import train

PAGE = Path(__file__).parents[2] / "docs" / "scalars.md"


def test_the_documented_scalar_is_followed_through_a_trace(
    workplace: Path,
    make_config: Callable[..., TrainConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(checkpoint_every=4)
    train(config)
    folder = Path(config.output_dir) / "analysis" / "optimizer_update_trace"
    record_trace(config, folder, RecordOptions(end_step=12, anchor_every=4))
    scalar, usage = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    # the same code on the tiny run: its folder, its one layer, its steps
    for there, here in (
        ("artifacts/runs/quickstart", config.output_dir),
        ("layer=1, head=2", "layer=0, head=1"),
        ("300, 340", "4, 10"),
    ):
        assert there in usage
        usage = usage.replace(there, str(here))
    module = ModuleType("documented")
    monkeypatch.setitem(sys.modules, "documented", module)  # dataclasses look their module up
    namespace: dict[str, Any] = vars(module)
    exec(compile(scalar, str(PAGE), "exec"), namespace)
    exec(compile(usage, str(PAGE), "exec"), namespace)
    assert len([line for line in scalar.splitlines() if line.strip()]) <= 26
    found = namespace["found"]
    assert (found.start, found.end) == (4, 10)
    assert found.closure().path_absolute < 1e-3
    # the values are the model's own attention, by a loop over reads
    run = circuit.open_run(config.output_dir)
    batch = run.batch("validation_iid", range(16))
    _, cache = run.model(4).run_with_cache(batch.tokens)
    pattern, reads = cache["blocks.0.attn.hook_pattern"], batch
    by_read = [
        float(pattern[reads.row[i], 1, reads.at[i], reads.facts["support_value_pos"][i]])
        for i in range(len(reads))
    ]
    assert float(found.before[0]) == pytest.approx(sum(by_read) / len(by_read), rel=1e-5)
    assert "weight_decay" in capsys.readouterr().out
