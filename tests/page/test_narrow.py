"""The commands that a page prints take what the model has, however narrow it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import type_in

from circuit.page import formation_page


@pytest.mark.parametrize(
    ("d_model", "heads", "d_ff"),
    [
        (1, 1, 1),
        pytest.param(6, 3, 3, marks=pytest.mark.slow),
        pytest.param(16, 16, 40, marks=pytest.mark.slow),
    ],
)
def test_every_command_of_the_page_runs(
    d_model: int,
    heads: int,
    d_ff: int,
    workplace: Path,
    train_payload: Callable[..., dict[str, Any]],
) -> None:
    payload = train_payload(steps=2, checkpoint_every=1)
    payload["model"] |= {"layers": 1, "d_model": d_model, "heads": heads, "d_ff": d_ff}
    Path("narrow.json").write_text(json.dumps(payload))
    assert type_in(["train", "--config", "narrow.json"]) == 0
    asked = formation_page("runs/tiny", "page.html")
    assert len(asked.missing) > 8
    for missing in asked.missing:
        assert type_in(shlex.split(missing.command)[1:]) == 0, missing.command
    assert formation_page("runs/tiny", "page.html", overwrite=True).missing == []
