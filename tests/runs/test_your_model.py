"""docs/your_model.md: its blocks run as they stand, and give what the page says."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import type_and_read
from safetensors.torch import load_file

from circuit.artifacts import read_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "your_model.md"
TEXT = PAGE.read_text(encoding="utf-8")
SHORTER = {"logit_margin], 100, 200": "logit_margin], 100, 120", "range(60)": "range(20)"}
SHORTER |= {"steps, checkpoint_every = 300, 100": "steps, checkpoint_every = 20, 10"}
SHORTER |= {"[copying], 0, 60": "[copying], 0, 20"}
SHORTER |= {"--end-step 130": "--end-step 103"}
"""Fewer steps than the page's are taken and attributed."""


@pytest.mark.filterwarnings("ignore")  # of the Trainer and of nn.TransformerEncoderLayer
def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_run", "my_scalars"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    text = TEXT
    for long, short in SHORTER.items():
        assert long in text
        text = text.replace(long, short)
    names: dict[str, Any] = {"__name__": "__main__"}
    first = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert first
    Path("mine.py").write_text(first[1])
    for kind, block in re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL):
        if kind == "python" and (file := re.match(r"# (my_\w+\.py)\n", block)):
            Path(file[1]).write_text(block)
            continue
        if kind == "python":
            exec(compile(block, str(PAGE), "exec"), names)
            continue
        for line in block.splitlines():
            done = type_and_read(shlex.split(line)[1:], capsys)
            assert done.code == 0, line + done.err
            if "verify" in line:
                assert "0 bits differ" in done.out
    weights = load_file("artifacts/step_123.safetensors")
    names["build"]().load_state_dict(weights, strict=True)
    assert "test_loss" in Path("artifacts/sums/formation.html").read_text()
    assert Path("artifacts/test_loss.nc").exists()
    rows = read_jsonl(Path("artifacts/sums/watch_rows.jsonl"))
    assert [row["step"] for row in rows] == [50, 100, 150, 200, 250, 300]
    assert names["found"].closure().path < 1e-3
    assert names["series"].closure().path_absolute < 0.01
    assert set(names["series"].groups["layer"]) == {
        "embed",
        "place",
        "blocks.0",
        "blocks.1",
        "unembed",
    }
    assert names["run"].steps[-1] == 10
    assert all(torch.isfinite(x).all() for x in names["run"].state(10).parameters.values())
