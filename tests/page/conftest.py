"""A tiny run with a trace and every report that a page draws, made by the page's own commands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import type_in
from tiny_run import RUN, MadeOnce, trained, trained_once

from circuit.config import digest_of
from circuit.page import PageResult, formation_page
from circuit.train_config import load_run_config

__all__ = ["bare", "circuit", "other", "page", "told", "told_once", "trained", "trained_once"]


@dataclass(frozen=True)
class Page:
    """A written page, read back."""

    text: str

    @property
    def payload(self) -> dict[str, Any]:
        """The JSON of its data element."""
        found = re.search(
            r'<script type="application/json" id="page-data">(.*?)</script>', self.text
        )
        assert found is not None
        payload = json.loads(found[1])
        assert isinstance(payload, dict)
        return payload

    def records(self, panel: str, data: str) -> list[dict[str, Any]]:
        """The records of some data of a panel."""
        columns = self.payload["panels"][panel]["data"][data]
        names = list(columns)
        return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def follow(result: PageResult) -> None:
    """Type every command that a page asks for, a probe set or trace first."""
    for missing in result.missing:
        words = shlex.split(missing.command)
        assert type_in(words[1:]) == 0, missing.command


@pytest.fixture(scope="session")
def told_once(trained_once: Path, made_once: MadeOnce) -> Path:
    """The tiny run with every report that the page of the bare run asks for."""

    def fill() -> None:
        shutil.copytree(trained_once, ".", dirs_exist_ok=True)
        shutil.rmtree(RUN / "analysis")
        first = formation_page(RUN)
        follow(first)
        formation_page(RUN, overwrite=True)

    return made_once("told", fill)


@pytest.fixture
def bare(trained: Path) -> Path:
    """The run without any report or probe set, in a working directory of its own."""
    shutil.rmtree(trained / "analysis")
    return trained


@pytest.fixture
def told(told_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run with every report, in a copy of its working directory."""
    shutil.copytree(told_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return RUN


@pytest.fixture
def other(told: Path) -> Path:
    """A second run beside the first: another name, learning rate and folder, without an SVD."""
    folder = told.with_name("other")
    shutil.copytree(told, folder)
    config = json.loads((folder / "run_config.json").read_text())
    config |= {"name": "other", "output_dir": str(folder)}
    config["optimizer"]["learning_rate"] = 0.02
    (folder / "run_config.json").write_text(json.dumps(config))
    ours, theirs = (load_run_config(run).recipe_digest() for run in (told, folder))
    for report in folder.rglob("*_report.json"):
        payload = json.loads(report.read_text().replace(ours, theirs))
        claimed = payload.pop("digest", None)
        report.write_text(json.dumps(payload | ({"digest": digest_of(payload)} if claimed else {})))
    return folder


@pytest.fixture(scope="session")
def page(told_once: Path) -> Page:
    """The page of the run with every report."""
    return Page((told_once / RUN / "formation.html").read_text(encoding="utf-8"))


@pytest.fixture
def circuit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Types `circuit ...`; exit code, stdout, stderr."""
    monkeypatch.delenv("CIRCUIT_DEVICE", raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = type_in(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
