"""The pages of the repository: no placeholder is left, and every relative link leads somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_pages_are_whole(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z_]{3,}@", text) == []
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_environment_yml_has_the_floors_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    floors = [line.strip().removeprefix("- ") for line in lines if line.startswith("      - ")]
    assert floors == project["project"]["dependencies"]
